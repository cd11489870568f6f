// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <type_traits>

#include <tessera/core/chunks.hpp>
#include <tessera/moe/detail/host_steps.hpp>
#include <tessera/moe/detail/layer_checks.hpp>
#include <tessera/pipeline/moe_chunk.hpp>

// The phases are the steps of moe_layer's host half in the same order, on the same memory classes: the layer's slices
// are carved anew in every phase, which costs a few additions.

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

template <class Layer, class Mixer>
struct moe_chunk_blocks<Layer, Mixer>::memory {
  element* x = nullptr;   // [T, d] input of the block; null in the first, whose input the executor has
  element* u = nullptr;   // [T, d] input of the experts
  element* dy = nullptr;  // [T, d] gradient of the block's output; null in the last
  element* du = nullptr;  // [T, d] gradient of u
  saved_memory saved;
  deferred_memory deferred;

  // What lives from forward on.
  void lay_out_saved(memory_builder& b, const block& of, bool first, std::int64_t elements, std::size_t bytes) {
    x = b.take<element>("inputs of blocks", first ? 0 : elements);
    u = b.take<element>("inputs of experts", of.layer == nullptr ? 0 : elements);
    saved = {b.take<std::byte>("saved memory of a layer", static_cast<std::int64_t>(bytes)), bytes};
  }
  // What lives from the input part of the backward on.
  void lay_out_deferred(memory_builder& b, const block& of, bool last, std::int64_t elements, std::size_t bytes) {
    dy = b.take<element>("output gradients of blocks", last ? 0 : elements);
    du = b.take<element>("input gradients of experts", of.layer == nullptr ? 0 : elements);
    deferred = {b.take<std::byte>("deferred memory of a layer", static_cast<std::int64_t>(bytes)), bytes};
  }
};

template <class Layer, class Mixer>
moe_chunk_sizes moe_chunk_blocks<Layer, Mixer>::sizes(std::span<const block> blocks, std::int64_t max_rows,
                                                      std::int64_t width, int num_slots) {
  TESSERA_EXPECTS(!blocks.empty() && max_rows >= 0 && width >= 0 && num_slots >= 0,
                  "moe_chunk: " << blocks.size() << " blocks, max_rows = " << max_rows << ", width = " << width
                                << ", num_slots = " << num_slots << "; at least one block and no negative number");
  memory_builder saved;
  memory_builder deferred;
  std::size_t forward = 0;
  std::size_t backward = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const block& b = blocks[i];
    TESSERA_EXPECTS(b.before != nullptr, "moe_chunk: block " << i << " has no mixer");
    layer_sizes needed;
    if (b.layer != nullptr) {
      const Layer& layer = *b.layer;
      TESSERA_EXPECTS(layer.dims().hidden == width && max_rows <= layer.dims().max_tokens,
                      "moe_chunk: block " << i << " has hidden = " << layer.dims().hidden
                                          << " and max_tokens = " << layer.dims().max_tokens
                                          << ", the chunk has width = " << width << " and max_rows = " << max_rows);
      needed = Layer::sizes(layer.dims(), layer.placement(), layer.comm().rank(), layer.get_options());
    }
    forward = std::max(forward, needed.workspace_bytes);
    backward = std::max(backward, needed.workspace_bytes);
    for (int slot = 0; slot < num_slots; ++slot) {
      memory m;
      m.lay_out_saved(saved, b, i == 0, max_rows * width, needed.saved_bytes);
      m.lay_out_deferred(deferred, b, i + 1 == blocks.size(), max_rows * width, needed.deferred_bytes);
    }
  }
  memory_builder workspace;
  workspace.take<element>("residual", max_rows * width);
  workspace.take<std::byte>("forward workspace", static_cast<std::int64_t>(forward));
  workspace.take<std::byte>("backward workspace", static_cast<std::int64_t>(backward));
  return {saved.bytes(), deferred.bytes(), workspace.bytes()};
}

template <class Layer, class Mixer>
moe_chunk_blocks<Layer, Mixer>::moe_chunk_blocks(std::span<const block> blocks, std::int64_t max_rows,
                                                 std::int64_t width, int num_slots, saved_memory saved,
                                                 deferred_memory deferred, workspace_memory workspace)
    : blocks_(blocks.begin(), blocks.end()), max_rows_(max_rows), width_(width), num_slots_(num_slots) {
  sizes(blocks, max_rows, width, num_slots);  // checks
  memory_builder saved_builder(saved, "saved memory of a chunk");
  memory_builder deferred_builder(deferred, "deferred memory of a chunk");
  std::size_t scratch = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const block& b = blocks[i];
    layer_sizes needed;
    if (b.layer != nullptr)
      needed = Layer::sizes(b.layer->dims(), b.layer->placement(), b.layer->comm().rank(), b.layer->get_options());
    scratch = std::max(scratch, needed.workspace_bytes);
    for (int slot = 0; slot < num_slots; ++slot) {
      memory m;
      m.lay_out_saved(saved_builder, b, i == 0, max_rows * width, needed.saved_bytes);
      m.lay_out_deferred(deferred_builder, b, i + 1 == blocks.size(), max_rows * width, needed.deferred_bytes);
      memories_.push_back(m);
    }
  }
  memory_builder builder(workspace, "workspace of a chunk");
  residual_ = builder.take<element>("residual", max_rows * width);
  const auto bytes = static_cast<std::int64_t>(scratch);
  forward_scratch_ = {builder.take<std::byte>("forward workspace", bytes), scratch};
  backward_scratch_ = {builder.take<std::byte>("backward workspace", bytes), scratch};
}

template <class Layer, class Mixer>
template <class Call>
auto moe_chunk_blocks<Layer, Mixer>::input(const Call& call) -> matrix_view<const element> {
  if (call.layer == 0) return call.x;
  return view(memory_of(call.layer, call.item.slot).x, call.item.rows);
}

template <class Layer, class Mixer>
auto moe_chunk_blocks<Layer, Mixer>::output(const forward_type& call) -> matrix_view<element> {
  if (call.layer + 1 == num_layers()) return call.y;
  return view(memory_of(call.layer + 1, call.item.slot).x, call.item.rows);
}

template <class Layer, class Mixer>
auto moe_chunk_blocks<Layer, Mixer>::output_gradient(const backward_type& call) -> matrix_view<const element> {
  if (call.layer + 1 == num_layers()) return call.dy;
  return view(memory_of(call.layer, call.item.slot).dy, call.item.rows);
}

template <class Layer, class Mixer>
auto moe_chunk_blocks<Layer, Mixer>::input_gradient(const backward_type& call) -> matrix_view<element> {
  if (call.layer == 0) return call.dx;
  return view(memory_of(call.layer - 1, call.item.slot).dy, call.item.rows);
}

template <class Layer, class Mixer>
template <class Call>
auto moe_chunk_blocks<Layer, Mixer>::experts_input(const Call& call) -> matrix_view<const element> {
  return view(memory_of(call.layer, call.item.slot).u, call.item.rows);
}

template <class Layer, class Mixer>
const typename Layer::gradients& moe_chunk_blocks<Layer, Mixer>::gradients_of(const backward_type& call) const {
  const auto& rows = block_of(call.layer).gradients;
  TESSERA_EXPECTS(call.item.gradient_row >= 0 && call.item.gradient_row < static_cast<std::int64_t>(rows.size()),
                  "moe_chunk: block " << call.layer << " has " << rows.size() << " rows of gradients, micro-batch "
                                      << call.item.micro_batch << " adds to row " << call.item.gradient_row
                                      << ": give execution_plan::gradient_rows of the chunk");
  return rows[static_cast<std::size_t>(call.item.gradient_row)];
}

// What the layer is given: what its router sees and, in forward, h.
template <class Layer, class Mixer>
template <class Call>
typename Layer::inputs moe_chunk_blocks<Layer, Mixer>::inputs_of(const Call& call) {
  typename Layer::inputs in{};
  Mixer& before = *block_of(call.layer).before;
  constexpr bool has_inputs = requires { in = before.inputs(call.item); };
  static_assert(
      has_inputs || !requires { &Mixer::inputs; },
      "moe_chunk: the mixer's inputs must be a member `typename Layer::inputs inputs(const work_item&)`");
  if constexpr (has_inputs) in = before.inputs(call.item);
  in.x = experts_input(call);
  in.residual = {};
  if constexpr (std::is_same_v<Call, forward_type>) in.residual = view(residual_, call.item.rows);
  return in;
}

template <class Layer, class Mixer>
void moe_chunk_blocks<Layer, Mixer>::expect_room(const work_item& item) const {
  TESSERA_EXPECTS(item.rows <= max_rows_ && item.slot >= 0 && item.slot < num_slots_,
                  "moe_chunk: micro-batch " << item.micro_batch << " has " << item.rows << " rows and slot "
                                            << item.slot << ", the chunk has room for " << max_rows_ << " rows and "
                                            << num_slots_ << " slots");
}

// What the layer is given where its router reads nothing: a mixer may be running in the other lane, and is not asked.
// Losses alone need it all the same, in `forward_combine`.
template <class Layer, class Mixer>
template <class Call>
typename Layer::inputs moe_chunk<Layer, Mixer>::rows_alone(const Call& call) {
  typename Layer::inputs in{};
  in.x = experts_input(call);
  if constexpr (std::is_same_v<Call, forward_type>) in.residual = view(residual_, call.item.rows);
  return in;
}

template <class Layer, class Mixer>
auto moe_chunk<Layer, Mixer>::steps_of(const forward_type& call, const typename Layer::inputs& in)
    -> tessera::detail::host_forward_steps<Layer> {
  const block& b = block_of(call.layer);
  return {*b.layer, pass::train, in, b.weights, memory_of(call.layer, call.item.slot).saved, forward_scratch_};
}

template <class Layer, class Mixer>
auto moe_chunk<Layer, Mixer>::steps_of(const backward_type& call, const typename Layer::inputs& in)
    -> tessera::detail::host_backward_steps<Layer> {
  const block& b = block_of(call.layer);
  const memory& m = memory_of(call.layer, call.item.slot);
  return {*b.layer, in, output_gradient(call), b.weights, m.saved, m.deferred, backward_scratch_};
}

template <class Layer, class Mixer>
auto moe_chunk<Layer, Mixer>::weight_steps_of(const backward_type& call) -> tessera::detail::host_weight_steps<Layer> {
  const memory& m = memory_of(call.layer, call.item.slot);
  return {*block_of(call.layer).layer, experts_input(call), output_gradient(call), m.saved, m.deferred};
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::forward_attention(const forward_type& call) {
  const block& b = block_of(call.layer);
  this->expect_room(call.item);
  if (b.layer == nullptr) {
    b.before->forward(call.lane.stream, call.item, input(call), output(call),
                      matrix_view<element>{nullptr, call.item.rows, 0});
    return;
  }
  b.before->forward(call.lane.stream, call.item, input(call), view(residual_, call.item.rows),
                    view(memory_of(call.layer, call.item.slot).u, call.item.rows));
  const typename Layer::inputs in = inputs_of(call);
  tessera::detail::check_tokens(*b.layer, in);
  tessera::detail::check_weights(*b.layer, b.weights);
  steps_of(call, in).route(call.lane.stream);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::forward_dispatch(const forward_type& call) {
  if (block_of(call.layer).layer == nullptr) return;
  auto steps = steps_of(call, rows_alone(call));
  steps.send(call.lane.stream);
  steps.receive(call.lane.stream);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::forward_mlp(const forward_type& call) {
  if (block_of(call.layer).layer == nullptr) return;
  auto steps = steps_of(call, rows_alone(call));
  steps.shared(call.lane.stream);
  steps.experts(call.lane.stream);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::forward_combine(const forward_type& call) {
  if (block_of(call.layer).layer == nullptr) return;
  auto steps = steps_of(call, Layer::num_losses > 0 ? inputs_of(call) : rows_alone(call));
  steps.combine(call.lane.stream, output(call));
  steps.count(call.lane.stream);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_combine(const backward_type& call) {
  if (block_of(call.layer).layer == nullptr) return;
  auto steps = steps_of(call, rows_alone(call));
  steps.send(call.lane.stream);
  steps.receive(call.lane.stream);
  steps.resend(call.lane.stream);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_mlp_input(const backward_type& call) {
  if (block_of(call.layer).layer == nullptr) return;
  auto steps = steps_of(call, rows_alone(call));
  steps.shared(call.lane.stream);
  steps.experts(call.lane.stream);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_dispatch(const backward_type& call) {
  if (block_of(call.layer).layer == nullptr) return;
  steps_of(call, rows_alone(call)).combine(call.lane.stream);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_attention_input(const backward_type& call) {
  const block& b = block_of(call.layer);
  const matrix_view<const element> dy = output_gradient(call);
  matrix_view<element> du{nullptr, call.item.rows, 0};
  if (b.layer != nullptr) {
    du = view(memory_of(call.layer, call.item.slot).du, call.item.rows);
    steps_of(call, inputs_of(call)).gate(call.lane.stream, du);
  }
  b.before->backward_input(call.lane.stream, call.item, input(call), dy, matrix_view<const element>(du),
                           input_gradient(call));
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_mlp_weights(const backward_type& call) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  weight_steps_of(call).experts(call.lane.stream, gradients_of(call), call.item.gradient_mode);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_attention_weights(const backward_type& call) {
  const block& b = block_of(call.layer);
  matrix_view<element> du{nullptr, call.item.rows, 0};
  if (b.layer != nullptr) {
    du = view(memory_of(call.layer, call.item.slot).du, call.item.rows);
    const auto& grads = gradients_of(call);
    tessera::detail::check_gate_gradients(b.layer->dims(), grads,
                                          num_chunks(call.item.rows, b.layer->get_options().chunk_tokens));
    weight_steps_of(call).gate(grads, call.item.gradient_mode);
  }
  b.before->backward_weights(call.lane.stream, call.item, input(call), output_gradient(call),
                             matrix_view<const element>(du));
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
