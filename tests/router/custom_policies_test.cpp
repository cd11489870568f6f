// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Policies of a user compose like the library's own: scores of each form, a group score, a weighing, losses.

#include <cmath>

#include <doctest/doctest.h>

#include "oracle.hpp"

namespace {

using namespace router_test;
namespace select = ts::select;
namespace weigh = ts::weigh;
namespace balance = ts::balance;

// Softmax of capped logits, with a temperature: `value` runs before the normalisation.
template <ts::score_over Over>
struct capped {
  struct options {
    float cap = 3.0f;
  };
  static constexpr auto over = Over;
  template <class A>
  static A value(A logit, const options& o) {
    return A(o.cap) * std::tanh(logit / A(o.cap));
  }
  template <class A>
  static A derivative(A, A value, const options& o) {
    const A t = value / A(o.cap);
    return A(1) - t * t;
  }
};

// Selection on logits of a score over all experts.
struct softmax_by_logit : ts::score::softmax {
  static constexpr bool selects_on_logits = true;
};

// Not monotone in the logit.
struct magnitude {
  struct options {};
  static constexpr auto over = ts::score_over::each;
  template <class A>
  static A value(A logit, const options&) {
    return std::abs(logit);
  }
  template <class A>
  static A derivative(A logit, A, const options&) {
    return logit < A(0) ? A(-1) : A(1);
  }
};

struct mean_of_group {
  template <class A>
  struct accumulator {
    A sum = 0;
    int size = 0;
    void add(A key) {
      sum += key;
      ++size;
    }
    A value() const { return sum / A(size); }
  };
};

// score^2 / sum, on the input.
struct squared {
  struct options {
    float scale = 1.0f;
  };
  static constexpr bool normalizes = false;
  static constexpr bool weighs_input = true;
  template <class A>
  static A value(A score, A sum, const options& o) {
    return A(o.scale) * score * score / sum;
  }
  template <class A>
  static A derivative_by_score(A score, A sum, const options& o) {
    return A(o.scale) * A(2) * score / sum;
  }
  template <class A>
  static A derivative_by_sum(A score, A sum, const options& o) {
    return -A(o.scale) * score * score / (sum * sum);
  }
};

// Negative entropy, which is not linear in p.
struct entropy_loss {
  struct options {
    float coefficient = 0.5f;
  };
  static constexpr auto by = ts::balance_by::batch_load;
  static constexpr std::string_view name = "entropy_loss";
  template <class A>
  static A value(A p, A, const options&) {
    return p * std::log(p);
  }
  template <class A>
  static A derivative(A p, A, const options&) {
    return std::log(p) + A(1);
  }
};

// Keeps the log-sum-exp near a target.
struct centred_z_loss {
  struct options {
    float coefficient = 0.25f;
    float target = 1.5f;
  };
  static constexpr auto by = ts::balance_by::log_sum_exp;
  static constexpr std::string_view name = "centred_z_loss";
  template <class A>
  static A value(A lse, const options& o) {
    return (lse - A(o.target)) * (lse - A(o.target));
  }
  template <class A>
  static A derivative(A lse, const options& o) {
    return A(2) * (lse - A(o.target));
  }
};

static_assert(ts::score_policy<capped<ts::score_over::all>> && ts::score_policy<softmax_by_logit>);
static_assert(ts::select_policy<select::group_limited<mean_of_group>>);
static_assert(ts::weigh_policy<squared> && ts::weigh_policy<weigh::on_input<squared>>);
static_assert(ts::balance_policy<entropy_loss> && ts::balance_policy<centred_z_loss>);

template <class Router>
void expect_gradient(const typename Router::options& options) {
  const Router r(options);
  problem<double> p(5, options.num_experts, options.top_k);
  p.randomize(77);
  p.sequence_offsets = {0, 2, 5};
  p.route(r);
  const std::vector<std::int32_t> ids = p.expert_ids;
  const std::vector<std::int64_t> global = p.counts;
  const auto coefficients = r.default_coefficients();
  doubles dweights(p.weights.size()), gradient(p.logits.size());
  for (std::size_t i = 0; i < dweights.size(); ++i) dweights[i] = std::cos(3.0 * double(i));
  const auto objective = [&] {
    p.route(r);
    doubles losses(Router::num_losses);
    r.losses(ts::host_stream{}, p.inputs(), ts::const_balance_counts{global.data(), p.num_experts}, coefficients.data(),
             0, ts::matrix_view<double>{losses.data(), 1, Router::num_losses});
    return std::inner_product(dweights.begin(), dweights.end(), p.weights.begin(), sum_of(losses));
  };
  r.backward(ts::host_stream{}, p.inputs(), p.out(), ts::matrix_view<const double>{dweights.data(), 5, p.top_k},
             ts::const_balance_counts{global.data(), p.num_experts}, coefficients.data(), 1.0,
             ts::matrix_view<double>{gradient.data(), 5, p.num_experts});
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    const double x = p.logits[i], h = 1e-5;
    p.logits[i] = x + h;
    const double above = objective();
    p.logits[i] = x - h;
    const double below = objective();
    p.logits[i] = x;
    REQUIRE(p.expert_ids == ids);
    CHECK(gradient[i] == doctest::Approx((above - below) / (2 * h)).epsilon(1e-7).scale(1.0));
  }
}

TEST_CASE("a user's score takes part in selection, weights, losses and gradient") {
  using all = ts::router<capped<ts::score_over::all>, select::top_k, weigh::normalized, balance::switch_loss>;
  expect_gradient<all>({.num_experts = 6, .top_k = 2, .score = {.cap = 2.0f}, .balance = {{.coefficient = 0.5f}}});
  using selected = ts::router<capped<ts::score_over::selected>, select::top_k, weigh::raw, balance::sequence_loss>;
  expect_gradient<selected>({.num_experts = 6, .top_k = 3, .score = {.cap = 2.0f}, .balance = {{.coefficient = 0.5f}}});
  using by_logit = ts::router<softmax_by_logit, select::top_k, weigh::raw, balance::sequence_loss>;
  expect_gradient<by_logit>({.num_experts = 6, .top_k = 3, .balance = {{.coefficient = 0.5f}}});
}

TEST_CASE("selection and sequence loss compare scores, not logits") {
  using router = ts::router<magnitude, select::top_k, weigh::raw, balance::sequence_loss>;
  const router r({.num_experts = 3, .top_k = 1});
  problem<double> p(1, 3, 1);
  p.logits = {-3, 1, 2};
  p.route(r);
  CHECK(p.ids_of(0) == std::vector<std::int32_t>{0});
  const float coefficient = 1.0f;
  double loss = 0;
  r.losses(ts::host_stream{}, p.inputs(), p.local(), &coefficient, 0, ts::matrix_view<double>{&loss, 1, 1});
  CHECK(loss == doctest::Approx(3.0 * (3.0 / 6.0)).epsilon(1e-14));
  // by the loss alone: d(3 s_0 / sum) / dx_i
  const double dweight = 0;
  doubles gradient(3);
  r.backward(ts::host_stream{}, p.inputs(), p.out(), ts::matrix_view<const double>{&dweight, 1, 1}, p.local(),
             &coefficient, 1.0, ts::matrix_view<double>{gradient.data(), 1, 3});
  CHECK(gradient[0] == doctest::Approx(-3.0 * (1.0 / 6.0 - 3.0 / 36.0)).epsilon(1e-13));
  CHECK(gradient[1] == doctest::Approx(-3.0 * 3.0 / 36.0).epsilon(1e-13));
  CHECK(gradient[2] == doctest::Approx(-3.0 * 3.0 / 36.0).epsilon(1e-13));
}

TEST_CASE("a user's group score, weighing and losses compose") {
  using router = ts::router<ts::score::sigmoid, select::group_limited<mean_of_group>, squared, entropy_loss,
                            balance::bias, centred_z_loss>;
  CHECK(router::weights_on_input);
  CHECK(router::loss_names()[1] == "centred_z_loss");
  expect_gradient<router>(
      {.num_experts = 6, .top_k = 2, .select = {.groups = 3, .kept_groups = 2}, .weigh = {.scale = 3}});
  const router r({.num_experts = 6, .top_k = 2, .select = {.groups = 2, .kept_groups = 1}});
  problem<double> p(1, 6, 2);
  p.logits = {4, -9, -9, 1, 1, 1};  // the mean is larger in the second group
  p.route(r);
  CHECK(p.ids_of(0) == std::vector<std::int32_t>{3, 4});
}

TEST_CASE("values of a user's losses are means over tokens") {
  const ts::router<ts::score::softmax, select::top_k, weigh::raw, entropy_loss, centred_z_loss> r(
      {.num_experts = 4, .top_k = 1});
  problem<double> p(2, 4, 1);
  p.route(r);  // all logits 0: p = 1/4, log-sum-exp = log 4
  const auto coefficients = r.default_coefficients();
  doubles losses(2);
  r.losses(ts::host_stream{}, p.inputs(), p.local(), coefficients.data(), 0,
           ts::matrix_view<double>{losses.data(), 1, 2});
  CHECK(losses[0] == doctest::Approx(-0.5 * std::log(4.0)).epsilon(1e-14));
  CHECK(losses[1] == doctest::Approx(0.25 * (std::log(4.0) - 1.5) * (std::log(4.0) - 1.5)).epsilon(1e-14));
}

struct nothing {};
struct no_derivative {
  struct options {};
  static constexpr auto over = ts::score_over::each;
  static float value(float, const options&) { return 0; }
  static double value(double, const options&) { return 0; }
};

TEST_CASE("what is no policy models no concept") {
  CHECK(!ts::score_policy<nothing>);
  CHECK(!ts::score_policy<no_derivative>);
  CHECK(ts::score_has_value<no_derivative>);
  CHECK(!ts::score_has_derivative<no_derivative>);
  CHECK(!ts::select_policy<nothing>);
  CHECK(!ts::weigh_policy<nothing>);
  CHECK(!ts::balance_policy<nothing>);
}

}  // namespace
