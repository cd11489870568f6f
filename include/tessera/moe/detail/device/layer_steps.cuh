// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/experts/expert_mlp.cuh>
#include <tessera/moe/detail/device/gate_product.cuh>
#include <tessera/moe/detail/device/layer_exchange.cuh>
#include <tessera/moe/detail/device/residual.cuh>
#include <tessera/moe/detail/device/state_kernels.cuh>
#include <tessera/moe/detail/layer_checks.hpp>
#include <tessera/moe/detail/layer_memory.hpp>
#include <tessera/router/router.cuh>

// The steps of a device layer: in order on one stream they are the layer's calls, spread over two streams the phases of
// an overlapped chunk. An object carves the memory of a call, which costs a few additions, and may be made anew for
// every step; steps enqueue and return. `sms` bounds the first product of `route` and `gate`, for kernels of another
// stream that begin with it, 0: no bound; `share` says the same of those of experts, and more.

TESSERA_NAMESPACE_BEGIN

namespace detail {

// Kernels want an address even for no rows, which an empty batch need not have.
template <class S>
matrix_view<const S> with_address(matrix_view<const S> rows, const void* any) {
  if (rows.rows == 0) rows.data = static_cast<const S*>(any);
  return rows;
}

// Products hand tiles out as blocks ask for them, by counters of the layer's, where the container has a place for them.
// @param counters Two of routed and two of shared experts.
template <class Routed, class Shared>
void share_tile_counters(std::int32_t* counters, Routed& routed, Shared& shared) {
  if constexpr (requires { routed.tile_counter = counters; }) routed.tile_counter = counters;
  if constexpr (requires { shared.tile_counter = counters; }) shared.tile_counter = counters + 2;
}

// The same scratch for products beside kernels of another stream, where the container has a place for it.
template <class Scratch>
Scratch with_share(Scratch scratch, const sm_share& share) {
  if constexpr (requires { scratch.share = share; }) scratch.share = share;
  return scratch;
}

inline rows_in_place one_group(device_stream stream, std::int32_t* offsets, std::int64_t num_tokens) {
  fill_chunk_offsets(stream, offsets, num_tokens, 0);
  return {{1, offsets, nullptr}};
}

// The pair weights of routed experts, of a type that says where they apply.
template <class Layer>
auto weights_of_pairs(const typename Layer::accumulate* values) {
  using A = typename Layer::accumulate;
  if constexpr (layer_plan<Layer>::weights_on == weight_on::output)
    return output_weights<A>(values);
  else
    return pair_weights<A>{values, weight_on::input};
}

template <class Layer>
class layer_forward_steps {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using comm_type = typename Layer::communicator_type;
  using inputs = typename Layer::inputs;
  using weights = typename Layer::weights;

  layer_forward_steps(const layer_forward_steps&) = delete;
  layer_forward_steps& operator=(const layer_forward_steps&) = delete;
  layer_forward_steps(const Layer& layer, const comm_type& comm, pass mode, const inputs& in, const weights& params,
                      saved_memory saved, workspace_memory workspace)
      : layer_(layer),
        mode_(mode),
        in_(in),
        params_(params),
        plan_(layer),
        scratch_builder_(workspace, "workspace"),
        saved_builder_(saved, "saved memory"),
        window_(scratch_builder_, plan_),
        saved_(mode == pass::eval ? scratch_builder_ : saved_builder_, plan_),
        scratch_(scratch_builder_, plan_),
        exchange_(layer, plan_, comm, window_.buffers),
        x_(with_address(in.x, saved_.logits)) {
    share_tile_counters(layer.state().tile_counters, scratch_.experts, scratch_.shared);
  }

  // The gate, the choice of experts; alone, their lists, too.
  void route(device_stream stream, int sms = 0) {
    gate_forward(stream, x_, matrix_view<const A>(params_.gate), params_.gate_bias,
                 matrix_view<A>{saved_.logits, x_.rows, layer_.dims().num_experts}, scratch_.gate_parts,
                 scratch_.token_offsets, sms);
    exchange_.on(stream).route(routing_inputs(), chosen(), counting(), saved_, scratch_);
  }
  // Routing and rows, to the owners of experts. @param rows_sms Multiprocessors of the rows; 0: the communicator's.
  void send(device_stream stream, int rows_sms = 0) {
    exchange_.on(stream).send_routing(chosen(), counting(), saved_, window_, scratch_);
    exchange_.on(stream, rows_sms).send_rows(saved_, x_, received());
  }
  // Waits for lists and rows.
  void receive(device_stream stream) {
    exchange_.on(stream).await_lists();
    exchange_.on(stream).await_rows(x_, received());
  }
  // Any time before `combine`. Their outputs, and the residual.
  bool has_shared() const { return plan_.has_shared(); }
  void shared([[maybe_unused]] device_stream stream, [[maybe_unused]] const sm_share& share = {}) {
    if constexpr (Layer::may_have_shared) {
      if (!plan_.has_shared()) return;
      plan_.shared.forward(stream, one_group(stream, scratch_.token_offsets, x_.rows), x_, output_weights<A>(),
                           params_.shared, saved_.shared,
                           {scratch_.shared_out, plan_.sizes.max_tokens, plan_.sizes.hidden},
                           with_share(scratch_.shared, share));
      if (in_.residual.data != nullptr)
        add_residual<A, S>(stream, in_.residual, {scratch_.shared_out, x_.rows, plan_.sizes.hidden});
    }
  }
  void experts(device_stream stream, const sm_share& share = {}) {
    plan_.experts.forward(stream, listed_rows{saved_.handle.rows()}, exchange_.on(stream).arrived(x_, received()),
                          weights_of_pairs<Layer>(saved_.handle.pair_weights), params_.experts, saved_.experts, pairs(),
                          with_share(scratch_.experts, share));
  }
  // Rows home: y = their sums, and what `shared` has left; without shared experts, the residual.
  void combine(device_stream stream, matrix_view<S> y) {
    matrix_view<const S> plus = residual_of<Layer>(in_);
    if (plan_.has_shared()) plus = {scratch_.shared_out, x_.rows, plan_.sizes.hidden};
    exchange_.on(stream).combine(saved_, matrix_view<const A>(chosen().weights), plan_.weights_on == weight_on::output,
                                 matrix_view<const S>(pairs()), window_.returned, plus, y);
  }
  // Losses and load.
  void count(device_stream stream) {
    if (!counting()) return;
    const auto& state = layer_.state();
    if constexpr (Layer::num_losses > 0) {
      layer_.get_router().losses(
          stream, routing_inputs(), const_balance_counts(saved_.counts, plan_.sizes.num_experts), state.coefficients,
          plan_.chunk_tokens, matrix_view<A>{state.losses, num_chunks(x_.rows, plan_.chunk_tokens), Layer::num_losses});
    }
    if (mode_ == pass::train) {
      count_step(stream, state, exchange_.own_counts(saved_, scratch_), saved_.handle, exchange_.failure());
    }
  }

 private:
  bool counting() const { return mode_ != pass::eval; }
  auto routing_inputs() const { return router_view(saved_, layer_, in_); }
  routing<A> chosen() const { return saved_.chosen(x_.rows, plan_.sizes); }
  S* received() const { return rows_of(plan_, saved_, window_); }
  matrix_view<S> pairs() const { return {scratch_.pairs, plan_.bounds.max_pairs, plan_.sizes.hidden}; }

  const Layer& layer_;
  pass mode_;
  inputs in_;
  weights params_;
  layer_plan<Layer> plan_;
  memory_builder scratch_builder_;
  memory_builder saved_builder_;
  layer_forward_window<Layer> window_;
  layer_saved<Layer> saved_;
  layer_forward_scratch<Layer> scratch_;
  layer_exchange<Layer> exchange_;
  matrix_view<const S> x_;
};

template <class Layer>
class layer_backward_steps {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using comm_type = typename Layer::communicator_type;
  using inputs = typename Layer::inputs;
  using weights = typename Layer::weights;

  layer_backward_steps(const layer_backward_steps&) = delete;
  layer_backward_steps& operator=(const layer_backward_steps&) = delete;
  layer_backward_steps(const Layer& layer, const comm_type& comm, const inputs& in, matrix_view<const S> dy,
                       const weights& params, saved_memory saved, deferred_memory deferred, workspace_memory workspace)
      : layer_(layer),
        in_(in),
        params_(params),
        plan_(layer),
        saved_builder_(saved, "saved memory"),
        deferred_builder_(deferred, "deferred memory"),
        scratch_builder_(workspace, "workspace"),
        saved_(saved_builder_, plan_),
        deferred_(deferred_builder_, plan_),
        scratch_(scratch_builder_, plan_),
        exchange_(layer, plan_, comm, scratch_.buffers),
        x_(with_address(in.x, saved_.logits)),
        dy_(with_address(dy, saved_.logits)) {
    share_tile_counters(layer.state().tile_counters, scratch_.experts, scratch_.shared);
  }

  // dy, to the owners of experts: the adjoint of combine. @param rows_sms As in forward.
  void send(device_stream stream, int rows_sms = 0) {
    exchange_.on(stream, rows_sms).begin_backward(saved_);
    exchange_.on(stream, rows_sms).send_rows(saved_, dy_, deferred_.dy_received);
  }
  void receive(device_stream stream) { exchange_.on(stream).await_rows(dy_, deferred_.dy_received); }
  // x again, where received rows were not kept: behind `receive`, before the weights' gradients, and before `experts`
  // where these read it.
  bool resends() const { return plan_.resends && plan_.travels; }
  bool experts_read_x() const { return plan_.weights_on == weight_on::input; }
  void resend(device_stream stream, int rows_sms = 0) {
    if (!resends()) return;
    exchange_.on(stream, rows_sms).send_rows(saved_, x_, deferred_.x_received);
    exchange_.on(stream).await_rows(x_, deferred_.x_received);
  }
  // Any time before `combine`.
  bool has_shared() const { return plan_.has_shared(); }
  void shared([[maybe_unused]] device_stream stream, [[maybe_unused]] const sm_share& share = {}) {
    if constexpr (Layer::may_have_shared) {
      if (!plan_.has_shared()) return;
      plan_.shared.backward_input(stream, one_group(stream, scratch_.token_offsets, x_.rows), x_, dy_,
                                  output_weights<A>(), params_.shared, saved_.shared, deferred_.shared,
                                  {scratch_.shared_dx, plan_.sizes.max_tokens, plan_.sizes.hidden}, nullptr,
                                  with_share(scratch_.shared, share));
    }
  }
  void experts(device_stream stream, const sm_share& share = {}) {
    auto& arrived = exchange_.on(stream);
    plan_.experts.backward_input(
        stream, listed_rows{saved_.handle.rows()}, arrived.arrived(x_, rows_of(plan_, saved_, deferred_)),
        arrived.arrived(dy_, deferred_.dy_received), weights_of_pairs<Layer>(saved_.handle.pair_weights),
        params_.experts, saved_.experts, deferred_.experts, dpairs(), scratch_.dpair_weights,
        with_share(scratch_.experts, share));
  }
  // Home: dx = sums of rows, and the shared experts' part; and the gradients of the routing weights.
  void combine(device_stream stream, matrix_view<S> dx) {
    auto& home = exchange_.on(stream);
    matrix_view<const S> plus{};
    if (plan_.has_shared()) plus = {scratch_.shared_dx, x_.rows, plan_.sizes.hidden};
    if constexpr (requires { home.clear_values(dweights()); }) home.clear_values(dweights());
    home.combine(saved_, matrix_view<const A>{nullptr, x_.rows, plan_.sizes.top_k}, false,
                 matrix_view<const S>(dpairs()), scratch_.returned, plus, dx);
    home.values_home(saved_, scratch_.dpair_weights, dweights());
  }
  // The routing and the gate, whose part is added to dx.
  void gate(device_stream stream, matrix_view<S> dx, int sms = 0) {
    const matrix_view<A> dlogits{deferred_.dlogits, x_.rows, plan_.sizes.num_experts};
    layer_.get_router().backward(stream, router_view(saved_, layer_, in_), saved_.chosen(x_.rows, plan_.sizes),
                                 matrix_view<const A>(dweights()),
                                 const_balance_counts(saved_.counts, plan_.sizes.num_experts),
                                 layer_.state().coefficients, layer_.state().loss_scale, dlogits);
    gate_backward_input(stream, x_, matrix_view<const A>(dlogits), matrix_view<const A>(params_.gate), dx,
                        write::accumulate, scratch_.gate_parts, deferred_.dlogit_parts, scratch_.token_offsets, sms);
  }

 private:
  matrix_view<S> dpairs() const { return {scratch_.dpairs, plan_.bounds.max_pairs, plan_.sizes.hidden}; }
  matrix_view<A> dweights() const { return {scratch_.dweights, x_.rows, plan_.sizes.top_k}; }

  const Layer& layer_;
  inputs in_;
  weights params_;
  layer_plan<Layer> plan_;
  memory_builder saved_builder_;
  memory_builder deferred_builder_;
  memory_builder scratch_builder_;
  layer_saved<Layer> saved_;
  layer_deferred<Layer> deferred_;
  layer_backward_scratch<Layer> scratch_;
  layer_exchange<Layer> exchange_;
  matrix_view<const S> x_;
  matrix_view<const S> dy_;
};

template <class Layer>
class layer_weight_steps {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using inputs = typename Layer::inputs;
  using gradients = typename Layer::gradients;

  layer_weight_steps(const Layer& layer, const inputs& in, matrix_view<const S> dy, saved_memory saved,
                     deferred_memory deferred)
      : layer_(layer),
        plan_(layer),
        saved_builder_(saved, "saved memory"),
        deferred_builder_(deferred, "deferred memory"),
        saved_(saved_builder_, plan_),
        deferred_(deferred_builder_, plan_),
        x_(with_address(in.x, saved_.logits)),
        dy_(with_address(dy, saved_.logits)) {
    share_tile_counters(layer.state().tile_counters + 4, deferred_.experts_scratch, deferred_.shared_scratch);
  }

  // Of routed and shared experts.
  void experts(device_stream stream, const gradients& grads, write mode, const sm_share& share = {}) const {
    layer_exchange<Layer> exchange(layer_, plan_, layer_.comm());
    plan_.experts.backward_weights(
        stream, listed_rows{saved_.handle.rows()}, exchange.arrived(x_, rows_of(plan_, saved_, deferred_)),
        exchange.arrived(dy_, deferred_.dy_received), weights_of_pairs<Layer>(saved_.handle.pair_weights),
        saved_.experts, deferred_.experts, grads.experts, mode, with_share(deferred_.experts_scratch, share));
    if constexpr (Layer::may_have_shared) {
      if (plan_.has_shared())
        plan_.shared.backward_weights(stream, chunks(stream), x_, dy_, output_weights<A>(), saved_.shared,
                                      deferred_.shared, grads.shared, mode,
                                      with_share(deferred_.shared_scratch, {share.shares, 0}));
    }
  }
  void gate(device_stream stream, const gradients& grads, write mode) const {
    const matrix_view<const A> dlogits{deferred_.dlogits, x_.rows, plan_.sizes.num_experts};
    gate_backward_weights(stream, x_, dlogits, deferred_.dlogit_parts, grads.gate, mode,
                          num_chunks(x_.rows, plan_.chunk_tokens), plan_.chunk_tokens, plan_.gate_gradient_splits(),
                          deferred_.gate_split_offsets, deferred_.gate_partial);
    if (plan_.sizes.gate_bias)
      sum_columns<A, A>(stream, chunks(stream), nullptr, dlogits, grads.gate_bias, mode == write::accumulate);
  }

 private:
  // The chunks that gradients of replicated parameters come in.
  rows_in_place chunks(device_stream stream) const {
    fill_chunk_offsets(stream, deferred_.chunk_offsets, x_.rows, plan_.chunk_tokens);
    return {{static_cast<std::int32_t>(num_chunks(x_.rows, plan_.chunk_tokens)), deferred_.chunk_offsets, nullptr}};
  }

  const Layer& layer_;
  layer_plan<Layer> plan_;
  memory_builder saved_builder_;
  memory_builder deferred_builder_;
  layer_saved<Layer> saved_;
  layer_deferred<Layer> deferred_;
  matrix_view<const S> x_;
  matrix_view<const S> dy_;
};

}  // namespace detail

TESSERA_NAMESPACE_END
