// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Outputs and gradients against the formulas, over the product of policies.

#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include "expert_case.hpp"

namespace ts = tessera;
using namespace expert_test;

namespace {

// Error of `value` in units of the tolerance, and the largest seen.
struct worst_error {
  double relative, worst = 0;
  void see(double value, double expected, double scale) {
    const double error = std::abs(value - expected) / (relative * std::max(scale, std::abs(expected)));
    worst = !(error <= worst) ? error : worst;  // NaN is the worst
  }
  bool passes() const { return worst <= 1; }
};

using double_arrays = arrays<double, double, double>;

// Outputs against the formulas, all gradients against central differences of the loss.
void check_against(const problem& q, const double_arrays& r) {
  worst_error y{1e-12};
  for (int i = 0; i < q.P; ++i) {
    const auto expected = q.row(i, q.x, q.weight, q.p);
    for (int k = 0; k < q.d; ++k) y.see(r.y[at(i * q.d + k)], expected[at(k)], 1);
  }
  CHECK(y.passes());

  const double h = 1e-6;
  auto x = q.x, w = q.weight;
  auto p = q.p;
  const auto difference = [&](double& value) {
    const double old = value;
    value = old + h;
    const double above = q.loss(x, w, p);
    value = old - h;
    const double below = q.loss(x, w, p);
    value = old;
    return (above - below) / (2 * h);
  };
  worst_error dx{2e-7}, dweight{2e-7}, dup{2e-7}, ddown{2e-7}, dbias{2e-7};
  for (int t = 0; t < q.T; ++t)
    for (int k = 0; k < q.d; ++k) {
      double sum = 0;  // dx has a row for each pair
      for (int i = 0; i < q.P; ++i)
        if (q.gather[at(i)] == t) sum += r.dx[at(i * q.d + k)];
      dx.see(sum, difference(x[at(t * q.d + k)]), 1);
    }
  if (q.s.weighted)
    for (std::size_t i = 0; i < w.size(); ++i) dweight.see(r.dweight[i], difference(w[i]), 1);
  for (int e = 0; e < q.L; ++e) {
    for (int j = 0; j < q.n; ++j)
      for (int k = 0; k < q.d; ++k) {
        const std::size_t up = at((e * q.n + j) * q.d + k), down = at((e * q.d + k) * q.n + j);
        dup.see(r.dup[r.up_element(e, r.gate_column(j), k)], difference(p.gate[up]), 1);
        if (q.gated) dup.see(r.dup[r.up_element(e, r.up_column(j), k)], difference(p.up[up]), 1);
        ddown.see(r.ddown[r.down_element(e, k, j)], difference(p.down[down]), 1);
      }
    if (!q.s.bias) continue;
    for (int j = 0; j < q.n; ++j) {
      dbias.see(r.dup_bias[at(e * q.width + r.gate_column(j))], difference(p.gate_bias[at(e * q.n + j)]), 1);
      if (q.gated) dbias.see(r.dup_bias[at(e * q.width + r.up_column(j))], difference(p.up_bias[at(e * q.n + j)]), 1);
    }
    for (int k = 0; k < q.d; ++k) dbias.see(r.ddown_bias[at(e * q.d + k)], difference(p.down_bias[at(e * q.d + k)]), 1);
  }
  CHECK(dx.passes());
  CHECK(dweight.passes());
  CHECK(dup.passes());
  CHECK(ddown.passes());
  CHECK(dbias.passes());
}

template <class Activation, class Layout>
void check_case(const sizes& s, unsigned seed, const typename Activation::options& options = {}) {
  const auto q = make_problem<Activation, double>(s, seed, options);
  solution<ts::experts<Activation, ts::precision::fp64, Layout>> r(q, options);
  r.run();
  check_against(q, r);
}

template <class Activation, class Layout>
void check_placements(const char* name, const typename Activation::options& options = {}, double spread = 1) {
  unsigned seed = 1;
  for (bool bias : {false, true})
    for (auto applied : {ts::weight_on::output, ts::weight_on::input})
      for (bool weighted : {true, false}) {
        CAPTURE(name);
        CAPTURE(bias);
        CAPTURE(weighted);
        const bool on_input = applied == ts::weight_on::input;
        CAPTURE(on_input);
        sizes s;
        s.bias = bias, s.applied = applied, s.weighted = weighted, s.spread = spread;
        check_case<Activation, Layout>(s, seed++, options);
      }
}

template <class Activation>
void check_layouts(const typename Activation::options& options = {}, double spread = 1) {
  check_placements<Activation, ts::weight_layout::out_in_concatenated>("out_in_concatenated", options, spread);
  if constexpr (Activation::gated) {  // the order of gate and up means nothing to plain activations
    check_placements<Activation, ts::weight_layout::out_in_interleaved>("out_in_interleaved", options, spread);
    check_placements<Activation, ts::weight_layout::in_out_concatenated>("in_out_concatenated", options, spread);
  }
  check_placements<Activation, ts::weight_layout::in_out_interleaved>("in_out_interleaved", options, spread);
}

// Root mean square of the error over that of the expected values.
template <class T, class U>
double deviation(const std::vector<T>& values, const std::vector<U>& expected) {
  REQUIRE(values.size() == expected.size());
  double errors = 0, squares = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double right = static_cast<double>(expected[i]), error = static_cast<double>(values[i]) - right;
    errors += error * error;
    squares += right * right;
  }
  return std::sqrt(errors / squares);
}

// A precision's results against double on inputs that it represents exactly.
template <class Activation, class Precision, class Layout>
void check_precision(const sizes& s, double tolerance, const typename Activation::options& options = {}) {
  const auto q = make_problem<Activation, typename Precision::storage>(s, 99, options);
  solution<ts::experts<Activation, ts::precision::fp64, Layout>> e(q, options);  // proven by the cases above
  solution<ts::experts<Activation, Precision, Layout>> r(q, options);
  e.run(), r.run();
  CHECK(deviation(r.y, e.y) < tolerance);
  CHECK(deviation(r.dx, e.dx) < tolerance);
  CHECK(deviation(r.dweight, e.dweight) < tolerance);
  CHECK(deviation(r.dup, e.dup) < tolerance);
  CHECK(deviation(r.ddown, e.ddown) < tolerance);
  if (s.bias) CHECK(deviation(r.dup_bias, e.dup_bias) < tolerance);
  if (s.bias) CHECK(deviation(r.ddown_bias, e.ddown_bias) < tolerance);
}

}  // namespace

TEST_CASE("SwiGLU experts have the outputs and gradients of the formulas") { check_layouts<ts::activation::swiglu>(); }
TEST_CASE("GEGLU experts have the outputs and gradients of the formulas") { check_layouts<ts::activation::geglu>(); }
TEST_CASE("tanh-GEGLU experts have the outputs and gradients of the formulas") {
  check_layouts<ts::activation::geglu_tanh>();
}
TEST_CASE("GPT-OSS's experts have the outputs and gradients of the formulas, inside and beyond the bounds") {
  check_layouts<ts::activation::clamped_swiglu>();
  check_layouts<ts::activation::clamped_swiglu>({.limit = 1, .alpha = 1, .up_offset = 0});
  check_layouts<ts::activation::clamped_swiglu>({}, 3);
}
TEST_CASE("squared ReLU experts have the outputs and gradients of the formulas") {
  check_layouts<ts::activation::relu2>();
}
TEST_CASE("GELU experts have the outputs and gradients of the formulas") { check_layouts<ts::activation::gelu>(); }

TEST_CASE("widths around the block length have the outputs and gradients of the formulas") {
  for (int n : {1, 63, 64, 65, 130}) {
    CAPTURE(n);
    sizes s;
    s.intermediate = n, s.hidden = 2, s.rows_per_expert = {2, 1};
    check_case<ts::activation::swiglu, ts::weight_layout::out_in_concatenated>(s, 7);
    check_case<ts::activation::clamped_swiglu, ts::weight_layout::in_out_interleaved>(s, 8);
    check_case<ts::activation::gelu, ts::weight_layout::out_in_concatenated>(s, 9);
  }
  for (int d : {1, 63, 64, 65, 130}) {
    CAPTURE(d);
    sizes s;
    s.intermediate = 2, s.hidden = d, s.rows_per_expert = {2, 1}, s.spread = 0.3;
    check_case<ts::activation::swiglu, ts::weight_layout::out_in_interleaved>(s, 10);
    s.applied = ts::weight_on::input;
    check_case<ts::activation::relu2, ts::weight_layout::in_out_concatenated>(s, 11);
  }
}

TEST_CASE("single precision and bfloat16 stay within their rounding of double") {
  for (auto applied : {ts::weight_on::output, ts::weight_on::input}) {
    sizes s;
    s.rows_per_expert = {9, 0, 17, 1}, s.tokens = 11, s.hidden = 48, s.intermediate = 80, s.spread = 0.4;
    s.applied = applied;
    using ts::weight_layout::in_out_interleaved, ts::weight_layout::out_in_concatenated;
    check_precision<ts::activation::swiglu, ts::precision::fp32, out_in_concatenated>(s, 5e-7);
    check_precision<ts::activation::swiglu, ts::precision::bf16, out_in_concatenated>(s, 6e-3);
    check_precision<ts::activation::clamped_swiglu, ts::precision::bf16, in_out_interleaved>(s, 6e-3);
    check_precision<ts::activation::geglu, ts::precision::bf16_gradients, out_in_concatenated>(s, 6e-3);
  }
}
