// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What stands before the experts in each block of a pipelined model: the embedding, norm and token mixer of a layer,
/// norm, head and loss. These are the mixers of `tessera::pipeline::moe_chunk`, and compute what language_model does.

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <tessera/pipeline/stage.hpp>

#include "dense.hpp"
#include "mixer.hpp"
#include "mtp_head.hpp"
#include "pipeline_parameters.hpp"

namespace train_lm {

namespace pl = tessera::pipeline;

/// The part of a block that is not experts. Micro-batches overlap in time, so what is kept from forward to backward
/// lies in places, by `work_item::slot`.
template <class A>
class stage_part {
 public:
  using view = ts::matrix_view<A>;              ///< Rows that are written.
  using const_view = ts::matrix_view<const A>;  ///< Rows that are read.

  virtual ~stage_part() = default;
  /// As `pipeline::mixer_has_forward`.
  virtual void forward(ts::host_stream, const pl::work_item& item, const_view x, view h, view u) = 0;
  /// As `pipeline::mixer_has_backward_input`.
  virtual void backward_input(ts::host_stream, const pl::work_item& item, const_view x, const_view dh, const_view du,
                              view dx) = 0;
  /// As `pipeline::mixer_has_backward_weights`.
  virtual void backward_weights(ts::host_stream, const pl::work_item& item, const_view x, const_view dh,
                                const_view du) = 0;
};

/// The first block: bytes to rows.
template <class A>
class embedding_part final : public stage_part<A> {
 public:
  using typename stage_part<A>::view;
  using typename stage_part<A>::const_view;

  /// Adds the table to `block`. @param hidden d. @param text Of the step; outlives the part, as `block` does.
  embedding_part(parameter_block<A>& block, std::int64_t hidden, std::int64_t vocabulary, const step_text& text)
      : block_(block), d_(hidden), text_(text) {
    block.table.add("embedding", ts::box::whole({vocabulary, hidden}), true);
    block.replicated = block.table.size();
    block.allocate();
    contribution_.resize(block.values.size());
  }

  void forward(ts::host_stream, const pl::work_item& item, const_view, view h, view) override {
    evaluate(text_.tokens_of(item.micro_batch).first(static_cast<std::size_t>(item.rows)), h.data);
  }
  void backward_input(ts::host_stream, const pl::work_item&, const_view, const_view, const_view, view) override {}
  void backward_weights(ts::host_stream, const pl::work_item& item, const_view, const_view dh, const_view) override {
    const std::int32_t chunks[] = {0, static_cast<std::int32_t>(item.rows)};
    std::fill(contribution_.begin(), contribution_.end(), A(0));
    embedding_backward(chunks, text_.tokens_of(item.micro_batch), d_, dh.data, contribution_.data(), 0);
    contribute(block_.table.size(), contribution_.data(), item.gradient_mode, block_.row(item.gradient_row));
  }

  /// Rows of any bytes, without training. @param x `[tokens, d]`.
  void evaluate(std::span<const std::uint8_t> tokens, A* x) const {
    embedding_forward(tokens, d_, block_.values.data(), x);
  }

 private:
  parameter_block<A>& block_;
  std::int64_t d_;
  const step_text& text_;
  std::vector<A> contribution_;
};

/// A layer up to its experts: `h = x + mixer(norm(x))`, `u = norm(h)`.
template <class A>
class mixing_part final : public stage_part<A> {
 public:
  using typename stage_part<A>::view;
  using typename stage_part<A>::const_view;

  /// Adds norms and mixer to `block`, which outlives the part. @param name Of the block. @param hidden d. @param length
  /// Tokens of a sequence. @param rows Of a micro-batch on this rank. @param micro_batches M. @param slots Places.
  mixing_part(parameter_block<A>& block, const std::string& name, std::int64_t hidden, std::int64_t length,
              std::int64_t rows, int micro_batches, int slots)
      : block_(block),
        d_(hidden),
        length_(length),
        sequences_(rows / length),
        norm_mixer_(block.table.add(name + ".norm_mixer", hidden, false)),
        mixer_(block.table, name + ".mixer", hidden, 4, rows),
        norm_moe_(block.table.add(name + ".norm_moe", hidden, false)),
        own_size_(block.table.size()) {
    const auto elements = static_cast<std::size_t>(rows * d_);
    for (int s = 0; s < slots; ++s) {
      places_.push_back({.mixer = mixer_});
      place& own = places_.back();
      for (auto* buffer : {&own.normed, &own.h, &own.dmixed}) buffer->resize(elements);
      for (auto* buffer : {&own.inverse_mixer, &own.inverse_moe}) buffer->resize(static_cast<std::size_t>(rows));
      own.contribution.resize(static_cast<std::size_t>(own_size_));
    }
    inverse_.resize(static_cast<std::size_t>(rows));
    delta_.resize(elements);
    states_.assign(static_cast<std::size_t>(micro_batches * sequences_ * state_size()), A(0));
  }

  /// Initial values, those of language_model.
  void initialize(std::uint64_t seed, double depth_scale) {
    for (A& gain : block_.tensor(norm_mixer_)) gain = 1;
    for (A& gain : block_.tensor(norm_moe_)) gain = 1;
    mixer_.initialize(block_.table, block_.values, seed, depth_scale);
  }

  void forward(ts::host_stream, const pl::work_item& item, const_view x, view h, view u) override {
    place& own = of(item);
    const std::int64_t n = item.rows;
    norm_forward(n, d_, x.data, block_.at(norm_mixer_), own.normed.data(), own.inverse_mixer.data());
    own.mixer.forward(block_.values.data(), n / length_, length_, own.normed.data(), h.data,
                      states_.data() + item.micro_batch * sequences_ * state_size());
    for (std::int64_t i = 0; i < n * d_; ++i) h.data[i] = x.data[i] + h.data[i];
    std::copy_n(h.data, n * d_, own.h.data());
    norm_forward(n, d_, h.data, block_.at(norm_moe_), u.data, own.inverse_moe.data());
  }

  void backward_input(ts::host_stream, const pl::work_item& item, const_view x, const_view dh, const_view du,
                      view dx) override {
    place& own = of(item);
    const std::int32_t chunks[] = {0, static_cast<std::int32_t>(item.rows)};
    A* to = own.contribution.data();
    std::copy_n(dh.data, item.rows * d_, own.dmixed.data());
    norm_backward(chunks, d_, own.h.data(), block_.at(norm_moe_), own.inverse_moe.data(), du.data, own.dmixed.data(),
                  to + norm_moe_, 0);
    own.mixer.backward_input(block_.values.data(), chunks, length_, own.dmixed.data(), delta_.data(), to, 0);
    std::copy_n(own.dmixed.data(), item.rows * d_, dx.data);
    norm_backward(chunks, d_, x.data, block_.at(norm_mixer_), own.inverse_mixer.data(), delta_.data(), dx.data,
                  to + norm_mixer_, 0);
  }

  void backward_weights(ts::host_stream, const pl::work_item& item, const_view, const_view, const_view) override {
    place& own = of(item);
    const std::int32_t chunks[] = {0, static_cast<std::int32_t>(item.rows)};
    own.mixer.backward_weights(chunks, own.normed.data(), own.dmixed.data(), own.contribution.data(), 0);
    contribute(own_size_, own.contribution.data(), item.gradient_mode, block_.row(item.gradient_row));
  }

  /// Elements of the state of one sequence.
  std::int64_t state_size() const { return mixer_.state_size(); }

  /// The layer up to its experts, without training. @param x `[rows, d]`, becomes h. @param u `[rows, d]`. @param state
  /// `[sequences, state_size()]`: what came before, replaced by what comes next.
  void evaluate(std::int64_t sequences, std::int64_t length, A* x, A* u, A* state) {
    const std::int64_t n = sequences * length;
    norm_forward(n, d_, x, block_.at(norm_mixer_), u, inverse_.data());
    mixer_.forward(block_.values.data(), sequences, length, u, delta_.data(), state);
    for (std::int64_t i = 0; i < n * d_; ++i) x[i] += delta_[static_cast<std::size_t>(i)];
    norm_forward(n, d_, x, block_.at(norm_moe_), u, inverse_.data());
  }

 private:
  struct place {
    token_mixer<A> mixer;
    std::vector<A> normed{}, h{}, dmixed{}, inverse_mixer{}, inverse_moe{}, contribution{};
  };

  place& of(const pl::work_item& item) { return places_[static_cast<std::size_t>(item.slot)]; }

  parameter_block<A>& block_;
  std::int64_t d_, length_, sequences_, norm_mixer_;
  token_mixer<A> mixer_;
  std::int64_t norm_moe_, own_size_;
  std::vector<place> places_;
  std::vector<A> inverse_, delta_, states_;
};

/// The last block: norm, head and loss, and the chain of multi-token prediction where there is one.
template <class A>
class head_part final : public stage_part<A> {
 public:
  using typename stage_part<A>::view;
  using typename stage_part<A>::const_view;

  /// Adds norm and head to `block`, which outlives the part. @param hidden d. @param vocabulary V. @param rows Of a
  /// micro-batch on this rank. @param micro_batches M. @param slots Places. @param text Of the step; outlives the part.
  head_part(parameter_block<A>& block, std::int64_t hidden, std::int64_t vocabulary, std::int64_t rows,
            int micro_batches, int slots, const step_text& text)
      : block_(block),
        d_(hidden),
        vocabulary_(vocabulary),
        text_(text),
        norm_(block.table.add("norm", hidden, false)),
        head_(block.table.add("head", ts::box::whole({vocabulary, hidden}), true)) {
    block.replicated = block.table.size();
    block.allocate();
    for (int s = 0; s < slots; ++s) {
      places_.emplace_back();
      place& own = places_.back();
      own.normed.resize(static_cast<std::size_t>(rows * d_));
      own.inverse.resize(static_cast<std::size_t>(rows));
      own.logits.resize(static_cast<std::size_t>(rows * vocabulary));
      own.contribution.resize(block.values.size());
    }
    losses_.resize(static_cast<std::size_t>(micro_batches));
    delta_.resize(static_cast<std::size_t>(rows * d_));
    inverse_.resize(static_cast<std::size_t>(rows));
  }

  /// Initial values, those of language_model.
  void initialize(std::uint64_t seed, double deviation) {
    for (A& gain : block_.tensor(norm_)) gain = 1;
    fill_normal(block_.tensor(head_), seed, "head", 0.5 * deviation);
  }

  /// The head's matrix.
  A* matrix() { return block_.at(head_); }
  /// What runs behind the main model. @param chain Outlives the part.
  void attach(mtp_part<A>& chain) { chain_ = &chain; }
  /// Factor of each byte's loss in the step's.
  void set_gradient_scale(A scale) { scale_ = scale; }
  /// Sums of losses of the last step, by micro-batch; 0 for those that pass another place.
  std::span<double> losses() { return losses_; }

  void forward(ts::host_stream, const pl::work_item& item, const_view x, view, view) override {
    place& own = of(item);
    const std::int32_t chunks[] = {0, static_cast<std::int32_t>(item.rows)};
    norm_forward(item.rows, d_, x.data, block_.at(norm_), own.normed.data(), own.inverse.data());
    linear_forward(item.rows, d_, vocabulary_, own.normed.data(), matrix(), own.logits.data());
    cross_entropy(chunks, vocabulary_, own.logits.data(), text_.targets_of(item.micro_batch), scale_,
                  &losses_[static_cast<std::size_t>(item.micro_batch)]);
    if (chain_ != nullptr) chain_->forward(item, x);
  }

  void backward_input(ts::host_stream, const pl::work_item& item, const_view x, const_view, const_view,
                      view dx) override {
    place& own = of(item);
    const std::int32_t chunks[] = {0, static_cast<std::int32_t>(item.rows)};
    linear_backward_input(item.rows, d_, vocabulary_, own.logits.data(), matrix(), delta_.data());
    std::fill_n(dx.data, item.rows * d_, A(0));
    norm_backward(chunks, d_, x.data, block_.at(norm_), own.inverse.data(), delta_.data(), dx.data,
                  own.contribution.data() + norm_, 0);
    if (chain_ != nullptr) chain_->backward_input(item, x, dx);
  }

  void backward_weights(ts::host_stream, const pl::work_item& item, const_view x, const_view, const_view) override {
    place& own = of(item);
    const std::int32_t chunks[] = {0, static_cast<std::int32_t>(item.rows)};
    linear_backward_weights(chunks, d_, vocabulary_, own.normed.data(), own.logits.data(),
                            own.contribution.data() + head_, 0);
    if (chain_ != nullptr) chain_->backward_weights(item, x, own.contribution.data() + head_);
    contribute(block_.table.size(), own.contribution.data(), item.gradient_mode, block_.row(item.gradient_row));
  }

  /// Logits without training. @param x `[rows, d]`, replaced by its norm. @param logits `[rows, V]`.
  void evaluate(std::int64_t rows, A* x, A* logits) {
    norm_forward(rows, d_, x, block_.at(norm_), x, inverse_.data());
    linear_forward(rows, d_, vocabulary_, x, matrix(), logits);
  }

 private:
  struct place {
    std::vector<A> normed, inverse, logits, contribution;
  };

  place& of(const pl::work_item& item) { return places_[static_cast<std::size_t>(item.slot)]; }

  parameter_block<A>& block_;
  std::int64_t d_, vocabulary_;
  const step_text& text_;
  std::int64_t norm_, head_;
  mtp_part<A>* chain_ = nullptr;
  A scale_ = 0;
  std::vector<place> places_;
  std::vector<double> losses_;
  std::vector<A> delta_, inverse_;
};

}  // namespace train_lm
