// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// Element (i, k) of an operand. The gate's weights are fp32 and its tokens bf16, and either index may be contiguous.
template <class T>
struct strided_operand {
  const T* data;
  std::int64_t row_stride;
  std::int64_t col_stride;
};

// c[g](m, n) = sum_k a(m, k) b(n, k) + bias(n) over the k of group g, in fp32 and in ascending order of k: the products
// with the gate, whose bits decide the routing. Groups are chunks of `group_k`; 0: one group of all.
template <class TA, class TB, class TC = float>
struct strided_product {
  strided_operand<TA> a;
  strided_operand<TB> b;
  const float* bias;
  TC* c;  // [groups, M, N]
  std::int64_t M, N, K, group_k;
  bool accumulate;
  std::int64_t c_stride = N;  // of rows

  static constexpr int tile = 64;
  static constexpr int depth = 16;
  static constexpr int threads = 256;

  // Neighbouring threads read neighbouring addresses, whichever index that is.
  template <class T>
  __device__ static void load(float (&to)[depth][tile + 4], const strided_operand<T>& from, std::int64_t row0,
                              std::int64_t rows, std::int64_t k0, std::int64_t k_end) {
    for (int i = static_cast<int>(threadIdx.x); i < tile * depth; i += threads) {
      const bool by_row = from.col_stride == 1;
      const int row = by_row ? i / depth : i % tile;
      const int k = by_row ? i % depth : i / tile;
      const bool inside = row0 + row < rows && k0 + k < k_end;
      to[k][row] =
          inside ? static_cast<float>(from.data[(row0 + row) * from.row_stride + (k0 + k) * from.col_stride]) : 0.0f;
    }
  }

  __device__ void run() const {
    __shared__ float tile_a[depth][tile + 4];
    __shared__ float tile_b[depth][tile + 4];
    const std::int64_t group = blockIdx.z;
    const std::int64_t k_begin = group * group_k;
    const std::int64_t k_end = group_k == 0 ? K : min(K, k_begin + group_k);
    const std::int64_t m0 = std::int64_t{blockIdx.x} * tile, n0 = std::int64_t{blockIdx.y} * tile;
    const int row = static_cast<int>(threadIdx.x) / 16 * 4, col = static_cast<int>(threadIdx.x) % 16 * 4;
    float sum[4][4] = {};
    for (std::int64_t k0 = k_begin; k0 < k_end; k0 += depth) {
      __syncthreads();
      load(tile_a, a, m0, M, k0, k_end);
      load(tile_b, b, n0, N, k0, k_end);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < depth; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += tile_a[k][row + i] * tile_b[k][col + j];
    }
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        if (m0 + row + i >= M || n0 + col + j >= N) continue;
        TC* to = c + (group * M + m0 + row + i) * c_stride + n0 + col + j;
        const float value = sum[i][j] + (bias == nullptr ? 0.0f : bias[n0 + col + j]);
        *to = static_cast<TC>(accumulate ? static_cast<float>(*to) + value : value);
      }
    }
  }
};

template <class Product>
__global__ void __launch_bounds__(Product::threads) strided_product_kernel(const __grid_constant__ Product product) {
  product.run();
}

inline void launch_strided(device_stream stream, const void* kernel, const void* product, std::int64_t M,
                           std::int64_t N, std::int64_t num_groups, int tile, int threads) {
  if (M == 0 || N == 0 || num_groups == 0) return;
  TESSERA_EXPECTS(num_groups < 65536, num_groups << " chunks in one call, at most 65535 are possible");
  const dim3 grid(static_cast<unsigned>((M + tile - 1) / tile), static_cast<unsigned>((N + tile - 1) / tile),
                  static_cast<unsigned>(num_groups));
  void* arguments[] = {const_cast<void*>(product)};
  check_cuda(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), arguments, 0, stream.get()),
             "strided_product_kernel");
}

template <class TA, class TB, class TC>
void launch_strided_product(device_stream stream, const strided_product<TA, TB, TC>& product, std::int64_t num_groups) {
  using product_type = strided_product<TA, TB, TC>;
  launch_strided(stream, reinterpret_cast<const void*>(strided_product_kernel<product_type>), &product, product.M,
                 product.N, num_groups, product_type::tile, product_type::threads);
}

}  // namespace detail

TESSERA_NAMESPACE_END
