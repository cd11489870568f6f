// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The byte-level language model: embedding, blocks of token mixer and mixture of experts, norm, output head.
///
///     x = embedding[byte];  per block: x += mixer(norm(x)), x += moe(norm(x));  logits = norm(x) head^T

#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>

#include "dense.hpp"
#include "mixer.hpp"
#include "moe_block.hpp"
#include "parameter_store.hpp"
#include "parameters.hpp"

namespace train_lm {

/// Sizes of the model.
struct model_shape {
  std::int64_t hidden = 128;    ///< d.
  std::int64_t layers = 2;      ///< Blocks.
  std::int64_t experts = 32;    ///< E per block.
  std::int64_t conv_width = 4;  ///< Length of the mixers' convolution.
  std::int64_t max_rows = 0;    ///< Bound of tokens of this rank in a call.
};

/// Tokens of this rank: `sequences` sequences of `length` each, one after another.
struct batch {
  std::int64_t sequences = 0;             ///< Of this rank; may be 0.
  std::int64_t length = 0;                ///< Tokens of each.
  std::span<const std::uint8_t> tokens;   ///< `[sequences * length]`.
  std::span<const std::int16_t> targets;  ///< The next byte of each token, or `no_target`.
};

/// The model on one rank: its layers and their activations. Parameters come from a `parameter_store`, group by group:
/// the embedding, then of each block its dense tensors and its experts, then the last norm and the head.
template <class A>
class language_model {
 public:
  static constexpr std::int64_t vocabulary = 256;  ///< Bytes.

  /// @param blocks One per layer.
  language_model(const model_shape& shape, std::vector<std::unique_ptr<moe_block<A>>> blocks)
      : shape_(shape), blocks_(std::move(blocks)) {
    TESSERA_EXPECTS(static_cast<std::int64_t>(blocks_.size()) == shape.layers,
                    blocks_.size() << " mixture-of-experts blocks were given for " << shape.layers << " layers");
    const std::int64_t d = shape.hidden;
    const auto elements = static_cast<std::size_t>(shape.max_rows * d);
    embedding_ = open_group("embedding", false).add("embedding", ts::box::whole({vocabulary, d}), true);
    for (std::int64_t l = 0; l < shape.layers; ++l) {
      const std::string name = "block" + std::to_string(l);
      parameter_table& table = open_group(name, false);
      const std::int64_t norm_mixer = table.add(name + ".norm_mixer", d, false);
      layer own{.norm_mixer = norm_mixer,
                .mixer = token_mixer<A>(table, name + ".mixer", d, shape.conv_width, shape.max_rows)};
      own.norm_moe = table.add(name + ".norm_moe", d, false);
      own.gate = table.add(name + ".gate", ts::box::whole({shape.experts, d}), true);
      blocks_[static_cast<std::size_t>(l)]->add_parameters(open_group(name + ".experts", true), name);
      for (auto* buffer : {&own.x_mixer, &own.normed_mixer, &own.x_moe, &own.normed_moe}) buffer->resize(elements);
      for (auto* buffer : {&own.inverse_mixer, &own.inverse_moe})
        buffer->resize(static_cast<std::size_t>(shape.max_rows));
      layers_.push_back(std::move(own));
    }
    parameter_table& tail = open_group("head", false);
    norm_ = tail.add("norm", d, false);
    head_ = tail.add("head", ts::box::whole({vocabulary, d}), true);
    for (auto* buffer : {&x_, &normed_, &delta_, &dx_}) buffer->resize(elements);
    inverse_.resize(static_cast<std::size_t>(shape.max_rows));
    logits_.resize(static_cast<std::size_t>(shape.max_rows * vocabulary));
  }

  /// Initial values of everything, experts included; the same for every mesh. @param set `set(group, i, values)` gets
  /// tensor `i` of a group; of experts, those of this rank.
  template <class Set>
  void initialize(std::uint64_t seed, Set&& set) const {
    const std::int64_t d = shape_.hidden;
    const double depth_scale = 1.0 / std::sqrt(2.0 * static_cast<double>(shape_.layers));
    const double deviation = 1.0 / std::sqrt(static_cast<double>(d));
    const auto each = [&](int group, auto&& fill) {
      const parameter_table& table = groups_[static_cast<std::size_t>(group)].table;
      std::vector<A> values(static_cast<std::size_t>(table.size()));
      fill(table, std::span<A>(values));
      for (std::size_t i = 0; i < table.entries().size(); ++i) {
        const parameter& p = table.entries()[i];
        set(group, static_cast<int>(i),
            std::span<const A>(values.data() + p.offset, static_cast<std::size_t>(p.count)));
      }
    };
    const auto tensor = [](const parameter_table& table, std::span<A> values, std::int64_t offset) {
      return values.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(table.at(offset).count));
    };
    each(0, [&](const parameter_table& table, std::span<A> values) {
      fill_normal(tensor(table, values, embedding_), seed, "embedding", 1.0);
    });
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const layer& own = layers_[l];
      const std::string name = "block" + std::to_string(l);
      each(dense_group(l), [&](const parameter_table& table, std::span<A> values) {
        for (A& gain : tensor(table, values, own.norm_mixer)) gain = 1;
        for (A& gain : tensor(table, values, own.norm_moe)) gain = 1;
        own.mixer.initialize(table, values, seed, depth_scale);
        fill_normal(tensor(table, values, own.gate), seed, name + ".gate", deviation);
      });
      each(expert_group(l), [&](const parameter_table& table, std::span<A> values) {
        blocks_[l]->initialize(seed, name, deviation, depth_scale, values.data() + table.entries()[0].offset,
                               values.data() + table.entries()[1].offset);
      });
    }
    each(tail_group(), [&](const parameter_table& table, std::span<A> values) {
      for (A& gain : tensor(table, values, norm_)) gain = 1;
      fill_normal(tensor(table, values, head_), seed, "head", 0.5 * deviation);
    });
  }

  /// Elements of the recurrent state of a sequence in one layer.
  std::int64_t layer_state_size() const { return layers_.front().mixer.state_size(); }
  /// Elements of the recurrent states of `sequences` sequences, over all layers.
  std::int64_t state_size(std::int64_t sequences) const { return sequences * shape_.layers * layer_state_size(); }

  /// Logits of the next byte, `[rows, 256]`, valid until the next call. @param state `[layers, sequences, …]` of
  /// `state_size(sequences)` elements: what came before, replaced by what comes next.
  std::span<A> forward(parameter_store<A>& store, ts::pass pass, const batch& input, std::span<A> state) {
    const std::int64_t rows = input.sequences * input.length, d = shape_.hidden;
    TESSERA_EXPECTS(rows <= shape_.max_rows,
                    "a batch has " << rows << " tokens on one rank, the model has room for " << shape_.max_rows);
    embedding_forward(input.tokens, d, store.use(0) + embedding_, x_.data());
    store.release(0);
    const std::int64_t layer_state = input.sequences * layer_state_size();
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      layer& own = layers_[l];
      const A* p = store.use(dense_group(l));
      std::copy_n(x_.data(), rows * d, own.x_mixer.data());
      norm_forward(rows, d, x_.data(), p + own.norm_mixer, own.normed_mixer.data(), own.inverse_mixer.data());
      own.mixer.forward(p, input.sequences, input.length, own.normed_mixer.data(), delta_.data(),
                        state.data() + static_cast<std::int64_t>(l) * layer_state);
      add(rows * d, delta_.data(), x_.data());
      std::copy_n(x_.data(), rows * d, own.x_moe.data());
      norm_forward(rows, d, x_.data(), p + own.norm_moe, own.normed_moe.data(), own.inverse_moe.data());
      blocks_[l]->forward(pass, rows, own.normed_moe.data(), p + own.gate, experts(l, store.use(expert_group(l))),
                          delta_.data());
      store.release(expert_group(l));
      store.release(dense_group(l));
      add(rows * d, delta_.data(), x_.data());
    }
    const A* p = store.use(tail_group());
    norm_forward(rows, d, x_.data(), p + norm_, normed_.data(), inverse_.data());
    linear_forward(rows, d, vocabulary, normed_.data(), p + head_, logits_.data());
    store.release(tail_group());
    return {logits_.data(), static_cast<std::size_t>(rows * vocabulary)};
  }

  /// Losses of the last forward in nats, summed per chunk; the logits become their gradient times `gradient_scale`.
  void loss(const batch& input, chunk_offsets chunks, A gradient_scale, double* losses) {
    cross_entropy(chunks, vocabulary, logits_.data(), input.targets, gradient_scale, losses);
  }

  /// Gradients of the last `forward(pass::train)` and `loss`, as one contribution per chunk, reduced group by group.
  void backward(parameter_store<A>& store, const batch& input, chunk_offsets chunks) {
    const std::int64_t rows = input.sequences * input.length, d = shape_.hidden;
    const auto count = static_cast<std::int64_t>(chunks.size()) - 1;
    const std::int64_t gate_size = shape_.experts * d;
    gate_contributions_.resize(static_cast<std::size_t>(count * gate_size));

    const A* p = store.use(tail_group());
    contributions_of<A> to = store.gradients(tail_group());
    linear_backward_weights(chunks, d, vocabulary, normed_.data(), logits_.data(), to.data + head_, to.stride);
    linear_backward_input(rows, d, vocabulary, logits_.data(), p + head_, delta_.data());
    std::fill_n(dx_.data(), rows * d, A(0));
    norm_backward(chunks, d, x_.data(), p + norm_, inverse_.data(), delta_.data(), dx_.data(), to.data + norm_,
                  to.stride);
    store.release(tail_group());
    store.reduce(tail_group());
    for (std::size_t l = layers_.size(); l-- > 0;) {
      layer& own = layers_[l];
      p = store.use(dense_group(l));
      const expert_tensors<A> weights = experts(l, store.use(expert_group(l)));
      to = store.gradients(expert_group(l));
      const parameter_table& table = groups_[static_cast<std::size_t>(expert_group(l))].table;
      blocks_[l]->backward(
          rows, own.normed_moe.data(), dx_.data(), p + own.gate, weights, delta_.data(), gate_contributions_.data(),
          {to.data + table.entries()[0].offset, to.data + table.entries()[1].offset, to.stride, to.count});
      store.release(expert_group(l));
      store.reduce(expert_group(l));

      to = store.gradients(dense_group(l));
      for (std::int64_t c = 0; c < count; ++c)
        std::copy_n(gate_contributions_.data() + c * gate_size, gate_size, to.data + c * to.stride + own.gate);
      norm_backward(chunks, d, own.x_moe.data(), p + own.norm_moe, own.inverse_moe.data(), delta_.data(), dx_.data(),
                    to.data + own.norm_moe, to.stride);
      own.mixer.backward(p, chunks, input.length, own.normed_mixer.data(), dx_.data(), delta_.data(), to.data,
                         to.stride);
      norm_backward(chunks, d, own.x_mixer.data(), p + own.norm_mixer, own.inverse_mixer.data(), delta_.data(),
                    dx_.data(), to.data + own.norm_mixer, to.stride);
      store.release(dense_group(l));
      store.reduce(dense_group(l));
    }
    to = store.gradients(0);
    for (std::int64_t c = 0; c < count; ++c) std::fill_n(to.data + c * to.stride + embedding_, vocabulary * d, A(0));
    embedding_backward(chunks, input.tokens, d, dx_.data(), to.data + embedding_, to.stride);
    store.reduce(0);
  }

  /// The parameters, in the order of forward.
  const std::vector<parameter_group>& groups() const { return groups_; }
  /// The blocks.
  std::span<const std::unique_ptr<moe_block<A>>> blocks() const { return blocks_; }

 private:
  struct layer {
    std::int64_t norm_mixer = 0;
    token_mixer<A> mixer;
    std::int64_t norm_moe = 0;
    std::int64_t gate = 0;
    std::vector<A> x_mixer{}, normed_mixer{}, inverse_mixer{}, x_moe{}, normed_moe{}, inverse_moe{};
  };

  parameter_table& open_group(std::string name, bool of_experts) {
    constexpr auto alignment = static_cast<std::int64_t>(ts::memory_alignment / sizeof(A));
    groups_.push_back({std::move(name), parameter_table(alignment), of_experts});
    return groups_.back().table;
  }

  static int dense_group(std::size_t l) { return static_cast<int>(1 + 2 * l); }
  static int expert_group(std::size_t l) { return static_cast<int>(2 + 2 * l); }
  int tail_group() const { return static_cast<int>(1 + 2 * layers_.size()); }

  expert_tensors<A> experts(std::size_t l, const A* values) const {
    const auto& entries = groups_[static_cast<std::size_t>(expert_group(l))].table.entries();
    return {values + entries[0].offset, values + entries[1].offset};
  }

  static void add(std::int64_t n, const A* from, A* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] += from[i];
  }

  model_shape shape_;
  std::vector<parameter_group> groups_;
  std::int64_t embedding_ = 0, norm_ = 0, head_ = 0;
  std::vector<layer> layers_;
  std::vector<std::unique_ptr<moe_block<A>>> blocks_;
  std::vector<A> x_, normed_, inverse_, logits_, delta_, dx_, gate_contributions_;
};

}  // namespace train_lm
