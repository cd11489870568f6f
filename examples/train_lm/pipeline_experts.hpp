// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A `tessera::moe_layer` of a pipelined model: its parameters lie in a `parameter_block`, its micro-batches are those
/// of the pipeline.

#include <cmath>
#include <cstdint>
#include <span>
#include <string>

#include <tessera/layout/block.hpp>
#include <tessera/moe/moe_layer.hpp>

#include "layers.hpp"
#include "pipeline_parameters.hpp"
#include "settings.hpp"

namespace train_lm {

/// Gate and experts of one layer on one rank of a stage. One type serves every `--balance`: the router has the
/// auxiliary loss and the selection bias, and the coefficient of the one or the rate of the other is 0.
template <class A, ts::host_communicator Comm>
class expert_layer {
 public:
  using router_type = router_with<ts::balance::switch_loss, ts::balance::bias>;  ///< Both kinds of balancing.
  using layer_type = ts::moe_layer<router_type, ts::experts<ts::activation::swiglu, precision_of<A>>, ts::layout::block,
                                   Comm, ts::combine::ordered>;  ///< The layer.

  /// Adds gate and experts to `block` as its last tensors and makes room for its values. @param s Sizes. @param rows
  /// Bound of this rank's tokens in a call. @param micro_batches M. @param comm The stage's ranks. @param name Of the
  /// block. Block and communicator outlive the layer.
  expert_layer(const settings& s, balance_kind balance, std::int64_t rows, int micro_batches, Comm& comm,
               parameter_block<A>& block, const std::string& name)
      : name_(name),
        hidden_(s.hidden),
        intermediate_(s.intermediate),
        micro_batches_(micro_batches),
        bias_moves_(balance == balance_kind::bias),
        placement_(static_cast<int>(s.experts), comm.size()),
        rank_(comm.rank()),
        shape_{.num_experts = static_cast<int>(s.experts),
               .top_k = static_cast<int>(s.top_k),
               .hidden = static_cast<int>(s.hidden),
               .intermediate = static_cast<int>(s.intermediate),
               .max_tokens = rows},
        // Without balancing all tokens may go to one rank: room for that, because a training step must not fail.
        options_{.dispatch = {.row_bound = ts::dispatch_options::full_row_bound}},
        sizes_(layer_type::sizes(shape_, placement_, rank_, options_)),
        state_(sizes_.state_bytes),
        layer_(shape_, routing(s, balance), placement_, comm, state_, options_),
        block_(block) {
    layer_.reset_state({});
    *layer_.state().loss_scale = static_cast<float>(1.0 / static_cast<double>(micro_batches));
    gate_ = block.table.add(name + ".gate", ts::box::whole({s.experts, hidden_}), true);
    block.replicated = block.table.size();
    const std::int64_t slots = placement_.num_slots(rank_);
    up_ = block.table.add(name + ".experts.up", ts::box::whole({s.experts, 2 * intermediate_, hidden_}),
                          slots * up_size(), true);
    down_ = block.table.add(name + ".experts.down", ts::box::whole({s.experts, hidden_, intermediate_}),
                            slots * down_size(), true);
    block.experts = slots;
    block.expert_size = up_size() + down_size();
    block.allocate();
  }

  /// Initial values, keyed by what they are.
  void initialize(std::uint64_t seed, double deviation, double depth_scale) {
    fill_normal(block_.tensor(gate_), seed, name_ + ".gate", deviation);
    for (int slot = 0; slot < placement_.num_slots(rank_); ++slot) {
      const std::string expert = name_ + ".expert" + std::to_string(placement_.expert_at(rank_, slot));
      fill_normal(std::span<A>(block_.at(up_) + slot * up_size(), static_cast<std::size_t>(up_size())), seed,
                  expert + ".up", deviation);
      fill_normal(std::span<A>(block_.at(down_) + slot * down_size(), static_cast<std::size_t>(down_size())), seed,
                  expert + ".down", depth_scale * 2.0 / std::sqrt(static_cast<double>(intermediate_)));
    }
  }

  /// The layer.
  layer_type& layer() { return layer_; }
  /// Its parameters.
  typename layer_type::weights weights() {
    return {.gate = ts::matrix_view<const A>(block_.at(gate_), shape_.num_experts, hidden_),
            .experts = {block_.at(up_), block_.at(down_)}};
  }
  /// Its gradients in an array laid out as the block's values.
  typename layer_type::gradients gradients(A* array) const {
    return {.gate = array + gate_, .experts = {array + up_, array + down_}};
  }

  /// The share of the last micro-batch in the auxiliary loss: its own, over the number of micro-batches.
  double auxiliary_loss() const {
    double sum = 0;
    for (int i = 0; i < layer_type::num_losses; ++i) sum += static_cast<double>(layer_.state().losses[i]);
    return sum / static_cast<double>(micro_batches_);
  }

  /// After the optimizer's step. @param all Every rank that has this layer's tokens.
  void end_step(float rate, Comm& all) {
    *layer_.state().bias_rate = bias_moves_ ? rate : 0.0f;
    layer_.end_step({}, all);
  }
  /// `[E]` pairs of the step that `end_step` has ended, over all ranks.
  std::span<const std::int64_t> load() const {
    return {layer_.state().global_load, static_cast<std::size_t>(shape_.num_experts)};
  }

  /// Bytes of workspace of `evaluate`.
  std::size_t evaluate_bytes() const { return sizes_.eval_workspace_bytes; }
  /// `y [rows, d]` without training.
  void evaluate(std::int64_t rows, const A* x, A* y, ts::workspace_memory workspace) {
    typename layer_type::inputs in;
    in.x = ts::matrix_view<const A>(x, rows, hidden_);
    layer_.forward({}, ts::pass::eval, in, weights(), ts::matrix_view<A>(y, rows, hidden_), {}, workspace);
  }

 private:
  static typename router_type::options routing(const settings& s, balance_kind balance) {
    const double coefficient = balance == balance_kind::loss ? s.loss_coefficient : 0.0;
    return {.balance = {{.coefficient = static_cast<float>(coefficient)}, {}}};
  }
  std::int64_t up_size() const { return 2 * intermediate_ * hidden_; }
  std::int64_t down_size() const { return hidden_ * intermediate_; }

  std::string name_;
  std::int64_t hidden_, intermediate_;
  int micro_batches_;
  bool bias_moves_;
  ts::layout::block placement_;
  int rank_;
  ts::shape shape_;
  typename layer_type::options options_;
  ts::layer_sizes sizes_;
  ts::host_buffer state_;
  layer_type layer_;
  parameter_block<A>& block_;
  std::int64_t gate_ = 0, up_ = 0, down_ = 0;
};

}  // namespace train_lm
