// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of plan.hpp.

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <tessera/checkpoint/detail/checksum.hpp>
#include <tessera/checkpoint/detail/tiling.hpp>
#include <tessera/checkpoint/plan.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

namespace detail {

/// Order of boxes of one tensor: by place, row-major, then by size.
inline bool comes_before(const box& a, const box& b) {
  for (int i = 0; i < a.rank; ++i) {
    if (a.offset[i] != b.offset[i]) return a.offset[i] < b.offset[i];
  }
  for (int i = 0; i < a.rank; ++i) {
    if (a.size[i] != b.size[i]) return a.size[i] < b.size[i];
  }
  return false;
}

/// A part of a tensor that a rank holds.
struct held_part {
  box part;
  std::int32_t rank;
};

/// Brings equal parts together.
inline void sort_parts(std::vector<held_part>& held) {
  std::sort(held.begin(), held.end(), [](const held_part& a, const held_part& b) {
    if (a.part == b.part) return a.rank < b.rank;
    return comes_before(a.part, b.part);
  });
}

/// Cuts all parts at each other's ends along dimension 0.
inline void cut_parts(std::vector<held_part>& held) {
  std::vector<std::int64_t> cuts;
  for (const held_part& h : held) {
    cuts.push_back(h.part.offset[0]);
    cuts.push_back(h.part.offset[0] + h.part.size[0]);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<held_part> result;
  for (const held_part& h : held) {
    const std::int64_t end = h.part.offset[0] + h.part.size[0];
    auto cut = std::upper_bound(cuts.begin(), cuts.end(), h.part.offset[0]);
    held_part rest = h;
    for (; rest.part.offset[0] < end; ++cut) {
      held_part slice = rest;
      slice.part.size[0] = *cut - rest.part.offset[0];
      result.push_back(slice);
      rest.part.offset[0] = *cut;
    }
  }
  held = std::move(result);
}

/// A part and the ranks that hold it.
struct shared_part {
  std::int32_t tensor;
  box part;
  std::int64_t first_holder;  // into a common array
  std::int64_t num_holders;
};

/// The distinct parts of one tensor, which tile it. @return What is wrong, or "".
inline std::string distinct_parts(const box& whole, std::vector<held_part>& held, std::vector<box>& parts) {
  sort_parts(held);
  parts.clear();
  for (const held_part& h : held) {
    if (parts.empty() || parts.back() != h.part) parts.push_back(h.part);
  }
  return find_tiling_error(whole, parts);
}

}  // namespace detail

inline save_plan make_plan(const std::vector<std::vector<piece_info>>& pieces, const plan_options& options) {
  TESSERA_EXPECTS(!pieces.empty(), "a plan needs the pieces of at least 1 rank");
  TESSERA_EXPECTS(options.block_bytes >= min_block_bytes && options.block_bytes <= max_block_bytes,
                  "block_bytes is " << options.block_bytes << ", it must be in [" << min_block_bytes << ", "
                                    << max_block_bytes << "]");
  TESSERA_EXPECTS(options.split_bytes >= 1, "split_bytes is " << options.split_bytes << ", it must be at least 1");
  save_plan plan;
  const std::size_t num_ranks = pieces.size();
  plan.num_ranks = static_cast<int>(num_ranks);
  plan.block_bytes = options.block_bytes;

  // pieces by tensor, tensors by name
  std::unordered_map<std::string_view, std::int32_t> index;
  std::vector<const piece_info*> firsts;
  std::vector<std::int32_t> first_ranks;
  std::vector<std::vector<detail::held_part>> held_of;
  for (std::size_t rank = 0; rank < num_ranks; ++rank) {
    for (const piece_info& piece : pieces[rank]) {
      expect_piece(piece);
      const auto [place, is_new] = index.try_emplace(piece.name, static_cast<std::int32_t>(firsts.size()));
      if (is_new) {
        firsts.push_back(&piece);
        first_ranks.push_back(static_cast<std::int32_t>(rank));
        held_of.emplace_back();
      }
      const piece_info& first = *firsts[static_cast<std::size_t>(place->second)];
      TESSERA_EXPECTS(first.type == piece.type && first.whole == piece.whole,
                      "tensor '" << piece.name << "' is " << name_of(first.type) << " " << detail::text_of(first.whole)
                                 << " on rank " << first_ranks[static_cast<std::size_t>(place->second)] << " and "
                                 << name_of(piece.type) << " " << detail::text_of(piece.whole) << " on rank " << rank);
      if (!piece.part.empty()) {
        held_of[static_cast<std::size_t>(place->second)].push_back({piece.part, static_cast<std::int32_t>(rank)});
      }
    }
  }
  std::vector<std::int32_t> order(firsts.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return firsts[static_cast<std::size_t>(a)]->name < firsts[static_cast<std::size_t>(b)]->name;
  });

  // the distinct parts of each tensor and who holds them, large ones divided
  std::vector<detail::shared_part> shared;
  std::vector<std::int32_t> holders;
  std::vector<box> parts;
  for (const std::int32_t i : order) {
    const piece_info& first = *firsts[static_cast<std::size_t>(i)];
    std::vector<detail::held_part>& held = held_of[static_cast<std::size_t>(i)];
    const auto tensor = static_cast<std::int32_t>(plan.tensors.size());
    plan.tensors.push_back({first.name, first.type, first.whole, first.placement, 0, 0});
    if (first.whole.empty()) {  // nothing to write, but it has a name and a shape
      shared.push_back({tensor, first.whole, static_cast<std::int64_t>(holders.size()), 1});
      holders.push_back(first_ranks[static_cast<std::size_t>(i)]);
      continue;
    }
    std::string wrong = detail::distinct_parts(first.whole, held, parts);
    if (!wrong.empty() && first.whole.rank > 0) {
      detail::cut_parts(held);
      wrong = detail::distinct_parts(first.whole, held, parts);
    }
    TESSERA_EXPECTS(wrong.empty(), "tensor '" << first.name << "' " << detail::text_of(first.whole)
                                              << ": the parts that ranks hold do not cover it: " << wrong
                                              << ", or in equal parts on several ranks");
    for (std::size_t begin = 0; begin < held.size();) {
      std::size_t end = begin;
      const auto first_holder = static_cast<std::int64_t>(holders.size());
      const box part = held[begin].part;
      for (; end < held.size() && held[end].part == part; ++end) {
        TESSERA_EXPECTS(end == begin || held[end].rank != held[end - 1].rank,
                        "tensor '" << first.name << "': rank " << held[end].rank << " holds the part "
                                   << detail::text_of(part) << " twice");
        holders.push_back(held[end].rank);
      }
      const auto num_holders = static_cast<std::int64_t>(end - begin);
      const std::int64_t bytes = part.volume() * size_of(first.type);
      std::int64_t slices = std::min(num_holders, (bytes + options.split_bytes - 1) / options.split_bytes);
      int dimension = 0;
      while (dimension < part.rank && part.size[dimension] < 2) ++dimension;
      if (dimension == part.rank) slices = 1;
      if (slices > 1) slices = std::min(slices, part.size[dimension]);
      for (std::int64_t s = 0; s < slices; ++s) {
        box slice = part;
        if (slices > 1) {
          const std::int64_t extent = part.size[dimension];
          // extent * s could overflow for extents beyond 2^31
          const std::int64_t from = extent / slices * s + std::min(s, extent % slices);
          slice.offset[dimension] += from;
          slice.size[dimension] = extent / slices + (s < extent % slices ? 1 : 0);
        }
        shared.push_back({tensor, slice, first_holder, num_holders});
      }
      begin = end;
    }
  }

  // the largest first, each to the holder that writes least so far
  plan.bytes.assign(num_ranks, 0);
  const auto bytes_of = [&](const detail::shared_part& s) {
    return s.part.volume() * size_of(plan.tensors[static_cast<std::size_t>(s.tensor)].type);
  };
  plan.chunks.reserve(shared.size());
  std::vector<std::pair<std::int64_t, std::int64_t>> choices;  // bytes, index
  for (const detail::shared_part& s : shared) {
    const auto chunk = static_cast<std::int64_t>(plan.chunks.size());
    planned_tensor& tensor = plan.tensors[static_cast<std::size_t>(s.tensor)];
    if (tensor.num_chunks++ == 0) tensor.first_chunk = chunk;
    const std::int32_t only = holders[static_cast<std::size_t>(s.first_holder)];
    plan.chunks.push_back({s.part, s.tensor, only, 0, {}});
    if (s.num_holders == 1) {
      plan.bytes[static_cast<std::size_t>(only)] += bytes_of(s);
    } else {
      choices.push_back({bytes_of(s), chunk});
    }
  }
  std::sort(choices.begin(), choices.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  for (const auto& [bytes, chunk] : choices) {
    const detail::shared_part& s = shared[static_cast<std::size_t>(chunk)];
    std::int32_t best = holders[static_cast<std::size_t>(s.first_holder)];
    for (std::int64_t h = 1; h < s.num_holders; ++h) {
      const std::int32_t rank = holders[static_cast<std::size_t>(s.first_holder + h)];
      if (plan.bytes[static_cast<std::size_t>(rank)] < plan.bytes[static_cast<std::size_t>(best)]) best = rank;
    }
    plan.chunks[static_cast<std::size_t>(chunk)].writer = best;
    plan.bytes[static_cast<std::size_t>(best)] += bytes;
  }

  // places in files: wide elements first, so that all are aligned to their size; names
  plan.writes.resize(num_ranks);
  for (std::size_t chunk = 0; chunk < plan.chunks.size(); ++chunk) {
    plan.writes[static_cast<std::size_t>(plan.chunks[chunk].writer)].push_back(static_cast<std::int64_t>(chunk));
  }
  const auto width_of = [&](std::int64_t chunk) {
    return size_of(plan.tensors[static_cast<std::size_t>(plan.chunks[static_cast<std::size_t>(chunk)].tensor)].type);
  };
  for (std::vector<std::int64_t>& writes : plan.writes) {
    std::stable_sort(writes.begin(), writes.end(),
                     [&](std::int64_t a, std::int64_t b) { return width_of(a) > width_of(b); });
    std::int64_t begin = 0;
    for (const std::int64_t i : writes) {
      planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(i)];
      chunk.begin = begin;
      begin += chunk.part.volume() * width_of(i);
    }
  }
  std::unordered_set<std::string_view> taken;
  for (const planned_tensor& tensor : plan.tensors) {
    if (tensor.num_chunks > 1) {
      for (const planned_tensor& other : plan.tensors) taken.insert(other.name);
      break;
    }
  }
  std::string digest_of;
  const auto digest = [&](std::int64_t number) {
    digest_of.append(reinterpret_cast<const char*>(&number), sizeof(number));
  };
  digest(plan.num_ranks);
  digest(plan.block_bytes);
  for (const planned_tensor& tensor : plan.tensors) {
    digest_of += tensor.name;
    digest(static_cast<std::int64_t>(tensor.type));
    for (std::int64_t k = 0; k < tensor.num_chunks; ++k) {
      planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(tensor.first_chunk + k)];
      chunk.entry = tensor.name;
      if (tensor.num_chunks > 1) {
        chunk.entry += '.' + std::to_string(k);
        while (taken.count(chunk.entry) != 0) chunk.entry += '_';  // another tensor has this name
      }
      digest(chunk.writer);
      digest(chunk.part.rank);
      for (int i = 0; i < chunk.part.rank; ++i) {
        digest(chunk.part.offset[i]);
        digest(chunk.part.size[i]);
        digest(tensor.whole.size[i]);
      }
    }
  }
  plan.digest = detail::checksum_of(digest_of);
  return plan;
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
