// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// One stage of a pipelined model on one rank: its blocks, their memory, and what the executor runs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <tessera/pipeline/moe_chunk.hpp>
#include <tessera/pipeline/overlap.hpp>

#include "mtp_head.hpp"
#include "pipeline_experts.hpp"
#include "pipeline_parameters.hpp"
#include "pipeline_parts.hpp"
#include "settings.hpp"

namespace train_lm {

/// What a stage is told about its place in the pipeline.
struct stage_place {
  int stage = 0;          ///< Which stage,
  int num_stages = 1;     ///< of how many.
  int micro_batches = 1;  ///< M.
  std::int64_t rows = 0;  ///< Of a micro-batch on this rank.
  int slots = 1;          ///< Micro-batches between forward and weight part, at most.
  int gradient_rows = 1;  ///< Rows of gradients.
  /// First layer of a stage; layers are spread evenly. @param which The stage. @param layers L.
  std::int64_t first_layer(int which, std::int64_t layers) const { return layers * which / num_stages; }
};

/// A `moe_chunk` that keeps the auxiliary losses of every micro-batch, which its layers overwrite.
template <class Chunk, class Experts>
class keeping_chunk : public Chunk {
 public:
  /// @param first Index of the first layer among the blocks. @param experts Of the layers. @param micro_batches M. The
  /// rest goes to the chunk.
  template <class... Arguments>
  keeping_chunk(int first, std::span<const std::unique_ptr<Experts>> experts, int micro_batches,
                Arguments&&... arguments)
      : Chunk(std::forward<Arguments>(arguments)...),
        first_(first),
        experts_(experts),
        auxiliary_(static_cast<std::size_t>(micro_batches) * experts.size()) {}

  /// Rows home, and the losses.
  void forward_combine(const typename Chunk::forward_type& call) {
    Chunk::forward_combine(call);
    const int layer = call.layer - first_;
    if (layer < 0 || layer >= static_cast<int>(experts_.size())) return;
    auxiliary_[static_cast<std::size_t>(call.item.micro_batch) * experts_.size() + static_cast<std::size_t>(layer)] =
        experts_[static_cast<std::size_t>(layer)]->auxiliary_loss();
  }

  /// `[M, layers]`; 0 for micro-batches that pass another place.
  std::span<const double> auxiliary() const { return auxiliary_; }

 private:
  int first_;
  std::span<const std::unique_ptr<Experts>> experts_;
  std::vector<double> auxiliary_;
};

/// The blocks of one stage. @tparam Lanes What runs overlapped pairs.
template <class A, ts::host_communicator Comm, class Lanes>
class pipeline_stage {
 public:
  using experts_type = expert_layer<A, Comm>;                   ///< Experts of a layer.
  using layer_type = typename experts_type::layer_type;         ///< The library's layer.
  using base_chunk = pl::moe_chunk<layer_type, stage_part<A>>;  ///< The library's chunk.
  using chunk_type = keeping_chunk<base_chunk, experts_type>;   ///< The same, with its losses.
  using executed_type = pl::overlap_stage<chunk_type, Lanes>;   ///< What the executor runs.
  static constexpr std::int64_t vocabulary = 256;               ///< Bytes.

  /// @param s Sizes. @param balance What balances the experts. @param at Where. @param text Of the step. @param comm
  /// The stage's ranks; used by the lane that communicates. @param chain_comm The same ranks; used by the chain of
  /// multi-token prediction while a lane communicates. @param lanes Shared by the stages of the rank. @param first The
  /// first stage, where the rank has it too: the chain reads its table. All outlive the stage.
  pipeline_stage(const settings& s, balance_kind balance, const stage_place& at, const step_text& text, Comm& comm,
                 Comm& chain_comm, Lanes& lanes, pipeline_stage* first)
      : s_(s), at_(at), d_(s.hidden) {
    const std::int64_t from = at.first_layer(at.stage, s.layers), to = at.first_layer(at.stage + 1, s.layers);
    const int layers = static_cast<int>(s.layers);
    if (is_first()) embedding_ = std::make_unique<embedding_part<A>>(add_block(0), d_, vocabulary, text);
    for (std::int64_t l = from; l < to; ++l) {
      parameter_block<A>& block = add_block(static_cast<int>(l) + 1);
      const std::string name = "block" + std::to_string(l);
      mixing_.push_back(
          std::make_unique<mixing_part<A>>(block, name, d_, s.length, at.rows, at.micro_batches, at.slots));
      experts_.push_back(std::make_unique<experts_type>(s, balance, at.rows, at.micro_batches, comm, block, name));
    }
    if (is_last()) {
      head_ = std::make_unique<head_part<A>>(add_block(layers + 1), d_, vocabulary, at.rows, at.micro_batches, at.slots,
                                             text);
      if (s.mtp > 0) add_chain(balance, text, chain_comm, first);
    }
    initialize();
    lay_out_gradients();
    build_chunk(lanes);
    const auto elements = static_cast<std::size_t>(at.rows * d_);
    u_.resize(elements);
    y_.resize(elements);
    std::size_t bytes = 0;
    for (const auto& experts : experts_) bytes = std::max(bytes, experts->evaluate_bytes());
    workspace_ = ts::host_buffer(bytes);
  }

  /// What the executor runs.
  executed_type& executed() { return *executed_; }
  /// Which stage it is.
  int index() const { return at_.stage; }
  /// Whether it begins with the embedding.
  bool is_first() const { return at_.stage == 0; }
  /// Whether it ends with the loss.
  bool is_last() const { return at_.stage + 1 == at_.num_stages; }
  /// Its blocks, in the order of the model.
  std::span<const std::unique_ptr<parameter_block<A>>> blocks() const { return blocks_; }
  /// All gradients: `[gradient rows, gradient_size()]`.
  A* gradients() { return gradients_.data(); }
  /// Elements of a row of gradients.
  std::int64_t gradient_size() const { return gradient_size_; }
  /// Experts of its layers.
  std::span<const std::unique_ptr<experts_type>> experts() const { return experts_; }
  /// Of the last stage.
  head_part<A>& head() { return *head_; }
  /// The chain, where it is here.
  mtp_head<A, Comm>* chain() { return chain_.get(); }
  /// `[M, layers]` auxiliary losses of the last step.
  std::span<const double> auxiliary() const { return chunk_->auxiliary(); }
  /// Values of the embedding on the first stage; on the last one those that the chain reads.
  parameter_block<A>& embedding_block() { return is_first() ? *blocks_.front() : *table_copy_; }
  /// Gradients that the chain adds to the embedding.
  parameter_block<A>& chain_embedding_block() { return *table_copy_; }
  /// Whether the chain's table is the first stage's own.
  bool shares_embedding() const { return shares_embedding_; }

  /// Elements of the recurrent states of `sequences` sequences.
  std::int64_t state_size(std::int64_t sequences) const {
    return mixing_.empty() ? 0 : sequences * static_cast<std::int64_t>(mixing_.size()) * mixing_.front()->state_size();
  }

  /// The stage without training. @param tokens `[rows]`, read by the first stage. @param x `[rows, d]`, its output in
  /// place of its input; of the last stage the hidden states before the norm. @param state What came before, replaced
  /// by what comes next. @param logits `[rows, 256]`, written by the last stage.
  void evaluate(std::int64_t sequences, std::int64_t length, std::span<const std::uint8_t> tokens, A* x, A* state,
                A* logits) {
    const std::int64_t rows = sequences * length;
    if (is_first()) embedding_->evaluate(tokens, x);
    for (std::size_t l = 0; l < mixing_.size(); ++l) {
      const std::int64_t size = sequences * mixing_[l]->state_size();
      mixing_[l]->evaluate(sequences, length, x, u_.data(), state + static_cast<std::int64_t>(l) * size);
      experts_[l]->evaluate(rows, u_.data(), y_.data(), workspace_);
      for (std::int64_t i = 0; i < rows * d_; ++i) x[i] += y_[static_cast<std::size_t>(i)];
    }
    if (!is_last()) return;
    std::copy_n(x, rows * d_, u_.data());
    head_->evaluate(rows, u_.data(), logits);
  }

 private:
  parameter_block<A>& add_block(int place) {
    blocks_.push_back(std::make_unique<parameter_block<A>>());
    blocks_.back()->place = place;
    return *blocks_.back();
  }

  void add_chain(balance_kind balance, const step_text& text, Comm& comm, pipeline_stage* first) {
    std::vector<parameter_block<A>*> own;
    const int layers = static_cast<int>(s_.layers);
    table_copy_ = &add_block(-1);  // its gradient belongs to the embedding
    table_copy_->table.add("embedding", ts::box::whole({vocabulary, d_}), true);
    table_copy_->replicated = table_copy_->table.size();
    pipeline_stage* owner = is_first() ? this : first;
    shares_embedding_ = owner != nullptr;
    if (!shares_embedding_) table_copy_->allocate();
    own.push_back(table_copy_);
    for (int k = 0; k < s_.mtp; ++k) own.push_back(&add_block(layers + 2 + k));
    const A* table = shares_embedding_ ? owner->blocks_.front()->values.data() : table_copy_->values.data();
    chain_ = std::make_unique<mtp_head<A, Comm>>(s_, balance, at_.rows, at_.micro_batches, at_.slots, own, table,
                                                 head_->matrix(), text, comm);
    head_->attach(*chain_);
  }

  void initialize() {
    const double depth_scale = 1.0 / std::sqrt(2.0 * static_cast<double>(s_.layers));
    const double deviation = 1.0 / std::sqrt(static_cast<double>(d_));
    for (const auto& block : blocks_) {
      block->means.assign(block->values.size(), A(0));
      block->squares.assign(block->values.size(), A(0));
    }
    if (is_first()) fill_normal(std::span<A>(blocks_.front()->values), s_.seed, "embedding", 1.0);
    for (auto& part : mixing_) part->initialize(s_.seed, depth_scale);
    for (auto& experts : experts_) experts->initialize(s_.seed, deviation, depth_scale);
    if (head_ != nullptr) head_->initialize(s_.seed, deviation);
    if (chain_ == nullptr) return;
    chain_->initialize(s_.seed, deviation, depth_scale);
    if (!shares_embedding_) fill_normal(std::span<A>(table_copy_->values), s_.seed, "embedding", 1.0);
  }

  void lay_out_gradients() {
    for (const auto& block : blocks_) gradient_size_ += block->table.size();
    gradients_.assign(static_cast<std::size_t>(at_.gradient_rows * gradient_size_), A(0));
    A* place = gradients_.data();
    for (const auto& block : blocks_) {
      block->gradients = place;
      block->stride = gradient_size_;
      place += block->table.size();
    }
  }

  void build_chunk(Lanes& lanes) {
    std::vector<typename base_chunk::block> list;
    if (embedding_ != nullptr) list.push_back({.before = embedding_.get()});
    const auto first = list.size();
    layer_gradients_.resize(experts_.size());
    for (std::size_t l = 0; l < experts_.size(); ++l) {
      parameter_block<A>& block = *blocks_[first + l];
      for (int r = 0; r < at_.gradient_rows; ++r) layer_gradients_[l].push_back(experts_[l]->gradients(block.row(r)));
      list.push_back({.before = mixing_[l].get(),
                      .layer = &experts_[l]->layer(),
                      .weights = experts_[l]->weights(),
                      .gradients = layer_gradients_[l]});
    }
    if (head_ != nullptr) list.push_back({.before = head_.get()});
    const auto sizes = base_chunk::sizes(list, at_.rows, d_, at_.slots);
    saved_ = ts::host_buffer(sizes.saved_bytes);
    deferred_ = ts::host_buffer(sizes.deferred_bytes);
    chunk_workspace_ = ts::host_buffer(sizes.workspace_bytes);
    chunk_ =
        std::make_unique<chunk_type>(static_cast<int>(first), std::span<const std::unique_ptr<experts_type>>(experts_),
                                     at_.micro_batches, std::span<const typename base_chunk::block>(list), at_.rows, d_,
                                     at_.slots, saved_, deferred_, chunk_workspace_);
    executed_ = std::make_unique<executed_type>(*chunk_, lanes);
  }

  const settings& s_;
  stage_place at_;
  std::int64_t d_;
  std::vector<std::unique_ptr<parameter_block<A>>> blocks_;
  parameter_block<A>* table_copy_ = nullptr;
  bool shares_embedding_ = false;
  std::unique_ptr<embedding_part<A>> embedding_;
  std::vector<std::unique_ptr<mixing_part<A>>> mixing_;
  std::vector<std::unique_ptr<experts_type>> experts_;
  std::unique_ptr<head_part<A>> head_;
  std::unique_ptr<mtp_head<A, Comm>> chain_;
  std::int64_t gradient_size_ = 0;
  std::vector<A> gradients_;
  std::vector<std::vector<typename layer_type::gradients>> layer_gradients_;
  ts::host_buffer saved_, deferred_, chunk_workspace_, workspace_;
  std::unique_ptr<chunk_type> chunk_;
  std::unique_ptr<executed_type> executed_;
  std::vector<A> u_, y_;
};

}  // namespace train_lm
