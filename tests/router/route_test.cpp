// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Selection by hand-made examples, the traps where implementations differ, edges of the sizes.

#include <array>
#include <cmath>
#include <limits>
#include <set>

#include <doctest/doctest.h>

#include "oracle.hpp"

namespace {

using namespace router_test;
namespace score = ts::score;
namespace select = ts::select;
namespace weigh = ts::weigh;
namespace balance = ts::balance;

using ids = std::vector<std::int32_t>;

template <class Router>
problem<double> route_one(const Router& router, std::vector<double> logits, std::vector<float> bias = {}) {
  problem<double> p(1, router.num_experts(), router.top_k());
  REQUIRE(logits.size() == p.logits.size());
  p.logits = std::move(logits);
  p.bias = std::move(bias);
  p.route(router);
  return p;
}

double logit_of(double sigmoid) { return std::log(sigmoid / (1.0 - sigmoid)); }

std::vector<double> logits_of(std::vector<double> sigmoids) {
  for (double& s : sigmoids) s = logit_of(s);
  return sigmoids;
}

// A score that is its logit: selections can then be written down by hand, negative keys and exact ties included.
struct identity {
  struct options {};
  static constexpr auto over = ts::score_over::each;
  template <class A>
  static A value(A logit, const options&) {
    return logit;
  }
  template <class A>
  static A derivative(A, A, const options&) {
    return A(1);
  }
};

TEST_CASE("top-k takes the largest keys in descending order") {
  const ts::router<identity, select::top_k, weigh::raw> r({.num_experts = 6, .top_k = 3});
  const auto p = route_one(r, {0.5, -1.0, 4.0, 2.0, 3.0, 0.0});
  CHECK(p.ids_of(0) == ids{2, 4, 3});
  CHECK(p.weights_of(0) == doubles{4.0, 3.0, 2.0});
}

TEST_CASE("equal keys go to the lowest expert id") {
  const ts::router<identity, select::top_k, weigh::raw> r({.num_experts = 6, .top_k = 3});
  CHECK(route_one(r, {1, 1, 1, 1, 1, 1}).ids_of(0) == ids{0, 1, 2});
  CHECK(route_one(r, {0, 2, 1, 2, 1, 1}).ids_of(0) == ids{1, 3, 2});
  CHECK(route_one(r, {-0.0, 0.0, -0.0, 0.0, -5, -5}).ids_of(0) == ids{0, 1, 2});
}

TEST_CASE("scores that round to the same value are ties; selection on logits still tells them apart") {
  const ts::router<score::sigmoid, select::top_k, weigh::raw> by_score({.num_experts = 3, .top_k = 1});
  const ts::router<score::sigmoid_selected, select::top_k, weigh::raw> by_logit({.num_experts = 3, .top_k = 1});
  CHECK(route_one(by_score, {40.0, 41.0, 42.0}).ids_of(0) == ids{0});
  CHECK(route_one(by_logit, {40.0, 41.0, 42.0}).ids_of(0) == ids{2});
}

TEST_CASE("equal groups go to the lowest group") {
  const ts::router<identity, select::group_limited<>, weigh::raw> r(
      {.num_experts = 6, .top_k = 2, .select = {.groups = 3, .kept_groups = 1}});
  CHECK(route_one(r, {0, 1, 1, 0, 0.5, 0.5}).ids_of(0) == ids{1, 0});
  CHECK(route_one(r, {0, 0.9, 1, 0, 0.5, 0.5}).ids_of(0) == ids{2, 3});
}

TEST_CASE("trap: unselected groups are masked with -inf, so that a kept expert with s + b < 0 wins against them") {
  // Groups {0, 1}, {2, 3}. The bias makes every key of the kept group but one negative; with a mask of 0.0 the masked
  // expert 2 would come before expert 1.
  const ts::router<score::sigmoid, select::group_limited<>, weigh::normalized, balance::bias> r(
      {.num_experts = 4, .top_k = 2, .select = {.groups = 2, .kept_groups = 1}});
  const auto p = route_one(r, logits_of({0.9, 0.2, 0.1, 0.1}), {0.0f, -0.5f, -0.4f, -0.4f});
  CHECK(p.ids_of(0) == ids{0, 1});
  // All keys negative, in all groups.
  const auto q = route_one(r, logits_of({0.4, 0.2, 0.3, 0.1}), {-2.0f, -2.0f, -1.0f, -1.0f});
  CHECK(q.ids_of(0) == ids{2, 3});
}

TEST_CASE("trap: the group score is the sum of the two largest keys (V3) or the largest (V2)") {
  const std::vector<double> logits = {5.0, 0.0, 0.0, 3.0, 3.0, 0.0};
  const ts::router<identity, select::group_limited<select::group_score::top2_sum>, weigh::raw> v3(
      {.num_experts = 6, .top_k = 2, .select = {.groups = 2, .kept_groups = 1}});
  const ts::router<identity, select::group_limited<select::group_score::max>, weigh::raw> v2(
      {.num_experts = 6, .top_k = 2, .select = {.groups = 2, .kept_groups = 1}});
  CHECK(route_one(v3, logits).ids_of(0) == ids{3, 4});
  CHECK(route_one(v2, logits).ids_of(0) == ids{0, 1});
}

TEST_CASE("trap: group scores see the bias") {
  const ts::router<score::sigmoid, select::group_limited<>, weigh::raw, balance::bias> r(
      {.num_experts = 4, .top_k = 1, .select = {.groups = 2, .kept_groups = 1}});
  CHECK(route_one(r, logits_of({0.6, 0.6, 0.5, 0.5}), {0, 0, 0, 0}).ids_of(0) == ids{0});
  CHECK(route_one(r, logits_of({0.6, 0.6, 0.5, 0.5}), {0, 0, 0, 0.3f}).ids_of(0) == ids{3});
}

TEST_CASE("trap: normalisation adds no epsilon unless asked") {
  const std::vector<double> tiny = {-60.0, -61.0, -70.0};
  const ts::router<score::sigmoid, select::top_k, weigh::normalized> plain({.num_experts = 3, .top_k = 2});
  const auto p = route_one(plain, tiny);
  CHECK(p.weights_of(0)[0] == doctest::Approx(1.0 / (1.0 + std::exp(-1.0))).epsilon(1e-12));
  const ts::router<score::sigmoid, select::top_k, weigh::normalized> with_epsilon(
      {.num_experts = 3, .top_k = 2, .weigh = {.epsilon = 1e-20f}});
  const double sum = std::exp(-60.0) + std::exp(-61.0);
  CHECK(route_one(with_epsilon, tiny).weights_of(0)[0] ==
        doctest::Approx(std::exp(-60.0) / (sum + double(1e-20f))).epsilon(1e-12));
}

TEST_CASE("trap: weights are normalised first and scaled then") {
  // With the scale first, epsilon would weigh 2.5 times less.
  const ts::router<score::sigmoid, select::top_k, weigh::normalized> r(
      {.num_experts = 2, .top_k = 2, .weigh = {.scale = 2.5f, .epsilon = 0.5f}});
  const auto p = route_one(r, logits_of({0.6, 0.4}));
  CHECK(p.weights_of(0)[0] == doctest::Approx(2.5 * (0.6 / 1.5)).epsilon(1e-12));
  CHECK(p.weights_of(0)[1] == doctest::Approx(2.5 * (0.4 / 1.5)).epsilon(1e-12));
  const ts::router<score::sigmoid, select::top_k, weigh::raw> raw(
      {.num_experts = 2, .top_k = 1, .weigh = {.scale = 16}});
  CHECK(route_one(raw, logits_of({0.25, 0.5})).weights_of(0)[0] == doctest::Approx(8.0).epsilon(1e-12));
}

TEST_CASE("trap: softmax before selection, after selection, and sigmoid after selection weigh differently") {
  const std::vector<double> logits = {std::log(1.0), std::log(2.0), std::log(4.0), std::log(1.0)};
  const auto before =
      route_one(ts::router<score::softmax, select::top_k, weigh::raw>({.num_experts = 4, .top_k = 2}), logits);
  CHECK(before.ids_of(0) == ids{2, 1});
  CHECK(before.weights_of(0)[0] == doctest::Approx(4.0 / 8.0));
  CHECK(before.weights_of(0)[1] == doctest::Approx(2.0 / 8.0));
  const auto after =
      route_one(ts::router<score::softmax_selected, select::top_k, weigh::raw>({.num_experts = 4, .top_k = 2}), logits);
  CHECK(after.ids_of(0) == ids{2, 1});
  CHECK(after.weights_of(0)[0] == doctest::Approx(4.0 / 6.0));
  CHECK(after.weights_of(0)[1] == doctest::Approx(2.0 / 6.0));
  const auto llama =
      route_one(ts::router<score::sigmoid_selected, select::top_k, weigh::raw>({.num_experts = 4, .top_k = 2}), logits);
  CHECK(llama.ids_of(0) == ids{2, 1});
  CHECK(llama.weights_of(0)[0] == doctest::Approx(4.0 / 5.0));
  CHECK(llama.weights_of(0)[1] == doctest::Approx(2.0 / 3.0));
}

TEST_CASE("trap: the weight of Llama 4 applies to the input, that of the others to the output") {
  CHECK(ts::router<score::sigmoid_selected, select::top_k, weigh::on_input<weigh::raw>>::weights_on_input);
  CHECK(!ts::router<score::sigmoid_selected, select::top_k, weigh::raw>::weights_on_input);
  CHECK(!ts::router<>::weights_on_input);
}

TEST_CASE("trap: the bias selects and never weighs") {
  const ts::router<score::sigmoid, select::top_k, weigh::raw, balance::bias> r({.num_experts = 3, .top_k = 2});
  const auto p = route_one(r, logits_of({0.9, 0.5, 0.2}), {0.0f, 0.0f, 1.0f});
  CHECK(p.ids_of(0) == ids{2, 0});
  CHECK(p.weights_of(0)[0] == doctest::Approx(0.2).epsilon(1e-12));
  CHECK(p.weights_of(0)[1] == doctest::Approx(0.9).epsilon(1e-12));
  // The same bias on all experts changes nothing at all, nor does an absent one.
  const auto shifted = route_one(r, logits_of({0.9, 0.5, 0.2}), {7.0f, 7.0f, 7.0f});
  const auto none = route_one(r, logits_of({0.9, 0.5, 0.2}));
  CHECK(shifted.ids_of(0) == none.ids_of(0));
  CHECK(shifted.weights_of(0) == none.weights_of(0));
}

TEST_CASE("trap: the counts of all experts sum to T K") {
  const ts::router<score::sigmoid, select::group_limited<>, weigh::normalized> r(
      {.num_experts = 32, .top_k = 5, .select = {.groups = 8, .kept_groups = 3}});
  problem<float> p(1000, 32, 5);
  p.randomize(3).route(r);
  CHECK(std::accumulate(p.counts.begin(), p.counts.end() - 2, std::int64_t{0}) == 5000);
  CHECK(p.counts[32] == 1000);
  CHECK(p.counts[33] == 1);
}

TEST_CASE("node-limited routing reaches at most kept_groups groups") {
  const ts::router<score::sigmoid, select::group_limited<>, weigh::normalized> r(
      {.num_experts = 256, .top_k = 8, .select = {.groups = 8, .kept_groups = 4}});
  problem<float> p(200, 256, 8);
  p.randomize(4).route(r);
  std::size_t most = 0;
  for (int t = 0; t < p.num_tokens; ++t) {
    std::set<int> groups;
    for (int id : p.ids_of(t)) groups.insert(id / 32);
    most = std::max(most, groups.size());
    REQUIRE(groups.size() <= 4);
  }
  CHECK(most == 4);
}

TEST_CASE("all groups kept is plain top-k") {
  const ts::router<score::sigmoid, select::group_limited<>, weigh::normalized> grouped(
      {.num_experts = 24, .top_k = 4, .select = {.groups = 6, .kept_groups = 6}});
  const ts::router<score::sigmoid, select::top_k, weigh::normalized> plain({.num_experts = 24, .top_k = 4});
  problem<float> p(64, 24, 4), q(64, 24, 4);
  p.randomize(6).route(grouped);
  q.randomize(6).route(plain);
  CHECK(p.expert_ids == q.expert_ids);
  CHECK(p.weights == q.weights);
}

TEST_CASE("hash selects by token id and keeps the order of the table") {
  const std::array<std::int32_t, 6> table = {3, 1, 0, 2, 2, 3};
  const ts::router<score::sqrt_softplus, select::hash, weigh::normalized> r(
      {.num_experts = 4, .top_k = 2, .select = {.table = table.data(), .vocab = 3}});
  CHECK(decltype(r)::needs_token_ids);
  problem<double> p(3, 4, 2);
  p.randomize(9);
  p.token_ids = {2, 0, 2};
  p.route(r);
  CHECK(p.ids_of(0) == ids{2, 3});
  CHECK(p.ids_of(1) == ids{3, 1});
  CHECK(p.ids_of(2) == ids{2, 3});
  CHECK(p.counts == std::vector<std::int64_t>{0, 1, 2, 3, 3, 1});
}

TEST_CASE("external ids are taken as given, unused slots weigh 0 and are not counted") {
  const ts::router<score::sigmoid, select::external, weigh::normalized> r({.num_experts = 4, .top_k = 2});
  CHECK(decltype(r)::needs_expert_ids);
  problem<double> p(3, 4, 2);
  p.logits = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
  p.given_ids = {1, 0, ts::no_expert, 3, ts::no_expert, ts::no_expert};
  p.route(r);
  CHECK(p.expert_ids == p.given_ids);
  CHECK(p.weights_of(1) == doubles{0.0, 1.0});
  CHECK(p.weights_of(2) == doubles{0.0, 0.0});
  CHECK(p.counts == std::vector<std::int64_t>{1, 1, 0, 1, 3, 1});
  // routing replay: what another pass chose, in the same memory
  p.expert_ids = p.given_ids;
  r.route(ts::host_stream{}, ts::router_inputs<double>{.logits = p.inputs().logits, .expert_ids = p.out().expert_ids},
          p.out(), p.local());
  CHECK(p.expert_ids == p.given_ids);
}

template <class Score>
void expect_oracle(int experts, int k, unsigned seed) {
  INFO("E = ", experts, ", K = ", k);
  using router = ts::router<Score, select::top_k, weigh::raw>;
  const router r({.num_experts = experts, .top_k = k});
  problem<double> p(17, experts, k);
  p.randomize(seed).route(r);
  for (int t = 0; t < p.num_tokens; ++t) {
    const doubles row(p.logits.begin() + std::ptrdiff_t{t} * experts,
                      p.logits.begin() + std::ptrdiff_t{t + 1} * experts);
    const std::vector<int> expected = oracle_ids<Score, select::top_k>(p, t, r.get_options(), false);
    REQUIRE(p.ids_of(t) == expected);
    const doubles weights = oracle_weights<Score, weigh::raw>(row, expected, {});
    for (int i = 0; i < k; ++i) REQUIRE(p.weights_of(t)[i] == doctest::Approx(weights[i]).epsilon(1e-11));
  }
}

TEST_CASE_TEMPLATE("any number of experts up to 1024 and any K up to 32", Score, score::softmax,
                   score::softmax_selected, score::sigmoid) {
  const int cases[][2] = {{1, 1},  {2, 1},   {2, 2},   {7, 3},    {8, 8},     {32, 32},  {33, 32},
                          {60, 4}, {160, 8}, {896, 1}, {896, 16}, {1024, 32}, {1024, 1}, {1023, 31}};
  for (const auto& c : cases) expect_oracle<Score>(c[0], c[1], unsigned(c[0] * 37 + c[1]));
}

TEST_CASE("1024 experts in 1024 groups of one, by their largest key") {
  const ts::router<identity, select::group_limited<select::group_score::max>, weigh::raw> r(
      {.num_experts = 1024, .top_k = 4, .select = {.groups = 1024, .kept_groups = 4}});
  problem<double> p(3, 1024, 4);
  p.randomize(12).route(r);
  for (int t = 0; t < 3; ++t)
    CHECK(p.ids_of(t) == oracle_ids<score::softmax_selected, select::top_k>(p, t, r.get_options(), false));
}

TEST_CASE("no tokens is a batch too") {
  using router = ts::router<score::sigmoid, select::top_k, weigh::normalized, balance::switch_loss>;
  const router r({.num_experts = 4, .top_k = 2});
  problem<float> p(0, 4, 2);
  p.route(r);
  CHECK(p.counts == std::vector<std::int64_t>{0, 0, 0, 0, 0, 0});
  float loss = -1.0f;
  const float coefficient = 1.0f;
  r.losses(ts::host_stream{}, p.inputs(), p.local(), &coefficient, 0, ts::matrix_view<float>{&loss, 1, 1});
  CHECK(loss == 0.0f);
  r.losses(ts::host_stream{}, p.inputs(), p.local(), &coefficient, 8, ts::matrix_view<float>{nullptr, 0, 1});
  r.backward(ts::host_stream{}, p.inputs(), p.out(), ts::matrix_view<const float>{nullptr, 0, 2}, p.local(),
             &coefficient, 1.0f, ts::matrix_view<float>{nullptr, 0, 4});
}

TEST_CASE("a token's routing does not depend on its neighbours, on strides or on the run") {
  using router = ts::router<score::softmax, select::group_limited<>, weigh::normalized>;
  const router r({.num_experts = 24, .top_k = 4, .select = {.groups = 6, .kept_groups = 3}});
  problem<float> p(40, 24, 4);
  p.randomize(8).route(r);
  problem<float> again(40, 24, 4);
  again.randomize(8).route(r);
  CHECK(again.expert_ids == p.expert_ids);
  CHECK(again.weights == p.weights);
  // one by one, from and to wider rows
  std::vector<float> wide(30, 99.0f);
  std::vector<std::int32_t> wide_ids(9);
  std::vector<float> wide_weights(9);
  for (int t = 0; t < 40; ++t) {
    std::copy_n(p.logits.begin() + t * 24, 24, wide.begin());
    r.route(ts::host_stream{}, ts::router_inputs<float>{.logits = {wide.data(), 1, 24, 30}},
            ts::routing<float>{{wide_ids.data(), 1, 4, 9}, {wide_weights.data(), 1, 4, 9}}, {});
    for (int i = 0; i < 4; ++i) {
      REQUIRE(wide_ids[i] == p.ids_of(t)[i]);
      REQUIRE(wide_weights[i] == p.weights_of(t)[i]);
    }
  }
}

TEST_CASE("recomputation routes the same and counts nothing") {
  const ts::router<score::sigmoid> r({.num_experts = 8, .top_k = 2});
  problem<float> p(16, 8, 2);
  p.randomize(2).route(r);
  const auto first = p;
  r.route(ts::host_stream{}, p.inputs(), p.out(), ts::balance_counts{});
  CHECK(p.expert_ids == first.expert_ids);
  CHECK(p.weights == first.weights);
  CHECK(p.counts == first.counts);
}

TEST_CASE("logits of any finite size give finite weights and gradients") {
  const ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss> r(
      {.num_experts = 4, .top_k = 2});
  problem<float> p(3, 4, 2);
  const float huge = std::numeric_limits<float>::max();
  p.logits = {huge, -huge, huge, 0.0f, -huge, -huge, -huge, -huge, 1e-38f, -1e-38f, 300.0f, -300.0f};
  p.route(r);
  for (float w : p.weights) CHECK(std::isfinite(w));
  CHECK(p.ids_of(0) == ids{0, 2});
  CHECK(p.ids_of(1) == ids{0, 1});
  std::vector<float> dweights(6, 1.0f), dlogits(12, std::nanf(""));
  const float coefficient = 1.0f;
  r.backward(ts::host_stream{}, p.inputs(), p.out(), ts::matrix_view<const float>{dweights.data(), 3, 2}, p.local(),
             &coefficient, 1.0f, ts::matrix_view<float>{dlogits.data(), 3, 4});
  for (float g : dlogits) CHECK(std::isfinite(g));
  const ts::router<score::sigmoid, select::top_k, weigh::normalized, balance::switch_loss> s(
      {.num_experts = 4, .top_k = 2});
  p.route(s);
  for (float w : p.weights) CHECK(std::isfinite(w));
  CHECK(p.weights_of(1) == std::vector<float>{0.0f, 0.0f});
  s.backward(ts::host_stream{}, p.inputs(), p.out(), ts::matrix_view<const float>{dweights.data(), 3, 2}, p.local(),
             &coefficient, 1.0f, ts::matrix_view<float>{dlogits.data(), 3, 4});
  for (float g : dlogits) CHECK(std::isfinite(g));
}

// A score of a user that masks an expert with -inf.
struct first_half : identity {
  template <class A>
  static A value(A logit, const options&) {
    return logit < A(0) ? -std::numeric_limits<A>::infinity() : logit;
  }
};

TEST_CASE("scores that nearly underflow have finite gradients with an epsilon, and not without") {
  const auto gradient = [](float logit, float epsilon) {
    const ts::router<score::sigmoid, select::top_k, weigh::normalized> r(
        {.num_experts = 4, .top_k = 2, .weigh = {.epsilon = epsilon}});
    problem<float> p(1, 4, 2);
    p.logits = {logit, logit - 1, logit - 2, logit - 3};
    p.route(r);
    const std::vector<float> dweights{8, -8};
    std::vector<float> dlogits(4);
    r.backward(ts::host_stream{}, p.inputs(), p.out(), ts::matrix_view<const float>{dweights.data(), 1, 2}, p.local(),
               nullptr, 1.0f, ts::matrix_view<float>{dlogits.data(), 1, 4});
    return dlogits[0];
  };
  CHECK_FALSE(std::isfinite(gradient(-88.5f, 0)));
  CHECK(std::isfinite(gradient(-88.5f, 1e-20f)));
  CHECK(gradient(-20, 1e-20f) == gradient(-20, 0));
}

TEST_CASE("an expert whose score is -inf is never selected; too few others are an error") {
  const ts::router<first_half, select::top_k, weigh::raw> r({.num_experts = 4, .top_k = 2});
  CHECK(route_one(r, {-1.0, 2.0, -3.0, 1.0}).ids_of(0) == ids{1, 3});
  CHECK_THROWS_WITH_AS(route_one(r, {-1.0, 2.0, -3.0, -1.0}),
                       "the scores of token 0 leave fewer than top_k = 2 experts: a score must be a number above -inf",
                       ts::invalid_argument);
}

}  // namespace
