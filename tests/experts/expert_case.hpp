// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A random problem for the experts and its solution by the formulas, in double, sharing no code with the library.
// Only the last class depends on the policies: the others would be compiled once for each combination.

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/experts/experts.hpp>

#include "../support/bits.hpp"

namespace expert_test {

namespace ts = tessera;
using tessera_test::same_bits;

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double normal_cdf(double x) { return (1 + std::erf(x / std::sqrt(2.0))) / 2; }

/// The formula of an activation, of gate and up; plain ones take the gate.
using formula = std::function<double(double, double)>;

inline formula formula_of(ts::activation::swiglu, ts::activation::no_options) {
  return [](double g, double u) { return g * sigmoid(g) * u; };
}
inline formula formula_of(ts::activation::geglu, ts::activation::no_options) {
  return [](double g, double u) { return g * normal_cdf(g) * u; };
}
inline formula formula_of(ts::activation::geglu_tanh, ts::activation::no_options) {
  return [](double g, double u) {
    return g / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (g + 0.044715 * g * g * g))) * u;
  };
}
inline formula formula_of(ts::activation::clamped_swiglu, ts::activation::clamped_swiglu::options o) {
  return [o](double gate, double up) {
    const double g = std::min(gate, o.limit), u = std::max(-o.limit, std::min(up, o.limit));
    return (u + o.up_offset) * g * sigmoid(o.alpha * g);
  };
}
inline formula formula_of(ts::activation::relu2, ts::activation::no_options) {
  return [](double h, double) { return h > 0 ? h * h : 0; };
}
inline formula formula_of(ts::activation::gelu, ts::activation::no_options) {
  return [](double h, double) { return h * normal_cdf(h); };
}

/// Rounds to an element type.
template <class S>
S rounded(double value) {
  if constexpr (std::is_same_v<S, ts::bfloat16>)
    return ts::bfloat16(static_cast<float>(value));
  else
    return static_cast<S>(value);
}
template <class S>
std::vector<S> rounded(const std::vector<double>& values) {
  std::vector<S> r;
  for (double e : values) r.push_back(rounded<S>(e));
  return r;
}

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

struct sizes {
  std::vector<int> rows_per_expert = {3, 0, 4};
  int tokens = 5, hidden = 5, intermediate = 3;
  bool bias = true;
  ts::weight_on applied = ts::weight_on::output;
  bool weighted = true;
  bool gathered = true;
  double spread = 1;  ///< Of inputs and up-projections.
};

/// Logical parameters of all experts: gate and up (plain: in `gate`), down, and biases, each `[expert][output][input]`.
struct parameters {
  std::vector<double> gate, up, down, gate_bias, up_bias, down_bias;
};

/// The problem, independent of storage and layout.
struct problem {
  sizes s;
  bool gated = true;
  formula act;
  int L = 0, P = 0, T = 0, d = 0, n = 0, width = 0;
  std::vector<std::int32_t> offsets, gather;
  std::vector<double> x, dy, weight;
  parameters p;

  /// Output of expert row `i` by the formulas.
  std::vector<double> row(int i, const std::vector<double>& tokens, const std::vector<double>& weights,
                          const parameters& q) const {
    int e = 0;
    while (i >= offsets[at(e) + 1]) ++e;
    const double in_weight = s.weighted && s.applied == ts::weight_on::input ? weights[at(i)] : 1;
    std::vector<double> activation, y;
    for (int j = 0; j < n; ++j) {
      double g = s.bias ? q.gate_bias[at(e * n + j)] : 0, u = s.bias ? q.up_bias[at(e * n + j)] : 0;
      for (int k = 0; k < d; ++k) {
        const double in = in_weight * tokens[at(gather[at(i)] * d + k)];
        g += in * q.gate[at((e * n + j) * d + k)];
        u += in * q.up[at((e * n + j) * d + k)];
      }
      activation.push_back(act(g, u));
    }
    for (int k = 0; k < d; ++k) {
      double sum = s.bias ? q.down_bias[at(e * d + k)] : 0;
      for (int j = 0; j < n; ++j) sum += activation[at(j)] * q.down[at((e * d + k) * n + j)];
      y.push_back(sum);
    }
    return y;
  }

  /// `sum_i <dy[gather[i]], (weight on output) * y[i]>`: what all gradients are of.
  double loss(const std::vector<double>& tokens, const std::vector<double>& weights, const parameters& q) const {
    double sum = 0;
    for (int i = 0; i < P; ++i) {
      const auto y = row(i, tokens, weights, q);
      const double w = s.weighted && s.applied == ts::weight_on::output ? weights[at(i)] : 1;
      for (int k = 0; k < d; ++k) sum += w * y[at(k)] * dy[at(gather[at(i)] * d + k)];
    }
    return sum;
  }
};

/// A random problem. Numbers are rounded by `round`, so that every side starts from the same ones.
inline problem random_problem(const sizes& s, bool gated, formula act, unsigned seed, double (*round)(double)) {
  problem r;
  r.s = s, r.gated = gated, r.act = std::move(act);
  r.L = static_cast<int>(s.rows_per_expert.size());
  r.T = s.tokens, r.d = s.hidden, r.n = s.intermediate;
  r.width = (gated ? 2 : 1) * r.n;
  r.offsets = {0};
  for (int count : s.rows_per_expert) r.offsets.push_back(r.offsets.back() + count);
  r.P = r.offsets.back();
  std::mt19937_64 engine(seed);
  const auto fill = [&](std::vector<double>& v, int count, double scale) {
    std::uniform_real_distribution<double> uniform(-scale, scale);
    v.resize(at(count));
    for (double& e : v) e = round(uniform(engine));
  };
  fill(r.x, r.T * r.d, s.spread), fill(r.dy, r.T * r.d, 1), fill(r.weight, r.P, 1);
  for (double& w : r.weight) w = round(std::abs(w) + 0.1);
  fill(r.p.gate, r.L * r.n * r.d, s.spread), fill(r.p.up, r.L * r.n * r.d, s.spread);
  fill(r.p.down, r.L * r.d * r.n, 1);
  fill(r.p.gate_bias, r.L * r.n, s.spread), fill(r.p.up_bias, r.L * r.n, s.spread), fill(r.p.down_bias, r.L * r.d, 1);
  std::uniform_int_distribution<std::int32_t> token(0, r.T - 1);
  for (int i = 0; i < r.P; ++i) r.gather.push_back(s.gathered ? token(engine) : i);
  return r;
}

/// `random_problem` for an activation and a storage type.
template <class Activation, class S>
problem make_problem(const sizes& s, unsigned seed, const typename Activation::options& options = {}) {
  return random_problem(s, Activation::gated, formula_of(Activation{}, options), seed,
                        [](double v) { return static_cast<double>(rounded<S>(v)); });
}

/// A layout, said in a second way.
struct order {
  bool inputs_first, interleaved;
};
template <class Layout>
struct order_of;
template <ts::weight_layout::orientation O, ts::weight_layout::gate_order G>
struct order_of<ts::weight_layout::policy<O, G>> {
  static constexpr order value{O == ts::weight_layout::orientation::in_out,
                               G == ts::weight_layout::gate_order::interleaved};
};

/// A problem's numbers in the types and the order of a library call, and room for the results.
template <class S, class A, class G>
struct arrays {
  int L, P, T, d, n, width;
  bool gated;
  order in;
  sizes s;
  std::vector<std::int32_t> offsets, gather;
  std::vector<S> x, dy, up, down, up_bias, down_bias;
  std::vector<A> weight;
  std::vector<S> y, dx;
  std::vector<A> dweight;
  std::vector<G> dup, ddown, dup_bias, ddown_bias;

  arrays(const problem& q, order o)
      : L(q.L),
        P(q.P),
        T(q.T),
        d(q.d),
        n(q.n),
        width(q.width),
        gated(q.gated),
        in(o),
        s(q.s),
        offsets(q.offsets),
        gather(q.gather),
        x(rounded<S>(q.x)),
        dy(rounded<S>(q.dy)),
        down_bias(rounded<S>(q.p.down_bias)),
        weight(rounded<A>(q.weight)) {
    up.resize(at(L * width * d)), down.resize(at(L * d * n)), up_bias.resize(at(L * width));
    for (int e = 0; e < L; ++e)
      for (int j = 0; j < n; ++j) {
        for (int k = 0; k < d; ++k) {
          const std::size_t logical = at((e * n + j) * d + k);
          up[up_element(e, gate_column(j), k)] = rounded<S>(q.p.gate[logical]);
          if (gated) up[up_element(e, up_column(j), k)] = rounded<S>(q.p.up[logical]);
          down[down_element(e, k, j)] = rounded<S>(q.p.down[at((e * d + k) * n + j)]);
        }
        up_bias[at(e * width + gate_column(j))] = rounded<S>(q.p.gate_bias[at(e * n + j)]);
        if (gated) up_bias[at(e * width + up_column(j))] = rounded<S>(q.p.up_bias[at(e * n + j)]);
      }
    poison();
  }

  /// NaN in all results.
  void poison() {
    const S s_nan = rounded<S>(std::nan(""));
    const G g_nan = rounded<G>(std::nan(""));
    y.assign(at(P * d), s_nan), dx.assign(at(P * d), s_nan), dweight.assign(at(P), static_cast<A>(std::nan("")));
    dup.assign(up.size(), g_nan), ddown.assign(down.size(), g_nan);
    dup_bias.assign(up_bias.size(), g_nan), ddown_bias.assign(down_bias.size(), g_nan);
  }

  int gate_column(int j) const { return gated && in.interleaved ? 2 * j : j; }
  int up_column(int j) const { return in.interleaved ? 2 * j + 1 : n + j; }
  std::size_t up_element(int e, int output, int input) const {
    return at(e * width * d + (in.inputs_first ? input * width + output : output * d + input));
  }
  std::size_t down_element(int e, int output, int input) const {
    return at(e * d * n + (in.inputs_first ? input * d + output : output * n + input));
  }

  ts::expert_rows rows() const { return {L, offsets.data(), s.gathered ? gather.data() : nullptr}; }
  ts::matrix_view<const S> x_view() const { return {x.data(), T, d}; }
  ts::matrix_view<const S> dy_view() const { return {dy.data(), T, d}; }
  ts::matrix_view<S> y_view() { return {y.data(), P, d}; }
  ts::matrix_view<S> dx_view() { return {dx.data(), P, d}; }
  ts::pair_weights<A> weighting() const { return {s.weighted ? weight.data() : nullptr, s.applied}; }
  ts::expert_weights<const S> weights() const {
    return {up.data(), down.data(), s.bias ? up_bias.data() : nullptr, s.bias ? down_bias.data() : nullptr};
  }
  ts::expert_weights<G> gradients() {
    return {dup.data(), ddown.data(), s.bias ? dup_bias.data() : nullptr, s.bias ? ddown_bias.data() : nullptr};
  }
};

/// Experts, a problem's arrays, and the memory that they need.
template <class Experts>
struct solution : arrays<typename Experts::storage, typename Experts::accumulate, typename Experts::gradient> {
  using base = arrays<typename Experts::storage, typename Experts::accumulate, typename Experts::gradient>;
  Experts experts;
  std::int64_t max_pairs;
  ts::host_buffer buffer;  // has exactly the bytes that counting gives
  typename Experts::saved_view saved;
  typename Experts::deferred_view deferred;
  typename Experts::forward_scratch forward_scratch;
  typename Experts::backward_input_scratch input_scratch;
  typename Experts::backward_weights_scratch weights_scratch;

  explicit solution(const problem& q, const typename Experts::options& options = {}, std::int64_t spare_rows = 2)
      : base(q, order_of<typename Experts::layout_type>::value),
        experts({.num_local_experts = q.L, .hidden = q.d, .intermediate = q.n, .bias = q.s.bias}, options),
        max_pairs(q.P + spare_rows) {
    ts::memory_builder counter;
    carve(counter);
    buffer = ts::host_buffer(counter.bytes());
    ts::memory_builder carver(ts::workspace_memory(buffer.data(), buffer.size()), "a test's buffer");
    carve(carver);
    REQUIRE(carver.bytes() == counter.bytes());
  }

  void carve(ts::memory_builder& memory) {
    saved = experts.carve_saved(memory, max_pairs);
    deferred = experts.carve_deferred(memory, max_pairs);
    forward_scratch = experts.carve_forward(memory, max_pairs, this->s.applied);
    input_scratch = experts.carve_backward_input(memory, max_pairs, this->s.applied);
    weights_scratch = experts.carve_backward_weights(memory, max_pairs, this->s.applied);
  }
  void forward() {
    experts.forward(ts::host_stream{}, this->rows(), this->x_view(), this->weighting(), this->weights(), saved,
                    this->y_view(), forward_scratch);
  }
  void backward_input() {
    experts.backward_input(ts::host_stream{}, this->rows(), this->x_view(), this->dy_view(), this->weighting(),
                           this->weights(), saved, deferred, this->dx_view(), this->dweight.data(), input_scratch);
  }
  void backward_weights(ts::write mode = ts::write::overwrite) {
    experts.backward_weights(ts::host_stream{}, this->rows(), this->x_view(), this->dy_view(), this->weighting(), saved,
                             deferred, this->gradients(), mode, weights_scratch);
  }
  void run() { forward(), backward_input(), backward_weights(); }
};

}  // namespace expert_test
