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
#include "../sharded_parameters.hpp"

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
  ts::training_mesh mesh;
  ts::shard::mesh_groups<self> ranks{comm, mesh, false};
  std::unique_ptr<language_model<double>> model;
  std::unique_ptr<sharded_parameters<double, self>> store;
  std::vector<std::vector<std::vector<double>>> values;  // [group][tensor]
  std::vector<std::uint8_t> tokens;
  std::vector<std::int16_t> targets;
  std::vector<double> state;
  std::vector<std::int32_t> chunks{0, 5, 10, 15};  // one sequence each

  /// @param expert_contributions 3, or 1: the block sums itself.
  explicit fixture(balance_kind balance, std::int64_t expert_contributions = 1) {
    std::vector<std::unique_ptr<moe_block<double>>> blocks;
    const chunk_calls calls{.chunks = {3}, .chunk_rows = 5, .max_rows = rows};
    for (int l = 0; l < s.layers; ++l) blocks.push_back(make_block<double>(s, balance, calls, comm, comm));
    model = std::make_unique<language_model<double>>(
        model_shape{.hidden = s.hidden, .layers = s.layers, .experts = s.experts, .conv_width = 3, .max_rows = rows},
        std::move(blocks));
    const contribution_counts counts{3, 3, expert_contributions, expert_contributions};
    store =
        std::make_unique<sharded_parameters<double, self>>(model->groups(), static_cast<int>(s.experts), ranks, counts);
    values.resize(model->groups().size());
    model->initialize(7, [&](int group, int i, std::span<const double> whole) {
      CHECK(i == static_cast<int>(values[static_cast<std::size_t>(group)].size()));
      values[static_cast<std::size_t>(group)].emplace_back(whole.begin(), whole.end());
      store->set(group, i, whole);
    });
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
    std::vector<double> own = state, losses(3);
    model->forward(*store, ts::pass::train, input(), own);
    model->loss(input(), chunks, 1.0, losses.data());
    double sum = losses[0] + losses[1] + losses[2];
    for (const auto& block : model->blocks())
      for (std::int64_t c = 0; c < 3; ++c) sum += block->auxiliary_loss(c);
    return sum;
  }

  double difference(int group, int tensor, std::size_t i) {
    std::vector<double>& whole = values[static_cast<std::size_t>(group)][static_cast<std::size_t>(tensor)];
    const double kept = whole[i], h = 1e-5;
    const auto loss_at = [&](double value) {
      whole[i] = value;
      store->set(group, tensor, whole);
      return loss();
    };
    const double up = loss_at(kept + h), down = loss_at(kept - h);
    whole[i] = kept;
    store->set(group, tensor, whole);
    return (up - down) / (2 * h);
  }

  std::vector<double> gradient(int group, int tensor) const {
    const auto part = store->local(group, tensor);
    return {part.gradient, part.gradient + part.count};
  }
};

void check_gradients(balance_kind balance) {
  fixture f(balance);
  f.loss();
  f.model->backward(*f.store, f.input(), f.chunks);

  // Every tensor, some of its elements.
  const auto& groups = f.model->groups();
  for (int g = 0; g < static_cast<int>(groups.size()); ++g) {
    const auto& entries = groups[static_cast<std::size_t>(g)].table.entries();
    for (int t = 0; t < static_cast<int>(entries.size()); ++t) {
      const parameter& p = entries[static_cast<std::size_t>(t)];
      CAPTURE(p.name);
      const std::vector<double> gradient = f.gradient(g, t);
      REQUIRE(static_cast<std::int64_t>(gradient.size()) == p.count);
      for (std::int64_t i = 0; i < p.count; i += 1 + p.count / 25) {
        const auto at = static_cast<std::size_t>(p.name == "embedding" ? 97 * f.s.hidden + i % 40 : i);
        // The loss is about 80, so its rounding alone moves the difference quotient by 1e-9.
        CHECK(gradient[at] == doctest::Approx(f.difference(g, t, at)).epsilon(1e-6).scale(1e-2));
      }
    }
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

TEST_CASE("a block that sums its experts' gradients has the bits of contributions summed in their order") {
  fixture one(balance_kind::loss, 1), three(balance_kind::loss, 3);
  for (fixture* f : {&one, &three}) {
    f->loss();
    f->model->backward(*f->store, f->input(), f->chunks);
  }
  for (int g = 0; g < static_cast<int>(one.model->groups().size()); ++g) {
    for (int t = 0; t < static_cast<int>(one.values[static_cast<std::size_t>(g)].size()); ++t)
      CHECK(one.gradient(g, t) == three.gradient(g, t));
  }
}

TEST_CASE("a sequence read in two calls with its state carried on gives the logits of one call") {
  fixture f(balance_kind::none);
  std::vector<double> state(static_cast<std::size_t>(f.model->state_size(1)), 0.0), halves;
  const std::span<const std::uint8_t> tokens(f.tokens.data(), 6);
  std::vector<double> whole_state = state;
  const std::span<double> logits = f.model->forward(*f.store, ts::pass::eval, {1, 6, tokens, {}}, whole_state);
  const std::vector<double> whole(logits.begin(), logits.end());
  for (const auto& [first, count] : {std::pair{0, 1}, std::pair{1, 4}, std::pair{5, 1}}) {
    const auto part = f.model->forward(
        *f.store, ts::pass::eval,
        {1, count, tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)), {}}, state);
    halves.insert(halves.end(), part.begin(), part.end());
  }
  CHECK(halves == whole);
  CHECK(state == whole_state);
}

TEST_CASE("no byte sees a later one") {
  fixture f(balance_kind::none);
  std::vector<double> state = f.state;
  auto logits = f.model->forward(*f.store, ts::pass::eval, f.input(), state);
  const std::vector<double> before(logits.begin(), logits.end());
  f.tokens[3] = 200;  // position 3 of the first sequence
  state = f.state;
  logits = f.model->forward(*f.store, ts::pass::eval, f.input(), state);
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
