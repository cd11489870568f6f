// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <tessera/core/config.hpp>
#include <tessera/router/detail/device/lists.cuh>

// What a sort of pairs that exist already begins with; lists.cuh has the rest.

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr std::size_t sort_scratch_bytes = 16 * list_threads;

// Notes the pairs of this block's tokens. All threads call, after `shared` has been cleared.
template <class A, class SlotOf>
__device__ __forceinline__ void mark_pairs(const list_plan& plan, const list_task<A, SlotOf>& lists,
                                           const list_shared& shared) {
  const int top_k = static_cast<int>(lists.ids.cols);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * plan.tokens_per_block;
  __syncthreads();
  for (int pair = static_cast<int>(threadIdx.x); pair < plan.tokens_per_block * top_k; pair += list_threads) {
    const int t = pair / top_k;
    if (first + t >= lists.ids.rows) break;
    const int slot = lists.slot_of(lists.ids.row(first + t)[pair - t * top_k], first * top_k + pair);
    if (slot >= 0) shared.mark(plan, t, slot);
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END
