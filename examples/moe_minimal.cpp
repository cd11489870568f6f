// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The smallest use of a layer: one training step on four ranks. The README shows the part between the markers.

#include <cstdio>
#include <vector>

//! [minimal]
#include <tessera/tessera.hpp>
namespace ts = tessera;

using router = ts::router<ts::score::sigmoid, ts::select::top_k, ts::weigh::normalized, ts::balance::bias>;
using experts = ts::experts<ts::activation::swiglu, ts::precision::fp32>;
using layer = ts::moe_layer<router, experts, ts::layout::block, ts::comm::threads>;

constexpr ts::shape model{.num_experts = 16, .top_k = 4, .hidden = 32, .intermediate = 64, .max_tokens = 128};

// Every rank calls this with its own tokens x [T, d]; memory of layer::sizes() bytes and all tensors are the engine's.
void step(layer& moe, const layer::inputs& in, const layer::weights& weights, ts::matrix_view<float> y,
          ts::matrix_view<const float> dy, ts::matrix_view<float> dx, const layer::gradients& gradients,
          ts::saved_memory saved, ts::deferred_memory deferred, ts::workspace_memory workspace) {
  moe.forward({}, ts::pass::train, in, weights, y, saved, workspace);
  moe.backward_input({}, in, dy, weights, saved, dx, deferred, workspace);
  moe.backward_weights({}, in, dy, saved, deferred, gradients, ts::write::overwrite);  // now, or later (ZeroBubble)
  moe.end_step({}, moe.comm());  // moves the balancing bias by the load of all ranks
}
//! [minimal]

namespace {

constexpr int tokens = 100;  // of one rank

void train(ts::comm::threads& comm) {
  const ts::layout::block placement(model.num_experts, comm.size());
  const ts::layer_sizes bytes = layer::sizes(model, placement, comm.rank());
  ts::host_buffer state(bytes.state_bytes), saved(bytes.saved_bytes), deferred(bytes.deferred_bytes);
  ts::host_buffer workspace(bytes.workspace_bytes);
  layer moe(model, {.weigh = {.scale = 2.5f}}, placement, comm, state);
  moe.reset_state({});

  const auto slots = static_cast<std::size_t>(placement.num_slots(comm.rank()));
  const std::size_t width = 32, inner = 64;
  std::vector<float> gate(16 * width), up(slots * 2 * inner * width, 0.1f), down(slots * width * inner, 0.1f);
  std::vector<float> x(tokens * width), y(x.size()), dy(x.size(), 1.0f), dx(x.size());
  for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = static_cast<float>(i % 7) * 0.1f - 0.3f;
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<float>((i + 3 * std::size_t(comm.rank())) % 11) * 0.2f - 1;
  std::vector<float> gate_gradient(gate.size()), up_gradient(up.size()), down_gradient(down.size());

  step(moe, {.x = {x.data(), tokens, model.hidden}},
       {.gate = {gate.data(), model.num_experts, model.hidden}, .experts = {up.data(), down.data()}},
       {y.data(), tokens, model.hidden}, {dy.data(), tokens, model.hidden}, {dx.data(), tokens, model.hidden},
       {.gate = gate_gradient.data(), .experts = {up_gradient.data(), down_gradient.data()}}, saved, deferred,
       workspace);

  if (comm.rank() != 0) return;
  std::printf("y[0] = %g, dx[0] = %g; pairs of each expert over all ranks:", double(y[0]), double(dx[0]));
  for (int e = 0; e < model.num_experts; ++e) std::printf(" %ld", long(moe.state().global_load[e]));
  std::printf("\n");
}

}  // namespace

int main() {
  try {
    ts::comm::threads::run(4, train);
  } catch (const ts::error& e) {
    std::fprintf(stderr, "moe_minimal: %s\n", e.what());
    return 1;
  }
}
