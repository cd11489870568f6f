// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The router on the host, fp32: `route` (logits to ids, weights and counts), `losses` and `backward` (joint, recomputes
// the scores). Items are tokens. Bytes are the least traffic that the operation needs:
//   route     4 T E (logits) + 8 T K (ids, weights)
//   losses    4 T E (logits)
//   backward  8 T E (logits, dlogits) + 8 T K (ids, dweights)

#include <cstdint>
#include <vector>

#include <benchmark/benchmark.h>

#include <tessera/router/router.hpp>

#include "context.hpp"
#include "defaults.hpp"

namespace {

namespace ts = tessera;

using softmax_top_k =
    ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized, ts::balance::switch_loss>;
using sigmoid_grouped = ts::router<ts::score::sigmoid, ts::select::group_limited<>, ts::weigh::normalized,
                                   ts::balance::bias, ts::balance::sequence_loss>;

softmax_top_k make_router(const softmax_top_k*, int experts, int k) {
  return softmax_top_k({.num_experts = experts, .top_k = k});
}
sigmoid_grouped make_router(const sigmoid_grouped*, int experts, int k) {
  return sigmoid_grouped(
      {.num_experts = experts, .top_k = k, .select = {.groups = 8, .kept_groups = 4}, .weigh = {.scale = 2.5f}});
}

template <class Router>
struct problem {
  std::int64_t tokens;
  int experts, k;
  Router router;
  std::vector<float> logits, bias, weights, dlogits;
  std::vector<std::int32_t> ids;
  std::vector<std::int64_t> counts;

  explicit problem(const benchmark::State& state)
      : tokens(state.range(0)),
        experts(static_cast<int>(state.range(1))),
        k(static_cast<int>(state.range(2))),
        router(make_router(static_cast<const Router*>(nullptr), experts, k)),
        logits(tessera_bench::normal<float>(static_cast<std::size_t>(tokens * experts))),
        bias(tessera_bench::normal<float>(static_cast<std::size_t>(experts), 0.01f)),
        weights(static_cast<std::size_t>(tokens * k)),
        dlogits(logits.size()),
        ids(weights.size()),
        counts(bias.size() + 2) {
    route();
  }

  ts::router_inputs<float> inputs() const {
    return {.logits = {logits.data(), tokens, experts}, .bias = Router::has_bias ? bias.data() : nullptr};
  }
  ts::routing<float> routing() { return {{ids.data(), tokens, k}, {weights.data(), tokens, k}}; }
  ts::balance_counts local() { return {counts.data(), experts}; }
  void route() { router.route(ts::host_stream{}, inputs(), routing(), local()); }

  void count(benchmark::State& state, std::int64_t bytes) const {
    state.SetItemsProcessed(static_cast<std::int64_t>(state.iterations()) * tokens);
    state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) * bytes);
  }
};

template <class Router>
void route(benchmark::State& state) {
  problem<Router> p(state);
  for (auto _ : state) {
    p.route();
    benchmark::DoNotOptimize(p.ids.data());
    benchmark::ClobberMemory();
  }
  p.count(state, 4 * p.tokens * p.experts + 8 * p.tokens * p.k);
}

template <class Router>
void losses(benchmark::State& state) {
  problem<Router> p(state);
  const auto coefficients = p.router.default_coefficients();
  std::vector<float> chunk(Router::num_losses);
  for (auto _ : state) {
    p.router.losses(ts::host_stream{}, p.inputs(), p.local(), coefficients.data(), 0,
                    ts::matrix_view<float>{chunk.data(), 1, Router::num_losses});
    benchmark::DoNotOptimize(chunk.data());
    benchmark::ClobberMemory();
  }
  p.count(state, 4 * p.tokens * p.experts);
}

template <class Router>
void backward(benchmark::State& state) {
  problem<Router> p(state);
  const auto coefficients = p.router.default_coefficients();
  for (auto _ : state) {
    p.router.backward(ts::host_stream{}, p.inputs(), p.routing(),
                      ts::matrix_view<const float>{p.weights.data(), p.tokens, p.k}, p.local(), coefficients.data(),
                      1.0f, ts::matrix_view<float>{p.dlogits.data(), p.tokens, p.experts});
    benchmark::DoNotOptimize(p.dlogits.data());
    benchmark::ClobberMemory();
  }
  p.count(state, 8 * p.tokens * p.experts + 8 * p.tokens * p.k);
}

void ungrouped(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "experts", "top_k"})->Unit(benchmark::kMicrosecond);
  for (std::int64_t tokens : {1024, 8192}) b->Args({tokens, 8, 2})->Args({tokens, 64, 6})->Args({tokens, 128, 8});
}
void grouped(benchmark::internal::Benchmark* b) {
  b->ArgNames({"tokens", "experts", "top_k"})->Unit(benchmark::kMicrosecond);
  for (std::int64_t tokens : {1024, 8192}) b->Args({tokens, 256, 8});
}

BENCHMARK_TEMPLATE(route, softmax_top_k)->Apply(ungrouped);
BENCHMARK_TEMPLATE(losses, softmax_top_k)->Apply(ungrouped);
BENCHMARK_TEMPLATE(backward, softmax_top_k)->Apply(ungrouped);
BENCHMARK_TEMPLATE(route, sigmoid_grouped)->Apply(grouped);
BENCHMARK_TEMPLATE(losses, sigmoid_grouped)->Apply(grouped);
BENCHMARK_TEMPLATE(backward, sigmoid_grouped)->Apply(grouped);

}  // namespace

TESSERA_BENCHMARK_MAIN()
