// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The words of the experts' signatures: their sizes, their weights or gradients, and the weights of (token, expert)
/// pairs.

#include <cstdint>
#include <type_traits>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// Sizes of the experts of one rank.
struct expert_dims {
  int num_local_experts = 0;  ///< L, experts of this rank; 0 is a rank without experts.
  int hidden = 0;             ///< d, width of a token.
  int intermediate = 0;       ///< n, width inside one expert.
  bool bias = false;          ///< Both projections have biases.

  /// Equality.
  constexpr bool operator==(const expert_dims&) const = default;
};

/// Weights of a rank's experts (`S` const), or their gradients. One allocation per matrix, experts `up_stride` and
/// `down_stride` elements apart; a weight layout says how each matrix lies. `U` is `2 * intermediate` for gated
/// activations and `intermediate` for plain ones. Nothing is owned.
template <class S>
struct expert_weights {
  S* up = nullptr;               ///< `[L, U, d]`, or `[L, d, U]`; aligned to its element.
  S* down = nullptr;             ///< `[L, d, n]`, or `[L, n, d]`; aligned to its element.
  S* up_bias = nullptr;          ///< `[L, U]` packed, in the order of the up-projection's outputs; null without biases.
  S* down_bias = nullptr;        ///< `[L, d]` packed; null without biases.
  std::int64_t up_stride = 0;    ///< Elements from one expert's up-projection to the next, at least `U d`; 0: packed.
  std::int64_t down_stride = 0;  ///< Elements from one expert's down-projection to the next, at least `d n`; 0: packed.

  /// Weights to be written are weights to be read.
  template <class T>
  requires std::is_same_v<T, const S>
  constexpr operator expert_weights<T>() const {  // NOLINT: qualification conversion
    return {up, down, up_bias, down_bias, up_stride, down_stride};
  }
};

/// Where the weight of a (token, expert) pair is multiplied in.
enum class weight_on {
  output,  ///< On the expert's output, by combine: experts return unweighted outputs (almost all models).
  input,   ///< On the expert's input (Llama 4).
};

/// The weights of pairs, one for each expert row, and where they apply.
template <class A>
struct pair_weights {
  const A* values = nullptr;              ///< `[num_pairs]`; null means that all are 1.
  weight_on applied = weight_on::output;  ///< Forward and backward must agree.
};

/// Pair weights whose type says that they apply to the output: device code for others need not be compiled.
template <class A>
struct output_weights : pair_weights<A> {
  /// @param of_pairs `values`.
  explicit output_weights(const A* of_pairs = nullptr) : pair_weights<A>{of_pairs, weight_on::output} {}
};

TESSERA_NAMESPACE_END
