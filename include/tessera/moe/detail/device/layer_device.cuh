// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include <tessera/moe/detail/device/layer_exchange.cuh>
#include <tessera/moe/detail/device/layer_steps.cuh>
#include <tessera/moe/detail/device/state_kernels.cuh>
#include <tessera/moe/detail/layer_checks.hpp>
#include <tessera/moe/detail/layer_host.hpp>
#include <tessera/router/router.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class Layer>
void layer_forward(device_stream stream, const Layer& layer, pass mode, const typename Layer::inputs& in,
                   const typename Layer::weights& params, matrix_view<typename Layer::storage> y, saved_memory saved,
                   workspace_memory workspace) {
  check_forward(layer, in, params, y);
  check_exchange(layer, {saved.data, workspace.data}, in.x, residual_of<Layer>(in), y);
  layer_forward_steps<Layer> steps(layer, layer.comm(), mode, in, params, saved, workspace);
  layer_side<Layer> side(layer, layer.comm());
  steps.route(stream);
  steps.send(stream, steps.has_shared() ? side.rows_sms() : 0);
  steps.receive(stream);
  if (steps.has_shared()) steps.shared(side.fork_behind_lists(stream));
  steps.experts(stream);
  side.join(stream);
  steps.combine(stream, y);
  steps.count(stream);
}

template <class Layer>
void layer_backward_input(device_stream stream, const Layer& layer, const typename Layer::inputs& in,
                          matrix_view<const typename Layer::storage> dy, const typename Layer::weights& params,
                          saved_memory saved, matrix_view<typename Layer::storage> dx, deferred_memory deferred,
                          workspace_memory workspace) {
  check_backward_input(layer, in, dy, params, dx);
  check_exchange(layer, {saved.data, deferred.data, workspace.data}, in.x, dy, dx);
  layer_backward_steps<Layer> steps(layer, layer.comm(), in, dy, params, saved, deferred, workspace);
  layer_side<Layer> side(layer, layer.comm());
  if (steps.has_shared()) steps.shared(side.fork(stream), {true, side.product_sms()});
  steps.send(stream, steps.has_shared() ? side.rows_sms() : 0);
  steps.receive(stream);
  if (steps.resends()) steps.resend(side.fork(stream), side.rows_sms());
  if (steps.resends() && steps.experts_read_x()) side.join(stream);
  steps.experts(stream, {steps.resends(), steps.resends() ? side.product_sms() : 0});
  side.join(stream);
  steps.combine(stream, dx);
  steps.gate(stream, dx);
}

template <class Layer>
void layer_backward_weights(device_stream stream, const Layer& layer, const typename Layer::inputs& in,
                            matrix_view<const typename Layer::storage> dy, saved_memory saved, deferred_memory deferred,
                            const typename Layer::gradients& grads, write mode) {
  check_backward_weights(layer, in, dy, grads);
  const layer_weight_steps<Layer> steps(layer, in, dy, saved, deferred);
  steps.experts(stream, grads, mode);
  steps.gate(stream, grads, mode);
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
