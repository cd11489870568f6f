// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Copies of boxes between arrays that hold larger boxes.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <tessera/core/box.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

using stride_array = std::array<std::int64_t, max_box_rank>;

/// Strides of a packed row-major array of this box.
inline stride_array packed_strides(const box& held) {
  stride_array strides{};
  std::int64_t step = 1;
  for (int i = held.rank - 1; i >= 0; --i) {
    strides[static_cast<std::size_t>(i)] = step;
    step *= held.size[i];
  }
  return strides;
}

/// `strides`, or those of the packed box where all are 0.
inline stride_array strides_or_packed(const stride_array& strides, const box& held) {
  for (const std::int64_t stride : strides) {
    if (stride != 0) return strides;
  }
  return packed_strides(held);
}

/// Elements from the first of `held` to the first of `part`.
inline std::int64_t offset_in(const box& held, const stride_array& strides, const box& part) {
  std::int64_t offset = 0;
  for (int i = 0; i < held.rank; ++i) {
    offset += (part.offset[i] - held.offset[i]) * strides[static_cast<std::size_t>(i)];
  }
  return offset;
}

/// Whether the elements of `part` are neighbours, in row-major order, in an array with these strides.
inline bool is_contiguous(const box& part, const stride_array& strides) {
  std::int64_t step = 1;
  for (int i = part.rank - 1; i >= 0; --i) {
    if (part.size[i] > 1 && strides[static_cast<std::size_t>(i)] != step) return false;
    step *= part.size[i];
  }
  return true;
}

/// Copies `part` (not empty) from an array that holds `from_box` to one that holds `to_box`.
inline void copy_box(const box& part, const void* from, const box& from_box, const stride_array& from_strides, void* to,
                     const box& to_box, const stride_array& to_strides, std::int64_t element_bytes) {
  const auto* source = static_cast<const std::byte*>(from) + offset_in(from_box, from_strides, part) * element_bytes;
  auto* target = static_cast<std::byte*>(to) + offset_in(to_box, to_strides, part) * element_bytes;
  int inner = part.rank;  // dimensions [inner, rank) are one run on both sides
  std::int64_t run = 1;
  while (inner > 0) {
    const auto d = static_cast<std::size_t>(inner - 1);
    if (part.size[d] > 1 && (from_strides[d] != run || to_strides[d] != run)) break;
    run *= part.size[d];
    --inner;
  }
  if (run == 1 && inner > 0) {  // strided elements: the innermost loop runs over them
    const auto d = static_cast<std::size_t>(inner - 1);
    const std::int64_t from_step = from_strides[d] * element_bytes;
    const std::int64_t to_step = to_strides[d] * element_bytes;
    const std::int64_t count = part.size[d];
    box outer = part;
    outer.rank = inner - 1;
    std::int64_t index[max_box_rank] = {};
    for (;;) {
      std::int64_t a = 0;
      std::int64_t b = 0;
      for (int i = 0; i < outer.rank; ++i) {
        a += index[i] * from_strides[static_cast<std::size_t>(i)];
        b += index[i] * to_strides[static_cast<std::size_t>(i)];
      }
      for (std::int64_t i = 0; i < count; ++i) {
        std::memcpy(target + b * element_bytes + i * to_step, source + a * element_bytes + i * from_step,
                    static_cast<std::size_t>(element_bytes));
      }
      int i = outer.rank - 1;
      while (i >= 0 && ++index[i] == part.size[i]) index[i--] = 0;
      if (i < 0) return;
    }
  }
  std::int64_t index[max_box_rank] = {};
  for (;;) {
    std::int64_t a = 0;
    std::int64_t b = 0;
    for (int i = 0; i < inner; ++i) {
      a += index[i] * from_strides[static_cast<std::size_t>(i)];
      b += index[i] * to_strides[static_cast<std::size_t>(i)];
    }
    std::memcpy(target + b * element_bytes, source + a * element_bytes, static_cast<std::size_t>(run * element_bytes));
    int i = inner - 1;
    while (i >= 0 && ++index[i] == part.size[i]) index[i--] = 0;
    if (i < 0) return;
  }
}

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
