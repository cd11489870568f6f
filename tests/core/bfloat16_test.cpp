// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string_view>
#include <type_traits>

#include <tessera/core/dtype.hpp>
#include <tessera/core/precision.hpp>

namespace ts = tessera;

namespace {

ts::bfloat16 from_bits(std::uint32_t bits) {
  ts::bfloat16 value;
  value.bits = static_cast<std::uint16_t>(bits);
  return value;
}

// The value of a bfloat16 word by the definition of the format: sign, 8 exponent bits with bias 127, 7 mantissa bits.
double decode(std::uint32_t bits) {
  const int exponent = static_cast<int>((bits >> 7) & 0xffu);
  const double mantissa = static_cast<double>(bits & 0x7fu) / 128.0;
  const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
  if (exponent == 255) {
    return mantissa == 0.0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  return exponent == 0 ? sign * std::ldexp(mantissa, -126) : sign * std::ldexp(1.0 + mantissa, exponent - 127);
}

// Nearest bfloat16 to a finite float, ties to even, by arithmetic in double: scale so that neighbours are one apart.
double round_in_double(float value) {
  if (value == 0.0f) return static_cast<double>(value);
  int exponent = 0;
  std::frexp(value, &exponent);                          // |value| in [2^(exponent-1), 2^exponent)
  const int spacing = std::max(exponent - 8, -126 - 7);  // 8 significant bits, fewer below the normal range
  const double steps = std::ldexp(static_cast<double>(value), -spacing);
  const double below = std::floor(steps);
  const double rest = steps - below;  // exact
  double rounded = rest < 0.5 ? below : below + 1.0;
  if (rest == 0.5) rounded = std::fmod(below, 2.0) == 0.0 ? below : below + 1.0;
  const double result = std::ldexp(rounded, spacing);
  const double limit = std::ldexp(1.0, 128);  // where the next exponent would be infinity's
  if (std::abs(result) >= limit) return std::copysign(std::numeric_limits<double>::infinity(), result);
  return std::copysign(result, static_cast<double>(value));  // a small negative value rounds to -0
}

void check_rounding(float value) {
  const double expected = round_in_double(value);
  const ts::bfloat16 rounded(value);
  const double actual = decode(rounded.bits);
  CAPTURE(value);
  if (actual != expected || std::signbit(actual) != std::signbit(expected)) {
    CHECK_EQ(actual, expected);
    CHECK_EQ(std::signbit(actual), std::signbit(expected));
  }
}

}  // namespace

TEST_CASE("every bfloat16 word widens to the value that the format defines") {
  for (std::uint32_t bits = 0; bits < 65536u; ++bits) {
    const double expected = decode(bits);
    const auto actual = static_cast<double>(static_cast<float>(from_bits(bits)));
    const bool same = std::isnan(expected) ? std::isnan(actual)
                                           : actual == expected && std::signbit(actual) == std::signbit(expected);
    if (!same) FAIL("word " << bits << " widens to " << actual << ", expected " << expected);
  }
}

TEST_CASE("every bfloat16 word survives widening and rounding, and NaN stays a quiet NaN of the same sign") {
  for (std::uint32_t bits = 0; bits < 65536u; ++bits) {
    const bool is_nan = (bits & 0x7fffu) > 0x7f80u;
    const std::uint32_t expected = is_nan ? bits | 0x40u : bits;
    const std::uint32_t actual = ts::bfloat16(static_cast<float>(from_bits(bits))).bits;
    if (actual != expected) FAIL("word " << bits << " comes back as " << actual << ", expected " << expected);
  }
}

TEST_CASE("ties between neighbours go to the even word, in the normal and the denormal range") {
  for (std::uint32_t bits = 0; bits < 0x7f80u; ++bits) {  // every finite word and the one above it
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const std::uint32_t even = (bits & 1u) == 0 ? bits : bits + 1;
      const float middle = std::bit_cast<float>((sign | bits) << 16 | 0x8000u);
      const float under = std::bit_cast<float>((sign | bits) << 16 | 0x7fffu);
      const float over = std::bit_cast<float>((sign | bits) << 16 | 0x8001u);
      if (ts::bfloat16(middle).bits != (sign | even)) FAIL("tie above word " << bits);
      if (ts::bfloat16(under).bits != (sign | bits)) FAIL("below the tie above word " << bits);
      if (ts::bfloat16(over).bits != (sign | (bits + 1))) FAIL("above the tie above word " << bits);
    }
  }
}

TEST_CASE("rounding agrees with arithmetic in double on random floats of every magnitude") {
  std::mt19937 random(20260101);
  for (int i = 0; i < 1000000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isfinite(value)) check_rounding(value);
  }
  for (const float value : {std::numeric_limits<float>::max(), std::numeric_limits<float>::lowest(),
                            std::numeric_limits<float>::min(), std::numeric_limits<float>::denorm_min(),
                            -std::numeric_limits<float>::denorm_min(), 0.0f, -0.0f, 1.0f, 1.00390625f, 3.3961776e38f}) {
    check_rounding(value);
  }
}

TEST_CASE("infinity stays infinity, and the largest floats round up to it") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK_EQ(ts::bfloat16(infinity).bits, 0x7f80);
  CHECK_EQ(ts::bfloat16(-infinity).bits, 0xff80);
  CHECK_EQ(ts::bfloat16(std::numeric_limits<float>::max()).bits, 0x7f80);
  CHECK_EQ(ts::bfloat16(std::numeric_limits<float>::lowest()).bits, 0xff80);
}

TEST_CASE("a NaN whose payload lies in the dropped bits does not become infinity") {
  CHECK_EQ(ts::bfloat16(std::bit_cast<float>(0x7f800001u)).bits, 0x7fc0);
  CHECK_EQ(ts::bfloat16(std::bit_cast<float>(0xff80ffffu)).bits, 0xffc0);
  CHECK_EQ(ts::bfloat16(std::bit_cast<float>(0x7fffffffu)).bits, 0x7fff);
}

TEST_CASE("bfloat16 is two bytes, trivially copyable, constexpr, and never made from a number by accident") {
  static_assert(sizeof(ts::bfloat16) == 2 && alignof(ts::bfloat16) == 2);
  static_assert(std::is_trivially_copyable_v<ts::bfloat16> && std::is_trivially_default_constructible_v<ts::bfloat16>);
  static_assert(static_cast<float>(ts::bfloat16(1.5f)) == 1.5f);
  static_assert(!std::is_convertible_v<float, ts::bfloat16> && std::is_convertible_v<ts::bfloat16, float>);
}

TEST_CASE("element types have the names that safetensors files use") {
  const auto is = [](std::string_view name, std::string_view expected) { return name == expected; };
  CHECK(is(ts::dtype_name<double>(), "F64"));
  CHECK(is(ts::dtype_name<float>(), "F32"));
  CHECK(is(ts::dtype_name<ts::bfloat16>(), "BF16"));
  CHECK(is(ts::dtype_name<std::int64_t>(), "I64"));
  CHECK(is(ts::dtype_name<std::int32_t>(), "I32"));
  CHECK(is(ts::dtype_name<std::uint8_t>(), "U8"));
}

TEST_CASE("precision policies are recognised by their members") {
  struct own {
    using storage = ts::bfloat16;
    using accumulate = double;
    using gradient = float;
  };
  struct half_made {
    using storage = float;
  };
  static_assert(ts::precision_policy<ts::precision::fp64> && ts::precision_policy<ts::precision::bf16_gradients>);
  static_assert(ts::precision_policy<own> && !ts::precision_policy<half_made> && !ts::precision_policy<int>);
  static_assert(std::is_same_v<ts::precision::bf16::gradient, float>);
}
