// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Weights: what the scores of the selected experts become. The bias of `balance::bias` is never in them.

#include <cmath>
#include <concepts>

#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

/// Atom: `typename W::options`, default-constructible.
template <class W>
concept weigh_has_options = requires {
  typename W::options;
  requires std::default_initializable<typename W::options>;
};

/// Atom: `static constexpr bool normalizes` (the weights of a token sum to a constant) and
/// `static constexpr bool weighs_input` (the weight multiplies the expert's input instead of its output).
template <class W>
concept weigh_states_use = requires {
  { W::normalizes } -> std::convertible_to<bool>;
  { W::weighs_input } -> std::convertible_to<bool>;
};

/// Atom: `static A value(A score, A sum, const options&)`, where `sum` is over the selected scores of the token.
template <class W>
concept weigh_has_value = requires(float f, double d, const typename W::options& options) {
  { W::value(f, f, options) } -> std::same_as<float>;
  { W::value(d, d, options) } -> std::same_as<double>;
};

/// Atom: `static A derivative_by_score(A score, A sum, const options&)`, with `sum` held fixed.
template <class W>
concept weigh_has_derivative_by_score = requires(float f, double d, const typename W::options& options) {
  { W::derivative_by_score(f, f, options) } -> std::same_as<float>;
  { W::derivative_by_score(d, d, options) } -> std::same_as<double>;
};

/// Atom: `static A derivative_by_sum(A score, A sum, const options&)`, with `score` held fixed.
template <class W>
concept weigh_has_derivative_by_sum = requires(float f, double d, const typename W::options& options) {
  { W::derivative_by_sum(f, f, options) } -> std::same_as<float>;
  { W::derivative_by_sum(d, d, options) } -> std::same_as<double>;
};

/// A weighing. Functions are `TESSERA_HD`. Optional: `static void check(const options&)`, which throws
/// `invalid_argument`.
template <class W>
concept weigh_policy = weigh_has_options<W> && weigh_states_use<W> && weigh_has_value<W> &&
    weigh_has_derivative_by_score<W> && weigh_has_derivative_by_sum<W>;

/// Weighing policies.
namespace weigh {

/// `scale * score`.
struct raw {
  /// Values.
  struct options {
    float scale = 1.0f;  ///< Factor of every weight (`routed_scaling_factor`).
  };
  static constexpr bool normalizes = false;    ///< Scores as they are.
  static constexpr bool weighs_input = false;  ///< On the output.
  /// The weight.
  template <accumulate_type A>
  TESSERA_HD static constexpr A value(A score, A, const options& options) {
    return score * A(options.scale);
  }
  /// Its derivative by the score.
  template <accumulate_type A>
  TESSERA_HD static constexpr A derivative_by_score(A, A, const options& options) {
    return A(options.scale);
  }
  /// Its derivative by the sum: 0.
  template <accumulate_type A>
  TESSERA_HD static constexpr A derivative_by_sum(A, A, const options&) {
    return A(0);
  }
  /// @throws invalid_argument if the scale is not finite.
  static void check(const options& options) {
    TESSERA_EXPECTS(std::isfinite(options.scale), "weigh::raw has scale = " << options.scale << ", it must be finite");
  }
};

/// `scale * (score / (sum + epsilon))`: normalised first, then scaled. Where `sum + epsilon` is 0 (every selected score
/// underflowed) the weights are 0.
///
/// Derivatives divide by `sum + epsilon`. With `epsilon` 0 they overflow where the sum of the selected scores is
/// subnormal, as with `score::sigmoid` in fp32 where all selected logits are below about -87 (and above -89, where
/// scores are 0); the gradients of that token's logits are then not finite. An epsilon such as 1e-20 avoids it, and
/// changes no weight of a token whose sum is above 1e-12.
struct normalized {
  /// Values.
  struct options {
    float scale = 1.0f;    ///< Sum of the weights of a token when `epsilon` is 0 (`routed_scaling_factor`).
    float epsilon = 0.0f;  ///< Added to the sum; 0 as in DeepSeek's own code, others use 1e-20.
  };
  static constexpr bool normalizes = true;     ///< The weights of a token sum to `scale`.
  static constexpr bool weighs_input = false;  ///< On the output.
  /// The weight.
  template <accumulate_type A>
  TESSERA_HD static constexpr A value(A score, A sum, const options& options) {
    const A total = sum + A(options.epsilon);
    return total != A(0) ? score / total * A(options.scale) : A(0);
  }
  /// Its derivative by the score, at fixed sum.
  template <accumulate_type A>
  TESSERA_HD static constexpr A derivative_by_score(A, A sum, const options& options) {
    const A total = sum + A(options.epsilon);
    return total != A(0) ? A(options.scale) / total : A(0);
  }
  /// Its derivative by the sum, at fixed score.
  template <accumulate_type A>
  TESSERA_HD static constexpr A derivative_by_sum(A score, A sum, const options& options) {
    const A total = sum + A(options.epsilon);
    return total != A(0) ? -(score / total) * (A(options.scale) / total) : A(0);
  }
  /// @throws invalid_argument if the scale is not finite or epsilon is negative or not finite.
  static void check(const options& options) {
    TESSERA_EXPECTS(std::isfinite(options.scale),
                    "weigh::normalized has scale = " << options.scale << ", it must be finite");
    TESSERA_EXPECTS(std::isfinite(options.epsilon) && options.epsilon >= 0.0f,
                    "weigh::normalized has epsilon = " << options.epsilon << ", it must be finite and not negative");
  }
};

/// `Weigh`, with the weight multiplying the expert's input instead of its output (Llama 4).
template <class Weigh>
struct on_input : Weigh {
  static_assert(weigh_policy<Weigh>, "tessera::weigh::on_input: the argument must be a weighing, such as weigh::raw");
  static constexpr bool weighs_input = true;  ///< On the input.
};

}  // namespace weigh

TESSERA_NAMESPACE_END
