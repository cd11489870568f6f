// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of read_plan.hpp.

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <tessera/checkpoint/detail/plan.hpp>
#include <tessera/checkpoint/detail/slabs.hpp>
#include <tessera/checkpoint/detail/tiling.hpp>
#include <tessera/checkpoint/read_plan.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

namespace detail {

/// Chooses readers: the rank that has least to read so far, but the reader of the block before as long as it is not far
/// ahead, because neighbours in a file are read faster together.
class reader_choice {
 public:
  explicit reader_choice(std::size_t num_ranks) : bytes_(num_ranks) {}

  void start_chunk() { previous_ = -1; }

  std::int32_t choose(const read_plan& plan, const read_unit& unit) {
    // of a large group of replicas a few are asked, others for the next block
    constexpr std::size_t most_asked = 16;
    std::int32_t best = -1;
    bool previous_wants = false;
    for (std::int64_t n = 0; n < unit.num_needs; ++n) {
      const std::size_t target = static_cast<std::size_t>(plan.needs[static_cast<std::size_t>(unit.first_need + n)]);
      const std::vector<read_holder>& holders = plan.targets[target].holders;
      const std::size_t asked = std::min(holders.size(), most_asked);
      for (std::size_t i = 0; i < asked; ++i) {
        const std::int32_t rank = holders[(cursor_ + i) % holders.size()].rank;
        if (best < 0 || less_work(rank, best)) best = rank;
        previous_wants = previous_wants || rank == previous_;
      }
    }
    cursor_ += most_asked;
    constexpr std::int64_t ahead = std::int64_t{16} << 20;
    if (previous_wants && of(previous_) < of(best) + ahead) best = previous_;
    previous_ = best;
    of(best) += unit.bytes;
    return best;
  }

  std::vector<std::int64_t> take_bytes() { return std::move(bytes_); }

 private:
  std::int64_t& of(std::int32_t rank) { return bytes_[static_cast<std::size_t>(rank)]; }
  bool less_work(std::int32_t a, std::int32_t b) { return of(a) != of(b) ? of(a) < of(b) : a < b; }

  std::vector<std::int64_t> bytes_;
  std::int32_t previous_ = -1;
  std::size_t cursor_ = 0;
};

}  // namespace detail

inline read_plan plan_reads(const manifest& content, const std::vector<std::vector<piece_info>>& pieces,
                            const std::string& source) {
  struct wanted {
    std::int32_t tensor;
    read_holder holder;
    const box* part;
  };
  std::vector<wanted> all;
  for (std::size_t rank = 0; rank < pieces.size(); ++rank) {
    for (std::size_t i = 0; i < pieces[rank].size(); ++i) {
      const piece_info& piece = pieces[rank][i];
      expect_piece(piece);
      const manifest_tensor* tensor = content.find(piece.name);
      TESSERA_EXPECTS_AS(checkpoint_error, tensor != nullptr,
                         source << ": there is no tensor '" << piece.name << "', which rank " << rank << " wants");
      TESSERA_EXPECTS_AS(checkpoint_error, tensor->type == piece.type && tensor->whole == piece.whole,
                         source << ": tensor '" << piece.name << "' is " << name_of(tensor->type) << " "
                                << detail::text_of(tensor->whole) << ", rank " << rank << " wants it as "
                                << name_of(piece.type) << " " << detail::text_of(piece.whole));
      if (piece.part.empty()) continue;
      all.push_back({static_cast<std::int32_t>(tensor - content.tensors.data()),
                     {static_cast<std::int32_t>(rank), static_cast<std::int32_t>(i)},
                     &piece.part});
    }
  }
  std::sort(all.begin(), all.end(), [](const wanted& a, const wanted& b) {
    if (a.tensor != b.tensor) return a.tensor < b.tensor;
    if (*a.part != *b.part) return detail::comes_before(*a.part, *b.part);
    return a.holder.rank != b.holder.rank ? a.holder.rank < b.holder.rank : a.holder.piece < b.holder.piece;
  });

  read_plan plan;
  for (const wanted& w : all) {
    if (plan.targets.empty() || plan.targets.back().tensor != w.tensor || plan.targets.back().part != *w.part) {
      plan.targets.push_back({w.tensor, *w.part, {}});
    }
    plan.targets.back().holders.push_back(w.holder);
  }
  detail::reader_choice readers(pieces.size());
  std::vector<std::int32_t> of_chunk;
  for (std::size_t begin = 0; begin < plan.targets.size();) {
    std::size_t end = begin;
    const std::int32_t index = plan.targets[begin].tensor;
    while (end < plan.targets.size() && plan.targets[end].tensor == index) ++end;
    const manifest_tensor& tensor = content.tensors[static_cast<std::size_t>(index)];
    const std::int64_t width = size_of(tensor.type);
    for (std::size_t c = 0; c < tensor.chunks.size(); ++c) {
      const manifest_chunk& chunk = tensor.chunks[c];
      of_chunk.clear();
      for (std::size_t t = begin; t < end; ++t) {
        if (!intersect(chunk.part, plan.targets[t].part).empty()) of_chunk.push_back(static_cast<std::int32_t>(t));
      }
      if (of_chunk.empty()) continue;
      readers.start_chunk();
      const detail::slab_division slabs(chunk.part, width, content.block_bytes);
      for (std::int64_t k = 0; k < slabs.count(); ++k) {
        read_unit unit{index, static_cast<std::int32_t>(c), k, slabs[k], 0, 0, 0, 0, 0};
        unit.first_need = static_cast<std::int64_t>(plan.needs.size());
        for (const std::int32_t t : of_chunk) {
          if (!intersect(unit.part, plan.targets[static_cast<std::size_t>(t)].part).empty()) plan.needs.push_back(t);
        }
        unit.num_needs = static_cast<std::int64_t>(plan.needs.size()) - unit.first_need;
        if (unit.num_needs == 0) continue;
        unit.begin = chunk.begin + chunk.part.local_offset(unit.part) * width;
        unit.bytes = unit.part.volume() * width;
        unit.reader = readers.choose(plan, unit);
        plan.units.push_back(unit);
      }
    }
    begin = end;
  }
  plan.bytes = readers.take_bytes();
  return plan;
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
