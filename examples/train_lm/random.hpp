// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Random numbers as a pure function of (seed, name, index). A parameter's initial value then depends on what it is,
/// never on which rank holds it or on what was drawn before.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <span>
#include <string_view>
#include <vector>

namespace train_lm {

/// A bijective mix of 64 bits (the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014).
constexpr std::uint64_t mix(std::uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/// Hash of bytes (64-bit FNV-1a, mixed).
constexpr std::uint64_t hash_bytes(std::string_view bytes) {
  std::uint64_t h = 0xcbf29ce484222325u;
  for (const char c : bytes) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return mix(h);
}

/// A stream of numbers addressed by index.
class random_stream {
 public:
  /// @param seed Seed of the run. @param name What the numbers are for.
  constexpr random_stream(std::uint64_t seed, std::string_view name) : key_(mix(seed) ^ hash_bytes(name)) {}

  /// 64 uniform bits.
  constexpr std::uint64_t bits(std::uint64_t index) const { return mix(key_ ^ mix(index)); }
  /// Uniform in [0, 1).
  constexpr double uniform(std::uint64_t index) const { return static_cast<double>(bits(index) >> 11) * 0x1.0p-53; }
  /// Standard normal (Box and Muller).
  double normal(std::uint64_t index) const {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform(2 * index)));
    return radius * std::cos(2.0 * std::numbers::pi * uniform(2 * index + 1));
  }

 private:
  std::uint64_t key_;
};

/// A byte drawn from the softmax of `logits / temperature`. @param uniform In [0, 1).
template <class A>
int draw_byte(std::span<const A> logits, double temperature, double uniform) {
  const A largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weights;
  double total = 0;
  for (const A logit : logits) {
    weights.push_back(std::exp(static_cast<double>(logit - largest) / temperature));
    total += weights.back();
  }
  double rest = uniform * total;
  for (std::size_t v = 0; v < weights.size(); ++v) {
    rest -= weights[v];
    if (rest < 0) return static_cast<int>(v);
  }
  return static_cast<int>(std::max_element(weights.begin(), weights.end()) - weights.begin());
}

}  // namespace train_lm
