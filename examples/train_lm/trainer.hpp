// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// One training run on one rank: data, steps, validation, sample.
///
/// Why the rank count cannot change a bit (with `combine::ordered`): the micro-batch is fixed and split contiguously; a
/// token's forward and backward depend on no other row; replicated parameters get one gradient contribution per chunk,
/// summed in the order of chunks; an expert's rows arrive in the global order of tokens, so its gradient is one and the
/// same product; everything else is computed identically on all ranks.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/ordered_reduce.hpp>
#include <tessera/core/memory.hpp>

#include "corpus.hpp"
#include "layers.hpp"
#include "metrics.hpp"
#include "model.hpp"
#include "optimizer.hpp"
#include "progress.hpp"
#include "settings.hpp"
#include "stop.hpp"

namespace train_lm {

/// Trains on one rank of `Comm`. All members are collective.
template <class A, ts::host_communicator Comm>
class trainer {
 public:
  /// @param s Validated. @param comm Outlives the trainer.
  trainer(const settings& s, balance_kind balance, const corpus& text, Comm& comm)
      : s_(s), balance_(balance), text_(text), comm_(comm), random_(s.seed, "sample") {
    const auto share = [&](std::int64_t rank) { return num_chunks * rank / comm_.size(); };
    first_chunk_ = share(comm_.rank());
    local_chunks_ = share(comm_.rank() + 1) - first_chunk_;
    per_chunk_ = s_.batch / num_chunks;
    sequences_ = local_chunks_ * per_chunk_;
    std::int64_t most_chunks = 1;
    for (int r = 0; r < comm_.size(); ++r) most_chunks = std::max(most_chunks, share(r + 1) - share(r));
    const std::int64_t chunk_rows = per_chunk_ * s_.length, max_rows = most_chunks * chunk_rows;
    for (std::int64_t c = 0; c <= local_chunks_; ++c) chunks_.push_back(static_cast<std::int32_t>(c * chunk_rows));

    std::vector<std::unique_ptr<moe_block<A>>> blocks;
    for (std::int64_t l = 0; l < s_.layers; ++l)
      blocks.push_back(make_block<A>(s_, balance, max_rows, chunk_rows, comm_));
    model_ = std::make_unique<language_model<A>>(
        model_shape{.hidden = s_.hidden, .layers = s_.layers, .experts = s_.experts, .max_rows = max_rows},
        std::move(blocks));
    model_->initialize(s_.seed);

    const auto dense = static_cast<std::size_t>(model_->table().size());
    const auto gates = static_cast<std::size_t>(model_->gate_table().size());
    moments_ = std::make_unique<adamw<A>>(dense);
    gate_moments_ = std::make_unique<adamw<A>>(gates);
    for (const auto& block : model_->blocks()) expert_moments_.emplace_back(block->weights().size());
    gradient_.resize(dense);
    gate_gradient_.resize(gates);
    const auto local = static_cast<std::size_t>(local_chunks_);
    contributions_.resize(local * dense);
    gate_contributions_.resize(local * gates);
    tokens_.resize(static_cast<std::size_t>(sequences_ * s_.length));
    targets_.resize(tokens_.size());
    state_.assign(static_cast<std::size_t>(model_->state_size(sequences_)), A(0));
    loads_.resize(static_cast<std::size_t>(s_.layers * s_.experts));
    expert_squares_.resize(loads_.size());
  }

  /// Parameters of all ranks together, and those that one token uses.
  std::pair<std::int64_t, std::int64_t> parameter_counts() const {
    const std::int64_t dense = model_->table().size() + model_->gate_table().size();
    const std::int64_t expert = model_->blocks().front()->expert_size();
    return {dense + s_.layers * s_.experts * expert, dense + s_.layers * s_.top_k * expert};
  }

  /// One optimizer step. @param index From 0.
  step_metrics step(std::int64_t index) {
    const auto start = std::chrono::steady_clock::now();
    const auto length = static_cast<std::size_t>(s_.length);
    for (std::int64_t q = 0; q < sequences_; ++q) {
      // Every sequence of the batch reads its own stretch of the text on and on, so its recurrent state stays valid.
      const std::int64_t lane = first_chunk_ * per_chunk_ + q;
      const std::size_t begin =
          text_.training.size() / static_cast<std::size_t>(s_.batch) * static_cast<std::size_t>(lane) +
          static_cast<std::size_t>(index) * length;
      for (std::size_t t = 0; t < length; ++t) {
        const std::size_t row = static_cast<std::size_t>(q) * length + t;
        tokens_[row] = byte(text_.training, begin + t);
        targets_[row] = byte(text_.training, begin + t + 1);
      }
    }
    const batch input{sequences_, s_.length, tokens_, targets_};
    const double tokens = static_cast<double>(s_.batch * s_.length);
    std::vector<double> losses(static_cast<std::size_t>(local_chunks_));
    model_->forward(ts::pass::train, input, state_);
    model_->loss(input, chunks_, static_cast<A>(1.0 / tokens), losses.data());
    model_->backward(input, chunks_, contributions_.data(), gate_contributions_.data());

    step_metrics result;
    result.step = index + 1;
    sum_losses(losses, result);
    sum_gradients();
    result.gradient_norm = std::sqrt(squared_norm());
    update(index, result);
    measure_load(result);
    result.tokens_per_second = tokens / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result;
  }

  /// Bits per byte of the validation text. Each sequence of the batch reads its stretch from start to end with its
  /// state carried on; the byte before the text is taken to be a line end.
  double validate() {
    const std::size_t size = text_.validation.size(), lanes = static_cast<std::size_t>(s_.batch);
    const std::size_t lane_size = (size + lanes - 1) / lanes, length = static_cast<std::size_t>(s_.length);
    std::vector<A> state(state_.size(), A(0));
    std::vector<double> chunk_losses(static_cast<std::size_t>(local_chunks_)), losses(chunk_losses.size(), 0.0);
    for (std::size_t window = 0; window < lane_size; window += length) {
      for (std::size_t q = 0; q < static_cast<std::size_t>(sequences_); ++q) {
        const std::size_t begin = (static_cast<std::size_t>(first_chunk_ * per_chunk_) + q) * lane_size;
        for (std::size_t t = 0; t < length; ++t) {
          const std::size_t place = begin + window + t, row = q * length + t;
          const bool counts = window + t < lane_size && place < size;
          tokens_[row] = place == 0 ? std::uint8_t{'\n'} : byte(text_.validation, place - 1);
          targets_[row] = counts ? std::int16_t{byte(text_.validation, place)} : no_target;
        }
      }
      const batch input{sequences_, s_.length, tokens_, targets_};
      model_->forward(ts::pass::eval, input, state);
      model_->loss(input, chunks_, A(1), chunk_losses.data());
      for (std::size_t c = 0; c < losses.size(); ++c) losses[c] += chunk_losses[c];
    }
    double total = 0;
    sum_chunks(losses.data(), 1, &total);
    return total * bits_per_nat / static_cast<double>(size);
  }

  /// The prompt and what the model writes after it, on rank 0; the other ranks bring their experts and no tokens.
  std::string sample() {
    const bool speaks = comm_.rank() == 0;
    std::string text = s_.prompt;
    std::vector<A> state(speaks ? static_cast<std::size_t>(model_->state_size(1)) : 0, A(0));
    const std::size_t bytes = s_.prompt.size() + static_cast<std::size_t>(s_.sample_bytes);
    for (std::size_t i = 0; i + 1 < bytes; ++i) {
      const std::uint8_t token = speaks ? byte(text, i) : std::uint8_t{0};
      const std::span<const std::uint8_t> tokens(&token, speaks ? 1 : 0);
      const std::span<A> logits = model_->forward(ts::pass::eval, batch{speaks ? 1 : 0, 1, tokens, {}}, state);
      if (speaks && i + 1 >= s_.prompt.size()) text.push_back(static_cast<char>(draw(logits, i)));
    }
    return speaks ? text : std::string();
  }

  /// The run from start to end. @param bar Shows it; only rank 0 has one. @param on_stop Called on rank 0 with what
  /// there is when the run has been stopped, before validation and sample: mpirun kills its processes a second later.
  run_result run(progress* bar, const std::function<void(const run_result&)>& on_stop = {}) {
    run_result result;
    result.balance = balance_;
    result.ranks = comm_.size();
    std::tie(result.parameters, result.active_parameters) = parameter_counts();
    const std::int64_t interval = std::max<std::int64_t>(1, s_.steps / 80);
    const auto start = std::chrono::steady_clock::now();
    for (std::int64_t index = 0; index < s_.steps && !result.stopped; ++index) {
      step_metrics now = step(index);
      if (s_.eval_every > 0 && now.step % s_.eval_every == 0 && now.step < s_.steps) now.validation = validate();
      if (bar != nullptr) bar->show(now);
      keep_load(result, interval, now.step);
      result.steps.push_back(std::move(now));
      // One rank may have seen the signal and another not yet: they agree, so that all leave after the same step.
      const std::int32_t mine = stop_requested() ? 1 : 0;
      std::int32_t any = 0;
      comm_.all_reduce(ts::host_stream{}, &mine, &any, 1, ts::reduce_op::max);
      result.stopped = any != 0;
    }
    result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    result.bytes_seen = static_cast<std::int64_t>(result.steps.size()) * s_.batch * s_.length;
    if (bar != nullptr) bar->finish();
    if (result.stopped && comm_.rank() == 0 && on_stop) on_stop(result);
    result.validation = validate();
    result.steps.back().validation = result.validation;
    if (s_.sample_bytes > 0) result.sample = sample();
    return result;
  }

 private:
  static std::uint8_t byte(const std::string& text, std::size_t i) {
    return static_cast<std::uint8_t>(text[i % text.size()]);
  }

  /// Sums `[local_chunks, count]` over the chunks of all ranks, in their order.
  template <class T>
  void sum_chunks(const T* contributions, std::int64_t count, T* result) {
    const auto bytes =
        static_cast<std::size_t>(ts::ordered_all_reduce_workspace_bytes<T>(comm_.size(), num_chunks, count));
    if (bytes > reduce_buffer_.size()) reduce_buffer_ = ts::host_buffer(bytes);
    ts::ordered_all_reduce(ts::host_stream{}, comm_, contributions, local_chunks_, count, result,
                           ts::workspace_memory(reduce_buffer_));
  }

  void sum_losses(const std::vector<double>& losses, step_metrics& result) {
    std::vector<double> pairs(2 * losses.size());
    for (std::size_t c = 0; c < losses.size(); ++c) {
      pairs[2 * c] = losses[c];
      for (const auto& block : model_->blocks())
        pairs[2 * c + 1] += block->auxiliary_loss(static_cast<std::int64_t>(c));
    }
    double sums[2] = {};
    sum_chunks(pairs.data(), 2, sums);
    result.loss = sums[0] / static_cast<double>(s_.batch * s_.length);
    result.auxiliary = sums[1];
    TESSERA_EXPECTS_AS(ts::error, std::isfinite(result.loss),
                       "the loss of step " << result.step << " is " << result.loss
                                           << ": the run has diverged, try a smaller --lr than " << s_.rate);
  }

  void sum_gradients() {
    sum_chunks(contributions_.data(), model_->table().size(), gradient_.data());
    // Per layer, because the layers' contributions lie apart.
    const std::int64_t gate = s_.experts * s_.hidden;
    for (std::int64_t l = 0; l < s_.layers; ++l)
      sum_chunks(gate_contributions_.data() + l * local_chunks_ * gate, gate, gate_gradient_.data() + l * gate);
  }

  /// Square of the norm of all gradients: tensor by tensor and expert by expert, each in one fixed order.
  double squared_norm() {
    double sum = sum_of_squares<A>(gradient_) + sum_of_squares<A>(gate_gradient_);
    std::fill(expert_squares_.begin(), expert_squares_.end(), 0.0);
    for (std::size_t l = 0; l < model_->blocks().size(); ++l) {
      moe_block<A>& block = *model_->blocks()[l];
      const auto size = static_cast<std::size_t>(block.expert_size());
      for (int slot = 0; slot < block.num_local_experts(); ++slot) {
        expert_squares_[l * static_cast<std::size_t>(s_.experts) + static_cast<std::size_t>(block.expert_at(slot))] =
            sum_of_squares<A>(block.gradients().subspan(static_cast<std::size_t>(slot) * size, size));
      }
    }
    // Each expert has one owner, so the other ranks' zeros do not round anything.
    comm_.all_reduce(ts::host_stream{}, expert_squares_.data(), expert_squares_.data(),
                     static_cast<std::int64_t>(expert_squares_.size()));
    for (const double square : expert_squares_) sum += square;
    return sum;
  }

  void measure_load(step_metrics& result) {
    const auto experts = static_cast<std::size_t>(s_.experts);
    for (std::size_t l = 0; l < model_->blocks().size(); ++l) {
      const std::span<const std::int64_t> load = model_->blocks()[l]->load();
      std::copy(load.begin(), load.end(), loads_.begin() + static_cast<std::ptrdiff_t>(l * experts));
      const double mean = static_cast<double>(s_.batch * s_.length * s_.top_k) / static_cast<double>(experts);
      result.imbalance.push_back(static_cast<double>(*std::max_element(load.begin(), load.end())) / mean);
    }
  }

  void update(std::int64_t index, step_metrics& result) {
    const std::int64_t warmup = std::max<std::int64_t>(1, s_.steps / 20);
    const double factor = schedule(index, s_.steps, warmup, 0.05);
    result.rate = s_.rate * factor;
    const double clip = s_.adam.clip;
    const double scale = clip > 0 && result.gradient_norm > clip ? clip / result.gradient_norm : 1.0;
    const auto update_table = [&](const parameter_table& table, adamw<A>& moments, std::span<A> values,
                                  const std::vector<A>& gradients) {
      for (const parameter& p : table.entries())
        moments.update(s_.adam, index + 1, result.rate, scale, p.decays, p.offset, p.count, values.data(),
                       gradients.data());
    };
    update_table(model_->table(), *moments_, model_->parameters(), gradient_);
    update_table(model_->gate_table(), *gate_moments_, model_->gate_parameters(), gate_gradient_);
    for (std::size_t l = 0; l < model_->blocks().size(); ++l) {
      moe_block<A>& block = *model_->blocks()[l];
      expert_moments_[l].update(s_.adam, index + 1, result.rate, scale, true, 0,
                                static_cast<std::int64_t>(block.weights().size()), block.weights().data(),
                                block.gradients().data());
      block.end_step(static_cast<float>(s_.bias_rate * factor));
    }
  }

  void keep_load(run_result& result, std::int64_t interval, std::int64_t step_number) const {
    const auto layers = static_cast<std::size_t>(s_.layers), experts = static_cast<std::size_t>(s_.experts);
    if ((step_number - 1) % interval == 0)
      result.loads.push_back({0, std::vector(layers, std::vector<std::int64_t>(experts, 0))});
    load_interval& last = result.loads.back();
    last.last_step = step_number;
    for (std::size_t l = 0; l < layers; ++l)
      for (std::size_t e = 0; e < experts; ++e) last.loads[l][e] += loads_[l * experts + e];
  }

  /// A byte drawn from the softmax of `logits / temperature`.
  int draw(std::span<const A> logits, std::size_t index) const {
    const A largest = *std::max_element(logits.begin(), logits.end());
    std::vector<double> weights;
    double total = 0;
    for (const A logit : logits) {
      weights.push_back(std::exp(static_cast<double>(logit - largest) / s_.temperature));
      total += weights.back();
    }
    double rest = random_.uniform(index) * total;
    for (std::size_t v = 0; v < weights.size(); ++v) {
      rest -= weights[v];
      if (rest < 0) return static_cast<int>(v);
    }
    return static_cast<int>(std::max_element(weights.begin(), weights.end()) - weights.begin());
  }

  const settings s_;
  const balance_kind balance_;
  const corpus& text_;
  Comm& comm_;
  random_stream random_;
  std::int64_t first_chunk_ = 0, local_chunks_ = 0, per_chunk_ = 0, sequences_ = 0;
  std::vector<std::int32_t> chunks_;
  std::unique_ptr<language_model<A>> model_;
  std::unique_ptr<adamw<A>> moments_, gate_moments_;
  std::vector<adamw<A>> expert_moments_;
  std::vector<A> gradient_, gate_gradient_, contributions_, gate_contributions_, state_;
  std::vector<std::uint8_t> tokens_;
  std::vector<std::int16_t> targets_;
  std::vector<std::int64_t> loads_;
  std::vector<double> expert_squares_;
  ts::host_buffer reduce_buffer_;
};

}  // namespace train_lm
