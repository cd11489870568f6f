// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// From routing to who sends what to whom: the first stage of a dispatch.

#include <cstdint>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/detail/routing_exchange.hpp>
#include <tessera/dispatch/handle.hpp>
#include <tessera/layout/expert_layout.hpp>
#include <tessera/router/routing.hpp>

TESSERA_NAMESPACE_BEGIN

/// Scratch of `exchange_routing`.
template <class A>
using routing_exchange_workspace = detail::routing_exchange_scratch<A>;

/// Tells every owner which rows it will receive, for which of its experts and with which weights, and builds the gather
/// lists.
///
/// A collective of `comm`. Where an expert has replicas, token t uses replica `t mod num_replicas`.
/// Exchanges two things: `2R + 2` counts by all-gather, then per sent row its number of pairs, per pair its expert slot
/// and weight.
/// @param stream    Host: returns when done.
/// @param comm      R ranks.
/// @param layout    Where the experts are.
/// @param bounds    Sizes `handle` and `workspace` were laid out with.
/// @param options   Capacity and overflow.
/// @param chosen    `[T, K]` ids and weights; ids in `[-1, E)`, -1 marks a slot without expert. Not changed: pairs that
///                  are dropped are marked in `handle.pair_slots`.
/// @param handle    Written.
/// @param workspace Scratch.
/// @throws invalid_argument if an id is out of range or T exceeds `bounds.max_tokens` (before anything is sent).
/// @throws error on every rank, with the same text, if a rank's bound would be exceeded and the policy is
/// `overflow_policy::error`.
template <class Comm, class Layout, class A>
void exchange_routing(host_stream stream, Comm& comm, const Layout& layout, const dispatch_bounds& bounds,
                      const dispatch_options& options, const routing<A>& chosen, const dispatch_handle<A>& handle,
                      const routing_exchange_workspace<A>& workspace) {
  detail::find_destinations(layout, bounds, comm.rank(), chosen, workspace);
  handle.total->num_tokens = chosen.expert_ids.rows;
  handle.total->capacity_drops =
      options.has_capacity() ? detail::drop_over_capacity(bounds, options, chosen, workspace) : 0;
  handle.total->overflow_drops = 0;

  detail::count_destinations(bounds, chosen, workspace);
  comm.all_gather(stream, workspace.own_counts, workspace.counts, workspace.counts_per_rank(bounds));
  if (detail::receiver_overflows(bounds, options, workspace)) {
    handle.total->overflow_drops = detail::drop_over_bound(bounds, comm.rank(), chosen, workspace);
    detail::count_destinations(bounds, chosen, workspace);
    comm.all_gather(stream, workspace.own_counts, workspace.counts, workspace.counts_per_rank(bounds));
  }

  detail::set_offsets(bounds, comm.rank(), handle, workspace);
  detail::fill_messages(bounds, chosen, handle, workspace);
  detail::exchange_messages(stream, comm, handle, workspace);
  detail::build_lists(bounds, handle, workspace);
}

TESSERA_NAMESPACE_END
