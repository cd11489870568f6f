// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a router reads and writes: inputs, routing and the integer counts that balance losses need.

#include <concepts>
#include <cstdint>
#include <span>
#include <type_traits>

#include <tessera/core/chunks.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/views.hpp>

TESSERA_NAMESPACE_BEGIN

/// The id of a slot that names no expert. Its weight is 0, it is not counted, and no row travels for it.
inline constexpr std::int32_t no_expert = -1;

/// Largest number of experts a router handles.
inline constexpr int max_experts = 1024;

/// Largest number of experts per token a router handles.
inline constexpr int max_top_k = 32;

/// Which experts see which token, and with what weight. Views of the caller's memory.
template <accumulate_type A>
struct routing {
  matrix_view<std::int32_t> expert_ids;  ///< `[T, K]`, distinct within a token; `no_expert` in unused slots.
  matrix_view<A> weights;                ///< `[T, K]`; 0 in unused slots.
};

/// What a router reads. Members that the router's policies do not ask for stay empty.
template <accumulate_type A>
struct router_inputs {
  matrix_view<const A> logits;  ///< `[T, E]`, finite; a bias of the router's linear is already in them.
  const float* bias = nullptr;  ///< `[E]`, state of `balance::bias`; null means zeros.
  std::span<const std::int32_t> token_ids = {};         ///< `[T]`, for `select::hash`.
  matrix_view<const std::int32_t> expert_ids = {};      ///< `[T, K]`, for `select::external`.
  std::span<const std::int32_t> sequence_offsets = {};  ///< `[S + 1]` from 0 to T, ascending; empty: one sequence.
};

/// View of `E + 2` adjacent integers: selections of each expert, tokens, sequences. One integer all-reduce (sum) over
/// every rank of the micro-batch makes the local counts global, which leaves no trace of the number of ranks in
/// anything computed from them.
template <class Int>
requires std::same_as<std::remove_const_t<Int>, std::int64_t>
struct basic_balance_counts {
  Int* data = nullptr;  ///< `[num_experts + 2]`; null where nobody counts.
  int num_experts = 0;  ///< E.

  constexpr basic_balance_counts() = default;
  /// @param data_ `[num_experts_ + 2]`. @param num_experts_ E.
  TESSERA_HD constexpr basic_balance_counts(Int* data_, int num_experts_) : data(data_), num_experts(num_experts_) {}
  /// Mutable counts read as constant ones.
  template <class U>
  requires std::same_as<Int, const U> TESSERA_HD constexpr basic_balance_counts(
      const basic_balance_counts<U>& other)  // NOLINT: qualification conversion
      : data(other.data), num_experts(other.num_experts) {}

  /// Number of integers behind `data` for E experts.
  TESSERA_HD static constexpr std::int64_t size(int num_experts_) { return std::int64_t{num_experts_} + 2; }
  /// Pairs (token, slot) that selected expert `e`.
  TESSERA_HD constexpr Int& expert(int e) const { return data[e]; }
  /// Tokens.
  TESSERA_HD constexpr Int& tokens() const { return data[num_experts]; }
  /// Sequences with at least one token.
  TESSERA_HD constexpr Int& sequences() const { return data[num_experts + 1]; }
};

using balance_counts = basic_balance_counts<std::int64_t>;              ///< Counts that are written.
using const_balance_counts = basic_balance_counts<const std::int64_t>;  ///< Counts that are read.

TESSERA_NAMESPACE_END
