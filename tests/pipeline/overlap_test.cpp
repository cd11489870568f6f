// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The order of an overlapped pair, and lanes that run it: who waits for whom, what is hidden, and what happens when a
// phase throws.

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <tessera/pipeline/overlap.hpp>

namespace {

namespace ts = tessera;
namespace pl = tessera::pipeline;
using pl::phase;
using clock_type = std::chrono::steady_clock;
using std::chrono::microseconds;

// What each phase needs, written out: (phase, layer) pairs that must come before.
std::vector<std::pair<phase, int>> needs(phase p, int layer, int backward_layers) {
  switch (p) {
    case phase::forward_attention:
      if (layer == 0) return {};
      return {{phase::forward_combine, layer - 1}};
    case phase::forward_dispatch:
      return {{phase::forward_attention, layer}};
    case phase::forward_mlp:
      return {{phase::forward_dispatch, layer}};
    case phase::forward_combine:
      return {{phase::forward_mlp, layer}};
    case phase::backward_combine:
      if (layer + 1 == backward_layers) return {};
      return {{phase::backward_attention_input, layer + 1}};
    case phase::backward_mlp_input:
      return {{phase::backward_combine, layer}};
    case phase::backward_mlp_weights:
      return {{phase::backward_mlp_input, layer}};
    case phase::backward_dispatch:
      return {{phase::backward_mlp_input, layer}};
    case phase::backward_attention_input:
      return {{phase::backward_dispatch, layer}};
    case phase::backward_attention_weights:
      return {{phase::backward_attention_input, layer}};
  }
  return {};
}

constexpr std::array<std::int64_t, pl::num_phases> equal_times{10, 10, 10, 10, 10, 10, 10, 10, 10, 10};

// A chunk whose phases take a while and write down when; dependencies are checked by what is written down.
struct recording_chunk {
  using element = float;
  struct event {
    phase what;
    int layer;
    bool computes_here;  // on the thread that called
    clock_type::time_point begin, end;
  };

  int layers = 2;
  microseconds duration{0};
  phase throwing = phase::forward_attention;
  int throwing_layer = -1;
  bool throw_int = false;
  std::thread::id caller = std::this_thread::get_id();
  std::mutex mutex;
  std::vector<event> events;
  std::vector<std::string> failures;

  int num_layers() const { return layers; }
  void fail(const std::string& text) {
    const std::lock_guard lock(mutex);
    failures.push_back(text);
  }
  void record(phase what, int layer) {
    const auto begin = clock_type::now();
    if (duration.count() > 0) std::this_thread::sleep_for(duration);
    if (what == throwing && layer == throwing_layer) {
      if (throw_int) throw 7;
      throw std::runtime_error("link down");
    }
    const std::lock_guard lock(mutex);
    events.push_back({what, layer, std::this_thread::get_id() == caller, begin, clock_type::now()});
  }
  void forward_attention(const auto& call) { record(phase::forward_attention, call.layer); }
  void forward_dispatch(const auto& call) { record(phase::forward_dispatch, call.layer); }
  void forward_mlp(const auto& call) { record(phase::forward_mlp, call.layer); }
  void forward_combine(const auto& call) { record(phase::forward_combine, call.layer); }
  void backward_combine(const auto& call) { record(phase::backward_combine, call.layer); }
  void backward_mlp_input(const auto& call) { record(phase::backward_mlp_input, call.layer); }
  void backward_mlp_weights(const auto& call) { record(phase::backward_mlp_weights, call.layer); }
  void backward_dispatch(const auto& call) { record(phase::backward_dispatch, call.layer); }
  void backward_attention_input(const auto& call) { record(phase::backward_attention_input, call.layer); }
  void backward_attention_weights(const auto& call) { record(phase::backward_attention_weights, call.layer); }
};

template <class Lanes>
void run_pair(recording_chunk& forward, recording_chunk& backward, Lanes& lanes) {
  pl::overlap_stage<recording_chunk, Lanes> f(forward, lanes), b(backward, lanes);
  f.overlapped({}, {.micro_batch = 1}, {}, {}, b, {.micro_batch = 0}, {}, {}, {});
}

}  // namespace

TEST_CASE("one layer gives the two lanes of DeepSeek-V3's Figure 4, after the first attention and the first combine") {
  std::ostringstream text;
  text << pl::make_overlap_order(2, 2);
  CHECK(text.str() ==
        "compute:       ATTN(F)0 MLP(B)1 MLP(W)1 MLP(F)0 ATTN(B)1 ATTN(W)1 ATTN(F)1 MLP(B)0 MLP(W)0 MLP(F)1 ATTN(B)0 "
        "ATTN(W)0\n"
        "communication: COMBINE(B)1 DISPATCH(F)0 DISPATCH(B)1 COMBINE(F)0 COMBINE(B)0 DISPATCH(F)1 DISPATCH(B)0 "
        "COMBINE(F)1\n");
}

TEST_CASE("gradients of weights can hide both combines") {
  std::ostringstream text;
  text << pl::make_overlap_order(2, 2, pl::overlap_style::weights);
  CHECK(text.str() ==
        "compute:       ATTN(F)0 MLP(B)1 MLP(F)0 ATTN(B)1 MLP(W)1 ATTN(W)1 ATTN(F)1 MLP(B)0 MLP(F)1 ATTN(B)0 MLP(W)0 "
        "ATTN(W)0\n"
        "communication: COMBINE(B)1 DISPATCH(F)0 DISPATCH(B)1 COMBINE(F)0 COMBINE(B)0 DISPATCH(F)1 DISPATCH(B)0 "
        "COMBINE(F)1\n");

  // Layers of experts alone: 1, 1 and 2 units of the products forward, for the gradients of inputs and of weights.
  std::array<std::int64_t, pl::num_phases> times{};
  for (const phase p : {phase::forward_mlp, phase::backward_mlp_input, phase::backward_mlp_weights})
    times[static_cast<std::size_t>(p)] = 30;
  for (const phase p :
       {phase::forward_dispatch, phase::forward_combine, phase::backward_combine, phase::backward_dispatch})
    times[static_cast<std::size_t>(p)] = 10;
  for (const int layers : {1, 2, 8}) {
    // The first COMBINE(B) is under nothing; of the others, Figure 4 hides the dispatches alone.
    const auto weights = pl::make_overlap_order(layers, layers, pl::overlap_style::weights);
    CHECK(pl::estimate_overlap(weights, times).time == 90 * layers + 10);
    CHECK(pl::estimate_overlap(pl::make_overlap_order(layers, layers), times).time == 90 * layers + 20 * layers);
  }
}

TEST_CASE("an order says how much communication begins with which computation") {
  const auto text_of = [](pl::overlap_style style) {
    std::string text;
    for (const pl::overlap_node& node : pl::make_overlap_order(2, 2, style).nodes) {
      if (node.communication > 0)
        text += pl::symbol_of(node.what) + std::to_string(node.layer) + ":" + std::to_string(node.communication) +
                (node.sends ? " sends, " : " sums, ");
    }
    return text;
  };
  // COMBINE(B)1; DISPATCH(F)0; DISPATCH(B)1; COMBINE(F)0; COMBINE(B)0; and so on
  CHECK(text_of(pl::overlap_style::attention) ==
        "ATTN(F)0:1 sends, MLP(B)1:1 sends, MLP(W)1:1 sums, ATTN(B)1:1 sums, ATTN(W)1:1 sends, MLP(B)0:1 sends, "
        "MLP(W)0:1 sums, ATTN(B)0:1 sums, ");
  // the same but for the place of MLP(W)
  CHECK(text_of(pl::overlap_style::weights) ==
        "ATTN(F)0:1 sends, MLP(B)1:1 sends, MLP(F)0:1 sums, ATTN(B)1:1 sums, MLP(W)1:1 sends, MLP(B)0:1 sends, "
        "MLP(F)1:1 sums, ATTN(B)0:1 sums, ");
}

TEST_CASE("an order has every phase of every layer once, each after what it needs") {
  for (const auto style : {pl::overlap_style::attention, pl::overlap_style::weights}) {
    for (int lengths = 0; lengths < 25; ++lengths) {
      const int forward = lengths / 5, backward = lengths % 5;
      const pl::overlap_order order = pl::make_overlap_order(forward, backward, style);
      CHECK(order.nodes.size() == static_cast<std::size_t>(4 * forward + 6 * backward));
      std::map<std::pair<phase, int>, int> seen;
      for (const pl::overlap_node& node : order.nodes) {
        CHECK(node.layer >= 0);
        CHECK(node.layer < (pl::is_forward(node.what) ? forward : backward));
        const auto wanted = needs(node.what, node.layer, backward);
        for (const auto& before : wanted) {
          REQUIRE(seen.count(before) == 1);
          CHECK(node.after == seen[before]);
        }
        if (wanted.empty()) CHECK(node.after == -1);
        CHECK(seen.emplace(std::pair(node.what, node.layer), static_cast<int>(seen.size())).second);
      }
    }
  }
  CHECK_THROWS_AS(pl::make_overlap_order(-1, 0), ts::invalid_argument);
}

TEST_CASE("two batches that go the same way compute in turns, while the other's rows travel") {
  std::ostringstream text;
  text << pl::make_two_forward_order(2) << pl::make_two_backward_order(2);
  CHECK(
      text.str() ==
      "compute:       ATTN(F)0 ATTN(F)0' MLP(F)0 MLP(F)0' ATTN(F)1 ATTN(F)1' MLP(F)1 MLP(F)1'\n"
      "communication: DISPATCH(F)0 DISPATCH(F)0' COMBINE(F)0 COMBINE(F)0' DISPATCH(F)1 DISPATCH(F)1' COMBINE(F)1 "
      "COMBINE(F)1'\n"
      "compute:       MLP(B)1 MLP(B)1' MLP(W)1 ATTN(B)1 ATTN(W)1 MLP(W)1' ATTN(B)1' ATTN(W)1' MLP(B)0 MLP(B)0' MLP(W)0 "
      "ATTN(B)0 ATTN(W)0 MLP(W)0' ATTN(B)0' ATTN(W)0'\n"
      "communication: COMBINE(B)1 COMBINE(B)1' DISPATCH(B)1 DISPATCH(B)1' COMBINE(B)0 COMBINE(B)0' DISPATCH(B)0 "
      "DISPATCH(B)0'\n");

  for (int layers = 0; layers < 5; ++layers) {
    for (const bool forward : {true, false}) {
      const pl::overlap_order order =
          forward ? pl::make_two_forward_order(layers) : pl::make_two_backward_order(layers);
      CHECK(order.nodes.size() == static_cast<std::size_t>((forward ? 8 : 12) * layers));
      std::map<std::pair<phase, int>, int> seen[2];
      for (std::size_t i = 0; i < order.nodes.size(); ++i) {
        const pl::overlap_node& node = order.nodes[i];
        CHECK(pl::is_forward(node.what) == forward);
        auto& own = seen[node.batch];
        const auto wanted = needs(node.what, node.layer, layers);
        for (const auto& before : wanted) {
          REQUIRE(own.count(before) == 1);
          CHECK(node.after == own[before]);
        }
        if (wanted.empty()) CHECK(node.after == -1);
        CHECK(own.emplace(std::pair(node.what, node.layer), static_cast<int>(i)).second);
        // one order of sums into the gradients
        if (node.batch == 1) CHECK(seen[0].count({node.what, node.layer}) == 1);
      }
      CHECK(seen[0].size() == seen[1].size());
    }
  }
  CHECK_THROWS_AS(pl::make_two_forward_order(-1), ts::invalid_argument);
  CHECK_THROWS_AS(pl::make_two_backward_order(-1), ts::invalid_argument);
  pl::detail::order_builder builder(1);
  for (const int batch : {-1, 2}) {
    CHECK_THROWS_AS(builder.add(phase::forward_mlp, 0, phase::forward_dispatch, true, batch), ts::invalid_argument);
  }

  // Equal phases: of the communication all is hidden but the last combine forward and the first one backward.
  for (const int layers : {1, 4, 16}) {
    const auto forward = pl::estimate_overlap(pl::make_two_forward_order(layers), equal_times);
    CHECK(forward.compute == 40 * layers);
    CHECK(forward.time == 40 * layers + 10);
    const auto backward = pl::estimate_overlap(pl::make_two_backward_order(layers), equal_times);
    CHECK(backward.compute == 80 * layers);
    CHECK(backward.time == 80 * layers + 10);
  }
}

TEST_CASE("two forwards and two backwards run every phase of both chunks, and tell both of a failure") {
  pl::host_lanes lanes;
  const auto run = [&](recording_chunk& a, recording_chunk& b, bool forward) {
    pl::overlap_stage<recording_chunk, pl::host_lanes> first(a, lanes), second(b, lanes);
    if (forward) {
      first.two_forwards({}, {.micro_batch = 0}, {}, {}, second, {.micro_batch = 1}, {}, {});
    } else {
      first.two_backwards({}, {.micro_batch = 0}, {}, {}, {}, second, {.micro_batch = 1}, {}, {}, {});
    }
  };
  for (const bool forward : {true, false}) {
    recording_chunk a, b;
    a.layers = b.layers = 3;
    run(a, b, forward);
    for (const auto* chunk : {&a, &b}) {
      CHECK(chunk->events.size() == (forward ? 12u : 18u));
      for (const auto& e : chunk->events) {
        CHECK(e.computes_here == !pl::is_communication(e.what));
        for (const auto& [what, layer] : needs(e.what, e.layer, 3)) {
          const auto before = std::find_if(chunk->events.begin(), chunk->events.end(),
                                           [&, w = what, l = layer](auto& o) { return o.what == w && o.layer == l; });
          REQUIRE(before != chunk->events.end());
          CHECK(before->end <= e.begin);
        }
      }
    }
    recording_chunk fails, partner;
    fails.throwing = forward ? phase::forward_dispatch : phase::backward_dispatch;
    fails.throwing_layer = 1;
    CHECK_THROWS_WITH_AS(run(fails, partner, forward), "link down", std::runtime_error);
    CHECK(fails.failures == std::vector<std::string>{"link down"});
    CHECK(partner.failures == std::vector<std::string>{"link down"});
    recording_chunk longer;
    longer.layers = 4;
    CHECK_THROWS_WITH_AS(run(a, longer, forward), "overlap_stage: two batches that go the same way have 3 and 4 layers",
                         ts::invalid_argument);
    CHECK_THROWS_AS(run(a, a, forward), ts::invalid_argument);
  }
}

TEST_CASE("at a ratio of computation to communication of 1 at least 85 % of the communication is hidden") {
  // As much computation as communication: 6 phases of 10, 4 of 15.
  auto times = equal_times;
  for (const phase p :
       {phase::forward_dispatch, phase::forward_combine, phase::backward_combine, phase::backward_dispatch})
    times[static_cast<std::size_t>(p)] = 15;
  for (const int layers : {4, 8, 16}) {
    const pl::overlap_estimate pair = pl::estimate_overlap(pl::make_overlap_order(layers, layers), times);
    CHECK(pair.compute == pair.communication);
    CHECK(pair.compute == 60 * layers);
    CHECK(pair.hidden() >= 0.85);
  }
  // A chunk without a partner hides nothing.
  const pl::overlap_estimate alone = pl::estimate_overlap(pl::make_overlap_order(3, 0), equal_times);
  CHECK(alone.time == 120);
  CHECK(alone.hidden() == doctest::Approx(0));
  CHECK(pl::estimate_overlap({}, equal_times).hidden() == 1);
  // One pair of layers by hand: ATTN(F) 0-10, COMBINE(B) 0-10, MLP(B) 10-20 beside DISPATCH(F), MLP(W) 20-30 beside
  // DISPATCH(B), MLP(F) 30-40, ATTN(B) 40-50 beside COMBINE(F), ATTN(W) 50-60.
  CHECK(pl::estimate_overlap(pl::make_overlap_order(1, 1), equal_times).time == 60);
}

TEST_CASE("two threads run the lanes at the same time, each in its order, and every phase after what it needs") {
  const auto timed = [](recording_chunk& forward, recording_chunk& backward, auto& lanes) {
    for (recording_chunk* chunk : {&forward, &backward}) {
      chunk->layers = 4;
      chunk->duration = microseconds(3000);
    }
    const auto begin = clock_type::now();
    run_pair(forward, backward, lanes);
    return clock_type::now() - begin;
  };
  pl::serial_lanes<ts::space::host> one;
  recording_chunk alone, partner;
  const auto serial = timed(alone, partner, one);
  recording_chunk forward, backward;
  pl::host_lanes lanes;
  CHECK(timed(forward, backward, lanes) < serial * 17 / 20);  // the longer lane has 24 of 40 phases

  std::map<std::pair<phase, int>, recording_chunk::event> seen;
  for (const auto* chunk : {&forward, &backward})
    for (const auto& e : chunk->events) CHECK(seen.emplace(std::pair(e.what, e.layer), e).second);
  const pl::overlap_order order = pl::make_overlap_order(4, 4);
  REQUIRE(seen.size() == order.nodes.size());
  const recording_chunk::event* last[2] = {nullptr, nullptr};
  for (const pl::overlap_node& node : order.nodes) {
    const auto& e = seen[{node.what, node.layer}];
    CHECK(e.computes_here == !pl::is_communication(node.what));
    for (const auto& before : needs(node.what, node.layer, 4)) CHECK(seen[before].end <= e.begin);
    const auto*& previous = last[pl::is_communication(node.what) ? 1 : 0];
    if (previous != nullptr) CHECK(previous->end <= e.begin);
    previous = &e;
  }
}

TEST_CASE("chunks of different lengths, and a chunk that is its own partner, run complete") {
  pl::host_lanes lanes;
  for (const int layers : {1, 3}) {
    recording_chunk forward, backward;
    forward.layers = layers;
    run_pair(forward, backward, lanes);
    CHECK(forward.events.size() == static_cast<std::size_t>(4 * layers));
    CHECK(backward.events.size() == 12);
    recording_chunk both;
    both.layers = layers;
    pl::overlap_stage<recording_chunk, pl::host_lanes> stage(both, lanes);
    stage.overlapped({}, {}, {}, {}, stage, {}, {}, {}, {});
    CHECK(both.events.size() == static_cast<std::size_t>(10 * layers));
  }
}

TEST_CASE("a phase that throws in either lane ends both, tells the chunks once, and the lanes can be used again") {
  pl::host_lanes lanes;
  for (const phase p : {phase::forward_attention, phase::forward_dispatch, phase::forward_mlp, phase::forward_combine,
                        phase::backward_combine, phase::backward_mlp_input, phase::backward_mlp_weights,
                        phase::backward_dispatch, phase::backward_attention_input, phase::backward_attention_weights}) {
    INFO(pl::symbol_of(p));
    recording_chunk forward, backward;
    (pl::is_forward(p) ? forward : backward).throwing = p;
    (pl::is_forward(p) ? forward : backward).throwing_layer = 1;
    CHECK_THROWS_WITH_AS(run_pair(forward, backward, lanes), "link down", std::runtime_error);
    CHECK(forward.failures == std::vector<std::string>{"link down"});
    CHECK(backward.failures == std::vector<std::string>{"link down"});
    CHECK(forward.events.size() + backward.events.size() < 20);
    recording_chunk again, partner;
    run_pair(again, partner, lanes);
    CHECK(again.events.size() + partner.events.size() == 20);
  }
  recording_chunk forward, backward;
  forward.throwing = phase::forward_dispatch;
  forward.throwing_layer = 0;
  forward.throw_int = true;
  CHECK_THROWS_AS(run_pair(forward, backward, lanes), int);
  CHECK(backward.failures.size() == 1);
}

TEST_CASE("alone, a chunk runs its phases layer by layer, the weight parts when they are asked for") {
  recording_chunk chunk;
  pl::serial_lanes<ts::space::host> lanes;
  pl::overlap_stage<recording_chunk, pl::serial_lanes<ts::space::host>> stage(chunk, lanes);
  static_assert(pl::pipeline_stage<decltype(stage), ts::space::host>);
  static_assert(pl::stage_has_overlapped<decltype(stage), ts::space::host>);
  stage.forward({}, {}, {}, {});
  stage.backward_input({}, {}, {}, {}, {});
  stage.backward_weights({}, {}, {}, {});
  std::string text;
  for (const auto& e : chunk.events) text += std::string(pl::symbol_of(e.what)) + std::to_string(e.layer) + " ";
  CHECK(text ==
        "ATTN(F)0 DISPATCH(F)0 MLP(F)0 COMBINE(F)0 ATTN(F)1 DISPATCH(F)1 MLP(F)1 COMBINE(F)1 "
        "COMBINE(B)1 MLP(B)1 DISPATCH(B)1 ATTN(B)1 COMBINE(B)0 MLP(B)0 DISPATCH(B)0 ATTN(B)0 "
        "MLP(W)1 ATTN(W)1 MLP(W)0 ATTN(W)0 ");
}
