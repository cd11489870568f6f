// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include <tessera/core/dtype.hpp>
#include <tessera/shard/exact_sum.hpp>

namespace {

namespace ts = tessera;
namespace sh = tessera::shard;

template <class T>
double sum_of_squares(const std::vector<T>& values) {
  sh::exact_sum sum;
  sum.clear();
  sum.add_squares(values.data(), static_cast<std::int64_t>(values.size()));
  return sum.value();
}

// Magnitudes from 10^-30 to 10^5, so that the order of an ordinary sum shows.
template <class T>
std::vector<T> wild(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<double> exponent(-30, 5), mantissa(-1, 1);
  std::vector<T> values;
  for (std::size_t i = 0; i < count; ++i) {
    values.push_back(static_cast<T>(mantissa(generator) * std::pow(10.0, exponent(generator))));
  }
  return values;
}

TEST_CASE("an exact sum of squares is right, in integers and against long double") {
  CHECK(sum_of_squares(std::vector<float>{}) == 0.0);
  CHECK(sum_of_squares(std::vector<float>{3.0F, -4.0F}) == 25.0);
  CHECK(sum_of_squares(std::vector<ts::bfloat16>{ts::bfloat16(3.0F), ts::bfloat16(-4.0F)}) == 25.0);
  std::vector<double> counting;
  for (int i = 1; i <= 1000; ++i) counting.push_back(i);
  CHECK(sum_of_squares(counting) == 333833500.0);
  const auto values = wild<float>(20000, 1);
  long double expected = 0;
  for (const float x : values) expected += static_cast<long double>(x) * static_cast<long double>(x);
  CHECK(std::abs(sum_of_squares(values) / static_cast<double>(expected) - 1) < 1e-15);
  // 2^53 and a lot of ones, which a double cannot add one by one
  std::vector<double> ones(1025, 1.0);
  ones[0] = std::ldexp(1.0, 30);
  CHECK(sum_of_squares(ones) == std::ldexp(1.0, 60) + 1024);
}

TEST_CASE("it has the same bits in every order and every division, where a sum in double has not") {
  auto values = wild<double>(5000, 2);
  const double expected = sum_of_squares(values);
  double plain = 0;
  for (const double x : values) plain += x * x;
  bool plain_differs = false;
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::shuffle(values.begin(), values.end(), std::mt19937(seed));
    CHECK(sum_of_squares(values) == expected);
    double sum = 0;
    for (const double x : values) sum += x * x;
    plain_differs = plain_differs || sum != plain;
    sh::exact_sum total, part;
    total.clear();
    for (std::size_t first = 0; first < values.size(); first += 613) {
      part.clear();
      part.add_squares(values.data() + first,
                       static_cast<std::int64_t>(std::min<std::size_t>(613, values.size() - first)));
      total.add(part);
    }
    CHECK(total.value() == expected);
  }
  CHECK(plain_differs);
}

TEST_CASE("the smallest and the largest numbers count; what is not finite is counted apart") {
  const double tiny = std::ldexp(1.0, -537), huge = std::ldexp(1.0, 511);  // squares: the smallest double, 2^1022
  CHECK(sum_of_squares(std::vector<double>{tiny}) == std::numeric_limits<double>::denorm_min());
  CHECK(sum_of_squares(std::vector<double>{tiny, tiny, tiny}) == 3 * std::numeric_limits<double>::denorm_min());
  CHECK(sum_of_squares(std::vector<double>{huge}) == std::ldexp(1.0, 1022));
  CHECK(std::isinf(sum_of_squares(std::vector<double>(4, huge))));
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinite = std::numeric_limits<float>::infinity();
  const std::vector<float> values{1.0F, nan, -nan, infinite, -infinite, 2.0F};
  sh::exact_sum sum;
  sum.clear();
  sum.add_squares(values.data(), 6);
  CHECK(sum.not_finite == 4);
  CHECK(sum.value() == 5.0);
}

TEST_CASE("the clip factor is PyTorch's") {
  CHECK(sh::clip_factor(0.5, 1.0) == 1.0);
  CHECK(sh::clip_factor(4.0, 1.0) == 1.0 / (4.0 + 1e-6));
  CHECK(sh::clip_factor(0.0, 1.0) == 1.0);
  CHECK(sh::clip_factor(100.0, 0.0) == 1.0);
}

}  // namespace
