// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "../support/layer_fixture.hpp"
#include "../support/messages.hpp"

namespace {

using namespace tessera_test;

using self = ts::comm::self<ts::space::host>;
using experts_fp32 = ts::experts<ts::activation::swiglu, ts::precision::fp32>;
using layer = ts::moe_layer<ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized, ts::balance::bias>,
                            experts_fp32, ts::layout::block, self>;
using external_layer =
    ts::moe_layer<ts::router<ts::score::softmax, ts::select::external>, experts_fp32, ts::layout::block, self>;
using hash_layer =
    ts::moe_layer<ts::router<ts::score::softmax, ts::select::hash>, experts_fp32, ts::layout::block, self>;

constexpr ts::shape sizes{.num_experts = 4, .top_k = 2, .hidden = 6, .intermediate = 4, .gate_bias = true};

layer_problem problem() { return make_problem(sizes, 8, true, 3); }

// Runs `f`, which must throw an `invalid_argument` with `text` in it.
template <class F>
void refused(const std::string& text, F&& f) {
  const std::string message = message_of(f);
  CAPTURE(message);
  CAPTURE(text);
  CHECK(contains(message, text));
}

// A rank whose state must be the same bytes after the refusal.
template <class Layer>
struct watched {
  explicit watched(const layer_problem& p, typename Layer::router_options routing = {})
      : rank(p, ts::layout::block(4, 1), comm, 0, 8, 8, routing, {}), before(snapshot()) {}
  ~watched() { CHECK(snapshot() == before); }
  std::string snapshot() { return {reinterpret_cast<const char*>(rank.state.data()), rank.state.size()}; }

  self comm;
  layer_rank<Layer> rank;
  std::string before;
};

}  // namespace

TEST_CASE("sizes that cannot work are refused with the values") {
  const ts::layout::block placement(4, 1);
  const auto with = [&](auto change) {
    ts::shape s = sizes;
    s.max_tokens = 8;
    change(s);
    layer::sizes(s, placement, 0);
  };
  refused("top_k = 5 exceeds num_experts = 4", [&] { with([](ts::shape& s) { s.top_k = 5; }); });
  refused("hidden = 0", [&] { with([](ts::shape& s) { s.hidden = 0; }); });
  refused("intermediate = -1", [&] { with([](ts::shape& s) { s.intermediate = -1; }); });
  refused("max_tokens = 0", [&] { with([](ts::shape& s) { s.max_tokens = 0; }); });
  refused("num_shared_experts = -1", [&] { with([](ts::shape& s) { s.num_shared_experts = -1; }); });
  refused("the layout places 4 experts, the shape has num_experts = 6",
          [&] { with([](ts::shape& s) { s.num_experts = 6; }); });
  refused("num_shared_experts = 4 of intermediate = 536870912", [&] {
    with([](ts::shape& s) {
      s.num_shared_experts = 4;
      s.intermediate = 1 << 29;
    });
  });
  refused("max_tokens = 4611686018427387904 pairs", [&] { with([](ts::shape& s) { s.max_tokens = 1LL << 62; }); });
  refused("max_tokens * top_k = 4294967292 pairs", [&] { with([](ts::shape& s) { s.max_tokens = INT32_MAX - 1; }); });
  ts::shape s = sizes;
  s.max_tokens = 8;
  refused("rank 1 of a layout over 1 ranks", [&] { layer::sizes(s, placement, 1); });
  refused("chunk_tokens = -1", [&] { layer::sizes(s, placement, 0, {.chunk_tokens = -1}); });
}

TEST_CASE("sizes refuses what the constructor refuses, with the same sentence") {
  self comm;
  const auto check = [&](int num_experts, int top_k, const std::string& sentence) {
    const ts::shape s{.num_experts = num_experts, .top_k = top_k, .hidden = 6, .intermediate = 4, .max_tokens = 8};
    const ts::layout::block placement(num_experts, 1);
    CHECK(message_of([&] { layer::sizes(s, placement, 0); }) == sentence);
    CHECK(message_of([&] { layer(s, {}, placement, comm, {}); }) == sentence);
  };
  check(64, 33, "top_k = 33 exceeds the limit of 32");
  check(2000, 2, "num_experts = 2000 is outside [1, 1024]");
  check(4, 0, "top_k = 0, it must be at least 1");
}

TEST_CASE("a layer that does not fit its communicator, options or state is refused") {
  self comm;
  ts::shape s = sizes;
  s.max_tokens = 8;
  const auto bytes = layer::sizes(s, ts::layout::block(4, 1), 0);
  ts::host_buffer state(bytes.state_bytes);
  refused("the layout places experts on 2 ranks, the communicator has 1",
          [&] { layer(s, {}, ts::layout::block(4, 2), comm, state); });
  refused("the router's options have top_k = 3, the shape has 2",
          [&] { layer(s, {.top_k = 3}, ts::layout::block(4, 1), comm, state); });
  refused("state memory has 16 bytes", [&] { layer(s, {}, ts::layout::block(4, 1), comm, {state.data(), 16}); });
  refused("not aligned to 256 bytes", [&] {
    layer(s, {}, ts::layout::block(4, 1), comm, {state.data() + 8, state.size()});
  });
}

TEST_CASE("bad views and memory are refused by name, and state is unchanged") {
  const auto p = problem();
  watched<layer> w(p);
  auto& r = w.rank;
  auto forward = [&](const layer::inputs& in, const layer::weights& weights, ts::matrix_view<float> y,
                     ts::saved_memory saved, ts::workspace_memory workspace) {
    r.layer->forward({}, ts::pass::train, in, weights, y, saved, workspace);
  };
  layer::inputs in = r.inputs();
  in.x.cols = 5;
  refused("x is [8, 5], expected [8, 6]", [&] { forward(in, r.weights(), r.y_view(), r.saved, r.workspace); });
  in = r.inputs();
  in.x.stride = 4;
  refused("x has row stride 4", [&] { forward(in, r.weights(), r.y_view(), r.saved, r.workspace); });
  in = r.inputs();
  in.x.data = reinterpret_cast<const float*>(reinterpret_cast<const char*>(in.x.data) + 1);
  refused("not aligned to 4 bytes", [&] { forward(in, r.weights(), r.y_view(), r.saved, r.workspace); });
  in = r.inputs();
  in.x.rows = 9;
  refused("x has 9 tokens, the layer was made for max_tokens = 8",
          [&] { forward(in, r.weights(), r.y_view(), r.saved, r.workspace); });
  refused("overlaps y", [&] { forward(r.inputs(), r.weights(), {r.x.data(), 8, 6}, r.saved, r.workspace); });
  refused("y is [7, 6], expected [8, 6]", [&] {
    forward(r.inputs(), r.weights(), {r.y.data(), 7, 6}, r.saved, r.workspace);
  });
  refused("y has no data", [&] { forward(r.inputs(), r.weights(), {nullptr, 8, 6}, r.saved, r.workspace); });
  in = r.inputs();
  in.residual = {r.dy.data(), 7, 6};
  refused("the residual is [7, 6], expected [8, 6]",
          [&] { forward(in, r.weights(), r.y_view(), r.saved, r.workspace); });
  in.residual = {r.dy.data(), 8, 5};
  refused("the residual is [8, 5], expected [8, 6]",
          [&] { forward(in, r.weights(), r.y_view(), r.saved, r.workspace); });
  in.residual = {r.y.data(), 8, 6};
  refused("the residual (", [&] { forward(in, r.weights(), r.y_view(), r.saved, r.workspace); });

  layer::weights weights = r.weights();
  weights.gate.rows = 3;
  refused("the gate's weight is [3, 6], expected [4, 6]",
          [&] { forward(r.inputs(), weights, r.y_view(), r.saved, r.workspace); });
  weights = r.weights();
  weights.gate_bias = nullptr;
  refused("gate_bias is null", [&] { forward(r.inputs(), weights, r.y_view(), r.saved, r.workspace); });

  refused("workspace is too small: slice '", [&] {
    forward(r.inputs(), r.weights(), r.y_view(), r.saved, {r.workspace.data(), 512});
  });
  refused("saved memory is too small: slice '", [&] {
    forward(r.inputs(), r.weights(), r.y_view(), {r.saved.data(), 300}, r.workspace);
  });
  refused("workspace starts at", [&] {
    forward(r.inputs(), r.weights(), r.y_view(), r.saved, {r.workspace.data() + 16, r.workspace.size() - 16});
  });
}

TEST_CASE("backward refuses wrong gradients and memory of another forward pass") {
  const auto p = problem();
  watched<layer> w(p);
  auto& r = w.rank;
  r.forward(ts::pass::recompute);
  const auto backward = [&](ts::matrix_view<const float> dy, ts::matrix_view<float> dx, layer::inputs in) {
    r.layer->backward_input({}, in, dy, r.weights(), r.saved, dx, r.deferred, r.workspace);
  };
  refused("dy is [8, 5], expected [8, 6]", [&] { backward({r.dy.data(), 8, 5}, r.dx_view(), r.inputs()); });
  refused("overlaps dx", [&] { backward(r.dy_view(), {r.dy.data(), 8, 6}, r.inputs()); });
  refused("overlaps dx", [&] { backward(r.dy_view(), {r.x.data(), 8, 6}, r.inputs()); });
  auto in = r.inputs();
  in.x.rows = 4;
  refused("saved memory is of a forward pass over 8 tokens, x has 4", [&] {
    backward({r.dy.data(), 4, 6}, {r.dx.data(), 4, 6}, in);
  });
  backward(r.dy_view(), r.dx_view(), r.inputs());
  auto grads = r.gradients();
  grads.gate = nullptr;
  refused("the gradient of the gate has no data", [&] {
    r.layer->backward_weights({}, r.inputs(), r.dy_view(), r.saved, r.deferred, grads, ts::write::overwrite);
  });
  grads = r.gradients();
  grads.gate_bias = nullptr;
  refused("the gradient of gate_bias is null", [&] {
    r.layer->backward_weights({}, r.inputs(), r.dy_view(), r.saved, r.deferred, grads, ts::write::overwrite);
  });
}

TEST_CASE("logits that are not finite are refused with token and expert") {
  auto p = problem();
  p.x[3 * 6 + 1] = std::numeric_limits<double>::quiet_NaN();
  watched<layer> w(p);
  refused("token 3", [&] { w.rank.forward(ts::pass::train); });
}

TEST_CASE("a bias rate that cannot be is refused before the load is summed") {
  const auto p = problem();
  watched<layer> w(p);
  for (const float rate : {-1.0F, std::numeric_limits<float>::infinity()}) {
    CAPTURE(rate);
    w.rank.forward(ts::pass::train);  // there is a load
    *w.rank.layer->state().bias_rate = rate;
    w.before = w.snapshot();
    refused("the bias rate is", [&] { w.rank.layer->end_step({}, w.comm); });
    CHECK(w.snapshot() == w.before);
  }
}

TEST_CASE("ids from the caller that are out of range, repeated or missing are refused") {
  auto p = problem();
  p.expert_ids[5] = 4;
  {
    watched<external_layer> w(p);
    refused("4", [&] { w.rank.forward(ts::pass::train); });
  }
  p = problem();
  p.expert_ids[5] = p.expert_ids[4];
  {
    watched<external_layer> w(p);
    refused("token 2", [&] { w.rank.forward(ts::pass::train); });
  }
  p = problem();
  {
    watched<external_layer> w(p);
    auto in = w.rank.inputs();
    in.expert_ids = {};
    refused("expert_ids", [&] {
      w.rank.layer->forward({}, ts::pass::train, in, w.rank.weights(), w.rank.y_view(), w.rank.saved, w.rank.workspace);
    });
  }
}

TEST_CASE("a token id outside of the hash table is refused") {
  auto p = problem();
  p.token_ids[6] = 5;
  const std::vector<std::int32_t> table{0, 1, 2, 3, 1, 0, 3, 2, 0, 2};
  watched<hash_layer> w(p, {.select = {.table = table.data(), .vocab = 5}});
  refused("token 6", [&] { w.rank.forward(ts::pass::train); });
}

TEST_CASE("one rank's refusal reaches the others as an error that names it") {
  using threads_layer = ts::moe_layer<ts::router<>, experts_fp32, ts::layout::block, ts::comm::threads>;
  auto p = problem();
  p.x[6 * 6] = std::numeric_limits<double>::infinity();  // a token of rank 1
  std::string seen;
  try {
    ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
      layer_rank<threads_layer> rank(p, ts::layout::block(4, 2), comm, comm.rank() * 4, 4, 4, {}, {});
      try {
        rank.forward(ts::pass::train);
      } catch (const ts::comm_error& e) {
        CHECK(comm.rank() == 0);
        CHECK(e.peer() == 1);
        seen = e.what();
        throw;
      }
    });
    FAIL("run should rethrow");
  } catch (const ts::invalid_argument& e) {
    CHECK(std::string(e.what()).find("token 2") != std::string::npos);  // the root cause, by rank 1's numbering
  }
  CHECK(seen.find("rank 1") != std::string::npos);
}
