// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// From accumulators to memory: staging of one warp's rows, and the epilogue that stores, with a bias or added to what
/// is there.
///
/// An epilogue is a struct with `params`; `split` (whether B's chunks are gate and up columns in turn); `clusters`
/// (whether its kernel for clusters exists); `staging_buffers`; and what a warp calls for its 16 rows:
/// `prepare<TileN>(params, tile, first_row)` before the products, `write<TileN>(params, sums, tile, first_row,
/// staging)` after them.

#include <cstdint>
#include <type_traits>

#include <tessera/core/dtype.hpp>
#include <tessera/gemm/detail/hopper/kernel_shape.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// 16 rows x 64 columns of bf16 as the accumulators hold them: `[2 j]` and `[2 j + 1]` are the pairs of columns
/// `8 j + lane % 4 * 2 + {0, 1}` in rows `lane / 4` and `lane / 4 + 8`.
using fragment = std::uint32_t[16];

/// One staging buffer of one warp. Rows leave and arrive as whole 16-byte units, coalesced and each under its own
/// bounds, so that no tile writes over its neighbour. All lanes call together.
class warp_staging {
 public:
  __device__ explicit warp_staging(std::uint32_t address) : address_(address) {}

  /// Puts a fragment.
  __device__ __forceinline__ void put(const fragment& f) const {
#pragma unroll
    for (int j = 0; j < 8; j += 2)
      store_matrices(matrix_address(j), f[2 * j], f[2 * j + 1], f[2 * j + 2], f[2 * j + 3]);
  }
  /// Gets a fragment.
  __device__ __forceinline__ void get(fragment& f) const {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      std::uint32_t m[4];
      load_matrices(matrix_address(j), m);
      f[2 * j] = m[0], f[2 * j + 1] = m[1], f[2 * j + 2] = m[2], f[2 * j + 3] = m[3];
    }
  }

  /// Writes rows `[first_row, row_end)`, at most 16, columns `[column, column_end)`, at most 64, of a matrix.
  __device__ __forceinline__ void store(bfloat16* matrix, std::int64_t stride, int first_row, int row_end, int column,
                                        int column_end) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + line(i), at = column + unit() * 8;
      const uint4 v = load_shared(unit_address(i));
      if (row < row_end && at < column_end) *reinterpret_cast<uint4*>(matrix + row * stride + at) = v;
    }
  }

  /// Reads what `store` would write; zeros elsewhere. The values are for `fill`.
  __device__ __forceinline__ static void read(uint4 (&v)[4], const bfloat16* matrix, std::int64_t stride, int first_row,
                                              int row_end, int column, int column_end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + line(i), at = column + unit() * 8;
      v[i] = row < row_end && at < column_end ? *reinterpret_cast<const uint4*>(matrix + row * stride + at)
                                              : uint4{0, 0, 0, 0};
    }
  }
  /// Puts what `read` has read.
  __device__ __forceinline__ void fill(const uint4 (&v)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) store_shared(unit_address(i), v[i]);
  }

  /// Address of column `column` in row `lane / 4 + 8 * half`.
  __device__ __forceinline__ std::uint32_t element_address(int half, int column) const {
    return address_ + static_cast<std::uint32_t>((lane() / 4 + 8 * half) * staging_pitch + column * 2);
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ int line(int i) { return 4 * i + lane() / 8; }
  static __device__ __forceinline__ int unit() { return lane() % 8; }
  __device__ __forceinline__ std::uint32_t unit_address(int i) const {
    return address_ + static_cast<std::uint32_t>(line(i) * staging_pitch + unit() * 16);
  }
  // of the row that this lane names for the 16 x 16 block from column 8 j on
  __device__ __forceinline__ std::uint32_t matrix_address(int j) const {
    return address_ + static_cast<std::uint32_t>(lane() % 16 * staging_pitch + (j + lane() / 16) * 16);
  }

  std::uint32_t address_;
};

/// Rounds the 64 columns from `64 * Chunk` on.
template <int Chunk, int Count>
__device__ __forceinline__ void round_chunk(const float (&sums)[Count], fragment& f) {
#pragma unroll
  for (int i = 0; i < 16; ++i) f[i] = pack_bf16(sums[Chunk * 32 + 2 * i], sums[Chunk * 32 + 2 * i + 1]);
}

/// Adds `bias[first + j]` to the 64 columns from `64 * Chunk` on. Columns from `columns` on get nothing.
template <int Chunk, int Count>
__device__ __forceinline__ void add_bias(float (&sums)[Count], const bfloat16* bias, int first, int columns) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = first + 8 * j + lane % 4 * 2;
    if (column >= columns) continue;
    const std::uint32_t pair = __ldg(reinterpret_cast<const std::uint32_t*>(bias + column));
    float* const d = sums + Chunk * 32 + 4 * j;
    d[0] += low_bf16(pair), d[1] += high_bf16(pair), d[2] += low_bf16(pair), d[3] += high_bf16(pair);
  }
}

/// Calls `f.template operator()<0>()`, ..., `<Count - 1>()`: accumulators are registers, their indices constants.
template <int Count, class F>
__device__ __forceinline__ void for_each_chunk(F&& f) {
  f.template operator()<0>();
  if constexpr (Count > 1) f.template operator()<1>();
  if constexpr (Count > 2) f.template operator()<2>();
  if constexpr (Count > 3) f.template operator()<3>();
}

/// Stores the result, rounded once. `TC` is bfloat16 or float.
template <class TC>
struct store_epilogue {
  static constexpr bool split = false, clusters = true;
  static constexpr int staging_buffers = std::is_same_v<TC, bfloat16> ? 1 : 0;

  struct params {
    TC* c;                      ///< Row 0 of group 0.
    std::int64_t group_stride;  ///< Elements between groups; 0 where rows are packed.
    std::int64_t row_stride;    ///< Elements between rows.
    int columns;                ///< Columns of the result.
    bool accumulate;            ///< Whether the old content is added.
    const bfloat16* bias;       ///< `[G, columns]`, or null.
  };

  template <int TileN>
  static __device__ __forceinline__ void prepare(const params&, const tile&, int) {}

  template <int TileN>
  static __device__ __forceinline__ void write(const params& p, float (&sums)[TileN / 2], const tile& t, int first_row,
                                               std::uint32_t staging) {
    TC* const c = p.c + t.group * p.group_stride;
    const int lane = static_cast<int>(threadIdx.x % 32);
    for_each_chunk<TileN / chunk_rows>([&]<int Chunk>() {
      const int column = t.n + Chunk * chunk_rows;
      if (column >= p.columns) return;
      if (p.bias != nullptr)
        add_bias<Chunk>(sums, p.bias + static_cast<std::int64_t>(t.group) * p.columns, column, p.columns);
      if (p.accumulate || std::is_same_v<TC, float>) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + lane / 4 + 8 * half;
          TC* const line = c + row * p.row_stride + column + lane % 4 * 2;
          if (row < t.m_end) {
            if (p.accumulate) {
#pragma unroll
              for (int j = 0; j < 8; ++j)
                if (column + 8 * j < p.columns) add(sums + Chunk * 32 + 4 * j + 2 * half, line + 8 * j);
            }
            if constexpr (std::is_same_v<TC, float>) {
#pragma unroll
              for (int j = 0; j < 8; ++j)
                if (column + 8 * j < p.columns)
                  *reinterpret_cast<float2*>(line + 8 * j) = {sums[Chunk * 32 + 4 * j + 2 * half],
                                                              sums[Chunk * 32 + 4 * j + 2 * half + 1]};
            }
          }
        }
      }
      if constexpr (std::is_same_v<TC, bfloat16>) {
        const warp_staging buffer(staging);
        fragment f;
        round_chunk<Chunk>(sums, f);
        __syncwarp();
        buffer.put(f);
        __syncwarp();
        buffer.store(c, p.row_stride, first_row, t.m_end, column, p.columns);
      }
    });
  }

 private:
  static __device__ __forceinline__ void add(float* sums, const float* old) {
    const float2 v = *reinterpret_cast<const float2*>(old);
    sums[0] += v.x, sums[1] += v.y;
  }
  static __device__ __forceinline__ void add(float* sums, const bfloat16* old) {
    const std::uint32_t v = *reinterpret_cast<const std::uint32_t*>(old);
    sums[0] += low_bf16(v), sums[1] += high_bf16(v);
  }
};

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
