// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <array>
#include <cmath>
#include <limits>

#include <doctest/doctest.h>

#include <tessera/experts/activation.hpp>

namespace ts = tessera;

namespace {

constexpr double infinite = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// Golden values: PyTorch 2.15.0 in double (silu, gelu, relu and their autograd), and GPT-OSS's `_apply_gate` of
// transformers 5.23.0. The inputs keep off the clamp's bounds, where PyTorch's versions differ.
constexpr std::array gate{-9.0, -3.5, -1.0, -0.25, 0.0, 0.5, 2.0, 6.9, 6.5, 7.5};
constexpr std::array up{0.5, -8.0, 6.0, -6.5, 1.0, -0.75, 3.25, -1.5, 7.5, -2.0};
using golden = std::array<double, 10>;

// To 1e-14 of 1, or of the value where that is larger.
bool close(double value, double expected) {
  return std::abs(value - expected) <= 1e-14 * std::max(1.0, std::abs(expected));
}

template <class Activation>
void check_gated(const golden& forward, const golden& dgate, const golden& dup) {
  const typename Activation::options options{};
  for (std::size_t i = 0; i < gate.size(); ++i) {
    CAPTURE(gate[i]);
    CAPTURE(up[i]);
    double dg = not_a_number, du = not_a_number, dg3 = not_a_number, du3 = not_a_number;
    Activation::backward(gate[i], up[i], 1.0, dg, du, options);
    Activation::backward(gate[i], up[i], -3.0, dg3, du3, options);
    CHECK(close(Activation::forward(gate[i], up[i], options), forward[i]));
    CHECK(close(dg, dgate[i]));
    CHECK(close(du, dup[i]));
    CHECK(dg3 == doctest::Approx(-3 * dg).epsilon(1e-14));
    CHECK(du3 == doctest::Approx(-3 * du).epsilon(1e-14));
    const auto g = static_cast<float>(gate[i]), u = static_cast<float>(up[i]);
    CHECK(static_cast<double>(Activation::forward(g, u, options)) ==
          doctest::Approx(forward[i]).epsilon(1e-6).scale(1e-2));
  }
}

template <class Activation>
void check_plain(const golden& forward, const golden& dvalue) {
  const typename Activation::options options{};
  for (std::size_t i = 0; i < gate.size(); ++i) {
    CAPTURE(gate[i]);
    CHECK(close(Activation::forward(gate[i], options), forward[i]));
    CHECK(close(Activation::backward(gate[i], 1.0, options), dvalue[i]));
    CHECK(Activation::backward(gate[i], -3.0, options) ==
          doctest::Approx(-3 * Activation::backward(gate[i], 1.0, options)).epsilon(1e-14));
  }
}

// Central differences of `forward`, independent of the analytic gradient.
template <class Activation>
void check_differences(const typename Activation::options& options) {
  const double h = 1e-5;
  for (double g = -12.03; g < 12; g += 0.51)
    for (double u = -12.07; u < 12; u += 1.13) {
      CAPTURE(g);
      CAPTURE(u);
      if constexpr (Activation::gated) {
        double dg = not_a_number, du = not_a_number;
        Activation::backward(g, u, 1.0, dg, du, options);
        const auto f = [&](double a, double b) { return Activation::forward(a, b, options); };
        CHECK(std::abs(dg - (f(g + h, u) - f(g - h, u)) / (2 * h)) < 1e-8 * std::max(1.0, std::abs(u * g)));
        CHECK(std::abs(du - (f(g, u + h) - f(g, u - h)) / (2 * h)) < 1e-8 * std::max(1.0, std::abs(u * g)));
      } else {
        const auto f = [&](double a) { return Activation::forward(a, options); };
        CHECK(std::abs(Activation::backward(g, 1.0, options) - (f(g + h) - f(g - h)) / (2 * h)) < 1e-8);
      }
    }
}

struct no_backward {
  struct options {};
  static constexpr bool gated = true;
  template <class A>
  static A forward(A g, A u, const options&) {
    return g * u;
  }
};

static_assert(ts::activation_policy<ts::activation::swiglu> && ts::activation_policy<ts::activation::swiglu, double>);
static_assert(ts::activation_policy<ts::activation::geglu> && ts::activation_policy<ts::activation::geglu_tanh>);
static_assert(ts::activation_policy<ts::activation::clamped_swiglu> && ts::activation_policy<ts::activation::relu2>);
static_assert(ts::activation_policy<ts::activation::gelu, double>);
static_assert(!ts::activation_policy<no_backward> && ts::gated_activation_has_forward<no_backward, float> &&
              !ts::gated_activation_has_backward<no_backward, float>);
static_assert(!ts::activation_policy<int>);

}  // namespace

TEST_CASE("SwiGLU has the values and gradients of PyTorch") {
  check_gated<ts::activation::swiglu>(
      {-0.00055527559193804278, 0.82074246103797699, -1.6136485282199706, 0.71146318606057812, 0, -0.23342224920069549,
       5.7251810068562348, -10.339579922012115, 48.676817364984068, -14.991708320446147},
      {-0.00049350978594870417, 0.56218682262174513, 0.43397692877107957, -2.4458848597937153, 0.5,
       -0.55497089047698889, 3.5450488085509102, -1.5088994311272963, 7.5618139076172142, -2.0071815388166852},
      {-0.0011105511838760856, -0.10259280762974712, -0.2689414213699951, -0.10945587477855048, 0, 0.3112296656009273,
       1.7615941559557646, 6.8930532813414098, 6.4902423153312094, 7.4958541602230735});
}

TEST_CASE("GEGLU has the values and gradients of PyTorch's exact GELU") {
  check_gated<ts::activation::geglu>(
      {0, 0.0065136142129951224, -0.95193152358874211, 0.65210222076524893, 0, -0.25929842297775491, 6.3521241423368355,
       -10.34999999997309, 48.749999998042199, -14.99999999999952},
      {0, 0.022574082828996964, -0.49989282352611808, -1.980073193256366, 0.5, -0.65062134349212219, 3.5270033535041403,
       -1.5000000001855391, 7.5000000127128894, -2.0000000000035874},
      {0, -0.00081420177662439031, -0.15865525393145702, -0.10032341857926907, 0, 0.34573123063700656,
       1.9544997361036416, 6.8999999999820592, 6.4999999997389599, 7.4999999999997602});
}

TEST_CASE("GEGLU's tanh form has the values and gradients of PyTorch's") {
  check_gated<ts::activation::geglu_tanh>(
      {0, 0.0049295812429899222, -0.95284805635033942, 0.65211022043904754, 0, -0.25928550736885797, 6.3524425057852687,
       -10.349999999999989, 48.749999999995289, -15},
      {0, 0.019381150080933867, -0.49778450307469513, -1.980198381518107, 0.5, -0.65052742765098182, 3.5298225840267596,
       -1.5000000000001339, 7.5000000000493774, -2},
      {0, -0.00061619765537374027, -0.15880800939172324, -0.100324649298315, 0, 0.34571400982514394, 1.954597694087775,
       6.8999999999999924, 6.4999999999993721, 7.5});
}

TEST_CASE("clamped SwiGLU by default has the values and gradients of GPT-OSS") {
  check_gated<ts::activation::clamped_swiglu>(
      {-3.0047669798377649e-06, 0.05420067680868073, -1.0794296384702509, 0.54340192554893207, 0, 0.087597109151595035,
       8.226549148362885, -3.4499726127698831, 51.999184551234094, -6.9999531283033178},
      {-4.7802492636486376e-06, 0.076525549594950795, -0.47445724589433835, -1.6142475746415323, 1, 0.21980547799135358,
       4.5637152558113021, -0.50004264353184447, 8.0012624183787295, 0},
      {-2.0031779865585099e-06, 0, -0.1542042340671787, -0.098800350099805825, 0, 0.35038843660638014,
       1.9356586231442083, 6.8999452255397662, 0, 6.9999531283033178});
}

TEST_CASE("squared ReLU and GELU have the values and gradients of PyTorch") {
  check_plain<ts::activation::relu2>({0, 0, 0, 0, 0, 0.25, 4, 47.61, 42.25, 56.25},
                                     {0, 0, 0, 0, 0, 1, 4, 13.8, 13, 15});
  check_plain<ts::activation::gelu>(
      {0, -0.00081420177662439031, -0.15865525393145702, -0.10032341857926907, 0, 0.34573123063700656,
       1.9544997361036416, 6.8999999999820592, 6.4999999997389599, 7.4999999999997602},
      {0, -0.0028217603536246205, -0.083315470587686347, 0.304626645116364, 0.5, 0.86749512465616285,
       1.0852318010781969, 1.0000000001236928, 1.0000000016950519, 1.0000000000017937});
}

TEST_CASE("clamped SwiGLU passes the gradient on a bound and none beyond it") {
  const ts::activation::clamped_swiglu::options options{};
  const double above = std::nextafter(7.0, 8.0), below = std::nextafter(-7.0, -8.0);
  double dg = not_a_number, du = not_a_number;
  ts::activation::clamped_swiglu::backward(7.0, 7.0, 1.0, dg, du, options);
  const double sigmoid = 1 / (1 + std::exp(-1.702 * 7));
  CHECK(dg == doctest::Approx(8 * sigmoid * (1 + 1.702 * 7 * (1 - sigmoid))).epsilon(1e-14));
  CHECK(du == doctest::Approx(7 * sigmoid).epsilon(1e-14));
  ts::activation::clamped_swiglu::backward(1.0, -7.0, 1.0, dg, du, options);
  CHECK(du > 0);
  ts::activation::clamped_swiglu::backward(above, above, 1.0, dg, du, options);
  CHECK(dg == 0);
  CHECK(du == 0);
  ts::activation::clamped_swiglu::backward(-100.0, below, 1.0, dg, du, options);
  CHECK(du == 0);
  CHECK(dg != 0);  // the gate has no lower bound
}

TEST_CASE("clamped SwiGLU with a bound of 10, alpha 1 and no offset is a bounded SwiGLU") {
  const ts::activation::clamped_swiglu::options options{.limit = 10, .alpha = 1, .up_offset = 0};
  for (const auto& [g, u] : {std::pair{1.5, -9.5}, {9.9, 3.0}, {-20.0, 9.99}, {0.0, 2.0}})
    CHECK(ts::activation::clamped_swiglu::forward(g, u, options) == ts::activation::swiglu::forward(g, u, {}));
  CHECK(ts::activation::clamped_swiglu::forward(30.0, 40.0, options) ==
        ts::activation::swiglu::forward(10.0, 10.0, {}));
  CHECK(ts::activation::clamped_swiglu::forward(3.0, -40.0, options) ==
        ts::activation::swiglu::forward(3.0, -10.0, {}));
}

TEST_CASE("gradients of activations are those of central differences") {
  check_differences<ts::activation::swiglu>({});
  check_differences<ts::activation::geglu>({});
  check_differences<ts::activation::geglu_tanh>({});
  check_differences<ts::activation::clamped_swiglu>({});
  check_differences<ts::activation::clamped_swiglu>({.limit = 3.3, .alpha = 1, .up_offset = 0});
  check_differences<ts::activation::relu2>({});
  check_differences<ts::activation::gelu>({});
}

TEST_CASE("activations keep NaN and go to their limits for large values") {
  CHECK(std::isnan(ts::activation::swiglu::forward(not_a_number, 1.0, {})));
  CHECK(std::isnan(ts::activation::geglu::forward(1.0, not_a_number, {})));
  CHECK(std::isnan(ts::activation::geglu_tanh::forward(not_a_number, 1.0, {})));
  CHECK(std::isnan(ts::activation::clamped_swiglu::forward(not_a_number, 1.0, {})));
  CHECK(std::isnan(ts::activation::clamped_swiglu::forward(1.0, not_a_number, {})));
  CHECK(std::isnan(ts::activation::relu2::forward(not_a_number, {})));
  CHECK(std::isnan(ts::activation::gelu::forward(not_a_number, {})));
  CHECK(ts::activation::swiglu::forward(-3e38f, 1.0f, {}) == 0);
  CHECK(ts::activation::swiglu::forward(-1e300, 1.0, {}) == 0);
  CHECK(ts::activation::swiglu::forward(1e300, 1.0, {}) == 1e300);
  CHECK(ts::activation::swiglu::forward(3e38f, 1.0f, {}) == 3e38f);
  CHECK(ts::activation::geglu::forward(-1e3, 1.0, {}) == 0);
  CHECK(ts::activation::relu2::forward(-infinite, {}) == 0);
  double dg = not_a_number, du = not_a_number;
  ts::activation::swiglu::backward(-1e300, 2.0, 1.0, dg, du, {});
  CHECK(dg == 0);
  CHECK(du == 0);
}

TEST_CASE("the exponential is within two units in the last place, and 0 or infinity beyond its range") {
  double worst = 0;
  for (double x = -87.3; x < 88.7; x += 0.0137) {
    const auto f = static_cast<float>(x);
    const double exact = std::exp(static_cast<double>(f));
    const double ulp = static_cast<double>(std::nextafter(static_cast<float>(exact), INFINITY)) -
                       static_cast<double>(static_cast<float>(exact));
    worst = std::max(worst, std::abs(static_cast<double>(ts::detail::exp_of(f)) - exact) / ulp);
  }
  CHECK(worst < 2);
  long double worst_double = 0;
  for (double x = -708; x < 709; x += 0.1373) {
    const long double exact = std::exp(static_cast<long double>(x));
    const double rounded = static_cast<double>(exact);
    const long double ulp = static_cast<long double>(std::nextafter(rounded, infinite)) - rounded;
    worst_double = std::max(worst_double, std::abs(ts::detail::exp_of(x) - exact) / ulp);
  }
  CHECK(worst_double < 2);
  CHECK(ts::detail::exp_of(0.0f) == 1);
  CHECK(ts::detail::exp_of(0.0) == 1);
  CHECK(ts::detail::exp_of(-1e9f) == 0);
  CHECK(ts::detail::exp_of(-infinite) == 0);
  CHECK(ts::detail::exp_of(89.0f) == std::numeric_limits<float>::infinity());
  CHECK(ts::detail::exp_of(infinite) == infinite);
  CHECK(std::isnan(ts::detail::exp_of(not_a_number)));
  CHECK(ts::detail::exp_of(-100.0f) == doctest::Approx(std::exp(-100.0f)).epsilon(1e-4));  // subnormal
}
