// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Bad input is refused with a sentence that names it, before anything is written.

#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include <doctest/doctest.h>

#include "oracle.hpp"

namespace {

using namespace router_test;
namespace score = ts::score;
namespace select = ts::select;
namespace weigh = ts::weigh;
namespace balance = ts::balance;

using plain = ts::router<score::softmax, select::top_k, weigh::normalized>;
using grouped = ts::router<score::sigmoid, select::group_limited<>, weigh::normalized, balance::bias>;
using hashed = ts::router<score::sigmoid, select::hash, weigh::normalized>;
using replayed = ts::router<score::sigmoid, select::external, weigh::normalized>;
using balanced = ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss>;

/// Routes, expects exactly `message`, and that ids, weights and counts are as they were.
template <class Router, class A>
void expect_refused(const Router& r, problem<A> p, const char* message) {
  const problem<A> before = p;
  CHECK_THROWS_WITH_AS(p.route(r), message, ts::invalid_argument);
  CHECK(p.expert_ids == before.expert_ids);
  CHECK(p.weights == before.weights);
  CHECK(p.counts == before.counts);
}

TEST_CASE("sizes that cannot work are refused at construction") {
  const auto expect = [](int experts, int k, const char* message) {
    CHECK_THROWS_WITH_AS(plain({.num_experts = experts, .top_k = k}), message, ts::invalid_argument);
  };
  expect(8, 9, "top_k = 9 exceeds num_experts = 8");
  expect(8, 0, "top_k = 0, it must be at least 1");
  expect(0, 1, "num_experts = 0 is outside [1, 1024]");
  expect(1025, 2, "num_experts = 1025 is outside [1, 1024]");
  expect(64, 33, "top_k = 33 exceeds the limit of 32");
}

TEST_CASE("groups that do not fit are refused at construction") {
  const auto expect = [](int experts, int k, int groups, int kept, const char* message) {
    CHECK_THROWS_WITH_AS(
        grouped({.num_experts = experts, .top_k = k, .select = {.groups = groups, .kept_groups = kept}}), message,
        ts::invalid_argument);
  };
  expect(10, 2, 4, 2, "groups = 4 does not divide num_experts = 10");
  expect(8, 2, 0, 1, "groups = 0 does not divide num_experts = 8");
  expect(8, 2, 4, 5, "kept_groups = 5 is outside [1, groups] with groups = 4");
  expect(8, 2, 4, 0, "kept_groups = 0 is outside [1, groups] with groups = 4");
  expect(8, 3, 4, 1, "kept_groups = 1 groups of 2 experts cannot give top_k = 3 experts");
  expect(8, 2, 8, 4,
         "groups of 1 experts are too small: this group score needs 2 (num_experts = 8, groups = 8); "
         "group_score::max needs 1");
}

TEST_CASE("scales, epsilons, coefficients and tables that cannot work are refused at construction") {
  const float inf = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH_AS(plain({.num_experts = 8, .top_k = 2, .weigh = {.scale = inf}}),
                       "weigh::normalized has scale = inf, it must be finite", ts::invalid_argument);
  CHECK_THROWS_AS(plain({.num_experts = 8, .top_k = 2, .weigh = {.epsilon = -1.0f}}), ts::invalid_argument);
  using raw = ts::router<score::softmax, select::top_k, weigh::raw>;
  CHECK_THROWS_AS(raw({.num_experts = 8, .top_k = 2, .weigh = {.scale = -inf}}), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(balanced({.num_experts = 8, .top_k = 2, .balance = {{.coefficient = inf}}}),
                       "switch_loss has coefficient = inf, it must be finite", ts::invalid_argument);
  CHECK_THROWS_AS(hashed({.num_experts = 8, .top_k = 2}), ts::invalid_argument);
  using biased = ts::router<score::sigmoid, select::top_k, weigh::normalized, balance::bias, balance::switch_loss>;
  for (const float rate : {inf, std::nanf(""), -1.0f}) {
    CHECK_THROWS_AS(biased({.num_experts = 8, .top_k = 2, .balance = {{.rate = rate}, {}}}), ts::invalid_argument);
  }
  CHECK_THROWS_WITH_AS(biased({.num_experts = 8, .top_k = 2, .balance = {{.rate = inf}, {}}}),
                       "the bias rate is inf, it must be finite and >= 0", ts::invalid_argument);
  CHECK_NOTHROW(biased({.num_experts = 8, .top_k = 2, .balance = {{.rate = 0}, {}}}));
}

TEST_CASE("NaN and infinite logits are refused, naming token and expert") {
  const plain r({.num_experts = 4, .top_k = 2});
  problem<float> p(3, 4, 2);
  p.logits[2 * 4 + 1] = std::nanf("");
  expect_refused(r, p, "the logit of token 2 for expert 1 is nan, logits must be finite");
  p.logits[2 * 4 + 1] = std::numeric_limits<float>::infinity();
  expect_refused(r, p, "the logit of token 2 for expert 1 is inf, logits must be finite");
  p.logits[2 * 4 + 1] = -std::numeric_limits<float>::infinity();
  expect_refused(r, p, "the logit of token 2 for expert 1 is -inf, logits must be finite");
  problem<double> q(1, 4, 2);
  q.logits[3] = std::nan("");
  expect_refused(r, q, "the logit of token 0 for expert 3 is nan, logits must be finite");
}

TEST_CASE("a bias that is not finite, or that nobody asked for, is refused") {
  const grouped r({.num_experts = 4, .top_k = 2, .select = {.groups = 2, .kept_groups = 2}});
  problem<float> p(3, 4, 2);
  p.bias = {0, 0, std::nanf(""), 0};
  expect_refused(r, p, "the bias of expert 2 is nan, it must be finite");
  p.bias = {0, 0, 0, 0};
  expect_refused(plain({.num_experts = 4, .top_k = 2}), p, "a bias was given to a router without balance::bias");
}

TEST_CASE("external ids out of range or repeated are refused, naming token, slot and id") {
  const replayed r({.num_experts = 4, .top_k = 2});
  problem<float> p(2, 4, 2);
  p.given_ids = {0, 1, 3, 4};
  expect_refused(r, p, "inputs.expert_ids gives token 1 expert id 4 in slot 1, outside [0, 4)");
  p.given_ids = {0, 1, -2, 3};
  expect_refused(r, p, "inputs.expert_ids gives token 1 expert id -2 in slot 0, outside [0, 4)");
  p.given_ids = {0, 1, 3, 3};
  expect_refused(r, p, "inputs.expert_ids gives token 1 expert id 3 in slots 0 and 1, the ids of a token must differ");
  p.given_ids.clear();
  expect_refused(r, p, "inputs.expert_ids is [0, 0], expected [2, 2]");
}

TEST_CASE("token ids outside the table, and tables with bad rows, are refused") {
  const std::array<std::int32_t, 8> table = {0, 1, 2, 2, 1, 9, ts::no_expert, 0};
  const hashed r({.num_experts = 4, .top_k = 2, .select = {.table = table.data(), .vocab = 4}});
  problem<float> p(2, 4, 2);
  p.token_ids = {0, 4};
  expect_refused(r, p, "token 1 has id 4, outside the table's vocabulary [0, 4)");
  p.token_ids = {0, -1};
  expect_refused(r, p, "token 1 has id -1, outside the table's vocabulary [0, 4)");
  p.token_ids = {0, 1};
  expect_refused(
      r, p, "the table of select::hash gives token 1 expert id 2 in slots 0 and 1, the ids of a token must differ");
  p.token_ids = {2, 0};
  expect_refused(r, p, "the table of select::hash gives token 0 expert id 9 in slot 1, outside [0, 4)");
  p.token_ids = {0, 3};
  expect_refused(r, p, "the table of select::hash gives token 1 expert id -1 in slot 0, outside [0, 4)");
  p.token_ids = {0};
  expect_refused(r, p, "select::hash needs one token id per token, it got 1 for 2 tokens");
}

TEST_CASE("sequence offsets that do not cover the tokens are refused") {
  const plain r({.num_experts = 4, .top_k = 2});
  problem<float> p(4, 4, 2);
  p.sequence_offsets = {0, 3};
  expect_refused(r, p, "sequence_offsets run from 0 to 3, they must run from 0 to the number of tokens, 4");
  p.sequence_offsets = {1, 4};
  expect_refused(r, p, "sequence_offsets run from 1 to 4, they must run from 0 to the number of tokens, 4");
  p.sequence_offsets = {0, 3, 2, 4};
  expect_refused(r, p, "sequence_offsets[1] = 3 exceeds sequence_offsets[2] = 2");
}

TEST_CASE("views of the wrong shape, without data, misaligned or overlapping are refused") {
  const plain r({.num_experts = 4, .top_k = 2});
  problem<float> p(3, 4, 2);
  const auto refuse =
      [&](const char* what,
          const std::function<void(ts::router_inputs<float>&, ts::routing<float>&, ts::balance_counts&)>& change) {
        INFO(what);
        auto in = p.inputs();
        auto out = p.out();
        auto counts = p.local();
        change(in, out, counts);
        const auto before = p;
        CHECK_THROWS_AS(r.route(ts::host_stream{}, in, out, counts), ts::invalid_argument);
        CHECK(p.expert_ids == before.expert_ids);
        CHECK(p.weights == before.weights);
        CHECK(p.counts == before.counts);
      };
  refuse("experts", [](auto& in, auto&, auto&) { in.logits.cols = 3; });
  refuse("tokens", [](auto& in, auto&, auto&) { in.logits.rows = 2; });
  refuse("ids", [](auto&, auto& out, auto&) { out.expert_ids.cols = 1; });
  refuse("weights", [](auto&, auto& out, auto&) { out.weights.rows = 2; });
  refuse("no logits", [](auto& in, auto&, auto&) { in.logits.data = nullptr; });
  refuse("no weights", [](auto&, auto& out, auto&) { out.weights.data = nullptr; });
  refuse("stride", [](auto& in, auto&, auto&) { in.logits.stride = 3; });
  refuse("counts", [](auto&, auto&, auto& counts) { counts.num_experts = 3; });
  refuse("misaligned", [](auto&, auto& out, auto&) {
    out.weights.data = reinterpret_cast<float*>(reinterpret_cast<char*>(out.weights.data) + 1);
  });
  refuse("weights over logits",
         [](auto& in, auto& out, auto&) { out.weights.data = const_cast<float*>(in.logits.data); });
  refuse("weights over ids",
         [](auto&, auto& out, auto&) { out.weights.data = reinterpret_cast<float*>(out.expert_ids.data); });
}

TEST_CASE("losses and backward refuse what they cannot use, and write nothing") {
  const balanced r({.num_experts = 4, .top_k = 2});
  problem<float> p(3, 4, 2);
  p.randomize(1).route(r);
  const float coefficient = 1.0f;
  const float bad_coefficient = std::nanf("");
  std::vector<float> dweights(6, 1.0f), dlogits(12, -7.0f), chunk(1, -7.0f);
  const ts::matrix_view<const float> dw{dweights.data(), 3, 2};
  const ts::matrix_view<float> dl{dlogits.data(), 3, 4};
  const ts::matrix_view<float> out{chunk.data(), 1, 1};
  const ts::const_balance_counts counts = p.local();

  const auto refused = [&](const char* message, auto&& call) {
    CHECK_THROWS_WITH_AS(call(), message, ts::invalid_argument);
    CHECK(dlogits == std::vector<float>(12, -7.0f));
    CHECK(chunk == std::vector<float>(1, -7.0f));
  };
  refused("balance losses need global_counts, these have no data",
          [&] { r.losses(ts::host_stream{}, p.inputs(), {}, &coefficient, 0, out); });
  refused("balance losses need global_counts, these have no data",
          [&] { r.backward(ts::host_stream{}, p.inputs(), p.out(), dw, {}, &coefficient, 1.0f, dl); });
  refused("balance losses need coefficients [1]",
          [&] { r.losses(ts::host_stream{}, p.inputs(), counts, nullptr, 0, out); });
  refused("coefficient 0 is nan, it must be finite",
          [&] { r.backward(ts::host_stream{}, p.inputs(), p.out(), dw, counts, &bad_coefficient, 1.0f, dl); });
  refused("chunk_losses is [1, 1], expected [2, 1]",
          [&] { r.losses(ts::host_stream{}, p.inputs(), counts, &coefficient, 2, out); });
  refused("chunk_tokens = -1, it must be at least 0",
          [&] { r.losses(ts::host_stream{}, p.inputs(), counts, &coefficient, -1, out); });
  refused("dweights is [3, 1], expected [3, 2]", [&] {
    r.backward(ts::host_stream{}, p.inputs(), p.out(), ts::matrix_view<const float>{dweights.data(), 3, 1}, counts,
               &coefficient, 1.0f, dl);
  });
  std::vector<std::int64_t> small = p.counts;
  small[4] = 2;
  refused(
      "global_counts hold 2 tokens in 1 sequences, this call alone has 3 in 1: sum the local counts over all ranks "
      "first",
      [&] {
        r.losses(ts::host_stream{}, p.inputs(), ts::const_balance_counts{small.data(), 4}, &coefficient, 0, out);
      });
  auto ids = p;
  ids.expert_ids[3] = 4;
  refused("routing.expert_ids gives token 1 expert id 4 in slot 1, outside [0, 4)",
          [&] { r.backward(ts::host_stream{}, p.inputs(), ids.out(), dw, counts, &coefficient, 1.0f, dl); });
  auto nan = p;
  nan.logits[5] = std::nanf("");
  refused("the logit of token 1 for expert 1 is nan, logits must be finite",
          [&] { r.losses(ts::host_stream{}, nan.inputs(), counts, &coefficient, 0, out); });
  refused("the logit of token 1 for expert 1 is nan, logits must be finite",
          [&] { r.backward(ts::host_stream{}, nan.inputs(), p.out(), dw, counts, &coefficient, 1.0f, dl); });
  CHECK_THROWS_AS(r.backward(ts::host_stream{}, p.inputs(), p.out(), dw, counts, &coefficient, 1.0f,
                             ts::matrix_view<float>{p.logits.data(), 3, 4}),
                  ts::invalid_argument);
}

}  // namespace
