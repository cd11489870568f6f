// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A router score of one's own: a struct with a few functions on values. Nothing is registered, nothing of the library
// is touched; the score composes with every selection, weighing and balance, and its gradient with theirs.

#include <array>
#include <cmath>
#include <cstdio>
#include <vector>

#include <tessera/router/router.hpp>

namespace ts = tessera;

// softsign(x / temperature) moved to (0, 1): like a sigmoid, with tails that vanish more slowly.
struct softsign_score {
  struct options {
    float temperature = 1.0f;
  };
  static constexpr auto over = ts::score_over::each;

  template <class A>
  TESSERA_HD static A value(A logit, const options& options) {
    const A x = logit / A(options.temperature);
    return (A(1) + x / (A(1) + std::abs(x))) / A(2);
  }
  template <class A>
  TESSERA_HD static A derivative(A logit, A, const options& options) {
    const A steepness = A(1) + std::abs(logit / A(options.temperature));
    return A(1) / (A(2) * A(options.temperature) * steepness * steepness);
  }
};
static_assert(ts::score_policy<softsign_score>);

int main() {
  using router = ts::router<softsign_score, ts::select::group_limited<>, ts::weigh::normalized, ts::balance::bias,
                            ts::balance::switch_loss>;
  const int num_tokens = 4, num_experts = 8, top_k = 2;
  const router r({.num_experts = num_experts,
                  .top_k = top_k,
                  .score = {.temperature = 0.5f},
                  .select = {.groups = 4, .kept_groups = 2},
                  .weigh = {.scale = 2.5f}});

  std::vector<float> logits;
  for (int i = 0; i < num_tokens * num_experts; ++i) logits.push_back(std::sin(1.7f * float(i)));
  const std::array<float, 8> bias = {0.0f, 0.0f, 0.1f, 0.0f, 0.0f, -0.1f, 0.0f, 0.0f};
  const ts::router_inputs<float> inputs{.logits = {logits.data(), num_tokens, num_experts}, .bias = bias.data()};

  std::vector<std::int32_t> ids(num_tokens * top_k);
  std::vector<float> weights(num_tokens * top_k);
  std::vector<std::int64_t> counts(num_experts + 2);
  const ts::routing<float> routing{{ids.data(), num_tokens, top_k}, {weights.data(), num_tokens, top_k}};
  r.route(ts::host_stream{}, inputs, routing, ts::balance_counts{counts.data(), num_experts});

  const auto coefficients = r.default_coefficients();
  float loss = 0;
  r.losses(ts::host_stream{}, inputs, ts::const_balance_counts{counts.data(), num_experts}, coefficients.data(), 0,
           ts::matrix_view<float>{&loss, 1, 1});

  for (int t = 0; t < num_tokens; ++t) {
    std::printf("token %d:", t);
    for (int k = 0; k < top_k; ++k) std::printf("  expert %d x %.3f", routing.expert_ids(t, k), routing.weights(t, k));
    std::printf("\n");
  }
  std::printf("switch loss: %.5f\n", loss);
}
