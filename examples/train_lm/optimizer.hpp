// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// AdamW (Loshchilov and Hutter 2019) and the schedule of its rate.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <span>
#include <vector>

#include <tessera/core/config.hpp>

namespace train_lm {

/// Coefficients of AdamW.
struct adamw_options {
  double beta1 = 0.9;         ///< Decay of the mean.
  double beta2 = 0.95;        ///< Decay of the mean square.
  double epsilon = 1e-8;      ///< Added to the root of the mean square.
  double weight_decay = 0.1;  ///< Times the rate, for tensors that decay.
  double clip = 1.0;          ///< Bound of the gradient's norm; 0 leaves it as it is.
};

/// Moments of one flat array of parameters.
template <class A>
class adamw {
 public:
  /// @param size Elements of the array.
  explicit adamw(std::size_t size) : mean_(size), square_(size) {}

  /// Updates elements `[first, first + count)`. @param step From 1. @param rate Learning rate. @param scale Factor on
  /// the gradient, from clipping. @param decays Whether weight decay applies.
  void update(const adamw_options& options, std::int64_t step, double rate, double scale, bool decays,
              std::int64_t first, std::int64_t count, A* parameters, const A* gradients) {
    const auto b1 = static_cast<A>(options.beta1), b2 = static_cast<A>(options.beta2);
    const auto epsilon = static_cast<A>(options.epsilon), factor = static_cast<A>(scale);
    const double t = static_cast<double>(step);
    const auto step_size = static_cast<A>(rate / (1.0 - std::pow(options.beta1, t)));
    const auto square_scale = static_cast<A>(1.0 / (1.0 - std::pow(options.beta2, t)));
    const A keep = A(1) - static_cast<A>(decays ? rate * options.weight_decay : 0.0);
    A* TESSERA_RESTRICT m = mean_.data() + first;
    A* TESSERA_RESTRICT v = square_.data() + first;
    A* TESSERA_RESTRICT p = parameters + first;
    const A* TESSERA_RESTRICT g = gradients + first;
    for (std::int64_t i = 0; i < count; ++i) {
      const A gradient = factor * g[i];
      m[i] = b1 * m[i] + (A(1) - b1) * gradient;
      v[i] = b2 * v[i] + (A(1) - b2) * gradient * gradient;
      p[i] = keep * p[i] - step_size * m[i] / (std::sqrt(v[i] * square_scale) + epsilon);
    }
  }

 private:
  std::vector<A> mean_, square_;
};

/// Linear warm-up, then half a cosine down to `last` of the peak. @param step From 0. @return a factor of the rate.
inline double schedule(std::int64_t step, std::int64_t steps, std::int64_t warmup, double last) {
  if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double done =
      static_cast<double>(step - warmup) / static_cast<double>(std::max<std::int64_t>(1, steps - warmup));
  return last + (1.0 - last) * 0.5 * (1.0 + std::cos(std::numbers::pi * std::min(1.0, done)));
}

/// Sum of squares in double, in a fixed order.
template <class A>
double sum_of_squares(std::span<const A> values) {
  double sums[8] = {};
  std::size_t i = 0;
  for (; i + 8 <= values.size(); i += 8)
    for (std::size_t j = 0; j < 8; ++j)
      sums[j] += static_cast<double>(values[i + j]) * static_cast<double>(values[i + j]);
  for (; i < values.size(); ++i) sums[0] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  double sum = 0;
  for (const double s : sums) sum += s;
  return sum;
}

}  // namespace train_lm
