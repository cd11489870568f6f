// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

/// @file
/// The pipelined model: every schedule against a loop over micro-batches, multi-token prediction against differences of
/// its loss and against plain decoding. That the loop has the bits of a run without a pipeline is checked by
/// program.sh, with the whole program.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/comm/threads.hpp>
#include <tessera/pipeline/lanes.hpp>

#include "../pipeline_trainer.hpp"

namespace train_lm {
extern template class pipeline_trainer<float, ts::comm::threads, ts::pipeline::host_lanes>;
}

namespace {

using namespace train_lm;
using pipelined = pipeline_trainer<float, ts::comm::threads, ts::pipeline::host_lanes>;

/// Text with something to learn: a few words in an order that repeats now and then.
corpus words() {
  const char* const list[] = {"pipe", "stage ", "token", "rank ", "expert"};
  const random_stream random(5, "words");
  corpus text;
  for (std::uint64_t i = 0; i < 3000; ++i) {
    std::string& part = i % 10 == 9 ? text.validation : text.training;
    part += list[random.bits(i) % 5];
  }
  return text;
}

settings small_settings() {
  settings s;
  s.layers = 4;
  s.hidden = 16;
  s.intermediate = 8;
  s.experts = 4;
  s.top_k = 2;
  s.batch = 12;
  s.length = 12;
  s.steps = 3;
  s.sample_bytes = 12;
  s.prompt = "stage";
  return s;
}

/// What a run leaves behind that may not depend on the schedule.
struct outcome {
  std::vector<double> numbers;
  std::vector<std::vector<std::vector<std::int64_t>>> loads;
  std::string sample;
  bool operator==(const outcome&) const = default;
};

run_result train(settings s, const corpus& text, balance_kind balance = balance_kind::bias) {
  prepare_pipeline(s);
  validate(s);
  std::vector<run_result> results(static_cast<std::size_t>(s.ranks));
  ts::comm::threads::run(s.ranks, [&](ts::comm::threads& comm) {
    results[static_cast<std::size_t>(comm.rank())] = pipelined(s, balance, text, comm).run(nullptr, {});
  });
  for (const run_result& other : results) CHECK(other.validation == results.front().validation);
  return results.front();
}

outcome outcome_of(const settings& s, const corpus& text, balance_kind balance = balance_kind::bias) {
  const run_result run = train(s, text, balance);
  outcome result;
  for (const step_metrics& step : run.steps) {
    for (const double value : {step.loss, step.auxiliary, step.gradient_norm}) result.numbers.push_back(value);
    result.numbers.insert(result.numbers.end(), step.mtp_losses.begin(), step.mtp_losses.end());
  }
  result.numbers.push_back(run.validation);
  for (const double rate : run.drafts.acceptance) result.numbers.push_back(rate);
  for (const load_interval& interval : run.loads) result.loads.push_back(interval.loads);
  result.sample = run.sample;
  return result;
}

void check_schedules(settings s, balance_kind balance) {
  const corpus text = words();
  s.micro_batches = 12;
  const outcome serial = outcome_of(s, text, balance);
  CHECK(serial.numbers.size() > 9);
  for (const char* schedule : {"1f1b", "zb1p", "dualpipe", "dualpipev"}) {
    for (const int stages : {2, 4}) {
      CAPTURE(schedule);
      CAPTURE(stages);
      s.pipeline = schedule;
      s.stages = stages;
      const outcome got = outcome_of(s, text, balance);
      CHECK(got.numbers == serial.numbers);
      CHECK(got.loads == serial.loads);
      CHECK(got.sample == serial.sample);
    }
  }
}

}  // namespace

TEST_CASE("every schedule gives the losses, norms, loads and text of a loop over micro-batches") {
  check_schedules(small_settings(), balance_kind::bias);
}

TEST_CASE("every schedule gives the bits of the loop with multi-token prediction and the auxiliary loss") {
  settings s = small_settings();
  s.mtp = 2;
  check_schedules(s, balance_kind::loss);
}

TEST_CASE("ranks of one place of the pipeline divide experts and sequences, with the same bits for every schedule") {
  const corpus text = words();
  settings s = small_settings();
  s.mtp = 1;
  s.micro_batches = 6;
  s.ranks = 2;
  const outcome serial = outcome_of(s, text);
  for (const auto& [schedule, ranks] : {std::pair{"dualpipev", 2}, std::pair{"1f1b", 4}, std::pair{"dualpipe", 4}}) {
    CAPTURE(schedule);
    s.pipeline = schedule;
    s.stages = 2;
    s.ranks = ranks;
    CHECK(outcome_of(s, text) == serial);
  }
  // Not the bits of one rank, whose sums run over other chunks, but the same numbers.
  s = small_settings();
  s.mtp = 1;
  s.micro_batches = 6;
  const outcome alone = outcome_of(s, text);
  REQUIRE(alone.numbers.size() == serial.numbers.size());
  for (std::size_t i = 0; i < 4; ++i) CHECK(alone.numbers[i] == doctest::Approx(serial.numbers[i]).epsilon(1e-5));
}

TEST_CASE("the gradient of each block is that of differences of the loss, further bytes included") {
  const corpus text = words();
  settings s = small_settings();
  s.layers = 1;
  s.mtp = 2;
  s.micro_batches = 3;
  prepare_pipeline(s);
  const double factors[] = {0.04, 0.06};
  const float scale = 0.01f;
  using model_type = pipelined::model_type;
  // A new model for each value: a step moves the recurrent state on. `change` sees the blocks before the step, `look`
  // after it.
  const auto loss = [&](auto&& change, auto&& look) {
    double sum = 0;
    ts::comm::threads::run(1, [&](ts::comm::threads& comm) {
      model_type model(s, balance_kind::none, comm);
      for (std::size_t i = 0; i < model.text().tokens.size(); ++i) {
        model.text().tokens[i] = static_cast<std::uint8_t>(text.training[i]);
        model.text().targets[i] = static_cast<std::uint8_t>(text.training[i + 1]);
      }
      for (const auto& block : model.stages()[0]->blocks()) change(*block);
      const step_losses losses = model.run(scale, factors);
      for (const auto& block : model.stages()[0]->blocks()) look(*block);
      sum = static_cast<double>(scale) * losses.main;
      for (std::size_t k = 0; k < 2; ++k) sum += factors[k] * losses.further[k];
    });
    return sum;
  };
  const auto nothing = [](auto&) {};
  std::vector<std::vector<float>> gradients;
  std::vector<int> places;
  loss(nothing, [&](const auto& block) {
    gradients.emplace_back(block.gradients, block.gradients + block.table.size());
    places.push_back(block.place);
  });
  REQUIRE(places == std::vector<int>{0, 1, 2, -1, 3, 4});
  for (std::size_t b = 0; b < places.size(); ++b) {
    if (places[b] < 0) continue;  // what the chain adds to the embedding is in the embedding's gradient
    CAPTURE(places[b]);
    double squares = 0;
    for (const float g : gradients[b]) squares += static_cast<double>(g) * static_cast<double>(g);
    REQUIRE(squares > 1e-6);
    const double length = 2e-3 / std::sqrt(squares);
    const auto along = [&](double h) {
      return loss(
          [&](auto& block) {
            if (block.place != places[b]) return;
            for (std::size_t i = 0; i < block.values.size(); ++i)
              block.values[i] += static_cast<float>(h * static_cast<double>(gradients[b][i]));
          },
          nothing);
    };
    CHECK((along(length) - along(-length)) / (2 * length) == doctest::Approx(squares).epsilon(0.01));
  }
}

TEST_CASE("multi-token prediction learns, and its drafts save calls without changing the text") {
  corpus text;
  for (int i = 0; i < 400; ++i) (i % 10 == 9 ? text.validation : text.training) += "the stages of a pipeline; ";
  settings s = small_settings();
  s.layers = 1;
  s.length = 24;
  s.steps = 60;
  s.rate = 0.02;
  s.mtp = 2;
  s.micro_batches = 2;
  const run_result run = train(s, text);  // throws if drafts change the text
  for (std::size_t k = 0; k < 2; ++k) CHECK(run.steps.back().mtp_losses[k] < 0.5 * run.steps.front().mtp_losses[k]);
  CHECK(run.steps.back().loss < 0.5 * run.steps.front().loss);
  REQUIRE(run.drafts.acceptance.size() == 2);
  CHECK(run.drafts.acceptance[0] > 0.5);
  CHECK(run.drafts.bytes_per_call > 1.4);
  CHECK(run.drafts.bytes == 8 * 48);
  CHECK(run.steps.back().draft_acceptance == run.drafts.acceptance);
  CHECK(run.loads.back().loads.size() == 3);  // one layer and two depths
  // Without its loss the chain stays where it was.
  s.mtp_weights = {0};
  const run_result weightless = train(s, text);
  CHECK(weightless.steps.back().mtp_losses[0] > run.steps.back().mtp_losses[0]);
}

TEST_CASE("sizes that a pipelined run cannot have are refused with the rule") {
  const auto refused = [](auto&& change, const char* words_of_it) {
    settings s = small_settings();
    s.pipeline = "1f1b";
    s.stages = 2;
    change(s);
    CAPTURE(words_of_it);
    std::string message;
    try {
      prepare_pipeline(s);
    } catch (const ts::error& e) {
      message = e.what();
    }
    CHECK(message.find(words_of_it) != std::string::npos);
  };
  refused([](settings& s) { s.pipeline = "spiral"; }, "there is no schedule 'spiral'");
  refused([](settings& s) { s.stages = 5; }, "between 1 and --layers 4");
  refused([](settings& s) { s.pipeline.clear(); }, "needs --pipeline");
  refused([](settings& s) { s.ranks = 3; }, "multiple of the 2 ranks of the pipeline");
  refused([](settings& s) { s.micro_batches = 7; }, "--batch must be a multiple of 7");
  refused([](settings& s) { s.ranks = 4; }, "--batch must be a multiple of 24");
  refused([](settings& s) { s.pipeline = "dualpipe", s.stages = 4, s.micro_batches = 6; }, "at least 2 * num_ranks");
  refused([](settings& s) { s.mesh = "dp_shard=2"; }, "do not go together");
  refused([](settings& s) { s.checkpoint = "saved"; }, "--checkpoint and --resume");
  refused([](settings& s) { s.combine = combine_kind::reduced; }, "always sums in order");
  refused([](settings& s) { s.mtp = 12; }, "less than --seq-len 12");
  refused([](settings& s) { s.mtp_weights = {0.1, -1}; }, "must not be negative");
  settings s = small_settings();
  s.pipeline = "dualpipev";
  s.stages = 4;
  prepare_pipeline(s);
  CHECK(s.ranks == 2);
}
