// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Element types: `bfloat16` as a storage type, and the names that errors, states and checkpoints use.

#include <cstdint>
#include <string_view>
#include <type_traits>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// Brain floating point, for storage only: arithmetic happens in the accumulation type.
/// Bit-compatible with `__nv_bfloat16`, so that views of either may be reinterpreted. It needs no CUDA header.
struct bfloat16 {
  /// Sign, 8 exponent bits, 7 mantissa bits.
  std::uint16_t bits;

  bfloat16() = default;

  /// Rounds to nearest, ties to even; NaN stays (quiet) NaN.
  TESSERA_HD constexpr explicit bfloat16(float value) : bits(round(value)) {}

  /// Exact.
  TESSERA_HD constexpr operator float() const {  // NOLINT: widening is exact, so it may be implicit
    // the builtin, because std::bit_cast is a host function to nvcc
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
  }

 private:
  TESSERA_HD static constexpr std::uint16_t round(float value) {
    const auto word = __builtin_bit_cast(std::uint32_t, value);
    const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = word + 0x7fffu + ((word >> 16) & 1u);
    return static_cast<std::uint16_t>(is_nan ? ((word >> 16) | 0x40u) : (rounded >> 16));
  }
};
static_assert(sizeof(bfloat16) == 2 && std::is_trivially_copyable_v<bfloat16>);

/// Name of an element type, as states and checkpoints spell it (the safetensors names).
template <class T>
constexpr std::string_view dtype_name() {
  if constexpr (std::is_same_v<T, double>) return "F64";
  if constexpr (std::is_same_v<T, float>) return "F32";
  if constexpr (std::is_same_v<T, bfloat16>) return "BF16";
  if constexpr (std::is_same_v<T, std::int64_t>) return "I64";
  if constexpr (std::is_same_v<T, std::int32_t>) return "I32";
  if constexpr (std::is_same_v<T, std::uint8_t>) return "U8";
}

/// Element types of activations and weights.
template <class T>
concept storage_type = std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, bfloat16>;

/// Element types of sums.
template <class T>
concept accumulate_type = std::is_same_v<T, float> || std::is_same_v<T, double>;

TESSERA_NAMESPACE_END
