// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/experts/detail/device/row_kernels.cuh>
#include <tessera/gemm/detail/device/strided_product.cuh>
#include <tessera/gemm/automatic.cuh>
#include <tessera/gemm/hopper.cuh>
#include <tessera/moe/detail/gate_splits.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// The three products with the gate. Its weights and the logits' gradients are fp32, which tensor cores do not multiply;
// but an fp32 number is the sum of three bf16 numbers, and products of bf16 numbers are exact in fp32. Forward uses all
// three parts of the weights, so that logits are as exact as fp32 sums can be: they decide the routing. Backward uses
// two parts of each factor (16 bits) and leaves out the product of the two lesser ones.

// `to[slot](i, j)` is bf16 part `part_of[slot]` of `from(i, j)`, 0 the most significant.
struct split_task {
  matrix_view<const float> from;
  bfloat16* to;
  std::int64_t slot_stride, row_stride;
  int part_of[3];
  std::int32_t* one_group;  // [2], receives {0, num_rows}; or null
  std::int32_t num_rows;
};

static __global__ void __launch_bounds__(256) split_kernel(const __grid_constant__ split_task task) {
  start_early();
  if (blockIdx.x == 0 && threadIdx.x == 0 && task.one_group != nullptr) {
    task.one_group[0] = 0;
    task.one_group[1] = task.num_rows;
  }
  const std::int64_t units = task.from.cols / 8, count = task.from.rows * units;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const std::int64_t row = i / units, column = i % units * 8;
    const float* const source = task.from.row(row) + column;
    alignas(16) bfloat16 part[3][8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float rest = source[j];
#pragma unroll
      for (int p = 0; p < 3; ++p) {
        part[p][j] = bfloat16(rest);
        rest -= static_cast<float>(part[p][j]);
      }
    }
#pragma unroll
    for (int slot = 0; slot < 3; ++slot) {
      bfloat16* const to = task.to + slot * task.slot_stride + row * task.row_stride + column;
#pragma unroll
      for (int p = 0; p < 3; ++p)
        if (task.part_of[slot] == p) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(part[p]);
    }
  }
}

inline void launch_split(device_stream stream, const split_task& task) {
  const std::int64_t blocks = (task.from.rows * (task.from.cols / 8) + 255) / 256;
  launch_early(stream, "split_kernel", split_kernel,
               dim3(static_cast<unsigned>(std::clamp<std::int64_t>(blocks, 1, 1056))), 256, 0, task);
}

// `c(i, j) += bias[j]`.
static __global__ void __launch_bounds__(256) add_gate_bias_kernel(matrix_view<float> c, const float* bias) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < c.rows * c.cols; i += step)
    c(i / c.cols, i % c.cols) += bias[i % c.cols];
}

// Splits of the tokens of each chunk, in order: the groups of the product that makes the weights' gradient.
static __global__ void gate_split_offsets_kernel(std::int32_t* offsets, std::int64_t chunks, gate_splits splits,
                                                 std::int64_t num_tokens, std::int64_t chunk_tokens) {
  start_early();
  const std::int64_t count = chunks * splits.per_chunk;
  for (std::int64_t i = threadIdx.x; i <= count; i += blockDim.x) {
    const std::int64_t chunk = i / splits.per_chunk;
    const std::int64_t begin = chunk_tokens == 0 ? 0 : min(num_tokens, chunk * chunk_tokens);
    const std::int64_t end = chunk_tokens == 0 ? num_tokens : min(num_tokens, begin + chunk_tokens);
    offsets[i] =
        static_cast<std::int32_t>(i == count ? num_tokens : min(end, begin + i % splits.per_chunk * splits.rows));
  }
}

// `gradient[chunk](e, j) (=|+=) sum over the chunk's splits, ascending, of both parts' rows`.
static __global__ void __launch_bounds__(256)
    sum_gate_splits_kernel(const float* partial, int splits, std::int64_t matrix, bool accumulate, float* gradient) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  start_early();
  if (i >= matrix) return;
  const float* const from = partial + std::int64_t{blockIdx.y} * splits * 2 * matrix + i;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += from[s * 2 * matrix + matrix] + from[s * 2 * matrix];
  float* const to = gradient + blockIdx.y * matrix + i;
  *to = accumulate ? *to + sum : sum;
}

// Whether kernels can copy such rows: columns, distances and address in units of 16 bytes.
inline bool copies_rows(const matrix_view<const bfloat16>& x) {
  return x.cols % 8 == 0 && x.stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
}

// Whether the products run on tensor cores here; otherwise they are plain fp32 products.
inline bool gate_on_tensor_cores(int num_experts, const matrix_view<const bfloat16>& x) {
  return num_experts % 8 == 0 && x.rows > 0 && copies_rows(x) && has_hopper();
}

// `logits[t] = x[t] W^T + bias`. @param parts `[3, E, d]`, scratch. @param one_group `[2]`, scratch. @param sm_budget
// Most multiprocessors of the product, here and below; 0: all.
inline void gate_forward(device_stream stream, const matrix_view<const bfloat16>& x, matrix_view<const float> gate,
                         const float* bias, matrix_view<float> logits, bfloat16* parts, std::int32_t* one_group,
                         int sm_budget = 0) {
  const std::int64_t experts = gate.rows, d = gate.cols;
  if (!gate_on_tensor_cores(static_cast<int>(experts), x)) {
    launch_strided_product(
        stream,
        strided_product<bfloat16, float>{
            {x.data, x.stride, 1}, {gate.data, gate.stride, 1}, bias, logits.data, x.rows, experts, d, 0, false},
        1);
    return;
  }
  launch_split(stream, {gate, parts, experts * d, d, {2, 1, 0}, one_group, static_cast<std::int32_t>(x.rows)});
  gemm::hopper::product_with_parts<3>(stream, gemm::hopper::device::current(), {one_group, 1, x.rows}, experts, d,
                                      {x.data, x.stride, nullptr}, parts, logits, {.sm_budget = sm_budget});
  if (bias == nullptr) return;
  add_gate_bias_kernel<<<528, 256, 0, stream.get()>>>(logits, bias);
  expect_launched("add_gate_bias_kernel");
}

// `dx[t] (=|+=) dlogits[t] W`, rounded; and the parts of the logits' gradients that `gate_backward_weights` reads.
// @param parts `[3, E, d]`, scratch. @param dlogit_parts `[T, 3 E]`, written. @param one_group `[2]`, scratch.
inline void gate_backward_input(device_stream stream, const matrix_view<const bfloat16>& x,
                                matrix_view<const float> dlogits, matrix_view<const float> gate,
                                matrix_view<bfloat16> dx, write mode, bfloat16* parts, bfloat16* dlogit_parts,
                                std::int32_t* one_group, int sm_budget = 0) {
  const std::int64_t experts = gate.rows, d = gate.cols, num_tokens = dlogits.rows;
  const bool on_tensor_cores = gate_on_tensor_cores(static_cast<int>(experts), x);
  if (on_tensor_cores) launch_split(stream, {dlogits, dlogit_parts, experts, 3 * experts, {0, 1, 0}, nullptr, 0});
  if (!on_tensor_cores || !copies_rows(dx)) {
    launch_strided_product(stream,
                           strided_product<float, float, bfloat16>{{dlogits.data, dlogits.stride, 1},
                                                                   {gate.data, 1, gate.stride},
                                                                   nullptr,
                                                                   dx.data,
                                                                   num_tokens,
                                                                   d,
                                                                   experts,
                                                                   0,
                                                                   mode == write::accumulate,
                                                                   dx.stride},
                           1);
    return;
  }
  // (high + low) (W1 + W2), less low W2, as one product with sums of length 3 E
  launch_split(stream, {gate, parts, experts * d, d, {0, 0, 1}, one_group, static_cast<std::int32_t>(num_tokens)});
  gemm::hopper::variable_m<gemm::hopper::contiguous::mn, gemm::hopper::gathered::none, bfloat16>(
      stream, gemm::hopper::device::current(), {one_group, 1, num_tokens}, d, 3 * experts,
      {dlogit_parts, 3 * experts, nullptr}, {parts, 3 * experts * d, 1, d}, nullptr, dx, mode,
      gemm::hopper::launch_options{.sm_budget = sm_budget});
}

// `gradient[chunk] (=|+=) dlogits^T x` over the tokens of each chunk. @param dlogit_parts From `gate_backward_input`.
// @param offsets `[chunks * splits + 1]`, scratch. @param partial `[chunks * splits, 2 E, d]`, scratch.
inline void gate_backward_weights(device_stream stream, const matrix_view<const bfloat16>& x,
                                  matrix_view<const float> dlogits, const bfloat16* dlogit_parts, float* gradient,
                                  write mode, std::int64_t chunks, std::int64_t chunk_tokens, gate_splits splits,
                                  std::int32_t* offsets, float* partial) {
  const std::int64_t experts = dlogits.cols, d = x.cols, num_tokens = x.rows;
  if (!gate_on_tensor_cores(static_cast<int>(experts), x)) {
    launch_strided_product(stream,
                           strided_product<float, bfloat16>{{dlogits.data, 1, dlogits.stride},
                                                            {x.data, 1, x.stride},
                                                            nullptr,
                                                            gradient,
                                                            experts,
                                                            d,
                                                            num_tokens,
                                                            chunk_tokens,
                                                            mode == write::accumulate},
                           chunks);
    return;
  }
  launch_early(stream, "gate_split_offsets_kernel", gate_split_offsets_kernel, dim3(1), 256, 0, offsets, chunks, splits,
               num_tokens, chunk_tokens);
  gemm::hopper::variable_k<gemm::hopper::gathered::none, float>(
      stream, gemm::hopper::device::current(), {offsets, chunks * splits.per_chunk, num_tokens}, 2 * experts, d,
      {dlogit_parts, 3 * experts, nullptr}, {x.data, x.stride, nullptr},
      gemm::group_operand<float>{partial, 2 * experts * d, d, 1});
  const std::int64_t matrix = experts * d;
  launch_early(stream, "sum_gate_splits_kernel", sum_gate_splits_kernel,
               dim3(static_cast<unsigned>((matrix + 255) / 256), static_cast<unsigned>(chunks)), 256, 0, partial,
               static_cast<int>(splits.per_chunk), matrix, mode == write::accumulate, gradient);
}

}  // namespace detail

TESSERA_NAMESPACE_END
