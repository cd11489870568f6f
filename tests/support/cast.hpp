// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Values of a test, which are doubles, in the type that the library stores, and back.

#include <span>
#include <type_traits>
#include <vector>

#include <tessera/core/dtype.hpp>

namespace tessera_test {

namespace ts = tessera;

template <class S>
S to_storage(double v) {
  if constexpr (std::is_same_v<S, ts::bfloat16>)
    return S(static_cast<float>(v));
  else
    return static_cast<S>(v);
}

template <class S>
std::vector<S> cast(std::span<const double> values) {
  std::vector<S> out;
  out.reserve(values.size());
  for (const double v : values) out.push_back(to_storage<S>(v));
  return out;
}

template <class S>
double widen(S v) {
  if constexpr (std::is_same_v<S, ts::bfloat16>)
    return static_cast<double>(static_cast<float>(v));
  else
    return static_cast<double>(v);
}

template <class S>
std::vector<double> widened(const std::vector<S>& values) {
  std::vector<double> out;
  out.reserve(values.size());
  for (const S v : values) out.push_back(widen(v));
  return out;
}

}  // namespace tessera_test
