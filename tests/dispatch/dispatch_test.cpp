// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <mutex>
#include <random>
#include <tuple>

#include <tessera/comm/comm.hpp>
#include <tessera/layout/layout.hpp>

#include "../support/dispatch_fixture.hpp"
#include "../support/routing_cases.hpp"

namespace {

namespace ts = tessera;
using namespace tessera_test;

constexpr ts::dispatch_options roomy{.row_bound = ts::dispatch_options::full_row_bound};

std::vector<double> random_rows(std::int64_t count, std::uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& v : values) v = normal(engine);
  return values;
}

template <class S>
std::vector<S> as(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}
template <>
std::vector<ts::bfloat16> as(const std::vector<double>& values) {
  std::vector<ts::bfloat16> out;
  for (double v : values) out.emplace_back(static_cast<float>(v));
  return out;
}

// Runs `body(rank's fixture, comm, routing part, first token, tokens)` on every rank of a split global batch.
template <class S, class A, class Combine, class Layout, class Body>
void on_ranks(const Layout& placement, global_routing<A>& batch, std::int64_t hidden, bool uneven,
              ts::dispatch_options options, Body&& body) {
  const int ranks = placement.num_ranks();
  const auto offsets = split_tokens(batch.num_tokens, ranks, uneven);
  std::int64_t most = 0;
  for (int r = 0; r < ranks; ++r) most = std::max(most, offsets[std::size_t(r) + 1] - offsets[std::size_t(r)]);
  ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
    const auto me = static_cast<std::size_t>(comm.rank());
    const std::int64_t first = offsets[me];
    const std::int64_t count = offsets[me + 1] - first;
    dispatch_rank<Layout, S, A, Combine> rank(placement, comm.rank(), batch.top_k, most, hidden, options);
    const auto chosen = batch.part(first, count);
    rank.exchange(comm, chosen);
    body(rank, comm, chosen, first, count);
  });
}

// All of the cases below over layouts, ranks and skews.
template <class F>
void for_all_cases(F&& f) {
  for (const int ranks : {1, 2, 3, 4, 8}) {
    for (const skew kind : all_skews) {
      for (const bool uneven : {false, true}) {
        const int experts = 11;
        const int top_k = 3;
        CAPTURE(ranks);
        CAPTURE(name_of(kind));
        CAPTURE(uneven);
        f(ts::layout::block(experts, ranks), kind, uneven, top_k);
        f(ts::layout::round_robin(experts, ranks), kind, uneven, top_k);
      }
    }
  }
}

}  // namespace

TEST_CASE("every pair arrives once, at the owner of its expert, in the order (expert, source, token)") {
  for_all_cases([](auto placement, skew kind, bool uneven, int top_k) {
    const std::int64_t tokens = 37;
    auto batch = make_routing<float>(tokens, placement.num_experts(), top_k, kind, 7);
    // Row content is the token's global number, so that what arrives can be told.
    std::vector<double> x;
    for (std::int64_t t = 0; t < tokens; ++t) x.insert(x.end(), {static_cast<double>(t), -static_cast<double>(t)});
    std::mutex mutex;
    std::vector<std::tuple<std::int32_t, std::int64_t, float>> arrived;  // (expert, token, weight)
    std::int64_t rows = 0;
    on_ranks<double, float, ts::combine::ordered>(
        placement, batch, 2, uneven, roomy,
        [&](auto& rank, auto& comm, const auto&, std::int64_t first, std::int64_t count) {
          const auto pairs = rank.dispatch_pairs(comm, {x.data() + first * 2, count, 2});
          const std::lock_guard lock(mutex);
          rows += rank.handle.total->received_rows;
          for (int slot = 0; slot < rank.handle.num_local_experts; ++slot) {
            double last = -1;
            for (auto i = rank.handle.expert_offsets[slot]; i < rank.handle.expert_offsets[slot + 1]; ++i) {
              const double token = pairs[static_cast<std::size_t>(i) * 2];
              CHECK(pairs[static_cast<std::size_t>(i) * 2 + 1] == -token);
              CHECK(token > last);  // contiguous split: global order is the order (source, token)
              last = token;
              arrived.emplace_back(placement.expert_at(comm.rank(), slot), static_cast<std::int64_t>(token),
                                   rank.handle.pair_weights[i]);
            }
          }
        });
    std::vector<std::tuple<std::int32_t, std::int64_t, float>> sent;
    std::int64_t distinct = 0;
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<int> owners;
      for (int k = 0; k < top_k; ++k) {
        const auto i = static_cast<std::size_t>(t * top_k + k);
        if (batch.ids[i] < 0) continue;
        sent.emplace_back(batch.ids[i], t, batch.weights[i]);
        owners.push_back(placement.owner(batch.ids[i], 0).rank);
      }
      std::sort(owners.begin(), owners.end());
      distinct += std::unique(owners.begin(), owners.end()) - owners.begin();
    }
    std::sort(sent.begin(), sent.end());
    std::sort(arrived.begin(), arrived.end());
    CHECK(sent == arrived);
    // One row per (token, rank); a single rank reads its tokens in place, also those without a pair.
    CHECK(rows == (placement.num_ranks() == 1 ? tokens : distinct));
  });
}

TEST_CASE_TEMPLATE("combine is the adjoint of dispatch", Combine, ts::combine::ordered, ts::combine::reduced) {
  for_all_cases([](auto placement, skew kind, bool uneven, int top_k) {
    const std::int64_t tokens = 29;
    const std::int64_t hidden = 5;
    auto batch = make_routing<double>(tokens, placement.num_experts(), top_k, kind, 3);
    const auto x = random_rows(tokens * hidden, 1);
    std::mutex mutex;
    double dx_y = 0;
    double x_cy = 0;
    on_ranks<double, double, Combine>(
        placement, batch, hidden, uneven, roomy,
        [&](auto& rank, auto& comm, const auto& chosen, std::int64_t first, std::int64_t count) {
          const ts::matrix_view<const double> mine{x.data() + first * hidden, count, hidden};
          const auto dx = rank.dispatch_pairs(comm, mine);
          const auto y =
              random_rows(static_cast<std::int64_t>(dx.size()), 17 + static_cast<std::uint32_t>(comm.rank()));
          const auto cy = rank.combine(comm, y, ts::combine_weights::none, chosen);
          const std::lock_guard lock(mutex);
          for (std::size_t i = 0; i < dx.size(); ++i) dx_y += dx[i] * y[i];
          for (std::size_t i = 0; i < cy.size(); ++i) x_cy += mine.data[i] * cy[i];
        });
    CHECK(dx_y == doctest::Approx(x_cy).epsilon(1e-12));
    if (kind == skew::uniform) CHECK(std::abs(dx_y) > 1e-6);  // not trivially equal
  });
}

TEST_CASE_TEMPLATE("dispatch, identity, combine gives the sum of the weights times x", Combine, ts::combine::ordered,
                   ts::combine::reduced) {
  for_all_cases([](auto placement, skew kind, bool uneven, int top_k) {
    const std::int64_t tokens = 23;
    const std::int64_t hidden = 4;
    auto batch = make_routing<double>(tokens, placement.num_experts(), top_k, kind, 5);
    const auto x = random_rows(tokens * hidden, 2);
    on_ranks<double, double, Combine>(
        placement, batch, hidden, uneven, roomy,
        [&](auto& rank, auto& comm, const auto& chosen, std::int64_t first, std::int64_t count) {
          const ts::matrix_view<const double> mine{x.data() + first * hidden, count, hidden};
          const auto y = rank.combine(comm, rank.dispatch_pairs(comm, mine), ts::combine_weights::routing, chosen);
          for (std::int64_t t = 0; t < count; ++t) {
            double sum = 0;
            for (int k = 0; k < top_k; ++k) sum += chosen.weights(t, k);
            for (std::int64_t j = 0; j < hidden; ++j)
              CHECK(y[std::size_t(t * hidden + j)] == doctest::Approx(sum * mine(t, j)).epsilon(1e-12));
          }
        });
  });
}

TEST_CASE("combine::ordered gives the same bits for every number of ranks, combine::reduced need not") {
  const std::int64_t tokens = 64;
  const std::int64_t hidden = 9;
  const int experts = 16;
  auto batch = make_routing<float>(tokens, experts, 6, skew::uniform, 11);
  const auto x = as<ts::bfloat16>(random_rows(tokens * hidden, 4));
  const auto run = [&](int ranks, auto policy) {
    std::vector<ts::bfloat16> y(x.size());
    on_ranks<ts::bfloat16, float, decltype(policy)>(
        ts::layout::block(experts, ranks), batch, hidden, true, roomy,
        [&](auto& rank, auto& comm, const auto& chosen, std::int64_t first, std::int64_t count) {
          auto pairs = rank.dispatch_pairs(comm, {x.data() + first * hidden, count, hidden});
          for (int slot = 0; slot < rank.handle.num_local_experts; ++slot)  // something that depends on the expert
            for (auto i = rank.handle.expert_offsets[slot] * hidden; i < rank.handle.expert_offsets[slot + 1] * hidden;
                 ++i)
              pairs[std::size_t(i)] =
                  ts::bfloat16(float(pairs[std::size_t(i)]) * float(1 + rank.placement.expert_at(comm.rank(), slot)));
          const auto mine = rank.combine(comm, pairs, ts::combine_weights::routing, chosen);
          std::copy(mine.begin(), mine.end(), y.begin() + first * hidden);
        });
    std::vector<std::uint16_t> bits;
    for (const auto v : y) bits.push_back(v.bits);
    return bits;
  };
  const auto one = run(1, ts::combine::ordered{});
  bool reduced_differs = false;
  for (const int ranks : {2, 3, 4, 8}) {
    CAPTURE(ranks);
    CHECK(run(ranks, ts::combine::ordered{}) == one);
    CHECK(run(ranks, ts::combine::reduced{}) == run(ranks, ts::combine::reduced{}));  // run to run
    reduced_differs = reduced_differs || run(ranks, ts::combine::reduced{}) != one;
  }
  CHECK(reduced_differs);  // else the first check could not fail
}

TEST_CASE("pair values come home to their pairs") {
  for_all_cases([](auto placement, skew kind, bool uneven, int top_k) {
    auto batch = make_routing<double>(31, placement.num_experts(), top_k, kind, 9);
    on_ranks<double, double, ts::combine::ordered>(
        placement, batch, 1, uneven, roomy,
        [&](auto& rank, auto& comm, const auto& chosen, std::int64_t, std::int64_t count) {
          std::vector<double> values;
          for (std::int64_t i = 0; i < rank.handle.total->received_pairs; ++i)
            values.push_back(2 * rank.handle.pair_weights[i]);
          std::vector<double> home(static_cast<std::size_t>(count * top_k), 99.0);
          ts::return_pair_values({}, comm, rank.handle, values.data(),
                                 ts::matrix_view<double>{home.data(), count, top_k}, rank.values);
          for (std::int64_t t = 0; t < count; ++t)
            for (int k = 0; k < top_k; ++k) CHECK(home[std::size_t(t * top_k + k)] == 2 * chosen.weights(t, k));
        });
  });
}

TEST_CASE("a capacity factor drops the last pairs of an expert by position, or those of least weight") {
  // One rank, E = 2, K = 1, T = 6: capacity ceil(6 * 1 * 0.7 / 2) = 3. Expert 0 is chosen by tokens 0 1 2 4 5.
  global_routing<float> batch{6, 2, 1, {0, 0, 0, 1, 0, 0}, {0.5F, 0.1F, 0.9F, 0.3F, 0.5F, 0.7F}};
  const auto kept = [&](ts::drop_order order) {
    std::vector<int> tokens;
    on_ranks<double, float, ts::combine::ordered>(ts::layout::block(2, 1), batch, 1, false,
                                                  {.capacity_factor = 0.7, .order = order},
                                                  [&](auto& rank, auto&, const auto&, std::int64_t, std::int64_t) {
                                                    CHECK(rank.handle.total->capacity_drops == 2);
                                                    CHECK(rank.handle.total->received_pairs == 4);
                                                    for (int t = 0; t < 6; ++t)
                                                      if (rank.handle.pair_slots[t] >= 0) tokens.push_back(t);
                                                  });
    return tokens;
  };
  CHECK(kept(ts::drop_order::position) == std::vector<int>{0, 1, 2, 3});
  CHECK(kept(ts::drop_order::weight) == std::vector<int>{0, 2, 3, 5});  // of the two 0.5 the earlier stays
}

TEST_CASE("a capacity counts each rank's own tokens") {
  auto batch = make_routing<float>(40, 4, 2, skew::one_hot, 1);  // all pairs on experts 0 and 1
  on_ranks<double, float, ts::combine::reduced>(
      ts::layout::block(4, 2), batch, 1, false,
      {.row_bound = ts::dispatch_options::full_row_bound, .capacity_factor = 1.0},
      [](auto& rank, auto& comm, const auto&, std::int64_t, std::int64_t count) {
        CHECK(count == 20);
        CHECK(rank.handle.total->capacity_drops == 20);  // 2 experts x (20 - ceil(20 * 2 / 4))
        CHECK(rank.handle.total->received_pairs == (comm.rank() == 0 ? 40 : 0));
      });
}

TEST_CASE("a rank whose bound is exceeded makes every rank throw the same error with need and bound") {
  auto batch = make_routing<float>(32, 8, 2, skew::one_hot, 1);
  std::mutex mutex;
  std::vector<std::string> texts;
  ts::comm::threads::run(4, [&](ts::comm::threads& comm) {
    dispatch_rank<ts::layout::block, double, float, ts::combine::reduced> rank(ts::layout::block(8, 4), comm.rank(), 2,
                                                                               8, 1, {});
    const auto chosen = batch.part(comm.rank() * 8, 8);
    try {
      rank.exchange(comm, chosen);
    } catch (const ts::error& e) {
      const std::lock_guard lock(mutex);
      texts.emplace_back(e.what());
    }
  });
  REQUIRE(texts.size() == 4);
  for (const auto& text : texts) {
    CHECK(text == texts[0]);
    CHECK(text.find("rank 0 would receive 64 pairs, its bound is 32") != std::string::npos);  // 2 * T * K
  }
}

TEST_CASE("overflow_policy::drop admits pairs in the order (source, token, k) and counts the rest") {
  auto batch = make_routing<float>(32, 8, 2, skew::one_hot, 1);  // 64 pairs to rank 0
  std::mutex mutex;
  std::int64_t dropped = 0;
  on_ranks<double, float, ts::combine::reduced>(
      ts::layout::block(8, 4), batch, 1, false, {.row_bound = 37, .overflow = ts::overflow_policy::drop},
      [&](auto& rank, auto& comm, const auto& chosen, std::int64_t first, std::int64_t count) {
        std::vector<double> x(static_cast<std::size_t>(count));
        for (std::int64_t t = 0; t < count; ++t) x[std::size_t(t)] = static_cast<double>(first + t + 1);
        auto pairs = rank.dispatch_pairs(comm, {x.data(), count, 1});
        const auto y = rank.combine(comm, pairs, ts::combine_weights::none, chosen);
        const std::lock_guard lock(mutex);
        dropped += rank.handle.total->overflow_drops;
        CHECK(rank.handle.total->received_pairs == (comm.rank() == 0 ? 37 : 0));
        for (std::int64_t t = 0; t < count; ++t) {
          const std::int64_t before = (first + t) * 2;  // pairs of earlier tokens
          const double admitted = static_cast<double>(std::clamp<std::int64_t>(37 - before, 0, 2));
          CHECK(y[std::size_t(t)] == admitted * x[std::size_t(t)]);
        }
      });
  CHECK(dropped == 64 - 37);
}

TEST_CASE("replicas serve tokens in turn, and their gradients are summed on every copy") {
  // Expert 0 on all three ranks, the others once.
  const ts::layout::table_storage storage(4, {{0, 1}, {2, 0}, {0, 3}});
  const auto placement = storage.view();
  auto batch = make_routing<double>(30, 4, 2, skew::one_hot, 1);
  std::mutex mutex;
  std::vector<std::int64_t> served(3);
  on_ranks<double, double, ts::combine::ordered>(
      placement, batch, 1, false, roomy,
      [&](auto& rank, auto& comm, const auto& chosen, std::int64_t, std::int64_t count) {
        std::vector<double> x(static_cast<std::size_t>(count), 1.0);
        const auto y =
            rank.combine(comm, rank.dispatch_pairs(comm, {x.data(), count, 1}), ts::combine_weights::none, chosen);
        for (const double v : y) CHECK(v == 2.0);
        const int slot = placement.owner(0, comm.rank()).slot;
        std::vector<double> gradient(static_cast<std::size_t>(placement.num_slots(comm.rank()) * 3), 0.25);
        for (int j = 0; j < 3; ++j) gradient[std::size_t(slot * 3 + j)] = 1 + comm.rank() + 10 * j;
        std::vector<double> workspace(static_cast<std::size_t>(ts::replica_workspace_elements(placement, 3)));
        ts::sum_replica_gradients<double>({}, comm, placement, gradient.data(), 3, workspace.data());
        const std::lock_guard lock(mutex);
        served[std::size_t(comm.rank())] = rank.handle.expert_offsets[slot + 1] - rank.handle.expert_offsets[slot];
        for (int s = 0; s < placement.num_slots(comm.rank()); ++s)
          for (int j = 0; j < 3; ++j) CHECK(gradient[std::size_t(s * 3 + j)] == (s == slot ? 6 + 30 * j : 0.25));
      });
  CHECK(served == std::vector<std::int64_t>{12, 9, 9});  // tokens 0..9 of each rank, number mod 3
}

TEST_CASE("random shapes keep every pair") {
  std::mt19937 engine(2024);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution(low, high)(engine); };
  for (int round = 0; round < 60; ++round) {
    const int ranks = pick(1, 6);
    const int experts = pick(1, 40);
    const int top_k = pick(1, std::min(experts, 8));
    const std::int64_t tokens = pick(0, 50);
    const auto kind = all_skews[static_cast<std::size_t>(pick(0, 3))];
    auto batch = make_routing<double>(tokens, experts, top_k, kind, static_cast<std::uint32_t>(round));
    CAPTURE(round);
    std::mutex mutex;
    std::int64_t arrived = 0;
    on_ranks<double, double, ts::combine::reduced>(
        ts::layout::block(experts, ranks), batch, 3, pick(0, 1) == 1, roomy,
        [&](auto& rank, auto& comm, const auto& chosen, std::int64_t, std::int64_t count) {
          const auto x = random_rows(count * 3, 5);
          const auto y =
              rank.combine(comm, rank.dispatch_pairs(comm, {x.data(), count, 3}), ts::combine_weights::routing, chosen);
          const std::lock_guard lock(mutex);
          arrived += rank.handle.total->received_pairs;
          for (std::int64_t t = 0; t < count; ++t) {
            double sum = 0;
            for (int k = 0; k < top_k; ++k) sum += chosen.weights(t, k);
            for (int j = 0; j < 3; ++j)
              CHECK(y[std::size_t(t * 3 + j)] == doctest::Approx(sum * x[std::size_t(t * 3 + j)]).epsilon(1e-12));
          }
        });
    CHECK(arrived == std::count_if(batch.ids.begin(), batch.ids.end(), [](int e) { return e >= 0; }));
  }
}

TEST_CASE("bad routing is refused with the values") {
  ts::comm::self<ts::space::host> comm;
  dispatch_rank<ts::layout::block, double, float, ts::combine::ordered> rank(ts::layout::block(4, 1), 0, 2, 3, 1, {});
  global_routing<float> high{1, 4, 2, {0, 4}, {1, 1}};
  CHECK_THROWS_WITH_AS(rank.exchange(comm, high.part(0, 1)),
                       "token 0 chose expert 4 in slot 1, ids go from -1 (none) to 3", ts::invalid_argument);
  global_routing<float> low{1, 4, 2, {-2, 0}, {1, 1}};
  CHECK_THROWS_AS(rank.exchange(comm, low.part(0, 1)), ts::invalid_argument);
  auto many = make_routing<float>(4, 4, 2, skew::uniform, 1);
  CHECK_THROWS_WITH_AS(rank.exchange(comm, many.part(0, 4)), "4 tokens on rank 0, the bound max_tokens is 3",
                       ts::invalid_argument);
  CHECK_THROWS_AS(ts::dispatch_bounds::make(2, 4, 2, 2, 8, {.row_bound = -2}), ts::invalid_argument);
  CHECK_THROWS_AS(ts::dispatch_bounds::make(2, 4, 2, 2, 8, {.capacity_factor = -0.5}), ts::invalid_argument);
}

TEST_CASE("the default bound is min(R*T*K, 2*T*K) pairs") {
  CHECK(ts::dispatch_bounds::make(1, 8, 8, 2, 10, {}).max_pairs == 20);
  CHECK(ts::dispatch_bounds::make(4, 8, 2, 2, 10, {}).max_pairs == 40);
  CHECK(ts::dispatch_bounds::make(4, 8, 2, 2, 10, roomy).max_pairs == 80);
  CHECK(ts::dispatch_bounds::make(4, 8, 2, 2, 10, roomy).max_received_rows() == 40);
}
