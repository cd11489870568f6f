// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstdint>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/pipeline/schedules.hpp>
#include <tessera/pipeline/simulator.hpp>

namespace pipeline = tessera::pipeline;

namespace {

using ticks = std::int64_t;

// Input part as long as the forward, weight part no longer: where all four formulas are exact.
struct setting {
  ticks f, w, pair;
};
constexpr setting settings[] = {{1, 1, 3}, {1, 1, 2}, {2, 1, 4},  {2, 2, 5},
                                {3, 2, 8}, {5, 3, 9}, {7, 7, 15}, {1000, 611, 2222}};

pipeline::stage_times times_of(const setting& x) { return {x.f, x.f + x.w, x.f, x.w, x.pair}; }

struct result {
  ticks longest, shortest, makespan, busy;
  int live;
};
result run(const pipeline::schedule& s, const pipeline::stage_times& t,
           pipeline::messages how = pipeline::messages::buffered) {
  const pipeline::timeline line = simulate(s, {.stages = {t}}, how);
  return {line.max_idle(), *std::min_element(line.idle.begin(), line.idle.end()), line.makespan, line.busy[0],
          *std::max_element(line.live_activations.begin(), line.live_activations.end())};
}

}  // namespace

TEST_CASE("the longest idle time is the published formula's, for 8 sets of times and every size") {
  int compared = 0;
  for (const setting& x : settings) {
    const ticks f = x.f, b = x.f + x.w, w = x.w, pair = x.pair;
    const pipeline::stage_times t = times_of(x);
    for (const int p : {2, 4, 6, 8, 12, 16}) {
      for (const int m : {2 * p, 2 * p + 2, 3 * p, 5 * p}) {
        INFO("P = ", p, ", M = ", m, ", F = ", f, ", W = ", w, ", F&B = ", pair);
        // DeepSeek-V3 report, table 2, PP = p; DualPipeV has PP / 2 ranks.
        REQUIRE(run(pipeline::one_f_one_b(p, m), t).longest == (p - 1) * (f + b));
        REQUIRE(run(pipeline::zb1p(p, m), t).longest == (p - 1) * (f + b - 2 * w));
        REQUIRE(run(pipeline::dualpipe(p, m), t).longest == (p / 2 - 1) * (pair + b - 3 * w));
        REQUIRE(run(pipeline::dualpipev(p / 2, m), t).longest == (p / 2 - 1) * (pair + b - 3 * w));
        CHECK(pipeline::one_f_one_b_idle(p, t) == (p - 1) * (f + b));
        CHECK(pipeline::zb1p_idle(p, t) == (p - 1) * (f + b - 2 * w));
        CHECK(pipeline::dualpipe_idle(p, t) == (p / 2 - 1) * (pair + b - 3 * w));
        CHECK(pipeline::dualpipev_idle(p / 2, t) == (p / 2 - 1) * (pair + b - 3 * w));
        compared += 4;
      }
    }
  }
  CHECK(compared == 8 * 6 * 4 * 4);
}

TEST_CASE("the step is the work of a rank and the formula's idle time") {
  // Without overlap all ranks work M(F + B), so all idle alike.
  for (const int p : {1, 3, 8}) {
    for (const int m : {1, 2, 3, 8, 24}) {
      const result one = run(pipeline::one_f_one_b(p, m), {3, 7, 4, 3, 10});
      CHECK(one.makespan == (m + p - 1) * 10);
      CHECK(one.longest == one.shortest);
    }
  }
  // 8 ranks, 20 micro-batches, times of the papers' figures: figure 5 of the DeepSeek-V3 report is 66 forwards long.
  CHECK(run(pipeline::dualpipe(8, 20), {}).makespan == 66);
  CHECK(run(pipeline::dualpipe(8, 20), {}).longest == 6);
  CHECK(run(pipeline::dualpipe(8, 40), {}).longest == 6);
  CHECK(run(pipeline::dualpipe(8, 20), {}).shortest == 6);
  // An overlap that hides something: inner ranks, which do more pairs, idle less.
  CHECK(run(pipeline::dualpipe(8, 20), {1, 2, 1, 1, 2}).shortest <=
        run(pipeline::dualpipe(8, 20), {1, 2, 1, 1, 2}).longest);
}

TEST_CASE("1F1B is exact for any times, ZB1P as long as a weight part fits where it fills a gap") {
  for (ticks f = 1; f <= 4; ++f) {
    for (ticks in = 1; in <= 4; ++in) {
      for (ticks w = 1; w <= 4; ++w) {
        const pipeline::stage_times t{f, in + w, in, w, f + in + w};
        for (const int p : {2, 5, 8}) {
          CHECK(run(pipeline::one_f_one_b(p, 2 * p + 1), t).longest == (p - 1) * (f + in + w));
          const ticks zb = run(pipeline::zb1p(p, 2 * p + 1), t).longest, formula = (p - 1) * (f + in - w);
          if (w <= std::min(f, in)) {
            CHECK(zb == formula);
          } else {
            CHECK(zb > formula);
          }
        }
      }
    }
  }
}

TEST_CASE("activations are those of the published table: PP, PP, PP + 1, PP + 1, on every rank of DualPipe") {
  for (const int p : {2, 4, 8, 16}) {
    for (const int m : {2 * p, 4 * p}) {
      CHECK(run(pipeline::one_f_one_b(p, m), {}).live == p);
      CHECK(run(pipeline::zb1p(p, m), {}).live == p);
      for (const auto& s : {pipeline::dualpipe(p, m), pipeline::dualpipev(p / 2, m)}) {
        for (const pipeline::memory_peak& peak : pipeline::peak_memory(s)) CHECK(peak.activations == p + 1);
        CHECK(s.num_chunks == 2);  // 2x parameters: for DualPipe copies, for DualPipeV half the ranks
      }
    }
  }
}

TEST_CASE("with the papers' times, ranks that wait at batches of messages lose nothing") {
  for (const int p : {2, 4, 8, 16}) {
    for (const int m : {2 * p, 4 * p + 2}) {
      for (const auto name : pipeline::schedule_names) {
        const pipeline::schedule s = pipeline::named_schedule(name, p, m);
        INFO(s.name, ", P = ", p, ", M = ", m);
        CHECK(run(s, {}, pipeline::messages::rendezvous).makespan == run(s, {}).makespan);
      }
    }
  }
}
