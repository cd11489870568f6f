// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include <tessera/comm/self.cuh>
#include <tessera/dispatch/dispatch.cuh>
#include <tessera/experts/expert_mlp.cuh>
#include <tessera/moe/detail/device/gate_product.cuh>
#include <tessera/moe/detail/device/layer_exchange.cuh>
#include <tessera/moe/detail/device/state_kernels.cuh>
#include <tessera/moe/detail/layer_checks.hpp>
#include <tessera/moe/detail/layer_host.hpp>
#include <tessera/moe/detail/layer_memory.hpp>
#include <tessera/router/router.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// Kernels want an address even for no rows, which an empty batch need not have.
template <class S>
matrix_view<const S> with_address(matrix_view<const S> rows, const void* any) {
  if (rows.rows == 0) rows.data = static_cast<const S*>(any);
  return rows;
}

// Products hand tiles out as blocks ask for them, by counters of the layer's, where the container has a place for them.
template <class State, class Routed, class Shared>
void share_tile_counters(const State& state, Routed& routed, Shared& shared) {
  if constexpr (requires { routed.tile_counter = state.tile_counters; }) routed.tile_counter = state.tile_counters;
  if constexpr (requires { shared.tile_counter = state.tile_counters; }) shared.tile_counter = state.tile_counters + 2;
}

template <class Layer>
expert_rows one_group(device_stream stream, std::int32_t* offsets, std::int64_t num_tokens) {
  fill_chunk_offsets(stream, offsets, num_tokens, 0);
  return {1, offsets, nullptr};
}

template <class Layer>
void layer_forward(device_stream stream, const Layer& layer, pass mode, const typename Layer::inputs& in,
                   const typename Layer::weights& params, matrix_view<typename Layer::storage> y,
                   saved_memory saved_bytes, workspace_memory workspace) {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  const shape& s = layer.dims();
  const auto& state = layer.state();
  const std::int64_t num_tokens = in.x.rows;
  check_forward(layer, in, params, y);
  check_exchange(layer, {saved_bytes.data, workspace.data}, in.x, y);

  const layer_plan<Layer> plan(s, layer.placement(), layer.comm().rank(), layer.get_options());
  memory_builder scratch_builder(workspace, "workspace");
  memory_builder saved_builder(saved_bytes, "saved memory");
  const layer_forward_window<Layer> window(scratch_builder, plan);
  const layer_saved<Layer> saved(mode == pass::eval ? scratch_builder : saved_builder, plan);
  layer_forward_scratch<Layer> scratch(scratch_builder, plan);
  share_tile_counters(state, scratch.experts, scratch.shared);
  const matrix_view<const S> x = with_address(in.x, saved.logits);

  gate_forward(stream, x, matrix_view<const A>(params.gate), params.gate_bias,
               matrix_view<A>{saved.logits, num_tokens, s.num_experts}, scratch.gate_parts, scratch.token_offsets);

  const auto routing_inputs = router_view(saved, layer, in);
  const routing<A> chosen = saved.chosen(num_tokens, s);
  const bool counting = mode != pass::eval;
  const layer_exchange<Layer> exchange(stream, layer, plan);
  const std::int64_t* own_counts = exchange.route(routing_inputs, chosen, counting, saved, window, scratch);
  exchange.send_rows(saved, x, saved.received);

  if (plan.has_shared())
    plan.shared.forward(stream, one_group<Layer>(stream, scratch.token_offsets, num_tokens), x, {}, params.shared,
                        saved.shared, {scratch.shared_out, s.max_tokens, s.hidden}, scratch.shared);
  await_lists(stream, layer);
  const matrix_view<const S> rows = exchange.await_rows(x, saved.received);
  const matrix_view<S> pairs{scratch.pairs, plan.bounds.max_pairs, s.hidden};
  plan.experts.forward(stream, saved.handle.rows(), rows, {saved.handle.pair_weights, plan.weights_on}, params.experts,
                       saved.experts, pairs, scratch.experts);

  matrix_view<const S> plus{};
  if (plan.has_shared()) plus = {scratch.shared_out, num_tokens, s.hidden};
  exchange.combine(saved, matrix_view<const A>(chosen.weights), plan.weights_on == weight_on::output,
                   matrix_view<const S>(pairs), window.returned, plus, y);

  if (!counting) return;
  if constexpr (Layer::num_losses > 0) {
    layer.get_router().losses(
        stream, routing_inputs, const_balance_counts(saved.counts, s.num_experts), state.coefficients,
        plan.chunk_tokens, matrix_view<A>{state.losses, num_chunks(num_tokens, plan.chunk_tokens), Layer::num_losses});
  }
  if (mode == pass::train) count_step(stream, state, own_counts, saved.handle, exchange.failure());
}

template <class Layer>
void layer_backward_input(device_stream stream, const Layer& layer, const typename Layer::inputs& in,
                          matrix_view<const typename Layer::storage> dy, const typename Layer::weights& params,
                          saved_memory saved_bytes, matrix_view<typename Layer::storage> dx,
                          deferred_memory deferred_bytes, workspace_memory workspace) {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  const shape& s = layer.dims();
  const std::int64_t num_tokens = in.x.rows;
  check_backward_input(layer, in, dy, params, dx);
  check_exchange(layer, {saved_bytes.data, deferred_bytes.data, workspace.data}, in.x, dy, dx);

  const layer_plan<Layer> plan(s, layer.placement(), layer.comm().rank(), layer.get_options());
  memory_builder saved_builder(saved_bytes, "saved memory");
  memory_builder deferred_builder(deferred_bytes, "deferred memory");
  memory_builder scratch_builder(workspace, "workspace");
  const layer_saved<Layer> saved(saved_builder, plan);
  const layer_deferred<Layer> deferred(deferred_builder, plan);
  layer_backward_scratch<Layer> scratch(scratch_builder, plan);
  share_tile_counters(layer.state(), scratch.experts, scratch.shared);
  const matrix_view<const S> x = with_address(in.x, saved.logits);
  const matrix_view<const S> dy_rows = with_address(dy, saved.logits);

  const layer_exchange<Layer> exchange(stream, layer, plan);
  exchange.send_rows(saved, dy_rows, deferred.dy_received);
  if (plan.has_shared())
    plan.shared.backward_input(stream, one_group<Layer>(stream, scratch.token_offsets, num_tokens), x, dy_rows, {},
                               params.shared, saved.shared, deferred.shared,
                               {scratch.shared_dx, s.max_tokens, s.hidden}, nullptr, scratch.shared);
  const matrix_view<S> dpairs{scratch.dpairs, plan.bounds.max_pairs, s.hidden};
  const matrix_view<const S> arrived_dy = exchange.await_rows(dy_rows, deferred.dy_received);
  plan.experts.backward_input(stream, saved.handle.rows(), exchange.arrived(x, saved.received), arrived_dy,
                              {saved.handle.pair_weights, plan.weights_on}, params.experts, saved.experts,
                              deferred.experts, dpairs, scratch.dpair_weights, scratch.experts);

  const matrix_view<A> dweights{scratch.dweights, num_tokens, s.top_k};
  exchange.values_home(saved, scratch.dpair_weights, dweights);
  const matrix_view<A> dlogits{deferred.dlogits, num_tokens, s.num_experts};
  route_backward(stream, layer.get_router(), router_view(saved, layer, in), saved.chosen(num_tokens, s),
                 matrix_view<const A>(dweights), const_balance_counts(saved.counts, s.num_experts),
                 layer.state().coefficients, layer.state().loss_scale, dlogits);

  // What every token's gradient has beside its experts': the gate's, on top of the shared experts'.
  const matrix_view<S> replicated{scratch.shared_dx, num_tokens, s.hidden};
  gate_backward_input(stream, x, matrix_view<const A>(dlogits), matrix_view<const A>(params.gate), replicated,
                      plan.has_shared() ? write::accumulate : write::overwrite, scratch.gate_parts,
                      deferred.dlogit_parts, scratch.token_offsets);
  exchange.combine(saved, matrix_view<const A>{nullptr, num_tokens, s.top_k}, false, matrix_view<const S>(dpairs),
                   scratch.returned, matrix_view<const S>(replicated), dx);
}

template <class Layer>
void layer_backward_weights(device_stream stream, const Layer& layer, const typename Layer::inputs& in,
                            matrix_view<const typename Layer::storage> dy, saved_memory saved_bytes,
                            deferred_memory deferred_bytes, const typename Layer::gradients& grads, write mode) {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  const shape& s = layer.dims();
  const std::int64_t num_tokens = in.x.rows;
  check_backward_weights(layer, in, dy, grads);

  const layer_plan<Layer> plan(s, layer.placement(), layer.comm().rank(), layer.get_options());
  const std::int64_t chunks = num_chunks(num_tokens, plan.chunk_tokens);
  memory_builder saved_builder(saved_bytes, "saved memory");
  memory_builder deferred_builder(deferred_bytes, "deferred memory");
  const layer_saved<Layer> saved(saved_builder, plan);
  layer_deferred<Layer> deferred(deferred_builder, plan);
  share_tile_counters(layer.state(), deferred.experts_scratch, deferred.shared_scratch);
  const matrix_view<const S> x = with_address(in.x, saved.logits);
  const matrix_view<const S> dy_rows = with_address(dy, saved.logits);

  const layer_exchange<Layer> exchange(stream, layer, plan);
  plan.experts.backward_weights(stream, saved.handle.rows(), exchange.arrived(x, saved.received),
                                exchange.arrived(dy_rows, deferred.dy_received),
                                {saved.handle.pair_weights, plan.weights_on}, saved.experts, deferred.experts,
                                grads.experts, mode, deferred.experts_scratch);
  fill_chunk_offsets(stream, deferred.chunk_offsets, num_tokens, plan.chunk_tokens);
  const expert_rows groups{static_cast<std::int32_t>(chunks), deferred.chunk_offsets, nullptr};
  if (plan.has_shared())
    plan.shared.backward_weights(stream, groups, x, dy_rows, {}, saved.shared, deferred.shared, grads.shared, mode,
                                 deferred.shared_scratch);
  const matrix_view<const A> dlogits{deferred.dlogits, num_tokens, s.num_experts};
  gate_backward_weights(stream, x, dlogits, deferred.dlogit_parts, grads.gate, mode, chunks, plan.chunk_tokens,
                        plan.gate_gradient_splits(), deferred.gate_split_offsets, deferred.gate_partial);
  if (s.gate_bias) sum_columns<A, A>(stream, groups, nullptr, dlogits, grads.gate_bias, mode == write::accumulate);
}

template <class Layer>
void layer_reset_state(device_stream stream, const Layer& layer) {
  initial_state<Layer::num_losses> initial{};
  const auto coefficients = layer.get_router().default_coefficients();
  std::copy(coefficients.begin(), coefficients.end(), initial.coefficients);
  initial.bias_rate = default_bias_rate(layer);
  reset_state(stream, layer.state(), initial);
}

template <class Layer>
void layer_end_step(device_stream stream, const Layer& layer, typename Layer::communicator_type& batch) {
  const auto& state = layer.state();
  const int num_experts = layer.dims().num_experts;
  batch.all_reduce(stream, state.load, state.global_load, num_experts);
  if constexpr (Layer::router_type::has_bias)
    balance::update_bias(stream, state.bias, state.global_load, num_experts, state.bias_rate);
  clear_load(stream, state);
}

}  // namespace detail

TESSERA_NAMESPACE_END
