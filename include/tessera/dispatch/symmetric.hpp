// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Memory and SMs of a dispatch over `comm::symmetric`; the operations are in `dispatch/symmetric.cuh`.

#include <algorithm>
#include <concepts>
#include <cstdint>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/router/lists.hpp>

TESSERA_NAMESPACE_BEGIN

/// What a dispatch between GPUs asks of a communicator: windows of memory that peers write, with flags, and a second
/// stream. Model: `comm::symmetric`.
template <class C>
concept peer_communicator = requires(C& c, comm::symmetric_channel channel, const void* memory) {
  { c.rank() } -> std::same_as<int>;
  { c.size() } -> std::same_as<int>;
  { c.view(channel) } -> std::same_as<comm::symmetric_view>;
  { c.contains(memory) } -> std::same_as<bool>;
  { c.num_sms() } -> std::same_as<int>;
  { c.side_stream() } -> std::convertible_to<device_stream>;
  c.fork_event();
  c.join_event();
};

/// The routing of all ranks as one destination sees it. All but `block_counts` is memory of the window, at the same
/// offset on all ranks.
/// @tparam A Type of routing weights.
template <class A>
struct routing_tables {
  static constexpr int max_blocks = 32;  ///< Most thread blocks that push a routing.

  std::int32_t* slots = nullptr;         ///< `[R * max_tokens, K]` slots of this rank's experts; negative: not here.
  A* weights = nullptr;                  ///< `[R * max_tokens, K]`.
  std::int32_t* counts = nullptr;        ///< `[R, R]` pairs from each rank to each.
  std::int32_t* block_counts = nullptr;  ///< `[max_blocks, max_symmetric_ranks]` scratch.

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  static routing_tables layout(memory_builder& builder, const dispatch_bounds& bounds) {
    routing_tables tables;
    const std::int64_t pairs = bounds.addressed_rows() * bounds.top_k;
    tables.slots = builder.take<std::int32_t>("slots of all ranks", pairs);
    tables.weights = builder.take<A>("weights of all ranks", pairs);
    tables.counts = builder.take<std::int32_t>("pairs between ranks", bounds.num_ranks * bounds.num_ranks);
    tables.block_counts = builder.take<std::int32_t>("pairs of blocks", max_blocks * comm::max_symmetric_ranks);
    return tables;
  }
};

/// Scratch of `exchange_routing` over `comm::symmetric`.
/// @tparam A Type of routing weights.
template <class A>
struct symmetric_routing_workspace {
  routing_tables<A> tables;  ///< In the window.
  router_workspace sort;     ///< Scratch of the sort; local memory.
};

/// SMs that an operation takes where the engine does not say: what it needs to fill the links when nothing else runs.
/// One SM stores about 48 GB/s by its copy engine, so 8 to 12 fill one GPU's links from four ranks on; the copy of rows
/// that stay at home, and the sums at both ends of the way home, take more. Measured tables are in bench/README.md.
struct symmetric_sms {
  int rows;  ///< Of `dispatch_begin`.
  int sums;  ///< Of `combine`.

  /// @param budget SMs the engine gives, 0 for the library's choice. @param device_sms SMs of the device.
  static constexpr symmetric_sms choose(int budget, int device_sms) {
    if (budget > 0) return {std::min(budget, device_sms), std::min(budget, device_sms)};
    return {std::min(64, device_sms), device_sms};
  }
};

TESSERA_NAMESPACE_END
