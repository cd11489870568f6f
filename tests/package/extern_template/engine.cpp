// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// An engine's own code, compiled by a C++ compiler: it makes a layer, trains one step, and never sees how the layer
// works. ENGINE_SPACE says which memory it lives in; for device memory the calls land in the test's device half.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "calls.hpp"
#include "layers.hpp"

namespace ts = tessera;

namespace {

std::string calls;

constexpr bool on_host = std::is_same_v<ENGINE_SPACE, ts::space::host>;

auto make_stream() {
  if constexpr (on_host) {
    return ts::host_stream();
  } else {
    static int nothing;  // the test's device half does not look at it
    return ts::device_stream(reinterpret_cast<CUstream_st*>(&nothing));
  }
}

}  // namespace

void engine::record(const char* call) { calls += std::string(call) + ' '; }

int main() {
  using layer = engine::layer<ENGINE_SPACE>;
  constexpr int tokens = 6, hidden = 8, intermediate = 4, num_experts = 4;
  const ts::shape shape{
      .num_experts = num_experts, .top_k = 2, .hidden = hidden, .intermediate = intermediate, .max_tokens = tokens};
  const ts::layout::block placement(num_experts, 1);
  ts::comm::self<ENGINE_SPACE> comm;
  const ts::layer_sizes sizes = layer::sizes(shape, placement, 0);
  ts::host_buffer state(sizes.state_bytes), saved(sizes.saved_bytes), deferred(sizes.deferred_bytes),
      workspace(sizes.workspace_bytes);
  layer moe(shape, {}, placement, comm, state);

  std::vector<float> x(tokens * hidden), y(tokens * hidden), dx(tokens * hidden), gate(num_experts * hidden),
      up(num_experts * 2 * intermediate * hidden), down(num_experts * hidden * intermediate);
  for (auto* values : {&x, &gate, &up, &down}) {
    for (std::size_t i = 0; i < values->size(); ++i) {
      (*values)[i] = std::sin(static_cast<float>(i + values->size()));
    }
  }
  std::vector<float> gate_gradient(gate.size()), up_gradient(up.size()), down_gradient(down.size());

  const auto stream = make_stream();
  const layer::inputs in{.x = {x.data(), tokens, hidden}};
  const layer::weights weights{
      .gate = {gate.data(), num_experts, hidden}, .experts = {.up = up.data(), .down = down.data()}, .shared = {}};
  const layer::gradients gradients{
      .gate = gate_gradient.data(), .experts = {.up = up_gradient.data(), .down = down_gradient.data()}, .shared = {}};
  moe.reset_state(stream);
  moe.forward(stream, ts::pass::train, in, weights, {y.data(), tokens, hidden}, saved, workspace);
  moe.backward_input(stream, in, {y.data(), tokens, hidden}, weights, saved, {dx.data(), tokens, hidden}, deferred,
                     workspace);
  moe.backward_weights(stream, in, {y.data(), tokens, hidden}, saved, deferred, gradients, ts::write::overwrite);
  moe.end_step(stream, comm);

  if (!on_host) {
    std::printf("device half: %s\n", calls.c_str());
    return calls == "reset_state forward backward_input backward_weights end_step " ? 0 : 1;
  }
  // With dy = y, gradients reach every matrix.
  double squares[4] = {};
  const std::vector<float>* results[4] = {&y, &dx, &up_gradient, &down_gradient};
  for (int i = 0; i < 4; ++i) {
    for (const float value : *results[i]) squares[i] += static_cast<double>(value) * static_cast<double>(value);
  }
  std::printf("host half: |y|^2 = %g, |dx|^2 = %g, |dup|^2 = %g, |ddown|^2 = %g\n", squares[0], squares[1], squares[2],
              squares[3]);
  for (const double square : squares) {
    if (!(square > 0.0) || !std::isfinite(square)) return 1;
  }
  return 0;
}
