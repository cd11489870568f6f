// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of the router, for sm_80 and later. Nothing here allocates, synchronises or reads device memory on the
/// host; every call can be captured in a CUDA graph, whose replays are right for changed inputs; results are run-to-run
/// bitwise the same.
///
/// Kernels cannot throw. Where an input is wrong they leave the slots concerned unused (`no_expert`, weight 0), so that
/// what follows stays in range, and set the `device_status` word where one was given.
///
/// Against the host half: exponentials and reciprocals are the hardware's in float (relative error below 6e-6), so ids
/// can differ where keys are that close. At most 32 groups.

#include <tessera/core/device_status.hpp>
#include <tessera/router/detail/device/backward.cuh>
#include <tessera/router/detail/device/launch.cuh>
#include <tessera/router/detail/device/losses.cuh>
#include <tessera/router/lists.hpp>
#include <tessera/router/router.hpp>

TESSERA_NAMESPACE_BEGIN

/// `router::route` together with the lists that a rank which owns all experts computes from, in one cooperative launch.
/// Enqueues, does not synchronise.
/// @param stream       Where the work is enqueued.
/// @param chosen       The router.
/// @param in           Device memory.
/// @param out          Device memory, written.
/// @param local_counts Device memory, written; without data nothing is counted.
/// @param lists        Device memory, written.
/// @param workspace    Scratch; its barrier was 0 before its first use and is not shared by concurrent calls.
/// @param status       Device memory; null: faults are not reported.
/// @throws invalid_argument if shapes do not fit. @throws cuda_error if the launch fails.
template <class Score, class Select, class Weigh, class... Balances, accumulate_type A>
void route_sorted(device_stream stream, const router<Score, Select, Weigh, Balances...>& chosen,
                  const router_inputs<A>& in, const routing<A>& out, balance_counts local_counts,
                  const router_lists<A>& lists, const router_workspace& workspace, device_status* status = nullptr) {
  detail::route_on_device(stream, chosen, in, out, local_counts, &lists, workspace, status);
}

template <class Score, class Select, class Weigh, class... Balances>
template <accumulate_type A>
void router<Score, Select, Weigh, Balances...>::route(device_stream stream, const router_inputs<A>& in, routing<A> out,
                                                      balance_counts local_counts, device_status* status) const {
  detail::route_on_device(stream, *this, in, out, local_counts, nullptr, router_workspace{}, status);
}

template <class Score, class Select, class Weigh, class... Balances>
template <accumulate_type A>
void router<Score, Select, Weigh, Balances...>::losses(device_stream stream, const router_inputs<A>& in,
                                                       const_balance_counts global_counts, const float* coefficients,
                                                       std::int64_t chunk_tokens, matrix_view<A> chunk_losses,
                                                       std::type_identity_t<A>* token_losses) const {
  detail::losses_on_device(stream, *this, in, global_counts, coefficients, chunk_tokens, chunk_losses, token_losses);
}

template <class Score, class Select, class Weigh, class... Balances>
template <accumulate_type A>
void router<Score, Select, Weigh, Balances...>::backward(device_stream stream, const router_inputs<A>& in,
                                                         const routing<A>& routed, matrix_view<const A> dweights,
                                                         const_balance_counts global_counts, const float* coefficients,
                                                         A loss_scale, matrix_view<A> dlogits) const {
  detail::backward_on_device<Score, Select, Weigh, Balances...>(
      stream, *this, in, routed.expert_ids, dweights, global_counts, coefficients, loss_scale, nullptr, dlogits);
}

template <class Score, class Select, class Weigh, class... Balances>
template <accumulate_type A>
void router<Score, Select, Weigh, Balances...>::backward(device_stream stream, const router_inputs<A>& in,
                                                         const routing<A>& routed, matrix_view<const A> dweights,
                                                         const_balance_counts global_counts, const float* coefficients,
                                                         const float* loss_scale, matrix_view<A> dlogits) const {
  TESSERA_EXPECTS(loss_scale != nullptr, "router::backward: loss_scale is null, a number in device memory is needed");
  detail::backward_on_device<Score, Select, Weigh, Balances...>(stream, *this, in, routed.expert_ids, dweights,
                                                                global_counts, coefficients, A(1), loss_scale, dlogits);
}

namespace balance {

inline void update_bias(device_stream stream, float* bias, const std::int64_t* load, int num_experts,
                        const float* rate) {
  constexpr int threads = 256;
  detail::update_bias_kernel<threads><<<1, threads, 0, stream.get()>>>(bias, load, num_experts, rate);
  detail::expect_launched("update_bias_kernel");
}

}  // namespace balance

TESSERA_NAMESPACE_END
