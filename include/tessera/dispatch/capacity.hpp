// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Memory in which a rank drops its own pairs beyond a capacity before other GPUs hear of them.

#include <cstdint>

#include <tessera/core/memory.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/router/lists.hpp>

TESSERA_NAMESPACE_BEGIN

/// Scratch of `exchange_routing` between GPUs where `dispatch_options::capacity_factor` is set: device memory that no
/// peer writes. Without a capacity it takes none.
/// @tparam A Type of routing weights.
template <class A>
struct capacity_workspace {
  /// This rank's pairs sorted by expert, of which rows beyond the capacity are taken away. `expert_row_of [T, K]` then
  /// becomes the ids of the pairs that are left. `drop_order::position` needs neither `gather` nor `pair_weights`.
  router_lists<A> lists;

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  /// @param options Of the dispatch.
  static capacity_workspace layout(memory_builder& builder, const dispatch_bounds& bounds,
                                   const dispatch_options& options) {
    capacity_workspace room;
    const bool any = options.has_capacity();
    const std::int64_t pairs = any ? bounds.max_sent_pairs() : 0;
    const std::int64_t weighed = options.order == drop_order::weight ? pairs : 0;
    room.lists.row_offsets = builder.take<std::int32_t>("rows of experts", any ? bounds.num_experts + 1 : 0);
    room.lists.expert_row_of = builder.take<std::int32_t>("pairs that are kept", pairs);
    room.lists.gather = builder.take<std::int32_t>("tokens by expert", weighed);
    room.lists.pair_weights = builder.take<A>("weights by expert", weighed);
    return room;
  }
};

TESSERA_NAMESPACE_END
