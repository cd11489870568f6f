// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>

#include <tessera/experts/detail/row_loops.hpp>
#include <tessera/gemm/automatic.hpp>
#include <tessera/moe/detail/layer_checks.hpp>
#include <tessera/moe/detail/layer_memory.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// The host half of moe_layer. Products with the gate go through the default backend, whatever the experts use: the gate
// is small, and its bits decide the routing.
using gate_gemm = gemm::host_backend<gemm::automatic>;

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

template <class Layer>
void compute_logits(const Layer& layer, const typename Layer::inputs& in, const typename Layer::weights& params,
                    typename Layer::accumulate* logits) {
  using A = typename Layer::accumulate;
  const shape& s = layer.dims();
  const std::array<std::int32_t, 2> all{0, static_cast<std::int32_t>(in.x.rows)};
  gate_gemm::variable_m<A>(all, s.num_experts, s.hidden,
                           gemm::row_operand<const typename Layer::storage>{in.x.data, in.x.stride},
                           gemm::group_operand<const A>{params.gate.data, 0, params.gate.stride, 1}, params.gate_bias,
                           matrix_view<A>{logits, in.x.rows, s.num_experts}, write::overwrite);
}

// Step of the bias as the router's options have it; 0 without a bias.
template <class Layer>
float default_bias_rate(const Layer& layer) {
  float rate = 0;
  const auto take_rate = [&](const auto& balance) {
    if constexpr (requires { balance.rate; }) rate = balance.rate;
  };
  std::apply([&](const auto&... balances) { (take_rate(balances), ...); }, layer.get_router().get_options().balance);
  return rate;
}

// to = round(from + to), summed in A.
template <class A, class S>
void add_residual(const matrix_view<const S>& from, const matrix_view<S>& to) {
  for (std::int64_t t = 0; t < to.rows; ++t)
    for (std::int64_t j = 0; j < to.cols; ++j)
      to(t, j) = static_cast<S>(static_cast<A>(from(t, j)) + static_cast<A>(to(t, j)));
}

// Rows home: y = their sums, the shared experts' outputs and the residual, which may have no data.
template <class Layer>
void layer_combine(host_stream stream, typename Layer::communicator_type& comm, const layer_plan<Layer>& plan,
                   const layer_saved<Layer>& saved, const layer_forward_scratch<Layer>& scratch,
                   const matrix_view<const typename Layer::storage>& residual,
                   const matrix_view<typename Layer::storage>& y) {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using combine_type = typename Layer::combine_type;
  const auto weighting = plan.weights_on == weight_on::input ? combine_weights::none : combine_weights::routing;
  const matrix_view<const S> pairs{scratch.pairs, saved.handle.total->received_pairs, y.cols};
  const matrix_view<const A> weights = saved.chosen(y.rows, plan.sizes).weights;
  const auto sum_into = [&](auto out) {
    combine_begin<combine_type>(stream, comm, saved.handle, weighting, pairs, scratch.sums);
    combine_end<combine_type>(stream, comm, saved.handle, weighting, pairs, weights, out, scratch.sums);
  };
  if (plan.has_shared()) {
    const matrix_view<S> shared{scratch.shared_out, y.rows, y.cols};
    if (residual.data != nullptr) add_residual<A>(residual, shared);
    const matrix_view<A> routed{scratch.routed, y.rows, y.cols};
    sum_into(routed);
    for (std::int64_t t = 0; t < y.rows; ++t)
      for (std::int64_t j = 0; j < y.cols; ++j) y(t, j) = static_cast<S>(routed(t, j) + static_cast<A>(shared(t, j)));
  } else {
    sum_into(y);
    if (residual.data != nullptr) add_residual<A>(residual, y);
  }
}

template <class Layer>
void layer_forward(host_stream stream, const Layer& layer, pass mode, const typename Layer::inputs& in,
                   const typename Layer::weights& params, matrix_view<typename Layer::storage> y,
                   saved_memory saved_bytes, workspace_memory workspace) {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  const shape& s = layer.dims();
  const auto& state = layer.state();
  auto& comm = layer.comm();
  const std::int64_t num_tokens = in.x.rows;
  check_forward(layer, in, params, y);

  const layer_plan<Layer> plan(s, layer.placement(), comm.rank(), layer.get_options());
  memory_builder scratch_builder(workspace, "workspace");
  memory_builder saved_builder(saved_bytes, "saved memory");
  const layer_forward_window<Layer> window(scratch_builder, plan);
  const layer_saved<Layer> saved(mode == pass::eval ? scratch_builder : saved_builder, plan);
  const layer_forward_scratch<Layer> scratch(scratch_builder, plan);

  compute_logits(layer, in, params, saved.logits);
  const auto routing_inputs = router_view(saved, layer, in);
  const routing<A> chosen = saved.chosen(num_tokens, s);
  const bool counting = mode != pass::eval;
  const balance_counts counts = counting ? balance_counts(scratch.counts, s.num_experts) : balance_counts{};
  layer.get_router().route(stream, routing_inputs, chosen, counts);
  if (counting && Layer::num_losses > 0)
    comm.all_reduce(stream, counts.data, saved.counts, balance_counts::size(s.num_experts));
  exchange_routing(stream, comm, layer.placement(), plan.bounds, plan.dispatch, chosen, saved.handle, scratch.plan);

  const matrix_view<S> received{rows_of(plan, saved, window), plan.bounds.max_received_rows(), s.hidden};
  dispatch_begin(stream, comm, saved.handle, in.x, received, scratch.rows);
  if (plan.has_shared())
    plan.shared.forward(stream, chunked_rows(scratch.token_offsets, num_tokens, 0), in.x, {}, params.shared,
                        saved.shared, {scratch.shared_out, num_tokens, s.hidden}, scratch.shared);
  const matrix_view<const S> rows = dispatch_end(stream, comm, saved.handle, in.x, received, scratch.rows);

  const matrix_view<S> pairs{scratch.pairs, saved.handle.total->received_pairs, s.hidden};
  plan.experts.forward(stream, saved.handle.rows(), rows, {saved.handle.pair_weights, plan.weights_on}, params.experts,
                       saved.experts, pairs, scratch.experts);

  layer_combine<Layer>(stream, comm, plan, saved, scratch, in.residual, y);

  // State changes last, when nothing can throw any more.
  if (!counting) return;
  if constexpr (Layer::num_losses > 0)
    layer.get_router().losses(
        stream, routing_inputs, const_balance_counts(saved.counts, s.num_experts), state.coefficients,
        plan.chunk_tokens, matrix_view<A>{state.losses, num_chunks(num_tokens, plan.chunk_tokens), Layer::num_losses});
  if (mode == pass::recompute) return;
  for (int e = 0; e < s.num_experts; ++e) state.load[e] += counts.expert(e);
  *state.dropped_by_capacity += saved.handle.total->capacity_drops;
  *state.dropped_by_bound += saved.handle.total->overflow_drops;
  *state.most_received_pairs = std::max(*state.most_received_pairs, saved.handle.total->received_pairs);
}

template <class Layer>
void layer_backward_input(host_stream stream, const Layer& layer, const typename Layer::inputs& in,
                          matrix_view<const typename Layer::storage> dy, const typename Layer::weights& params,
                          saved_memory saved_bytes, matrix_view<typename Layer::storage> dx,
                          deferred_memory deferred_bytes, workspace_memory workspace) {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using combine_type = typename Layer::combine_type;
  const shape& s = layer.dims();
  auto& comm = layer.comm();
  const std::int64_t num_tokens = in.x.rows;
  check_backward_input(layer, in, dy, params, dx);

  const layer_plan<Layer> plan(s, layer.placement(), comm.rank(), layer.get_options());
  memory_builder saved_builder(saved_bytes, "saved memory");
  memory_builder deferred_builder(deferred_bytes, "deferred memory");
  memory_builder scratch_builder(workspace, "workspace");
  const layer_saved<Layer> saved(saved_builder, plan);
  const layer_deferred<Layer> deferred(deferred_builder, plan);
  const layer_backward_scratch<Layer> scratch(scratch_builder, plan);
  TESSERA_EXPECTS(saved.handle.total->num_tokens == num_tokens, "saved memory is of a forward pass over "
                                                                    << saved.handle.total->num_tokens
                                                                    << " tokens, x has " << num_tokens);

  // The adjoint of combine is dispatch ...
  const matrix_view<S> received{deferred.dy_received, plan.bounds.max_received_rows(), s.hidden};
  dispatch_begin(stream, comm, saved.handle, dy, received, scratch.rows);
  if (plan.has_shared())
    plan.shared.backward_input(stream, chunked_rows(scratch.token_offsets, num_tokens, 0), in.x, dy, {}, params.shared,
                               saved.shared, deferred.shared, {scratch.shared_dx, num_tokens, s.hidden}, nullptr,
                               scratch.shared);
  const matrix_view<const S> dy_rows = dispatch_end(stream, comm, saved.handle, dy, received, scratch.rows);
  if (plan.resends) {
    const matrix_view<S> again{deferred.x_received, plan.bounds.max_received_rows(), s.hidden};
    dispatch_begin(stream, comm, saved.handle, in.x, again, scratch.rows);
    dispatch_end(stream, comm, saved.handle, in.x, again, scratch.rows);
  }
  const matrix_view<const S> x_rows =
      plan.alone() ? in.x
                   : matrix_view<const S>{rows_of(plan, saved, deferred), saved.handle.total->received_rows, s.hidden};

  const matrix_view<S> dpairs{scratch.dpairs, saved.handle.total->received_pairs, s.hidden};
  plan.experts.backward_input(stream, saved.handle.rows(), x_rows, dy_rows,
                              {saved.handle.pair_weights, plan.weights_on}, params.experts, saved.experts,
                              deferred.experts, dpairs, scratch.dpair_weights, scratch.experts);

  // ... and of dispatch, combine.
  const matrix_view<A> routed{scratch.routed, num_tokens, s.hidden};
  const matrix_view<const S> outputs = dpairs;
  const matrix_view<const A> weights = saved.chosen(num_tokens, s).weights;
  combine_begin<combine_type>(stream, comm, saved.handle, combine_weights::none, outputs, scratch.sums);
  combine_end<combine_type>(stream, comm, saved.handle, combine_weights::none, outputs, weights, routed, scratch.sums);

  const matrix_view<A> dweights{scratch.dweights, num_tokens, s.top_k};
  return_pair_values(stream, comm, saved.handle, scratch.dpair_weights, dweights, scratch.values);
  const matrix_view<A> dlogits{deferred.dlogits, num_tokens, s.num_experts};
  layer.get_router().backward(stream, router_view(saved, layer, in), saved.chosen(num_tokens, s),
                              matrix_view<const A>(dweights), const_balance_counts(saved.counts, s.num_experts),
                              layer.state().coefficients, static_cast<A>(*layer.state().loss_scale), dlogits);

  const std::array<std::int32_t, 2> all{0, static_cast<std::int32_t>(num_tokens)};
  const matrix_view<A> gate{scratch.gate, num_tokens, s.hidden};
  gate_gemm::variable_m<A>(all, s.hidden, s.num_experts, gemm::row_operand<const A>{dlogits.data, dlogits.stride},
                           gemm::group_operand<const A>{params.gate.data, 0, 1, params.gate.stride},
                           static_cast<const A*>(nullptr), gate, write::overwrite);
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    for (std::int64_t j = 0; j < s.hidden; ++j) {
      A sum = routed(t, j);
      if (plan.has_shared()) sum += static_cast<A>(scratch.shared_dx[t * s.hidden + j]);
      dx(t, j) = static_cast<S>(sum + gate(t, j));
    }
  }
}

template <class Layer>
void layer_backward_weights(host_stream stream, const Layer& layer, const typename Layer::inputs& in,
                            matrix_view<const typename Layer::storage> dy, saved_memory saved_bytes,
                            deferred_memory deferred_bytes, const typename Layer::gradients& grads, write mode) {
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  const shape& s = layer.dims();
  const std::int64_t num_tokens = in.x.rows;
  check_backward_weights(layer, in, dy, grads);
  const layer_plan<Layer> plan(s, layer.placement(), layer.comm().rank(), layer.get_options());
  memory_builder saved_builder(saved_bytes, "saved memory");
  memory_builder deferred_builder(deferred_bytes, "deferred memory");
  const layer_saved<Layer> saved(saved_builder, plan);
  const layer_deferred<Layer> deferred(deferred_builder, plan);
  const matrix_view<const S> x_rows =
      plan.alone() ? in.x
                   : matrix_view<const S>{rows_of(plan, saved, deferred), saved.handle.total->received_rows, s.hidden};
  const matrix_view<const S> dy_rows =
      plan.alone() ? dy : matrix_view<const S>{deferred.dy_received, saved.handle.total->received_rows, s.hidden};

  const expert_rows chunks = chunked_rows(deferred.chunk_offsets, num_tokens, plan.chunk_tokens);
  plan.experts.backward_weights(stream, saved.handle.rows(), x_rows, dy_rows,
                                {saved.handle.pair_weights, plan.weights_on}, saved.experts, deferred.experts,
                                grads.experts, mode, deferred.experts_scratch);

  if (plan.has_shared())
    plan.shared.backward_weights(stream, chunks, in.x, dy, {}, saved.shared, deferred.shared, grads.shared, mode,
                                 deferred.shared_scratch);
  const std::int64_t gate_elements = std::int64_t{s.num_experts} * s.hidden;
  gate_gemm::variable_k<A>({chunks.row_offsets, static_cast<std::size_t>(chunks.num_local_experts) + 1}, s.num_experts,
                           s.hidden, gemm::row_operand<const A>{deferred.dlogits, s.num_experts},
                           gemm::row_operand<const S>{in.x.data, in.x.stride},
                           gemm::group_operand<A>{grads.gate, gate_elements, s.hidden, 1}, mode);
  if (s.gate_bias)
    sum_rows<A>(chunks, s.num_experts, gemm::row_operand<A>{deferred.dlogits, s.num_experts},
                static_cast<const A*>(nullptr), grads.gate_bias, mode);
}

template <class Layer>
void layer_reset_state(host_stream, const Layer& layer) {
  const auto& state = layer.state();
  const int num_experts = layer.dims().num_experts;
  if (state.bias != nullptr) std::fill_n(state.bias, num_experts, 0.0F);
  std::fill_n(state.load, num_experts, 0);
  std::fill_n(state.global_load, num_experts, 0);
  *state.bias_rate = default_bias_rate(layer);
  const auto coefficients = layer.get_router().default_coefficients();
  std::copy(coefficients.begin(), coefficients.end(), state.coefficients);
  *state.loss_scale = 1;
  std::fill_n(state.losses, state.max_chunks * state.num_losses, typename Layer::accumulate{0});
  *state.dropped_by_capacity = 0;
  *state.dropped_by_bound = 0;
  *state.most_received_pairs = 0;
  *state.status = {};
  std::fill_n(state.counters, comm::max_symmetric_slots, call_counters{});
}

template <class Layer>
void layer_end_step(host_stream stream, const Layer& layer, typename Layer::communicator_type& batch) {
  const auto& state = layer.state();
  const int num_experts = layer.dims().num_experts;
  if constexpr (Layer::router_type::has_bias) check_bias_rate(*state.bias_rate);
  batch.all_reduce(stream, state.load, state.global_load, num_experts);
  if constexpr (Layer::router_type::has_bias)
    balance::update_bias(stream, state.bias, state.global_load, num_experts, *state.bias_rate);
  std::fill_n(state.load, num_experts, 0);
}

}  // namespace detail

TESSERA_NAMESPACE_END
