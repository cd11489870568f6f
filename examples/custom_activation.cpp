// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// An activation of one's own, in one's own file: SwiGLU whose up value is capped smoothly,
// silu(gate) * cap * tanh(up / cap). Runs two experts forward and backward and compares a gradient of each kind with
// central differences.

#include <cmath>
#include <cstdio>
#include <vector>

#include <tessera/experts/experts.hpp>

namespace ts = tessera;

struct soft_capped_swiglu {
  struct options {
    double cap = 4;
  };
  static constexpr bool gated = true;

  template <class A>
  TESSERA_HD static A forward(A gate, A up, const options& o) {
    const A cap = static_cast<A>(o.cap);
    return gate / (A(1) + std::exp(-gate)) * (cap * std::tanh(up / cap));
  }

  template <class A>
  TESSERA_HD static void backward(A gate, A up, A dout, A& dgate, A& dup, const options& o) {
    const A cap = static_cast<A>(o.cap), tanh = std::tanh(up / cap), sigmoid = A(1) / (A(1) + std::exp(-gate));
    dgate = dout * (cap * tanh) * (sigmoid * (A(1) + gate * (A(1) - sigmoid)));
    dup = dout * (gate * sigmoid) * (A(1) - tanh * tanh);
  }
};
static_assert(ts::activation_policy<soft_capped_swiglu>);

int main() {
  constexpr int d = 4, n = 6, num_experts = 2, num_tokens = 3, num_pairs = 5;
  const ts::experts<soft_capped_swiglu, ts::precision::fp64> experts(
      {.num_local_experts = num_experts, .hidden = d, .intermediate = n}, {.cap = 2});
  const auto wave = [](std::size_t count, double phase) {
    std::vector<double> v(count);
    for (std::size_t i = 0; i < count; ++i) v[i] = std::sin(1.7 * static_cast<double>(i) + phase);
    return v;
  };
  auto x = wave(num_tokens * d, 0), dy = wave(num_tokens * d, 1);
  auto up = wave(num_experts * 2 * n * d, 2), down = wave(num_experts * d * n, 3);
  std::vector<double> y(num_pairs * d), dx(y.size()), dup(up.size()), ddown(down.size());

  const std::int32_t row_offsets[] = {0, 2, 5}, gather[] = {0, 2, 0, 1, 2};  // expert 0: tokens 0, 2; expert 1: all
  const ts::expert_rows rows{num_experts, row_offsets, gather};
  const ts::expert_weights<const double> weights{up.data(), down.data()};
  const ts::matrix_view<const double> x_view(x.data(), num_tokens, d), dy_view(dy.data(), num_tokens, d);
  ts::host_buffer buffer(1 << 16);
  ts::memory_builder memory(ts::workspace_memory(buffer), "the example's buffer");
  const auto saved = experts.carve_saved(memory, num_pairs);        // forward to backward_weights
  const auto deferred = experts.carve_deferred(memory, num_pairs);  // backward_input to backward_weights
  const auto forward_scratch = experts.carve_forward(memory, num_pairs, ts::weight_on::output);
  const auto input_scratch = experts.carve_backward_input(memory, num_pairs, ts::weight_on::output);
  const auto weights_scratch = experts.carve_backward_weights(memory, num_pairs, ts::weight_on::output);
  const auto loss = [&] {  // sum over pairs of <y, dy>
    experts.forward({}, rows, x_view, {}, weights, saved, {y.data(), num_pairs, d}, forward_scratch);
    double sum = 0;
    for (std::size_t i = 0; i < num_pairs; ++i)
      for (std::size_t k = 0; k < d; ++k) sum += y[i * d + k] * dy[static_cast<std::size_t>(gather[i]) * d + k];
    return sum;
  };
  loss();
  experts.backward_input({}, rows, x_view, dy_view, {}, weights, saved, deferred, {dx.data(), num_pairs, d}, nullptr,
                         input_scratch);
  experts.backward_weights({}, rows, x_view, dy_view, {}, saved, deferred, {dup.data(), ddown.data()},
                           ts::write::overwrite, weights_scratch);

  bool passed = true;
  const auto compare = [&](const char* name, double analytic, double& value) {
    const double h = 1e-6, old = value;
    value = old + h;
    const double above = loss();
    value = old - h;
    const double difference = (above - loss()) / (2 * h);
    value = old;
    passed = passed && std::abs(analytic - difference) < 1e-7;
    std::printf("%-22s analytic %+.9f   central difference %+.9f\n", name, analytic, difference);
  };
  compare("token 0, element 1", dx[0 * d + 1] + dx[2 * d + 1], x[1]);  // rows 0 and 2 read token 0
  compare("up of expert 1", dup[2 * n * d + n * d + 7], up[2 * n * d + n * d + 7]);
  compare("down of expert 0", ddown[9], down[9]);
  return passed ? 0 : 1;
}
