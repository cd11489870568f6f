// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <tessera/comm/self.hpp>
#include <tessera/core/chunks.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/dispatch/capacity.hpp>
#include <tessera/dispatch/dispatch.hpp>
#include <tessera/dispatch/host_sized.hpp>
#include <tessera/dispatch/symmetric.hpp>
#include <tessera/experts/experts.hpp>
#include <tessera/moe/detail/gate_splits.hpp>
#include <tessera/moe/saved_rows.hpp>
#include <tessera/moe/shape.hpp>
#include <tessera/router/lists.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// Whether rows between GPUs go by sends and receives of the communicator, sized on the host.
template <class Comm>
bool goes_by_host(const dispatch_options& chosen) {
  constexpr bool travels =
      std::is_same_v<typename Comm::space, space::device> && !std::is_same_v<Comm, comm::self<space::device>>;
  return travels && (!peer_communicator<Comm> || chosen.host_sized);
}

// Everything that sizes memory: made from the same values by `sizes` and by every call.
template <class Layer>
struct layer_plan {
  using experts_type = typename Layer::experts_type;
  using shared_type = typename Layer::shared_type;

  layer_plan(const shape& s, const typename Layer::layout_type& placement, int rank,
             const typename Layer::options& chosen)
      : sizes(s),
        chunk_tokens(chosen.chunk_tokens),
        resends(chosen.rows == saved_rows::resend),
        dispatch(chosen.dispatch),
        transport(chosen.transport),
        bounds(dispatch_bounds::make(placement.num_ranks(), s.num_experts, placement.num_slots(rank), s.top_k,
                                     s.max_tokens, chosen.dispatch)),
        experts({placement.num_slots(rank), s.hidden, s.intermediate, s.expert_bias}, chosen.activation),
        // Without shared experts the container is made all the same (width 1) and never used.
        shared(shared_expert_dims(s.hidden, s.num_shared_experts == 0 ? 1 : s.intermediate,
                                  s.num_shared_experts == 0 ? 1 : s.num_shared_experts, s.expert_bias),
               chosen.activation),
        max_chunks(num_chunks(s.max_tokens, chosen.chunk_tokens)) {}
  explicit layer_plan(const Layer& owner)
      : layer_plan(owner.dims(), owner.placement(), owner.comm().rank(), owner.get_options()) {}

  bool has_shared() const { return Layer::may_have_shared && sizes.num_shared_experts > 0; }
  // Whether the host waits for the counts of what travels.
  bool host_sized() const { return goes_by_host<typename Layer::communicator_type>(dispatch); }
  host_grid grid() const { return host_grid::make(bounds.num_ranks, dispatch.ranks_per_host); }
  std::int64_t row_bytes() const {
    return host_sized_buffers::row_bytes<typename Layer::storage, typename Layer::accumulate>(sizes.hidden,
                                                                                              sizes.top_k);
  }
  bool alone() const { return bounds.num_ranks == 1; }
  // Rows that have room for what arrives from all ranks: packed in host memory, by token in device memory.
  std::int64_t received_rows() const {
    if (on_device) return travels ? bounds.addressed_rows() : 0;
    return alone() ? 0 : bounds.max_received_rows();
  }
  // Elements of such rows.
  std::int64_t received_elements() const { return received_rows() * sizes.hidden; }
  // Rows that copy engines bring home, on their way to other ranks.
  std::int64_t rows_outgoing() const { return travels ? outgoing_rows(transport, bounds) : 0; }
  gate_splits gate_gradient_splits() const {
    return gate_splits::make(sizes.max_tokens, chunk_tokens, sizes.num_experts, sizes.hidden);
  }

  shape sizes;
  std::int64_t chunk_tokens;
  bool resends;
  dispatch_options dispatch;
  tessera::transport::automatic transport;
  dispatch_bounds bounds;
  experts_type experts;
  shared_type shared;
  std::int64_t max_chunks;

  static constexpr bool on_device = std::is_same_v<typename Layer::space, space::device>;
  static constexpr bool on_host = !on_device;
  // Whether rows leave the device's memory; a communicator of GPUs sends them even if it has one.
  static constexpr bool travels =
      on_device && !std::is_same_v<typename Layer::communicator_type, comm::self<space::device>>;
  static constexpr weight_on weights_on = Layer::router_type::weights_on_input ? weight_on::input : weight_on::output;
};

template <class Layer>
struct layer_saved {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;

  A* logits;                  // [T, E]
  std::int32_t* expert_ids;   // [T, K]
  A* weights;                 // [T, K]
  std::int64_t* counts;       // [E + 2] of all ranks
  dispatch_handle<A> handle;  //
  host_sized_lists lists;     // of what is sized on the host
  S* received;                // [received rows, d]; null at one rank and where x is sent again
  typename Layer::experts_type::saved_view experts;
  typename Layer::shared_type::saved_view shared;

  // What other ranks write comes first, here and below: its place may not depend on what differs between ranks.
  layer_saved(memory_builder& b, const layer_plan<Layer>& plan) {
    const shape& s = plan.sizes;
    received = b.take<S>("received rows", plan.resends ? 0 : plan.received_elements());
    logits = b.take<A>("logits", s.max_tokens * s.num_experts);
    expert_ids = b.take<std::int32_t>("expert ids", s.max_tokens * s.top_k);
    weights = b.take<A>("routing weights", s.max_tokens * s.top_k);
    counts = b.take<std::int64_t>("global counts", balance_counts::size(s.num_experts));
    handle = plan.on_device ? dispatch_handle<A>::layout_device(b, plan.bounds, plan.travels)
                            : dispatch_handle<A>::layout(b, plan.bounds);
    if (plan.host_sized())
      lists = host_sized_lists::layout(b, plan.bounds, plan.grid(), typename Layer::combine_type{});
    experts = plan.experts.carve_saved(b, plan.bounds.max_pairs);
    if (plan.has_shared()) shared = plan.shared.carve_saved(b, s.max_tokens);
  }

  routing<A> chosen(std::int64_t num_tokens, const shape& s) const {
    return {{expert_ids, num_tokens, s.top_k}, {weights, num_tokens, s.top_k}};
  }
};

// What other ranks write during forward, which comes first in the workspace. Sized on the host, it is scratch.
template <class Layer>
struct layer_forward_window {
  typename Layer::storage* received;                  // [received rows, d] where x is sent again
  routing_tables<typename Layer::accumulate> tables;  // null on the host, as is the next
  returned_rows<typename Layer::storage> returned;
  host_sized_tables<typename Layer::accumulate> gathered;  // null but sized on the host, as is the next
  host_sized_buffers buffers;

  layer_forward_window(memory_builder& b, const layer_plan<Layer>& p) {
    received = b.take<typename Layer::storage>("received rows", p.resends ? p.received_elements() : 0);
    if (!p.travels) return;
    if (p.host_sized()) {
      gathered = host_sized_tables<typename Layer::accumulate>::layout(b, p.bounds, p.grid(), {},
                                                                       typename Layer::combine_type{});
      buffers = host_sized_buffers::layout(b, p.bounds, p.grid(), p.row_bytes(), typename Layer::combine_type{});
      return;
    }
    tables = routing_tables<typename Layer::accumulate>::layout(b, p.bounds);
    returned =
        decltype(returned)::layout(b, p.bounds, p.sizes.hidden, typename Layer::combine_type{}, p.rows_outgoing());
  }
};

template <class Layer>
struct layer_forward_scratch {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;

  std::int64_t* counts;                // [E + 2] of this rank
  routing_exchange_workspace<A> plan;  // on the host, as are the next packed rows and sums
  std::uint8_t* block_counts;          // of the router's kernels; null on the host
  capacity_workspace<A> capacity;      // between GPUs
  S* gate_parts;                       // [3, E, d]; null on the host
  dispatch_workspace<S> rows;
  S* pairs;  // [max pairs, d] outputs of experts
  typename Layer::experts_type::forward_scratch experts;
  combine_workspace<S, A> sums;
  A* routed;                    // [T, d]; null without shared experts and on a device
  S* shared_out;                // [T, d]; null without shared experts
  std::int32_t* token_offsets;  // [2]
  typename Layer::shared_type::forward_scratch shared;

  layer_forward_scratch(memory_builder& b, const layer_plan<Layer>& p) {
    const shape& s = p.sizes;
    counts = b.take<std::int64_t>("local counts", balance_counts::size(s.num_experts));
    if (p.on_host) plan = routing_exchange_workspace<A>::layout(b, p.bounds, p.dispatch);
    block_counts =
        b.take<std::uint8_t>("counts of blocks", p.on_device ? router_workspace::block_count_bytes(s.num_experts) : 0);
    if (p.travels) capacity = capacity_workspace<A>::layout(b, p.bounds, p.dispatch);
    gate_parts = b.take<S>("parts of the gate", p.on_device ? std::int64_t{3} * s.num_experts * s.hidden : 0);
    if (p.on_host) rows = dispatch_workspace<S>::layout(b, p.bounds, s.hidden);
    pairs = b.take<S>("expert outputs", p.bounds.max_pairs * s.hidden);
    experts = p.experts.carve_forward(b, p.bounds.max_pairs, p.weights_on);
    if (p.on_host) sums = combine_workspace<S, A>::layout(b, p.bounds, s.hidden, typename Layer::combine_type{});
    routed = b.take<A>("routed sums", p.on_host && p.has_shared() ? s.max_tokens * s.hidden : 0);
    shared_out = b.take<S>("shared outputs", p.has_shared() ? s.max_tokens * s.hidden : 0);
    token_offsets = b.take<std::int32_t>("token offsets", 2);
    if (p.has_shared()) shared = p.shared.carve_forward(b, s.max_tokens, weight_on::output);
  }
};

template <class Layer>
struct layer_deferred {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;

  A* dlogits;                        // [T, E]
  S* dlogit_parts;                   // [T, 3 E]; null on the host, as are the next two
  std::int32_t* gate_split_offsets;  // [chunks * splits + 1]
  A* gate_partial;                   // [chunks * splits, 2 E, d]
  S* dy_received;                    // [received rows, d]; null at one rank
  S* x_received;                     // [received rows, d] where x is sent again
  std::int32_t* chunk_offsets;       // [chunks + 1]
  typename Layer::experts_type::deferred_view experts;
  typename Layer::experts_type::backward_weights_scratch experts_scratch;
  typename Layer::shared_type::deferred_view shared;
  typename Layer::shared_type::backward_weights_scratch shared_scratch;

  layer_deferred(memory_builder& b, const layer_plan<Layer>& p) {
    const shape& s = p.sizes;
    dy_received = b.take<S>("received gradients", p.received_elements());
    x_received = b.take<S>("received rows", p.resends ? p.received_elements() : 0);
    dlogits = b.take<A>("logit gradients", s.max_tokens * s.num_experts);
    const std::int64_t splits = p.on_device ? p.max_chunks * p.gate_gradient_splits().per_chunk : 0;
    dlogit_parts = b.take<S>("parts of logit gradients", p.on_device ? s.max_tokens * 3 * s.num_experts : 0);
    gate_split_offsets = b.take<std::int32_t>("gate split offsets", splits == 0 ? 0 : splits + 1);
    gate_partial = b.take<A>("gate gradients of splits", splits * 2 * s.num_experts * s.hidden);
    chunk_offsets = b.take<std::int32_t>("chunk offsets", p.max_chunks + 1);
    experts = p.experts.carve_deferred(b, p.bounds.max_pairs);
    experts_scratch = p.experts.carve_backward_weights(b, p.bounds.max_pairs, p.weights_on);
    if (!p.has_shared()) return;
    shared = p.shared.carve_deferred(b, s.max_tokens);
    shared_scratch = p.shared.carve_backward_weights(b, s.max_tokens, weight_on::output);
  }
};

// A container may need less on a device, and say so by a template parameter.
template <class Space, class Experts>
typename Experts::backward_input_scratch carve_backward_input(const Experts& experts, memory_builder& b,
                                                              std::int64_t max_pairs, weight_on applied) {
  if constexpr (requires { experts.template carve_backward_input<Space>(b, max_pairs, applied); })
    return experts.template carve_backward_input<Space>(b, max_pairs, applied);
  else
    return experts.carve_backward_input(b, max_pairs, applied);
}

template <class Layer>
struct layer_backward_scratch {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;

  returned_rows<S> returned;   // on a device; nothing at one rank, and sized on the host
  host_sized_buffers buffers;  // null but sized on the host
  A* dweights;                 // [T, K]
  dispatch_workspace<S> rows;  // on the host, as are the next packed values and sums
  S* dpairs;                   // [max pairs, d]
  A* dpair_weights;            // [max pairs]
  pair_values_workspace<A> values;
  typename Layer::experts_type::backward_input_scratch experts;
  combine_workspace<S, A> sums;
  A* routed;                    // [T, d]; null on a device, as is the next
  A* gate;                      // [T, d]
  S* gate_parts;                // [3, E, d]; null on the host
  S* shared_dx;                 // [T, d]; null without shared experts
  std::int32_t* token_offsets;  // [2]
  typename Layer::shared_type::backward_input_scratch shared;

  layer_backward_scratch(memory_builder& b, const layer_plan<Layer>& p) {
    const shape& s = p.sizes;
    if (p.host_sized()) {
      buffers = host_sized_buffers::layout(b, p.bounds, p.grid(), p.row_bytes(), typename Layer::combine_type{});
    } else if (p.travels) {
      returned = returned_rows<S>::layout(b, p.bounds, s.hidden, typename Layer::combine_type{}, p.rows_outgoing());
    }
    dweights = b.take<A>("weight gradients", s.max_tokens * s.top_k);
    if (p.on_host) rows = dispatch_workspace<S>::layout(b, p.bounds, s.hidden);
    dpairs = b.take<S>("pair gradients", p.bounds.max_pairs * s.hidden);
    dpair_weights = b.take<A>("weight gradients of expert rows", p.bounds.max_pairs);
    if (p.on_host) values = pair_values_workspace<A>::layout(b, p.bounds);
    experts = carve_backward_input<typename Layer::space>(p.experts, b, p.bounds.max_pairs, p.weights_on);
    if (p.on_host) sums = combine_workspace<S, A>::layout(b, p.bounds, s.hidden, typename Layer::combine_type{});
    routed = b.take<A>("routed gradients", p.on_device ? 0 : s.max_tokens * s.hidden);
    gate = b.take<A>("gate's input gradients", p.on_device ? 0 : s.max_tokens * s.hidden);
    gate_parts = b.take<S>("parts of the gate", p.on_device ? std::int64_t{3} * s.num_experts * s.hidden : 0);
    shared_dx = b.take<S>("shared gradients", p.has_shared() ? s.max_tokens * s.hidden : 0);
    token_offsets = b.take<std::int32_t>("token offsets", 2);
    if (p.has_shared())
      shared = carve_backward_input<typename Layer::space>(p.shared, b, s.max_tokens, weight_on::output);
  }
};

// What the router reads. @param in Of the layer.
template <class Layer>
router_inputs<typename Layer::accumulate> router_view(const layer_saved<Layer>& saved, const Layer& layer,
                                                      const typename Layer::inputs& in) {
  const shape& s = layer.dims();
  return {.logits = {saved.logits, in.x.rows, s.num_experts},
          .bias = layer.state().bias,
          .token_ids = in.token_ids,
          .expert_ids = in.expert_ids,
          .sequence_offsets = in.sequence_offsets};
}

// The rows that other ranks sent, during forward and behind it; null at one rank.
template <class Layer>
typename Layer::storage* rows_of(const layer_plan<Layer>& plan, const layer_saved<Layer>& saved,
                                 const layer_forward_window<Layer>& window) {
  return plan.resends ? window.received : saved.received;
}
template <class Layer>
typename Layer::storage* rows_of(const layer_plan<Layer>& plan, const layer_saved<Layer>& saved,
                                 const layer_deferred<Layer>& deferred) {
  return plan.resends ? deferred.x_received : saved.received;
}

// Bytes of slice sets one after another. @tparam Slices Of the above.
template <class... Slices, class Layer>
std::size_t bytes_of(const layer_plan<Layer>& plan) {
  memory_builder counting;
  (static_cast<void>(Slices(counting, plan)), ...);
  return counting.bytes();
}

}  // namespace detail

TESSERA_NAMESPACE_END
