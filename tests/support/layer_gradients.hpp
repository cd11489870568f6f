// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Gradients of a whole layer against central differences in double.

#include <doctest/doctest.h>

#include <string>

#include "layer_fixture.hpp"

namespace tessera_test {

// sum(y * dy) + sum of losses: what the layer's backward differentiates.
template <class Layer>
double objective(const layer_problem& p, const typename Layer::layout_type& placement,
                 const std::vector<std::int64_t>& offsets, const typename Layer::router_options& routing,
                 const typename Layer::options& chosen) {
  std::int64_t most = 1;
  for (std::size_t r = 1; r < offsets.size(); ++r) most = std::max(most, offsets[r] - offsets[r - 1]);
  std::vector<double> parts(offsets.size() - 1);
  ts::comm::threads::run(placement.num_ranks(), [&](ts::comm::threads& comm) {
    const auto me = static_cast<std::size_t>(comm.rank());
    layer_rank<Layer> rank(p, placement, comm, offsets[me], offsets[me + 1] - offsets[me], most, routing, chosen);
    rank.forward(ts::pass::train);
    double sum = 0;
    for (std::size_t i = 0; i < rank.y.size(); ++i) sum += rank.y[i] * rank.dy[i];
    const auto& state = rank.layer->state();
    for (std::int64_t i = 0; i < rank.chunks * Layer::num_losses; ++i) sum += state.losses[i];
    parts[me] = sum;
  });
  double sum = 0;
  for (const double part : parts) sum += part;
  return sum;
}

// Checks `count` coordinates of every gradient.
template <class Layer>
void check_gradients(layer_problem p, const typename Layer::layout_type& placement,
                     const std::vector<std::int64_t>& offsets, const typename Layer::router_options& routing,
                     const typename Layer::options& chosen, int count) {
  static_assert(std::is_same_v<typename Layer::storage, double>);
  const layer_result got = run_problem<Layer>(p, placement, offsets, routing, chosen);
  std::mt19937 engine(99);
  const auto check = [&](const char* name, std::vector<double>& values, const std::vector<double>& gradient) {
    if (values.empty()) return;
    REQUIRE(values.size() == gradient.size());
    double largest = 0;
    for (int i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(engine() % values.size());
      const double step = 1e-5;
      const double old = values[at];
      values[at] = old + step;
      const double above = objective<Layer>(p, placement, offsets, routing, chosen);
      values[at] = old - step;
      const double below = objective<Layer>(p, placement, offsets, routing, chosen);
      values[at] = old;
      const double expected = (above - below) / (2 * step);
      CAPTURE(name);
      CAPTURE(at);
      CHECK(std::abs(gradient[at] - expected) <= 1e-6 * (1 + std::abs(expected)));
      largest = std::max(largest, std::abs(expected));
    }
    CAPTURE(name);
    CHECK(largest > 1e-9);  // something was there to be right or wrong
  };
  check("x", p.x, got.dx);
  check("gate", p.gate, got.gate);
  check("gate_bias", p.gate_bias, got.gate_bias);
  check("up", p.up, got.up);
  check("down", p.down, got.down);
  check("up_bias", p.up_bias, got.up_bias);
  check("down_bias", p.down_bias, got.down_bias);
  check("shared_up", p.shared_up, got.shared_up);
  check("shared_down", p.shared_down, got.shared_down);
  check("shared_up_bias", p.shared_up_bias, got.shared_up_bias);
  check("shared_down_bias", p.shared_down_bias, got.shared_down_bias);
}

}  // namespace tessera_test
