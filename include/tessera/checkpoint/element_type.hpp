// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Element types of stored tensors: their names in files, and their sizes.

#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

#include <tessera/core/dtype.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// Type of a stored tensor's elements. Its values are only moved, never computed with, so types that the library has no
/// arithmetic for can be stored too.
enum class element_type : std::uint8_t {
  f64,      ///< double
  f32,      ///< float
  f16,      ///< IEEE half
  bf16,     ///< bfloat16
  f8_e4m3,  ///< 8-bit floating point, 4 exponent bits
  f8_e5m2,  ///< 8-bit floating point, 5 exponent bits
  i64,      ///< std::int64_t
  i32,      ///< std::int32_t
  i16,      ///< std::int16_t
  i8,       ///< std::int8_t
  u64,      ///< std::uint64_t
  u32,      ///< std::uint32_t
  u16,      ///< std::uint16_t
  u8,       ///< std::uint8_t
  boolean,  ///< One byte, 0 or 1
};

/// Number of element types.
inline constexpr int num_element_types = 15;

/// Name of a type in files (the safetensors names).
constexpr std::string_view name_of(element_type type) {
  constexpr std::string_view names[num_element_types] = {
      "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"};
  return names[static_cast<int>(type)];
}

/// Bytes of one element.
constexpr std::int64_t size_of(element_type type) {
  constexpr std::int64_t sizes[num_element_types] = {8, 4, 2, 2, 1, 1, 8, 4, 2, 1, 8, 4, 2, 1, 1};
  return sizes[static_cast<int>(type)];
}

/// The type with this name in files; nothing if there is none.
constexpr std::optional<element_type> element_type_named(std::string_view name) {
  for (int i = 0; i < num_element_types; ++i) {
    if (name_of(static_cast<element_type>(i)) == name) return static_cast<element_type>(i);
  }
  return std::nullopt;
}

/// The stored type of a C++ type.
template <class T>
constexpr element_type element_type_of() {
  using U = std::remove_cv_t<T>;
  constexpr bool floating = std::is_same_v<U, double> || std::is_same_v<U, float> || std::is_same_v<U, bfloat16>;
  static_assert(
      floating || (std::is_integral_v<U> && sizeof(U) <= 8),
      "A tensor's elements must be double, float, tessera::bfloat16, bool or an integer of 1 to 8 bytes; state "
      "the element_type by hand for other types.");
  if constexpr (std::is_same_v<U, double>) return element_type::f64;
  if constexpr (std::is_same_v<U, float>) return element_type::f32;
  if constexpr (std::is_same_v<U, bfloat16>) return element_type::bf16;
  if constexpr (std::is_same_v<U, bool>) return element_type::boolean;
  if constexpr (std::is_signed_v<U>) {
    return sizeof(U) == 8   ? element_type::i64
           : sizeof(U) == 4 ? element_type::i32
           : sizeof(U) == 2 ? element_type::i16
                            : element_type::i8;
  }
  return sizeof(U) == 8   ? element_type::u64
         : sizeof(U) == 4 ? element_type::u32
         : sizeof(U) == 2 ? element_type::u16
                          : element_type::u8;
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
