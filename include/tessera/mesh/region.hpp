// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a rank holds of a tensor under placements: its extents, and the boxes it consists of.

#include <cstddef>
#include <cstdint>
#include <vector>

#include <tessera/core/box.hpp>
#include <tessera/mesh/axes.hpp>
#include <tessera/mesh/placement.hpp>

TESSERA_NAMESPACE_BEGIN

/// Indices `[begin, begin + count)` of one dimension.
struct index_range {
  std::int64_t begin = 0;  ///< First index, counted in the whole tensor.
  std::int64_t count = 0;  ///< How many.

  /// Same indices.
  constexpr bool operator==(const index_range&) const = default;
};

/// Ascending ranges of one dimension, none empty, none touching the next.
using index_ranges = std::vector<index_range>;

/// A part of a tensor and where it lies in a rank's local array.
struct placed_box {
  box logical;  ///< In the whole tensor.
  box local;    ///< In the rank's packed row-major array, whose extents are `region::extents()`.

  /// Same part in the same place.
  constexpr bool operator==(const placed_box&) const = default;
};

namespace detail {

/// Appends a range that begins at or behind the end of the last one.
constexpr void append(index_ranges& list, std::int64_t begin, std::int64_t count) {
  if (count <= 0) return;
  if (!list.empty() && list.back().begin + list.back().count == begin) {
    list.back().count += count;
  } else {
    list.push_back({begin, count});
  }
}

/// Number of indices.
constexpr std::int64_t count_of(const index_ranges& list) {
  std::int64_t total = 0;
  for (const index_range& range : list) total += range.count;
  return total;
}

/// Appends the indices at positions `[first, first + count)` of `from` to `to`.
constexpr void append_positions(const index_ranges& from, std::int64_t first, std::int64_t count, index_ranges& to) {
  std::int64_t position = 0;
  for (const index_range& range : from) {
    const std::int64_t begin = first > position ? first : position;
    const std::int64_t end = first + count < position + range.count ? first + count : position + range.count;
    append(to, range.begin + (begin - position), end - begin);
    position += range.count;
  }
}

/// The indices in both lists.
constexpr index_ranges intersect(const index_ranges& a, const index_ranges& b) {
  index_ranges result;
  for (std::size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    const std::int64_t a_end = a[i].begin + a[i].count;
    const std::int64_t b_end = b[j].begin + b[j].count;
    const std::int64_t begin = a[i].begin > b[j].begin ? a[i].begin : b[j].begin;
    append(result, begin, (a_end < b_end ? a_end : b_end) - begin);
    if (a_end < b_end) {
      ++i;
    } else {
      ++j;
    }
  }
  return result;
}

/// Chunk `index` of `count` elements cut as `torch.chunk` cuts them into `chunks`: positions `[begin, begin + count)`.
constexpr index_range torch_chunk(std::int64_t count, int chunks, std::int64_t index) {
  const std::int64_t size = (count + chunks - 1) / chunks;
  const std::int64_t begin = index * size < count ? index * size : count;
  return {begin, size < count - begin ? size : count - begin};
}

/// What a coordinate keeps of a dimension. @param held What there is. @param how A shard. @param ranks Size of the
/// axis. @param coordinate The coordinate.
constexpr index_ranges shard_of(const index_ranges& held, const placement& how, int ranks, int coordinate) {
  const std::int64_t count = count_of(held);
  index_ranges result;
  for (int i = 0; i < how.split_factor; ++i) {
    const index_range piece = torch_chunk(count, how.split_factor, i);
    if (piece.count == 0) break;
    const index_range chunk = torch_chunk(piece.count, ranks, coordinate);
    append_positions(held, piece.begin + chunk.begin, chunk.count, result);
  }
  return result;
}

/// The indices of one dimension that the rank at a place holds. The placements fit.
constexpr index_ranges held_indices(const mesh& ranks, const placements& list, const mesh_coordinates& place,
                                    const box& tensor, int dim) {
  index_ranges held;
  append(held, tensor.offset[dim], tensor.size[dim]);
  for (int i = 0; i < list.count; ++i) {
    if (list[i].is_shard_of(dim)) held = shard_of(held, list[i], ranks.axes[i].size, place[i]);
  }
  return held;
}

}  // namespace detail

/// A part of a tensor that is the product of index sets, one for each dimension: every part that placements make is.
/// It is stored as a packed row-major array of `extents()`, indices ascending. Allocates small lists; usable in
/// constant expressions as a temporary.
class region {
 public:
  /// Nothing of a tensor of no dimension.
  constexpr region() = default;

  /// What the rank at a place holds.
  /// @param ranks The mesh. @param list Placements. @param place Coordinates, inside the mesh. @param tensor The whole
  /// tensor; its offset, which is usually 0, is kept. @throws invalid_argument if the placements do not fit.
  constexpr region(const mesh& ranks, const placements& list, const mesh_coordinates& place, const box& tensor)
      : rank_(tensor.rank) {
    expect_placements(ranks, list, tensor.rank);
    for (int dim = 0; dim < rank_; ++dim) {
      indices_.push_back(detail::held_indices(ranks, list, place, tensor, dim));
    }
  }

  /// What is in both. @param a One region. @param b Another one of the same tensor.
  static constexpr region common(const region& a, const region& b) {
    region result;
    result.rank_ = a.rank_;
    for (std::size_t dim = 0; dim < static_cast<std::size_t>(a.rank_); ++dim) {
      result.indices_.push_back(detail::intersect(a.indices_[dim], b.indices_[dim]));
    }
    return result;
  }

  /// Dimensions of the tensor.
  constexpr int rank() const { return rank_; }

  /// The index set of a dimension. @param dim In `[0, rank())`.
  constexpr const index_ranges& indices(int dim) const { return indices_[static_cast<std::size_t>(dim)]; }

  /// Extents of the local array: a box with offset 0.
  constexpr box extents() const {
    box result;
    result.rank = rank_;
    for (int dim = 0; dim < rank_; ++dim) result.size[dim] = detail::count_of(indices(dim));
    return result;
  }

  /// Number of elements.
  constexpr std::int64_t volume() const { return extents().volume(); }

  /// The boxes it consists of, row-major; none if it is empty. Each is as large as possible: a plain shard is one.
  constexpr std::vector<placed_box> boxes() const {
    std::vector<placed_box> result;
    if (extents().empty()) return result;
    result.push_back({});
    result[0].logical.rank = result[0].local.rank = rank_;
    for (int dim = 0; dim < rank_; ++dim) {
      std::vector<placed_box> finer;
      for (const placed_box& coarse : result) {
        std::int64_t position = 0;
        for (const index_range& range : indices(dim)) {
          placed_box part = coarse;
          part.logical.offset[dim] = range.begin;
          part.local.offset[dim] = position;
          part.logical.size[dim] = part.local.size[dim] = range.count;
          finer.push_back(part);
          position += range.count;
        }
      }
      result = finer;
    }
    return result;
  }

  /// Same indices.
  constexpr bool operator==(const region&) const = default;

 private:
  int rank_ = 0;
  std::vector<index_ranges> indices_;  // [rank]; an array of vectors is no constant for nvcc 13's front end
};

/// What a rank holds of a tensor. Host: set-up code, allocates.
/// @param ranks The mesh. @param list Placements, one for each axis. @param rank Rank in the mesh. @param tensor The
/// whole tensor, `box::whole({...})`.
/// @throws invalid_argument if there is no such rank or the placements do not fit.
constexpr region local_region(const mesh& ranks, const placements& list, int rank, const box& tensor) {
  return region(ranks, list, ranks.coordinates(rank), tensor);
}

/// Extents of a rank's packed local array: a box with offset 0. Constexpr where the arguments are.
/// @param ranks The mesh. @param list Placements, one for each axis. @param rank Rank in the mesh. @param tensor The
/// whole tensor, `box::whole({...})`.
/// @throws invalid_argument if there is no such rank or the placements do not fit.
constexpr box local_extents(const mesh& ranks, const placements& list, int rank, const box& tensor) {
  return local_region(ranks, list, rank, tensor).extents();
}

/// The boxes of a tensor that a rank holds and their places in its packed local array: all that a checkpoint needs to
/// know. Empty shards have none. Host: set-up code, allocates; constexpr where the arguments are.
/// @param ranks The mesh. @param list Placements, one for each axis. @param rank Rank in the mesh. @param tensor The
/// whole tensor, `box::whole({...})`.
/// @throws invalid_argument if there is no such rank or the placements do not fit.
constexpr std::vector<placed_box> placed_boxes(const mesh& ranks, const placements& list, int rank, const box& tensor) {
  return local_region(ranks, list, rank, tensor).boxes();
}

TESSERA_NAMESPACE_END
