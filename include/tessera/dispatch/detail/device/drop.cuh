// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/core/device_status.hpp>
#include <tessera/dispatch/handle.hpp>
#include <tessera/router/detail/device/route.cuh>

// Which pairs go where a sort by position cannot tell: a sort gives all of them rows, a kernel here takes rows away
// from pairs, and a second sort leaves those out. Rare, so that these kernels are simple, and slow where many pairs
// are.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr int drop_threads = 256;
inline constexpr std::int32_t row_taken = -2;  // in `expert_row_of`, until the second sort

// How many threads of the block before this one have `flag`, and how many of all. `counts` is shared, one per warp.
template <int Threads>
__device__ __forceinline__ int flags_before(bool flag, int* counts, int& all) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const unsigned ballot = __ballot_sync(full_warp, flag);
  __syncthreads();  // the last call's counts have been read
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << lane) - 1u));
  all = 0;
  for (int w = 0; w < Threads / warp_size; ++w) {
    if (w < warp) before += counts[w];
    all += counts[w];
  }
  return before;
}

template <class A>
struct light_task {
  matrix_view<const std::int32_t> ids;  // [T, K]
  const std::int32_t* row_offsets;
  const std::int32_t* gather;
  const A* pair_weights;
  std::int32_t* expert_row_of;
  std::int64_t* dropped;  // added to
  int capacity;
};

// Takes the rows of the lightest pairs of each expert, a block an expert; among equals the last.
template <class A>
__launch_bounds__(drop_threads) TESSERA_KERNEL drop_light_pairs_kernel(const __grid_constant__ light_task<A> task) {
  __shared__ int histogram[256];
  __shared__ int counts[drop_threads / warp_size];
  __shared__ int digit_of_all;
  __shared__ int keep_of_all;
  const int tid = static_cast<int>(threadIdx.x);
  const int first = task.row_offsets[blockIdx.x];
  const int rows = task.row_offsets[blockIdx.x + 1] - first;
  if (rows <= task.capacity) return;
  const A* const weights = task.pair_weights + first;

  // the weight of the last pair that stays, digit by digit, and how many of that weight stay
  constexpr int bits = 8 * static_cast<int>(sizeof(ordered_t<A>));
  ordered_t<A> least = 0;
  int keep = task.capacity;
  for (int shift = bits - 8; shift >= 0; shift -= 8) {
    histogram[tid] = 0;
    __syncthreads();
    for (int i = tid; i < rows; i += drop_threads) {
      const ordered_t<A> rest = (ordered(weights[i]) ^ least) >> shift;
      if (rest < 256) atomicAdd(histogram + rest, 1);  // the digits above are those of `least`
    }
    __syncthreads();
    if (tid == 0) {
      int digit = 255;
      for (; histogram[digit] < keep; --digit) keep -= histogram[digit];
      digit_of_all = digit;
      keep_of_all = keep;
    }
    __syncthreads();
    least |= static_cast<ordered_t<A>>(digit_of_all) << shift;
    keep = keep_of_all;
    __syncthreads();
  }

  const int top_k = static_cast<int>(task.ids.cols);
  int equal = 0;
  for (int base = 0; base < rows; base += drop_threads) {
    const int i = base + tid;
    const ordered_t<A> weight = i < rows ? ordered(weights[i]) : ordered_t<A>(0);
    int equal_here;
    const int place = equal + flags_before<drop_threads>(i < rows && weight == least, counts, equal_here);
    equal += equal_here;
    if (i >= rows || weight > least || (weight == least && place < keep)) continue;
    std::int32_t* const row_of = task.expert_row_of + std::int64_t{task.gather[first + i]} * top_k;
    for (int k = 0; k < top_k; ++k) {
      if (row_of[k] == first + i) row_of[k] = row_taken;
    }
  }
  if (tid == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(task.dropped),
              static_cast<unsigned long long>(rows - task.capacity));
  }
}

template <class A>
void drop_light_pairs(device_stream stream, const matrix_view<const std::int32_t>& ids, const router_lists<A>& lists,
                      int num_experts, int capacity, std::int64_t* dropped) {
  drop_light_pairs_kernel<A><<<static_cast<unsigned>(num_experts), drop_threads, 0, stream.get()>>>(
      {ids, lists.row_offsets, lists.gather, lists.pair_weights, lists.expert_row_of, dropped, capacity});
  expect_launched("drop_light_pairs_kernel");
}

template <class Totals>
struct late_task {
  std::int32_t* expert_row_of;  // [num_pairs]
  std::int64_t num_pairs;
  std::int64_t max_pairs;
  Totals* total;
  bool is_fault;
  device_status* status;
};

// Takes the rows of the pairs beyond the bound in the order (token, k). One block.
template <class Totals>
__launch_bounds__(list_threads) TESSERA_KERNEL drop_late_pairs_kernel(const __grid_constant__ late_task<Totals> task) {
  __shared__ int counts[list_warps];
  const std::int64_t pairs = task.total->received_pairs;
  if (pairs <= task.max_pairs) return;
  std::int64_t admitted = 0;
  for (std::int64_t base = 0; base < task.num_pairs; base += list_threads) {
    const std::int64_t pair = base + threadIdx.x;
    const bool has_row = pair < task.num_pairs && task.expert_row_of[pair] >= 0;
    int here;
    const int before = flags_before<list_threads>(has_row, counts, here);
    if (has_row && admitted + before >= task.max_pairs) task.expert_row_of[pair] = row_taken;
    admitted += here;
  }
  if (threadIdx.x != 0) return;
  task.total->overflow_drops = pairs - task.max_pairs;
  if (task.is_fault) report(task.status, device_fault::too_many_pairs, pairs, static_cast<int>(task.max_pairs));
}

}  // namespace detail

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
