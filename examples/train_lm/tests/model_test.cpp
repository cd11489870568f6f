// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

/// @file
/// The hand-written backward of the model against central differences, and its parts against plain formulas.

#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/comm/self.hpp>

#include "../layers.hpp"
#include "../math.hpp"
#include "../model.hpp"

namespace {

using namespace train_lm;
using self = ts::comm::self<ts::space::host>;

constexpr std::int64_t sequences = 3, length = 5, rows = sequences * length;

settings small_settings() {
  settings s;
  s.hidden = 8;
  s.intermediate = 5;
  s.experts = 4;
  s.top_k = 2;
  s.layers = 2;
  s.loss_coefficient = 0.3;  // large, so that an error in its gradient would show
  return s;
}

/// A small model in double with text to learn and a recurrent state that is not zero.
struct fixture {
  settings s = small_settings();
  self comm;
  std::unique_ptr<language_model<double>> model;
  std::vector<std::uint8_t> tokens;
  std::vector<std::int16_t> targets;
  std::vector<double> state;
  std::vector<std::int32_t> chunks{0, 5, 15};  // one sequence, then two

  explicit fixture(balance_kind balance) {
    std::vector<std::unique_ptr<moe_block<double>>> blocks;
    for (int l = 0; l < s.layers; ++l) blocks.push_back(make_block<double>(s, balance, rows, 5, comm));
    model = std::make_unique<language_model<double>>(
        model_shape{.hidden = s.hidden, .layers = s.layers, .experts = s.experts, .conv_width = 3, .max_rows = rows},
        std::move(blocks));
    model->initialize(7);
    const random_stream random(3, "text");
    for (std::int64_t i = 0; i < rows; ++i) {
      tokens.push_back(static_cast<std::uint8_t>(random.bits(static_cast<std::uint64_t>(i)) % 5 + 97));
      targets.push_back(i % 7 == 3 ? no_target
                                   : static_cast<std::int16_t>(random.bits(static_cast<std::uint64_t>(100 + i)) % 256));
    }
    for (std::int64_t i = 0; i < model->state_size(sequences); ++i)
      state.push_back(0.5 * random.normal(static_cast<std::uint64_t>(1000 + i)));
  }

  batch input() const { return {sequences, length, tokens, targets}; }

  /// Cross entropy plus auxiliary losses.
  double loss() {
    std::vector<double> own = state, losses(2);
    model->forward(ts::pass::train, input(), own);
    model->loss(input(), chunks, 1.0, losses.data());
    double sum = losses[0] + losses[1];
    for (const auto& block : model->blocks())
      for (std::int64_t c = 0; c < 3; ++c) sum += block->auxiliary_loss(c);
    return sum;
  }

  double difference(double& parameter) {
    const double kept = parameter, h = 1e-5;
    parameter = kept + h;
    const double up = loss();
    parameter = kept - h;
    const double down = loss();
    parameter = kept;
    return (up - down) / (2 * h);
  }
};

void check_gradients(balance_kind balance) {
  fixture f(balance);
  language_model<double>& model = *f.model;
  const auto dense = static_cast<std::size_t>(model.table().size()),
             gates = static_cast<std::size_t>(model.gate_table().size());
  // The layers count chunks of 5 tokens, the replicated ones here chunks of 5 and 10: both only split the sum.
  std::vector<double> contributions(2 * dense), gate_contributions(3 * gates);
  f.loss();
  std::vector<std::int32_t> chunks{0, 5, 10, 15};
  std::vector<double> dense3(3 * dense), losses(3), own = f.state;
  model.forward(ts::pass::train, f.input(), own);
  model.loss(f.input(), chunks, 1.0, losses.data());
  model.backward(f.input(), chunks, dense3.data(), gate_contributions.data());

  // Every tensor, some of its elements.
  const auto check = [&](const char* what, double expected, double actual) {
    CAPTURE(what);
    CHECK(actual == doctest::Approx(expected).epsilon(1e-6).scale(1e-3));
  };
  for (const parameter& p : model.table().entries()) {
    for (std::int64_t i = 0; i < p.count; i += 1 + p.count / 9) {
      const auto at = static_cast<std::size_t>(p.offset + (p.name == "embedding" ? 97 * f.s.hidden + i % 40 : i));
      const double sum = dense3[at] + dense3[dense + at] + dense3[2 * dense + at];
      check(p.name.c_str(), f.difference(model.parameters()[at]), sum);
    }
  }
  const std::size_t gate = gates / static_cast<std::size_t>(f.s.layers);
  for (std::size_t i = 0; i < gates; i += 3) {
    const std::size_t first = i / gate * 3 * gate + i % gate;
    const double sum =
        gate_contributions[first] + gate_contributions[first + gate] + gate_contributions[first + 2 * gate];
    check("gate", f.difference(model.gate_parameters()[i]), sum);
  }
  for (const auto& block : model.blocks()) {
    const std::vector<double> gradients(block->gradients().begin(), block->gradients().end());
    for (std::size_t i = 0; i < gradients.size(); i += 11)
      check("expert", f.difference(block->weights()[i]), gradients[i]);
  }
}

}  // namespace

TEST_CASE("every gradient of the model is that of central differences, without balancing") {
  check_gradients(balance_kind::none);
}

TEST_CASE("every gradient of the model is that of central differences, with the auxiliary loss") {
  check_gradients(balance_kind::loss);
}

TEST_CASE("every gradient of the model is that of central differences, with the selection bias") {
  check_gradients(balance_kind::bias);
}

TEST_CASE("a sequence read in two calls with its state carried on gives the logits of one call") {
  fixture f(balance_kind::none);
  std::vector<double> state(static_cast<std::size_t>(f.model->state_size(1)), 0.0), halves;
  const std::span<const std::uint8_t> tokens(f.tokens.data(), 6);
  std::vector<double> whole_state = state;
  const std::span<double> logits = f.model->forward(ts::pass::eval, {1, 6, tokens, {}}, whole_state);
  const std::vector<double> whole(logits.begin(), logits.end());
  for (const auto& [first, count] : {std::pair{0, 1}, std::pair{1, 4}, std::pair{5, 1}}) {
    const auto part = f.model->forward(
        ts::pass::eval,
        {1, count, tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)), {}}, state);
    halves.insert(halves.end(), part.begin(), part.end());
  }
  CHECK(halves == whole);
  CHECK(state == whole_state);
}

TEST_CASE("no byte sees a later one") {
  fixture f(balance_kind::none);
  std::vector<double> state = f.state;
  auto logits = f.model->forward(ts::pass::eval, f.input(), state);
  const std::vector<double> before(logits.begin(), logits.end());
  f.tokens[3] = 200;  // position 3 of the first sequence
  state = f.state;
  logits = f.model->forward(ts::pass::eval, f.input(), state);
  const std::vector<double> after(logits.begin(), logits.end());
  const auto row = [](const std::vector<double>& all, std::int64_t t) {
    return std::vector<double>(all.begin() + t * 256, all.begin() + (t + 1) * 256);
  };
  for (std::int64_t t = 0; t < rows; ++t) {
    CAPTURE(t);
    CHECK((row(before, t) == row(after, t)) == (t != 3 && t != 4));
  }
}

TEST_CASE("the vector exponential agrees with the library's") {
  double worst = 0;
  for (float x = -86.0f; x < 87.0f; x += 0.0137f) {
    const double exact = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::abs(static_cast<double>(exponential(x)) - exact) / exact);
  }
  CHECK(worst < 2.5e-7);
  CHECK(exponential(-1000.0f) < 1e-37f);
  CHECK(std::isfinite(exponential(1000.0f)));
}

TEST_CASE("AdamW's first step moves every parameter by the rate against its gradient's sign") {
  adamw<double> moments(3);
  std::vector<double> parameters{1, 2, 3}, gradients{0.5, -4, 0};
  moments.update({.weight_decay = 0.5}, 1, 0.1, 1.0, true, 0, 3, parameters.data(), gradients.data());
  CHECK(parameters[0] == doctest::Approx(1 * (1 - 0.05) - 0.1));
  CHECK(parameters[1] == doctest::Approx(2 * (1 - 0.05) + 0.1));
  CHECK(parameters[2] == doctest::Approx(3 * (1 - 0.05)));
}
