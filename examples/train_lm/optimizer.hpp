// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Coefficients of AdamW (`tessera::shard` has the update) and the schedule of its rate.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace train_lm {

/// Coefficients of AdamW.
struct adamw_options {
  double beta1 = 0.9;         ///< Decay of the mean.
  double beta2 = 0.95;        ///< Decay of the mean square.
  double epsilon = 1e-8;      ///< Added to the root of the mean square.
  double weight_decay = 0.1;  ///< Times the rate, for tensors that decay.
  double clip = 1.0;          ///< Bound of the gradient's norm; 0 leaves it as it is.
};

/// Linear warm-up, then half a cosine down to `last` of the peak. @param step From 0. @return a factor of the rate.
inline double schedule(std::int64_t step, std::int64_t steps, std::int64_t warmup, double last) {
  if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double done =
      static_cast<double>(step - warmup) / static_cast<double>(std::max<std::int64_t>(1, steps - warmup));
  return last + (1.0 - last) * 0.5 * (1.0 + std::cos(std::numbers::pi * std::min(1.0, done)));
}

}  // namespace train_lm
