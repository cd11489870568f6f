// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Copies between a whole tensor and the packed part that one rank holds of it.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <tessera/core/box.hpp>
#include <tessera/core/config.hpp>
#include <tessera/core/dtype.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

/// Rounds to an element type.
template <class To, class From>
TESSERA_HD constexpr To to_element(From value) {
  if constexpr (std::is_same_v<To, bfloat16> && !std::is_same_v<From, bfloat16>) {
    return bfloat16(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

/// `to[i] = from[i]`, or `to[i] += from[i]`, rounded to the type of `to`.
template <class From, class To>
void copy_elements(const From* from, To* to, std::int64_t count, bool add) {
  if (count <= 0) return;
  if (add) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_element<To>(to[i] + to_element<To>(from[i]));
  } else if constexpr (std::is_same_v<std::remove_cv_t<From>, To>) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(To));
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_element<To>(from[i]);
  }
}

/// A part that differs from its tensor in dimension `dim` alone: `outer` runs of `length` elements, `stride` apart.
struct runs {
  std::int64_t outer, length, stride, first;

  runs(const box& tensor, const box& part, int dim) : outer(1), length(part.size[dim]), stride(tensor.size[dim]) {
    first = part.offset[dim];
    for (int d = 0; d < dim; ++d) outer *= tensor.size[d];
    for (int d = dim + 1; d < tensor.rank; ++d) {
      length *= tensor.size[d];
      stride *= tensor.size[d];
      first *= tensor.size[d];
    }
  }
};

/// Whole tensor to packed part. @return one past the part's last element.
template <class From, class To>
To* pack_part(const From* full, const box& tensor, const box& part, int dim, To* packed, bool add) {
  const runs r(tensor, part, dim);
  if (r.length == 0) return packed;
  for (std::int64_t o = 0; o < r.outer; ++o, packed += r.length) {
    copy_elements(full + o * r.stride + r.first, packed, r.length, add);
  }
  return packed;
}

/// Packed part to whole tensor. @return one past the part's last element.
template <class From, class To>
const From* unpack_part(const From* packed, To* full, const box& tensor, const box& part, int dim) {
  const runs r(tensor, part, dim);
  if (r.length == 0) return packed;
  for (std::int64_t o = 0; o < r.outer; ++o, packed += r.length) {
    copy_elements(packed, full + o * r.stride + r.first, r.length, false);
  }
  return packed;
}

}  // namespace shard::detail
TESSERA_NAMESPACE_END
