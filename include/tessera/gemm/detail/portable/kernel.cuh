// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The kernel of grouped products for sm_80 and later: blocks that walk over tiles of 128 x 128, copies of one stage
/// under the products of the other.

#include <cstdint>

#include <tessera/gemm/detail/hopper/schedule.cuh>
#include <tessera/gemm/detail/portable/epilogue.cuh>
#include <tessera/gemm/detail/portable/operand.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail {

namespace portable {

using hopper::product;

/// What a kernel is called with.
template <class EpilogueParams>
struct multiply_params {
  hopper::extents sizes;    ///< With `split` epilogues, `n` counts gates alone.
  line_operand a;           ///< Lines are rows, in `variable_k` indices of the sum.
  line_operand b;           ///< Lines are rows for `contiguous::k`, otherwise indices of the sum.
  int split;                ///< Rows of B from a gate to its up value; 0 where B has one part.
  EpilogueParams epilogue;  ///< The epilogue's.
};

inline constexpr int warp_rows = 32;     ///< Rows of a warp's results.
inline constexpr int warp_columns = 64;  ///< Columns of a warp's results.

/// A warp's sums, in fragments of 16 x 8.
using warp_sums = float[warp_rows / 16][warp_columns / 8][4];

/// Adds the products of a stage, ascending. @param stage Its address. @param row,column The warp's first in the tile.
template <contiguous OrderA, contiguous OrderB>
__device__ __forceinline__ void multiply_stage(std::uint32_t stage, int row, int column, warp_sums& sums) {
#pragma unroll
  for (int step = 0; step < tile_k / 16; ++step) {
    std::uint32_t a[warp_rows / 16][4];
#pragma unroll
    for (int i = 0; i < warp_rows / 16; ++i) load_a<OrderA>(stage, row + 16 * i, step, a[i]);
#pragma unroll
    for (int j = 0; j < warp_columns / 16; ++j) {
      std::uint32_t b[4];
      load_b<OrderB>(stage + operand_bytes, column + 16 * j, step, b);
#pragma unroll
      for (int i = 0; i < warp_rows / 16; ++i) {
        multiply_add(sums[i][2 * j], a[i], b[0], b[1]);
        multiply_add(sums[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

/// Hands a warp's sums to the epilogue, row by row. @param row First row of the result. @param column First column.
/// @param row_sums Where the epilogue's sums over the warp's columns go, row by row; not used if it has none.
template <class Epilogue>
__device__ __forceinline__ void write_sums(const typename Epilogue::params& p, const hopper::tile& t, int row,
                                           int column, const warp_sums& sums, [[maybe_unused]] float* row_sums) {
#pragma unroll
  for (int i = 0; i < warp_rows / 16; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int offset = 16 * i + 8 * half + static_cast<int>(threadIdx.x % 32 / 4);
      const bool inside = row + offset < t.m_end;
      float v[row_values];
#pragma unroll
      for (int j = 0; j < row_values; ++j) v[j] = sums[i][j / 2][2 * half + j % 2];
      if constexpr (Epilogue::row_sums) {
        float sum = inside ? Epilogue::write(p, t.group, row + offset, column, v) : 0.0f;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (threadIdx.x % 4 == 0) row_sums[offset] = sum;
      } else {
        if (inside) Epilogue::write(p, t.group, row + offset, column, v);
      }
    }
  }
}

/// Adds the two warps' sums of each row of a tile; all threads of the block. @param row_sums `[2, tile_rows]`.
template <class Epilogue>
__device__ __forceinline__ void write_row_sums(const typename Epilogue::params& p, const hopper::tile& t, int columns,
                                               const float (&row_sums)[2][tile_rows]) {
  __syncthreads();
  const int offset = static_cast<int>(threadIdx.x);
  if (offset >= tile_rows || t.m + offset >= t.m_end) return;
  const bool both = t.n + warp_columns < columns;
  Epilogue::write_row_sum(p, t.m + offset, t.n, row_sums[0][offset] + (both ? row_sums[1][offset] : 0.0f));
}

/// What each block does.
template <product Product, contiguous OrderB, class Epilogue>
__device__ __forceinline__ void multiply_tiles(const multiply_params<typename Epilogue::params>& p) {
  static constexpr contiguous order_a = Product == product::variable_k ? contiguous::mn : contiguous::k;
  static constexpr contiguous order_b = Product == product::variable_k ? contiguous::mn : OrderB;
  static constexpr int step_n = Epilogue::split ? tile_rows / 2 : tile_rows;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const std::uint32_t memory = hopper::shared_address(shared_memory);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int warp_row = warp / 2 * warp_rows, warp_column = warp % 2 * warp_columns;

  hopper::tile_walk<Product, tile_rows, step_n, 1> tiles(p.sizes);
  for (int index = static_cast<int>(blockIdx.x);; index += static_cast<int>(gridDim.x)) {
    const hopper::tile t = tiles.find(index, 0);
    if (t.group < 0) break;
    stage_copier<order_a> copy_a;
    stage_copier<order_b> copy_b;
    copy_a.begin(p.a, t.group, {t.m, t.m_end, 0}, t.k_begin, t.k_end);
    copy_b.begin(p.b, t.group, {t.n, p.sizes.n, p.split}, t.k_begin, t.k_end);
    const int num_stages = (t.k_end - t.k_begin + tile_k - 1) / tile_k;
    const auto fill = [&](int stage) {
      const std::uint32_t target = memory + static_cast<std::uint32_t>(stage % stages) * stage_bytes;
      copy_a.copy(target);
      copy_b.copy(target + operand_bytes);
    };
    const int row = t.m + warp_row, column = t.n + (Epilogue::split ? warp_column / 2 : warp_column);
    const bool has_results = row < t.m_end && column < p.sizes.n;
    warp_sums sums = {};
    __syncthreads();  // until here others may have been reading the last tile's operands
    if (num_stages > 0) fill(0);
    for (int stage = 0; stage < num_stages; ++stage) {
      hopper::copy_async_commit();
      hopper::copy_async_wait<0>();
      __syncthreads();  // this stage is there, and nobody reads the one before it any longer
      if (stage + 1 < num_stages) fill(stage + 1);
      if (has_results)
        multiply_stage<order_a, order_b>(memory + static_cast<std::uint32_t>(stage % stages) * stage_bytes, warp_row,
                                         warp_column, sums);
    }
    if constexpr (Epilogue::row_sums) {
      __shared__ float row_sums[2][tile_rows];
      if (has_results) write_sums<Epilogue>(p.epilogue, t, row, column, sums, row_sums[warp % 2] + warp_row);
      write_row_sums<Epilogue>(p.epilogue, t, p.sizes.n, row_sums);
    } else {
      if (has_results) write_sums<Epilogue>(p.epilogue, t, row, column, sums, nullptr);
    }
  }
}

#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 800 && !defined(__CUDA_ARCH_FEAT_SM90_ALL))
template <bool Everywhere>
inline constexpr bool has_code = true;
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <bool Everywhere>
inline constexpr bool has_code = Everywhere;
#else
template <bool Everywhere>
inline constexpr bool has_code = false;  // devices without the instructions
#endif

}  // namespace portable

/// A grouped product. @tparam Product Which extent is variable. @tparam OrderB Order of B in `variable_m`; in
/// `variable_k` both operands are `mn`. @tparam Epilogue What becomes of the sums. @tparam Everywhere Whether there is
/// code for sm_90a, too. Where there is none, a launch is an error, because it has more threads than are allowed.
template <portable::product Product, portable::contiguous OrderB, class Epilogue, bool Everywhere>
__global__ void __launch_bounds__(portable::has_code<Everywhere> ? portable::threads : 32, 2) multiply_tiles_kernel(
    [[maybe_unused]] const __grid_constant__ portable::multiply_params<typename Epilogue::params> p) {
#if defined(__CUDA_ARCH__)
  if constexpr (portable::has_code<Everywhere>) portable::multiply_tiles<Product, OrderB, Epilogue>(p);
#endif
}

}  // namespace detail
TESSERA_NAMESPACE_END
