// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/chunks.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/handle.hpp>
#include <tessera/moe/state.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// The small kernels that keep a layer's state on the device. One block each: they touch E numbers.

inline constexpr int state_threads = 256;

// offsets[i] = first token of chunk i; one chunk of all tokens where chunk_tokens is 0.
static __global__ void chunk_offsets_kernel(std::int32_t* offsets, std::int64_t chunks, std::int64_t num_tokens,
                                            std::int64_t chunk_tokens) {
  start_early();
  for (std::int64_t i = threadIdx.x; i <= chunks; i += blockDim.x)
    offsets[i] = static_cast<std::int32_t>(i == chunks ? num_tokens : i * chunk_tokens);
}

inline void fill_chunk_offsets(device_stream stream, std::int32_t* offsets, std::int64_t num_tokens,
                               std::int64_t chunk_tokens) {
  launch_early(stream, "chunk_offsets_kernel", chunk_offsets_kernel, dim3(1), state_threads, 0, offsets,
               num_chunks(num_tokens, chunk_tokens), num_tokens, chunk_tokens);
}

template <class Totals>
__global__ void totals_kernel(Totals* total, std::int64_t num_tokens) {
  start_early();
  *total = {num_tokens, num_tokens, 0, 0, 0};
}

template <class Totals>
void set_totals(device_stream stream, Totals* total, std::int64_t num_tokens) {
  launch_early(stream, "totals_kernel", totals_kernel<Totals>, dim3(1), 1, 0, total, num_tokens);
}

__device__ __forceinline__ void add_count(std::int64_t* sum, std::int64_t count) {
  if (count != 0) atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(count));
}

// One training pass: the load of its tokens, its drops and its size. That of another slot may run at the same time.
template <class A>
__global__ void count_step_kernel(layer_state<A> state, const std::int64_t* counts, dispatch_handle<A> handle,
                                  const comm::symmetric_failure* failure) {
  start_early();
  if (failure != nullptr && *static_cast<const volatile std::uint32_t*>(&failure->state) != 0) return;
  for (int e = static_cast<int>(threadIdx.x); e < state.num_experts; e += static_cast<int>(blockDim.x))
    add_count(state.load + e, counts[e]);
  if (threadIdx.x != 0) return;
  add_count(state.dropped_by_capacity, handle.total->capacity_drops);
  add_count(state.dropped_by_bound, handle.total->overflow_drops);
  atomicMax(reinterpret_cast<long long*>(state.most_received_pairs),
            static_cast<long long>(handle.expert_offsets[handle.num_local_experts]));
}

template <class A>
void count_step(device_stream stream, const layer_state<A>& state, const std::int64_t* counts,
                const dispatch_handle<A>& handle, const comm::symmetric_failure* failure) {
  launch_early(stream, "count_step_kernel", count_step_kernel<A>, dim3(1), state_threads, 0, state, counts, handle,
               failure);
}

template <int NumLosses>
struct initial_state {
  float bias_rate;
  float coefficients[NumLosses > 0 ? NumLosses : 1];
};

template <class A, int NumLosses>
__global__ void reset_state_kernel(layer_state<A> state, initial_state<NumLosses> initial) {
  for (int e = static_cast<int>(threadIdx.x); e < state.num_experts; e += static_cast<int>(blockDim.x)) {
    if (state.bias != nullptr) state.bias[e] = 0;
    state.load[e] = 0;
    state.global_load[e] = 0;
  }
  for (std::int64_t i = threadIdx.x; i < state.max_chunks * state.num_losses; i += blockDim.x) state.losses[i] = 0;
  if (threadIdx.x != 0) return;
  for (int i = 0; i < NumLosses; ++i) state.coefficients[i] = initial.coefficients[i];
  *state.bias_rate = initial.bias_rate;
  *state.loss_scale = 1;
  *state.dropped_by_capacity = 0;
  *state.dropped_by_bound = 0;
  *state.most_received_pairs = 0;
  *state.status = device_status{};
  for (int slot = 0; slot < comm::max_symmetric_slots; ++slot) state.counters[slot] = call_counters{};
}

template <class A, int NumLosses>
void reset_state(device_stream stream, const layer_state<A>& state, const initial_state<NumLosses>& initial) {
  reset_state_kernel<<<1, state_threads, 0, stream.get()>>>(state, initial);
  expect_launched("reset_state_kernel");
}

template <class A>
__global__ void clear_load_kernel(layer_state<A> state) {
  for (int e = static_cast<int>(threadIdx.x); e < state.num_experts; e += static_cast<int>(blockDim.x))
    state.load[e] = 0;
}

template <class A>
void clear_load(device_stream stream, const layer_state<A>& state) {
  clear_load_kernel<<<1, state_threads, 0, stream.get()>>>(state);
  expect_launched("clear_load_kernel");
}

}  // namespace detail

TESSERA_NAMESPACE_END
