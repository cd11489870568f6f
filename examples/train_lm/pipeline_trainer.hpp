// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// One training run of a pipelined model on one rank: data, steps, validation, sample, drafts.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <span>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <tessera/mtp/loss.hpp>
#include <tessera/mtp/rows.hpp>

#include "corpus.hpp"
#include "metrics.hpp"
#include "optimizer.hpp"
#include "pipeline_model.hpp"
#include "pipeline_run.hpp"
#include "pipeline_sampling.hpp"
#include "progress.hpp"
#include "stop.hpp"

namespace train_lm {

/// Trains on one rank of `Comm`, on the same text in the same order as `trainer`. All members are collective.
template <class A, ts::host_communicator Comm, class Lanes>
class pipeline_trainer final : public pipelined_run {
 public:
  using model_type = pipeline_model<A, Comm, Lanes>;  ///< The model.

  /// @param s Checked by `prepare_pipeline` and `validate`. @param comm Outlives the trainer.
  pipeline_trainer(const settings& s, balance_kind balance, const corpus& text, Comm& comm)
      : s_(s), balance_(balance), text_(text), comm_(comm), random_(s.seed, "sample"), model_(s_, balance, comm) {
    // A depth has a term for each byte whose next k bytes are in its sequence.
    std::vector<std::int32_t> one(static_cast<std::size_t>(s_.length), 0);
    terms_.resize(static_cast<std::size_t>(s_.mtp));
    if (s_.mtp > 0) ts::mtp::count_terms({.token_ids = one, .targets = one}, terms_);
    for (std::int64_t& count : terms_) count *= s_.batch;
    std::tie(parameters_, active_parameters_) = model_.parameter_counts();
  }

  std::string description() const override {
    const pl::schedule& schedule = model_.schedule();
    std::ostringstream out;
    out << "balance " << name_of(balance_) << ": " << parameters_ << " parameters, " << active_parameters_
        << " of them for one byte; " << s_.experts << " experts on " << model_.group_size() << " ranks\n  ";
    if (s_.pipeline.empty()) {
      out << "no pipeline";
    } else {
      out << schedule.name << ": " << schedule.num_stages << " stages on " << schedule.num_ranks << " ranks";
    }
    out << ", " << schedule.num_micro_batches << " micro-batches";
    if (s_.mtp > 0) out << "; " << s_.mtp << " further bytes predicted";
    out << "\n";
    return out.str();
  }

  /// The model.
  model_type& model() { return model_; }

  /// One optimizer step. @param index From 0.
  step_metrics step(std::int64_t index) {
    const auto start = std::chrono::steady_clock::now();
    const std::size_t stretch = text_.training.size() / static_cast<std::size_t>(s_.batch);
    fill([&](std::int64_t lane, std::size_t t, std::uint8_t& token, std::int16_t& target) {
      // Every sequence of the batch reads its own stretch of the text on and on, so its recurrent state stays valid.
      const std::size_t place =
          stretch * static_cast<std::size_t>(lane) + static_cast<std::size_t>(index * s_.length) + t;
      token = byte(text_.training, place);
      target = byte(text_.training, place + 1);
    });
    const double tokens = static_cast<double>(s_.batch * s_.length);
    std::vector<double> factors(terms_.size());
    if (s_.mtp > 0)
      ts::mtp::loss_factors(lambda_of(s_).at(index * s_.batch * s_.length), ts::mtp::divisor::valid_terms, 0, terms_,
                            factors);
    const step_losses losses = model_.run(static_cast<A>(1.0 / tokens), factors);

    step_metrics result;
    result.step = index + 1;
    result.loss = losses.main / tokens;
    result.auxiliary = losses.auxiliary;
    for (std::size_t k = 0; k < terms_.size(); ++k)
      result.mtp_losses.push_back(losses.further[k] / static_cast<double>(terms_[k]));
    TESSERA_EXPECTS_AS(ts::error, std::isfinite(result.loss),
                       "the loss of step " << result.step << " is " << result.loss
                                           << ": the run has diverged, try a smaller --lr than " << s_.rate);
    result.gradient_norm = std::sqrt(model_.squared_norm());
    const std::int64_t warmup = std::max<std::int64_t>(1, s_.steps / 20);
    const double factor = schedule(index, s_.steps, warmup, 0.05);
    result.rate = s_.rate * factor;
    model_.update(index + 1, result.rate, ts::shard::clip_factor(result.gradient_norm, s_.adam.clip));
    loads_ = model_.end_step(static_cast<float>(s_.bias_rate * factor));
    const auto experts = static_cast<std::ptrdiff_t>(s_.experts);
    const double mean = static_cast<double>(s_.batch * s_.length * s_.top_k) / static_cast<double>(experts);
    for (std::ptrdiff_t l = 0; l < static_cast<std::ptrdiff_t>(s_.layers); ++l)
      result.imbalance.push_back(
          static_cast<double>(*std::max_element(loads_.begin() + l * experts, loads_.begin() + (l + 1) * experts)) /
          mean);
    result.tokens_per_second = tokens / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result;
  }

  /// Bits per byte of the validation text, read as `trainer` reads it.
  double validate() {
    const std::size_t size = text_.validation.size(), lanes = static_cast<std::size_t>(s_.batch);
    const std::size_t lane_size = (size + lanes - 1) / lanes;
    const int micro_batches = model_.schedule().num_micro_batches;
    const std::int64_t rows = model_.text().rows, sequences = model_.sequences();
    const std::int32_t chunks[] = {0, static_cast<std::int32_t>(rows)};
    const auto members = static_cast<std::size_t>(model_.group_size());
    std::vector<A> logits(static_cast<std::size_t>(rows * model_type::vocabulary));
    std::vector<std::vector<A>> states(static_cast<std::size_t>(micro_batches),
                                       std::vector<A>(static_cast<std::size_t>(model_.state_size(sequences)), A(0)));
    std::vector<double> losses(static_cast<std::size_t>(micro_batches) * members, 0.0);
    for (std::size_t window = 0; window < lane_size; window += static_cast<std::size_t>(s_.length)) {
      fill([&](std::int64_t lane, std::size_t t, std::uint8_t& token, std::int16_t& target) {
        const std::size_t place = static_cast<std::size_t>(lane) * lane_size + window + t;
        const bool counts = window + t < lane_size && place < size;
        token = place == 0 ? std::uint8_t{'\n'} : byte(text_.validation, place - 1);
        target = counts ? std::int16_t{byte(text_.validation, place)} : no_target;
      });
      for (int m = 0; m < micro_batches; ++m) {
        model_.evaluate(sequences, s_.length, model_.text().tokens_of(m), states[static_cast<std::size_t>(m)].data(),
                        logits.data());
        if (!model_.speaks_last()) continue;
        double loss = 0;
        cross_entropy(chunks, model_type::vocabulary, logits.data(), model_.text().targets_of(m), A(1), &loss);
        // The micro-batches of all ranks of a place, in the order of lanes.
        losses[static_cast<std::size_t>(model_.lane(m, 0) / sequences)] += loss;
      }
    }
    comm_.all_reduce(ts::host_stream{}, losses.data(), losses.data(), static_cast<std::int64_t>(losses.size()));
    double total = 0;
    for (const double loss : losses) total += loss;
    return total * bits_per_nat / static_cast<double>(size);
  }

  /// The prompt and what the model writes after it.
  std::string sample() {
    reader_type reader(model_, comm_, max_rows());
    std::vector<std::int32_t> tokens(s_.prompt.size());
    std::transform(s_.prompt.begin(), s_.prompt.end(), tokens.begin(), number);
    std::string text = s_.prompt;
    const std::size_t bytes = s_.prompt.size() + static_cast<std::size_t>(s_.sample_bytes);
    for (std::size_t i = s_.prompt.size() - 1; i + 1 < bytes; ++i) {
      const ts::matrix_view<const A> logits = reader(tokens, 1);
      const int next = draw_byte(std::span<const A>(logits.data, static_cast<std::size_t>(model_type::vocabulary)),
                                 s_.temperature, random_.uniform(i));
      tokens.push_back(next);
      text.push_back(static_cast<char>(next));
    }
    return text;
  }

  /// Continues stretches of the validation text greedily, plainly and with the drafts of multi-token prediction.
  /// @return what became of the drafts. @throws tessera::error if the two outputs differ.
  draft_result draft() {
    constexpr std::size_t places = 8, prompt = 64;
    constexpr std::int64_t written = 48;
    draft_result result;
    if (s_.mtp == 0) return result;
    ts::mtp::acceptance total;
    for (std::size_t i = 0; i < places; ++i) {
      const std::size_t first = text_.validation.size() * i / places;
      std::vector<std::int32_t> start;
      for (std::size_t t = 0; t < prompt; ++t) start.push_back(byte(text_.validation, first + t));
      std::vector<std::int32_t> plain = start, drafted = start;
      decode(plain, written, 0);
      const ts::mtp::acceptance record = decode(drafted, written, s_.mtp);
      TESSERA_EXPECTS_AS(ts::error, plain == drafted,
                         "greedy decoding with drafts of depth " << s_.mtp << " wrote another text than without");
      for (std::size_t k = 0; k < static_cast<std::size_t>(s_.mtp); ++k) {
        total.proposed[k] += record.proposed[k];
        total.accepted[k] += record.accepted[k];
      }
      total.calls += record.calls;
      total.tokens += record.tokens;
    }
    for (int k = 1; k <= s_.mtp; ++k) result.acceptance.push_back(total.rate(k));
    result.bytes_per_call = total.tokens_per_call();
    result.bytes = total.tokens;
    return result;
  }

  run_result run(progress* bar, const std::function<void(const run_result&)>& on_stop) override {
    run_result result;
    result.balance = balance_;
    result.ranks = comm_.size();
    result.parameters = parameters_;
    result.active_parameters = active_parameters_;
    const std::int64_t interval = std::max<std::int64_t>(1, s_.steps / 80);
    const auto start = std::chrono::steady_clock::now();
    for (std::int64_t index = 0; index < s_.steps && !result.stopped; ++index) {
      step_metrics now = step(index);
      if (s_.eval_every > 0 && now.step % s_.eval_every == 0 && now.step < s_.steps) measure(now);
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
    result.drafts = measure(result.steps.back());
    result.validation = *result.steps.back().validation;
    if (s_.sample_bytes > 0) result.sample = sample();
    return result;
  }

 private:
  using reader_type = document_reader<model_type, A, Comm>;

  static std::uint8_t byte(const std::string& text, std::size_t i) {
    return static_cast<std::uint8_t>(text[i % text.size()]);
  }
  static std::int32_t number(char c) { return static_cast<std::uint8_t>(c); }

  std::int64_t max_rows() { return model_.text().rows; }

  /// Fills the text of a step. @param f `f(lane, t, token&, target&)`.
  template <class F>
  void fill(F&& f) {
    step_text& text = model_.text();
    std::size_t row = 0;
    for (int m = 0; m < model_.schedule().num_micro_batches; ++m) {
      for (std::int64_t q = 0; q < model_.sequences(); ++q) {
        for (std::size_t t = 0; t < static_cast<std::size_t>(s_.length); ++t, ++row)
          f(model_.lane(m, q), t, text.tokens[row], text.targets[row]);
      }
    }
  }

  /// Measures on the validation text.
  draft_result measure(step_metrics& step) {
    step.validation = validate();
    draft_result drafts = draft();
    step.draft_acceptance = drafts.acceptance;
    return drafts;
  }

  ts::mtp::acceptance decode(std::vector<std::int32_t>& tokens, std::int64_t count, int depth) {
    reader_type reader(model_, comm_, max_rows());
    const auto propose = [&](std::span<const std::int32_t> known, std::span<std::int32_t> drafts) {
      model_.draft(reader.row_of(known.size() - 2), known.last(2), drafts);
    };
    return ts::mtp::greedy_decode<A>(reader, propose, tokens, {.new_tokens = count, .depth = depth});
  }

  void keep_load(run_result& result, std::int64_t interval, std::int64_t step_number) const {
    const auto layers = static_cast<std::size_t>(s_.layers + s_.mtp), experts = static_cast<std::size_t>(s_.experts);
    if ((step_number - 1) % interval == 0)
      result.loads.push_back({0, std::vector(layers, std::vector<std::int64_t>(experts, 0))});
    load_interval& last = result.loads.back();
    last.last_step = step_number;
    for (std::size_t l = 0; l < layers; ++l)
      for (std::size_t e = 0; e < experts; ++e) last.loads[l][e] += loads_[l * experts + e];
  }

  const settings s_;
  const balance_kind balance_;
  const corpus& text_;
  Comm& comm_;
  random_stream random_;
  model_type model_;
  std::vector<std::int64_t> terms_, loads_;
  std::int64_t parameters_ = 0, active_parameters_ = 0;
};

}  // namespace train_lm
