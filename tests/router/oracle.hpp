// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A second, slow and plain router in double, written from the formulas and not from the library: sorting instead of
/// selection lists, whole matrices instead of rows. And storage for the views a router takes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <tuple>
#include <type_traits>
#include <vector>

#include <tessera/router/router.hpp>

namespace router_test {

namespace ts = tessera;

/// Owns what a router reads and writes.
template <class A>
struct problem {
  int num_tokens, num_experts, top_k;
  std::vector<A> logits;
  std::vector<float> bias;
  std::vector<std::int32_t> token_ids;
  std::vector<std::int32_t> given_ids;
  std::vector<std::int32_t> sequence_offsets;
  std::vector<std::int32_t> expert_ids;
  std::vector<A> weights;
  std::vector<std::int64_t> counts;

  problem(int tokens, int experts, int k)
      : num_tokens(tokens),
        num_experts(experts),
        top_k(k),
        logits(static_cast<std::size_t>(tokens) * experts),
        expert_ids(static_cast<std::size_t>(tokens) * k, -7),
        weights(static_cast<std::size_t>(tokens) * k, A(-7)),
        counts(static_cast<std::size_t>(experts) + 2, -7) {}

  problem& randomize(unsigned seed, double spread = 2.0) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0.0, spread);
    for (A& x : logits) x = static_cast<A>(normal(generator));
    return *this;
  }

  ts::router_inputs<A> inputs() const {
    return {.logits = {logits.data(), num_tokens, num_experts},
            .bias = bias.empty() ? nullptr : bias.data(),
            .token_ids = token_ids,
            .expert_ids = given_ids.empty() ? ts::matrix_view<const std::int32_t>{}
                                            : ts::matrix_view<const std::int32_t>{given_ids.data(), num_tokens, top_k},
            .sequence_offsets = sequence_offsets};
  }
  ts::routing<A> out() { return {{expert_ids.data(), num_tokens, top_k}, {weights.data(), num_tokens, top_k}}; }
  ts::balance_counts local() { return {counts.data(), num_experts}; }

  template <class Router>
  problem& route(const Router& router) {
    router.route(ts::host_stream{}, inputs(), out(), local());
    return *this;
  }
  std::vector<std::int32_t> ids_of(int t) const {
    return {expert_ids.begin() + std::ptrdiff_t{t} * top_k, expert_ids.begin() + std::ptrdiff_t{t + 1} * top_k};
  }
  std::vector<A> weights_of(int t) const {
    return {weights.begin() + std::ptrdiff_t{t} * top_k, weights.begin() + std::ptrdiff_t{t + 1} * top_k};
  }
};

using doubles = std::vector<double>;

inline double sum_of(const doubles& x) { return std::accumulate(x.begin(), x.end(), 0.0); }

inline doubles softmax_of(const doubles& x) {
  doubles y;
  const double max = *std::max_element(x.begin(), x.end());
  for (double v : x) y.push_back(std::exp(v - max));
  const double sum = sum_of(y);
  for (double& v : y) v /= sum;
  return y;
}

/// Score of each expert; the logits themselves for `softmax_selected`.
template <class Score>
doubles oracle_scores(const doubles& logits) {
  if constexpr (std::is_same_v<Score, ts::score::softmax>) return softmax_of(logits);
  if constexpr (std::is_same_v<Score, ts::score::softmax_selected>) return logits;
  doubles y;
  for (double l : logits) {
    if constexpr (std::is_same_v<Score, ts::score::sqrt_softplus>) {
      y.push_back(std::sqrt(std::log1p(std::exp(l))));
    } else {
      y.push_back(1.0 / (1.0 + std::exp(-l)));
    }
  }
  return y;
}

template <class Score>
inline constexpr bool on_logits =
    std::is_same_v<Score, ts::score::softmax_selected> || std::is_same_v<Score, ts::score::sigmoid_selected>;

/// Probabilities of the balance losses.
template <class Score>
doubles oracle_probabilities(const doubles& logits) {
  if constexpr (std::is_base_of_v<ts::score::softmax, Score>) return softmax_of(logits);
  doubles p = oracle_scores<Score>(logits);
  const double sum = sum_of(p);
  for (double& v : p) v /= sum;
  return p;
}

/// The K best by a stable sort.
inline std::vector<int> best_of(const doubles& keys, int k) {
  std::vector<int> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] > keys[b]; });
  order.resize(static_cast<std::size_t>(k));
  return order;
}

/// Keys with the experts of unselected groups at -inf.
inline doubles mask_groups(doubles keys, int groups, int kept, bool top2) {
  const int size = static_cast<int>(keys.size()) / groups;
  doubles group_scores;
  for (int g = 0; g < groups; ++g) {
    doubles members(keys.begin() + g * size, keys.begin() + (g + 1) * size);
    std::sort(members.rbegin(), members.rend());
    group_scores.push_back(top2 ? members[0] + members[1] : members[0]);
  }
  const std::vector<int> order = best_of(group_scores, kept);
  for (int g = 0; g < groups; ++g) {
    if (std::find(order.begin(), order.end(), g) != order.end()) continue;
    for (int e = g * size; e < (g + 1) * size; ++e) keys[e] = -std::numeric_limits<double>::infinity();
  }
  return keys;
}

template <class Select>
inline constexpr bool is_grouped = false;
template <class GroupScore>
inline constexpr bool is_grouped<ts::select::group_limited<GroupScore>> = true;

/// Ids of token `t`.
template <class Score, class Select, class Options, class A>
std::vector<int> oracle_ids(const problem<A>& p, int t, const Options& options, bool use_bias) {
  const doubles logits(p.logits.begin() + std::ptrdiff_t{t} * p.num_experts,
                       p.logits.begin() + std::ptrdiff_t{t + 1} * p.num_experts);
  if constexpr (std::is_same_v<Select, ts::select::hash>) {
    const std::int32_t* row = options.select.table + p.token_ids[t] * p.top_k;
    return {row, row + p.top_k};
  } else if constexpr (std::is_same_v<Select, ts::select::external>) {
    const std::int32_t* row = p.given_ids.data() + std::ptrdiff_t{t} * p.top_k;
    return {row, row + p.top_k};
  } else {
    doubles keys = on_logits<Score> ? logits : oracle_scores<Score>(logits);
    if (use_bias) {
      for (int e = 0; e < p.num_experts; ++e) keys[e] += static_cast<double>(p.bias[e]);
    }
    if constexpr (is_grouped<Select>) {
      keys = mask_groups(keys, options.select.groups, options.select.kept_groups,
                         std::is_same_v<typename Select::group_score, ts::select::group_score::top2_sum>);
    }
    return best_of(keys, p.top_k);
  }
}

/// Weights of the experts `ids` of a token.
template <class Score, class Weigh>
doubles oracle_weights(const doubles& logits, const std::vector<int>& ids, const typename Weigh::options& options) {
  const doubles all = oracle_scores<Score>(logits);
  doubles chosen;
  for (int id : ids) {
    if (id >= 0) chosen.push_back(all[id]);
  }
  if constexpr (std::is_same_v<Score, ts::score::softmax_selected>) {
    if (!chosen.empty()) chosen = softmax_of(chosen);
  }
  double divisor = 1.0;
  if constexpr (std::is_base_of_v<ts::weigh::normalized, Weigh>) {
    divisor = sum_of(chosen) + static_cast<double>(options.epsilon);
  }
  doubles weights;
  std::size_t next = 0;
  for (int id : ids) {
    weights.push_back(id < 0 ? 0.0 : static_cast<double>(options.scale) * (chosen[next++] / divisor));
  }
  return weights;
}

/// Sum over this rank of one loss; counts, tokens and sequences are global.
template <class Score, class Balance, class A>
double oracle_loss(const problem<A>& p, const std::vector<std::int64_t>& counts, double coefficient) {
  const int experts = p.num_experts;
  const double tokens = static_cast<double>(counts[static_cast<std::size_t>(experts)]);
  const double sequences = static_cast<double>(counts[static_cast<std::size_t>(experts) + 1]);
  const auto row = [&](int t) {
    return doubles(p.logits.begin() + std::ptrdiff_t{t} * experts, p.logits.begin() + std::ptrdiff_t{t + 1} * experts);
  };
  double loss = 0;
  if constexpr (std::is_same_v<Balance, ts::balance::switch_loss>) {
    for (int e = 0; e < experts; ++e) {
      double mean = 0;
      for (int t = 0; t < p.num_tokens; ++t) mean += oracle_probabilities<Score>(row(t))[e] / tokens;
      loss += coefficient * experts / (p.top_k * tokens) * static_cast<double>(counts[e]) * mean;
    }
  } else if constexpr (std::is_same_v<Balance, ts::balance::sequence_loss>) {
    std::vector<std::int32_t> offsets = p.sequence_offsets;
    if (offsets.empty()) offsets = {0, p.num_tokens};
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const int length = offsets[s + 1] - offsets[s];
      for (int e = 0; e < experts && length > 0; ++e) {
        double f = 0;
        double mean = 0;
        for (int t = offsets[s]; t < offsets[s + 1]; ++t) {
          const doubles keys = on_logits<Score> ? row(t) : oracle_scores<Score>(row(t));
          const std::vector<int> best = best_of(keys, p.top_k);
          f += double(experts) / (p.top_k * length) * double(std::count(best.begin(), best.end(), e));
          mean += oracle_probabilities<Score>(row(t))[e] / length;
        }
        loss += coefficient / sequences * f * mean;
      }
    }
  } else {
    for (int t = 0; t < p.num_tokens; ++t) {
      double sum = 0;
      for (double l : row(t)) sum += std::exp(l);
      loss += coefficient / tokens * std::log(sum) * std::log(sum);
    }
  }
  return loss;
}

/// Balances as one type.
template <class... Balances>
struct balances {};

template <class Score, class Select, class Weigh, class Balances>
struct router_of;
template <class Score, class Select, class Weigh, class... Balances>
struct router_of<Score, Select, Weigh, balances<Balances...>> {
  using type = ts::router<Score, Select, Weigh, Balances...>;
};

}  // namespace router_test
