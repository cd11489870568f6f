// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Scores: what a logit is worth. A score is a few functions on values, so that one written in a user's file composes
/// with every selection, weighing and balance, on the host and on the device.

#include <cmath>
#include <concepts>
#include <type_traits>

#include <tessera/core/dtype.hpp>

TESSERA_NAMESPACE_BEGIN

/// What a score is normalised over.
enum class score_over {
  each,      ///< Nothing: the score of an expert is `value(logit)`.
  all,       ///< All experts, before selection: softmax of `value(logit)` over E.
  selected,  ///< The selected experts: softmax of `value(logit)` over K. Selects on logits.
};

/// Atom: `typename S::options`, default-constructible.
template <class S>
concept score_has_options = requires {
  typename S::options;
  requires std::default_initializable<typename S::options>;
};

/// Atom: `static constexpr score_over over`.
template <class S>
concept score_states_over = requires {
  { S::over } -> std::convertible_to<score_over>;
};

/// Atom: `template <class A> static A value(A logit, const options&)`.
template <class S>
concept score_has_value = requires(float f, double d, const typename S::options& options) {
  { S::value(f, options) } -> std::same_as<float>;
  { S::value(d, options) } -> std::same_as<double>;
};

/// Atom: `template <class A> static A derivative(A logit, A value, const options&)`, the derivative of `value` by the
/// logit.
template <class S>
concept score_has_derivative = requires(float f, double d, const typename S::options& options) {
  { S::derivative(f, f, options) } -> std::same_as<float>;
  { S::derivative(d, d, options) } -> std::same_as<double>;
};

/// A score. Functions are `TESSERA_HD`. `value` is finite for every finite logit, and at least 0 where it is normalised
/// (`weigh::normalized`, balance losses on probabilities); an expert whose score is -inf is never selected.
/// Optional: `static constexpr bool selects_on_logits` (default false), and
/// `static void check(const options&)`, which throws `invalid_argument`.
template <class S>
concept score_policy = score_has_options<S> && score_states_over<S> && score_has_value<S> && score_has_derivative<S>;

/// True where the selection compares logits instead of scores.
template <class S>
inline constexpr bool score_selects_on_logits = S::over == score_over::selected;

/// As stated by the score.
template <class S>
requires requires {
  { S::selects_on_logits } -> std::convertible_to<bool>;
}
inline constexpr bool score_selects_on_logits<S> = S::selects_on_logits || S::over == score_over::selected;

namespace detail {

/// `1 / (1 + exp(-x))`. The exponential overflows to inf and the quotient to 0, as it should.
template <accumulate_type A>
TESSERA_HD inline A logistic(A x) {
  return A(1) / (A(1) + std::exp(-x));
}

}  // namespace detail

/// Score policies.
namespace score {

/// Softmax over all experts, before selection (Mixtral, Qwen3, OLMoE, DeepSeek-V2).
struct softmax {
  /// None.
  struct options {};
  static constexpr score_over over = score_over::all;  ///< All experts.
  /// The logit: softmax does the rest.
  template <accumulate_type A>
  TESSERA_HD static constexpr A value(A logit, const options&) {
    return logit;
  }
  /// 1.
  template <accumulate_type A>
  TESSERA_HD static constexpr A derivative(A, A, const options&) {
    return A(1);
  }
};

/// Selection on logits, softmax over the K selected (GPT-OSS).
struct softmax_selected : softmax {
  static constexpr score_over over = score_over::selected;  ///< The selected experts.
};

/// `1 / (1 + exp(-logit))` (DeepSeek-V3, eq 15 of arXiv 2412.19437).
struct sigmoid {
  /// None.
  struct options {};
  static constexpr score_over over = score_over::each;  ///< Each expert by itself.
  /// Logistic function.
  template <accumulate_type A>
  TESSERA_HD static A value(A logit, const options&) {
    return detail::logistic(logit);
  }
  /// `s (1 - s)`.
  template <accumulate_type A>
  TESSERA_HD static constexpr A derivative(A, A value, const options&) {
    return value * (A(1) - value);
  }
};

/// Selection on logits, then sigmoid (Llama 4). Differs from `sigmoid` where scores round to the same value and where
/// a bias is added.
struct sigmoid_selected : sigmoid {
  static constexpr bool selects_on_logits = true;  ///< Selection compares logits.
};

/// `sqrt(log(1 + exp(logit)))` (DeepSeek-V4).
struct sqrt_softplus {
  /// None.
  struct options {};
  static constexpr score_over over = score_over::each;  ///< Each expert by itself.
  /// Square root of softplus, without overflow for large logits.
  template <accumulate_type A>
  TESSERA_HD static A value(A logit, const options&) {
    const A positive = logit > A(0) ? logit : A(0);
    return std::sqrt(positive + std::log1p(std::exp(-std::abs(logit))));
  }
  /// `sigmoid(logit) / (2 s)`; 0 where the score underflowed to 0.
  template <accumulate_type A>
  TESSERA_HD static A derivative(A logit, A value, const options&) {
    return value > A(0) ? detail::logistic(logit) / (A(2) * value) : A(0);
  }
};

}  // namespace score

TESSERA_NAMESPACE_END
