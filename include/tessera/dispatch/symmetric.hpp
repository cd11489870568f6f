// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Memory and SMs of a dispatch over `comm::symmetric`; the operations are in `dispatch/symmetric.cuh`.

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/capacity.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/router/lists.hpp>

TESSERA_NAMESPACE_BEGIN

/// What a dispatch between GPUs asks of a communicator: windows of memory that peers write, with flags, a second
/// stream, and streams of copies. Model: `comm::symmetric`.
template <class C>
concept peer_communicator = requires(C& c, comm::symmetric_channel channel, const void* memory) {
  { c.rank() } -> std::same_as<int>;
  { c.size() } -> std::same_as<int>;
  { c.view(channel) } -> std::same_as<comm::symmetric_view>;
  { c.contains(memory) } -> std::same_as<bool>;
  { c.num_sms() } -> std::same_as<int>;
  { c.slots() } -> std::same_as<int>;
  { c.side_stream() } -> std::convertible_to<device_stream>;
  c.fork_event();
  c.join_event();
  { c.copy_streams() } -> std::same_as<int>;
  { c.copy_stream(0) } -> std::convertible_to<device_stream>;
  c.copy_event();
};

/// The routing of all ranks as one destination sees it. All but `block_counts` is memory of the window, at the same
/// offset on all ranks.
/// @tparam A Type of routing weights.
template <class A>
struct routing_tables {
  static constexpr int max_blocks = 32;  ///< Most thread blocks that push a routing.

  std::int32_t* slots = nullptr;          ///< `[R * max_tokens, K]` slots of this rank's experts; negative: not here.
  A* weights = nullptr;                   ///< `[R * max_tokens, K]`.
  std::int32_t* counts = nullptr;         ///< `[R, R]` pairs from each rank to each.
  std::int64_t* expert_counts = nullptr;  ///< `[R, E + 2]` counts of balance losses.
  std::int32_t* block_counts = nullptr;   ///< `[max_blocks, max_symmetric_ranks]` scratch.

  /// Counts that a rank tells the others. @param bounds Of the dispatch.
  static constexpr int counts_per_rank(const dispatch_bounds& bounds) { return bounds.num_experts + 2; }

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  static routing_tables layout(memory_builder& builder, const dispatch_bounds& bounds) {
    routing_tables tables;
    const std::int64_t pairs = bounds.addressed_rows() * bounds.top_k;
    tables.slots = builder.take<std::int32_t>("slots of all ranks", pairs);
    tables.weights = builder.take<A>("weights of all ranks", pairs);
    tables.counts = builder.take<std::int32_t>("pairs between ranks", bounds.num_ranks * bounds.num_ranks);
    tables.expert_counts =
        builder.take<std::int64_t>("expert counts of all ranks", bounds.num_ranks * counts_per_rank(bounds));
    tables.block_counts = builder.take<std::int32_t>("pairs of blocks", max_blocks * comm::max_symmetric_ranks);
    return tables;
  }
};

/// Scratch of `exchange_routing` over `comm::symmetric`.
/// @tparam A Type of routing weights.
template <class A>
struct symmetric_routing_workspace {
  routing_tables<A> tables;  ///< In the window.
  router_workspace sort;     ///< Scratch of the sort; local memory. With a capacity it has room for all E experts.
  capacity_workspace<A> capacity;  ///< Local memory, where there is a capacity.
};

/// Where rows come home: memory of the window, at the same offset on all ranks, scratch of one combine.
/// @tparam S Type of rows.
template <class S>
struct returned_rows {
  S* rows = nullptr;  ///< `combine::reduced`: `[R * max_tokens, d]`, one of each rank and token; `combine::ordered`:
                      ///< `[max_tokens * K, d]`, one of each pair.
  std::int32_t* places = nullptr;  ///< `combine::ordered`: `[max_tokens, K]`, the row of each pair that has come.
  S* outgoing = nullptr;           ///< `combine::reduced`: `[outgoing, d]`, this rank's sums that copy engines bring.

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  /// @param hidden d. @param outgoing Rows that `outgoing_rows` says for the transport; not used by `combine::ordered`.
  template <combine_policy Combine>
  static returned_rows layout(memory_builder& builder, const dispatch_bounds& bounds, std::int64_t hidden, Combine,
                              std::int64_t outgoing = 0) {
    constexpr bool ordered = std::is_same_v<Combine, combine::ordered>;
    const std::int64_t rows_home = ordered ? bounds.max_sent_pairs() : bounds.addressed_rows();
    returned_rows returned;
    returned.rows = builder.take<S>("returned rows", rows_home * hidden);
    returned.places = builder.take<std::int32_t>("places of returned rows", ordered ? rows_home : 0);
    returned.outgoing = builder.take<S>("outgoing rows", ordered ? 0 : outgoing * hidden);
    return returned;
  }
};

/// SMs that operations take. Their kernels wait for those of other ranks, so all that run at once must find room at
/// once: the budgets of slots that overlap, each with its lists, add up to no more than the device has. Between H200
/// with nothing else running, 16 SMs send rows at the best rate; with more, few tokens take longer beside their lists,
/// though up to 8 % less with lists of before. Combine takes 48 to 132 (bench/README.md).
struct symmetric_sms {
  int rows;   ///< Of `dispatch_begin`.
  int pairs;  ///< Of `combine_pairs`.
  int lists;  ///< Of `exchange_routing`, beside `rows`, or in their place before or after them.
  int sums;   ///< Of `combine_rows`.

  /// @param budget SMs the engine gives to dispatch and combine, 0 for the library's choice, which shares the device
  /// among the slots. @param device_sms SMs of the device. @param slots Of the communicator.
  static constexpr symmetric_sms choose(int budget, int device_sms, int slots) {
    const int share = std::max(device_sms / slots, 2);
    const int given = std::min(budget, device_sms);
    if (budget > 0) return {given, given, std::min(given, share / 2), given};
    return {std::min(16, share / 2), std::min(64, share / 2), share / 2, share};
  }
};

/// SMs of `dispatch_expanded_begin`, beside those of lists before it.
struct expanded_sms {
  int rows;   ///< Of what sends: the fewer, the more of what arrives is still in L2 when it is put in order.
  int order;  ///< Of what stores rows to their places, at the same time.

  /// Parameters as for `symmetric_sms::choose`.
  static constexpr expanded_sms choose(int budget, int device_sms, int slots) {
    const symmetric_sms given = symmetric_sms::choose(budget, device_sms, slots);
    const int left = std::max(device_sms / slots - given.rows, 1);
    return {given.rows, budget > 0 ? std::min(given.lists, left) : left};
  }
};

TESSERA_NAMESPACE_END
