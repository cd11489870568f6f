// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Copies between packed arrays that hold different regions of one tensor. The stream's type chooses the memory; what
/// device memory needs is defined in `redistribute.cuh`.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <tessera/core/box.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/mesh/region.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// Position of an index in an ascending list that holds it.
inline std::int64_t position_of(const index_ranges& list, std::int64_t index) {
  std::int64_t position = 0;
  for (const index_range& range : list) {
    if (index < range.begin + range.count) return position + (index - range.begin);
    position += range.count;
  }
  return position;
}

/// Copies `height` rows of `width` elements; pitches from row to row in elements.
template <class T>
void copy_rows(host_stream, const T* from, std::int64_t from_pitch, T* to, std::int64_t to_pitch, std::int64_t width,
               std::int64_t height) {
  for (std::int64_t i = 0; i < height && width > 0; ++i) {
    std::memcpy(to + i * to_pitch, from + i * from_pitch, static_cast<std::size_t>(width) * sizeof(T));
  }
}
template <class T>
void copy_rows(device_stream stream, const T* from, std::int64_t from_pitch, T* to, std::int64_t to_pitch,
               std::int64_t width, std::int64_t height);

/// Sets elements to a value.
template <class T>
void fill_values(host_stream, T* to, std::int64_t count, T value) {
  std::fill_n(to, count, value);
}
template <class T>
void fill_values(device_stream stream, T* to, std::int64_t count, T value);

/// The copy of what two regions have in common from the array of one to the array of the other.
template <class Stream, class T>
class region_copy {
 public:
  region_copy(Stream stream, const region& from, const T* source, const region& to, T* target)
      : stream_(stream), from_(from), to_(to), common_(region::common(from, to)), source_(source), target_(target) {
    const box from_extents = from.extents();
    const box to_extents = to.extents();
    const box common_extents = common_.extents();
    if (common_extents.empty()) return;
    std::int64_t from_stride = 1;
    std::int64_t to_stride = 1;
    last_ = -1;
    for (int dim = from.rank() - 1; dim >= 0; --dim) {
      from_stride_[dim] = from_stride;
      to_stride_[dim] = to_stride;
      from_stride *= from_extents.size[dim];
      to_stride *= to_extents.size[dim];
      // Dimensions that are whole on both sides move together with the next one outwards.
      const bool whole =
          common_extents.size[dim] == from_extents.size[dim] && common_extents.size[dim] == to_extents.size[dim];
      if (last_ < 0 && !whole) last_ = dim;
    }
    if (last_ < 0) {
      copy_rows(stream_, source_, 0, target_, 0, from_stride, 1);
    } else if (last_ == 0) {
      copy_last(0, 0, 1, 0, 0);
    } else {
      descend(0, 0, 0);
    }
  }

 private:
  // Places of a range on both sides.
  std::int64_t in_source(int dim, const index_range& range) const {
    return position_of(from_.indices(dim), range.begin) * from_stride_[dim];
  }
  std::int64_t in_target(int dim, const index_range& range) const {
    return position_of(to_.indices(dim), range.begin) * to_stride_[dim];
  }

  void descend(int dim, std::int64_t from, std::int64_t to) {
    for (const index_range& range : common_.indices(dim)) {
      // A range of the intersection is part of one range on either side, so its elements are neighbours on both.
      const std::int64_t a = from + in_source(dim, range);
      const std::int64_t b = to + in_target(dim, range);
      if (dim + 1 == last_ || dim + 2 >= max_box_rank) {  // the latter implies the former, which g++ does not see
        copy_last(a, b, range.count, from_stride_[dim], to_stride_[dim]);
        continue;
      }
      for (std::int64_t i = 0; i < range.count; ++i) {
        descend(dim + 1, a + i * from_stride_[dim], b + i * to_stride_[dim]);
      }
    }
  }

  // The ranges of the innermost dimension, for `height` neighbours of the one above.
  void copy_last(std::int64_t from, std::int64_t to, std::int64_t height, std::int64_t from_pitch,
                 std::int64_t to_pitch) {
    for (const index_range& range : common_.indices(last_)) {
      copy_rows(stream_, source_ + from + in_source(last_, range), from_pitch, target_ + to + in_target(last_, range),
                to_pitch, range.count * from_stride_[last_], height);
    }
  }

  Stream stream_;
  const region& from_;
  const region& to_;
  region common_;
  const T* source_;
  T* target_;
  std::int64_t from_stride_[max_box_rank] = {};
  std::int64_t to_stride_[max_box_rank] = {};
  int last_ = -1;  // innermost dimension that is not whole on both sides
};

/// Copies what two regions of one tensor have in common. @param stream Where. @param from Region of the source.
/// @param source Its packed array. @param to Region of the target. @param target Its packed array, disjoint from the
/// source.
template <class Stream, class T>
void copy_common(Stream stream, const region& from, const T* source, const region& to, T* target) {
  const region_copy<Stream, T> done(stream, from, source, to, target);
}

}  // namespace detail

TESSERA_NAMESPACE_END
