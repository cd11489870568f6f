// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Dispatch between GPUs for engines with products of their own, which want the rows of each expert next to each other:
/// the operations of `dispatch/symmetric.cuh`, and beside the rows a kernel that puts those that have come in the order
/// of experts. What is said there of waits, failures and graphs holds here too. Behind other transports, or where rows
/// are not wanted as they come, `expand_rows(stream, received, handle.expert_row_of, K, expanded)` of
/// `dispatch/dispatch.cuh` does the same once `dispatch_end` has waited for all.
///
///     exchange_routing_begin(stream, comm, layout, bounds, options, chosen, handle, workspace);
///     dispatch_expanded_begin(stream, comm, handle, x, received, expanded);
///     dispatch_expanded_end(stream, comm, received);  // and the lists are there
///     ...                                             // products of groups `handle.expert_offsets` of `expanded`
///     combine_rows(stream, comm, handle, combine_weights::routing, combine_source::expert_rows, outputs, ...);

#include <cstdint>

#include <tessera/dispatch/detail/symmetric/launch_expanded.cuh>
#include <tessera/dispatch/detail/symmetric/operands.cuh>
#include <tessera/dispatch/symmetric.cuh>

TESSERA_NAMESPACE_BEGIN

/// Sends each token once to every other rank that owns one of its experts, as `dispatch_begin` does, and stores what
/// arrives and this rank's own tokens to each of their pairs' rows, on the communicator's side stream: behind
/// `exchange_routing_begin`, or with the lists of an earlier one. Enqueues, does not synchronise.
/// @param stream   Where the work is enqueued.
/// @param comm     R ranks. Takes SMs as `expanded_sms` says; of up to 8 MiB of received rows as `symmetric_sms::rows`.
/// @param handle   From `dispatch_handle::layout_device`; its lists may be under way.
/// @param x        `[T, d]`; d, the rows' distance and the address are multiples of 16 bytes. Kept until
/// `dispatch_expanded_end`.
/// @param received `[R * max_tokens, d]` in the window, packed: scratch that peers write. May be the `returned` of
/// `combine_rows`.
/// @param expanded `[>= received_pairs, d]`: bounds.max_pairs rows are enough; local memory, rows' distance and address
/// multiples of 16 bytes. Rows from `expert_offsets[num_local_experts]` on are not written.
/// @throws invalid_argument if shapes or memory do not fit.
template <peer_communicator Comm, class A, class S>
void dispatch_expanded_begin(device_stream stream, Comm& comm, const dispatch_handle<A>& handle, matrix_view<const S> x,
                             matrix_view<S> received, matrix_view<S> expanded) {
  using namespace detail::symmetric;
  expect_tokens(handle, expect_dispatch(comm, x, received), "received");
  TESSERA_EXPECTS(handle.destinations != nullptr, "the handle has no destinations: it does not travel");
  TESSERA_EXPECTS(handle.top_k >= 1 && handle.top_k <= detail::warp_size,
                  "top_k = " << handle.top_k << ", expected 1 to 32");
  expect_matrix(expanded, -1, x.cols, "expanded rows");
  expect_bulk_rows(expanded, "expanded rows");
  // Few rows are all there before flags of parts would be.
  const bool few = awaits_in_sender(received.rows * received.stride * static_cast<std::int64_t>(sizeof(S)));
  begin_expanded(stream, comm, handle, x, received, expanded, !few);
}

/// Lets the stream wait for the rows of all ranks and for the lists; then `received` is the caller's again.
/// @param stream Of the begin, or one that comes after it. @param comm,received As there.
/// @throws cuda_error if a launch fails.
template <peer_communicator Comm, class S>
void dispatch_expanded_end(device_stream stream, Comm& comm, matrix_view<S> received) {
  exchange_routing_end(stream, comm);
  // Rows whose pairs were all dropped come too, and nobody has waited for them. Behind what sent, which counts rows.
  detail::symmetric::end_send(stream, comm, received);
}

TESSERA_NAMESPACE_END
