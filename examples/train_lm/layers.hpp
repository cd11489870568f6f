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

/// A `moe_layer` with its memory on one rank.
///
/// Training calls the layer once for each chunk of the group, so that the gradient of an expert comes as one
/// contribution per chunk: a sum in the order of chunks has the same bits however chunks, experts and copies of experts
/// are spread over ranks. The auxiliary loss is the mean of those of the chunks for the same reason.
template <class A, class Router, class Combine, ts::host_communicator Comm>
class layer_block final : public moe_block<A> {
 public:
  using layer_type =
      ts::moe_layer<Router, ts::experts<ts::activation::swiglu, precision_of<A>>, ts::layout::block, Comm, Combine>;

  /// @param s Sizes. @param routing Options of the router. @param calls How tokens divide. @param group The
  /// expert-parallel ranks. @param all All ranks, whose loads the bias sees. Both outlive the block.
  layer_block(const settings& s, const typename layer_type::router_options& routing, chunk_calls calls, Comm& group,
              Comm& all)
      : hidden_(s.hidden),
        intermediate_(s.intermediate),
        calls_(std::move(calls)),
        group_(group),
        all_(all),
        placement_(static_cast<int>(s.experts), group.size()),
        train_shape_(sizes_of(s, calls_.chunk_rows)),
        eval_shape_(sizes_of(s, calls_.max_rows)),
        // One rank brings the tokens of a training call, so no rank receives more pairs than these have.
        train_options_{.dispatch = {.row_bound = calls_.chunk_rows * s.top_k}, .chunk_tokens = calls_.chunk_rows},
        // Without balancing all tokens may go to one rank: room for that, because validation must not fail.
        eval_options_{.dispatch = {.row_bound = ts::dispatch_options::full_row_bound}},
        sizes_(layer_type::sizes(train_shape_, placement_, group.rank(), train_options_)),
        eval_sizes_(layer_type::sizes(eval_shape_, placement_, group.rank(), eval_options_)),
        state_(std::max(sizes_.state_bytes, eval_sizes_.state_bytes)),
        deferred_(sizes_.deferred_bytes),
        workspace_(std::max(sizes_.workspace_bytes, eval_sizes_.eval_workspace_bytes)),
        layer_(train_shape_, routing, placement_, group, state_, train_options_),
        eval_layer_(eval_shape_, routing, placement_, group, state_, eval_options_) {
    // Both layers have one chunk in a call, so they lay out the same state: eval selects with the trained bias.
    TESSERA_EXPECTS(sizes_.state_bytes == eval_sizes_.state_bytes && layer_.state().bias == eval_layer_.state().bias,
                    "the two layers of a block must share their state");
    layer_.reset_state({});
    *layer_.state().loss_scale = static_cast<float>(1.0 / static_cast<double>(num_chunks));
    for (std::int64_t i = 0; i < calls_.total(); ++i) saved_.emplace_back(sizes_.saved_bytes);
    auxiliary_.resize(static_cast<std::size_t>(calls_.chunks[static_cast<std::size_t>(group.rank())]));
  }

  void add_parameters(parameter_table& table, const std::string& name) const override {
    const std::int64_t experts = train_shape_.num_experts, slots = placement_.num_slots(group_.rank());
    table.add(name + ".experts.up", ts::box::whole({experts, 2 * intermediate_, hidden_}), slots * up_size(), true);
    table.add(name + ".experts.down", ts::box::whole({experts, hidden_, intermediate_}), slots * down_size(), true);
  }

  void initialize(std::uint64_t seed, const std::string& name, double deviation, double depth_scale, A* up,
                  A* down) const override {
    for (int slot = 0; slot < placement_.num_slots(group_.rank()); ++slot) {
      const std::string expert = name + ".expert" + std::to_string(placement_.expert_at(group_.rank(), slot));
      fill_normal(std::span<A>(up + slot * up_size(), static_cast<std::size_t>(up_size())), seed, expert + ".up",
                  deviation);
      fill_normal(std::span<A>(down + slot * down_size(), static_cast<std::size_t>(down_size())), seed,
                  expert + ".down", depth_scale * 2.0 / std::sqrt(static_cast<double>(intermediate_)));
    }
  }

  void forward(ts::pass pass, std::int64_t rows, const A* x, const A* gate, const expert_tensors<A>& experts,
               A* y) override {
    const auto params = parameters(gate, experts);
    if (pass == ts::pass::eval) {
      eval_layer_.forward({}, pass, inputs(rows, x), params, ts::matrix_view<A>(y, rows, hidden_), {}, workspace_);
      return;
    }
    each_chunk([&](std::int64_t call, std::int64_t own, std::int64_t count, std::int64_t first) {
      layer_.forward({}, pass, inputs(count, x + first * hidden_), params,
                     ts::matrix_view<A>(y + first * hidden_, count, hidden_), saved_[static_cast<std::size_t>(call)],
                     workspace_);
      if (own < 0) return;
      double& sum = auxiliary_[static_cast<std::size_t>(own)];
      sum = 0;
      for (int i = 0; i < layer_type::num_losses; ++i) sum += static_cast<double>(layer_.state().losses[i]);
    });
  }

  void backward([[maybe_unused]] std::int64_t rows, const A* x, const A* dy, const A* gate,
                const expert_tensors<A>& experts, A* dx, A* dgate, const expert_contributions<A>& to) override {
    const auto params = parameters(gate, experts);
    const std::int64_t gate_size = train_shape_.num_experts * hidden_;
    TESSERA_EXPECTS(
        to.count == 1 || to.count == calls_.total(),
        "gradients come as " << calls_.total() << " contributions or as their sum, there is room for " << to.count);
    each_chunk([&](std::int64_t call, std::int64_t own, std::int64_t count, std::int64_t first) {
      const ts::matrix_view<const A> output_gradient(dy + first * hidden_, count, hidden_);
      const auto in = inputs(count, x + first * hidden_);
      auto& saved = saved_[static_cast<std::size_t>(call)];
      layer_.backward_input({}, in, output_gradient, params, saved,
                            ts::matrix_view<A>(dx + first * hidden_, count, hidden_), deferred_, workspace_);
      typename layer_type::gradients grads;
      if (own >= 0) grads.gate = dgate + own * gate_size;
      const bool add = to.count == 1 && call > 0;
      const std::int64_t at = to.count == 1 ? 0 : call * to.stride;
      grads.experts.up = to.up + at;
      grads.experts.down = to.down + at;
      // Only the experts' may be sums. Adding to -0 keeps every bit, that of a zero included.
      if (add && own >= 0) std::fill_n(grads.gate, gate_size, A(-0.0));
      layer_.backward_weights({}, in, output_gradient, saved, deferred_, grads,
                              add ? ts::write::accumulate : ts::write::overwrite);
    });
  }

  void end_step(float rate) override {
    *layer_.state().bias_rate = rate;
    layer_.end_step({}, all_);
  }

  std::span<const std::int64_t> load() const override {
    return {layer_.state().global_load, static_cast<std::size_t>(train_shape_.num_experts)};
  }
  double auxiliary_loss(std::int64_t chunk) const override {
    return auxiliary_[static_cast<std::size_t>(chunk)] / static_cast<double>(num_chunks);
  }
  std::vector<ts::named_array> state() const override {
    const auto arrays = layer_.state().arrays();
    return {arrays.begin(), arrays.end()};
  }

 private:
  static ts::shape sizes_of(const settings& s, std::int64_t max_tokens) {
    return {.num_experts = static_cast<int>(s.experts),
            .top_k = static_cast<int>(s.top_k),
            .hidden = static_cast<int>(s.hidden),
            .intermediate = static_cast<int>(s.intermediate),
            .max_tokens = max_tokens};
  }

  std::int64_t up_size() const { return 2 * intermediate_ * hidden_; }
  std::int64_t down_size() const { return hidden_ * intermediate_; }

  typename layer_type::inputs inputs(std::int64_t rows, const A* x) const {
    return {.x = ts::matrix_view<const A>(x, rows, hidden_)};
  }

  typename layer_type::weights parameters(const A* gate, const expert_tensors<A>& experts) const {
    typename layer_type::weights params;
    params.gate = ts::matrix_view<const A>(gate, train_shape_.num_experts, hidden_);
    params.experts.up = experts.up;
    params.experts.down = experts.down;
    return params;
  }

  /// Calls `f(call, own, rows, first_row)` for each chunk of the group in the global order: `own` is the chunk's number
  /// on this rank, or -1 for another rank's, to whose call this rank brings its experts and no rows.
  template <class F>
  void each_chunk(F&& f) const {
    std::int64_t call = 0;
    for (std::size_t member = 0; member < calls_.chunks.size(); ++member) {
      const bool mine = static_cast<int>(member) == group_.rank();
      for (std::int64_t c = 0; c < calls_.chunks[member]; ++c, ++call) {
        f(call, mine ? c : -1, mine ? calls_.chunk_rows : 0, mine ? c * calls_.chunk_rows : 0);
      }
    }
  }

  std::int64_t hidden_, intermediate_;
  chunk_calls calls_;
  Comm& group_;
  Comm& all_;
  ts::layout::block placement_;
  ts::shape train_shape_, eval_shape_;
  typename layer_type::options train_options_, eval_options_;
  ts::layer_sizes sizes_, eval_sizes_;
  ts::host_buffer state_, deferred_, workspace_;
  std::vector<ts::host_buffer> saved_;  // one for each chunk of the group
  layer_type layer_, eval_layer_;
  std::vector<double> auxiliary_;
};

/// The block that `s` and `balance` ask for: here numbers become types.
template <class A, ts::host_communicator Comm>
std::unique_ptr<moe_block<A>> make_block(const settings& s, balance_kind balance, const chunk_calls& calls, Comm& group,
                                         Comm& all) {
  const auto with_router = [&]<class Router>(const typename Router::options& routing) -> std::unique_ptr<moe_block<A>> {
    if (s.combine == combine_kind::ordered)
      return std::make_unique<layer_block<A, Router, ts::combine::ordered, Comm>>(s, routing, calls, group, all);
    return std::make_unique<layer_block<A, Router, ts::combine::reduced, Comm>>(s, routing, calls, group, all);
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
