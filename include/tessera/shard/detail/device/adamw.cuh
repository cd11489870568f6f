// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The kernel of AdamW. A block walks over tiles of all tensors; a thread owns 8 neighbouring elements of a tile.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/stream.hpp>
#include <tessera/shard/adamw.hpp>
#include <tessera/shard/detail/device/checks.cuh>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

inline constexpr int adamw_threads = 256;
inline constexpr int adamw_width = 8;  // elements of a thread: 16 bytes of bf16
inline constexpr int adamw_tile = adamw_threads * adamw_width;

// Products that no compiler joins with a following addition: vectors and single elements then have the same bits.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

template <class T>
struct alignas(16) adamw_vector {
  T value[adamw_width];
};

template <class T>
__device__ __forceinline__ adamw_vector<T> load_vector(const T* from) {
  adamw_vector<T> result;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(result) / 16); ++i) {
    reinterpret_cast<uint4*>(&result)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  return result;
}

template <class T>
__device__ __forceinline__ void store_vector(T* to, const adamw_vector<T>& x) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(x) / 16); ++i) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&x)[i];
  }
}

template <class A, class M>
__device__ __forceinline__ void update_element(const adamw_scalars<A>& s, A gradient, M& exp_avg, M& exp_avg_sq,
                                               A& master) {
  const A g = product(s.scale, gradient);
  const A old_mean = static_cast<A>(exp_avg);
  const A mean = fma(s.take1, g - old_mean, old_mean);
  const A square = fma(s.take2, product(g, g), product(s.beta2, static_cast<A>(exp_avg_sq)));
  const A root = sqrt(square) / s.correction + s.epsilon;
  master = fma(s.keep, master, -(product(s.step_size, mean) / root));
  exp_avg = to_element<M>(mean);
  exp_avg_sq = to_element<M>(square);
}

template <class S, class A, class M>
__device__ __forceinline__ void update_vector(const adamw_scalars<A>& s, const adamw_tensor<S, A, M>& t, S* parameter,
                                              std::int64_t at) {
  const adamw_vector<A> gradient = load_vector(t.gradient + at);
  adamw_vector<A> master = load_vector(t.master + at);
  adamw_vector<M> exp_avg = load_vector(t.exp_avg + at);
  adamw_vector<M> exp_avg_sq = load_vector(t.exp_avg_sq + at);
#pragma unroll
  for (int i = 0; i < adamw_width; ++i) {
    update_element(s, gradient.value[i], exp_avg.value[i], exp_avg_sq.value[i], master.value[i]);
  }
  store_vector(t.master + at, master);
  store_vector(t.exp_avg + at, exp_avg);
  store_vector(t.exp_avg_sq + at, exp_avg_sq);
  if (parameter == nullptr) return;
  adamw_vector<S> rounded;
#pragma unroll
  for (int i = 0; i < adamw_width; ++i) rounded.value[i] = to_element<S>(master.value[i]);
  store_vector(parameter + at, rounded);
}

template <class S, class A, class M, class Control, class List>
__global__ void __launch_bounds__(adamw_threads) adamw_kernel(adamw_options options, Control* control, List list) {
  __shared__ adamw_scalars<A> shared;
  __shared__ bool skip;
  if (threadIdx.x == 0) {
    const double rate = control->rate, scale = control->scale;
    skip = !(fabs(scale) <= 1.7976931348623157e308 && fabs(rate) <= 1.7976931348623157e308);
    shared = adamw_scalars<A>::make(options, control->step + 1, rate, scale);
  }
  __syncthreads();
  const adamw_scalars<A> scalars = shared;
  for (std::int64_t tile = blockIdx.x; tile < list.num_tiles && !skip; tile += gridDim.x) {
    int low = 0, high = list.num_tensors;  // the last tensor whose first tile is not beyond this one
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (list.tensors[middle].first_tile <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const auto& described = list.tensors[low];
    const adamw_tensor<S, A, M> t = described.tensor;
    adamw_scalars<A> own = scalars;
    if (!t.decays) own.keep = A(1);
    S* parameter = t.parameter;
    if constexpr (std::is_same_v<S, A>) {
      if (parameter == t.master) parameter = nullptr;
    }
    const std::int64_t first =
        (tile - described.first_tile) * adamw_tile + static_cast<std::int64_t>(threadIdx.x) * adamw_width;
    if (described.aligned && first + adamw_width <= t.count) {
      update_vector(own, t, parameter, first);
      continue;
    }
    const std::int64_t last = first + adamw_width < t.count ? first + adamw_width : t.count;
    for (std::int64_t i = first; i < last; ++i) {
      update_element(own, t.gradient[i], t.exp_avg[i], t.exp_avg_sq[i], t.master[i]);
      if (parameter != nullptr) parameter[i] = to_element<S>(t.master[i]);
    }
  }
  // The last block to end moves the step on: by then every block has read it.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&control->done, 1U) == gridDim.x - 1) {
      control->done = 0;
      if (!skip) ++control->step;
    }
  }
}

template <class S, class A, class M, class Control, class List>
void launch_adamw(device_stream stream, const adamw_options& options, Control* control, const List& list) {
  const int num_sms = tessera::detail::device_attribute(cudaDevAttrMultiProcessorCount);
  constexpr std::int64_t blocks_per_sm = 8;  // 2048 threads
  const auto blocks = static_cast<unsigned>(
      (std::max<std::int64_t>)(1, (std::min<std::int64_t>)(list.num_tiles, blocks_per_sm * num_sms)));
  adamw_kernel<S, A, M><<<blocks, adamw_threads, 0, stream.get()>>>(options, control, list);
  expect_launched("adamw_kernel");
}

}  // namespace shard::detail
TESSERA_NAMESPACE_END
