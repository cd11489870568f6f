// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Copies of parts of operands, widened to the type of the sums and laid out as multiply_tile reads them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm::detail {

// to[i] = from[i].
template <class A, class T>
void widen(const T* TESSERA_RESTRICT from, std::int64_t count, A* TESSERA_RESTRICT to) {
  if constexpr (std::is_same_v<A, T>) {
    std::copy_n(from, count, to);
  } else {
    constexpr int chunk = 16;  // a constant trip count is vectorised at -O2 too
    const std::int64_t whole = count / chunk * chunk;
    for (std::int64_t i = 0; i < whole; i += chunk)
      for (int l = 0; l < chunk; ++l) to[i + l] = static_cast<A>(from[i + l]);
    for (std::int64_t i = whole; i < count; ++i) to[i] = static_cast<A>(from[i]);
  }
}

// to[k, j] = from[k, j], columns contiguous; columns past `cols` are zero.
template <class Tiling, class T>
void pack_rows(const T* from, std::int64_t depth_step, int cols, std::int64_t depth, typename Tiling::value* to) {
  using A = typename Tiling::value;
  for (std::int64_t k = 0; k < depth; ++k) {
    A* row = to + k * Tiling::cols;
    if (cols == Tiling::cols) {
      widen(from + k * depth_step, Tiling::cols, row);
    } else {
      widen(from + k * depth_step, cols, row);
      std::fill(row + cols, row + Tiling::cols, A{0});
    }
  }
}

// Columns that `transpose` takes at once.
template <class Tiling>
inline constexpr int transpose_cols = (sizeof(typename Tiling::vector) >= 32 ? 32 : 16) /
                                      sizeof(typename Tiling::value);

// to[k * Tiling::cols + j] = from[j * from_step + k] for `transpose_cols` columns j and a cache line's worth of k.
template <class Tiling>
void transpose(const typename Tiling::value* from, std::int64_t from_step, typename Tiling::value* to) {
  using A = typename Tiling::value;
  constexpr int cols = transpose_cols<Tiling>;
#if __has_builtin(__builtin_shufflevector)
  // Squares of 16 bytes a side; where vectors are wide enough, two squares at once, in halves that do not mix.
  // Spelt out rather than looped over, so that nothing goes through memory when loops are not unrolled.
  constexpr int side = 16 / sizeof(A);
  constexpr bool two = cols == 2 * side;
  typedef A half __attribute__((vector_size(16)));
  typedef A vector __attribute__((vector_size(cols * sizeof(A))));
  const auto column = [&](int j, int k) {
    half first, second;
    std::memcpy(&first, from + j * from_step + k, 16);
    if constexpr (!two) {
      return first;
    } else {
      std::memcpy(&second, from + (j + side) * from_step + k, 16);
      if constexpr (side == 2) {
        return __builtin_shufflevector(first, second, 0, 1, 2, 3);
      } else {
        return __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7);
      }
    }
  };
  const auto store = [&](int k, const vector& row) { std::memcpy(to + k * Tiling::cols, &row, sizeof(vector)); };
  for (int k = 0; k < Tiling::line; k += side) {
    if constexpr (side == 2) {
      const vector c0 = column(0, k), c1 = column(1, k);
      if constexpr (two) {
        store(k, __builtin_shufflevector(c0, c1, 0, 4, 2, 6));
        store(k + 1, __builtin_shufflevector(c0, c1, 1, 5, 3, 7));
      } else {
        store(k, __builtin_shufflevector(c0, c1, 0, 2));
        store(k + 1, __builtin_shufflevector(c0, c1, 1, 3));
      }
    } else {
      const vector c0 = column(0, k), c1 = column(1, k), c2 = column(2, k), c3 = column(3, k);
      if constexpr (two) {
        const vector low01 = __builtin_shufflevector(c0, c1, 0, 8, 1, 9, 4, 12, 5, 13);
        const vector low23 = __builtin_shufflevector(c2, c3, 0, 8, 1, 9, 4, 12, 5, 13);
        const vector high01 = __builtin_shufflevector(c0, c1, 2, 10, 3, 11, 6, 14, 7, 15);
        const vector high23 = __builtin_shufflevector(c2, c3, 2, 10, 3, 11, 6, 14, 7, 15);
        store(k, __builtin_shufflevector(low01, low23, 0, 1, 8, 9, 4, 5, 12, 13));
        store(k + 1, __builtin_shufflevector(low01, low23, 2, 3, 10, 11, 6, 7, 14, 15));
        store(k + 2, __builtin_shufflevector(high01, high23, 0, 1, 8, 9, 4, 5, 12, 13));
        store(k + 3, __builtin_shufflevector(high01, high23, 2, 3, 10, 11, 6, 7, 14, 15));
      } else {
        const vector low01 = __builtin_shufflevector(c0, c1, 0, 4, 1, 5);
        const vector low23 = __builtin_shufflevector(c2, c3, 0, 4, 1, 5);
        const vector high01 = __builtin_shufflevector(c0, c1, 2, 6, 3, 7);
        const vector high23 = __builtin_shufflevector(c2, c3, 2, 6, 3, 7);
        store(k, __builtin_shufflevector(low01, low23, 0, 1, 4, 5));
        store(k + 1, __builtin_shufflevector(low01, low23, 2, 3, 6, 7));
        store(k + 2, __builtin_shufflevector(high01, high23, 0, 1, 4, 5));
        store(k + 3, __builtin_shufflevector(high01, high23, 2, 3, 6, 7));
      }
    }
  }
#else
  for (int k = 0; k < Tiling::line; ++k)
    for (int j = 0; j < cols; ++j) to[k * Tiling::cols + j] = from[j * from_step + k];
#endif
}

// to[k, j] = from[j * col_step + k * depth_step]; columns past `cols` are zero. A cache line's worth of each column at
// a time; up to a line past `depth` is written, too.
template <class Tiling, class T>
void pack_columns(const T* from, std::int64_t col_step, std::int64_t depth_step, int cols, std::int64_t depth,
                  typename Tiling::value* to) {
  using A = typename Tiling::value;
  constexpr int line = Tiling::line;
  constexpr int width = transpose_cols<Tiling>;
  alignas(64) A block[width][line];
  for (std::int64_t k = 0; k < depth; k += line) {
    const bool whole_lines = depth_step == 1 && depth - k >= line;
    for (int j = 0; j < Tiling::cols; j += width) {
      const A* source = &block[0][0];
      std::int64_t source_step = line;
      bool in_place = false;
      if constexpr (std::is_same_v<A, T>) in_place = whole_lines && j + width <= cols;
      if constexpr (std::is_same_v<A, T>) {
        if (in_place) {
          source = from + j * col_step + k;
          source_step = col_step;
        }
      }
      for (int w = 0; w < width && !in_place; ++w) {
        const T* const in = from + (j + w) * col_step + k * depth_step;
        const std::int64_t count = j + w < cols ? std::min<std::int64_t>(line, depth - k) : 0;
        if (whole_lines && count == line) {
          for (int l = 0; l < line; ++l) block[w][l] = static_cast<A>(in[l]);
        } else {
          for (int l = 0; l < line; ++l) block[w][l] = l < count ? static_cast<A>(in[l * depth_step]) : A{0};
        }
      }
      transpose<Tiling>(source, source_step, to + k * Tiling::cols + j);
    }
  }
}

}  // namespace gemm::detail

TESSERA_NAMESPACE_END
