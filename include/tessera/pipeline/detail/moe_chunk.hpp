// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include <tessera/experts/detail/row_loops.hpp>
#include <tessera/moe/detail/layer_host.hpp>
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

// What the layer is given: what its router sees and, in forward, h.
template <class Layer, class Mixer>
template <class Call>
typename Layer::inputs moe_chunk_blocks<Layer, Mixer>::inputs_of(const Call& call) {
  typename Layer::inputs in{};
  const Mixer& before = *block_of(call.layer).before;
  if constexpr (requires { in = before.inputs(call.item); }) in = before.inputs(call.item);
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

// A layer's slices, as moe_layer has them.
template <class Layer, class Mixer>
struct moe_chunk<Layer, Mixer>::parts {
  const Layer& layer;
  tessera::detail::layer_plan<Layer> plan;
  memory_builder saved_builder;
  tessera::detail::layer_saved<Layer> saved;

  parts(const Layer& of, const memory& m)
      : layer(of),
        plan(of.dims(), of.placement(), of.comm().rank(), of.get_options()),
        saved_builder(m.saved, "saved memory of a layer"),
        saved(saved_builder, plan) {}

  tessera::detail::layer_forward_scratch<Layer> forward_scratch(workspace_memory bytes) const {
    memory_builder builder(bytes, "forward workspace");
    static_cast<void>(tessera::detail::layer_forward_window<Layer>(builder, plan));
    return {builder, plan};
  }
  tessera::detail::layer_forward_window<Layer> forward_window(workspace_memory bytes) const {
    memory_builder builder(bytes, "forward workspace");
    return {builder, plan};
  }
  tessera::detail::layer_backward_scratch<Layer> backward_scratch(workspace_memory bytes) const {
    memory_builder builder(bytes, "backward workspace");
    return {builder, plan};
  }
  tessera::detail::layer_deferred<Layer> deferred(const memory& m) const {
    memory_builder builder(m.deferred, "deferred memory of a layer");
    return {builder, plan};
  }
  // Room for rows, and the rows, of forward (its window) and behind it (deferred memory).
  template <class Place>
  matrix_view<element> room(const Place& place) const {
    return {tessera::detail::rows_of(plan, saved, place), plan.bounds.max_received_rows(), layer.dims().hidden};
  }
  template <class Place>
  matrix_view<const element> rows(matrix_view<const element> u, const Place& place) const {
    if (plan.alone()) return u;
    return {tessera::detail::rows_of(plan, saved, place), saved.handle.total->received_rows, layer.dims().hidden};
  }
  pair_weights<accumulate> weighting() const { return {saved.handle.pair_weights, plan.weights_on}; }
};

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::forward_attention(const forward_type& call) {
  const block& b = block_of(call.layer);
  this->expect_room(call.item);
  if (b.layer == nullptr) {
    b.before->forward(call.lane.stream, call.item, input(call), output(call),
                      matrix_view<element>{nullptr, call.item.rows, 0});
    return;
  }
  const memory& m = memory_of(call.layer, call.item.slot);
  b.before->forward(call.lane.stream, call.item, input(call), view(residual_, call.item.rows),
                    view(m.u, call.item.rows));
  const parts p(*b.layer, m);
  const typename Layer::inputs in = inputs_of(call);
  tessera::detail::check_tokens(*b.layer, in);
  tessera::detail::check_weights(*b.layer, b.weights);
  tessera::detail::compute_logits(*b.layer, in, b.weights, p.saved.logits);
  const auto scratch = p.forward_scratch(forward_scratch_);
  b.layer->get_router().route(call.lane.stream, tessera::detail::router_view(p.saved, *b.layer, in),
                              p.saved.chosen(call.item.rows, b.layer->dims()),
                              balance_counts(scratch.counts, b.layer->dims().num_experts));
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::forward_dispatch(const forward_type& call) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const parts p(*b.layer, memory_of(call.layer, call.item.slot));
  const auto scratch = p.forward_scratch(forward_scratch_);
  const shape& s = b.layer->dims();
  auto& comm = b.layer->comm();
  if (Layer::num_losses > 0)
    comm.all_reduce(call.lane.stream, scratch.counts, p.saved.counts, balance_counts::size(s.num_experts));
  exchange_routing(call.lane.stream, comm, b.layer->placement(), p.plan.bounds, p.plan.dispatch,
                   p.saved.chosen(call.item.rows, s), p.saved.handle, scratch.plan);
  const matrix_view<element> received = p.room(p.forward_window(forward_scratch_));
  dispatch_begin(call.lane.stream, comm, p.saved.handle, experts_input(call), received, scratch.rows);
  dispatch_end(call.lane.stream, comm, p.saved.handle, experts_input(call), received, scratch.rows);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::forward_mlp(const forward_type& call) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const parts p(*b.layer, memory_of(call.layer, call.item.slot));
  const auto scratch = p.forward_scratch(forward_scratch_);
  const int hidden = b.layer->dims().hidden;
  const matrix_view<const element> u = experts_input(call);
  if (p.plan.has_shared())
    p.plan.shared.forward(call.lane.stream, chunked_rows(scratch.token_offsets, call.item.rows, 0), u, {},
                          b.weights.shared, p.saved.shared, {scratch.shared_out, call.item.rows, hidden},
                          scratch.shared);
  p.plan.experts.forward(call.lane.stream, p.saved.handle.rows(), p.rows(u, p.forward_window(forward_scratch_)),
                         p.weighting(), b.weights.experts, p.saved.experts,
                         matrix_view<element>{scratch.pairs, p.saved.handle.total->received_pairs, hidden},
                         scratch.experts);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::forward_combine(const forward_type& call) {
  using A = accumulate;
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const parts p(*b.layer, memory_of(call.layer, call.item.slot));
  const auto scratch = p.forward_scratch(forward_scratch_);
  const shape& s = b.layer->dims();
  tessera::detail::layer_combine<Layer>(call.lane.stream, b.layer->comm(), p.plan, p.saved, scratch,
                                        view(residual_, call.item.rows), output(call));

  const auto& state = b.layer->state();
  const auto counts = const_balance_counts(scratch.counts, s.num_experts);
  if constexpr (Layer::num_losses > 0)
    b.layer->get_router().losses(
        call.lane.stream, tessera::detail::router_view(p.saved, *b.layer, inputs_of(call)),
        const_balance_counts(p.saved.counts, s.num_experts), state.coefficients, p.plan.chunk_tokens,
        matrix_view<A>{state.losses, num_chunks(call.item.rows, p.plan.chunk_tokens), Layer::num_losses});
  for (int e = 0; e < s.num_experts; ++e) state.load[e] += counts.expert(e);
  *state.dropped_by_capacity += p.saved.handle.total->capacity_drops;
  *state.dropped_by_bound += p.saved.handle.total->overflow_drops;
  *state.most_received_pairs = std::max(*state.most_received_pairs, p.saved.handle.total->received_pairs);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_combine(const backward_type& call) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const memory& m = memory_of(call.layer, call.item.slot);
  const parts p(*b.layer, m);
  const auto deferred = p.deferred(m);
  const auto scratch = p.backward_scratch(backward_scratch_);
  const matrix_view<element> received{deferred.dy_received, p.plan.bounds.max_received_rows(), width_};
  dispatch_begin(call.lane.stream, b.layer->comm(), p.saved.handle, output_gradient(call), received, scratch.rows);
  dispatch_end(call.lane.stream, b.layer->comm(), p.saved.handle, output_gradient(call), received, scratch.rows);
  if (!p.plan.resends) return;
  const matrix_view<element> again = p.room(deferred);
  dispatch_begin(call.lane.stream, b.layer->comm(), p.saved.handle, experts_input(call), again, scratch.rows);
  dispatch_end(call.lane.stream, b.layer->comm(), p.saved.handle, experts_input(call), again, scratch.rows);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_mlp_input(const backward_type& call) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const memory& m = memory_of(call.layer, call.item.slot);
  const parts p(*b.layer, m);
  const auto deferred = p.deferred(m);
  const auto scratch = p.backward_scratch(backward_scratch_);
  const matrix_view<const element> u = experts_input(call);
  const matrix_view<const element> dy = output_gradient(call);
  if (p.plan.has_shared())
    p.plan.shared.backward_input(call.lane.stream, chunked_rows(scratch.token_offsets, call.item.rows, 0), u, dy, {},
                                 b.weights.shared, p.saved.shared, deferred.shared,
                                 {scratch.shared_dx, call.item.rows, width_}, nullptr, scratch.shared);
  const std::int64_t rows = p.saved.handle.total->received_rows;
  p.plan.experts.backward_input(call.lane.stream, p.saved.handle.rows(), p.rows(u, deferred),
                                p.plan.alone() ? dy : matrix_view<const element>{deferred.dy_received, rows, width_},
                                p.weighting(), b.weights.experts, p.saved.experts, deferred.experts,
                                matrix_view<element>{scratch.dpairs, p.saved.handle.total->received_pairs, width_},
                                scratch.dpair_weights, scratch.experts);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_dispatch(const backward_type& call) {
  using A = accumulate;
  using combine_type = typename Layer::combine_type;
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const parts p(*b.layer, memory_of(call.layer, call.item.slot));
  const auto scratch = p.backward_scratch(backward_scratch_);
  auto& comm = b.layer->comm();
  const auto& handle = p.saved.handle;
  const matrix_view<const element> pairs{scratch.dpairs, handle.total->received_pairs, width_};
  const matrix_view<A> routed{scratch.routed, call.item.rows, width_};
  const matrix_view<const A> weights = p.saved.chosen(call.item.rows, b.layer->dims()).weights;
  combine_begin<combine_type>(call.lane.stream, comm, handle, combine_weights::none, pairs, scratch.sums);
  combine_end<combine_type>(call.lane.stream, comm, handle, combine_weights::none, pairs, weights, routed,
                            scratch.sums);
  return_pair_values(call.lane.stream, comm, handle, scratch.dpair_weights,
                     matrix_view<A>{scratch.dweights, call.item.rows, b.layer->dims().top_k}, scratch.values);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_attention_input(const backward_type& call) {
  using A = accumulate;
  const block& b = block_of(call.layer);
  const matrix_view<const element> dy = output_gradient(call);
  if (b.layer == nullptr) {
    b.before->backward_input(call.lane.stream, call.item, input(call), dy,
                             matrix_view<const element>{nullptr, call.item.rows, 0}, input_gradient(call));
    return;
  }
  const memory& m = memory_of(call.layer, call.item.slot);
  const parts p(*b.layer, m);
  const auto deferred = p.deferred(m);
  const auto scratch = p.backward_scratch(backward_scratch_);
  const shape& s = b.layer->dims();
  const std::int64_t rows = call.item.rows;
  const matrix_view<A> dlogits{deferred.dlogits, rows, s.num_experts};
  b.layer->get_router().backward(call.lane.stream, tessera::detail::router_view(p.saved, *b.layer, inputs_of(call)),
                                 p.saved.chosen(rows, s), matrix_view<const A>{scratch.dweights, rows, s.top_k},
                                 const_balance_counts(p.saved.counts, s.num_experts), b.layer->state().coefficients,
                                 static_cast<A>(*b.layer->state().loss_scale), dlogits);
  const std::array<std::int32_t, 2> all{0, static_cast<std::int32_t>(rows)};
  const matrix_view<A> gate{scratch.gate, rows, s.hidden};
  tessera::detail::gate_gemm::template variable_m<A>(
      all, s.hidden, s.num_experts, gemm::row_operand<const A>{dlogits.data, dlogits.stride},
      gemm::group_operand<const A>{b.weights.gate.data, 0, 1, b.weights.gate.stride}, static_cast<const A*>(nullptr),
      gate, write::overwrite);
  const matrix_view<element> du = view(m.du, rows);
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::int64_t j = 0; j < s.hidden; ++j) {
      A sum = scratch.routed[t * s.hidden + j];
      if (p.plan.has_shared()) sum += static_cast<A>(scratch.shared_dx[t * s.hidden + j]);
      du(t, j) = static_cast<element>(sum + gate(t, j));
    }
  }
  b.before->backward_input(call.lane.stream, call.item, input(call), dy, matrix_view<const element>(du),
                           input_gradient(call));
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_mlp_weights(const backward_type& call) {
  const block& b = block_of(call.layer);
  if (b.layer == nullptr) return;
  const memory& m = memory_of(call.layer, call.item.slot);
  const parts p(*b.layer, m);
  const auto deferred = p.deferred(m);
  const auto& grads = b.gradients[static_cast<std::size_t>(call.item.gradient_row)];
  const matrix_view<const element> u = experts_input(call);
  const matrix_view<const element> dy = output_gradient(call);
  const std::int64_t rows = p.saved.handle.total->received_rows;
  p.plan.experts.backward_weights(call.lane.stream, p.saved.handle.rows(), p.rows(u, deferred),
                                  p.plan.alone() ? dy : matrix_view<const element>{deferred.dy_received, rows, width_},
                                  p.weighting(), p.saved.experts, deferred.experts, grads.experts,
                                  call.item.gradient_mode, deferred.experts_scratch);
  if (p.plan.has_shared())
    p.plan.shared.backward_weights(
        call.lane.stream, chunked_rows(deferred.chunk_offsets, call.item.rows, p.plan.chunk_tokens), u, dy, {},
        p.saved.shared, deferred.shared, grads.shared, call.item.gradient_mode, deferred.shared_scratch);
}

template <class Layer, class Mixer>
void moe_chunk<Layer, Mixer>::backward_attention_weights(const backward_type& call) {
  using A = accumulate;
  const block& b = block_of(call.layer);
  const matrix_view<const element> dy = output_gradient(call);
  if (b.layer == nullptr) {
    b.before->backward_weights(call.lane.stream, call.item, input(call), dy,
                               matrix_view<const element>{nullptr, call.item.rows, 0});
    return;
  }
  const memory& m = memory_of(call.layer, call.item.slot);
  const parts p(*b.layer, m);
  const auto deferred = p.deferred(m);
  const shape& s = b.layer->dims();
  const auto& grads = b.gradients[static_cast<std::size_t>(call.item.gradient_row)];
  const expert_rows chunks = chunked_rows(deferred.chunk_offsets, call.item.rows, p.plan.chunk_tokens);
  tessera::detail::check_gate_gradients(s, grads, chunks.num_local_experts);
  tessera::detail::gate_gemm::template variable_k<A>(
      {chunks.row_offsets, static_cast<std::size_t>(chunks.num_local_experts) + 1}, s.num_experts, s.hidden,
      gemm::row_operand<const A>{deferred.dlogits, s.num_experts}, gemm::row_operand<const element>{m.u, width_},
      gemm::group_operand<A>{grads.gate, std::int64_t{s.num_experts} * s.hidden, s.hidden, 1}, call.item.gradient_mode);
  if (s.gate_bias)
    tessera::detail::sum_rows<A>(chunks, s.num_experts, gemm::row_operand<A>{deferred.dlogits, s.num_experts},
                                 static_cast<const A*>(nullptr), grads.gate_bias, call.item.gradient_mode);
  b.before->backward_weights(call.lane.stream, call.item, input(call), dy,
                             matrix_view<const element>(view(m.du, call.item.rows)));
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
