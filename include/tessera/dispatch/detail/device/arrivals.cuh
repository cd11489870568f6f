// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/core/views.hpp>
#include <tessera/router/detail/device/lists.cuh>
#include <tessera/router/detail/device/warp.cuh>

// Tables of what arrives from all ranks, before they are sorted: pairs beyond the bound, and tables of no use.

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr int no_slot = -1;  // in tables and lists: another rank's pair, or none
inline constexpr int dropped_row =
    -2;  // in lists: a pair of this rank's beyond its bound; tables: ~slot - 1, which is less

// Marks the pairs of this block's tokens that are beyond the bound in the order (source, token, k). Dropped pairs stay
// countable, because other blocks count the same tables. Rare and slow. @param slots The table of `ids`, written.
__device__ inline void drop_over_bound(const list_plan& plan, const matrix_view<const std::int32_t>& ids,
                                       std::int32_t* slots, std::int64_t max_pairs) {
  __shared__ std::int64_t before;  // pairs of earlier tokens
  const int top_k = static_cast<int>(ids.cols);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * plan.tokens_per_block * top_k;
  const std::int64_t all = ids.rows * top_k;
  const std::int64_t end = first + static_cast<std::int64_t>(plan.tokens_per_block) * top_k;
  const auto mine = [&](std::int64_t pair) {
    return *static_cast<volatile const std::int32_t*>(slots + pair) != no_slot;
  };
  if (threadIdx.x == 0) before = 0;
  __syncthreads();
  std::int64_t count = 0;
  for (std::int64_t pair = threadIdx.x; pair < (first < all ? first : all); pair += list_threads) count += mine(pair);
  count = warp_sum(count);
  if (threadIdx.x % warp_size == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&before), static_cast<unsigned long long>(count));
  }
  __syncthreads();
  if (threadIdx.x < warp_size) {
    std::int64_t admitted = before;
    for (std::int64_t base = first; base < end && base < all; base += warp_size) {
      const std::int64_t pair = base + threadIdx.x;
      const bool is_mine = pair < end && pair < all && mine(pair);
      const unsigned ballot = __ballot_sync(full_warp, is_mine);
      const std::int64_t place = admitted + __popc(ballot & ((1u << threadIdx.x) - 1u));
      if (is_mine && place >= max_pairs) slots[pair] = dropped_row - slots[pair];
      admitted += __popc(ballot);
    }
  }
  __syncthreads();
}

// Makes the lists empty, and valid: no pair of this block's tokens is here.
template <class A>
__device__ void forget_pairs(const list_plan& plan, list_task<A, same_slot>& task) {
  const std::int64_t pairs = static_cast<std::int64_t>(plan.tokens_per_block) * task.ids.cols;
  const std::int64_t end = task.ids.rows * task.ids.cols;
  const std::int64_t begin = pairs * blockIdx.x;
  for (std::int64_t pair = begin + threadIdx.x; pair < begin + pairs && pair < end; pair += list_threads) {
    task.lists.expert_row_of[pair] = no_slot;
  }
  task.ids.rows = 0;
}

}  // namespace detail

TESSERA_NAMESPACE_END
