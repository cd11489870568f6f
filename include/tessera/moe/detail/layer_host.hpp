// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <tuple>

#include <tessera/moe/detail/host_steps.hpp>
#include <tessera/moe/detail/layer_checks.hpp>
#include <tessera/moe/state.hpp>
#include <tessera/router/balance.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// The host half of moe_layer.

template <class Layer>
void layer_forward(host_stream stream, const Layer& layer, pass mode, const typename Layer::inputs& in,
                   const typename Layer::weights& params, matrix_view<typename Layer::storage> y, saved_memory saved,
                   workspace_memory workspace) {
  check_forward(layer, in, params, y);
  host_forward_steps<Layer> steps(layer, mode, in, params, saved, workspace);
  steps.route(stream);
  steps.send(stream);
  steps.shared(stream);
  steps.receive(stream);
  steps.experts(stream);
  steps.combine(stream, y);
  steps.count(stream);
}

template <class Layer>
void layer_backward_input(host_stream stream, const Layer& layer, const typename Layer::inputs& in,
                          matrix_view<const typename Layer::storage> dy, const typename Layer::weights& params,
                          saved_memory saved, matrix_view<typename Layer::storage> dx, deferred_memory deferred,
                          workspace_memory workspace) {
  check_backward_input(layer, in, dy, params, dx);
  host_backward_steps<Layer> steps(layer, in, dy, params, saved, deferred, workspace);
  steps.expect_same_tokens();
  steps.send(stream);
  steps.shared(stream);
  steps.receive(stream);
  steps.resend(stream);
  steps.experts(stream);
  steps.combine(stream);
  steps.gate(stream, dx);
}

template <class Layer>
void layer_backward_weights(host_stream stream, const Layer& layer, const typename Layer::inputs& in,
                            matrix_view<const typename Layer::storage> dy, saved_memory saved, deferred_memory deferred,
                            const typename Layer::gradients& grads, write mode) {
  check_backward_weights(layer, in, dy, grads);
  const host_weight_steps<Layer> steps(layer, in.x, dy, saved, deferred);
  steps.experts(stream, grads, mode);
  steps.gate(grads, mode);
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
