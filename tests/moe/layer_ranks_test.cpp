// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "../support/layer_fixture.hpp"
#include "../support/routing_cases.hpp"

namespace {

using namespace tessera_test;

constexpr int experts_of_problem = 16;

template <class Precision, class Router, class Layout = ts::layout::block, class Combine = ts::combine::ordered>
using layer_of =
    ts::moe_layer<Router, ts::experts<ts::activation::swiglu, Precision>, Layout, ts::comm::threads, Combine>;

using scored_router = ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized, ts::balance::switch_loss,
                                 ts::balance::sequence_loss, ts::balance::z_loss, ts::balance::bias>;
using external_router = ts::router<ts::score::sigmoid, ts::select::external, ts::weigh::normalized>;

// 24 chunks of 4 tokens, a sequence each: any split at a multiple of 4 cuts no sequence.
layer_problem chunked_problem(bool coarse, std::uint32_t seed) {
  auto p = make_problem({.num_experts = experts_of_problem,
                         .top_k = 4,
                         .hidden = 24,
                         .intermediate = 9,
                         .num_shared_experts = 1,
                         .gate_bias = true,
                         .expert_bias = true},
                        96, true, seed, coarse);
  p.chunk_tokens = 4;
  p.sequence_offsets.clear();
  for (std::int32_t t = 0; t <= 96; t += 4) p.sequence_offsets.push_back(t);
  return p;
}

// `even`: equal parts; otherwise rank 1 has no tokens.
std::vector<std::int64_t> chunked_split(int ranks, bool even) {
  auto offsets = split_tokens(24, ranks, !even);
  for (auto& o : offsets) o *= 4;
  return offsets;
}

void check_same_bits(const layer_result& a, const layer_result& b) {
  CHECK(a.y == b.y);
  CHECK(a.dx == b.dx);
  CHECK(a.gate == b.gate);
  CHECK(a.gate_bias == b.gate_bias);
  CHECK(a.up == b.up);
  CHECK(a.down == b.down);
  CHECK(a.up_bias == b.up_bias);
  CHECK(a.down_bias == b.down_bias);
  CHECK(a.shared_up == b.shared_up);
  CHECK(a.shared_down == b.shared_down);
  CHECK(a.losses == b.losses);
  CHECK(a.load == b.load);
  CHECK(a.bias == b.bias);
}

double largest(const std::vector<double>& v) {
  double m = 0;
  for (const double x : v) m = std::max(m, std::isnan(x) ? 1e300 : std::abs(x));
  return m;
}

void check_close(const std::vector<double>& a, const std::vector<double>& b, double tolerance) {
  REQUIRE(a.size() == b.size());
  double norm = 0, error = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    norm += b[i] * b[i];
    error += (a[i] - b[i]) * (a[i] - b[i]);
  }
  CHECK(std::sqrt(error) <= tolerance * std::sqrt(norm));
}

}  // namespace

TEST_CASE_TEMPLATE("with combine::ordered the layer gives the same bits on 1, 2, 3, 4 and 8 ranks", Precision,
                   ts::precision::fp32, ts::precision::fp64, ts::precision::bf16) {
  const auto p = chunked_problem(std::is_same_v<Precision, ts::precision::bf16>, 5);
  const typename scored_router::options routing{
      .balance = {{.coefficient = 0.1f}, {.coefficient = 0.05f}, {.coefficient = 0.02f}, {.rate = 0.01f}}};
  using layer = layer_of<Precision, scored_router>;
  const auto run = [&](int ranks, bool even) {
    return run_problem<layer>(p, ts::layout::block(experts_of_problem, ranks), chunked_split(ranks, even), routing,
                              {.dispatch = {.row_bound = ts::dispatch_options::full_row_bound}});
  };
  const auto one = run(1, true);
  for (const auto* v : {&one.y, &one.dx, &one.gate, &one.up, &one.down, &one.shared_up, &one.losses}) {
    CHECK(largest(*v) > 1e-6);
    CHECK(largest(*v) < 1e3);
  }
  for (const int ranks : {2, 3, 4, 8}) {
    for (const bool even : {true, false}) {
      CAPTURE(ranks);
      CAPTURE(even);
      check_same_bits(run(ranks, even), one);
    }
  }
}

TEST_CASE("skewed, one-hot and sparse routing gives the same bits on every number of ranks and layout") {
  for (const skew kind : all_skews) {
    auto p = chunked_problem(false, 11);
    p.expert_ids = make_routing<float>(p.num_tokens, experts_of_problem, 4, kind, 3).ids;
    CAPTURE(name_of(kind));
    const ts::layer_options<ts::experts<ts::activation::swiglu, ts::precision::fp32>> options{
        .dispatch = {.row_bound = ts::dispatch_options::full_row_bound}};
    using block = layer_of<ts::precision::fp32, external_router>;
    using round_robin = layer_of<ts::precision::fp32, external_router, ts::layout::round_robin>;
    const auto one =
        run_problem<block>(p, ts::layout::block(experts_of_problem, 1), chunked_split(1, true), {}, options);
    if (kind == skew::one_hot) CHECK(one.load[5] == 0);
    for (const int ranks : {2, 3, 4, 8}) {
      CAPTURE(ranks);
      check_same_bits(
          run_problem<block>(p, ts::layout::block(experts_of_problem, ranks), chunked_split(ranks, false), {}, options),
          one);
      check_same_bits(run_problem<round_robin>(p, ts::layout::round_robin(experts_of_problem, ranks),
                                               chunked_split(ranks, true), {}, options),
                      one);
    }
  }
}

TEST_CASE("uneven tables give the same bits, replicated experts the same numbers") {
  const auto p = chunked_problem(false, 21);
  using layer = layer_of<ts::precision::fp32, scored_router, ts::layout::table>;
  const ts::layer_options<layer::experts_type> options{.dispatch = {.row_bound = ts::dispatch_options::full_row_bound}};
  const auto run = [&](const std::vector<std::vector<std::int32_t>>& lists) {
    const ts::layout::table_storage storage(experts_of_problem, lists);
    return run_problem<layer>(p, storage.view(), chunked_split(static_cast<int>(lists.size()), true), {}, options);
  };
  const auto one = run({{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}});
  check_same_bits(run({{15, 3, 1, 0, 2, 4, 5, 6, 7, 8, 9}, {}, {14, 13, 12, 11, 10}}), one);
  const auto replicated = run({{0, 1, 2, 3, 4, 5, 6, 7}, {8, 9, 10, 11, 12, 13, 14, 15, 0}, {3, 0}});
  CHECK(replicated.y == one.y);  // forward: a copy computes the same row
  CHECK(replicated.dx == one.dx);
  CHECK(replicated.load == one.load);
  CHECK(replicated.up != one.up);  // sums over copies are rounded elsewhere
  check_close(replicated.up, one.up, 1e-5);
  check_close(replicated.down, one.down, 1e-5);
  check_close(replicated.up_bias, one.up_bias, 1e-5);
}

TEST_CASE("combine::reduced gives the same numbers as combine::ordered, and the same bits run to run") {
  const auto p = chunked_problem(false, 31);
  using ordered = layer_of<ts::precision::fp32, scored_router>;
  using reduced = layer_of<ts::precision::fp32, scored_router, ts::layout::block, ts::combine::reduced>;
  for (const int ranks : {1, 2, 4}) {
    const ts::layout::block placement(experts_of_problem, ranks);
    const auto a = run_problem<ordered>(p, placement, chunked_split(ranks, true), {}, {});
    const auto b = run_problem<reduced>(p, placement, chunked_split(ranks, true), {}, {});
    const auto again = run_problem<reduced>(p, placement, chunked_split(ranks, true), {}, {});
    check_close(b.y, a.y, 1e-6);
    check_close(b.dx, a.dx, 1e-6);
    CHECK(b.up == a.up);  // the same rows in the same order
    check_same_bits(b, again);
  }
}

TEST_CASE("bf16 storage follows fp64 within its precision") {
  const auto p = chunked_problem(true, 41);
  const auto run = [&]<class Precision>(Precision) {
    return run_problem<layer_of<Precision, external_router>>(p, ts::layout::block(experts_of_problem, 2),
                                                             chunked_split(2, true), {}, {});
  };
  const auto exact = run(ts::precision::fp64{});
  const auto stored = run(ts::precision::bf16{});
  const auto rounded = run(ts::precision::bf16_gradients{});
  check_close(stored.y, exact.y, 1e-2);
  check_close(stored.dx, exact.dx, 1e-2);
  check_close(stored.up, exact.up, 1e-2);
  check_close(stored.down, exact.down, 1e-2);
  check_close(stored.gate, exact.gate, 2e-2);
  check_close(rounded.up, stored.up, 1e-2);
  CHECK(rounded.up != stored.up);
  CHECK(rounded.y == stored.y);
}

TEST_CASE("rows that are sent again in backward give the bits of rows that were kept, in less saved memory") {
  using layer = layer_of<ts::precision::bf16, scored_router, ts::layout::block, ts::combine::reduced>;
  const auto p = chunked_problem(true, 31);
  for (const int ranks : {1, 4}) {
    CAPTURE(ranks);
    const auto offsets = chunked_split(ranks, false);
    const std::int64_t most = *std::max_element(offsets.begin(), offsets.end());
    ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
      const auto me = static_cast<std::size_t>(comm.rank());
      const auto run = [&](ts::saved_rows rows) {
        layer::options options{.dispatch = {.row_bound = ts::dispatch_options::full_row_bound}};
        options.rows = rows;
        auto rank =
            std::make_unique<layer_rank<layer>>(p, ts::layout::block(experts_of_problem, ranks), comm, offsets[me],
                                                offsets[me + 1] - offsets[me], most, scored_router::options{}, options);
        rank->forward(ts::pass::train);
        rank->poison(rank->workspace);  // what is not saved is gone
        rank->backward_input();
        rank->poison(rank->workspace);
        rank->backward_weights();
        return rank;
      };
      const auto kept = run(ts::saved_rows::received);
      const auto again = run(ts::saved_rows::resend);
      const auto same = [](const auto& a, const auto& b) {
        return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
      };
      CHECK(same(kept->y, again->y));
      CHECK(same(kept->dx, again->dx));
      CHECK(same(kept->gate_grad, again->gate_grad));
      CHECK(same(kept->up_grad, again->up_grad));
      CHECK(same(kept->down_grad, again->down_grad));
      CHECK(same(kept->shared_up_grad, again->shared_up_grad));
      for (const float g : again->up_grad) REQUIRE(std::isfinite(g));
      const auto rows = static_cast<std::size_t>(ranks == 1 ? 0 : ranks * most * p.sizes.hidden) * sizeof(ts::bfloat16);
      CHECK(kept->saved.size() - again->saved.size() >= rows);
      CHECK(kept->saved.size() - again->saved.size() <= rows + 256);
      CHECK(again->deferred.size() - kept->deferred.size() <= rows + 256);
    });
  }
}
