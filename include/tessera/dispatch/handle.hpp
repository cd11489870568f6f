// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Where every pair of a dispatch went: made once per forward, used by dispatch, experts and combine, forward and
/// backward.

#include <cstdint>

#include <tessera/core/expert_rows.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/dispatch/options.hpp>

TESSERA_NAMESPACE_BEGIN

/// The routing as one rank sees it, as a sender and as an owner of experts. A view of caller-owned memory: trivially
/// copyable, without state of its own, so that it may be carved again from the same memory in backward.
///
/// In device memory tokens keep their places: token t of rank s is row `v = s * max_tokens + t` of what arrives,
/// `gather` holds such rows (sized on the host: rows of what has arrived, packed), and `expert_row_of [R * max_tokens,
/// K]` has -1 where a pair is not this rank's and -2 where it was dropped by the bound. The arrays about sent and
/// received rows are host memory's alone.
///
/// In host memory a *sent row* is one (token, rank) with at least one pair there, in the order (rank, token). An
/// *arriving pair* is in the order (source, token, k); an *expert row* in the order (local expert, source, token, k).
/// @tparam A Type of routing weights.
template <class A>
struct dispatch_handle {
  /// Numbers that are known once the routing has been exchanged. Between GPUs the first two are bounds: `max_tokens`
  /// and `R * max_tokens`; and a rank counts the drops that its own bound makes, of any rank's pairs.
  struct totals {
    std::int64_t num_tokens;      ///< T of this rank.
    std::int64_t received_rows;   ///< Deduplicated rows that arrive here.
    std::int64_t received_pairs;  ///< Expert rows computed here.
    std::int64_t capacity_drops;  ///< Own pairs dropped by the capacity factor.
    std::int64_t overflow_drops;  ///< Own pairs dropped by a receiver's bound.
  };

  totals* total = nullptr;  ///< One.

  std::int32_t* sent_row_offsets = nullptr;   ///< `[R + 1]`: rows sent to each rank.
  std::int32_t* sent_tokens = nullptr;        ///< `[sent rows]`: the token of each sent row.
  std::int32_t* sent_pair_offsets = nullptr;  ///< `[R + 1]`: pairs sent to each rank.
  /// `[T, K]`: number of each pair in the order (rank, token, k) of sending; -1 if not sent.
  std::int32_t* pair_slots = nullptr;

  std::int32_t* received_row_offsets = nullptr;   ///< `[R + 1]`: rows from each rank.
  std::int32_t* received_pair_offsets = nullptr;  ///< `[R + 1]`: arriving pairs from each rank.
  std::int32_t* row_pair_offsets = nullptr;       ///< `[received rows + 1]`: arriving pairs of each received row.
  std::int32_t* expert_row_of = nullptr;          ///< `[received pairs]`: expert row of each arriving pair.

  std::int32_t* expert_offsets = nullptr;  ///< `[max(local experts, 1) + 1]`: expert rows of each local expert.
  std::int32_t* gather = nullptr;          ///< `[received pairs]`: received row that each expert row reads.
  A* pair_weights = nullptr;               ///< `[received pairs]`: routing weight of each expert row.

  std::uint32_t* destinations = nullptr;  ///< Device memory, several ranks: `[T]`, bit r: rank r owns an expert of t.

  int num_local_experts = 0;    ///< Slots of this rank.
  int top_k = 0;                ///< K of the bounds it was laid out with.
  std::int64_t max_tokens = 0;  ///< Tokens of one rank at most, of the same.

  /// Takes the arrays from `builder`, sized by `bounds`.
  static dispatch_handle layout(memory_builder& builder, const dispatch_bounds& bounds) {
    const std::int64_t ranks = bounds.num_ranks;
    dispatch_handle handle;
    handle.total = builder.take<totals>("dispatch totals", 1);
    handle.sent_row_offsets = builder.take<std::int32_t>("sent row offsets", ranks + 1);
    handle.sent_tokens = builder.take<std::int32_t>("sent tokens", bounds.max_sent_rows());
    handle.sent_pair_offsets = builder.take<std::int32_t>("sent pair offsets", ranks + 1);
    handle.pair_slots = builder.take<std::int32_t>("pair slots", bounds.max_sent_pairs());
    handle.received_row_offsets = builder.take<std::int32_t>("received row offsets", ranks + 1);
    handle.received_pair_offsets = builder.take<std::int32_t>("received pair offsets", ranks + 1);
    handle.row_pair_offsets = builder.take<std::int32_t>("row pair offsets", bounds.max_received_rows() + 1);
    handle.expert_row_of = builder.take<std::int32_t>("expert row of pairs", bounds.max_pairs);
    handle.expert_offsets = builder.take<std::int32_t>("expert offsets", bounds.num_local_experts + 1);
    handle.gather = builder.take<std::int32_t>("gather list", bounds.max_pairs);
    handle.pair_weights = builder.take<A>("pair weights", bounds.max_pairs);
    handle.set_sizes(bounds);
    return handle;
  }

  /// Takes the arrays that device memory needs: as many bytes on every rank.
  /// @param builder Counting or carving. @param bounds Of the dispatch. @param travels Whether rows go to other ranks.
  static dispatch_handle layout_device(memory_builder& builder, const dispatch_bounds& bounds, bool travels) {
    dispatch_handle handle;
    handle.total = builder.take<totals>("dispatch totals", 1);
    handle.destinations = builder.take<std::uint32_t>("destinations", travels ? bounds.max_tokens : 0);
    handle.expert_row_of = builder.take<std::int32_t>("expert row of pairs", bounds.addressed_rows() * bounds.top_k);
    handle.expert_offsets = builder.take<std::int32_t>("expert offsets", bounds.num_experts + 1);
    handle.gather = builder.take<std::int32_t>("gather list", bounds.max_pairs);
    handle.pair_weights = builder.take<A>("pair weights", bounds.max_pairs);
    handle.set_sizes(bounds);
    return handle;
  }

  /// Notes the numbers of `bounds`, which operations hold the arrays they are given against.
  void set_sizes(const dispatch_bounds& bounds) {
    num_local_experts = bounds.num_local_experts;
    top_k = bounds.top_k;
    max_tokens = bounds.max_tokens;
  }

  /// What the experts need.
  expert_rows rows() const { return {num_local_experts, expert_offsets, gather}; }
};

TESSERA_NAMESPACE_END
