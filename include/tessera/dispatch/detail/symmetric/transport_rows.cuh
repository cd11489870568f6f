// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/symmetric/copy_rows.cuh>
#include <tessera/dispatch/detail/symmetric/launch_send.cuh>
#include <tessera/dispatch/detail/symmetric/operands.cuh>
#include <tessera/dispatch/transport.hpp>

// Rows on their way to the owners of experts, over a transport.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

// Calls `f` with the policy that `chosen` is at run time, for its dispatch or its combine.
template <class F>
decltype(auto) with_policy(transport_kind kind, const transport::automatic& chosen, F&& f) {
  switch (kind) {
    case transport_kind::all_gather:
      return f(transport::all_gather{});
    case transport_kind::copy_engines:
      return f(chosen.copies());
    case transport_kind::all_to_all:
      break;
  }
  return f(chosen.sends());
}

// @param destinations Null: every rank.
template <class Comm, class S, class Transport>
void begin_rows(device_stream stream, Comm& comm, const std::uint32_t* destinations, matrix_view<const S> x,
                matrix_view<S> received, const Transport& transport) {
  if constexpr (std::is_same_v<Transport, transport::automatic>) {
    with_policy(transport.dispatch(), transport,
                [&](const auto& policy) { begin_rows(stream, comm, destinations, x, received, policy); });
  } else {
    expect_dispatch(comm, x, received);
    if constexpr (std::is_same_v<Transport, transport::copy_engines>) {
      expect_copy_streams(comm, transport.streams, transport.streams + 1);
      copy_to_all(stream, comm, rows_view(comm), transport.streams, x, received);
    } else if constexpr (std::is_same_v<Transport, transport::all_gather>) {
      launch_send(stream, comm, static_cast<const std::uint32_t*>(nullptr), true, x, received);
    } else {
      TESSERA_EXPECTS(destinations != nullptr,
                      "transport::all_to_all needs a handle with destinations: exchange_routing makes them");
      if (transport.copies_own_rows) {
        expect_copy_streams(comm, 1, 1);
        copy_own_rows(stream, comm, comm.copy_stream(0), x, received);
      }
      launch_send(stream, comm, destinations, !transport.copies_own_rows, x, received);
    }
  }
}

// Lets the stream wait for the rows of a dispatch that has begun, and for its own copies.
template <class Comm, class S, class Transport>
void end_rows(device_stream stream, Comm& comm, const matrix_view<S>& received, const Transport& transport) {
  if constexpr (std::is_same_v<Transport, transport::automatic>) {
    with_policy(transport.dispatch(), transport, [&](const auto& policy) { end_rows(stream, comm, received, policy); });
  } else if constexpr (std::is_same_v<Transport, transport::copy_engines>) {
    follow(comm, comm.copy_stream(0), stream);
    launch_await(stream, comm.view(comm::symmetric_channel::rows));
  } else {
    if constexpr (std::is_same_v<Transport, transport::all_to_all>) {
      if (transport.copies_own_rows) follow(comm, comm.copy_stream(0), stream);
    }
    end_send(stream, comm, received);
  }
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
