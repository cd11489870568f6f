// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Multi-token prediction behind the main model, on the last stage: `tessera::mtp::chain` with a mixture of experts of
/// its own at every depth.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <tessera/mtp/mtp.hpp>
#include <tessera/pipeline/stage.hpp>

#include "pipeline_experts.hpp"
#include "pipeline_parameters.hpp"
#include "settings.hpp"

namespace train_lm {

namespace mtp = tessera::mtp;

/// What the head's block of a stage calls for each micro-batch, beside its own work.
template <class A>
class mtp_part {
 public:
  virtual ~mtp_part() = default;
  /// Losses of all depths. @param hidden `[rows, d]` of the main model before its last norm.
  virtual void forward(const tessera::pipeline::work_item& item, ts::matrix_view<const A> hidden) = 0;
  /// Adds the gradient of `hidden` to `gradient [rows, d]`.
  virtual void backward_input(const tessera::pipeline::work_item& item, ts::matrix_view<const A> hidden,
                              ts::matrix_view<A> gradient) = 0;
  /// Gradients of the depths; adds that of the head to `head [V, d]`, the main model's contribution.
  virtual void backward_weights(const tessera::pipeline::work_item& item, ts::matrix_view<const A> hidden, A* head) = 0;
};

/// The chain on one rank of the last stage.
template <class A, ts::host_communicator Comm>
class mtp_head final : public mtp_part<A> {
 public:
  using layer_type = typename expert_layer<A, Comm>::layer_type;  ///< Experts of a depth.
  using precision = precision_of<A>;                              ///< Element types.

  /// @param s Sizes. @param balance What balances the experts. @param rows Of a micro-batch on this rank. @param
  /// micro_batches M. @param slots Places. @param blocks `[1 + D]`: a copy of the embedding where only its gradients
  /// count, then the depths; empty ones, which get their tensors. @param embedding `[V, d]` values. @param head `[V,
  /// d]` values. @param text Of the step. @param comm The stage's ranks, nobody else's communicator. All outlive this.
  mtp_head(const settings& s, balance_kind balance, std::int64_t rows, int micro_batches, int slots,
           std::span<parameter_block<A>* const> blocks, const A* embedding, const A* head, const step_text& text,
           Comm& comm)
      : blocks_(blocks.begin(), blocks.end()),
        rows_(rows),
        length_(s.length),
        table_gradient_(static_cast<std::size_t>(vocabulary * s.hidden)),
        head_gradient_(table_gradient_.size()),
        embedding_(vocabulary, s.hidden, {embedding, table_gradient_.data(), 0}),
        head_(s.hidden, vocabulary, {head, head_gradient_.data(), 0}) {
    const auto depths = static_cast<std::size_t>(s.mtp);
    std::vector<typename chain_type::parts> parts;
    for (std::size_t k = 0; k < depths; ++k) {
      depths_.push_back(std::make_unique<depth>(*blocks_[k + 1], s, balance, rows, micro_batches, comm,
                                                "mtp" + std::to_string(k + 1)));
      depth& own = *depths_.back();
      parts.push_back({&own.hidden_norm, &own.embedding_norm, &own.projection, &own.block, &own.output_norm});
    }
    chain_ =
        std::make_unique<chain_type>(mtp::chain_shape{.hidden = s.hidden, .max_rows = rows}, parts, embedding_, head_);
    workspace_ = ts::host_buffer(std::max(chain_->sizes().workspace_bytes, chain_->sizes().eval_workspace_bytes));
    for (int i = 0; i < slots; ++i) {
      saved_.emplace_back(chain_->sizes().saved_bytes);
      deferred_.emplace_back(chain_->sizes().deferred_bytes);
    }
    token_ids_.resize(static_cast<std::size_t>(micro_batches * rows));
    targets_.resize(token_ids_.size());
    for (std::int64_t r = 0; r <= rows; r += length_) sequences_.push_back(static_cast<std::int32_t>(r));
    losses_.resize(static_cast<std::size_t>(micro_batches) * depths);
    auxiliary_.resize(losses_.size());
    factors_.resize(depths);
    text_ = &text;
  }

  /// Initial values of the depths.
  void initialize(std::uint64_t seed, double deviation, double depth_scale) {
    for (auto& own : depths_) own->initialize(seed, deviation, depth_scale);
  }

  /// Before a step: reads the text and sets the factor of each depth's loss. @param factors `[D]`.
  void begin_step(std::span<const double> factors) {
    std::copy(text_->tokens.begin(), text_->tokens.end(), token_ids_.begin());
    std::copy(text_->targets.begin(), text_->targets.end(), targets_.begin());
    std::copy(factors.begin(), factors.end(), factors_.begin());
    std::fill(losses_.begin(), losses_.end(), 0.0);
    std::fill(auxiliary_.begin(), auxiliary_.end(), 0.0);
  }
  /// `[M, D]` sums of losses of the last step in nats; 0 for micro-batches that pass another place.
  std::span<const double> losses() const { return losses_; }
  /// `[M, D]` auxiliary losses of the depths' routers.
  std::span<const double> auxiliary() const { return auxiliary_; }
  /// Experts of a depth. @param k From 0.
  expert_layer<A, Comm>& experts(int k) { return depths_[static_cast<std::size_t>(k)]->experts; }

  void forward(const tessera::pipeline::work_item& item, ts::matrix_view<const A> hidden) override {
    const auto first = static_cast<std::size_t>(item.micro_batch) * depths_.size();
    chain_->forward({}, ts::pass::train, batch_of(item), hidden, std::span(losses_).subspan(first, depths_.size()),
                    saved_[static_cast<std::size_t>(item.slot)], workspace_);
    for (std::size_t k = 0; k < depths_.size(); ++k) auxiliary_[first + k] = depths_[k]->experts.auxiliary_loss();
  }

  void backward_input(const tessera::pipeline::work_item& item, ts::matrix_view<const A> hidden,
                      ts::matrix_view<A> gradient) override {
    const auto slot = static_cast<std::size_t>(item.slot);
    chain_->backward_input({}, batch_of(item), hidden, factors_, gradient, ts::write::accumulate, saved_[slot],
                           deferred_[slot], workspace_);
  }

  void backward_weights(const tessera::pipeline::work_item& item, ts::matrix_view<const A> hidden, A* head) override {
    const auto slot = static_cast<std::size_t>(item.slot);
    std::fill(table_gradient_.begin(), table_gradient_.end(), A(0));
    std::fill(head_gradient_.begin(), head_gradient_.end(), A(0));
    chain_->backward_weights({}, batch_of(item), hidden, factors_, ts::write::overwrite, saved_[slot], deferred_[slot],
                             workspace_);
    for (std::size_t i = 0; i < head_gradient_.size(); ++i) head[i] += head_gradient_[i];
    contribute(static_cast<std::int64_t>(table_gradient_.size()), table_gradient_.data(), item.gradient_mode,
               blocks_.front()->row(item.gradient_row));
    for (std::size_t k = 0; k < depths_.size(); ++k)
      contribute(blocks_[k + 1]->table.size(), depths_[k]->contribution.data(), item.gradient_mode,
                 blocks_[k + 1]->row(item.gradient_row));
  }

  /// Proposes bytes. Blocks do not mix rows, so the last row alone gives what all of them would. @param hidden `[n,
  /// d]`, n 1, or 0 on a rank that only brings its experts. @param tokens `[n + 1]`: the row's byte and the one chosen
  /// after it; empty for n = 0. @param drafts What may follow.
  void draft(ts::matrix_view<const A> hidden, std::span<const std::int32_t> tokens, std::span<std::int32_t> drafts) {
    chain_->draft({}, hidden, tokens, {}, drafts, workspace_);
  }

 private:
  static constexpr std::int64_t vocabulary = 256;
  using norm_type = mtp::rms_norm<precision>;
  using linear_type = mtp::linear<precision, ts::gemm::reference>;
  using head_type = mtp::softmax_head<precision, ts::gemm::reference>;
  using embedding_type = mtp::token_embedding<precision>;
  using block_type = mtp::residual_moe<layer_type, norm_type>;
  using chain_type =
      mtp::chain<block_type, precision, mtp::concat::hidden_first, embedding_type, head_type, norm_type, linear_type>;

  /// Where the tensors of a depth lie.
  struct places {
    std::int64_t hidden_norm, embedding_norm, projection, output_norm, norm_moe;
    places(parameter_table& table, const std::string& name, std::int64_t d)
        : hidden_norm(table.add(name + ".hidden_norm", d, false)),
          embedding_norm(table.add(name + ".embedding_norm", d, false)),
          projection(table.add(name + ".projection", ts::box::whole({d, 2 * d}), true)),
          output_norm(table.add(name + ".output_norm", d, false)),
          norm_moe(table.add(name + ".norm_moe", d, false)) {}
  };

  /// What a depth owns.
  struct depth {
    depth(parameter_block<A>& tensors, const settings& s, balance_kind balance, std::int64_t rows, int micro_batches,
          Comm& comm, const std::string& name_)
        : name(name_),
          params(tensors),
          at(tensors.table, name, s.hidden),
          experts(s, balance, rows, micro_batches, comm, tensors, name),
          contribution(tensors.values.size()),
          hidden_norm(s.hidden, tensor(at.hidden_norm)),
          embedding_norm(s.hidden, tensor(at.embedding_norm)),
          output_norm(s.hidden, tensor(at.output_norm)),
          norm_moe(s.hidden, tensor(at.norm_moe)),
          projection(2 * s.hidden, s.hidden, tensor(at.projection)),
          block(experts.layer(), norm_moe, experts.weights(), experts.gradients(contribution.data())) {}

    mtp::parameter<A, A> tensor(std::int64_t offset) { return {params.at(offset), contribution.data() + offset, 0}; }

    void initialize(std::uint64_t seed, double deviation, double depth_scale) {
      for (const std::int64_t gain : {at.hidden_norm, at.embedding_norm, at.output_norm, at.norm_moe})
        for (A& value : params.tensor(gain)) value = 1;
      fill_normal(params.tensor(at.projection), seed, name + ".projection", deviation * std::sqrt(0.5));
      experts.initialize(seed, deviation, depth_scale);
    }

    std::string name;
    parameter_block<A>& params;
    places at;
    expert_layer<A, Comm> experts;  // its constructor ends the table and makes room for the values
    std::vector<A> contribution;    // of one micro-batch, laid out as the values
    norm_type hidden_norm, embedding_norm, output_norm, norm_moe;
    linear_type projection;
    block_type block;
  };

  mtp::batch batch_of(const tessera::pipeline::work_item& item) const {
    const auto first = static_cast<std::size_t>(item.micro_batch * rows_), count = static_cast<std::size_t>(rows_);
    return {.token_ids = std::span(token_ids_).subspan(first, count),
            .targets = std::span(targets_).subspan(first, count),
            .sequence_offsets = sequences_};
  }

  std::vector<parameter_block<A>*> blocks_;
  std::int64_t rows_, length_;
  std::vector<A> table_gradient_, head_gradient_;
  embedding_type embedding_;
  head_type head_;
  std::vector<std::unique_ptr<depth>> depths_;
  std::unique_ptr<chain_type> chain_;
  ts::host_buffer workspace_;
  std::vector<ts::host_buffer> saved_, deferred_;
  std::vector<std::int32_t> token_ids_, targets_, sequences_;
  std::vector<double> losses_, auxiliary_, factors_;
  const step_text* text_;
};

}  // namespace train_lm
