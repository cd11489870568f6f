// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// One rank's side of a dispatch with all of its memory, for tests and benches.

#include <vector>

#include <tessera/dispatch/dispatch.hpp>

namespace tessera_test {

template <class Layout, class S, class A, class Combine>
struct dispatch_rank {
  dispatch_rank(const Layout& placement_, int rank, int top_k, std::int64_t max_tokens, std::int64_t hidden_,
                tessera::dispatch_options options_)
      : placement(placement_), hidden(hidden_), options(options_) {
    bounds = tessera::dispatch_bounds::make(placement.num_ranks(), placement.num_experts(), placement.num_slots(rank),
                                            top_k, max_tokens, options);
    tessera::memory_builder counting;
    carve(counting);
    memory = tessera::host_buffer(counting.bytes());
    tessera::memory_builder carving(tessera::workspace_memory(memory), "the fixture's memory");
    carve(carving);
  }

  void carve(tessera::memory_builder& b) {
    handle = tessera::dispatch_handle<A>::layout(b, bounds);
    plan = tessera::routing_exchange_workspace<A>::layout(b, bounds, options);
    rows = tessera::dispatch_workspace<S>::layout(b, bounds, hidden);
    sums = tessera::combine_workspace<S, A>::layout(b, bounds, hidden, Combine{});
    values = tessera::pair_values_workspace<A>::layout(b, bounds);
    received = {b.template take<S>("received", bounds.max_received_rows() * hidden), bounds.max_received_rows(),
                hidden};
  }

  template <class Comm>
  void exchange(Comm& comm, const tessera::routing<A>& chosen) {
    tessera::exchange_routing({}, comm, placement, bounds, options, chosen, handle, plan);
  }

  // Rows that arrive, one per (token, rank).
  template <class Comm>
  tessera::matrix_view<const S> dispatch(Comm& comm, tessera::matrix_view<const S> x) {
    tessera::dispatch_begin({}, comm, handle, x, received, rows);
    return tessera::dispatch_end({}, comm, handle, x, received, rows);
  }

  // The same, one row per pair, sorted by expert.
  template <class Comm>
  std::vector<S> dispatch_pairs(Comm& comm, tessera::matrix_view<const S> x) {
    const tessera::matrix_view<const S> arrived = dispatch(comm, x);
    std::vector<S> pairs(static_cast<std::size_t>(handle.total->received_pairs * hidden));
    tessera::permute(tessera::host_stream{}, arrived, handle.rows(), pair_view(pairs));
    return pairs;
  }

  template <class Comm>
  std::vector<S> combine(Comm& comm, const std::vector<S>& pairs, tessera::combine_weights weights,
                         const tessera::routing<A>& chosen) {
    std::vector<S> y(static_cast<std::size_t>(chosen.expert_ids.rows * hidden));
    const tessera::matrix_view<const S> from{pairs.data(), handle.total->received_pairs, hidden};
    tessera::combine_begin<Combine>({}, comm, handle, weights, from, sums);
    tessera::combine_end<Combine>({}, comm, handle, weights, from, tessera::matrix_view<const A>(chosen.weights),
                                  tessera::matrix_view<S>{y.data(), chosen.expert_ids.rows, hidden}, sums);
    return y;
  }

  tessera::matrix_view<S> pair_view(std::vector<S>& pairs) const {
    return {pairs.data(), handle.total->received_pairs, hidden};
  }

  Layout placement;
  std::int64_t hidden;
  tessera::dispatch_options options;
  tessera::dispatch_bounds bounds;
  tessera::host_buffer memory;
  tessera::dispatch_handle<A> handle;
  tessera::routing_exchange_workspace<A> plan;
  tessera::dispatch_workspace<S> rows;
  tessera::combine_workspace<S, A> sums;
  tessera::pair_values_workspace<A> values;
  tessera::matrix_view<S> received;
};

}  // namespace tessera_test
