// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of a chunk of mixture-of-experts layers: instantiate `moe_chunk` with a layer in device memory in a
/// `.cu` file that includes this.

#include <cstddef>
#include <cstdint>

#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/moe/moe_layer.cuh>
#include <tessera/pipeline/moe_chunk.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
template <class Step>
void moe_chunk<Layer, Mixer>::with_forward(const forward_type& call, Step&& step) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const auto comm = tessera::detail::within(b.layer->comm(), call.lane.num_sms);
  step(tessera::detail::layer_forward_steps<Layer>(*b.layer, comm, pass::train, inputs_of(call), b.weights,
                                                   memory_of(call.layer, call.item.slot).saved, forward_scratch_));
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
template <class Step>
void moe_chunk<Layer, Mixer>::with_backward(const backward_type& call, Step&& step) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const memory& m = memory_of(call.layer, call.item.slot);
  const auto comm = tessera::detail::within(b.layer->comm(), call.lane.num_sms);
  step(tessera::detail::layer_backward_steps<Layer>(*b.layer, comm, inputs_of(call), output_gradient(call), b.weights,
                                                    m.saved, m.deferred, backward_scratch_));
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
template <class Step>
void moe_chunk<Layer, Mixer>::with_weights(const backward_type& call, Step&& step) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const memory& m = memory_of(call.layer, call.item.slot);
  const auto& grads = gradients_of(call);
  const typename Layer::inputs in = inputs_of(call);
  tessera::detail::check_backward_weights(*b.layer, in, output_gradient(call), grads);
  step(tessera::detail::layer_weight_steps<Layer>(*b.layer, in, output_gradient(call), m.saved, m.deferred), grads);
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::forward_attention(const forward_type& call) {
  const block& b = block_of(call.layer);
  this->expect_room(call.item);
  const std::int64_t rows = call.item.rows;
  if (b.layer == nullptr) {
    b.before->forward(call.lane.stream, call.item, input(call), output(call), matrix_view<element>{nullptr, rows, 0});
    return;
  }
  const memory& m = memory_of(call.layer, call.item.slot);
  const typename Layer::inputs in = inputs_of(call);
  tessera::detail::check_forward(*b.layer, in, b.weights, output(call));
  tessera::detail::check_exchange(*b.layer, {m.saved.data, forward_scratch_.data}, in.x, in.residual, output(call));
  b.before->forward(call.lane.stream, call.item, input(call), view(residual_, rows), view(m.u, rows));
  with_forward(call, [&](auto&& steps) { steps.route(call.lane.stream, call.lane.num_sms); });
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::forward_dispatch(const forward_type& call) {
  with_forward(call, [&](auto&& steps) {
    steps.send(call.lane.stream);
    steps.receive(call.lane.stream);
  });
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::forward_mlp(const forward_type& call) {
  with_forward(call, [&](auto&& steps) {
    steps.experts(call.lane.stream, call.lane.share);
    steps.shared(call.lane.stream, {call.lane.share.shares, 0});  // not the first products
  });
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::forward_combine(const forward_type& call) {
  with_forward(call, [&](auto&& steps) {
    steps.combine(call.lane.stream, output(call));
    steps.count(call.lane.stream);
  });
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::backward_combine(const backward_type& call) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const memory& m = memory_of(call.layer, call.item.slot);
  const matrix_view<element> du = view(m.du, call.item.rows);
  tessera::detail::check_backward_input(*b.layer, inputs_of(call), output_gradient(call), b.weights, du);
  tessera::detail::check_exchange(*b.layer, {m.saved.data, m.deferred.data, backward_scratch_.data},
                                  experts_input(call), output_gradient(call), du);
  with_backward(call, [&](auto&& steps) {
    steps.send(call.lane.stream);
    steps.receive(call.lane.stream);
    steps.resend(call.lane.stream);
  });
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::backward_mlp_input(const backward_type& call) {
  with_backward(call, [&](auto&& steps) {
    steps.experts(call.lane.stream, call.lane.share);
    steps.shared(call.lane.stream, {call.lane.share.shares, 0});  // not the first products
  });
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::backward_mlp_weights(const backward_type& call) {
  with_weights(call, [&](auto&& steps, const auto& grads) {
    steps.experts(call.lane.stream, grads, call.item.gradient_mode, call.lane.share);
  });
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::backward_dispatch(const backward_type& call) {
  with_backward(call, [&](auto&& steps) {
    steps.combine(call.lane.stream, view(memory_of(call.layer, call.item.slot).du, call.item.rows));
  });
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::backward_attention_input(const backward_type& call) {
  const block& b = block_of(call.layer);
  matrix_view<element> du{nullptr, call.item.rows, 0};
  if (b.layer != nullptr) du = view(memory_of(call.layer, call.item.slot).du, call.item.rows);
  with_backward(call, [&](auto&& steps) { steps.gate(call.lane.stream, du, call.lane.num_sms); });
  b.before->backward_input(call.lane.stream, call.item, input(call), output_gradient(call),
                           matrix_view<const element>(du), input_gradient(call));
}

template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
void moe_chunk<Layer, Mixer>::backward_attention_weights(const backward_type& call) {
  const block& b = block_of(call.layer);
  matrix_view<const element> du{nullptr, call.item.rows, 0};
  if (b.layer != nullptr) du = view(memory_of(call.layer, call.item.slot).du, call.item.rows);
  with_weights(call,
               [&](auto&& steps, const auto& grads) { steps.gate(call.lane.stream, grads, call.item.gradient_mode); });
  b.before->backward_weights(call.lane.stream, call.item, input(call), output_gradient(call), du);
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
