// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <tessera/shard/adamw.hpp>

#include "../support/bits.hpp"

namespace {

namespace ts = tessera;
namespace sh = tessera::shard;
using tessera_test::same_bits;

double gradient_at(int i, int t) { return ((7 * i + 11 * t) % 13 - 6) / 4.0; }

// A tensor with everything that belongs to it.
template <class S, class A, class M>
struct owned {
  std::vector<S> parameter;
  std::vector<A> master, gradient;
  std::vector<M> m, v;

  explicit owned(std::size_t count) : parameter(count), master(count), gradient(count), m(count, M{}), v(count, M{}) {
    for (std::size_t i = 0; i < count; ++i) master[i] = static_cast<A>((static_cast<double>(i) - 2) * 0.75);
  }
  void set_gradient(int t) {
    for (std::size_t i = 0; i < gradient.size(); ++i) {
      gradient[i] = static_cast<A>(gradient_at(static_cast<int>(i), t) / (1 + static_cast<double>(i % 97)));
    }
  }
  sh::adamw_tensor<S, A, M> part(std::size_t first, std::size_t count, bool decays = true) {
    return {parameter.data() + first,
            master.data() + first,
            gradient.data() + first,
            m.data() + first,
            v.data() + first,
            static_cast<std::int64_t>(count),
            decays};
  }
};

// Values of torch 2 (torch.optim.AdamW, float64, foreach=False): lr = 0.01 t, betas (0.9, 0.95), eps 1e-8,
// parameters (i - 2) * 0.75, gradients ((7 i + 11 t) % 13 - 6) / 4.
TEST_CASE("AdamW gives what PyTorch gives") {
  const double after_1[] = {-1.50849999992, -0.7392500004,      -0.009999999933333333,
                            0.74925,        1.5084999999333333, 2.2377500003999997};
  const double after_7[] = {-1.5461581950767107, -0.7061853035892991, -0.10031611522696332,
                            0.8223623494883575,  1.4722922230124726,  2.2006259569973805};
  const double without_decay[] = {-1.58946005790203,  -0.725747551381476, -0.10255116782293569,
                                  0.8448570912015921, 1.513735723452047,  2.2635423686329066};
  const double mean[] = {0.08564437499999998,   0.09576472499999997,  -0.10892984999999997,
                         -0.010734499999999984, -0.15122239999999998, 0.11969127499999999};
  const double square[] = {0.29651783422851585, 0.2411477393066408, 0.30284946269531277,
                           0.2472038242187502,  0.2764008210937502, 0.2561368877441408};
  owned<double, double, double> a(6), b(6);
  const sh::adamw_options options{.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1};
  for (int t = 1; t <= 7; ++t) {
    for (int i = 0; i < 6; ++i) {
      a.gradient[static_cast<std::size_t>(i)] = gradient_at(i, t) / 4;  // the factor makes up for it
      b.gradient[static_cast<std::size_t>(i)] = gradient_at(i, t) / 4;
    }
    const sh::adamw_tensor<double, double, double> both[] = {a.part(0, 6), b.part(0, 6, false)};
    sh::adamw<double, double, double>({}, options, t, 0.01 * t, 4.0, both);
    for (std::size_t i = 0; i < 6 && t == 1; ++i) CHECK(a.master[i] == doctest::Approx(after_1[i]).epsilon(1e-14));
  }
  for (std::size_t i = 0; i < 6; ++i) {
    CHECK(a.master[i] == doctest::Approx(after_7[i]).epsilon(1e-14));
    CHECK(b.master[i] == doctest::Approx(without_decay[i]).epsilon(1e-14));
    CHECK(a.m[i] == doctest::Approx(mean[i]).epsilon(1e-13));
    CHECK(a.v[i] == doctest::Approx(square[i]).epsilon(1e-13));
    CHECK(a.parameter[i] == a.master[i]);
  }
}

TEST_CASE("single precision and bf16 moments follow the formula in double as far as they can") {
  constexpr std::size_t count = 1000;
  owned<double, double, double> exact(count);
  owned<ts::bfloat16, float, float> single(count);
  owned<ts::bfloat16, float, ts::bfloat16> half(count);
  const sh::adamw_options options{.beta2 = 0.95, .weight_decay = 0.05};
  for (int t = 1; t <= 20; ++t) {
    exact.set_gradient(t);
    single.set_gradient(t);
    half.set_gradient(t);
    // written out, not through the library
    for (std::size_t i = 0; i < count; ++i) {
      const double g = 0.5 * exact.gradient[i];
      exact.m[i] = 0.9 * exact.m[i] + 0.1 * g;
      exact.v[i] = 0.95 * exact.v[i] + 0.05 * g * g;
      const double mean = exact.m[i] / (1 - std::pow(0.9, t)), square = exact.v[i] / (1 - std::pow(0.95, t));
      exact.master[i] = exact.master[i] * (1 - 1e-2 * 0.05) - 1e-2 * mean / (std::sqrt(square) + 1e-8);
    }
    const sh::adamw_tensor<ts::bfloat16, float, float> a = single.part(0, count);
    const sh::adamw_tensor<ts::bfloat16, float, ts::bfloat16> b = half.part(0, count);
    sh::adamw<ts::bfloat16, float, float>({}, options, t, 1e-2, 0.5, {&a, 1});
    sh::adamw<ts::bfloat16, float, ts::bfloat16>({}, options, t, 1e-2, 0.5, {&b, 1});
  }
  double worst_single = 0, worst_half = 0;
  bool rounded = true;
  for (std::size_t i = 0; i < count; ++i) {
    const double scale = std::max(1.0, std::abs(exact.master[i]));
    worst_single = std::max(worst_single, std::abs(static_cast<double>(single.master[i]) - exact.master[i]) / scale);
    worst_half = std::max(worst_half, std::abs(static_cast<double>(half.master[i]) - exact.master[i]) / scale);
    rounded = rounded && single.parameter[i].bits == ts::bfloat16(single.master[i]).bits;
  }
  CHECK(worst_single < 3e-6);
  CHECK(worst_half < 3e-3);  // 20 steps of 1e-2, each with a relative error of 2^-8 or so
  CHECK(worst_half > 1e-6);  // or the moments are not bf16
  CHECK(rounded);
}

template <class S, class A, class M>
void check_pieces() {
  constexpr std::size_t count = 1500;
  owned<S, A, M> whole(count), pieces(count);
  for (int t = 1; t <= 3; ++t) {
    whole.set_gradient(t);
    pieces.set_gradient(t);
    const sh::adamw_tensor<S, A, M> one = whole.part(0, count);
    sh::adamw<S, A, M>({}, {}, t, 3e-3, 0.7, {&one, 1});
    // pieces of sizes and alignments that no block divides
    std::vector<sh::adamw_tensor<S, A, M>> list;
    for (std::size_t first = 0, size = 1; first < count; first += size, size = (size * 7 + 3) % 401) {
      list.push_back(pieces.part(first, std::min(size, count - first)));
    }
    sh::adamw<S, A, M>({}, {}, t, 3e-3, 0.7, list);
    CHECK(same_bits(whole.master, pieces.master));
    CHECK(same_bits(whole.parameter, pieces.parameter));
    CHECK(same_bits(whole.m, pieces.m));
    CHECK(same_bits(whole.v, pieces.v));
  }
}

TEST_CASE("an update has the same bits however tensors are cut") {
  check_pieces<ts::bfloat16, float, ts::bfloat16>();
  check_pieces<float, float, float>();
  check_pieces<double, double, double>();
}

TEST_CASE("coefficients out of range and tensors without data are refused, and nothing changes") {
  owned<float, float, float> a(4);
  a.set_gradient(1);
  const owned<float, float, float> before = a;
  auto t = a.part(0, 4);
  const auto refused = [&](sh::adamw_options o, std::int64_t step, double rate, double scale) {
    CHECK_THROWS_AS((sh::adamw<float, float, float>({}, o, step, rate, scale, {&t, 1})), ts::invalid_argument);
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  refused({.beta1 = 1.0}, 1, 1e-3, 1);
  refused({.beta2 = -0.1}, 1, 1e-3, 1);
  refused({.epsilon = -1}, 1, 1e-3, 1);
  refused({.weight_decay = nan}, 1, 1e-3, 1);
  refused({}, 0, 1e-3, 1);
  refused({}, 1, nan, 1);
  refused({}, 1, 1e-3, nan);
  t.exp_avg = nullptr;
  refused({}, 1, 1e-3, 1);
  CHECK(same_bits(a.master, before.master));
}

}  // namespace
