// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What stands between the two projections of an expert: the concept, and the activations of published models.
///
/// An activation is a struct of functions on single values, shared by host and device. A gated one takes a gate and an
/// up value and needs an up-projection of `2 * intermediate` outputs; a plain one takes one value. A user's struct with
/// the same members composes as these do; `examples/custom_activation.cpp` shows one.

#include <concepts>

#include <tessera/core/dtype.hpp>
#include <tessera/experts/detail/activation_math.hpp>

TESSERA_NAMESPACE_BEGIN

/// `T::options` exists, has defaults and can be copied.
template <class T>
concept activation_has_options = std::default_initializable<typename T::options> && std::copyable<typename T::options>;

/// `static constexpr bool T::gated` exists.
template <class T>
concept activation_has_gated = requires {
  { T::gated } -> std::convertible_to<bool>;
};

/// `A T::forward(A gate, A up, const options&)` exists where `T` is gated.
template <class T, class A>
concept gated_activation_has_forward = !T::gated || requires(A value, const typename T::options& options) {
  { T::forward(value, value, options) } -> std::same_as<A>;
};

/// `void T::backward(A gate, A up, A dout, A& dgate, A& dup, const options&)` exists where `T` is gated.
template <class T, class A>
concept gated_activation_has_backward = !T::gated || requires(A value, A& result, const typename T::options& options) {
  T::backward(value, value, value, result, result, options);
};

/// `A T::forward(A value, const options&)` exists where `T` is not gated.
template <class T, class A>
concept plain_activation_has_forward = T::gated || requires(A value, const typename T::options& options) {
  { T::forward(value, options) } -> std::same_as<A>;
};

/// `A T::backward(A value, A dout, const options&)` exists where `T` is not gated.
template <class T, class A>
concept plain_activation_has_backward = T::gated || requires(A value, const typename T::options& options) {
  { T::backward(value, value, options) } -> std::same_as<A>;
};

/// An activation computed in `A`. Each requirement is an own concept, so that a compiler names the one that fails.
template <class T, class A = float>
concept activation_policy =
    activation_has_options<T> && activation_has_gated<T> && gated_activation_has_forward<T, A> &&
    gated_activation_has_backward<T, A> && plain_activation_has_forward<T, A> && plain_activation_has_backward<T, A>;

/// The activations that come with the library.
namespace activation {

/// Options of an activation that has none.
struct no_options {};

/// `silu(gate) * up` with `silu(g) = g * sigmoid(g)` (Shazeer, arXiv 2002.05202): most models of today.
struct swiglu {
  /// None.
  using options = no_options;
  /// Takes a gate and an up value.
  static constexpr bool gated = true;

  /// `silu(gate) * up`.
  template <accumulate_type A>
  TESSERA_HD static A forward(A gate, A up, const options&) {
    return gate * detail::sigmoid_of(gate) * up;
  }

  /// Gradients with respect to `gate` and `up`, given that of the result, `dout`.
  template <accumulate_type A>
  TESSERA_HD static void backward(A gate, A up, A dout, A& dgate, A& dup, const options&) {
    const A sigmoid = detail::sigmoid_of(gate), silu = gate * sigmoid;
    dgate = dout * up * (sigmoid + silu * (A(1) - sigmoid));
    dup = dout * silu;
  }
};

/// `gelu(gate) * up` with the exact GELU, `gelu(g) = g * Phi(g)`, Phi through the error function (arXiv 2002.05202).
struct geglu {
  /// None.
  using options = no_options;
  /// Takes a gate and an up value.
  static constexpr bool gated = true;

  /// `gelu(gate) * up`.
  template <accumulate_type A>
  TESSERA_HD static A forward(A gate, A up, const options&) {
    return gate * detail::normal_cdf(gate) * up;
  }

  /// Gradients with respect to `gate` and `up`, given that of the result, `dout`.
  template <accumulate_type A>
  TESSERA_HD static void backward(A gate, A up, A dout, A& dgate, A& dup, const options&) {
    const A cdf = detail::normal_cdf(gate);
    dgate = dout * up * (cdf + gate * detail::normal_density(gate));
    dup = dout * (gate * cdf);
  }
};

/// `gelu(gate) * up` with the tanh form of GELU, `g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3)))`
/// (Hendrycks and Gimpel, arXiv 1606.08415).
struct geglu_tanh {
  /// None.
  using options = no_options;
  /// Takes a gate and an up value.
  static constexpr bool gated = true;

  /// `gelu(gate) * up`.
  template <accumulate_type A>
  TESSERA_HD static A forward(A gate, A up, const options&) {
    return gate * detail::sigmoid_of(twice_inner(gate)) * up;
  }

  /// Gradients with respect to `gate` and `up`, given that of the result, `dout`.
  template <accumulate_type A>
  TESSERA_HD static void backward(A gate, A up, A dout, A& dgate, A& dup, const options&) {
    const A sigmoid = detail::sigmoid_of(twice_inner(gate));
    const A slope = A(1.59576912160573071176) * (A(1) + A(3 * 0.044715) * gate * gate);
    dgate = dout * up * (sigmoid + gate * (sigmoid * (A(1) - sigmoid)) * slope);
    dup = dout * (gate * sigmoid);
  }

 private:
  // (1 + tanh(u)) / 2 = sigmoid(2u), which does not cancel for negative u
  template <accumulate_type A>
  TESSERA_HD static A twice_inner(A gate) {
    return A(1.59576912160573071176) * (gate + A(0.044715) * gate * gate * gate);
  }
};

/// SwiGLU with bounded inputs: `(u + up_offset) * g * sigmoid(alpha * g)` with `g = min(gate, limit)` and
/// `u = clamp(up, -limit, limit)`. The defaults are GPT-OSS's (`modular_gpt_oss.py`); `{.limit = 10, .alpha = 1,
/// .up_offset = 0}` is DeepSeek-V4's. No gradient passes a bound that is exceeded; on the bound itself it passes, as in
/// PyTorch up to 2.14 (2.15 gives 0 there).
struct clamped_swiglu {
  /// The bounds and the shape of the gate.
  struct options {
    double limit = 7;      ///< Bound of the gate from above and of the up value from both sides; positive.
    double alpha = 1.702;  ///< Steepness of the sigmoid.
    double up_offset = 1;  ///< Added to the bounded up value.
  };
  /// Takes a gate and an up value.
  static constexpr bool gated = true;

  /// The formula above.
  template <accumulate_type A>
  TESSERA_HD static A forward(A gate, A up, const options& o) {
    const A g = bounded_gate(gate, o), u = bounded_up(up, o);
    return (u + static_cast<A>(o.up_offset)) * (g * detail::sigmoid_of(static_cast<A>(o.alpha) * g));
  }

  /// Gradients with respect to `gate` and `up`, given that of the result, `dout`.
  template <accumulate_type A>
  TESSERA_HD static void backward(A gate, A up, A dout, A& dgate, A& dup, const options& o) {
    const A limit = static_cast<A>(o.limit), alpha = static_cast<A>(o.alpha);
    const A g = bounded_gate(gate, o), u = bounded_up(up, o);
    const A sigmoid = detail::sigmoid_of(alpha * g);
    const A dg = dout * (u + static_cast<A>(o.up_offset)) * (sigmoid * (A(1) + alpha * g * (A(1) - sigmoid)));
    const A du = dout * (g * sigmoid);
    dgate = detail::choose(gate > limit, A(0), dg);
    dup = detail::choose(up > limit, A(0), detail::choose(up < -limit, A(0), du));
  }

 private:
  // comparisons that keep NaN
  template <accumulate_type A>
  TESSERA_HD static A bounded_gate(A gate, const options& o) {
    const A limit = static_cast<A>(o.limit);
    return detail::choose(gate > limit, limit, gate);
  }
  template <accumulate_type A>
  TESSERA_HD static A bounded_up(A up, const options& o) {
    const A limit = static_cast<A>(o.limit);
    return detail::choose(up > limit, limit, detail::choose(up < -limit, -limit, up));
  }
};

/// `max(h, 0)^2`, not gated (So et al., arXiv 2109.08668; Nemotron).
struct relu2 {
  /// None.
  using options = no_options;
  /// Takes one value.
  static constexpr bool gated = false;

  /// `max(value, 0)^2`.
  template <accumulate_type A>
  TESSERA_HD static A forward(A value, const options&) {
    const A positive = value < A(0) ? A(0) : value;
    return positive * positive;
  }

  /// Gradient with respect to `value`, given that of the result, `dout`.
  template <accumulate_type A>
  TESSERA_HD static A backward(A value, A dout, const options&) {
    const A positive = value < A(0) ? A(0) : value;
    return dout * (A(2) * positive);
  }
};

/// The exact GELU, `h * Phi(h)` through the error function, not gated (arXiv 1606.08415).
struct gelu {
  /// None.
  using options = no_options;
  /// Takes one value.
  static constexpr bool gated = false;

  /// `value * Phi(value)`.
  template <accumulate_type A>
  TESSERA_HD static A forward(A value, const options&) {
    return value * detail::normal_cdf(value);
  }

  /// Gradient with respect to `value`, given that of the result, `dout`.
  template <accumulate_type A>
  TESSERA_HD static A backward(A value, A dout, const options&) {
    return dout * (detail::normal_cdf(value) + value * detail::normal_density(value));
  }
};

}  // namespace activation
TESSERA_NAMESPACE_END
