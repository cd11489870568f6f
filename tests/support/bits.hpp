// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Equality of bits: a NaN equals itself, and 0 is not -0.

#include <cstring>
#include <ranges>
#include <span>
#include <type_traits>

namespace tessera_test {

/// Whether two contiguous ranges of one type have the same length and the same bits.
template <std::ranges::contiguous_range A, std::ranges::contiguous_range B>
bool same_bits(const A& a, const B& b) {
  const std::span x(a);
  const std::span y(b);
  static_assert(std::is_same_v<std::remove_cv_t<typename decltype(x)::element_type>,
                               std::remove_cv_t<typename decltype(y)::element_type>>);
  return x.size() == y.size() && (x.empty() || std::memcmp(x.data(), y.data(), x.size_bytes()) == 0);
}

}  // namespace tessera_test
