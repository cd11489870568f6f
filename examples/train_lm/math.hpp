// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Elementwise functions and sums that a compiler turns into vector code, with an order of additions that does not
/// depend on the machine's vector length or on the rank count.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace train_lm {

/// e^x. In float by a polynomial (relative error below 2e-7), because the library's function is not vectorised without
/// flags that would also reorder sums. It saturates at 0 and at about 2^127; |x| must be below a million.
template <class A>
inline A exponential(A x) {
  if constexpr (std::is_same_v<A, float>) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.9875691500e-4f;                                   // Cephes expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // Bounded as an integer: a bound on x would be a branch, which stops the vectoriser.
    const std::int32_t exponent = std::min(std::max(std::bit_cast<std::int32_t>(shifted) - 0x4b400000, -127), 127);
    return p * std::bit_cast<float>((exponent + 127) << 23);
  } else {
    return std::exp(x);
  }
}

/// 1 / (1 + e^-x).
template <class A>
inline A sigmoid(A x) {
  return A(1) / (A(1) + exponential(-x));
}

/// sum_i a[i] * b[i], as 16 interleaved sums added pairwise.
template <class A>
inline A dot(const A* a, const A* b, std::int64_t n) {
  constexpr int lanes = 16;
  A sums[lanes] = {};
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int j = 0; j < lanes; ++j) sums[j] += a[i + j] * b[i + j];
  for (int j = 0; i + j < n; ++j) sums[j] += a[i + j] * b[i + j];
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

}  // namespace train_lm
