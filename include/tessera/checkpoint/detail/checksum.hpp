// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Checksums of what is stored: XXH3, 64 bits.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

// Inlined, so that there is nothing to link and no symbol to clash with.
#if !defined(XXH_INLINE_ALL)
#define XXH_INLINE_ALL
#define TESSERA_XXH_INLINE_ALL
#endif
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__) && !defined(XXH_VECTOR)
#define XXH_VECTOR 2  // AVX2: the same values; gcc 12 warns of its own AVX-512 intrinsics wherever they are inlined
#define TESSERA_XXH_VECTOR
#endif
#include <xxhash.h>
#if defined(TESSERA_XXH_VECTOR)
#undef TESSERA_XXH_VECTOR
#undef XXH_VECTOR
#endif
#if defined(TESSERA_XXH_INLINE_ALL)
#undef TESSERA_XXH_INLINE_ALL
#undef XXH_INLINE_ALL
#endif

#if XXH_VERSION_NUMBER < 800
#error "tessera::checkpoint needs xxHash 0.8 or later: the values of XXH3 were not settled before."
#endif

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

/// Checksum of `bytes` bytes.
inline std::uint64_t checksum_of(const void* data, std::int64_t bytes) {
  return XXH3_64bits(data, static_cast<std::size_t>(bytes));
}
inline std::uint64_t checksum_of(std::string_view text) { return XXH3_64bits(text.data(), text.size()); }

/// A checksum as files spell it: 16 hexadecimal digits.
inline std::string checksum_text(std::uint64_t checksum) {
  std::string text(16, '0');
  for (std::size_t i = 16; i-- > 0; checksum >>= 4) text[i] = "0123456789abcdef"[checksum & 15];
  return text;
}

/// The other way round. @return False if this is no checksum.
inline bool read_checksum(std::string_view text, std::uint64_t& checksum) {
  if (text.size() != 16) return false;
  checksum = 0;
  for (const char c : text) {
    const std::size_t digit = std::string_view("0123456789abcdef").find(c);
    if (digit == std::string_view::npos) return false;
    checksum = checksum << 4 | digit;
  }
  return true;
}

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
