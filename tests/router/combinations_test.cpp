// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Every policy with every other: routing and losses against the oracle, gradients against central differences.

#include <array>
#include <cstddef>
#include <string>
#include <utility>

#include <doctest/doctest.h>

#include "oracle.hpp"

namespace {

using namespace router_test;
namespace score = ts::score;
namespace select = ts::select;
namespace weigh = ts::weigh;
namespace balance = ts::balance;

using scores =
    std::tuple<score::softmax, score::softmax_selected, score::sigmoid, score::sigmoid_selected, score::sqrt_softplus>;
using selections = std::tuple<select::top_k, select::group_limited<select::group_score::top2_sum>,
                              select::group_limited<select::group_score::max>, select::hash, select::external>;
using weighings =
    std::tuple<weigh::raw, weigh::normalized, weigh::on_input<weigh::raw>, weigh::on_input<weigh::normalized>>;
using balancings =
    std::tuple<balances<>, balances<balance::switch_loss>, balances<balance::sequence_loss>, balances<balance::z_loss>,
               balances<balance::bias>, balances<balance::switch_loss, balance::z_loss>,
               balances<balance::bias, balance::sequence_loss>,
               balances<balance::sequence_loss, balance::bias, balance::z_loss, balance::switch_loss>>;

template <std::size_t I, class Tuple>
using at = std::tuple_element_t<I, Tuple>;

// One row of the table: indices into the lists above.
using row = std::array<int, 4>;
constexpr std::array<int, 4> sizes = {5, 5, 4, 8};

constexpr bool has_bias(int b) { return b == 4 || b == 6 || b == 7; }

// Says again, apart from the library, which pairs of two columns exclude each other.
constexpr bool pair_allowed(int column_a, int a, int column_b, int b) {
  if (column_a == 0 && column_b == 2) return !(a == 1 && (b == 1 || b == 3));
  if (column_a == 1 && column_b == 3) return !(a >= 3 && has_bias(b));
  return true;
}

constexpr bool row_allowed(const row& r) { return pair_allowed(0, r[0], 2, r[2]) && pair_allowed(1, r[1], 3, r[3]); }

// A covering table, made greedily at compile time: each pair of values that may meet does meet in some row.
struct table {
  std::array<row, 96> rows{};
  std::size_t size = 0;
  bool complete = false;
};

constexpr table make_table() {
  table result;
  bool met[4][8][4][8] = {};
  const auto gain_of = [&met](const int(&r)[4]) {
    int gain = 0;
    for (int i = 0; i < 4; ++i) {
      for (int j = i + 1; j < 4; ++j) gain += int(!met[i][r[i]][j][r[j]]);
    }
    return gain;
  };
  while (result.size < result.rows.size()) {
    int best[4] = {};
    int best_gain = 0;
    for (int n = 0; n < 5 * 5 * 4 * 8 && best_gain < 6; ++n) {
      const int r[4] = {n / 160, n / 32 % 5, n / 8 % 4, n % 8};
      if (!row_allowed({r[0], r[1], r[2], r[3]})) continue;
      const int gain = gain_of(r);
      if (gain <= best_gain) continue;
      best_gain = gain;
      for (int i = 0; i < 4; ++i) best[i] = r[i];
    }
    if (best_gain == 0) break;
    for (int i = 0; i < 4; ++i) {
      for (int j = i + 1; j < 4; ++j) met[i][best[i]][j][best[j]] = true;
    }
    result.rows[result.size++] = {best[0], best[1], best[2], best[3]};
  }
  result.complete = true;
  for (int i = 0; i < 4; ++i) {
    for (int j = i + 1; j < 4; ++j) {
      for (int a = 0; a < sizes[std::size_t(i)]; ++a) {
        for (int b = 0; b < sizes[std::size_t(j)]; ++b) {
          if (pair_allowed(i, a, j, b) && !met[i][a][j][b]) result.complete = false;
        }
      }
    }
  }
  return result;
}

constexpr table combinations = make_table();
static_assert(combinations.complete, "every pair of policies that may meet is in a row");

// What does not depend on the policies, so that it is compiled once.
void expect_close(const doubles& values, const doubles& expected, double tolerance, const char* what) {
  REQUIRE(values.size() == expected.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    INFO(what, " ", i);
    CHECK(std::abs(values[i] - expected[i]) <= tolerance * (1.0 + std::abs(expected[i])));
  }
}

struct fixture {
  static constexpr int tokens = 7, experts = 12, k = 3;
  static constexpr std::array<std::int32_t, 12> table = {0, 5, 11, 3, 2, 1, 10, 8, 9, 4, 7, 6};
  static constexpr double loss_scale = 0.75;

  problem<double> p{tokens, experts, k};
  std::vector<std::int64_t> global;
  doubles dweights;

  fixture(bool use_bias, bool by_token_id, bool given) {
    p.randomize(11);
    p.sequence_offsets = {0, 3, 3, 7};
    if (by_token_id) p.token_ids = {3, 0, 0, 1, 2, 3, 1};
    if (given) {
      for (int t = 0; t < tokens; ++t) {
        for (int i = 0; i < k; ++i) p.given_ids.push_back((5 * t + 7 * i) % experts);
      }
      p.given_ids[4] = ts::no_expert;
      p.given_ids[6] = p.given_ids[7] = p.given_ids[8] = ts::no_expert;
    }
    for (int e = 0; use_bias && e < experts; ++e) p.bias.push_back(0.3f * float((e * 5) % 7) - 0.9f);
    std::mt19937 generator(5);
    std::normal_distribution<double> normal;
    for (int i = 0; i < tokens * k; ++i) dweights.push_back(normal(generator));
  }

  doubles logits_of(int t) const {
    return {p.logits.begin() + std::ptrdiff_t{t} * experts, p.logits.begin() + std::ptrdiff_t{t + 1} * experts};
  }

  void expect_routing(const std::vector<std::vector<int>>& ids, const doubles& weights) {
    std::vector<std::int64_t> counts(experts, 0);
    for (int t = 0; t < tokens; ++t) {
      CHECK(p.ids_of(t) == ids[t]);
      for (int id : ids[t]) {
        if (id >= 0) ++counts[id];
      }
    }
    expect_close(p.weights, weights, 1e-12, "weight");
    counts.push_back(tokens);
    counts.push_back(2);
    CHECK(p.counts == counts);
  }

  void add_other_ranks() {
    global = p.counts;
    for (int e = 0; e < experts; ++e) global[e] += (3 * e) % 5;
    global[experts] += 9;
    global[experts + 1] += 2;
  }

  template <class F>
  doubles central_differences(F&& objective) {
    const std::vector<std::int32_t> ids = p.expert_ids;
    constexpr double h = 1e-5;
    doubles gradient;
    for (double& logit : p.logits) {
      const double x = logit;
      logit = x + h;
      const double above = objective();
      REQUIRE(p.expert_ids == ids);
      logit = x - h;
      const double below = objective();
      REQUIRE(p.expert_ids == ids);
      logit = x;
      gradient.push_back((above - below) / (2 * h));
    }
    return gradient;
  }
};

template <class Score, class Select, class Weigh, class... Balances>
struct combination : fixture {
  using router = ts::router<Score, Select, Weigh, Balances...>;

  static typename router::options options() {
    typename router::options options;
    options.num_experts = experts;
    options.top_k = k;
    options.weigh.scale = 2.5f;
    if constexpr (requires { options.weigh.epsilon; }) options.weigh.epsilon = 0.125f;
    if constexpr (is_grouped<Select>) options.select = {.groups = 4, .kept_groups = 2};
    if constexpr (router::needs_token_ids) options.select = {.table = table.data(), .vocab = 4};
    return options;
  }

  router r{options()};
  std::vector<float> coefficients;

  combination() : fixture(router::has_bias, router::needs_token_ids, router::needs_expert_ids) {
    for (int i = 0; i < router::num_losses; ++i) coefficients.push_back(0.5f + 0.25f * float(i));
  }

  void check_routing() {
    std::vector<std::vector<int>> ids;
    doubles weights;
    for (int t = 0; t < tokens; ++t) {
      ids.push_back(oracle_ids<Score, Select>(p, t, r.get_options(), router::has_bias));
      for (double w : oracle_weights<Score, Weigh>(logits_of(t), ids.back(), r.get_options().weigh)) {
        weights.push_back(w);
      }
    }
    expect_routing(ids, weights);
  }

  template <class A>
  doubles gradient(problem<A>& q) const {
    std::vector<A> dw(dweights.begin(), dweights.end());
    std::vector<A> dlogits(q.logits.size(), A(std::nan("")));
    r.backward(ts::host_stream{}, q.inputs(), q.out(), ts::matrix_view<const A>{dw.data(), tokens, k},
               ts::const_balance_counts{global.data(), experts}, coefficients.data(), A(loss_scale),
               ts::matrix_view<A>{dlogits.data(), tokens, experts});
    return {dlogits.begin(), dlogits.end()};
  }

  doubles losses(std::int64_t chunk_tokens) const {
    doubles values(static_cast<std::size_t>(ts::num_chunks(tokens, chunk_tokens)) * router::num_losses);
    r.losses(ts::host_stream{}, p.inputs(), ts::const_balance_counts{global.data(), experts}, coefficients.data(),
             chunk_tokens,
             ts::matrix_view<double>{values.data(), ts::num_chunks(tokens, chunk_tokens), router::num_losses});
    return values;
  }

  void check_losses() {
    doubles expected;
    const auto add = [&]<class B>(std::type_identity<B>) {
      if constexpr (!std::is_same_v<B, balance::bias>) {
        expected.push_back(oracle_loss<Score, B>(p, global, double(coefficients[expected.size()])));
      }
    };
    (add(std::type_identity<Balances>{}), ..., (void)add);
    expect_close(losses(0), expected, 1e-12, "loss");
    doubles sums(expected.size());
    const doubles chunks = losses(3);
    for (std::size_t i = 0; i < chunks.size(); ++i) sums[i % sums.size()] += chunks[i];
    expect_close(sums, expected, 1e-12, "sum of the chunks of loss");
  }

  double objective() {
    r.route(ts::host_stream{}, p.inputs(), p.out(), ts::balance_counts{});
    double f = std::inner_product(dweights.begin(), dweights.end(), p.weights.begin(), 0.0);
    for (double loss : losses(0)) f += loss_scale * loss;
    return f;
  }

  void check_single_precision(const doubles& reference) {
    problem<float> q(tokens, experts, k);
    q.logits.assign(p.logits.begin(), p.logits.end());
    q.bias = p.bias;
    q.token_ids = p.token_ids;
    q.given_ids = p.given_ids;
    q.sequence_offsets = p.sequence_offsets;
    q.route(r);
    CHECK(q.expert_ids == p.expert_ids);
    expect_close(doubles(q.weights.begin(), q.weights.end()), p.weights, 1e-5, "single-precision weight");
    expect_close(gradient(q), reference, 1e-4, "single-precision gradient");
  }

  // Single precision is compiled for some rows only: it is the same code.
  template <bool Single>
  void run() {
    p.route(r);
    check_routing();
    add_other_ranks();
    check_losses();
    const doubles analytic = gradient(p);
    const doubles expected = central_differences([this] { return objective(); });
    expect_close(analytic, expected, 1e-8, "gradient");
    CHECK(std::any_of(expected.begin(), expected.end(), [](double g) { return std::abs(g) > 1e-2; }));
    p.route(r);
    if constexpr (Single) check_single_precision(analytic);
  }
};

template <bool Single, class Score, class Select, class Weigh, class... Balances>
void run_one(balances<Balances...>) {
  combination<Score, Select, Weigh, Balances...>{}.template run<Single>();
}

template <std::size_t I>
void run_row() {
  constexpr row r = combinations.rows[I];
  INFO("row ", I, ": score ", r[0], ", selection ", r[1], ", weighing ", r[2], ", balances ", r[3]);
  run_one<I % 3 == 0, at<r[0], scores>, at<r[1], selections>, at<r[2], weighings>>(at<r[3], balancings>{});
}

template <class Score, class Select, class Weigh, class Balances>
constexpr bool is_compatible = false;
template <class Score, class Select, class Weigh, class... Balances>
constexpr bool is_compatible<Score, Select, Weigh, balances<Balances...>> =
    ts::compatible<Score, Select, Weigh, Balances...>;

template <std::size_t I>
constexpr bool agrees() {
  constexpr row r = {int(I) / 160, int(I) / 32 % 5, int(I) / 8 % 4, int(I) % 8};
  return is_compatible<at<r[0], scores>, at<r[1], selections>, at<r[2], weighings>, at<r[3], balancings>> ==
         row_allowed(r);
}

TEST_CASE("compatible lists exactly the combinations that exclude each other") {
  []<std::size_t... I>(std::index_sequence<I...>) {
    const std::array<bool, sizeof...(I)> ok = {agrees<I>()...};
    for (std::size_t i = 0; i < ok.size(); ++i) {
      INFO("combination ", i);
      CHECK(ok[i]);
    }
  }
  (std::make_index_sequence<5 * 5 * 4 * 8>{});
  CHECK(!ts::compatible<score::softmax, select::top_k, weigh::raw, balance::z_loss, balance::z_loss>);
}

TEST_CASE("every pair of policies routes and loses as the oracle says, with the gradient of central differences") {
  []<std::size_t... I>(std::index_sequence<I...>) { (run_row<I>(), ...); }
  (std::make_index_sequence<combinations.size>{});
}

}  // namespace
