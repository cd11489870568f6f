// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include <tessera/core/views.hpp>
#include <tessera/dispatch/handle.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/router/detail/device/lists.cuh>
#include <tessera/router/detail/device/warp.cuh>
#include <tessera/router/lists.hpp>

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

// The sort of those tables into the lists of a handle. A capacity has been counted where pairs come from.
// @param slots `[R * max_tokens, K]` slots of this rank's experts. @param weights As many, of the pairs.
template <class A>
list_task<A, same_slot> make_arrival_lists(const dispatch_bounds& bounds, const dispatch_options& options,
                                           const std::int32_t* slots, const A* weights,
                                           const dispatch_handle<A>& handle, const router_workspace& sort) {
  const std::int64_t rows = bounds.addressed_rows();
  return {.ids = {slots, rows, bounds.top_k},
          .weights = {weights, rows, bounds.top_k},
          .lists = {.row_offsets = handle.expert_offsets,
                    .gather = handle.gather,
                    .expert_row_of = handle.expert_row_of,
                    .pair_weights = handle.pair_weights},
          .workspace = sort,
          .counts = nullptr,
          .dropped = options.has_capacity() ? nullptr : &handle.total->capacity_drops,
          .kept = &handle.total->received_pairs,
          .num_slots = std::max(bounds.num_local_experts, 1),
          .capacity = INT32_MAX,
          .slot_of = {}};
}

}  // namespace detail

TESSERA_NAMESPACE_END
