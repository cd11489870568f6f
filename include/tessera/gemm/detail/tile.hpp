// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The inner loop of the host products: one tile of sums, kept in registers while a block of the depth goes by.

#include <cstdint>
#include <cstring>
#include <utility>

#include <tessera/core/config.hpp>
#include <tessera/core/dtype.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm::detail {

// Width of a vector register, from the flags of this translation unit.
#if defined(__AVX512F__)
inline constexpr int native_vector_bytes = 64;
#elif defined(__AVX__)
inline constexpr int native_vector_bytes = 32;
#else
inline constexpr int native_vector_bytes = 16;
#endif

// Sizes of tiles and blocks. The width is a parameter, so that translation units compiled for different machines do not
// share a function that would have different tiles in each.
template <accumulate_type A, int VectorBytes>
struct tiling {
  using value = A;
  typedef A vector __attribute__((vector_size(VectorBytes)));

  static constexpr int line = 64 / sizeof(A);              // elements of a cache line
  static constexpr int lanes = VectorBytes / sizeof(A);    // elements of a vector
  static constexpr int cols = 2 * lanes;                   // columns of a tile
  static constexpr int rows = VectorBytes == 64 ? 12 : 6;  // rows of a tile: with b and a, nearly all registers
  static constexpr int depth = 1024 / sizeof(A);           // depth of a block: a panel of b stays in the first cache
  static constexpr int block_rows = 144;
  static constexpr int block_cols = 512 / sizeof(A);
  static constexpr int block_tiles = (block_rows / rows) * (block_cols / cols);
  // One line more than needed, so that the rows of a panel do not fall into the same sets of the cache.
  static constexpr int depth_step = depth + line;
  static constexpr int block_rows_step = block_rows + line;
  static_assert(block_rows % rows == 0 && block_cols % cols == 0 && depth % line == 0);
};

// Where a panel of b `[depth, Tiling::cols]` or a tile of sums `[Tiling::rows, Tiling::cols]` lies.
template <class T>
struct block_ref {
  T* data;
  std::int64_t step;  // elements from one row to the next
};

// tile[i, j] (+)= sum over k, ascending, of a[i * RowStep + k * DepthStep] * b.data[k * b.step + j].
// Every element goes through the same instructions whatever the number of rows, so that its bits are the same in tiles
// of all heights. The compiler contracts the product and the sum into one operation everywhere or nowhere.
template <class Tiling, int RowStep, int DepthStep, int... Row>
void multiply_tile(std::integer_sequence<int, Row...> /*rows*/, std::int64_t depth, const typename Tiling::value* a,
                   block_ref<const typename Tiling::value> b, bool first, block_ref<typename Tiling::value> tile) {
  using vector = typename Tiling::vector;
  constexpr int lanes = Tiling::lanes;
  const auto load = [](vector& to, const typename Tiling::value* from) { std::memcpy(&to, from, sizeof(vector)); };
  const auto store = [](typename Tiling::value* to, const vector& from) { std::memcpy(to, &from, sizeof(vector)); };
  vector low[sizeof...(Row)] = {};
  vector high[sizeof...(Row)] = {};
  if (!first)
    ((load(low[Row], tile.data + Row * tile.step), load(high[Row], tile.data + Row * tile.step + lanes)), ...);
  for (std::int64_t k = 0; k < depth; ++k) {
    vector b_low, b_high;
    load(b_low, b.data);
    load(b_high, b.data + lanes);
    ((low[Row] += a[Row * RowStep] * b_low, high[Row] += a[Row * RowStep] * b_high), ...);
    a += DepthStep;
    b.data += b.step;
  }
  ((store(tile.data + Row * tile.step, low[Row]), store(tile.data + Row * tile.step + lanes, high[Row])), ...);
}

// `multiply_tile` for 1 to Tiling::rows rows.
template <class Tiling, int RowStep, int DepthStep>
void multiply_tile(int rows, std::int64_t depth, const typename Tiling::value* a,
                   block_ref<const typename Tiling::value> b, bool first, block_ref<typename Tiling::value> tile) {
  [&]<int... Last>(std::integer_sequence<int, Last...>) {
    (void)((rows == Last + 1 && (multiply_tile<Tiling, RowStep, DepthStep>(std::make_integer_sequence<int, Last + 1>{},
                                                                           depth, a, b, first, tile),
                                 true)) ||
           ...);
  }
  (std::make_integer_sequence<int, Tiling::rows>{});
}

}  // namespace gemm::detail

TESSERA_NAMESPACE_END
