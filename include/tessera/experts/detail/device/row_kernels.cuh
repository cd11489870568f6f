// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/dtype.hpp>
#include <tessera/core/expert_rows.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// What experts do to rows besides products: weights on the input, and biases.

inline constexpr int row_kernel_threads = 128;

__device__ inline std::int32_t source_row(const expert_rows& rows, std::int32_t i) {
  return rows.gather == nullptr ? i : rows.gather[i];
}

// Sum over a block, in a fixed order; the result is valid in thread 0.
__device__ inline float block_sum(float value) {
  __shared__ float parts[row_kernel_threads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int i = 0; i < row_kernel_threads / 32; ++i) value += parts[i];
  __syncthreads();
  return value;
}

// to[i] = weights[i] * from[source of i].
template <class S>
__global__ void __launch_bounds__(row_kernel_threads)
    weigh_rows_kernel(expert_rows rows, const float* weights, matrix_view<const S> from, matrix_view<S> to) {
  const std::int32_t num_rows = rows.row_offsets[rows.num_local_experts];
  for (std::int32_t i = static_cast<std::int32_t>(blockIdx.x); i < num_rows;
       i += static_cast<std::int32_t>(gridDim.x)) {
    const S* source = from.row(source_row(rows, i));
    for (std::int64_t j = threadIdx.x; j < to.cols; j += blockDim.x)
      to(i, j) = static_cast<S>(weights[i] * static_cast<float>(source[j]));
  }
}

// The adjoint: dweights[i] = <dinput[i], x[source of i]>, dx[i] = weights[i] * dinput[i].
template <class S>
__global__ void __launch_bounds__(row_kernel_threads)
    unweigh_rows_kernel(expert_rows rows, const float* weights, matrix_view<const S> x, matrix_view<const float> dinput,
                        matrix_view<S> dx, float* dweights) {
  const std::int32_t num_rows = rows.row_offsets[rows.num_local_experts];
  for (std::int32_t i = static_cast<std::int32_t>(blockIdx.x); i < num_rows;
       i += static_cast<std::int32_t>(gridDim.x)) {
    const S* source = x.row(source_row(rows, i));
    float dot = 0;
    for (std::int64_t j = threadIdx.x; j < dx.cols; j += blockDim.x) {
      const float d = dinput(i, j);
      dot += d * static_cast<float>(source[j]);
      dx(i, j) = static_cast<S>(weights[i] * d);
    }
    dot = block_sum(dot);
    if (threadIdx.x == 0 && dweights != nullptr) dweights[i] = dot;
  }
}

// dweights[i] += <dy[source of i], bias of i's expert>: the down bias' part of a pair weight's gradient.
template <class S>
__global__ void __launch_bounds__(row_kernel_threads)
    add_bias_products_kernel(expert_rows rows, matrix_view<const S> dy, const S* bias, float* dweights) {
  const std::int32_t num_rows = rows.row_offsets[rows.num_local_experts];
  for (std::int32_t i = static_cast<std::int32_t>(blockIdx.x); i < num_rows;
       i += static_cast<std::int32_t>(gridDim.x)) {
    std::int32_t low = 0, high = rows.num_local_experts;  // the expert whose rows contain i
    while (high - low > 1) {
      const std::int32_t middle = (low + high) / 2;
      (rows.row_offsets[middle] <= i ? low : high) = middle;
    }
    const S* source = dy.row(source_row(rows, i));
    float dot = 0;
    for (std::int64_t j = threadIdx.x; j < dy.cols; j += blockDim.x)
      dot += static_cast<float>(source[j]) * static_cast<float>(bias[low * dy.cols + j]);
    dot = block_sum(dot);
    if (threadIdx.x == 0) dweights[i] += dot;
  }
}

// sums[g, j] (=|+=) sum over the rows i of group g, ascending, of weights[i] * from[source of i, j].
template <class T, class G>
__global__ void __launch_bounds__(row_kernel_threads)
    sum_columns_kernel(expert_rows groups, const float* weights, matrix_view<const T> from, G* sums, bool accumulate) {
  const std::int64_t j = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= from.cols) return;
  for (std::int32_t g = static_cast<std::int32_t>(blockIdx.y); g < groups.num_local_experts;
       g += static_cast<std::int32_t>(gridDim.y)) {
    float sum = 0;
    for (std::int32_t i = groups.row_offsets[g]; i < groups.row_offsets[g + 1]; ++i)
      sum += (weights == nullptr ? 1.0f : weights[i]) * static_cast<float>(from(source_row(groups, i), j));
    G* to = sums + g * from.cols + j;
    *to = static_cast<G>(accumulate ? static_cast<float>(*to) + sum : sum);
  }
}

// Blocks for kernels that walk rows: enough to fill the device, no more than there may be rows.
inline unsigned row_blocks(std::int64_t max_rows) {
  return static_cast<unsigned>(max_rows < 1 ? 1 : (max_rows < 2048 ? max_rows : 2048));
}

// `to[i] = weights[i] * from[source of i]`, at most `max_rows` rows.
template <class S>
void weigh_rows(device_stream stream, const expert_rows& rows, const float* weights, matrix_view<const S> from,
                std::int64_t max_rows, matrix_view<S> to) {
  weigh_rows_kernel<S><<<row_blocks(max_rows), row_kernel_threads, 0, stream.get()>>>(rows, weights, from, to);
  expect_launched("weigh_rows_kernel");
}

template <class T, class G>
void sum_columns(device_stream stream, const expert_rows& groups, const float* weights, matrix_view<const T> from,
                 G* sums, bool accumulate) {
  if (groups.num_local_experts == 0 || from.cols == 0) return;
  const dim3 grid(static_cast<unsigned>((from.cols + row_kernel_threads - 1) / row_kernel_threads),
                  static_cast<unsigned>(groups.num_local_experts < 65535 ? groups.num_local_experts : 65535));
  sum_columns_kernel<T, G><<<grid, row_kernel_threads, 0, stream.get()>>>(groups, weights, from, sums, accumulate);
  expect_launched("sum_columns_kernel");
}

}  // namespace detail

TESSERA_NAMESPACE_END
