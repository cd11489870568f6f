// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Dispatch and combine between GPUs over a transport: the operations of `dispatch/symmetric.cuh`, which are those of
/// `transport::all_to_all`, with one more argument. All ranks give the same transport, but for numbers of streams.
/// What is said there of waits, failures and graphs holds here too; what differs, `transport.hpp` says.

#include <cstdint>
#include <type_traits>

#include <tessera/dispatch/detail/symmetric/copy_rows.cuh>
#include <tessera/dispatch/detail/symmetric/transport_rows.cuh>
#include <tessera/dispatch/symmetric.cuh>
#include <tessera/dispatch/transport.hpp>

TESSERA_NAMESPACE_BEGIN

/// Sends tokens to the owners of their experts.
/// @param stream    Where the work is enqueued, or what streams of copies come after.
/// @param comm      R ranks.
/// @param handle    With `destinations`, which `transport::all_to_all` reads.
/// @param x         `[T, d]`; d, the rows' distance and the address are multiples of 16 bytes. With copies it stays as
/// it is until `dispatch_end`.
/// @param received  `[R * max_tokens, d]` in the window, packed; rows of tokens without an expert here are undefined.
/// @param transport The same on all ranks.
/// @throws invalid_argument if shapes or memory do not fit, or the communicator has too few streams of copies.
template <peer_communicator Comm, class A, class S, transport_policy Transport>
void dispatch_begin(device_stream stream, Comm& comm, const dispatch_handle<A>& handle, matrix_view<const S> x,
                    matrix_view<S> received, const Transport& transport) {
  using namespace detail::symmetric;
  expect_tokens(handle, tokens_of(received.rows, comm.size(), "received"), "received");
  TESSERA_EXPECTS(handle.destinations != nullptr, "the handle has no destinations: it does not travel");
  begin_rows(stream, comm, handle.destinations, x, received, transport);
}

/// The same before there is a routing, for a transport that sends every row to every rank. Parameters as there.
/// @throws invalid_argument as there, and for `transport::all_to_all`.
template <peer_communicator Comm, class S, transport_policy Transport>
void dispatch_begin(device_stream stream, Comm& comm, matrix_view<const S> x, matrix_view<S> received,
                    const Transport& transport) {
  detail::symmetric::begin_rows(stream, comm, static_cast<const std::uint32_t*>(nullptr), x, received, transport);
}

/// Lets the stream wait until the rows of all ranks are there. @param stream,comm,received,transport As in
/// `dispatch_begin`. @return `received`.
template <peer_communicator Comm, class S, transport_policy Transport>
matrix_view<const S> dispatch_end(device_stream stream, Comm& comm, matrix_view<S> received,
                                  const Transport& transport) {
  detail::symmetric::end_rows(stream, comm, received, transport);
  return received;
}

/// Brings the outputs of experts home and adds them up, in the order of `combine_rows` of `symmetric.cuh`, whose
/// parameters these are.
/// @param stream    Where the work is enqueued.
/// @param comm      R ranks.
/// @param handle    From `exchange_routing`, of top_k <= 32.
/// @param weights   Whether expert rows are multiplied by their routing weights; not used for summed rows.
/// @param source    What `rows` are.
/// @param rows      See `combine_source`.
/// @param returned  `[R * max_tokens, d]` in the window, packed: scratch that peers write.
/// @param plus      `[T, d]` added in the end; without data nothing is added.
/// @param y         `[T, d]`, overwritten.
/// @param transport The same on all ranks.
/// @param outgoing  `[outgoing_rows(transport, bounds), d]`, packed: scratch of this rank for expert rows that copy
/// engines bring home.
/// @throws invalid_argument if shapes or memory do not fit, or the communicator has too few streams of copies.
template <peer_communicator Comm, class A, class S, class Out, transport_policy Transport>
void combine_rows(device_stream stream, Comm& comm, const dispatch_handle<A>& handle, combine_weights weights,
                  combine_source source, matrix_view<const S> rows, matrix_view<S> returned, matrix_view<const S> plus,
                  matrix_view<Out> y, const Transport& transport, matrix_view<S> outgoing = {}) {
  if constexpr (std::is_same_v<Transport, transport::automatic>) {
    detail::symmetric::with_policy(transport.combine(), transport, [&](const auto& policy) {
      combine_rows(stream, comm, handle, weights, source, rows, returned, plus, y, policy, outgoing);
    });
  } else if constexpr (std::is_same_v<Transport, transport::copy_engines>) {
    using namespace detail::symmetric;
    const bool summed = source == combine_source::summed_rows;
    const std::int64_t max_tokens = expect_combine(comm, handle, summed, rows, returned, plus, y);
    expect_copy_streams(comm, transport.streams, transport.streams);
    TESSERA_EXPECTS(
        transport.chunks >= 1 && transport.chunks <= comm::max_symmetric_chunks,
        "transport::copy_engines of " << transport.chunks << " chunks, expected 1 to " << comm::max_symmetric_chunks);
    const std::int64_t away = (comm.size() - 1) * max_tokens;
    if (!summed && away > 0) {
      expect_matrix(outgoing, -1, y.cols, "outgoing");
      expect_bulk_rows(outgoing, "outgoing");
      TESSERA_EXPECTS(outgoing.rows >= away && outgoing.stride == outgoing.cols,
                      "outgoing has " << outgoing.rows << " rows, " << outgoing.stride << " elements apart: expected "
                                      << away << " packed rows, see outgoing_rows");
    }
    sum_rows_task<S, A, Out> task{};
    task.view = comm.view(comm::symmetric_channel::sums);
    task.rows = rows;
    task.expert_row_of = handle.expert_row_of;
    task.weights = weights == combine_weights::routing ? handle.pair_weights : nullptr;
    task.top_k = handle.top_k;
    task.summed = summed;
    task.max_tokens = max_tokens;
    task.returned = returned.data;
    task.destinations = handle.destinations;
    task.plus = plus;
    task.y = y;
    sum_and_copy(stream, comm, transport.streams, transport.chunks, task, returned.data, outgoing);
  } else {
    combine_rows(stream, comm, handle, weights, source, rows, returned, plus, y);
  }
}

TESSERA_NAMESPACE_END
