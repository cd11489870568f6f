// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A part of a tensor, told by its place in the whole: the word that placements, shards and checkpoints share.

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <sstream>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

/// The most dimensions a box may have.
inline constexpr int max_box_rank = 4;

/// Elements `[offset[i], offset[i] + size[i])` in each dimension `i` of a tensor of `rank` dimensions, row-major.
/// A box of rank 0 is one element (a scalar). Trivially copyable; entries at and beyond `rank` stay 0, so that equal
/// boxes compare equal.
struct box {
  int rank = 0;                            ///< Dimensions, in `[0, max_box_rank]`.
  std::int64_t offset[max_box_rank] = {};  ///< First element in each dimension.
  std::int64_t size[max_box_rank] = {};    ///< Extent in each dimension, at least 0.

  /// The whole of a tensor with these extents. @throws invalid_argument if there are more than `max_box_rank` of them
  /// or one is negative.
  static constexpr box whole(std::initializer_list<std::int64_t> extents) {
    box result;
    for (const std::int64_t extent : extents) {
      if (result.rank == max_box_rank || extent < 0) fail(extents.size(), extent);
      result.size[result.rank++] = extent;
    }
    return result;
  }

  /// Number of elements.
  TESSERA_HD constexpr std::int64_t volume() const {
    std::int64_t product = 1;
    for (int i = 0; i < rank; ++i) product *= size[i];
    return product;
  }

  /// Whether there is no element.
  TESSERA_HD constexpr bool empty() const { return volume() == 0; }

  /// Whether `other`, of the same rank, lies inside. An empty box lies inside every box.
  TESSERA_HD constexpr bool contains(const box& other) const {
    if (rank != other.rank) return false;
    if (other.empty()) return true;
    for (int i = 0; i < rank; ++i) {
      if (other.offset[i] < offset[i] || other.offset[i] + other.size[i] > offset[i] + size[i]) return false;
    }
    return true;
  }

  /// Whether the element at `index` (`[rank]`, counted in the whole tensor) lies inside.
  TESSERA_HD constexpr bool contains(const std::int64_t* index) const {
    for (int i = 0; i < rank; ++i) {
      if (index[i] < offset[i] || index[i] >= offset[i] + size[i]) return false;
    }
    return true;
  }

  /// Position of the element at `index` (`[rank]`, counted in the whole tensor) in a packed row-major array that holds
  /// this box and nothing else. The element lies inside.
  TESSERA_HD constexpr std::int64_t local_offset(const std::int64_t* index) const {
    std::int64_t position = 0;
    for (int i = 0; i < rank; ++i) position = position * size[i] + (index[i] - offset[i]);
    return position;
  }

  /// Position of the first element of `part`, which lies inside and is not empty.
  TESSERA_HD constexpr std::int64_t local_offset(const box& part) const { return local_offset(part.offset); }

  /// Elements of `part` (which lies inside and is not empty) that are neighbours in this box's packed array, from its
  /// first element on: what one copy may move. It divides `part.volume()`.
  TESSERA_HD constexpr std::int64_t contiguous_run(const box& part) const {
    std::int64_t run = 1;
    for (int i = rank - 1; i >= 0; --i) {
      run *= part.size[i];
      if (part.size[i] != size[i]) break;
    }
    return run;
  }

  /// Same rank, place and extents.
  constexpr bool operator==(const box&) const = default;

 private:
  [[noreturn]] static void fail(std::size_t dimensions, std::int64_t extent) {
    std::ostringstream text;
    if (extent < 0) {
      text << "a box has extent " << extent << ", extents must be at least 0";
    } else {
      text << "a box has " << dimensions << " dimensions, at most " << max_box_rank << " are possible";
    }
    throw invalid_argument(text.str());
  }
};

/// The elements that are in both boxes. @pre Both have the same rank.
/// @return A box of that rank; where nothing is common, at least one of its extents is 0.
TESSERA_HD constexpr box intersect(const box& a, const box& b) {
  box result;
  result.rank = a.rank;
  for (int i = 0; i < a.rank; ++i) {
    const std::int64_t begin = a.offset[i] > b.offset[i] ? a.offset[i] : b.offset[i];
    const std::int64_t a_end = a.offset[i] + a.size[i];
    const std::int64_t b_end = b.offset[i] + b.size[i];
    const std::int64_t end = a_end < b_end ? a_end : b_end;
    result.offset[i] = begin;
    result.size[i] = end > begin ? end - begin : 0;
  }
  return result;
}

TESSERA_NAMESPACE_END
