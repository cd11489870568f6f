// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Balance losses and the bias rule.

#include <array>
#include <cmath>
#include <limits>

#include <doctest/doctest.h>

#include "oracle.hpp"

namespace {

using namespace router_test;
namespace score = ts::score;
namespace select = ts::select;
namespace weigh = ts::weigh;
namespace balance = ts::balance;

template <class Router, class A>
std::vector<A> losses_of(const Router& r, const problem<A>& p, const std::vector<std::int64_t>& global,
                         std::vector<float> coefficients, std::int64_t chunk_tokens = 0) {
  const std::int64_t rows = ts::num_chunks(p.num_tokens, chunk_tokens);
  std::vector<A> values(static_cast<std::size_t>(rows * Router::num_losses), A(-1));
  r.losses(ts::host_stream{}, p.inputs(), ts::const_balance_counts{global.data(), p.num_experts}, coefficients.data(),
           chunk_tokens, ts::matrix_view<A>{values.data(), rows, Router::num_losses});
  return values;
}

template <class Router, class A>
std::vector<A> gradient_of(const Router& r, problem<A>& p, const std::vector<std::int64_t>& global,
                           std::vector<float> coefficients, A dweight = A(0), A loss_scale = A(1)) {
  std::vector<A> dweights(p.weights.size(), dweight);
  std::vector<A> dlogits(p.logits.size(), A(std::nan("")));
  r.backward(ts::host_stream{}, p.inputs(), p.out(), ts::matrix_view<const A>{dweights.data(), p.num_tokens, p.top_k},
             ts::const_balance_counts{global.data(), p.num_experts}, coefficients.data(), loss_scale,
             ts::matrix_view<A>{dlogits.data(), p.num_tokens, p.num_experts});
  return dlogits;
}

TEST_CASE("an evenly used router has exactly the coefficient as its switch and sequence loss") {
  using router =
      ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss, balance::sequence_loss>;
  const router r({.num_experts = 4, .top_k = 2});
  problem<double> p(4, 4, 2);
  p.logits = {1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1};
  p.route(r);
  CHECK(p.counts == std::vector<std::int64_t>{2, 2, 2, 2, 4, 1});
  const auto values = losses_of(r, p, p.counts, {0.25f, 0.5f});
  CHECK(values[0] == doctest::Approx(0.25).epsilon(1e-14));
  CHECK(values[1] == doctest::Approx(0.5).epsilon(1e-14));
}

TEST_CASE("one expert that takes all has E / K times the coefficient") {
  const ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss> r(
      {.num_experts = 8, .top_k = 1});
  problem<double> p(5, 8, 1);
  for (int t = 0; t < 5; ++t) p.logits[t * 8 + 3] = 100.0;
  p.route(r);
  CHECK(losses_of(r, p, p.counts, {0.5f})[0] == doctest::Approx(4.0).epsilon(1e-12));
}

TEST_CASE("counts carry no gradient: the switch loss is linear in the probabilities") {
  const ts::router<score::softmax, select::top_k, weigh::raw, balance::switch_loss> r({.num_experts = 3, .top_k = 1});
  problem<double> p(2, 3, 1);
  p.logits = {1.0, 0.5, -0.5, 0.2, 0.9, 0.1};
  p.route(r);
  REQUIRE(p.counts == std::vector<std::int64_t>{1, 1, 0, 2, 1});
  const auto g = gradient_of(r, p, p.counts, {1.0f});
  for (int t = 0; t < 2; ++t) {
    const doubles prob = softmax_of({p.logits.begin() + t * 3, p.logits.begin() + t * 3 + 3});
    const doubles dp = {3.0 / (1 * 2.0 * 2.0), 3.0 / (1 * 2.0 * 2.0), 0.0};  // E count / (K T T)
    const double mean = prob[0] * dp[0] + prob[1] * dp[1];
    for (int e = 0; e < 3; ++e) CHECK(g[t * 3 + e] == doctest::Approx(prob[e] * (dp[e] - mean)).epsilon(1e-12));
  }
}

TEST_CASE("trap: the sequence loss counts the top K of the unbiased, ungrouped scores") {
  using router =
      ts::router<score::sigmoid, select::group_limited<>, weigh::normalized, balance::bias, balance::sequence_loss>;
  const router r({.num_experts = 6, .top_k = 2, .select = {.groups = 2, .kept_groups = 1}});
  problem<double> p(1, 6, 2);
  const doubles s = {0.8, 0.1, 0.1, 0.7, 0.5, 0.4};
  for (int e = 0; e < 6; ++e) p.logits[e] = std::log(s[e] / (1 - s[e]));
  p.bias = {0, 0, 0, 0, 0, 1};
  p.route(r);
  REQUIRE(p.ids_of(0) == std::vector<std::int32_t>{5, 3});
  // Unbiased and ungrouped: experts 0 and 3. f = E / (K T) = 3 for both.
  const double sum = 0.8 + 0.1 + 0.1 + 0.7 + 0.5 + 0.4;
  CHECK(losses_of(r, p, p.counts, {1.0f})[0] == doctest::Approx(3.0 * (0.8 + 0.7) / sum).epsilon(1e-12));
}

TEST_CASE("each packed sequence owns its T; empty sequences are none") {
  using router = ts::router<score::sigmoid, select::top_k, weigh::normalized, balance::sequence_loss>;
  const router r({.num_experts = 5, .top_k = 2});
  problem<double> packed(9, 5, 2);
  packed.randomize(21);
  packed.sequence_offsets = {0, 2, 2, 3, 9, 9};
  packed.route(r);
  CHECK(packed.counts[6] == 3);
  const double whole = losses_of(r, packed, packed.counts, {1.0f})[0];
  const auto whole_gradient = gradient_of(r, packed, packed.counts, {1.0f});
  double sum = 0;
  const std::array<int, 4> ends = {0, 2, 3, 9};
  for (std::size_t s = 0; s < 3; ++s) {
    const int length = ends[s + 1] - ends[s];
    problem<double> alone(length, 5, 2);
    std::copy_n(packed.logits.begin() + ends[s] * 5, length * 5, alone.logits.begin());
    alone.route(r);
    std::vector<std::int64_t> counts = alone.counts;
    counts[6] = 3;
    sum += losses_of(r, alone, counts, {1.0f})[0];
    const auto gradient = gradient_of(r, alone, counts, {1.0f});
    CHECK(std::equal(gradient.begin(), gradient.end(), whole_gradient.begin() + ends[s] * 5));
  }
  CHECK(whole == doctest::Approx(sum).epsilon(1e-14));
  // without offsets the call is one sequence, with another loss
  packed.sequence_offsets.clear();
  packed.route(r);
  CHECK(packed.counts[6] == 1);
  CHECK(std::abs(losses_of(r, packed, packed.counts, {1.0f})[0] - whole) > 1e-3);
}

TEST_CASE("z-loss is the mean square of the log-sum-exp, without overflow") {
  const ts::router<score::sigmoid, select::top_k, weigh::raw, balance::z_loss> r({.num_experts = 2, .top_k = 1});
  problem<double> p(2, 2, 1);
  p.logits = {0.0, 0.0, 1000.0, 1000.0};
  p.route(r);
  const double a = std::log(2.0), b = 1000.0 + std::log(2.0);
  CHECK(losses_of(r, p, p.counts, {0.5f})[0] == doctest::Approx(0.5 * (a * a + b * b) / 2).epsilon(1e-14));
  const auto g = gradient_of(r, p, p.counts, {0.5f});
  CHECK(g[0] == doctest::Approx(0.5 * 2 * a * 0.5 / 2).epsilon(1e-14));
  CHECK(g[3] == doctest::Approx(0.5 * 2 * b * 0.5 / 2).epsilon(1e-14));
}

using joint = ts::router<score::sigmoid, select::group_limited<>, weigh::normalized, balance::switch_loss,
                         balance::bias, balance::sequence_loss, balance::z_loss>;

joint make_joint() {
  return joint({.num_experts = 12, .top_k = 3, .select = {.groups = 4, .kept_groups = 2}, .weigh = {.scale = 2.5f}});
}

TEST_CASE("with global counts, splitting the tokens over ranks leaves every bit of loss and gradient") {
  const joint r = make_joint();
  const std::vector<float> coefficients = {0.3f, 0.2f, 0.1f};
  problem<float> whole(24, 12, 3);
  whole.randomize(31);
  for (int e = 0; e < 12; ++e) whole.bias.push_back(0.05f * float(e % 5));
  whole.sequence_offsets = {0, 4, 8, 16, 24};
  whole.route(r);
  const auto losses = losses_of(r, whole, whole.counts, coefficients, 8);
  const auto gradient = gradient_of(r, whole, whole.counts, coefficients, 0.7f);

  for (const std::vector<int>& cuts : {std::vector<int>{0, 8, 24}, {0, 16, 16, 24}, {0, 8, 16, 24}}) {
    std::vector<problem<float>> ranks;
    std::vector<std::int64_t> global(14, 0);
    for (std::size_t rank = 0; rank + 1 < cuts.size(); ++rank) {
      const int tokens = cuts[rank + 1] - cuts[rank];
      problem<float> part(tokens, 12, 3);
      std::copy_n(whole.logits.begin() + cuts[rank] * 12, tokens * 12, part.logits.begin());
      part.bias = whole.bias;
      part.sequence_offsets = {0};
      for (std::int32_t offset : whole.sequence_offsets) {
        if (offset > cuts[rank] && offset <= cuts[rank + 1]) part.sequence_offsets.push_back(offset - cuts[rank]);
      }
      part.route(r);
      for (int i = 0; i < 14; ++i) global[i] += part.counts[i];
      ranks.push_back(part);
    }
    CHECK(global == whole.counts);
    std::vector<float> joined_losses, joined_gradient;
    std::vector<std::int32_t> joined_ids;
    for (auto& part : ranks) {
      for (float x : losses_of(r, part, global, coefficients, 8)) joined_losses.push_back(x);
      for (float x : gradient_of(r, part, global, coefficients, 0.7f)) joined_gradient.push_back(x);
      joined_ids.insert(joined_ids.end(), part.expert_ids.begin(), part.expert_ids.end());
    }
    CHECK(joined_ids == whole.expert_ids);
    CHECK(joined_losses == losses);
    CHECK(joined_gradient == gradient);
  }
}

TEST_CASE("a sequence's loss is reported with the chunk of its last token") {
  const ts::router<score::sigmoid, select::top_k, weigh::normalized, balance::sequence_loss> r(
      {.num_experts = 4, .top_k = 2});
  problem<double> p(8, 4, 2);
  p.randomize(17);
  p.sequence_offsets = {0, 5, 8};
  p.route(r);
  const auto chunks = losses_of(r, p, p.counts, {1.0f}, 4);
  CHECK(chunks[0] == 0.0);
  CHECK(chunks[1] == doctest::Approx(losses_of(r, p, p.counts, {1.0f})[0]).epsilon(1e-14));
}

TEST_CASE("chunk sums of the batch losses are those of their own tokens, the last chunk shorter") {
  const ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss, balance::z_loss> r(
      {.num_experts = 4, .top_k = 2});
  problem<double> p(7, 4, 2);
  p.randomize(18).route(r);
  const auto chunks = losses_of(r, p, p.counts, {1.0f, 0.5f}, 3);
  REQUIRE(chunks.size() == 6);
  for (int c = 0; c < 3; ++c) {
    const int length = c == 2 ? 1 : 3;
    problem<double> part(length, 4, 2);
    std::copy_n(p.logits.begin() + c * 12, length * 4, part.logits.begin());
    const auto alone = losses_of(r, part, p.counts, {1.0f, 0.5f});
    CHECK(chunks[c * 2] == alone[0]);
    CHECK(chunks[c * 2 + 1] == alone[1]);
  }
}

TEST_CASE("coefficients come with the call; the options hold their defaults in the order of the losses") {
  const joint r = make_joint();
  CHECK(joint::num_losses == 3);
  CHECK(joint::has_bias);
  CHECK(joint::loss_names()[0] == "switch_loss");
  CHECK(joint::loss_names()[1] == "sequence_loss");
  CHECK(joint::loss_names()[2] == "z_loss");
  CHECK(r.default_coefficients() == std::array<float, 3>{0.01f, 1e-4f, 1e-3f});
  problem<double> p(6, 12, 3);
  p.randomize(3).route(r);
  const auto once = losses_of(r, p, p.counts, {1.0f, 0.0f, 0.5f});
  const auto twice = losses_of(r, p, p.counts, {2.0f, 0.0f, 1.0f});
  CHECK(once[1] == 0.0);
  CHECK(twice[0] == 2 * once[0]);
  CHECK(twice[2] == 2 * once[2]);
  // all coefficients 0 leave the weights' gradient
  const ts::router<score::sigmoid, select::group_limited<>, weigh::normalized> plain(
      {.num_experts = 12, .top_k = 3, .select = {.groups = 4, .kept_groups = 2}, .weigh = {.scale = 2.5f}});
  const auto without = gradient_of(plain, p, {}, {}, 1.0);
  const auto with = gradient_of(r, p, p.counts, {0, 0, 0}, 1.0);
  for (std::size_t i = 0; i < with.size(); ++i) CHECK(with[i] == doctest::Approx(without[i]).epsilon(1e-14));
}

TEST_CASE("loss_scale multiplies the losses' part of the gradient only") {
  const joint r = make_joint();
  problem<double> p(6, 12, 3);
  p.randomize(4).route(r);
  const std::vector<float> c = {0.5f, 0.25f, 0.125f};
  const auto none = gradient_of(r, p, p.counts, c, 1.0, 0.0);
  const auto one = gradient_of(r, p, p.counts, c, 1.0, 1.0);
  const auto three = gradient_of(r, p, p.counts, c, 1.0, 3.0);
  double largest = 0;
  for (std::size_t i = 0; i < one.size(); ++i) {
    CHECK(three[i] - none[i] == doctest::Approx(3 * (one[i] - none[i])).epsilon(1e-10).scale(1e-3));
    largest = std::max(largest, std::abs(one[i] - none[i]));
  }
  CHECK(largest > 1e-3);
}

TEST_CASE("trap: the bias falls above the mean load, rises below it, and a tie leaves it alone") {
  std::array<float, 4> bias = {0.5f, 0.5f, 0.5f, 0.5f};
  const std::array<std::int64_t, 4> load = {5, 3, 4, 4};
  balance::update_bias(ts::host_stream{}, bias.data(), load.data(), 4, 0.25f);
  CHECK(bias == std::array<float, 4>{0.25f, 0.75f, 0.5f, 0.5f});
  const std::array<std::int64_t, 4> even = {7, 7, 7, 7};
  balance::update_bias(ts::host_stream{}, bias.data(), even.data(), 4, 0.25f);
  CHECK(bias == std::array<float, 4>{0.25f, 0.75f, 0.5f, 0.5f});
  const std::array<std::int64_t, 4> none = {0, 0, 0, 0};
  balance::update_bias(ts::host_stream{}, bias.data(), none.data(), 4, 0.25f);
  CHECK(bias == std::array<float, 4>{0.25f, 0.75f, 0.5f, 0.5f});
}

TEST_CASE("the bias rule compares integers: one token of a hundred billion tells") {
  std::array<float, 3> bias = {};
  const std::int64_t many = 100'000'000'000;
  const std::array<std::int64_t, 3> load = {many, many + 1, many - 1};
  balance::update_bias(ts::host_stream{}, bias.data(), load.data(), 3, 1.0f);
  CHECK(bias == std::array<float, 3>{0.0f, -1.0f, 1.0f});
}

TEST_CASE("gradient accumulation: the load of N micro-batches of 1 is that of one of N") {
  const joint r = make_joint();
  problem<float> whole(12, 12, 3);
  whole.randomize(41);
  whole.bias.assign(12, 0.0f);
  whole.route(r);
  std::vector<std::int64_t> load(12, 0);
  for (int m = 0; m < 12; ++m) {
    problem<float> micro(1, 12, 3);
    std::copy_n(whole.logits.begin() + m * 12, 12, micro.logits.begin());
    micro.bias = whole.bias;
    micro.route(r);
    for (int e = 0; e < 12; ++e) load[e] += micro.counts[e];
    r.route(ts::host_stream{}, micro.inputs(), micro.out(), ts::balance_counts{});  // recomputation does not count
  }
  std::vector<float> together(12, 0.0f), accumulated(12, 0.0f);
  balance::update_bias(ts::host_stream{}, together.data(), whole.counts.data(), 12, 1e-3f);
  balance::update_bias(ts::host_stream{}, accumulated.data(), load.data(), 12, 1e-3f);
  CHECK(together == accumulated);
  CHECK(std::count(together.begin(), together.end(), 0.0f) < 12);
}

TEST_CASE("steps of the bias rule even out a skewed router") {
  const ts::router<score::sigmoid, select::top_k, weigh::normalized, balance::bias> r({.num_experts = 8, .top_k = 2});
  problem<float> p(512, 8, 2);
  p.randomize(51, 1.0);
  for (int t = 0; t < 512; ++t) {
    for (int e = 0; e < 8; ++e) p.logits[t * 8 + e] += 0.4f * float(e);
  }
  p.bias.assign(8, 0.0f);
  const auto most = [&] { return double(*std::max_element(p.counts.begin(), p.counts.begin() + 8)) / 128.0; };
  p.route(r);
  CHECK(most() > 2.0);
  for (int step = 0; step < 400; ++step) {
    balance::update_bias(ts::host_stream{}, p.bias.data(), p.counts.data(), 8, 2e-3f);
    p.route(r);
  }
  CHECK(most() < 1.1);
}

TEST_CASE("bad loads and rates leave the bias as it was") {
  std::array<float, 2> bias = {1.0f, 2.0f};
  const std::array<std::int64_t, 2> load = {1, 3}, negative = {4, -1};
  CHECK_THROWS_WITH_AS(balance::update_bias(ts::host_stream{}, bias.data(), negative.data(), 2, 1.0f),
                       "the load of expert 1 is -1, a count cannot be negative", ts::invalid_argument);
  CHECK_THROWS_AS(balance::update_bias(ts::host_stream{}, bias.data(), load.data(), 2, -1.0f), ts::invalid_argument);
  CHECK_THROWS_AS(balance::update_bias(ts::host_stream{}, bias.data(), load.data(), 2, std::nanf("")),
                  ts::invalid_argument);
  CHECK(bias == std::array<float, 2>{1.0f, 2.0f});
}

}  // namespace
