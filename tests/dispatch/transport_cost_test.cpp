// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <tuple>

#include <tessera/dispatch/symmetric.hpp>
#include <tessera/dispatch/transport.hpp>

namespace {

namespace ts = tessera;
using kind = ts::transport_kind;

constexpr kind kinds[] = {kind::all_to_all, kind::all_gather, kind::copy_engines};

// The shape of the benchmarks: 8 of 256 experts, rows of 7168 numbers of 2 bytes.
ts::transport_case sizes(int ranks, std::int64_t tokens, double compute_us = 0) {
  ts::transport_case c;
  c.num_ranks = ranks;
  c.num_experts = 256;
  c.top_k = 8;
  c.num_tokens = tokens;
  c.row_bytes = 7168 * 2;
  c.compute_us = compute_us;
  return c;
}

ts::transport_case with_sms(ts::transport_case c, int sms) {
  c.dispatch_sms = c.combine_sms = sms;
  return c;
}

}  // namespace

TEST_CASE("the expected fan-out is that of random choices, and of the limits that are known") {
  CHECK(ts::expected_fanout(1, 64, 6) == doctest::Approx(1));
  CHECK(ts::expected_fanout(4, 64, 64) == doctest::Approx(4));
  CHECK(ts::expected_fanout(8, 8, 3) == doctest::Approx(3));  // one expert a rank
  CHECK(ts::expected_fanout(4, 256, 1) == doctest::Approx(1));
  CHECK(ts::expected_fanout(2, 256, 8) == doctest::Approx(1.99).epsilon(0.002));
  CHECK(ts::expected_fanout(4, 256, 8) == doctest::Approx(3.61).epsilon(0.002));
  std::mt19937 generator(3);
  for (const auto& [ranks, experts, top_k] : {std::tuple{4, 32, 3}, std::tuple{3, 24, 5}, std::tuple{8, 64, 6}}) {
    constexpr int samples = 40000;
    std::int64_t reached = 0;
    for (int i = 0; i < samples; ++i) {
      std::set<int> chosen, owners;
      while (static_cast<int>(chosen.size()) < top_k) {
        const int expert = static_cast<int>(generator() % static_cast<unsigned>(experts));
        if (chosen.insert(expert).second) owners.insert(expert / (experts / ranks));
      }
      reached += static_cast<std::int64_t>(owners.size());
    }
    CHECK(ts::expected_fanout(ranks, experts, top_k) ==
          doctest::Approx(static_cast<double>(reached) / samples).epsilon(0.01));
  }
  CHECK_THROWS_AS(ts::expected_fanout(0, 8, 2), ts::invalid_argument);
  CHECK_THROWS_AS(ts::expected_fanout(2, 8, 9), ts::invalid_argument);
}

TEST_CASE("bytes out of a GPU are those of the rows that leave it") {
  const auto c = sizes(4, 4096);
  const double all = 3.0 * 4096 * 14336;
  CHECK(ts::dispatch_time(kind::all_gather, c).wire_bytes == doctest::Approx(all));
  CHECK(ts::dispatch_time(kind::copy_engines, c).wire_bytes == doctest::Approx(all));
  CHECK(ts::dispatch_time(kind::all_to_all, c).wire_bytes == doctest::Approx(159.2e6).epsilon(0.005));
  CHECK(ts::combine_time(kind::all_to_all, c).wire_bytes == ts::dispatch_time(kind::all_to_all, c).wire_bytes);
  CHECK(ts::combine_time(kind::all_gather, c).wire_bytes == ts::combine_time(kind::all_to_all, c).wire_bytes);
  for (const kind k : kinds) {
    CHECK(ts::dispatch_time(k, sizes(1, 4096)).wire_bytes == 0);
    CHECK(ts::combine_time(k, sizes(1, 4096)).wire_bytes == 0);
  }
}

TEST_CASE("more tokens, wider rows and more ranks take longer, more SMs never do") {
  for (const kind k : kinds) {
    CAPTURE(ts::name_of(k));
    for (const int ranks : {2, 3, 4, 8}) {
      double there = 0, home = 0;
      for (const std::int64_t tokens : {0, 1, 64, 128, 512, 1000, 4096, 8192, 65536}) {
        const auto c = sizes(ranks, tokens);
        const auto d = ts::dispatch_time(k, c);
        const auto h = ts::combine_time(k, c);
        CHECK(d.us > there);
        CHECK(h.us > home);
        there = d.us;
        home = h.us;
        auto wider = c;
        wider.row_bytes *= 2;
        if (tokens > 0) {
          CHECK(ts::dispatch_time(k, wider).us > d.us);
          CHECK(ts::combine_time(k, wider).us > h.us);
          CHECK(ts::dispatch_time(k, sizes(ranks + 1, tokens)).us > d.us);
        }
        for (const int sms : {2, 8, 16, 64}) {
          CHECK(ts::dispatch_time(k, with_sms(c, 2 * sms)).us <= ts::dispatch_time(k, with_sms(c, sms)).us);
          CHECK(ts::combine_time(k, with_sms(c, 2 * sms)).us <= ts::combine_time(k, with_sms(c, sms)).us);
        }
      }
    }
  }
}

TEST_CASE("what computation hides costs the SMs that are taken from it, and never more than waiting") {
  for (const kind k : kinds) {
    const auto alone = ts::dispatch_time(k, sizes(4, 4096));
    CHECK(alone.cost_us == doctest::Approx(alone.us));
    double before = alone.us;
    for (const double compute : {10.0, 100.0, 400.0, 1000.0, 10000.0}) {
      const auto hidden = ts::dispatch_time(k, sizes(4, 4096, compute));
      CHECK(hidden.us == alone.us);
      CHECK(hidden.cost_us <= before * (1 + 1e-12));
      CHECK(hidden.cost_us >= std::min(alone.sm_us, alone.us) * (1 - 1e-12));
      before = hidden.cost_us;
    }
    CHECK(before == doctest::Approx(std::min(alone.sm_us, alone.us)));
  }
}

TEST_CASE("automatic takes the cheapest, and says why") {
  const auto dispatch = [](const ts::transport_case& c) { return ts::transport::automatic(c).dispatch(); };
  const auto combine = [](const ts::transport_case& c) { return ts::transport::automatic(c).combine(); };
  // few tokens: latency decides. Measured with 2 and 4 ranks: 14.9 and 26.9 us against 28 and 46 by copies,
  // and 14.0 and 27.3 against 83 and 117 home.
  for (const int ranks : {2, 3, 4, 8}) {
    CHECK(dispatch(sizes(ranks, 128)) == kind::all_to_all);
    CHECK(combine(sizes(ranks, 128)) == kind::all_to_all);
  }
  // nothing beside it: the kernel is as fast as copies even where nearly every row goes everywhere, at two ranks.
  // Measured for 4096 tokens: 171 us against 181 by copies with two ranks, 468 against 496 with four; 191 against 316
  // and 482 against 707 home. Of more than 8192 tokens, which were not measured, the model gives two ranks equal times
  // within 2 per cent, and nothing is demanded
  for (const std::int64_t tokens : {1024, 4096, 8192}) {
    for (const int ranks : {2, 4}) {
      CHECK(dispatch(sizes(ranks, tokens)) == kind::all_to_all);
      CHECK(combine(sizes(ranks, tokens)) == kind::all_to_all);
    }
  }
  CHECK(dispatch(sizes(8, 4096)) == kind::all_to_all);
  // beside computation that hides it: SMs decide. Between two ranks 16 of them for as long as rows take are less than
  // all of them for a copy of own rows: measured, copies beside products were no faster. Between four this is what the
  // model says; it was not measured
  CHECK(dispatch(sizes(2, 4096, 2000)) == kind::all_to_all);
  CHECK(dispatch(with_sms(sizes(2, 4096, 2000), 64)) == kind::copy_engines);
  CHECK(dispatch(sizes(4, 4096, 2000)) == kind::copy_engines);
  CHECK(dispatch(with_sms(sizes(4, 4096, 2000), 12)) == kind::copy_engines);
  // several streams of copies share less than one has: 834 us with three against 496
  auto spread = sizes(4, 4096);
  spread.copy_streams = 3;
  CHECK(ts::dispatch_time(kind::copy_engines, spread).us > ts::dispatch_time(kind::copy_engines, sizes(4, 4096)).us);
  // one expert for a token: seven of eight copies would be for nothing, and cannot be hidden
  auto sparse = sizes(8, 4096, 300);
  sparse.top_k = 1;
  CHECK(dispatch(sparse) == kind::all_to_all);

  const ts::transport::automatic chosen(sizes(4, 4096));
  const std::string text = chosen.explain();
  for (const kind k : kinds) CHECK(text.find(ts::name_of(k)) != std::string::npos);
  CHECK(text.find("dispatch by all_to_all") != std::string::npos);
  CHECK(text.find("4 ranks, 8 of 256 experts, 4096 tokens of 14336 bytes") != std::string::npos);
  CHECK(text.find("176.2") != std::string::npos);  // MB out of a GPU by copies

  for (const ts::transport::automatic& given :
       {ts::transport::automatic(), ts::transport::automatic(ts::transport::all_to_all{}),
        ts::transport::automatic(ts::transport::all_gather{}),
        ts::transport::automatic(ts::transport::copy_engines{.streams = 3, .chunks = 2})}) {
    CHECK(given.dispatch() == given.combine());
    CHECK(given.explain() == std::string("transport: ") + ts::name_of(given.dispatch()) + ", as asked for");
  }
  CHECK(ts::transport::automatic(ts::transport::copy_engines{.streams = 3, .chunks = 2}).copies().streams == 3);

  const ts::transport::automatic there(ts::transport::copy_engines{.streams = 2}, ts::transport::all_to_all{});
  CHECK(there.dispatch() == kind::copy_engines);
  CHECK(there.combine() == kind::all_to_all);
  CHECK(there.copies().streams == 2);
  CHECK(there.explain() == "transport: dispatch by copy_engines, combine by all_to_all, as asked for");
  const ts::transport::automatic home(ts::transport::all_to_all{.copies_own_rows = true},
                                      ts::transport::copy_engines{.chunks = 2});
  CHECK(home.dispatch() == kind::all_to_all);
  CHECK(home.combine() == kind::copy_engines);
  CHECK(home.sends().copies_own_rows);
  CHECK(home.copies().chunks == 2);
  const ts::transport::automatic dense(ts::transport::all_gather{}, ts::transport::copy_engines{});
  CHECK(dense.dispatch() == kind::all_gather);
  CHECK(dense.combine() == kind::copy_engines);
}

TEST_CASE("copies ask for room on the way home for what goes to each peer, and for streams") {
  const auto bounds = ts::dispatch_bounds::make(4, 8, 2, 2, 100, {});
  CHECK(ts::outgoing_rows(ts::transport::copy_engines{}, bounds) == 300);
  CHECK(ts::outgoing_rows(ts::transport::all_to_all{}, bounds) == 0);
  CHECK(ts::outgoing_rows(ts::transport::all_gather{}, bounds) == 0);
  CHECK(ts::outgoing_rows(ts::transport::automatic{}, bounds) == 0);
  CHECK(ts::outgoing_rows(ts::transport::automatic{ts::transport::copy_engines{}}, bounds) == 300);
  const ts::transport::automatic there(ts::transport::copy_engines{.streams = 2}, ts::transport::all_to_all{});
  const ts::transport::automatic home(ts::transport::all_to_all{}, ts::transport::copy_engines{.streams = 2});
  CHECK(ts::outgoing_rows(there, bounds) == 0);
  CHECK(ts::outgoing_rows(home, bounds) == 300);
  CHECK(ts::copy_streams_of(there) == 3);
  CHECK(ts::copy_streams_of(home) == 2);
  CHECK(ts::copy_streams_of(ts::transport::all_to_all{}) == 0);
  CHECK(ts::copy_streams_of(ts::transport::all_to_all{.copies_own_rows = true}) == 1);
  CHECK(ts::copy_streams_of(ts::transport::all_gather{}) == 0);
  CHECK(ts::copy_streams_of(ts::transport::copy_engines{.streams = 3}) == 4);
}

// Medians of the slowest rank on 2 and 4 H200, in microseconds, of bench/results/gpu_ranks_2.json and gpu_ranks_4.json:
// dispatch_cached and combine_expert_rows, and with SMs given dispatch_cached and combine_expert_rows of 4096 tokens.
// Those of four ranks are of the state before 16 SMs sent rows and fewer warps sums, all of these by a counter.
TEST_CASE("the model agrees with what was measured on 2 and 4 H200 within 15 per cent") {
  struct figure {
    int ranks;
    std::int64_t tokens;
    double dispatch_us, combine_us;
  };
  for (const figure& f : {figure{2, 512, 28.8, 39.9},
                          {2, 1024, 48.9, 61.1},
                          {2, 2048, 89.6, 101.8},
                          {2, 4096, 168.5, 189.9},
                          {2, 8192, 326.9, 354.9},
                          {4, 512, 64.9, 76.7},
                          {4, 1024, 125.5, 138.8},
                          {4, 2048, 240.4, 251.5},
                          {4, 4096, 465.3, 482.0},
                          {4, 8192, 915.8, 933.2}}) {
    CAPTURE(f.ranks);
    CAPTURE(f.tokens);
    CHECK(ts::dispatch_time(kind::all_to_all, sizes(f.ranks, f.tokens)).us ==
          doctest::Approx(f.dispatch_us).epsilon(0.15));
    CHECK(ts::combine_time(kind::all_to_all, sizes(f.ranks, f.tokens)).us ==
          doctest::Approx(f.combine_us).epsilon(0.15));
  }
  struct budget {
    int ranks, sms;
    double dispatch_us, combine_us;
  };
  for (const budget& b :
       {budget{2, 4, 576.1, 2390.0}, {2, 8, 295.0, 1199.9},  {2, 12, 199.5, 807.4}, {2, 16, 168.6, 609.2},
        {2, 24, 170.7, 412.0},       {2, 32, 170.3, 313.8},  {2, 48, 170.5, 221.3}, {2, 64, 170.4, 206.3},
        {2, 96, 170.9, 197.4},       {2, 132, 170.9, 190.0}, {4, 4, 1044.0, 3360},  {4, 8, 534.7, 1693.3},
        {4, 12, 460.6, 1133.9},      {4, 16, 460.7, 857.2},  {4, 24, 461.2, 581.2}, {4, 32, 461.2, 479.0},
        {4, 48, 463.8, 482.8},       {4, 64, 465.1, 481.9},  {4, 96, 465.2, 482.5}, {4, 132, 464.9, 481.8}}) {
    CAPTURE(b.ranks);
    CAPTURE(b.sms);
    const auto c = with_sms(sizes(b.ranks, 4096), b.sms);
    CHECK(ts::dispatch_time(kind::all_to_all, c).us == doctest::Approx(b.dispatch_us).epsilon(0.15));
    CHECK(ts::combine_time(kind::all_to_all, c).us == doctest::Approx(b.combine_us).epsilon(0.15));
  }
  CHECK(ts::dispatch_time(kind::all_gather, sizes(2, 4096)).us == doctest::Approx(168.5).epsilon(0.15));
  CHECK(ts::dispatch_time(kind::all_gather, sizes(4, 4096)).us == doctest::Approx(513.9).epsilon(0.15));
}

TEST_CASE("the model agrees with measured copies by copy engines within 15 per cent") {
  struct copied {
    int ranks, streams;
    std::int64_t tokens;
    double dispatch_us, combine_us;
  };
  for (const copied& f : {copied{2, 1, 128, 21.7, 80.9},
                          {2, 1, 1024, 62.3, 138.0},
                          {2, 1, 4096, 178.9, 314.2},
                          {4, 1, 128, 41.5, 116.5},
                          {4, 1, 1024, 148.5, 290.8},
                          {4, 1, 4096, 490.4, 707.0},
                          {4, 3, 128, 46.4, 97.9},
                          {4, 3, 1024, 229.7, 271.5},
                          {4, 3, 4096, 823.7, 892.3}}) {
    CAPTURE(f.ranks);
    CAPTURE(f.streams);
    CAPTURE(f.tokens);
    auto c = sizes(f.ranks, f.tokens);
    c.copy_streams = f.streams;
    CHECK(ts::dispatch_time(kind::copy_engines, c).us == doctest::Approx(f.dispatch_us).epsilon(0.15));
    CHECK(ts::combine_time(kind::copy_engines, c).us == doctest::Approx(f.combine_us).epsilon(0.15));
  }
  // copies alone
  CHECK(ts::copies_us(sizes(2, 128), {}) == doctest::Approx(8.2).epsilon(0.15));
  CHECK(ts::copies_us(sizes(4, 128), {}) == doctest::Approx(29.4).epsilon(0.15));
  CHECK(ts::copies_us(sizes(2, 4096), {}) == doctest::Approx(153.8).epsilon(0.15));
  CHECK(ts::copies_us(sizes(4, 4096), {}) == doctest::Approx(481.8).epsilon(0.15));
}

// A launch is not all of the fixed time: it grows with the first rows. Two ranks that bring 128 tokens home take 14 us,
// and the model says two fifths more. What is chosen for few tokens does not hang on this: copies take 81 and 117 us
// to bring them home.
TEST_CASE("the model is worse where few tokens travel") {
  struct figure {
    int ranks;
    double dispatch_us, combine_us, combine_tolerance;
  };
  for (const figure& f : {figure{2, 11.3, 14.2, 0.4}, {4, 20.5, 27.3, 0.15}}) {
    CAPTURE(f.ranks);
    CHECK(ts::dispatch_time(kind::all_to_all, sizes(f.ranks, 128)).us == doctest::Approx(f.dispatch_us).epsilon(0.2));
    CHECK(ts::combine_time(kind::all_to_all, sizes(f.ranks, 128)).us ==
          doctest::Approx(f.combine_us).epsilon(f.combine_tolerance));
  }
}

TEST_CASE("operations that wait for other ranks at the same time have room at the same time") {
  for (const int device_sms : {132, 114, 16}) {
    for (int slots = 1; slots <= 4; ++slots) {
      CAPTURE(device_sms);
      CAPTURE(slots);
      const auto chosen = ts::symmetric_sms::choose(0, device_sms, slots);
      CHECK(slots * (chosen.rows + chosen.lists) <= device_sms);
      CHECK(slots * chosen.sums <= device_sms);
      const auto expanded = ts::expanded_sms::choose(0, device_sms, slots);
      CHECK(expanded.rows >= 1);
      CHECK(expanded.order >= 1);
      CHECK(slots * (expanded.rows + std::max(expanded.order, chosen.lists)) <= device_sms);
      for (const int budget : {2, 8}) {  // of each slot
        const auto given = ts::expanded_sms::choose(budget, device_sms, slots);
        CHECK(given.rows == std::min(budget, device_sms));
        CHECK(given.order >= 1);
        CHECK(given.order <= std::max(device_sms / slots / 2, 1));
      }
    }
  }
  CHECK(ts::expanded_sms::choose(0, 132, 1).rows == 16);
  CHECK(ts::expanded_sms::choose(0, 132, 1).order == 116);
}
