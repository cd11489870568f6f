// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The exponential and what activations make of it, without branches and tables, so that loops over them vectorise.

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <tessera/core/dtype.hpp>

TESSERA_NAMESPACE_BEGIN
namespace detail {

/// `std::bit_cast`, which is a host function to nvcc.
template <class To, class From>
TESSERA_HD constexpr To reinterpret_bits(From from) {
  return __builtin_bit_cast(To, from);
}

/// Constants of `exp_of`: beyond `lowest` the result is 0, beyond `highest` infinity; `ln2_high` times any exponent in
/// between is exact; `integer_shift` is 1.5 * 2^mantissa_bits; the Taylor polynomial of `degree` is exact to a tenth of
/// a unit in the last place on |r| <= ln(2) / 2.
template <accumulate_type A>
struct exp_constants;

template <>
struct exp_constants<float> {
  using word = std::int32_t;
  static constexpr int degree = 7, mantissa_bits = 23, exponent_bias = 127;
  static constexpr float lowest = -105.0f, highest = 90.0f;
  static constexpr float integer_shift = 0x1.8p23f, infinity = std::numeric_limits<float>::infinity();
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;
};

template <>
struct exp_constants<double> {
  using word = std::int64_t;
  static constexpr int degree = 13, mantissa_bits = 52, exponent_bias = 1023;
  static constexpr double lowest = -746.0, highest = 711.0;
  static constexpr double integer_shift = 0x1.8p52, infinity = std::numeric_limits<double>::infinity();
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
};

template <class A, int K>
struct inverse_factorial {
  static constexpr A value = static_cast<A>(inverse_factorial<double, K - 1>::value / K);
};
template <class A>
struct inverse_factorial<A, 0> {
  static constexpr A value = A(1);
};

/// Sum of r^k / k! from `K` on, divided by r^K: Horner's rule, unrolled by the recursion.
template <int K, class A>
TESSERA_HD constexpr A exp_series(A r) {
  if constexpr (K == exp_constants<A>::degree)
    return inverse_factorial<A, K>::value;
  else
    return inverse_factorial<A, K>::value + r * exp_series<K + 1>(r);
}

/// 2^`exponent`, for exponents of normal numbers.
template <class A>
TESSERA_HD constexpr A power_of_two(std::int32_t exponent) {
  using constants = exp_constants<A>;
  using word = typename constants::word;
  return reinterpret_bits<A>(
      static_cast<word>(static_cast<word>(exponent + constants::exponent_bias) << constants::mantissa_bits));
}

/// `condition ? a : b`, by bit masks: of conditional expressions compilers make branches when an outcome is constant.
template <accumulate_type A>
TESSERA_HD constexpr A choose(bool condition, A a, A b) {
  using word = typename exp_constants<A>::word;
  const word mask = -static_cast<word>(condition);
  return reinterpret_bits<A>((reinterpret_bits<word>(a) & mask) | (reinterpret_bits<word>(b) & ~mask));
}

/// e^x to 2 units in the last place; 0 and infinity where it leaves the range, NaN for NaN. On the device, floats take
/// the hardware's exponential, 2 + |1.2 x| units: activations are computed between matrix products, where every
/// instruction shows.
template <accumulate_type A>
TESSERA_HD constexpr A exp_of(A x) {
#if TESSERA_DEVICE_PASS
  if constexpr (std::is_same_v<A, float>) return __expf(x);
#endif
  using constants = exp_constants<A>;
  using word = typename constants::word;
  // Adding 1.5 * 2^mantissa_bits leaves the nearest integer in the low bits. Unlike a conversion to an integer, that is
  // defined for NaN and for what is out of range.
  const A shifted = x * A(1.4426950408889634074) + constants::integer_shift;
  const auto exponent =
      static_cast<std::int32_t>(reinterpret_bits<word>(shifted) - reinterpret_bits<word>(constants::integer_shift));
  const A n = static_cast<A>(exponent);
  const A r = (x - n * constants::ln2_high) - n * constants::ln2_low;
  const std::int32_t half = exponent / 2;  // in two steps, because results may be subnormal or infinite
  const A inside = exp_series<0>(r) * power_of_two<A>(half) * power_of_two<A>(exponent - half);
  return choose(x < constants::lowest, A(0), choose(x > constants::highest, constants::infinity, inside));
}

/// 1 / (1 + e^-x).
template <accumulate_type A>
TESSERA_HD constexpr A sigmoid_of(A x) {
#if TESSERA_DEVICE_PASS
  if constexpr (std::is_same_v<A, float>) {
    // Two instructions of the special function unit. Without subnormal numbers, which make no difference to a number
    // that is added to 1, they need no scaling around them.
    float power, result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
    return result;
  }
#endif
  return A(1) / (A(1) + exp_of(-x));
}

/// The standard normal distribution function, exact in both tails.
template <accumulate_type A>
TESSERA_HD A normal_cdf(A x) {
  return A(0.5) * std::erfc(x * A(-0.70710678118654752440));
}

/// The standard normal density.
template <accumulate_type A>
TESSERA_HD constexpr A normal_density(A x) {
  return A(0.39894228040143267794) * exp_of(A(-0.5) * x * x);
}

}  // namespace detail
TESSERA_NAMESPACE_END
