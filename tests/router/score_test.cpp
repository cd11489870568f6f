// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Scores and weights as functions on values.

#include <cmath>
#include <limits>

#include <doctest/doctest.h>

#include <tessera/router/router.hpp>

namespace {

namespace ts = tessera;

template <class Score, class F>
void expect_function(F&& formula) {
  const typename Score::options options{};
  for (double x = -20.0; x <= 20.0; x += 0.37) {
    CHECK(Score::value(x, options) == doctest::Approx(formula(x)).epsilon(1e-13));
    CHECK(double(Score::value(float(x), options)) == doctest::Approx(formula(double(float(x)))).epsilon(1e-6));
    const double h = 1e-5;
    const double slope = (formula(x + h) - formula(x - h)) / (2 * h);
    CHECK(Score::derivative(x, Score::value(x, options), options) == doctest::Approx(slope).epsilon(1e-6));
  }
}

TEST_CASE("sigmoid is 1 / (1 + exp(-x)), with its derivative") {
  expect_function<ts::score::sigmoid>([](double x) { return 1.0 / (1.0 + std::exp(-x)); });
}

TEST_CASE("sqrt_softplus is sqrt(log(1 + exp(x))), with its derivative") {
  expect_function<ts::score::sqrt_softplus>(
      [](double x) { return double(std::sqrt(std::log(1.0L + std::exp(static_cast<long double>(x))))); });
}

TEST_CASE_TEMPLATE("elementwise scores stay finite at the ends of the range", Score, ts::score::sigmoid,
                   ts::score::sigmoid_selected, ts::score::sqrt_softplus) {
  const typename Score::options options{};
  for (float x :
       {-std::numeric_limits<float>::max(), -1e4f, -200.0f, -89.0f, 89.0f, 1e4f, std::numeric_limits<float>::max()}) {
    const float y = Score::value(x, options);
    INFO("logit ", x);
    CHECK(std::isfinite(y));
    CHECK(y >= 0.0f);
    CHECK(std::isfinite(Score::derivative(x, y, options)));
    CHECK(Score::derivative(x, y, options) >= 0.0f);
  }
  CHECK(double(ts::score::sqrt_softplus::value(1e4f, {})) == doctest::Approx(100.0));
}

TEST_CASE("which scores select on logits") {
  CHECK(!ts::score_selects_on_logits<ts::score::softmax>);
  CHECK(ts::score_selects_on_logits<ts::score::softmax_selected>);
  CHECK(!ts::score_selects_on_logits<ts::score::sigmoid>);
  CHECK(ts::score_selects_on_logits<ts::score::sigmoid_selected>);
  CHECK(!ts::score_selects_on_logits<ts::score::sqrt_softplus>);
}

template <class Weigh>
void expect_derivatives(const typename Weigh::options& options) {
  for (double score : {0.0, 0.2, 0.9}) {
    for (double sum : {0.9, 1.7}) {
      const double h = 1e-6;
      const double by_score = (Weigh::value(score + h, sum, options) - Weigh::value(score - h, sum, options)) / (2 * h);
      const double by_sum = (Weigh::value(score, sum + h, options) - Weigh::value(score, sum - h, options)) / (2 * h);
      CHECK(Weigh::derivative_by_score(score, sum, options) == doctest::Approx(by_score).epsilon(1e-7));
      CHECK(Weigh::derivative_by_sum(score, sum, options) == doctest::Approx(by_sum).epsilon(1e-7));
    }
  }
}

TEST_CASE("derivatives of the weighings are those of central differences") {
  expect_derivatives<ts::weigh::raw>({.scale = 2.5f});
  expect_derivatives<ts::weigh::normalized>({.scale = 2.5f});
  expect_derivatives<ts::weigh::normalized>({.scale = 0.5f, .epsilon = 0.25f});
}

TEST_CASE("on_input changes where the weight is used, not the weight") {
  using on_input = ts::weigh::on_input<ts::weigh::raw>;
  CHECK(on_input::weighs_input);
  CHECK(!ts::weigh::raw::weighs_input);
  CHECK(on_input::value(0.25, 1.0, {.scale = 2.0f}) == 0.5);
}

TEST_CASE("weights of scores that all underflowed are 0, not NaN") {
  CHECK(ts::weigh::normalized::value(0.0f, 0.0f, {}) == 0.0f);
  CHECK(ts::weigh::normalized::derivative_by_score(0.0f, 0.0f, {}) == 0.0f);
  CHECK(ts::weigh::normalized::derivative_by_sum(0.0f, 0.0f, {}) == 0.0f);
}

}  // namespace
