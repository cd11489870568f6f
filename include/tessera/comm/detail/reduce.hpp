// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Reductions of several sources in a fixed order, and the division of elements among ranks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <tessera/comm/communicator.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// Elements `[begin, begin + length)`.
struct slice {
  std::int64_t begin;   ///< First element.
  std::int64_t length;  ///< Number of elements.
};

/// Part `index` of `count` elements cut into `parts` pieces, whose lengths differ by at most one.
constexpr slice slice_of(std::int64_t count, int parts, int index) {
  const std::int64_t base = count / parts;
  const std::int64_t longer = count % parts;
  return {index * base + (index < longer ? index : longer), base + (index < longer ? 1 : 0)};
}

/// Whether `next` takes the place of `have`, the smallest (or with `Max` the largest) so far. A NaN stays and comes
/// first, which comparisons alone would leave to the order of ranks.
template <bool Max, reducible T>
bool takes_place(T have, T next) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(have)) return false;
    if (std::isnan(next)) return true;
  }
  return Max ? have < next : next < have;
}

/// `into[i] = op(into[i], from[i])`.
template <reducible T>
void reduce_into(reduce_op op, T* TESSERA_RESTRICT into, const T* TESSERA_RESTRICT from, std::int64_t count) {
  switch (op) {
    case reduce_op::sum:
      if constexpr (std::is_integral_v<T>) {  // through unsigned numbers, where overflow is defined
        using word = std::make_unsigned_t<T>;
        for (std::int64_t i = 0; i < count; ++i) {
          into[i] = static_cast<T>(static_cast<word>(into[i]) + static_cast<word>(from[i]));
        }
      } else {
        for (std::int64_t i = 0; i < count; ++i) into[i] += from[i];
      }
      break;
    case reduce_op::min:
      for (std::int64_t i = 0; i < count; ++i) into[i] = takes_place<false>(into[i], from[i]) ? from[i] : into[i];
      break;
    case reduce_op::max:
      for (std::int64_t i = 0; i < count; ++i) into[i] = takes_place<true>(into[i], from[i]) ? from[i] : into[i];
      break;
  }
}

/// `out[i] = op(... op(op(source(0)[i], source(1)[i]), source(2)[i]) ...)`. A source may be `out` itself, because a
/// block is complete before it is written. @param op How. @param num_sources At least 1. @param source Gives the
/// pointer `[count]` of a source. @param count Elements. @param out Result `[count]`.
template <reducible T, class Source>
void reduce_in_order(reduce_op op, std::int64_t num_sources, Source source, std::int64_t count, T* out) {
  constexpr std::int64_t block = 512;  // stays in the first-level cache
  T sum[block];
  for (std::int64_t begin = 0; begin < count; begin += block) {
    const std::int64_t length = (std::min)(block, count - begin);
    const auto bytes = static_cast<std::size_t>(length) * sizeof(T);
    std::memcpy(sum, source(0) + begin, bytes);
    for (std::int64_t i = 1; i < num_sources; ++i) reduce_into(op, sum, source(i) + begin, length);
    std::memcpy(out + begin, sum, bytes);
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END
