// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/pipeline/memory.hpp>
#include <tessera/pipeline/schedules.hpp>
#include <tessera/pipeline/simulator.hpp>

namespace ts = tessera;
namespace pipeline = tessera::pipeline;
using pipeline::action;
using pipeline::action_kind;
using pipeline::costs;
using pipeline::schedule;

namespace {

using ticks = std::int64_t;

costs random_costs(const schedule& s, std::mt19937& random) {
  const auto draw = [&](int low, int high) { return ticks(low) + ticks(random() % std::uint32_t(high - low + 1)); };
  costs c{.stages = {}, .latency = 0, .links = {}};
  for (int stage = 0; stage < s.num_stages; ++stage) {
    const ticks f = draw(1, 9), in = draw(1, 9), w = draw(1, 9);
    c.stages.push_back({f, in + w, in, w, std::max(f, in + w) + draw(0, 3)});
    if (stage > 0) c.links.push_back(draw(0, 4));
  }
  return c;
}

// The duration of a computation, written out from the documentation of `costs`.
ticks duration(const schedule& s, const costs& c, int rank, const action& a) {
  const auto times = [&](int chunk, int micro_batch) {
    return c.stages[std::size_t(s.stage_of(rank, chunk, micro_batch))];
  };
  const pipeline::stage_times f = times(a.chunk, a.micro_batch);
  if (a.kind == action_kind::forward) return f.forward;
  if (a.kind == action_kind::backward) return f.backward;
  if (a.kind == action_kind::backward_input) return f.backward_input;
  if (a.kind == action_kind::backward_weights) return f.backward_weights;
  const pipeline::stage_times b = times(a.backward_chunk, a.backward_micro_batch);
  const ticks hidden = std::min(f.forward + f.backward - f.overlapped, b.forward + b.backward - b.overlapped);
  return f.forward + b.backward - hidden;
}

// Longest paths by relaxation: every computation begins after the one before it on its rank and after its inputs;
// begins are raised until nothing changes. No queue, no order of events.
std::vector<std::vector<ticks>> begins_by_relaxation(const schedule& s, const costs& c) {
  using point = std::pair<int, std::size_t>;         // rank, position
  std::map<std::tuple<char, int, int>, point> made;  // F or B of (stage, micro-batch)
  for (int rank = 0; rank < s.num_ranks; ++rank) {
    for (std::size_t i = 0; i < s.actions[std::size_t(rank)].size(); ++i) {
      const action& a = s.actions[std::size_t(rank)][i];
      if (has_forward(a.kind)) made[{'F', s.stage_of(rank, a.chunk, a.micro_batch), a.micro_batch}] = {rank, i};
      if (has_backward_input(a.kind)) {
        const int chunk = backward_chunk_of(a), m = backward_micro_batch_of(a);
        made[{'B', s.stage_of(rank, chunk, m), m}] = {rank, i};
      }
    }
  }
  struct edge {
    point from, to;
    ticks after;  // from the begin of one to the begin of the other
  };
  std::vector<edge> edges;
  const auto length = [&](point p) { return duration(s, c, p.first, s.actions[std::size_t(p.first)][p.second]); };
  for (int rank = 0; rank < s.num_ranks; ++rank) {
    point before{-1, 0};
    for (std::size_t i = 0; i < s.actions[std::size_t(rank)].size(); ++i) {
      const action& a = s.actions[std::size_t(rank)][i];
      if (is_communication(a.kind)) continue;
      const point here{rank, i};
      if (before.first >= 0) edges.push_back({before, here, length(before)});
      before = here;
      const auto depend = [&](char what, int stage, int m, ticks link) {
        const point from = made.at({what, stage, m});
        if (from != here) edges.push_back({from, here, length(from) + (from.first == rank ? 0 : link)});
      };
      if (has_forward(a.kind)) {
        const int stage = s.stage_of(rank, a.chunk, a.micro_batch);
        if (stage > 0) depend('F', stage - 1, a.micro_batch, c.links[std::size_t(stage - 1)]);
      }
      if (has_backward_input(a.kind)) {
        const int m = backward_micro_batch_of(a), stage = s.stage_of(rank, backward_chunk_of(a), m);
        depend('F', stage, m, 0);
        if (stage + 1 < s.num_stages) depend('B', stage + 1, m, c.links[std::size_t(stage)]);
      }
    }
  }
  std::vector<std::vector<ticks>> begin;
  for (const auto& list : s.actions) begin.emplace_back(list.size(), 0);
  const auto at = [&](point p) -> ticks& { return begin[std::size_t(p.first)][p.second]; };
  for (bool changed = true; changed;) {
    changed = false;
    for (const edge& e : edges) {
      if (at(e.from) + e.after <= at(e.to)) continue;
      at(e.to) = at(e.from) + e.after;
      changed = true;
    }
  }
  return begin;
}

// Most activations alive at once on a rank, from the times: alive from the begin of the forward to the end of the last
// part of the backward, both ends included in a pair.
int live_by_time(const schedule& s, const pipeline::timeline& t, int rank) {
  std::map<std::pair<int, int>, std::pair<ticks, ticks>> alive;
  const auto& list = s.actions[std::size_t(rank)];
  for (std::size_t i = 0; i < list.size(); ++i) {
    const auto when = t.intervals[std::size_t(rank)][i];
    if (has_forward(list[i].kind)) alive[{list[i].chunk, list[i].micro_batch}].first = when.begin;
    if (has_backward_weights(list[i].kind)) {
      alive[{backward_chunk_of(list[i]), backward_micro_batch_of(list[i])}].second = when.end;
    }
  }
  int most = 0;
  for (const auto& [key, now] : alive) {
    most = std::max(most, int(std::count_if(alive.begin(), alive.end(), [&, begin = now.first](const auto& other) {
                      return other.second.first <= begin && begin < other.second.second;
                    })));
  }
  return most;
}

}  // namespace

TEST_CASE("every action begins when longest paths say, for random times of stages and links") {
  std::mt19937 random(7);
  for (const auto name : pipeline::schedule_names) {
    for (const int p : {2, 4, 6, 8}) {
      for (const int m : {2 * p, 3 * p + p % 4}) {
        const schedule s = pipeline::named_schedule(name, p, m);
        for (int trial = 0; trial < 4; ++trial) {
          const costs c = random_costs(s, random);
          const pipeline::timeline t = simulate(s, c);
          const auto begin = begins_by_relaxation(s, c);
          ticks makespan = 0;
          for (std::size_t rank = 0; rank < begin.size(); ++rank) {
            ticks busy = 0;
            for (std::size_t i = 0; i < begin[rank].size(); ++i) {
              if (is_communication(s.actions[rank][i].kind)) continue;
              const ticks length = duration(s, c, int(rank), s.actions[rank][i]);
              REQUIRE(t.intervals[rank][i] == pipeline::interval{begin[rank][i], begin[rank][i] + length});
              busy += length;
              makespan = std::max(makespan, begin[rank][i] + length);
            }
            CHECK(t.busy[rank] == busy);
            CHECK(t.live_activations[rank] == live_by_time(s, t, int(rank)));
          }
          CHECK(t.makespan == makespan);
          for (std::size_t rank = 0; rank < begin.size(); ++rank) CHECK(t.idle[rank] == makespan - t.busy[rank]);
        }
      }
    }
  }
}

TEST_CASE("waiting at batches is never faster, keeps the order, and each message arrives a latency after both came") {
  std::mt19937 random(11);
  for (const auto name : pipeline::schedule_names) {
    for (const int p : {2, 4, 8}) {
      const schedule s = pipeline::named_schedule(name, p, 2 * p + 2);
      for (int trial = 0; trial < 6; ++trial) {
        const costs c = random_costs(s, random);
        const pipeline::timeline slow = simulate(s, c, pipeline::messages::rendezvous), fast = simulate(s, c);
        CHECK(slow.makespan >= fast.makespan);
        // Batches, by (rank, position) of each message; the k-th message on a link is the same on both sides.
        std::map<std::pair<int, int>, std::vector<std::pair<int, std::size_t>>> sent, received;
        for (int rank = 0; rank < s.num_ranks; ++rank) {
          const auto& list = s.actions[std::size_t(rank)];
          const auto& when = slow.intervals[std::size_t(rank)];
          for (std::size_t i = 0; i < list.size(); ++i) {
            if (i > 0) {
              const bool same_batch = is_communication(list[i].kind) && is_communication(list[i - 1].kind);
              if (same_batch) {
                CHECK(when[i] == when[i - 1]);
              } else {
                // A rank does not wait elsewhere than in batches.
                REQUIRE(when[i].begin == when[i - 1].end);
              }
            }
            if (is_send(list[i].kind)) sent[{rank, s.peer_of(rank, list[i])}].push_back({rank, i});
            if (is_receive(list[i].kind)) received[{s.peer_of(rank, list[i]), rank}].push_back({rank, i});
          }
        }
        std::map<std::pair<int, ticks>, ticks> batch_end;  // of (rank, begin): the last arrival
        std::map<std::pair<int, ticks>, ticks> batch_seen;
        for (const auto& [link, messages] : sent) {
          REQUIRE(received[link].size() == messages.size());
          for (std::size_t k = 0; k < messages.size(); ++k) {
            const auto [a, i] = messages[k];
            const auto [b, j] = received[link][k];
            const auto x = slow.intervals[std::size_t(a)][i], y = slow.intervals[std::size_t(b)][j];
            const action& receive = s.actions[std::size_t(b)][j];
            const int stage = s.stage_of(b, receive.chunk);
            const ticks gap = c.links[std::size_t(receive.kind == action_kind::receive_forward ? stage - 1 : stage)];
            const ticks arrival = std::max(x.begin, y.begin) + gap;
            for (const auto& [rank, batch] : {std::pair{a, x}, std::pair{b, y}}) {
              batch_end[{rank, batch.begin}] = std::max(batch_end[{rank, batch.begin}], arrival);
              batch_seen[{rank, batch.begin}] = batch.end;
            }
          }
        }
        CHECK(batch_end == batch_seen);
      }
    }
  }
}

TEST_CASE("two ranks by hand") {
  // F = 2, B = 3, latency 1, two micro-batches, 1F1B. Buffered:
  // rank 0: F0 0-2, F1 2-4, B0 9-12, B1 15-18
  // rank 1: F0 3-5, B0 5-8, F1 8-10, B1 10-13 -> gradient 1 is at rank 0 at 14
  const schedule s = pipeline::one_f_one_b(2, 2);
  const costs c{.stages = {{2, 3, 1, 2, 5}}, .latency = 1};
  const pipeline::timeline t = simulate(s, c);
  std::vector<pipeline::interval> computed;
  for (std::size_t i = 0; i < s.actions[0].size(); ++i) {
    if (!is_communication(s.actions[0][i].kind)) computed.push_back(t.intervals[0][i]);
  }
  CHECK(computed == std::vector<pipeline::interval>{{0, 2}, {2, 4}, {9, 12}, {14, 17}});
  CHECK(t.makespan == 17);
  CHECK(t.idle == std::vector<ticks>{7, 7});
  CHECK(t.live_activations == std::vector<int>{2, 1});
  // Rendezvous: rank 0 [sF0] 2-3, F1 3-5, [sF1 rB0] 5-..; rank 1 [rF0] 0-3, F0 3-5, [rF1] 5-6, B0 6-9, [sB0] 9-10;
  // rank 0 B0 10-13, [rB1] 13-..; rank 1 F1 10-12, B1 12-15, [sB1] 15-16; rank 0 B1 16-19.
  const pipeline::timeline r = simulate(s, c, pipeline::messages::rendezvous);
  CHECK(r.makespan == 19);
  CHECK(r.intervals[0][find_if(s.actions[0].begin(), s.actions[0].end(),
                               [](const action& a) { return a.kind == action_kind::receive_backward; }) -
                       s.actions[0].begin()] == pipeline::interval{5, 10});
}

TEST_CASE("one stage alone never idles, and a pipeline's times may differ by stage") {
  for (const int m : {1, 5}) {
    CHECK(simulate(pipeline::one_f_one_b(1, m), {}).max_idle() == 0);
    CHECK(simulate(pipeline::zb1p(1, m), {}).max_idle() == 0);
  }
  CHECK(simulate(pipeline::dualpipev(1, 2), {}).max_idle() == 0);
  // The slowest stage sets the pace: it works without a gap once it has begun.
  const schedule s = pipeline::one_f_one_b(4, 32);
  const pipeline::timeline t =
      simulate(s, {.stages = {{1, 2, 1, 1, 3}, {2, 4, 2, 2, 6}, {1, 2, 1, 1, 3}, {1, 2, 1, 1, 3}}});
  CHECK(t.busy == std::vector<ticks>{96, 192, 96, 96});
  CHECK(t.max_idle() == t.idle[0]);
  CHECK(t.idle[1] < 12);
}

TEST_CASE("counts of what a rank keeps are those of a list written by hand") {
  using k = action_kind;
  schedule s = pipeline::one_f_one_b(2, 2);
  // Rank 1: both inputs come early, both backwards are split, both weight parts are last.
  s.actions[1] = {{k::receive_forward, 0, 0}, {k::receive_forward, 0, 1}, {k::forward, 0, 0},
                  {k::forward, 0, 1},         {k::backward_input, 0, 0},  {k::backward_input, 0, 1},
                  {k::send_backward, 0, 0},   {k::send_backward, 0, 1},   {k::backward_weights, 0, 0},
                  {k::backward_weights, 0, 1}};
  CHECK(peak_memory(s)[1] == pipeline::memory_peak{.activations = 2,
                                                   .undifferentiated = 2,
                                                   .deferred = 2,
                                                   .inputs = 2,
                                                   .outputs = 0,
                                                   .gradients = 0,
                                                   .input_gradients = 2});
  CHECK(peak_memory(s)[0] == pipeline::memory_peak{.activations = 2,
                                                   .undifferentiated = 2,
                                                   .deferred = 0,
                                                   .inputs = 0,
                                                   .outputs = 1,
                                                   .gradients = 1,
                                                   .input_gradients = 0});
  // In a pair, the new activation is there before the old one goes; what is handed over waits like what is received.
  const auto v = peak_memory(pipeline::dualpipev(1, 4))[0];
  CHECK(v.activations == 3);
  CHECK(v.outputs == 0);
  CHECK(v.inputs == 1);
  CHECK(v.gradients == 1);
}

TEST_CASE("costs that do not fit are refused") {
  const schedule s = pipeline::one_f_one_b(4, 4);
  const auto with = [&](const costs& c) { pipeline::simulate(s, c); };
  CHECK_THROWS_WITH_AS(with({.stages = {{}, {}}}), doctest::Contains("has 2 entries; right is 1 (for all stages) or 4"),
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(with({.stages = {}}), doctest::Contains("has 0 entries"), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(with({.links = {1, 1}}), doctest::Contains("or 3, one between"), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(with({.latency = -1}), doctest::Contains("latency = -1 is negative"), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(with({.links = {1, 1, -3}}), doctest::Contains("-3, a negative time"), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(with({.stages = {{1, 2, 1, -1, 3}}}), doctest::Contains("W = -1"), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(with({.stages = {{1, 2, 1, 1, 1}}}), doctest::Contains("F&B = 1"), ts::invalid_argument);
}
