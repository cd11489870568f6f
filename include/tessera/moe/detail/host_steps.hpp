// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include <tessera/core/chunks.hpp>
#include <tessera/experts/detail/row_loops.hpp>
#include <tessera/gemm/automatic.hpp>
#include <tessera/moe/detail/layer_memory.hpp>

// The steps of a layer in host memory, which `moe_layer` runs one behind the other and the phases of a pipeline's
// chunk beside those of another. Each object carves the same slices from the memory it is given: a phase makes its own.

TESSERA_NAMESPACE_BEGIN

namespace detail {

// Products with the gate go through the default backend, whatever the experts use: the gate is small, and its bits
// decide the routing.
using gate_gemm = gemm::host_backend<gemm::automatic>;

// to = round(from + to), summed in A.
template <class A, class S>
void add_residual(const matrix_view<const S>& from, const matrix_view<S>& to) {
  for (std::int64_t t = 0; t < to.rows; ++t)
    for (std::int64_t j = 0; j < to.cols; ++j)
      to(t, j) = static_cast<S>(static_cast<A>(from(t, j)) + static_cast<A>(to(t, j)));
}

template <class Layer>
class host_forward_steps {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using inputs = typename Layer::inputs;
  using weights = typename Layer::weights;

  host_forward_steps(const host_forward_steps&) = delete;
  host_forward_steps& operator=(const host_forward_steps&) = delete;
  // @param in Token ids, expert ids and sequence offsets are needed by `route`, and with losses by `count`; the
  // residual by `combine`.
  host_forward_steps(const Layer& owner, pass mode, const inputs& in, const weights& params, saved_memory saved,
                     workspace_memory workspace)
      : layer_(owner),
        mode_(mode),
        in_(in),
        params_(params),
        plan_(owner),
        scratch_builder_(workspace, "workspace"),
        saved_builder_(saved, "saved memory"),
        window_(scratch_builder_, plan_),
        saved_(mode == pass::eval ? scratch_builder_ : saved_builder_, plan_),
        scratch_(scratch_builder_, plan_) {}

  // The gate and the choice of experts.
  void route(host_stream stream) {
    const shape& s = plan_.sizes;
    const std::array<std::int32_t, 2> all{0, static_cast<std::int32_t>(num_tokens())};
    gate_gemm::variable_m<A>(all, s.num_experts, s.hidden, gemm::row_operand<const S>{in_.x.data, in_.x.stride},
                             gemm::group_operand<const A>{params_.gate.data, 0, params_.gate.stride, 1},
                             params_.gate_bias, matrix_view<A>{saved_.logits, num_tokens(), s.num_experts},
                             write::overwrite);
    layer_.get_router().route(stream, routing_inputs(), chosen(),
                              counting() ? balance_counts(scratch_.counts, s.num_experts) : balance_counts{});
  }
  // Routing and rows, to the owners of experts.
  void send(host_stream stream) {
    auto& comm = layer_.comm();
    if (counting() && Layer::num_losses > 0)
      comm.all_reduce(stream, scratch_.counts, saved_.counts, balance_counts::size(plan_.sizes.num_experts));
    exchange_routing(stream, comm, layer_.placement(), plan_.bounds, plan_.dispatch, chosen(), saved_.handle,
                     scratch_.plan);
    dispatch_begin(stream, comm, saved_.handle, in_.x, received(), scratch_.rows);
  }
  // Waits for rows; on the host nothing is left to wait for.
  void receive(host_stream stream) {
    dispatch_end(stream, layer_.comm(), saved_.handle, in_.x, received(), scratch_.rows);
  }
  // Any time before `combine`.
  void shared(host_stream stream) {
    if (!plan_.has_shared()) return;
    plan_.shared.forward(stream, chunked_rows(scratch_.token_offsets, num_tokens(), 0), in_.x, {}, params_.shared,
                         saved_.shared, {scratch_.shared_out, num_tokens(), plan_.sizes.hidden}, scratch_.shared);
  }
  void experts(host_stream stream) {
    const auto& handle = saved_.handle;
    const matrix_view<S> room = received();
    const matrix_view<const S> rows = plan_.alone() ? in_.x : room.subrows(0, handle.total->received_rows);
    plan_.experts.forward(stream, handle.rows(), rows, {handle.pair_weights, plan_.weights_on}, params_.experts,
                          saved_.experts, pairs(), scratch_.experts);
  }
  // Rows home: y = their sums, the shared experts' outputs and the residual, which may have no data.
  void combine(host_stream stream, const matrix_view<S>& y) {
    if (!plan_.has_shared()) {
      sum_into(stream, y);
      if (in_.residual.data != nullptr) add_residual<A>(in_.residual, y);
      return;
    }
    const matrix_view<S> shared_out{scratch_.shared_out, y.rows, y.cols};
    if (in_.residual.data != nullptr) add_residual<A>(in_.residual, shared_out);
    const matrix_view<A> routed{scratch_.routed, y.rows, y.cols};
    sum_into(stream, routed);
    for (std::int64_t t = 0; t < y.rows; ++t)
      for (std::int64_t j = 0; j < y.cols; ++j)
        y(t, j) = static_cast<S>(routed(t, j) + static_cast<A>(shared_out(t, j)));
  }
  // Losses and load: state changes last, when nothing can throw any more.
  void count(host_stream stream) {
    if (!counting()) return;
    const auto& state = layer_.state();
    const int num_experts = plan_.sizes.num_experts;
    if constexpr (Layer::num_losses > 0)
      layer_.get_router().losses(
          stream, routing_inputs(), const_balance_counts(saved_.counts, num_experts), state.coefficients,
          plan_.chunk_tokens,
          matrix_view<A>{state.losses, num_chunks(num_tokens(), plan_.chunk_tokens), Layer::num_losses});
    if (mode_ == pass::recompute) return;
    const const_balance_counts counts(scratch_.counts, num_experts);
    for (int e = 0; e < num_experts; ++e) state.load[e] += counts.expert(e);
    const auto& total = *saved_.handle.total;
    *state.dropped_by_capacity += total.capacity_drops;
    *state.dropped_by_bound += total.overflow_drops;
    *state.most_received_pairs = std::max(*state.most_received_pairs, total.received_pairs);
  }

 private:
  bool counting() const { return mode_ != pass::eval; }
  std::int64_t num_tokens() const { return in_.x.rows; }
  auto routing_inputs() const { return router_view(saved_, layer_, in_); }
  routing<A> chosen() const { return saved_.chosen(num_tokens(), plan_.sizes); }
  matrix_view<S> received() const {
    return {rows_of(plan_, saved_, window_), plan_.bounds.max_received_rows(), plan_.sizes.hidden};
  }
  matrix_view<S> pairs() const { return {scratch_.pairs, saved_.handle.total->received_pairs, plan_.sizes.hidden}; }
  template <class T>
  void sum_into(host_stream stream, const matrix_view<T>& out) {
    using combine_type = typename Layer::combine_type;
    const auto weighting = plan_.weights_on == weight_on::input ? combine_weights::none : combine_weights::routing;
    const matrix_view<const S> rows = pairs();
    const matrix_view<const A> of_pairs = chosen().weights;
    combine_begin<combine_type>(stream, layer_.comm(), saved_.handle, weighting, rows, scratch_.sums);
    combine_end<combine_type>(stream, layer_.comm(), saved_.handle, weighting, rows, of_pairs, out, scratch_.sums);
  }

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
};

template <class Layer>
class host_backward_steps {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using inputs = typename Layer::inputs;
  using weights = typename Layer::weights;

  host_backward_steps(const host_backward_steps&) = delete;
  host_backward_steps& operator=(const host_backward_steps&) = delete;
  // @param in Token ids, expert ids and sequence offsets are needed by `gate` alone.
  host_backward_steps(const Layer& owner, const inputs& in, matrix_view<const S> dy, const weights& params,
                      saved_memory saved, deferred_memory deferred, workspace_memory workspace)
      : layer_(owner),
        in_(in),
        dy_(dy),
        params_(params),
        plan_(owner),
        saved_builder_(saved, "saved memory"),
        deferred_builder_(deferred, "deferred memory"),
        scratch_builder_(workspace, "workspace"),
        saved_(saved_builder_, plan_),
        deferred_(deferred_builder_, plan_),
        scratch_(scratch_builder_, plan_) {}

  void expect_same_tokens() const {
    const std::int64_t saved_tokens = saved_.handle.total->num_tokens;
    TESSERA_EXPECTS(saved_tokens == num_tokens(),
                    "saved memory is of a forward pass over " << saved_tokens << " tokens, x has " << num_tokens());
  }

  // dy, to the owners of experts: the adjoint of combine.
  void send(host_stream stream) {
    dispatch_begin(stream, layer_.comm(), saved_.handle, dy_, room(deferred_.dy_received), scratch_.rows);
  }
  void receive(host_stream stream) {
    dispatch_end(stream, layer_.comm(), saved_.handle, dy_, room(deferred_.dy_received), scratch_.rows);
  }
  // x again, where received rows were not kept.
  void resend(host_stream stream) {
    if (!plan_.resends) return;
    dispatch_begin(stream, layer_.comm(), saved_.handle, in_.x, room(deferred_.x_received), scratch_.rows);
    dispatch_end(stream, layer_.comm(), saved_.handle, in_.x, room(deferred_.x_received), scratch_.rows);
  }
  // Any time before `gate`.
  void shared(host_stream stream) {
    if (!plan_.has_shared()) return;
    plan_.shared.backward_input(stream, chunked_rows(scratch_.token_offsets, num_tokens(), 0), in_.x, dy_, {},
                                params_.shared, saved_.shared, deferred_.shared,
                                {scratch_.shared_dx, num_tokens(), plan_.sizes.hidden}, nullptr, scratch_.shared);
  }
  void experts(host_stream stream) {
    const auto& handle = saved_.handle;
    plan_.experts.backward_input(stream, handle.rows(), arrived(in_.x, rows_of(plan_, saved_, deferred_)),
                                 arrived(dy_, deferred_.dy_received), {handle.pair_weights, plan_.weights_on},
                                 params_.experts, saved_.experts, deferred_.experts, dpairs(), scratch_.dpair_weights,
                                 scratch_.experts);
  }
  // The adjoint of dispatch: sums of rows home, and the gradients of the routing weights.
  void combine(host_stream stream) {
    using combine_type = typename Layer::combine_type;
    const matrix_view<const S> rows = dpairs();
    const matrix_view<const A> of_pairs = chosen().weights;
    combine_begin<combine_type>(stream, layer_.comm(), saved_.handle, combine_weights::none, rows, scratch_.sums);
    combine_end<combine_type>(stream, layer_.comm(), saved_.handle, combine_weights::none, rows, of_pairs, routed(),
                              scratch_.sums);
    return_pair_values(stream, layer_.comm(), saved_.handle, scratch_.dpair_weights, dweights(), scratch_.values);
  }
  // The routing and the gate; dx = the sum of all parts.
  void gate(host_stream stream, const matrix_view<S>& dx) {
    const shape& s = plan_.sizes;
    const matrix_view<A> dlogits{deferred_.dlogits, num_tokens(), s.num_experts};
    layer_.get_router().backward(stream, router_view(saved_, layer_, in_), chosen(), matrix_view<const A>(dweights()),
                                 const_balance_counts(saved_.counts, s.num_experts), layer_.state().coefficients,
                                 static_cast<A>(*layer_.state().loss_scale), dlogits);
    const std::array<std::int32_t, 2> all{0, static_cast<std::int32_t>(num_tokens())};
    const matrix_view<A> from_gate{scratch_.gate, num_tokens(), s.hidden};
    gate_gemm::variable_m<A>(all, s.hidden, s.num_experts, gemm::row_operand<const A>{dlogits.data, dlogits.stride},
                             gemm::group_operand<const A>{params_.gate.data, 0, 1, params_.gate.stride},
                             static_cast<const A*>(nullptr), from_gate, write::overwrite);
    const matrix_view<A> from_experts = routed();
    for (std::int64_t t = 0; t < num_tokens(); ++t) {
      for (std::int64_t j = 0; j < s.hidden; ++j) {
        A sum = from_experts(t, j);
        if (plan_.has_shared()) sum += static_cast<A>(scratch_.shared_dx[t * s.hidden + j]);
        dx(t, j) = static_cast<S>(sum + from_gate(t, j));
      }
    }
  }

 private:
  std::int64_t num_tokens() const { return in_.x.rows; }
  routing<A> chosen() const { return saved_.chosen(num_tokens(), plan_.sizes); }
  matrix_view<S> room(S* rows) const { return {rows, plan_.bounds.max_received_rows(), plan_.sizes.hidden}; }
  matrix_view<const S> arrived(const matrix_view<const S>& own, const S* rows) const {
    if (plan_.alone()) return own;
    return {rows, saved_.handle.total->received_rows, plan_.sizes.hidden};
  }
  matrix_view<S> dpairs() const { return {scratch_.dpairs, saved_.handle.total->received_pairs, plan_.sizes.hidden}; }
  matrix_view<A> routed() const { return {scratch_.routed, num_tokens(), plan_.sizes.hidden}; }
  matrix_view<A> dweights() const { return {scratch_.dweights, num_tokens(), plan_.sizes.top_k}; }

  const Layer& layer_;
  inputs in_;
  matrix_view<const S> dy_;
  weights params_;
  layer_plan<Layer> plan_;
  memory_builder saved_builder_;
  memory_builder deferred_builder_;
  memory_builder scratch_builder_;
  layer_saved<Layer> saved_;
  layer_deferred<Layer> deferred_;
  layer_backward_scratch<Layer> scratch_;
};

template <class Layer>
class host_weight_steps {
 public:
  using A = typename Layer::accumulate;
  using S = typename Layer::storage;
  using gradients = typename Layer::gradients;

  host_weight_steps(const host_weight_steps&) = delete;
  host_weight_steps& operator=(const host_weight_steps&) = delete;
  host_weight_steps(const Layer& owner, matrix_view<const S> x, matrix_view<const S> dy, saved_memory saved,
                    deferred_memory deferred)
      : x_(x),
        dy_(dy),
        plan_(owner),
        saved_builder_(saved, "saved memory"),
        deferred_builder_(deferred, "deferred memory"),
        saved_(saved_builder_, plan_),
        deferred_(deferred_builder_, plan_) {}

  // Of routed and shared experts.
  void experts(host_stream stream, const gradients& grads, write mode) const {
    const auto& handle = saved_.handle;
    plan_.experts.backward_weights(stream, handle.rows(), arrived(x_, rows_of(plan_, saved_, deferred_)),
                                   arrived(dy_, deferred_.dy_received), {handle.pair_weights, plan_.weights_on},
                                   saved_.experts, deferred_.experts, grads.experts, mode, deferred_.experts_scratch);
    if (plan_.has_shared())
      plan_.shared.backward_weights(stream, chunks(), x_, dy_, {}, saved_.shared, deferred_.shared, grads.shared, mode,
                                    deferred_.shared_scratch);
  }
  void gate(const gradients& grads, write mode) const {
    const shape& s = plan_.sizes;
    const expert_rows groups = chunks();
    const std::int64_t elements = std::int64_t{s.num_experts} * s.hidden;
    gate_gemm::variable_k<A>({groups.row_offsets, static_cast<std::size_t>(groups.num_local_experts) + 1},
                             s.num_experts, s.hidden, gemm::row_operand<const A>{deferred_.dlogits, s.num_experts},
                             gemm::row_operand<const S>{x_.data, x_.stride},
                             gemm::group_operand<A>{grads.gate, elements, s.hidden, 1}, mode);
    if (s.gate_bias)
      sum_rows<A>(groups, s.num_experts, gemm::row_operand<A>{deferred_.dlogits, s.num_experts},
                  static_cast<const A*>(nullptr), grads.gate_bias, mode);
  }

 private:
  // The chunks that gradients of replicated parameters come in.
  expert_rows chunks() const { return chunked_rows(deferred_.chunk_offsets, x_.rows, plan_.chunk_tokens); }
  matrix_view<const S> arrived(const matrix_view<const S>& own, const S* rows) const {
    if (plan_.alone()) return own;
    return {rows, saved_.handle.total->received_rows, plan_.sizes.hidden};
  }

  matrix_view<const S> x_;
  matrix_view<const S> dy_;
  layer_plan<Layer> plan_;
  memory_builder saved_builder_;
  memory_builder deferred_builder_;
  layer_saved<Layer> saved_;
  layer_deferred<Layer> deferred_;
};

}  // namespace detail

TESSERA_NAMESPACE_END
