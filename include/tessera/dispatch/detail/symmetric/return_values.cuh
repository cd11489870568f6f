// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>

// One number per pair, from the pair's owner to its home; and the kernel that waits for what operations of other ranks
// bring.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

inline constexpr int values_threads = 512;

template <class A>
struct values_task {
  comm::symmetric_view view;
  const A* values;                    // of expert rows
  const std::int32_t* expert_row_of;  // [R * max_tokens, K]
  A* returned;                        // [max_tokens, K] in the window, 0 before this kernel
  std::int64_t pairs_per_rank;        // max_tokens * K
};

// Every pair has one owner, so no two ranks write one word.
template <class A>
__launch_bounds__(values_threads) TESSERA_KERNEL return_values_kernel(const __grid_constant__ values_task<A> task) {
  const comm::symmetric_view& view = task.view;
  await_stream();
  if (block_failed(view)) return;
  const std::uint32_t generation = next_generation(view);
  if (blockIdx.x == 0 && threadIdx.x < warp_size) announce(view, generation);
  if (!all_entered(view, generation)) return;
  let_next_start();  // no block waits for other ranks any more
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * values_threads + threadIdx.x;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * values_threads;
  for (int i = 0; i < view.size; ++i) {
    const int home = (view.rank + 1 + i) % view.size;
    const std::int32_t* const places = task.expert_row_of + home * task.pairs_per_rank;
    for (std::int64_t pair = first; pair < task.pairs_per_rank; pair += threads) {
      const std::int32_t place = __ldg(places + pair);
      if (place >= 0) *at_peer(view, task.returned + pair, home) = __ldg(task.values + place);
    }
  }
  leave(view, generation);
}

// Ends when every rank has said that its part of the channel's last operation is there.
static __launch_bounds__(warp_size) TESSERA_KERNEL await_kernel(const __grid_constant__ comm::symmetric_view view) {
  await_stream();
  if (failed(view)) return;
  const int r = static_cast<int>(threadIdx.x);
  if (r < view.size) await(view, view.arrived + r, current_generation(view), r, symmetric_step::arrival);
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
