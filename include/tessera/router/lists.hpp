// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The pairs of a routing sorted by expert, and the scratch that the device half sorts them with.

#include <cstdint>

#include <tessera/core/dtype.hpp>
#include <tessera/core/expert_rows.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/router/routing.hpp>

TESSERA_NAMESPACE_BEGIN

/// Expert rows of one rank that owns all experts, in the order (expert, token, k). A view of caller-owned memory in the
/// space of the work. `[T*K]` arrays hold `row_offsets[E]` rows; what lies behind is not written.
template <accumulate_type A>
struct router_lists {
  std::int32_t* row_offsets = nullptr;    ///< `[E + 1]`: rows of each expert, ascending from 0.
  std::int32_t* gather = nullptr;         ///< `[T*K]`: token that each expert row reads.
  std::int32_t* expert_row_of = nullptr;  ///< `[T, K]`: expert row of each pair; -1 in slots of `no_expert`.
  A* pair_weights = nullptr;              ///< `[T*K]`: weight of each expert row.

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param max_tokens T at most.
  /// @param num_experts E. @param top_k K.
  static router_lists layout(memory_builder& builder, std::int64_t max_tokens, int num_experts, int top_k) {
    router_lists lists;
    lists.row_offsets = builder.take<std::int32_t>("row offsets", num_experts + 1);
    lists.gather = builder.take<std::int32_t>("gather list", max_tokens * top_k);
    lists.expert_row_of = builder.take<std::int32_t>("expert row of pairs", max_tokens * top_k);
    lists.pair_weights = builder.take<A>("pair weights", max_tokens * top_k);
    return lists;
  }

  /// What the experts need. @param num_experts E.
  expert_rows rows(int num_experts) const { return {num_experts, row_offsets, gather}; }
};

/// Scratch of the sorting kernels.
struct router_workspace {
  /// Most thread blocks that a sorting kernel runs with.
  static constexpr int max_blocks = 192;

  std::uint32_t* barrier = nullptr;      ///< One; 0 before its first use, afterwards the kernels' alone. Not shared by
                                         ///< calls that may run at the same time.
  std::uint8_t* block_counts = nullptr;  ///< `[max_blocks, E rounded up to 32]` counts of 2 bytes; no initial value.

  /// Bytes behind `block_counts`. @param num_experts E.
  static constexpr std::int64_t block_count_bytes(int num_experts) {
    return std::int64_t{max_blocks} * ((num_experts + 31) / 32 * 32) * 2;
  }

  /// Takes the counts from `builder`. @param builder Counting or carving. @param num_experts E.
  /// @param barrier The barrier's word, which outlives the call: state, zero-filled once.
  static router_workspace layout(memory_builder& builder, int num_experts, std::uint32_t* barrier) {
    return {barrier, builder.take<std::uint8_t>("counts of blocks", block_count_bytes(num_experts))};
  }
};

TESSERA_NAMESPACE_END
