// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of plan.hpp.

#include <algorithm>
#include <cstdint>
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

/// A tensor as its ranks describe it.
struct collected_tensor {
  const piece_info* first;  // of the lowest rank
  std::int32_t first_rank;
  std::vector<held_part> held;  // parts that are not empty
};

/// A part and the ranks that hold it.
struct shared_part {
  std::int32_t tensor;
  box part;
  std::int64_t first_holder;  // into a common array
  std::int64_t num_holders;
};

/// The parts of all tensors, by tensor.
struct shared_parts {
  std::vector<shared_part> parts;
  std::vector<std::int32_t> holders;
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

/// Pieces by tensor, tensors by name.
inline std::vector<collected_tensor> collect_tensors(const std::vector<std::vector<piece_info>>& pieces) {
  std::unordered_map<std::string_view, std::size_t> index;
  std::vector<collected_tensor> tensors;
  for (std::size_t rank = 0; rank < pieces.size(); ++rank) {
    for (const piece_info& piece : pieces[rank]) {
      expect_piece(piece);
      const auto [place, is_new] = index.try_emplace(piece.name, tensors.size());
      if (is_new) tensors.push_back({&piece, static_cast<std::int32_t>(rank), {}});
      collected_tensor& tensor = tensors[place->second];
      const piece_info& first = *tensor.first;
      TESSERA_EXPECTS(first.type == piece.type && first.whole == piece.whole,
                      "tensor '" << piece.name << "' is " << name_of(first.type) << " " << text_of(first.whole)
                                 << " on rank " << tensor.first_rank << " and " << name_of(piece.type) << " "
                                 << text_of(piece.whole) << " on rank " << rank);
      if (!piece.part.empty()) tensor.held.push_back({piece.part, static_cast<std::int32_t>(rank)});
    }
  }
  std::sort(tensors.begin(), tensors.end(),
            [](const collected_tensor& a, const collected_tensor& b) { return a.first->name < b.first->name; });
  return tensors;
}

/// Sorts what ranks hold of a tensor, cut where parts overlap, so that equal parts are together. @throws
/// invalid_argument if they do not cover the tensor.
inline void expect_tiling(collected_tensor& tensor) {
  const piece_info& first = *tensor.first;
  std::vector<box> parts;
  std::string wrong = distinct_parts(first.whole, tensor.held, parts);
  if (!wrong.empty() && first.whole.rank > 0) {
    cut_parts(tensor.held);
    wrong = distinct_parts(first.whole, tensor.held, parts);
  }
  TESSERA_EXPECTS(wrong.empty(), "tensor '" << first.name << "' " << text_of(first.whole)
                                            << ": the parts that ranks hold do not cover it: " << wrong
                                            << ", or in equal parts on several ranks");
}

/// Adds a part, divided among its holders where it is large.
inline void add_slices(const shared_part& whole, std::int64_t element_bytes, std::int64_t split_bytes,
                       std::vector<shared_part>& slices) {
  const box& part = whole.part;
  const std::int64_t bytes = part.volume() * element_bytes;
  std::int64_t count = std::min(whole.num_holders, bytes / split_bytes + (bytes % split_bytes != 0 ? 1 : 0));
  int dimension = 0;
  while (dimension < part.rank && part.size[dimension] < 2) ++dimension;
  if (dimension == part.rank) count = 1;
  if (count > 1) count = std::min(count, part.size[dimension]);
  for (std::int64_t s = 0; s < count; ++s) {
    shared_part slice = whole;
    if (count > 1) {
      const std::int64_t extent = part.size[dimension];
      // extent * s could overflow for extents beyond 2^31
      const std::int64_t from = extent / count * s + std::min(s, extent % count);
      slice.part.offset[dimension] += from;
      slice.part.size[dimension] = extent / count + (s < extent % count ? 1 : 0);
    }
    slices.push_back(slice);
  }
}

/// The distinct parts of each tensor and who holds them, large ones divided. Names the plan's tensors.
inline shared_parts divide_parts(std::vector<collected_tensor>& tensors, std::int64_t split_bytes, save_plan& plan) {
  shared_parts all;
  for (collected_tensor& tensor : tensors) {
    const piece_info& first = *tensor.first;
    const std::vector<held_part>& held = tensor.held;
    const auto index = static_cast<std::int32_t>(plan.tensors.size());
    plan.tensors.push_back({first.name, first.type, first.whole, first.placement, 0, 0});
    if (first.whole.empty()) {  // nothing to write, but it has a name and a shape
      all.parts.push_back({index, first.whole, static_cast<std::int64_t>(all.holders.size()), 1});
      all.holders.push_back(tensor.first_rank);
      continue;
    }
    expect_tiling(tensor);
    for (std::size_t begin = 0; begin < held.size();) {
      std::size_t end = begin;
      const auto first_holder = static_cast<std::int64_t>(all.holders.size());
      const box part = held[begin].part;
      for (; end < held.size() && held[end].part == part; ++end) {
        TESSERA_EXPECTS(end == begin || held[end].rank != held[end - 1].rank,
                        "tensor '" << first.name << "': rank " << held[end].rank << " holds the part " << text_of(part)
                                   << " twice");
        all.holders.push_back(held[end].rank);
      }
      add_slices({index, part, first_holder, static_cast<std::int64_t>(end - begin)}, size_of(first.type), split_bytes,
                 all.parts);
      begin = end;
    }
  }
  return all;
}

/// Makes the parts chunks and says who writes them: the largest first, each the holder that writes least so far.
inline void choose_writers(const shared_parts& shared, save_plan& plan) {
  plan.bytes.assign(static_cast<std::size_t>(plan.num_ranks), 0);
  const auto bytes_of = [&](const shared_part& s) {
    return s.part.volume() * size_of(plan.tensors[static_cast<std::size_t>(s.tensor)].type);
  };
  plan.chunks.reserve(shared.parts.size());
  std::vector<std::pair<std::int64_t, std::int64_t>> choices;  // bytes, index
  for (const shared_part& s : shared.parts) {
    const auto chunk = static_cast<std::int64_t>(plan.chunks.size());
    planned_tensor& tensor = plan.tensors[static_cast<std::size_t>(s.tensor)];
    if (tensor.num_chunks++ == 0) tensor.first_chunk = chunk;
    const std::int32_t only = shared.holders[static_cast<std::size_t>(s.first_holder)];
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
    const shared_part& s = shared.parts[static_cast<std::size_t>(chunk)];
    std::int32_t best = shared.holders[static_cast<std::size_t>(s.first_holder)];
    for (std::int64_t h = 1; h < s.num_holders; ++h) {
      const std::int32_t rank = shared.holders[static_cast<std::size_t>(s.first_holder + h)];
      if (plan.bytes[static_cast<std::size_t>(rank)] < plan.bytes[static_cast<std::size_t>(best)]) best = rank;
    }
    plan.chunks[static_cast<std::size_t>(chunk)].writer = best;
    plan.bytes[static_cast<std::size_t>(best)] += bytes;
  }
}

/// Places in files: wide elements first, so that all are aligned to their size.
inline void place_in_files(save_plan& plan) {
  plan.writes.resize(static_cast<std::size_t>(plan.num_ranks));
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
}

/// Names in files: the tensor's, with a number where it has several chunks.
inline void name_entries(save_plan& plan) {
  std::unordered_set<std::string_view> taken;
  for (const planned_tensor& tensor : plan.tensors) {
    if (tensor.num_chunks > 1) {
      for (const planned_tensor& other : plan.tensors) taken.insert(other.name);
      break;
    }
  }
  for (const planned_tensor& tensor : plan.tensors) {
    for (std::int64_t k = 0; k < tensor.num_chunks; ++k) {
      planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(tensor.first_chunk + k)];
      chunk.entry = tensor.name;
      if (tensor.num_chunks == 1) continue;
      chunk.entry += '.' + std::to_string(k);
      while (taken.count(chunk.entry) != 0) chunk.entry += '_';  // another tensor has this name
    }
  }
}

/// Of everything that follows from the pieces; names in files follow from it.
inline std::uint64_t digest_of(const save_plan& plan) {
  std::string text;
  const auto add = [&](std::int64_t number) { text.append(reinterpret_cast<const char*>(&number), sizeof(number)); };
  add(plan.num_ranks);
  add(plan.block_bytes);
  for (const planned_tensor& tensor : plan.tensors) {
    text += tensor.name;
    add(static_cast<std::int64_t>(tensor.type));
    for (std::int64_t k = 0; k < tensor.num_chunks; ++k) {
      const planned_chunk& chunk = plan.chunks[static_cast<std::size_t>(tensor.first_chunk + k)];
      add(chunk.writer);
      add(chunk.part.rank);
      for (int i = 0; i < chunk.part.rank; ++i) {
        add(chunk.part.offset[i]);
        add(chunk.part.size[i]);
        add(tensor.whole.size[i]);
      }
    }
  }
  return checksum_of(text);
}

}  // namespace detail

inline save_plan make_plan(const std::vector<std::vector<piece_info>>& pieces, const plan_options& options) {
  TESSERA_EXPECTS(!pieces.empty(), "a plan needs the pieces of at least 1 rank");
  TESSERA_EXPECTS(options.block_bytes >= min_block_bytes && options.block_bytes <= max_block_bytes,
                  "block_bytes is " << options.block_bytes << ", it must be in [" << min_block_bytes << ", "
                                    << max_block_bytes << "]");
  TESSERA_EXPECTS(options.split_bytes >= 1, "split_bytes is " << options.split_bytes << ", it must be at least 1");
  save_plan plan;
  plan.num_ranks = static_cast<int>(pieces.size());
  plan.block_bytes = options.block_bytes;
  std::vector<detail::collected_tensor> tensors = detail::collect_tensors(pieces);
  detail::choose_writers(detail::divide_parts(tensors, options.split_bytes, plan), plan);
  detail::place_in_files(plan);
  detail::name_entries(plan);
  plan.digest = detail::digest_of(plan);
  return plan;
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
