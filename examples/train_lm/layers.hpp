// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The model's blocks as `tessera::moe_layer`s: the whole use of the layer by an engine.

#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <tessera/layout/block.hpp>
#include <tessera/moe/moe_layer.hpp>

#include "moe_block.hpp"
#include "parameters.hpp"
#include "settings.hpp"

namespace train_lm {

/// Sigmoid scores, the best K of them normalised to sum 1, and whatever balances the load.
template <class... Balances>
using router_with = ts::router<ts::score::sigmoid, ts::select::top_k, ts::weigh::normalized, Balances...>;

/// Element types of a model that computes in `A`.
template <class A>
using precision_of = ts::precision::policy<A, A, A>;

/// A `moe_layer` with its weights, gradients and memory on one rank.
template <class A, class Router, class Combine, ts::host_communicator Comm>
class layer_block final : public moe_block<A> {
 public:
  using layer_type =
      ts::moe_layer<Router, ts::experts<ts::activation::swiglu, precision_of<A>>, ts::layout::block, Comm, Combine>;

  /// @param s Sizes. @param balance Options of the router's balances. @param max_rows Most tokens of any rank in a
  /// call.
  /// @param chunk_rows Tokens of a chunk. @param comm Outlives the block.
  layer_block(const settings& s, const typename layer_type::router_options& routing, std::int64_t max_rows,
              std::int64_t chunk_rows, Comm& comm)
      : hidden_(s.hidden),
        intermediate_(s.intermediate),
        comm_(comm),
        placement_(static_cast<int>(s.experts), comm.size()),
        shape_{.num_experts = static_cast<int>(s.experts),
               .top_k = static_cast<int>(s.top_k),
               .hidden = static_cast<int>(s.hidden),
               .intermediate = static_cast<int>(s.intermediate),
               .max_tokens = max_rows},
        // Without balancing all tokens may go to one rank: room for that, because a training step must not fail.
        options_{.dispatch = {.row_bound = ts::dispatch_options::full_row_bound}, .chunk_tokens = chunk_rows},
        sizes_(layer_type::sizes(shape_, placement_, comm.rank(), options_)),
        state_(sizes_.state_bytes),
        saved_(sizes_.saved_bytes),
        deferred_(sizes_.deferred_bytes),
        workspace_(std::max(sizes_.workspace_bytes, sizes_.eval_workspace_bytes)),
        layer_(shape_, routing, placement_, comm, state_, options_) {
    layer_.reset_state({});
    const auto elements = static_cast<std::size_t>(num_local_experts() * expert_size());
    weights_.resize(elements);
    gradients_.resize(elements);
  }

  void initialize(std::uint64_t seed, const std::string& name, double deviation, double depth_scale) override {
    const auto up = static_cast<std::size_t>(up_size()), size = static_cast<std::size_t>(expert_size());
    for (int slot = 0; slot < num_local_experts(); ++slot) {
      const std::string expert = name + ".expert" + std::to_string(expert_at(slot));
      const std::span<A> own = weights().subspan(static_cast<std::size_t>(slot) * size, size);
      fill_normal(own.first(up), seed, expert + ".up", deviation);
      fill_normal(own.subspan(up), seed, expert + ".down",
                  depth_scale * 2.0 / std::sqrt(static_cast<double>(intermediate_)));
    }
  }

  void forward(ts::pass pass, std::int64_t rows, const A* x, const A* gate, A* y) override {
    layer_.forward({}, pass, inputs(rows, x), parameters(gate), ts::matrix_view<A>(y, rows, hidden_), saved_,
                   workspace_);
  }

  void backward(std::int64_t rows, const A* x, const A* dy, const A* gate, A* dx, A* dgate) override {
    const ts::matrix_view<const A> output_gradient(dy, rows, hidden_);
    layer_.backward_input({}, inputs(rows, x), output_gradient, parameters(gate), saved_,
                          ts::matrix_view<A>(dx, rows, hidden_), deferred_, workspace_);
    typename layer_type::gradients grads;
    grads.gate = dgate;
    grads.experts.up = gradients_.data();
    grads.experts.down = gradients_.data() + up_size();
    grads.experts.up_stride = grads.experts.down_stride = expert_size();
    layer_.backward_weights({}, inputs(rows, x), output_gradient, saved_, deferred_, grads, ts::write::overwrite);
  }

  void end_step(float rate) override {
    *layer_.state().bias_rate = rate;
    layer_.end_step({}, comm_);
  }

  std::span<A> weights() override { return weights_; }
  std::span<A> gradients() override { return gradients_; }
  std::int64_t expert_size() const override { return 3 * hidden_ * intermediate_; }
  int num_local_experts() const override { return placement_.num_slots(comm_.rank()); }
  int expert_at(int slot) const override { return placement_.expert_at(comm_.rank(), slot); }
  std::span<const std::int64_t> load() const override {
    return {layer_.state().global_load, static_cast<std::size_t>(shape_.num_experts)};
  }
  double auxiliary_loss(std::int64_t chunk) const override {
    double sum = 0;
    for (int i = 0; i < layer_type::num_losses; ++i)
      sum += static_cast<double>(layer_.state().losses[chunk * layer_type::num_losses + i]);
    return sum;
  }

 private:
  /// Elements of the up projection `[2 n, d]` (gate and up); the down projection `[d, n]` follows.
  std::int64_t up_size() const { return 2 * intermediate_ * hidden_; }

  typename layer_type::inputs inputs(std::int64_t rows, const A* x) const {
    return {.x = ts::matrix_view<const A>(x, rows, hidden_)};
  }

  typename layer_type::weights parameters(const A* gate) const {
    typename layer_type::weights params;
    params.gate = ts::matrix_view<const A>(gate, shape_.num_experts, hidden_);
    params.experts.up = weights_.data();
    params.experts.down = weights_.data() + up_size();
    params.experts.up_stride = params.experts.down_stride = expert_size();
    return params;
  }

  std::int64_t hidden_, intermediate_;
  Comm& comm_;
  ts::layout::block placement_;
  ts::shape shape_;
  typename layer_type::options options_;
  ts::layer_sizes sizes_;
  ts::host_buffer state_, saved_, deferred_, workspace_;
  layer_type layer_;
  std::vector<A> weights_, gradients_;
};

/// The block that `s` and `balance` ask for: here numbers become types.
template <class A, ts::host_communicator Comm>
std::unique_ptr<moe_block<A>> make_block(const settings& s, balance_kind balance, std::int64_t max_rows,
                                         std::int64_t chunk_rows, Comm& comm) {
  const auto with_router = [&]<class Router>(const typename Router::options& routing) -> std::unique_ptr<moe_block<A>> {
    if (s.combine == combine_kind::ordered)
      return std::make_unique<layer_block<A, Router, ts::combine::ordered, Comm>>(s, routing, max_rows, chunk_rows,
                                                                                  comm);
    return std::make_unique<layer_block<A, Router, ts::combine::reduced, Comm>>(s, routing, max_rows, chunk_rows, comm);
  };
  switch (balance) {
    case balance_kind::loss: {
      using router = router_with<ts::balance::switch_loss>;
      return with_router.template operator()<router>(
          {.balance = {{.coefficient = static_cast<float>(s.loss_coefficient)}}});
    }
    case balance_kind::bias:
      return with_router.template operator()<router_with<ts::balance::bias>>({});
    case balance_kind::none:
      break;
  }
  return with_router.template operator()<router_with<>>({});
}

}  // namespace train_lm
