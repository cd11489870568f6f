// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/pipeline/schedules.hpp>
#include <tessera/pipeline/validate.hpp>

#include "../support/messages.hpp"

namespace ts = tessera;
namespace pipeline = tessera::pipeline;
using pipeline::action;
using pipeline::action_kind;
using pipeline::schedule;
using tessera_test::contains;
using tessera_test::message_of;

namespace {

// A rank's computations as one line.
std::string line(const schedule& s, int rank) {
  std::string text;
  for (const action& a : s.actions[static_cast<std::size_t>(rank)]) {
    if (!pipeline::is_communication(a.kind)) text += (text.empty() ? "" : " ") + to_string(a);
  }
  return text;
}

// Plays a schedule with the strictest messages there are: a rank stops at every single send and receive until its
// partner stands at the other half of it. Returns whether all lists end; checks by itself that each stage of each
// micro-batch is computed once and only with what is there.
bool plays_message_by_message(const schedule& s) {
  enum { input, forward, gradient, backward, weights, num_marks };
  std::vector<int> marks(static_cast<std::size_t>(s.num_stages * s.num_micro_batches * num_marks), 0);
  const auto mark = [&](int stage, int micro_batch, int what) -> int& {
    return marks[static_cast<std::size_t>((stage * s.num_micro_batches + micro_batch) * num_marks + what)];
  };
  const auto stage_at = [&](int rank, int chunk, int micro_batch) {
    for (int stage = 0; stage < s.num_stages; ++stage) {
      const pipeline::place p = s.routes[std::size_t(s.route_of[std::size_t(micro_batch)])][std::size_t(stage)];
      if (p.rank == rank && p.chunk == chunk) return stage;
    }
    return -1;
  };
  const auto rank_at = [&](int stage, int micro_batch) {
    return s.routes[std::size_t(s.route_of[std::size_t(micro_batch)])][std::size_t(stage)].rank;
  };
  bool right = true;
  const auto do_forward = [&](int rank, int stage, int m) {
    right = right && stage >= 0 && (stage == 0 || mark(stage, m, input) == 1) && mark(stage, m, forward)++ == 0;
    if (right && stage + 1 < s.num_stages && rank_at(stage + 1, m) == rank) ++mark(stage + 1, m, input);
  };
  const auto do_backward = [&](int rank, int stage, int m, bool whole) {
    right = right && stage >= 0 && mark(stage, m, forward) == 1 &&
            (stage + 1 == s.num_stages || mark(stage, m, gradient) == 1) && mark(stage, m, backward)++ == 0;
    if (right && whole) ++mark(stage, m, weights);
    if (right && stage > 0 && rank_at(stage - 1, m) == rank) ++mark(stage - 1, m, gradient);
  };
  std::vector<std::size_t> next(s.actions.size(), 0);
  for (bool moved = true; moved && right;) {
    moved = false;
    for (int rank = 0; rank < s.num_ranks; ++rank) {
      const auto& list = s.actions[std::size_t(rank)];
      for (std::size_t& i = next[std::size_t(rank)]; i < list.size() && right; ++i, moved = true) {
        const action& a = list[i];
        const int stage = stage_at(rank, a.chunk, a.micro_batch);
        if (a.kind == action_kind::forward) {
          do_forward(rank, stage, a.micro_batch);
        } else if (a.kind == action_kind::backward || a.kind == action_kind::backward_input) {
          do_backward(rank, stage, a.micro_batch, a.kind == action_kind::backward);
        } else if (a.kind == action_kind::backward_weights) {
          right = right && mark(stage, a.micro_batch, backward) == 1 && mark(stage, a.micro_batch, weights)++ == 0;
        } else if (a.kind == action_kind::overlapped) {
          do_forward(rank, stage, a.micro_batch);
          do_backward(rank, stage_at(rank, a.backward_chunk, a.backward_micro_batch), a.backward_micro_batch, true);
        } else {
          const bool ahead = a.kind == action_kind::send_forward || a.kind == action_kind::receive_forward;
          const bool sends = a.kind == action_kind::send_forward || a.kind == action_kind::send_backward;
          const int other = stage + (ahead == sends ? 1 : -1);
          if (!sends) break;  // the sender moves both
          const int peer = rank_at(other, a.micro_batch);
          const auto& theirs = s.actions[std::size_t(peer)];
          std::size_t& j = next[std::size_t(peer)];
          if (j == theirs.size()) break;
          const action& b = theirs[j];
          const action_kind wanted = ahead ? action_kind::receive_forward : action_kind::receive_backward;
          if (b.kind != wanted || b.micro_batch != a.micro_batch || stage_at(peer, b.chunk, b.micro_batch) != other) {
            break;
          }
          right = right && mark(stage, a.micro_batch, ahead ? forward : backward) == 1;
          ++mark(other, a.micro_batch, ahead ? input : gradient);
          ++j;
        }
      }
    }
  }
  for (std::size_t rank = 0; rank < next.size(); ++rank) right = right && next[rank] == s.actions[rank].size();
  for (int stage = 0; stage < s.num_stages; ++stage) {
    for (int m = 0; m < s.num_micro_batches; ++m) {
      right = right && mark(stage, m, forward) == 1 && mark(stage, m, backward) == 1 && mark(stage, m, weights) == 1;
    }
  }
  return right;
}

// A schedule of a user's own, not by the library: GPipe, or with several chunks the same over `chunks * ranks` stages
// that go around the ranks.
schedule all_forwards_first(int num_ranks, int num_micro_batches, int chunks = 1) {
  schedule s{.name = "GPipe",
             .num_ranks = num_ranks,
             .num_stages = num_ranks * chunks,
             .num_micro_batches = num_micro_batches,
             .num_chunks = chunks,
             .routes = {{}},
             .route_of = std::vector<int>(std::size_t(num_micro_batches), 0),
             .max_live_activations = num_micro_batches * chunks};
  std::vector<action> list;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    for (int rank = 0; rank < num_ranks; ++rank) s.routes[0].push_back({rank, chunk});
    for (int m = 0; m < num_micro_batches; ++m) list.push_back({action_kind::forward, chunk, m});
  }
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    for (int m = 0; m < num_micro_batches; ++m) list.push_back({action_kind::backward, chunk, m});
  }
  s.actions.assign(std::size_t(num_ranks), list);
  return pipeline::with_communication(s);
}

// What is wrong with a schedule, "" if nothing.
std::string refusal(const schedule& s) {
  return message_of([&] { pipeline::validate(s); });
}

std::size_t find(const schedule& s, int rank, const char* text) {
  const auto& list = s.actions[std::size_t(rank)];
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (to_string(list[i]) == text) return i;
  }
  FAIL("no ", text, " on rank ", rank);
  return 0;
}

}  // namespace

TEST_CASE("every schedule of up to 16 stages is complete, in order, within its memory, and never waits forever") {
  int made = 0;
  const auto check = [&](const schedule& s) {
    ++made;
    REQUIRE_MESSAGE(refusal(s) == "", s.name, " ", s.num_stages, " ", s.num_micro_batches);
    REQUIRE_MESSAGE(plays_message_by_message(s), s.name, " ", s.num_stages, " ", s.num_micro_batches);
  };
  for (int stages = 1; stages <= 16; ++stages) {
    for (int m = 1; m <= 2 * stages + 6; m += m <= stages ? 1 : 3) {
      check(pipeline::one_f_one_b(stages, m));
      check(pipeline::zb1p(stages, m));
    }
    if (stages % 2 == 1) continue;
    for (int m = 2 * stages; m <= 4 * stages + 4; m += 2) check(pipeline::dualpipe(stages, m));
    for (int m = stages; m <= 3 * stages; ++m) check(pipeline::dualpipev(stages / 2, m));
  }
  CHECK(made > 500);
}

TEST_CASE("1F1B and ZB1P are the lists of their papers") {
  const schedule s = pipeline::one_f_one_b(4, 6);
  CHECK(line(s, 0) == "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5");
  CHECK(line(s, 2) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 B5");
  CHECK(line(s, 3) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5");
  // ZB-H1 with four ranks, figure 2 of "Zero Bubble Pipeline Parallelism", first and last row.
  const schedule z = pipeline::zb1p(4, 8);
  CHECK(line(z, 0) == "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 F6 I3 W3 F7 I4 W4 I5 W5 I6 W6 I7 W7");
  CHECK(line(z, 3) == "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7");
}

TEST_CASE("DualPipe is figure 5 of the DeepSeek-V3 report") {
  // 8 ranks, 20 micro-batches. The figure leaves out the numbers of the other direction; they count on from 10.
  const schedule s = pipeline::dualpipe(8, 20);
  CHECK(line(s, 0) ==
        "F0 F1 F2 F3 F4 F5 F6 F10' I10' W10' F11' I11' W11' F12' I12' W12' F13' F7&B13' F14'&B0 F8&B14' F15'&B1 "
        "F9&B15' F16'&B2 B16' F17'&B3 B17' F18'&B4 B18' F19'&B5 B19' I6 W6 I7 W7 I8 W8 I9 W9");
  CHECK(line(s, 3) ==
        "F0 F10' F1 F11' F2 F12' F3 F13' F4 B10' F14'&B0 F5&B11' F15'&B1 F6&B12' F16'&B2 F7&B13' F17'&B3 F8&B14' "
        "F18'&B4 F9&B15' F19'&B5 B16' B6 B17' B7 I18' I8 I19' I9 W18' W8 W19' W9");
  // Ranks mirror each other with the two directions exchanged.
  for (int rank = 0; rank < 4; ++rank) {
    for (std::size_t i = 0; i < 3; ++i) {
      const auto computation = pipeline::computation_only(s);
      const action a = computation.actions[std::size_t(rank)][i], b = computation.actions[std::size_t(7 - rank)][i];
      CHECK(a.chunk == 1 - b.chunk);
      CHECK(a.micro_batch % 10 == b.micro_batch % 10);
    }
  }
}

TEST_CASE("DualPipe and DualPipeV repeat their eight steps as often as the published code") {
  const auto expect = [](const schedule& s, int rank, int position, int depth, int lane) {
    std::map<action_kind, int> count;
    for (const action& a : s.actions[std::size_t(rank)]) ++count[a.kind];
    const int inwards = depth - position - 1, main = lane - 2 * depth + position + 1;
    const int alone = position == depth - 1 ? 1 : 0;  // the pair that the innermost ranks do in a row
    CHECK(count[action_kind::overlapped] == 2 * main + inwards - alone);
    CHECK(count[action_kind::forward] == 2 * inwards + 2 * (position + 1) + inwards + alone);
    // Step 3, the second half of step 6, step 7; as many weight parts.
    const int split = inwards + (position + 1) + inwards;
    CHECK(count[action_kind::backward_input] == split);
    CHECK(count[action_kind::backward_weights] == split);
    CHECK(count[action_kind::backward] == 2 * lane - split - (2 * main + inwards - alone));
  };
  for (const int ranks : {2, 4, 6, 8, 16}) {
    for (const int lane : {ranks, ranks + 1, 2 * ranks + 3}) {
      const schedule s = pipeline::dualpipe(ranks, 2 * lane);
      for (int rank = 0; rank < ranks; ++rank) expect(s, rank, std::min(rank, ranks - 1 - rank), ranks / 2, lane);
      const schedule v = pipeline::dualpipev(ranks / 2, lane);
      for (int rank = 0; rank < ranks / 2; ++rank) expect(v, rank, rank, ranks / 2, lane);
    }
  }
}

TEST_CASE("stages lie where the papers put them, first and last on one rank") {
  const schedule s = pipeline::dualpipe(4, 8);
  CHECK(s.stage_of(1, 0) == 1);
  CHECK(s.stage_of(1, 1) == 2);
  CHECK(s.stage_of(1, 1, 3) == -1);  // goes the other way
  CHECK(s.stage_of(1, 1, 4) == 2);
  CHECK(s.rank_of(0, 0) == 0);
  CHECK(s.rank_of(0, 7) == 3);
  for (const int m : {0, 7}) CHECK(s.rank_of(0, m) != s.rank_of(3, m));
  CHECK((s.stage_of(0, 0) == 0 && s.stage_of(0, 1) == 3 && s.stage_of(3, 0) == 3 && s.stage_of(3, 1) == 0));
  CHECK(s.peer_of(0, {action_kind::send_forward, 0, 0}) == 1);
  CHECK(s.peer_of(3, {action_kind::send_forward, 1, 4}) == 2);
  CHECK(s.peer_of(2, {action_kind::receive_backward, 1, 4}) == 1);
  CHECK(s.peer_of(0, {action_kind::receive_forward, 0, 0}) == -1);

  const schedule v = pipeline::dualpipev(3, 6);
  CHECK((v.stage_of(0, 0) == 0 && v.stage_of(0, 1) == 5 && v.stage_of(2, 0) == 2 && v.stage_of(2, 1) == 3));
  CHECK(v.peer_of(2, {action_kind::send_forward, 1, 0}) == 1);
  for (const action& a : v.actions[2]) {
    const bool hands_over = (a.kind == action_kind::send_forward && a.chunk == 0) ||
                            (a.kind == action_kind::receive_forward && a.chunk == 1);
    CHECK(!hands_over);
  }
}

TEST_CASE("sizes that a schedule does not have are refused with the rule") {
  CHECK_THROWS_WITH_AS(pipeline::one_f_one_b(0, 4), "1F1B: num_ranks = 0; right is at least 1", ts::invalid_argument);
  CHECK_THROWS_WITH_AS(pipeline::zb1p(4, 0), "ZB1P: num_micro_batches = 0; right is at least 1", ts::invalid_argument);
  CHECK_THROWS_WITH_AS(pipeline::dualpipe(7, 20),
                       "DualPipe: num_ranks = 7; right is an even number, so that the two directions meet",
                       ts::invalid_argument);
  for (const int m : {14, 17, 0, -2}) {
    CHECK_THROWS_WITH_AS(pipeline::dualpipe(8, m), doctest::Contains("at least 2 * num_ranks = 16"),
                         ts::invalid_argument);
  }
  CHECK_THROWS_AS(pipeline::dualpipe(0, 4), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(pipeline::dualpipev(4, 7),
                       "DualPipeV: num_micro_batches = 7 on 4 ranks; right is at least 2 * num_ranks = 8",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(pipeline::named_schedule("dualpipev", 5, 20), doctest::Contains("num_stages = 5"),
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(pipeline::named_schedule("1f1B", 4, 20), doctest::Contains("no schedule '1f1B'"),
                       ts::invalid_argument);
  for (const auto name : pipeline::schedule_names) CHECK(pipeline::named_schedule(name, 4, 8).num_stages == 4);
}

TEST_CASE("a user's schedule gets its messages and the same proof") {
  for (const int chunks : {1, 2, 3}) {
    for (int ranks = 1; ranks <= 5; ++ranks) {
      for (int m = 1; m <= 7; ++m) {
        const schedule s = all_forwards_first(ranks, m, chunks);
        CHECK(refusal(s) == "");
        CHECK(plays_message_by_message(s));
      }
    }
  }
  // Messages planned for other times than the default are as right.
  for (const auto name : pipeline::schedule_names) {
    const schedule s = pipeline::with_communication(pipeline::named_schedule(name, 8, 20),
                                                    {.stages = {{7, 9, 4, 5, 11}}, .latency = 3});
    CHECK(refusal(s) == "");
    CHECK(plays_message_by_message(s));
  }
  CHECK_THROWS_WITH_AS(pipeline::with_communication(pipeline::one_f_one_b(2, 2), {.stages = {{0, 2, 1, 1, 2}}}),
                       doctest::Contains("all must be positive"), ts::invalid_argument);
  schedule never = pipeline::computation_only(pipeline::one_f_one_b(2, 2));
  std::swap(never.actions[0][0], never.actions[0][2]);
  CHECK_THROWS_WITH_AS(pipeline::with_communication(never), doctest::Contains("waits for its forward"),
                       ts::invalid_argument);
}

TEST_CASE("a schedule with a fault is refused by name of the fault") {
  const schedule right = pipeline::one_f_one_b(3, 4);
  const auto broken = [&](auto&& change) {
    schedule s = right;
    change(s);
    return refusal(s);
  };
  const auto erase = [](schedule& s, int rank, const char* what) {
    auto& list = s.actions[std::size_t(rank)];
    list.erase(list.begin() + static_cast<std::ptrdiff_t>(find(s, rank, what)));
  };
  const auto exchange = [](schedule& s, int rank, const char* a, const char* b) {
    std::swap(s.actions[std::size_t(rank)][find(s, rank, a)], s.actions[std::size_t(rank)][find(s, rank, b)]);
  };
  const auto insert = [](schedule& s, int rank, const char* before, action a) {
    auto& list = s.actions[std::size_t(rank)];
    list.insert(list.begin() + static_cast<std::ptrdiff_t>(find(s, rank, before)), a);
  };
  CHECK(broken([](schedule&) {}) == "");

  CHECK(contains(broken([&](schedule& s) { erase(s, 2, "B3"); }), "sends a gradient that has not been computed"));
  CHECK(contains(broken([&](schedule& s) { erase(s, 0, "B3"); }), "micro-batch 3 has no backward at stage 0"));
  CHECK(contains(broken([&](schedule& s) { s.actions[0][find(s, 0, "B3")].kind = action_kind::backward_input; }),
                 "micro-batch 3 has no weight part at stage 0 (rank 0, chunk 0)"));
  CHECK(contains(broken([&](schedule& s) {
                   insert(s, 0, "B3", {action_kind::forward, 0, 1});
                 }),
                 "computes this forward a second time"));
  CHECK(contains(broken([&](schedule& s) {
                   s.actions[0].push_back({action_kind::backward, 0, 1});
                 }),
                 "computes this backward a second time"));
  CHECK(contains(broken([&](schedule& s) {
                   s.actions[0].push_back({action_kind::backward_weights, 0, 1});
                 }),
                 "is not preceded by its input part"));
  CHECK(contains(broken([&](schedule& s) { erase(s, 1, "rF2"); }), "has not received its input"));
  CHECK(contains(broken([&](schedule& s) { erase(s, 1, "rB2"); }), "has not received the gradient of its output"));
  CHECK(contains(broken([&](schedule& s) { exchange(s, 1, "rF2", "F2"); }), "has not received its input"));
  CHECK(contains(broken([&](schedule& s) { exchange(s, 2, "B0", "F0"); }), "is a backward before the forward"));
  CHECK(contains(broken([&](schedule& s) {
                   insert(s, 0, "F1", {action_kind::send_forward, 0, 1});
                 }),
                 "sends an output that has not been computed"));
  CHECK(contains(broken([&](schedule& s) {
                   insert(s, 0, "B3", {action_kind::send_forward, 0, 1});
                 }),
                 "sends this output a second time"));
  CHECK(contains(broken([&](schedule& s) {
                   insert(s, 1, "B3", {action_kind::receive_forward, 0, 1});
                 }),
                 "receives this input a second time"));
  CHECK(contains(broken([&](schedule& s) { erase(s, 0, "sF3"); }), "cannot go on"));
  CHECK(contains(broken([&](schedule& s) { erase(s, 0, "rB3"), erase(s, 0, "B3"); }), "no backward"));
  CHECK(contains(broken([&](schedule& s) { s.max_live_activations = 2; }),
                 "rank 0 keeps 3 activations at once, more than max_live_activations = 2"));

  // Things that do not exist.
  CHECK(contains(broken([&](schedule& s) { s.actions[0][0].micro_batch = 4; }), "names micro-batch 4 of 4"));
  CHECK(contains(broken([&](schedule& s) { s.actions[0][0].chunk = 1; }), "does not pass chunk 1"));
  CHECK(contains(broken([&](schedule& s) {
                   s.actions[0].push_back({action_kind::send_backward, 0, 0});
                 }),
                 "has no other side"));
  CHECK(contains(broken([&](schedule& s) { s.actions.pop_back(); }), "2 lists of actions for 3 ranks"));
  CHECK(contains(broken([&](schedule& s) { s.route_of[2] = 1; }), "route_of names route 1 of 1"));
  CHECK(contains(broken([&](schedule& s) { s.routes[0][1].rank = 0; }), "is stage 0 and stage 1"));
  CHECK(contains(broken([&](schedule& s) { s.routes[0][1].rank = 3; }), "there are 3 ranks"));
  CHECK(contains(broken([&](schedule& s) { s.num_chunks = 0; }), "all must be at least 1"));
  const schedule v = [] {
    schedule s = pipeline::dualpipev(2, 4);
    s.actions[1].push_back({action_kind::send_forward, 0, 0});
    return s;
  }();
  CHECK(contains(refusal(v), "between stages of one rank"));
}

TEST_CASE("messages in another order than they are awaited in are refused, and so is waiting in a circle") {
  // Two ranks, two micro-batches; the receiver takes them in the other order.
  schedule s = all_forwards_first(2, 2);
  using k = action_kind;
  s.actions = {{{k::forward, 0, 0},
                {k::send_forward, 0, 0},
                {k::forward, 0, 1},
                {k::send_forward, 0, 1},
                {k::receive_backward, 0, 0},
                {k::backward, 0, 0},
                {k::receive_backward, 0, 1},
                {k::backward, 0, 1}},
               {{k::receive_forward, 0, 1},
                {k::forward, 0, 1},
                {k::receive_forward, 0, 0},
                {k::forward, 0, 0},
                {k::backward, 0, 0},
                {k::send_backward, 0, 0},
                {k::backward, 0, 1},
                {k::send_backward, 0, 1}}};
  CHECK(contains(refusal(s), "the k-th send between two ranks meets the k-th receive"));

  // Both ranks of DualPipe send before they receive: in batches of their own, each waits for the other's receive.
  schedule circle = pipeline::dualpipe(2, 4);
  CHECK(refusal(circle) == "");
  circle.actions = {{{k::forward, 0, 0}, {k::send_forward, 0, 0}, {k::forward, 0, 1}, {k::receive_forward, 1, 2}},
                    {{k::forward, 1, 2}, {k::send_forward, 1, 2}, {k::forward, 1, 3}, {k::receive_forward, 0, 0}}};
  CHECK_THROWS_WITH_AS(pipeline::simulate(circle, {}, pipeline::messages::rendezvous),
                       "schedule 'DualPipe' cannot go on: rank 0, action 1 (sF0) waits for rank 1; rank 1, action 1 "
                       "(sF2') waits for rank 0",
                       ts::invalid_argument);
  // As one batch they meet.
  circle.actions = {{{k::forward, 0, 0}, {k::send_forward, 0, 0}, {k::receive_forward, 1, 2}},
                    {{k::forward, 1, 2}, {k::send_forward, 1, 2}, {k::receive_forward, 0, 0}}};
  CHECK_NOTHROW(pipeline::simulate(circle, {}, pipeline::messages::rendezvous));
}

TEST_CASE("schedules are plain values that print") {
  const schedule s = pipeline::one_f_one_b(2, 2);
  CHECK(s == pipeline::one_f_one_b(2, 2));
  CHECK(!(s == pipeline::one_f_one_b(2, 3)));
  std::ostringstream out;
  out << s;
  CHECK(out.str() ==
        "1F1B: 2 ranks, 2 stages, 2 micro-batches\n"
        "rank 0: F0 [sF0] F1 [sF1 rB0] B0 [rB1] B1\n"
        "rank 1: [rF0] F0 [rF1] B0 [sB0] F1 B1 [sB1]\n");
  CHECK(to_string(s, pipeline::detail_level::computation) ==
        "1F1B: 2 ranks, 2 stages, 2 micro-batches\nrank 0: F0 F1 B0 B1\nrank 1: F0 B0 F1 B1\n");
  CHECK(to_string(action{action_kind::overlapped, 1, 4, 0, 2}) == "F4'&B2");
  CHECK(pipeline::batch_end(s.actions[0], 3) == 5);
  CHECK(pipeline::batch_end(s.actions[0], 0) == 0);
}
