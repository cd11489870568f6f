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

#include "dense.hpp"
#include "mixer.hpp"
#include "moe_block.hpp"
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

/// The model on one rank: replicated parameters in one flat array, and this rank's experts in its blocks.
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
    embedding_ = table_.add("embedding", vocabulary * d, true);
    for (std::int64_t l = 0; l < shape.layers; ++l) {
      const std::string name = "block" + std::to_string(l);
      layer own{.norm_mixer = table_.add(name + ".norm_mixer", d, false),
                .mixer = token_mixer<A>(table_, name + ".mixer", d, shape.conv_width, shape.max_rows),
                .norm_moe = table_.add(name + ".norm_moe", d, false)};
      own.gate_index = gates_.add(name + ".gate", shape.experts * d, true);
      for (auto* buffer : {&own.x_mixer, &own.normed_mixer, &own.x_moe, &own.normed_moe}) buffer->resize(elements);
      for (auto* buffer : {&own.inverse_mixer, &own.inverse_moe})
        buffer->resize(static_cast<std::size_t>(shape.max_rows));
      layers_.push_back(std::move(own));
    }
    norm_ = table_.add("norm", d, false);
    head_ = table_.add("head", vocabulary * d, true);
    for (auto* buffer : {&x_, &normed_, &delta_, &dx_}) buffer->resize(elements);
    inverse_.resize(static_cast<std::size_t>(shape.max_rows));
    logits_.resize(static_cast<std::size_t>(shape.max_rows * vocabulary));
    parameters_.resize(static_cast<std::size_t>(table_.size()));
    gate_parameters_.resize(static_cast<std::size_t>(gates_.size()));
  }

  /// Initial values of everything, experts included; the same for every rank count.
  void initialize(std::uint64_t seed) {
    const std::int64_t d = shape_.hidden;
    const double depth_scale = 1.0 / std::sqrt(2.0 * static_cast<double>(shape_.layers));
    const double deviation = 1.0 / std::sqrt(static_cast<double>(d));
    const auto tensor = [&](std::int64_t offset, std::int64_t count) {
      return std::span<A>(parameters_).subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(count));
    };
    fill_normal(tensor(embedding_, vocabulary * d), seed, "embedding", 1.0);
    fill_normal(tensor(head_, vocabulary * d), seed, "head", 0.5 * deviation);
    for (A& gain : tensor(norm_, d)) gain = 1;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      layer& own = layers_[l];
      const std::string name = "block" + std::to_string(l);
      for (A& gain : tensor(own.norm_mixer, d)) gain = 1;
      for (A& gain : tensor(own.norm_moe, d)) gain = 1;
      own.mixer.initialize(table_, parameters_, seed, depth_scale);
      fill_normal(std::span<A>(gate(l), static_cast<std::size_t>(shape_.experts * d)), seed, name + ".gate", deviation);
      blocks_[l]->initialize(seed, name, deviation, depth_scale);
    }
  }

  /// Elements of the recurrent states of `sequences` sequences, over all layers.
  std::int64_t state_size(std::int64_t sequences) const {
    return sequences * shape_.layers * layers_.front().mixer.state_size();
  }

  /// Logits of the next byte, `[rows, 256]`, valid until the next call. @param state `[layers, sequences, …]` of
  /// `state_size(sequences)` elements: what came before, replaced by what comes next.
  std::span<A> forward(ts::pass pass, const batch& input, std::span<A> state) {
    const std::int64_t rows = input.sequences * input.length, d = shape_.hidden;
    TESSERA_EXPECTS(rows <= shape_.max_rows,
                    "a batch has " << rows << " tokens on one rank, the model has room for " << shape_.max_rows);
    const A* p = parameters_.data();
    embedding_forward(input.tokens, d, p + embedding_, x_.data());
    const std::int64_t layer_state = input.sequences * layers_.front().mixer.state_size();
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      layer& own = layers_[l];
      std::copy_n(x_.data(), rows * d, own.x_mixer.data());
      norm_forward(rows, d, x_.data(), p + own.norm_mixer, own.normed_mixer.data(), own.inverse_mixer.data());
      own.mixer.forward(p, input.sequences, input.length, own.normed_mixer.data(), delta_.data(),
                        state.data() + static_cast<std::int64_t>(l) * layer_state);
      add(rows * d, delta_.data(), x_.data());
      std::copy_n(x_.data(), rows * d, own.x_moe.data());
      norm_forward(rows, d, x_.data(), p + own.norm_moe, own.normed_moe.data(), own.inverse_moe.data());
      blocks_[l]->forward(pass, rows, own.normed_moe.data(), gate(l), delta_.data());
      add(rows * d, delta_.data(), x_.data());
    }
    norm_forward(rows, d, x_.data(), p + norm_, normed_.data(), inverse_.data());
    linear_forward(rows, d, vocabulary, normed_.data(), p + head_, logits_.data());
    return {logits_.data(), static_cast<std::size_t>(rows * vocabulary)};
  }

  /// Losses of the last forward in nats, summed per chunk; the logits become their gradient times `gradient_scale`.
  void loss(const batch& input, chunk_offsets chunks, A gradient_scale, double* losses) {
    cross_entropy(chunks, vocabulary, logits_.data(), input.targets, gradient_scale, losses);
  }

  /// Gradients of the last `forward(pass::train)` and `loss`.
  /// @param contributions `[chunks, table().size()]`: of the replicated parameters, per chunk.
  /// @param gate_contributions `[layers, chunks, E, d]`: of the gates, per chunk. The experts' are in their blocks.
  void backward(const batch& input, chunk_offsets chunks, A* contributions, A* gate_contributions) {
    const std::int64_t rows = input.sequences * input.length, d = shape_.hidden;
    const auto count = static_cast<std::int64_t>(chunks.size()) - 1;
    const std::int64_t stride = table_.size();
    const A* p = parameters_.data();
    for (std::int64_t c = 0; c < count; ++c) std::fill_n(contributions + c * stride + embedding_, vocabulary * d, A(0));

    linear_backward_weights(chunks, d, vocabulary, normed_.data(), logits_.data(), contributions + head_, stride);
    linear_backward_input(rows, d, vocabulary, logits_.data(), p + head_, delta_.data());
    std::fill_n(dx_.data(), rows * d, A(0));
    norm_backward(chunks, d, x_.data(), p + norm_, inverse_.data(), delta_.data(), dx_.data(), contributions + norm_,
                  stride);
    for (std::size_t l = layers_.size(); l-- > 0;) {
      layer& own = layers_[l];
      blocks_[l]->backward(rows, own.normed_moe.data(), dx_.data(), gate(l), delta_.data(),
                           gate_contributions + static_cast<std::int64_t>(l) * count * shape_.experts * d);
      norm_backward(chunks, d, own.x_moe.data(), p + own.norm_moe, own.inverse_moe.data(), delta_.data(), dx_.data(),
                    contributions + own.norm_moe, stride);
      own.mixer.backward(p, chunks, input.length, own.normed_mixer.data(), dx_.data(), delta_.data(), contributions,
                         stride);
      norm_backward(chunks, d, own.x_mixer.data(), p + own.norm_mixer, own.inverse_mixer.data(), delta_.data(),
                    dx_.data(), contributions + own.norm_mixer, stride);
    }
    embedding_backward(chunks, input.tokens, d, dx_.data(), contributions + embedding_, stride);
  }

  /// Replicated parameters without the gates.
  const parameter_table& table() const { return table_; }
  /// Values of `table()`.
  std::span<A> parameters() { return parameters_; }
  /// The gates: layer by layer `[E, d]`.
  const parameter_table& gate_table() const { return gates_; }
  /// Values of `gate_table()`.
  std::span<A> gate_parameters() { return gate_parameters_; }
  /// The blocks.
  std::span<const std::unique_ptr<moe_block<A>>> blocks() const { return blocks_; }

 private:
  struct layer {
    std::int64_t norm_mixer = 0;
    token_mixer<A> mixer;
    std::int64_t norm_moe = 0;
    std::int64_t gate_index = 0;
    std::vector<A> x_mixer{}, normed_mixer{}, inverse_mixer{}, x_moe{}, normed_moe{}, inverse_moe{};
  };

  A* gate(std::size_t l) { return gate_parameters_.data() + layers_[l].gate_index; }

  static void add(std::int64_t n, const A* from, A* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] += from[i];
  }

  model_shape shape_;
  parameter_table table_, gates_;
  std::int64_t embedding_ = 0, norm_ = 0, head_ = 0;
  std::vector<layer> layers_;
  std::vector<std::unique_ptr<moe_block<A>>> blocks_;
  std::vector<A> parameters_, gate_parameters_;
  std::vector<A> x_, normed_, inverse_, logits_, delta_, dx_;
};

}  // namespace train_lm
