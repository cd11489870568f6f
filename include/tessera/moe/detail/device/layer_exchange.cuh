// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include <tessera/comm/self.cuh>
#include <tessera/dispatch/dispatch.cuh>
#include <tessera/dispatch/symmetric.cuh>
#include <tessera/moe/detail/device/state_kernels.cuh>
#include <tessera/moe/detail/layer_memory.hpp>
#include <tessera/router/router.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// What a device layer does with its communicator: alone, or between GPUs.

template <class Layer>
inline constexpr bool layer_is_alone = std::is_same_v<typename Layer::communicator_type, comm::self<space::device>>;

// What a layer between GPUs refuses before anything is enqueued that other ranks would wait for.
template <class Layer, class... Rows>
void check_exchange(const Layer& layer, std::initializer_list<const std::byte*> memories, const Rows&... rows) {
  if constexpr (!layer_is_alone<Layer>) {
    for (const std::byte* memory : memories) {
      TESSERA_EXPECTS(
          memory == nullptr || layer.comm().contains(memory),
          "moe_layer: saved, deferred and workspace memory between GPUs is memory of the communicator: take "
          "it from comm::symmetric::allocate");
    }
    (symmetric::expect_bulk_rows(rows, "moe_layer: tokens and gradients between GPUs"), ...);
  }
}

// The steps of one layer's call. `Layer` gives types, `plan` the sizes; every step enqueues on `stream`.
template <class Layer, bool Alone = layer_is_alone<Layer>>
class layer_exchange;

// One GPU: experts read tokens where they are.
template <class Layer>
class layer_exchange<Layer, true> {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;

  layer_exchange(device_stream stream, const Layer& layer, const layer_plan<Layer>& plan)
      : stream_(stream), layer_(layer), plan_(plan) {}

  // Chooses experts and makes the lists. @return counts of this rank.
  template <class Inputs>
  const std::int64_t* route(const Inputs& in, const routing<A>& chosen, bool counting, const layer_saved<Layer>& saved,
                            const layer_forward_window<Layer>&, const layer_forward_scratch<Layer>& scratch) const {
    const int num_experts = layer_.dims().num_experts;
    const auto& state = layer_.state();
    const balance_counts counts = counting ? balance_counts(saved.counts, num_experts) : balance_counts{};
    const router_workspace sort{state.barrier, scratch.block_counts};
    set_totals(stream_, saved.handle.total, chosen.expert_ids.rows);
    if (plan_.dispatch.capacity_factor > 0 || plan_.bounds.max_pairs < plan_.bounds.max_sent_pairs()) {
      choose(in, chosen, counts);
      exchange_routing(stream_, layer_.comm(), layer_.placement(), plan_.bounds, plan_.dispatch, chosen, saved.handle,
                       sort, state.status);
    } else {
      const router_lists<A> lists{saved.handle.expert_offsets, saved.handle.gather, saved.handle.expert_row_of,
                                  saved.handle.pair_weights};
      route_sorted(stream_, layer_.get_router(), in, chosen, counts, lists, sort, state.status);
    }
    return saved.counts;
  }

  const comm::symmetric_failure* failure() const { return nullptr; }

  // Without lists, which a capacity and a bound change.
  template <class Inputs>
  void choose(const Inputs& in, const routing<A>& chosen, const balance_counts& counts) const {
    route_on_device(stream_, layer_.get_router(), in, chosen, counts, nullptr, router_workspace{},
                    layer_.state().status);
  }

  void send_rows(const layer_saved<Layer>&, matrix_view<const S>, S*) const {}
  matrix_view<const S> await_rows(matrix_view<const S> rows, S*) const { return rows; }
  matrix_view<const S> arrived(matrix_view<const S> rows, S*) const { return rows; }

  // y = sums of the tokens' expert rows, and `plus`.
  void combine(const layer_saved<Layer>& saved, matrix_view<const A> weights, bool weighted, matrix_view<const S> pairs,
               S* /*returned*/, matrix_view<const S> plus, matrix_view<S> y) const {
    if (!weighted) weights.data = nullptr;
    combine_rows(stream_, pairs, saved.handle.expert_row_of, weights, plus, y);
  }

  void values_home(const layer_saved<Layer>& saved, const A* values, matrix_view<A> home) const {
    return_pair_values(stream_, layer_.comm(), saved.handle, values, home, pair_values_workspace<A>{});
  }

 private:
  device_stream stream_;
  const Layer& layer_;
  const layer_plan<Layer>& plan_;
};

// Several GPUs that reach each other's memory.
template <class Layer>
class layer_exchange<Layer, false> {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  static_assert(peer_communicator<typename Layer::communicator_type>,
                "moe_layer: the device half needs a communicator that it can dispatch over. Models: "
                "comm::self<space::device>, comm::symmetric");
  static_assert(std::is_same_v<typename Layer::combine_type, combine::reduced>,
                "moe_layer: between GPUs rows are added with combine::reduced");

  layer_exchange(device_stream stream, const Layer& layer, const layer_plan<Layer>& plan)
      : stream_(stream), layer_(layer), plan_(plan) {}

  template <class Inputs>
  const std::int64_t* route(const Inputs& in, const routing<A>& chosen, bool counting, const layer_saved<Layer>& saved,
                            const layer_forward_window<Layer>& window,
                            const layer_forward_scratch<Layer>& scratch) const {
    const int num_experts = layer_.dims().num_experts;
    const balance_counts counts = counting ? balance_counts(scratch.counts, num_experts) : balance_counts{};
    route_on_device(stream_, layer_.get_router(), in, chosen, counts, nullptr, router_workspace{},
                    layer_.state().status);
    exchange_routing_begin(
        stream_, layer_.comm(), layer_.placement(), plan_.bounds, plan_.dispatch, chosen, saved.handle,
        symmetric_routing_workspace<A>{window.tables, {layer_.state().barrier, scratch.block_counts}}, counts,
        counting && Layer::num_losses > 0 ? balance_counts(saved.counts, num_experts) : balance_counts{});
    return scratch.counts;
  }
  // After a failure nothing is counted.
  const comm::symmetric_failure* failure() const { return layer_.comm().view(comm::symmetric_channel::tables).failure; }

  void send_rows(const layer_saved<Layer>& saved, matrix_view<const S> rows, S* received) const {
    dispatch_begin(stream_, layer_.comm(), saved.handle, rows, view(received));
  }
  matrix_view<const S> await_rows(matrix_view<const S>, S* received) const {
    return dispatch_end(stream_, layer_.comm(), view(received));
  }
  matrix_view<const S> arrived(matrix_view<const S>, S* received) const { return view(received); }

  void combine(const layer_saved<Layer>& saved, matrix_view<const A>, bool weighted, matrix_view<const S> pairs,
               S* returned, matrix_view<const S> plus, matrix_view<S> y) const {
    combine_rows(stream_, layer_.comm(), saved.handle, weighted ? combine_weights::routing : combine_weights::none,
                 combine_source::expert_rows, pairs, view(returned), layer_.dims().top_k, plus, y);
  }

  void values_home(const layer_saved<Layer>& saved, const A* values, matrix_view<A> home) const {
    return_pair_values(stream_, layer_.comm(), saved.handle, values,
                       matrix_view<A>{home.data, plan_.bounds.max_tokens, home.cols});
  }

 private:
  matrix_view<S> view(S* rows) const { return {rows, plan_.bounds.addressed_rows(), layer_.dims().hidden}; }

  device_stream stream_;
  const Layer& layer_;
  const layer_plan<Layer>& plan_;
};

// Waits for the lists of the routing, which experts need.
template <class Layer>
void await_lists(device_stream stream, const Layer& layer) {
  if constexpr (!layer_is_alone<Layer>) exchange_routing_end(stream, layer.comm());
}

}  // namespace detail

TESSERA_NAMESPACE_END
