// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The whole layer on one GPU at published shapes: gate, router, experts and combine, forward and backward, on N(0, 1)
// tokens with random routing. Work is counted as 6 T K n d forward and 12 T K n d backward; memory is what the layer
// asks of its engine beside weights and gradients.

#include <tessera/layout/block.hpp>
#include <tessera/moe/moe_layer.cuh>

#include "gpu_timing.cuh"
#include "layer_shape.hpp"

namespace {

namespace ts = tessera;
using namespace tessera_bench;
using ts::bfloat16;

constexpr layer_shape shapes[] = {
    {"7B_n256", 24576, 1536, 256, 128, 8},          {"30B_n256", 32768, 4096, 256, 256, 16},
    {"30B_n512", 32768, 4096, 512, 128, 8},         {"30B_n1024", 32768, 4096, 1024, 64, 4},
    {"120B_n1024", 32768, 4096, 1024, 128, 8},      {"Qwen3_30B_T8192", 8192, 2048, 768, 128, 8},
    {"Qwen3_30B_T32768", 32768, 2048, 768, 128, 8}, {"Mixtral_T8192", 8192, 4096, 14336, 8, 2},
};

using router = ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized>;
template <class Precision>
using layer_of = ts::moe_layer<router, ts::experts<ts::activation::swiglu, Precision>, ts::layout::block,
                               ts::comm::self<ts::space::device>, ts::combine::reduced,
                               ts::shape{.num_shared_experts = ts::shape::none}>;

// A layer with its memory, weights and tokens.
template <class Precision>
struct layer_case {
  using layer = layer_of<Precision>;
  using gradient = typename Precision::gradient;

  explicit layer_case(const layer_shape& s)
      : tokens(s.T),
        sizes{.num_experts = s.E,
              .top_k = s.K,
              .hidden = static_cast<int>(s.d),
              .intermediate = static_cast<int>(s.n),
              .max_tokens = s.T},
        placement(s.E, 1),
        bytes(layer::sizes(sizes, placement, 0)),
        state(static_cast<std::int64_t>(bytes.state_bytes)),
        saved(static_cast<std::int64_t>(bytes.saved_bytes)),
        deferred(static_cast<std::int64_t>(bytes.deferred_bytes)),
        workspace(static_cast<std::int64_t>(bytes.workspace_bytes)),
        x(s.T * s.d, 1, 1),
        dy(s.T * s.d, 2, 1),
        y(s.T * s.d),
        dx(s.T * s.d),
        up(s.E * 2 * s.n * s.d, 3, 1 / std::sqrt(static_cast<float>(s.d))),
        down(s.E * s.d * s.n, 4, 1 / std::sqrt(static_cast<float>(s.n))),
        gate(s.E * s.d, 5, 1 / std::sqrt(static_cast<float>(s.d))),
        dup(up.size()),
        ddown(down.size()),
        dgate(gate.size()),
        moe(sizes, {}, placement, comm, ts::state_memory(state.data(), static_cast<std::size_t>(bytes.state_bytes))) {
    moe.reset_state(cudaStreamLegacy);
    require(cudaMemset(dup.data(), 0, static_cast<std::size_t>(dup.size()) * sizeof(gradient)), "cudaMemset");
    require(cudaMemset(ddown.data(), 0, static_cast<std::size_t>(ddown.size()) * sizeof(gradient)), "cudaMemset");
  }

  ts::saved_memory saved_memory() const { return {saved.data(), bytes.saved_bytes}; }
  ts::workspace_memory workspace_memory() const { return {workspace.data(), bytes.workspace_bytes}; }
  typename layer::inputs inputs() const {
    return {.x = ts::matrix_view<const bfloat16>(x.data(), tokens, sizes.hidden)};
  }
  typename layer::weights weights() const {
    typename layer::weights w{};
    w.gate = {gate.data(), sizes.num_experts, sizes.hidden};
    w.experts.up = up.data();
    w.experts.down = down.data();
    return w;
  }
  typename layer::gradients gradients() const {
    typename layer::gradients g{};
    g.gate = dgate.data();
    g.experts.up = dup.data();
    g.experts.down = ddown.data();
    return g;
  }
  void forward(cudaStream_t stream) {
    moe.forward(stream, ts::pass::train, inputs(), weights(), {y.data(), tokens, sizes.hidden}, saved_memory(),
                workspace_memory());
  }
  void backward_input(cudaStream_t stream) {
    moe.backward_input(stream, inputs(), {dy.data(), tokens, sizes.hidden}, weights(), saved_memory(),
                       {dx.data(), tokens, sizes.hidden}, {deferred.data(), bytes.deferred_bytes}, workspace_memory());
  }
  void backward_weights(cudaStream_t stream, ts::write mode) {
    moe.backward_weights(stream, inputs(), {dy.data(), tokens, sizes.hidden}, saved_memory(),
                         {deferred.data(), bytes.deferred_bytes}, gradients(), mode);
  }

  std::int64_t tokens;
  ts::shape sizes;
  ts::layout::block placement;
  ts::layer_sizes bytes;
  device_array<std::byte> state, saved, deferred, workspace;
  device_array<bfloat16> x, dy, y, dx, up, down;
  device_array<float> gate;
  device_array<gradient> dup, ddown;
  device_array<float> dgate;
  ts::comm::self<ts::space::device> comm;
  layer moe;
};

void add_shape(const layer_shape& s) {
  const double unit = 2.0 * static_cast<double>(s.T) * s.K * static_cast<double>(s.n) * static_cast<double>(s.d);
  const double saved_bound = static_cast<double>(2 * s.T * s.d + 4 * s.T * s.K * s.n);
  const double workspace_bound = static_cast<double>(2 * s.T * s.K * (s.d + s.n));
  const std::string name = s.name;
  add_case(name + "/forward", [=](benchmark::State& state) {
    layer_case<ts::precision::bf16_gradients> c(s);
    report_time(state, median_us([&](cudaStream_t stream) { c.forward(stream); }, 3 * unit / 400e6), 3 * unit);
    state.counters["saved_bytes"] = static_cast<double>(c.bytes.saved_bytes + static_cast<std::size_t>(2 * s.T * s.d));
    state.counters["saved_of_bound"] = state.counters["saved_bytes"] / saved_bound;
    state.counters["workspace_bytes"] = static_cast<double>(c.bytes.workspace_bytes);
    state.counters["workspace_of_bound"] = static_cast<double>(c.bytes.workspace_bytes) / workspace_bound;
  });
  // Backward consumes the saved H, so forward runs ahead of each measured pass, untimed.
  add_case(name + "/backward", [=](benchmark::State& state) {
    layer_case<ts::precision::bf16_gradients> c(s);
    const double us = median_us(
        [&](cudaStream_t stream) {
          c.backward_input(stream);
          c.backward_weights(stream, ts::write::overwrite);
        },
        6 * unit / 400e6, [&](cudaStream_t stream) { c.forward(stream); });
    report_time(state, us, 6 * unit);
    state.counters["deferred_bytes"] = static_cast<double>(c.bytes.deferred_bytes);
  });
  add_case(name + "/backward_weights_bf16", [=](benchmark::State& state) {
    layer_case<ts::precision::bf16_gradients> c(s);
    c.forward(cudaStreamLegacy);
    c.backward_input(cudaStreamLegacy);
    report_time(
        state,
        median_us([&](cudaStream_t stream) { c.backward_weights(stream, ts::write::overwrite); }, 3 * unit / 400e6),
        3 * unit);
  });
  add_case(name + "/backward_weights_fp32_accumulate", [=](benchmark::State& state) {
    layer_case<ts::precision::bf16> c(s);
    c.forward(cudaStreamLegacy);
    c.backward_input(cudaStreamLegacy);
    report_time(
        state,
        median_us([&](cudaStream_t stream) { c.backward_weights(stream, ts::write::accumulate); }, 3 * unit / 400e6),
        3 * unit);
    // The gradient is read and written: the second roofline.
    state.counters["gradient_gbs"] =
        8.0 * 3 * s.E * static_cast<double>(s.n) * static_cast<double>(s.d) / (state.counters["us"] * 1e3);
  });
}

}  // namespace

int main(int argc, char** argv) {
  for (const layer_shape& s : shapes) add_shape(s);
  return run_on_gpu(argc, argv);
}
