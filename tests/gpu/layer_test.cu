// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The layer on one GPU against the host half in double, on the same bf16 numbers.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#undef DOCTEST_CONFIG_IMPLEMENT  // the main function is the last one below

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <tessera/moe/moe_layer.cuh>

#include "../support/layer_fixture.hpp"
#include "../support/messages.hpp"
#include "device_fixture.cuh"

namespace {

using namespace tessera_test;
using device_test::buffer;
using device_test::relative_error;

void check(cudaError_t result) { REQUIRE_MESSAGE(result == cudaSuccess, cudaGetErrorString(result)); }

// `Oracle` is the host's precision: double, but where a clamp cuts gradients off, because bf16 moves values over its
// border.
template <class Router, class Activation, class WeightLayout, class Precision = ts::precision::bf16,
          class Oracle = ts::precision::fp64, class Gemm = ts::gemm::automatic, ts::shape Fixed = ts::shape{}>
struct policies {
  using router = Router;
  using gradient = typename Precision::gradient;
  static constexpr bool gated = Activation::gated;
  using device_layer = ts::moe_layer<Router, ts::experts<Activation, Precision, WeightLayout, Gemm>, ts::layout::block,
                                     ts::comm::self<ts::space::device>, ts::combine::reduced, Fixed>;
  using host_layer = ts::moe_layer<Router, ts::experts<Activation, Oracle, WeightLayout>, ts::layout::block,
                                   ts::comm::threads, ts::combine::ordered>;
};

// One layer in device memory.
template <class Policies>
struct device_case {
  using layer = typename Policies::device_layer;
  using S = ts::bfloat16;
  using G = typename Policies::gradient;

  device_case(const layer_problem& p, typename layer::router_options routing, typename layer::options options)
      : sizes(p.sizes), tokens(p.num_tokens) {
    sizes.max_tokens = std::max<std::int64_t>(p.num_tokens, 1);
    options.chunk_tokens = p.chunk_tokens;
    const ts::layout::block placement(sizes.num_experts, 1);
    const auto bytes = layer::sizes(sizes, placement, 0, options);
    state = buffer<std::byte>(bytes.state_bytes);
    saved = buffer<std::byte>(bytes.saved_bytes);
    deferred = buffer<std::byte>(bytes.deferred_bytes);
    workspace = buffer<std::byte>(std::max(bytes.workspace_bytes, bytes.eval_workspace_bytes));
    moe.emplace(sizes, routing, placement, comm, ts::state_memory(state.data(), state.size()), options);
    check(cudaStreamCreate(&stream));
    moe->reset_state(stream);
    check(cudaStreamSynchronize(stream));
    if (moe->state().bias != nullptr) {
      const auto bias = cast<float>(p.bias);
      check(cudaMemcpy(moe->state().bias, bias.data(), bias.size() * sizeof(float), cudaMemcpyHostToDevice));
    }
    x = buffer<S>(cast<S>(p.x));
    dy = buffer<S>(cast<S>(p.dy));
    residual = buffer<S>(cast<S>(p.residual));
    y = buffer<S>(p.x.size());
    dx = buffer<S>(p.x.size());
    gate = buffer<float>(cast<float>(p.gate));
    gate_bias = buffer<float>(cast<float>(p.gate_bias));
    up = buffer<S>(cast<S>(p.up));
    down = buffer<S>(cast<S>(p.down));
    up_bias = buffer<S>(cast<S>(p.up_bias));
    down_bias = buffer<S>(cast<S>(p.down_bias));
    shared_up = buffer<S>(cast<S>(p.shared_up));
    shared_down = buffer<S>(cast<S>(p.shared_down));
    shared_up_bias = buffer<S>(cast<S>(p.shared_up_bias));
    shared_down_bias = buffer<S>(cast<S>(p.shared_down_bias));
    sequences = buffer<std::int32_t>(p.sequence_offsets);
    const auto chunks = static_cast<std::size_t>(ts::num_chunks(tokens, p.chunk_tokens));
    gate_grad = buffer<float>(chunks * gate.size());
    gate_bias_grad = buffer<float>(chunks * gate_bias.size());
    up_grad = buffer<G>(up.size());
    down_grad = buffer<G>(down.size());
    up_bias_grad = buffer<G>(up_bias.size());
    down_bias_grad = buffer<G>(down_bias.size());
    shared_up_grad = buffer<float>(chunks * shared_up.size());
    shared_down_grad = buffer<float>(chunks * shared_down.size());
    shared_up_bias_grad = buffer<float>(chunks * shared_up_bias.size());
    shared_down_bias_grad = buffer<float>(chunks * shared_down_bias.size());
  }
  ~device_case() { cudaStreamDestroy(stream); }

  typename layer::inputs inputs() const {
    return {.x = {x.data(), tokens, sizes.hidden},
            .sequence_offsets = {sequences.data(), sequences.size()},
            .residual = {residual.data(), tokens, sizes.hidden}};
  }
  typename layer::weights weights() const {
    return {.gate = {gate.data(), sizes.num_experts, sizes.hidden},
            .gate_bias = gate_bias.data(),
            .experts = {up.data(), down.data(), up_bias.data(), down_bias.data()},
            .shared = {shared_up.data(), shared_down.data(), shared_up_bias.data(), shared_down_bias.data()}};
  }
  void forward(ts::pass mode) {
    moe->forward(stream, mode, inputs(), weights(), {y.data(), tokens, sizes.hidden}, {saved.data(), saved.size()},
                 {workspace.data(), workspace.size()});
  }
  ts::matrix_view<const S> gradient() const { return {dy.data(), tokens, sizes.hidden}; }
  void backward() {
    backward_input();
    backward_weights(stream);
  }
  void backward_input() {
    moe->backward_input(stream, inputs(), gradient(), weights(), {saved.data(), saved.size()},
                        {dx.data(), tokens, sizes.hidden}, {deferred.data(), deferred.size()},
                        {workspace.data(), workspace.size()});
  }
  void backward_weights(cudaStream_t where) {
    moe->backward_weights(where, inputs(), gradient(), {saved.data(), saved.size()}, {deferred.data(), deferred.size()},
                          {.gate = gate_grad.data(),
                           .gate_bias = gate_bias_grad.data(),
                           .experts = {up_grad.data(), down_grad.data(), up_bias_grad.data(), down_bias_grad.data()},
                           .shared = {shared_up_grad.data(), shared_down_grad.data(), shared_up_bias_grad.data(),
                                      shared_down_bias_grad.data()}},
                          ts::write::overwrite);
  }
  void sync() {
    check(cudaStreamSynchronize(stream));
    ts::device_status status;
    check(cudaMemcpy(&status, moe->state().status, sizeof(status), cudaMemcpyDeviceToHost));
    ts::expect_ok(status);
  }

  ts::shape sizes;
  std::int64_t tokens;
  ts::comm::self<ts::space::device> comm;
  cudaStream_t stream = nullptr;
  buffer<std::byte> state, saved, deferred, workspace;
  std::optional<layer> moe;
  buffer<S> x, dy, residual, y, dx, up, down, up_bias, down_bias, shared_up, shared_down, shared_up_bias,
      shared_down_bias;
  buffer<float> gate, gate_bias, gate_grad, gate_bias_grad;
  buffer<G> up_grad, down_grad, up_bias_grad, down_bias_grad;
  buffer<float> shared_up_grad, shared_down_grad, shared_up_bias_grad, shared_down_bias_grad;
  buffer<std::int32_t> sequences;
};

// Sum of `[chunks, width]` over chunks.
std::vector<double> over_chunks(const std::vector<float>& values, std::size_t width) {
  std::vector<double> sum(width);
  for (std::size_t i = 0; i < values.size(); ++i) sum[i % width] += values[i];
  return sum;
}

template <class Policies>
void check_layer(ts::shape sizes, std::int64_t tokens, std::int64_t chunk_tokens = 0,
                 const ts::dispatch_options& dispatch = {}, bool with_residual = false) {
  auto p = make_problem(sizes, tokens, Policies::gated, 17, true);
  if (with_residual) p.residual = random_values(tokens * sizes.hidden, 1, 71, true);
  p.chunk_tokens = chunk_tokens;
  // Logits of long rows lie so far apart that softmax of two of them is 0 in fp32, and a tie there alone.
  if (sizes.hidden > 1000)
    std::transform(p.gate.begin(), p.gate.end(), p.gate.begin(), [](double g) { return g / 16; });
  if (tokens > 100) p.sequence_offsets = {0, 40, 41, static_cast<std::int32_t>(tokens)};
  typename Policies::router::options routing;
  routing.weigh.scale = 1.5f;
  if constexpr (requires { routing.select.groups; }) routing.select = {.groups = 4, .kept_groups = 2};
  device_case<Policies> device(p, routing, {.dispatch = dispatch});
  device.forward(ts::pass::train);
  device.backward();
  device.moe->end_step(device.stream, device.comm);
  device.sync();
  const auto expected = run_problem<typename Policies::host_layer>(p, ts::layout::block(sizes.num_experts, 1),
                                                                   {0, tokens}, routing, {.dispatch = dispatch});

  const auto compare = [](const char* name, const std::vector<double>& got, const std::vector<double>& want,
                          double bound) {
    if (want.empty()) return;
    const std::string which = name;
    CAPTURE(which);
    CHECK(relative_error(got, want) <= bound);
  };
  compare("y", widened(device.y.get()), expected.y, 1e-2);
  compare("dx", widened(device.dx.get()), expected.dx, 1e-2);
  compare("gate", over_chunks(device.gate_grad.get(), p.gate.size()), expected.gate, 2e-2);
  compare("gate_bias", over_chunks(device.gate_bias_grad.get(), p.gate_bias.size()), expected.gate_bias, 2e-2);
  compare("up", widened(device.up_grad.get()), expected.up, 1e-2);
  compare("down", widened(device.down_grad.get()), expected.down, 1e-2);
  compare("up_bias", widened(device.up_bias_grad.get()), expected.up_bias, 1e-2);
  compare("down_bias", widened(device.down_bias_grad.get()), expected.down_bias, 1e-2);
  compare("shared_up", over_chunks(device.shared_up_grad.get(), p.shared_up.size()), expected.shared_up, 1e-2);
  compare("shared_down", over_chunks(device.shared_down_grad.get(), p.shared_down.size()), expected.shared_down, 1e-2);
  compare("shared_up_bias", over_chunks(device.shared_up_bias_grad.get(), p.shared_up_bias.size()),
          expected.shared_up_bias, 1e-2);
  const auto& state = device.moe->state();
  std::vector<std::int64_t> load(static_cast<std::size_t>(sizes.num_experts));
  check(cudaMemcpy(load.data(), state.global_load, load.size() * sizeof(std::int64_t), cudaMemcpyDeviceToHost));
  CHECK(load == expected.load);
  if (state.bias != nullptr) {
    std::vector<float> bias(load.size());
    check(cudaMemcpy(bias.data(), state.bias, bias.size() * sizeof(float), cudaMemcpyDeviceToHost));
    CHECK(widened(bias) == expected.bias);
  }
  if constexpr (Policies::device_layer::num_losses > 0) {
    constexpr auto num_losses = static_cast<std::size_t>(Policies::device_layer::num_losses);
    std::vector<float> losses(static_cast<std::size_t>(ts::num_chunks(tokens, chunk_tokens)) * num_losses);
    check(cudaMemcpy(losses.data(), state.losses, losses.size() * sizeof(float), cudaMemcpyDeviceToHost));
    compare("losses", over_chunks(losses, num_losses), expected.losses, 1e-4);
  }
}

using mixtral_like =
    policies<ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized, ts::balance::switch_loss>,
             ts::activation::swiglu, ts::weight_layout::out_in_concatenated>;
using portable_mixtral_like =
    policies<mixtral_like::router, ts::activation::swiglu, ts::weight_layout::out_in_concatenated, ts::precision::bf16,
             ts::precision::fp64, ts::gemm::portable::backend>;
using deepseek_like =
    policies<ts::router<ts::score::sigmoid, ts::select::group_limited<>, ts::weigh::normalized, ts::balance::bias,
                        ts::balance::sequence_loss, ts::balance::z_loss>,
             ts::activation::swiglu, ts::weight_layout::out_in_interleaved, ts::precision::bf16_gradients>;
using gpt_oss_like =
    policies<ts::router<ts::score::softmax_selected, ts::select::top_k, ts::weigh::raw>, ts::activation::clamped_swiglu,
             ts::weight_layout::in_out_interleaved, ts::precision::bf16, ts::precision::bf16, ts::gemm::automatic,
             ts::shape{.num_shared_experts = ts::shape::none}>;
// Weights on the input as in Llama 4, and an activation without a gate.
using input_weighted =
    policies<ts::router<ts::score::sigmoid_selected, ts::select::top_k, ts::weigh::on_input<ts::weigh::raw>>,
             ts::activation::relu2, ts::weight_layout::in_out_concatenated>;

}  // namespace

TEST_CASE("the layer on the device follows the host in double: softmax, top-k, switch loss, shared expert") {
  check_layer<mixtral_like>(
      {.num_experts = 16, .top_k = 4, .hidden = 136, .intermediate = 72, .num_shared_experts = 1, .gate_bias = true},
      333, 64);
  check_layer<mixtral_like>({.num_experts = 8, .top_k = 2, .hidden = 256, .intermediate = 128}, 1000);
}

TEST_CASE("the layer on the device follows the host in double: softmax, top-k, products of sm_80") {
  check_layer<portable_mixtral_like>(
      {.num_experts = 16, .top_k = 4, .hidden = 136, .intermediate = 72, .num_shared_experts = 1, .gate_bias = true},
      333, 64);
}

TEST_CASE("the layer on the device follows the host in double: sigmoid, groups, bias, sequence loss") {
  check_layer<deepseek_like>(
      {.num_experts = 32, .top_k = 6, .hidden = 192, .intermediate = 64, .num_shared_experts = 2}, 500, 100);
}

TEST_CASE("the layer on the device follows the host in double: GPT-OSS") {
  check_layer<gpt_oss_like>(
      {.num_experts = 12, .top_k = 4, .hidden = 72, .intermediate = 40, .gate_bias = true, .expert_bias = true}, 257);
}

TEST_CASE("the layer on the device follows the host in double: weights on the input, no gate") {
  check_layer<input_weighted>(
      {.num_experts = 16, .top_k = 1, .hidden = 128, .intermediate = 96, .num_shared_experts = 1}, 300);
}

TEST_CASE("the layer on the device follows the host in double: a residual, with shared experts and without") {
  check_layer<mixtral_like>({.num_experts = 16, .top_k = 4, .hidden = 136, .intermediate = 72, .num_shared_experts = 1},
                            333, 64, {}, true);
  check_layer<mixtral_like>({.num_experts = 8, .top_k = 2, .hidden = 256, .intermediate = 128}, 300, 0, {}, true);
  check_layer<portable_mixtral_like>({.num_experts = 8, .top_k = 2, .hidden = 72, .intermediate = 40}, 90, 0, {}, true);
}

TEST_CASE("where the experts give zeros, y is the residual in every pass") {
  for (const int shared : {0, 1}) {
    CAPTURE(shared);
    auto p =
        make_problem({.num_experts = 8, .top_k = 2, .hidden = 128, .intermediate = 64, .num_shared_experts = shared},
                     200, true, 3, true);
    // outputs are 0, so that y is the residual
    std::fill(p.down.begin(), p.down.end(), 0.0);
    std::fill(p.shared_down.begin(), p.shared_down.end(), 0.0);
    p.residual = random_values(200 * 128, 1, 5, true);
    device_case<mixtral_like> c(p, {}, {});
    for (const ts::pass mode : {ts::pass::train, ts::pass::recompute, ts::pass::eval}) {
      check(cudaMemset(c.y.data(), 0xff, c.y.size() * sizeof(ts::bfloat16)));
      check(cudaDeviceSynchronize());
      c.forward(mode);
      c.sync();
      CHECK(widened(c.y.get()) == p.residual);
    }
  }
}

TEST_CASE("one token and no token work") {
  check_layer<mixtral_like>({.num_experts = 8, .top_k = 8, .hidden = 64, .intermediate = 32, .num_shared_experts = 1},
                            1);
  check_layer<mixtral_like>({.num_experts = 8, .top_k = 2, .hidden = 64, .intermediate = 32, .num_shared_experts = 1},
                            0);
}

TEST_CASE("many experts, and sizes that no tile divides") {
  check_layer<mixtral_like>({.num_experts = 896, .top_k = 8, .hidden = 72, .intermediate = 40}, 300);
  // a normalized weight of one expert is constant: with K = 1 the gate's gradient would be rounding errors of zero
  check_layer<mixtral_like>({.num_experts = 3, .top_k = 2, .hidden = 2880, .intermediate = 1408}, 90);
  check_layer<input_weighted>({.num_experts = 2, .top_k = 1, .hidden = 200, .intermediate = 1856}, 150);
}

TEST_CASE("pairs beyond a capacity or a bound are dropped as on the host") {
  const ts::shape sizes{.num_experts = 8, .top_k = 2, .hidden = 128, .intermediate = 64};
  ts::dispatch_options dispatch{.overflow = ts::overflow_policy::drop};
  dispatch.row_bound = 450;
  check_layer<mixtral_like>(sizes, 300, 0, dispatch);
  dispatch.capacity_factor = 0.8;
  check_layer<mixtral_like>(sizes, 300, 0, dispatch);
  dispatch.row_bound = 0;
  check_layer<mixtral_like>(sizes, 300, 0, dispatch);
  dispatch.order = ts::drop_order::weight;
  check_layer<mixtral_like>(sizes, 300, 0, dispatch);
}

TEST_CASE("more pairs than the bound are a fault where nothing may be dropped") {
  const auto p = make_problem({.num_experts = 8, .top_k = 2, .hidden = 64, .intermediate = 32}, 50, true, 3, true);
  device_case<mixtral_like> c(p, {}, {.dispatch = {.row_bound = 99}});
  c.forward(ts::pass::train);
  c.backward();
  CHECK_THROWS_AS(c.sync(), ts::error);
  std::int64_t dropped = 0;
  check(cudaMemcpy(&dropped, c.moe->state().dropped_by_bound, sizeof(dropped), cudaMemcpyDeviceToHost));
  CHECK(dropped == 1);
}

TEST_CASE("eval and recompute give the bits of train, and two runs are the same bits") {
  const auto p = make_problem(
      {.num_experts = 16, .top_k = 4, .hidden = 128, .intermediate = 64, .num_shared_experts = 1}, 700, true, 3, true);
  device_case<mixtral_like> a(p, {}, {});
  device_case<mixtral_like> b(p, {}, {});
  const auto bits = [](const std::vector<ts::bfloat16>& v) {
    std::vector<std::uint16_t> out;
    for (const auto e : v) out.push_back(e.bits);
    return out;
  };
  for (auto* c : {&a, &b}) {
    c->forward(ts::pass::train);
    c->backward();
    c->sync();
  }
  const auto y = bits(a.y.get()), dx = bits(a.dx.get());
  CHECK(bits(b.y.get()) == y);
  CHECK(bits(b.dx.get()) == dx);
  CHECK(a.up_grad.get() == b.up_grad.get());
  b.forward(ts::pass::eval);
  b.sync();
  CHECK(bits(b.y.get()) == y);
  b.forward(ts::pass::recompute);
  b.backward();
  b.sync();
  CHECK(bits(b.dx.get()) == dx);
}

TEST_CASE("shared experts on a second stream give the bits of one stream, in a graph too") {
  const auto p = make_problem(
      {.num_experts = 16, .top_k = 4, .hidden = 128, .intermediate = 64, .num_shared_experts = 2}, 700, true, 3, true);
  device_case<mixtral_like> one(p, {}, {});
  ts::side_stream side;
  check(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking));
  check(cudaEventCreateWithFlags(&side.fork, cudaEventDisableTiming));
  check(cudaEventCreateWithFlags(&side.join, cudaEventDisableTiming));
  device_case<mixtral_like> two(p, {}, {.side = side});
  for (auto* c : {&one, &two}) {
    c->forward(ts::pass::train);
    c->backward();
    c->sync();
  }
  const auto check_same = [&] {
    CHECK(widened(two.y.get()) == widened(one.y.get()));
    CHECK(widened(two.dx.get()) == widened(one.dx.get()));
    CHECK(two.up_grad.get() == one.up_grad.get());
    CHECK(two.shared_up_grad.get() == one.shared_up_grad.get());
    CHECK(two.shared_down_grad.get() == one.shared_down_grad.get());
  };
  check_same();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(two.stream, cudaStreamCaptureModeThreadLocal));
  two.forward(ts::pass::recompute);
  two.backward();
  check(cudaStreamEndCapture(two.stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  for (int i = 0; i < 20; ++i) check(cudaGraphLaunch(exec, two.stream));
  two.sync();
  check_same();
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(side.fork);
  cudaEventDestroy(side.join);
  cudaStreamDestroy(side.stream);
}

TEST_CASE("the weights' gradients on a stream of their own, beside other calls, have the same bits") {
  const auto p =
      make_problem({.num_experts = 16, .top_k = 4, .hidden = 512, .intermediate = 256, .num_shared_experts = 1}, 2000,
                   true, 3, true);
  device_case<mixtral_like> c(p, {}, {});
  c.forward(ts::pass::train);
  c.backward();
  c.sync();
  const auto y = c.y.get();
  const auto up = c.up_grad.get(), down = c.down_grad.get(), shared = c.shared_up_grad.get();
  cudaStream_t own = nullptr;
  check(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
  for (int i = 0; i < 10; ++i) {
    check(cudaMemset(c.up_grad.data(), 0xff, up.size() * sizeof(up[0])));
    check(cudaMemset(c.y.data(), 0xff, y.size() * sizeof(y[0])));
    check(cudaDeviceSynchronize());
    c.backward_weights(own);
    for (int forwards = 0; forwards < 4; ++forwards) c.forward(ts::pass::eval);
    c.sync();
    check(cudaStreamSynchronize(own));
    CHECK(widened(c.y.get()) == widened(y));
    CHECK(c.up_grad.get() == up);
    CHECK(c.down_grad.get() == down);
    CHECK(c.shared_up_grad.get() == shared);
  }
  cudaStreamDestroy(own);
}

TEST_CASE("a captured step is right when it is replayed with other tokens") {
  const ts::shape sizes{.num_experts = 16, .top_k = 4, .hidden = 128, .intermediate = 64, .num_shared_experts = 1};
  const auto first = make_problem(sizes, 512, true, 3, true);
  auto second = make_problem(sizes, 512, true, 3, true);
  second.x = random_values(512 * 128, 1, 99, true);
  device_case<mixtral_like> direct(second, {}, {});
  direct.forward(ts::pass::train);
  direct.backward();
  direct.moe->end_step(direct.stream, direct.comm);
  direct.sync();

  device_case<mixtral_like> replayed(first, {}, {});
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(replayed.stream, cudaStreamCaptureModeThreadLocal));
  replayed.forward(ts::pass::train);
  replayed.backward();
  replayed.moe->end_step(replayed.stream, replayed.comm);
  check(cudaStreamEndCapture(replayed.stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphLaunch(exec, replayed.stream));
  replayed.sync();
  replayed.x.set(cast<ts::bfloat16>(second.x));
  check(cudaGraphLaunch(exec, replayed.stream));
  replayed.sync();
  CHECK(widened(replayed.y.get()) == widened(direct.y.get()));
  CHECK(widened(replayed.dx.get()) == widened(direct.dx.get()));
  CHECK(replayed.up_grad.get() == direct.up_grad.get());
  CHECK(replayed.gate_grad.get() == direct.gate_grad.get());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
}

TEST_CASE("logits that are not finite are reported by token") {
  auto p = make_problem({.num_experts = 8, .top_k = 2, .hidden = 64, .intermediate = 32}, 50, true, 3, true);
  p.x[7 * 64 + 3] = std::nan("");
  device_case<mixtral_like> c(p, {}, {});
  c.forward(ts::pass::train);
  std::string text;
  try {
    c.sync();
  } catch (const ts::invalid_argument& e) {
    text = e.what();
  }
  CHECK(text.find("token 7") != std::string::npos);
}

int main(int argc, char** argv) {
  using device_test::skips;
  if (skips(device_test::no_device()) || skips(message_of<ts::error>([] { ts::gemm::portable::device::current(); })))
    return device_test::skip_return_code;
  return doctest::Context(argc, argv).run();
}
