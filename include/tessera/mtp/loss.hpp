// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// How the losses of the depths become one number (equations 24 and 25): `lambda / D * sum_k L^k`, where `L^k` is the
/// sum of depth k's terms divided by the divisor.

#include <cstdint>
#include <span>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// What the sum of a depth's `T - k` terms is divided by.
enum class divisor {
  tokens,       ///< T, the tokens of the global batch: equation 24. Deeper losses are means over fewer terms than T.
  valid_terms,  ///< The depth's terms in the global batch: each `L^k` is a mean.
};

/// The weight lambda of the additional loss over a training run: one value up to a number of tokens, another after it.
/// DeepSeek-V3: 0.3 for the first 10T tokens, 0.1 for the remaining 4.8T (section 4.2).
struct lambda_schedule {
  double before = 0.3;                              ///< While fewer than `switch_tokens` tokens have been seen.
  double after = 0.1;                               ///< From then on.
  std::int64_t switch_tokens = 10'000'000'000'000;  ///< Where it changes.

  /// The value of a step. @param tokens_seen Tokens trained on before the step.
  constexpr double at(std::int64_t tokens_seen) const { return tokens_seen < switch_tokens ? before : after; }
};

/// The factor of each depth's sum of terms in the total loss, which is what `chain::backward_input` and
/// `chain::backward_weights` take: `lambda / (D * T)`, or `lambda / (D * terms_k)`; 0 for a depth without terms.
/// Host: returns when done.
/// @param lambda  Weight of the additional loss.
/// @param by      The divisor.
/// @param tokens  T of the global batch: all ranks, and all micro-batches of the step. Read for `divisor::tokens`.
/// @param terms   `[D]` terms of the global batch, the sum of `count_terms` over the same. Read for
///                `divisor::valid_terms`.
/// @param factors `[D]`, written.
/// @throws invalid_argument if a number is negative, or lengths do not fit.
inline void loss_factors(double lambda, divisor by, std::int64_t tokens, std::span<const std::int64_t> terms,
                         std::span<double> factors) {
  TESSERA_EXPECTS(lambda >= 0, "mtp: lambda = " << lambda << ", it must not be negative");
  TESSERA_EXPECTS(by == divisor::valid_terms || tokens >= 0, "mtp: " << tokens << " tokens in the global batch");
  TESSERA_EXPECTS(by == divisor::tokens || terms.size() == factors.size(),
                  "mtp: terms of " << terms.size() << " depths for " << factors.size() << " factors");
  for (std::size_t k = 0; k < factors.size(); ++k) {
    const std::int64_t count = by == divisor::tokens ? tokens : terms[k];
    TESSERA_EXPECTS(count >= 0, "mtp: depth " << k + 1 << " has " << count << " terms");
    factors[k] = count == 0 ? 0.0 : lambda / (static_cast<double>(factors.size()) * static_cast<double>(count));
  }
}

/// `sum_k factors[k] * sum_c losses[k, c]`: what is added to the main model's loss. Over several ranks, give it the
/// losses that were summed over all chunks (`chunks` 1).
/// @param factors `[D]`, from `loss_factors`. @param losses `[D, chunks]`, from `chain::forward`. @param chunks C.
/// @throws invalid_argument if lengths do not fit.
inline double total_loss(std::span<const double> factors, std::span<const double> losses, std::int64_t chunks) {
  TESSERA_EXPECTS(chunks >= 0 && losses.size() == factors.size() * static_cast<std::size_t>(chunks),
                  "mtp: " << losses.size() << " losses for " << factors.size() << " depths of " << chunks << " chunks");
  double total = 0;
  for (std::size_t k = 0; k < factors.size(); ++k) {
    double sum = 0;
    for (std::size_t c = 0; c < static_cast<std::size_t>(chunks); ++c)
      sum += losses[k * static_cast<std::size_t>(chunks) + c];
    total += factors[k] * sum;
  }
  return total;
}

}  // namespace mtp

TESSERA_NAMESPACE_END
