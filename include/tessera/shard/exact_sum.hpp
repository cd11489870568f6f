// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Sums of squares without rounding, so that neither order nor division among ranks can change a bit of them.
///
/// A floating-point sum depends on the order of its terms, and sharding changes the order. Here the sum is a long
/// fixed-point number, which integer additions make exact and therefore associative; an all-reduce of int64 adds those
/// of all ranks, whatever algorithm it uses (Kulisch's accumulator with 32 bits to a digit).

#include <cmath>
#include <cstdint>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard {

/// A sum of squares, exact: `sum of fl(x * x)`, where the square of a float is exact in double and that of a double is
/// rounded once. An array of int64 without pointers: it may be summed over ranks element by element as one.
struct exact_sum {
  /// Digits of 32 bits, from `2^-1074` up; the two above the largest double leave room for 2^64 terms.
  static constexpr int num_digits = 68;
  /// Terms that fit between two calls of `carry`.
  static constexpr std::int64_t terms_per_carry = std::int64_t{1} << 29;

  std::int64_t digits[num_digits];  ///< Value `sum of digits[i] * 2^(32 i - 1074)`; each below 2^32 after `carry`.
  std::int64_t not_finite;          ///< Squares that are infinite or not a number; they are not in `digits`.

  /// Zero, with nothing that is not finite.
  TESSERA_HD void clear() { *this = exact_sum{}; }

  /// Adds the squares of `count` elements. @param values `[count]`, float, double or bfloat16. @param count How many.
  template <class T>
  void add_squares(const T* values, std::int64_t count) {
    for (std::int64_t first = 0; first < count; first += terms_per_carry) {
      const std::int64_t last = count - first < terms_per_carry ? count : first + terms_per_carry;
      for (std::int64_t i = first; i < last; ++i) {
        const auto x = static_cast<double>(values[i]);
        add_term(x * x);
      }
      carry();
    }
  }

  /// Adds another sum, for example of another group. @param other After `carry`.
  void add(const exact_sum& other) {
    for (int i = 0; i < num_digits; ++i) digits[i] += other.digits[i];
    not_finite += other.not_finite;
    carry();
  }

  /// Makes each digit less than 2^32 again: then equal sums have equal digits. Sums of up to 2^30 carried ones may be
  /// carried again.
  TESSERA_HD void carry() {
    std::int64_t over = 0;
    for (int i = 0; i < num_digits; ++i) {
      const std::int64_t digit = digits[i] + over;
      digits[i] = digit & 0xffffffff;
      over = digit >> 32;
    }
  }

  /// The sum as a double, within two units in the last place; equal sums give equal doubles. Infinite where it exceeds
  /// the largest double. Call `carry` first.
  TESSERA_HD double value() const {
    double sum = 0;
    for (int i = 0; i < num_digits; ++i) {
      if (digits[i] != 0) sum += ldexp(static_cast<double>(digits[i]), 32 * i - 1074);
    }
    return sum;
  }

 private:
  // `term` is not negative. Its 53 bits, shifted to a digit's border, touch three digits.
  void add_term(double term) {
    const auto bits = __builtin_bit_cast(std::uint64_t, term);
    const auto exponent = static_cast<int>(bits >> 52);
    if (exponent >= 2047) {  // also a NaN with its sign set
      ++not_finite;
      return;
    }
    const std::uint64_t fraction = bits & ((std::uint64_t{1} << 52) - 1);
    const std::uint64_t mantissa = exponent == 0 ? fraction : fraction | (std::uint64_t{1} << 52);
    const int position = exponent == 0 ? 0 : exponent - 1;
    const int shift = position & 31;
    const std::uint64_t low = mantissa << shift;
    std::int64_t* const digit = digits + (position >> 5);
    digit[0] += static_cast<std::int64_t>(low & 0xffffffff);
    digit[1] += static_cast<std::int64_t>(low >> 32);
    digit[2] += static_cast<std::int64_t>((mantissa >> 1) >> (63 - shift));
  }
};

/// What gradients are multiplied with so that their norm does not exceed `max_norm`:
/// `min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` has it.
/// @param norm Norm of all gradients, finite. @param max_norm The bound; 0 or less: no clipping, the factor is 1.
TESSERA_HD inline double clip_factor(double norm, double max_norm) {
  if (max_norm <= 0) return 1.0;
  const double factor = max_norm / (norm + 1e-6);
  return factor < 1.0 ? factor : 1.0;
}

}  // namespace shard
TESSERA_NAMESPACE_END
