// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The sizes of a mixture-of-experts layer.

#include <cstdint>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

/// Sizes of a layer: values at construction, or a template argument, where 0 leaves a size to run time
/// (`ts::shape{.top_k = 8, .hidden = 7168}`).
struct shape {
  /// As a template argument, for `num_shared_experts`: there are none, and nothing is compiled for them.
  static constexpr int none = -1;

  int num_experts = 0;          ///< E, over all ranks.
  int top_k = 0;                ///< K, experts per token.
  int hidden = 0;               ///< d, width of a token.
  int intermediate = 0;         ///< n, width inside one expert.
  std::int64_t max_tokens = 0;  ///< Bound of T, tokens per rank and call.
  /// Experts that see every token, fused to one of width `num_shared_experts * intermediate`.
  int num_shared_experts = 0;
  bool gate_bias = false;    ///< The router's linear has a bias `[E]`.
  bool expert_bias = false;  ///< The experts' projections have biases.

  /// Equality, so that a shape may be a template argument.
  constexpr bool operator==(const shape&) const = default;
};

TESSERA_NAMESPACE_END
