// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/core/views.hpp>
#include <tessera/dispatch/capacity.hpp>
#include <tessera/dispatch/detail/device/sort.cuh>
#include <tessera/layout/block.hpp>

// A capacity between GPUs. What a rank keeps of its own pairs depends on no other rank, so they are dropped before the
// routing travels, by the sort that one GPU has: the exchange reads ids in which dropped pairs name no expert. The
// router's own ids stay as they are, for its gradients.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr int keep_threads = 256;

// rows[t, k] = the pair's id where it has a row, otherwise no_expert.
static __launch_bounds__(keep_threads) TESSERA_KERNEL
    keep_ids_kernel(const __grid_constant__ matrix_view<const std::int32_t> ids, std::int32_t* rows) {
  const std::int64_t pair = static_cast<std::int64_t>(blockIdx.x) * keep_threads + threadIdx.x;
  if (pair >= ids.rows * ids.cols) return;
  const std::int64_t token = pair / ids.cols;
  rows[pair] = rows[pair] >= 0 ? ids.row(token)[pair - token * ids.cols] : no_expert;
}

// The routing without the pairs that this rank drops; `chosen` itself where there is no capacity. Ids are those of
// `room`, until it is written again.
// @param sort Its counts of blocks have room for E experts. @param blocks Most that run at once.
// @param dropped One: how many went.
template <class A>
routing<A> keep_within_capacity(device_stream stream, const dispatch_bounds& bounds, const dispatch_options& options,
                                const routing<A>& chosen, const router_workspace& sort,
                                const capacity_workspace<A>& room, int blocks, std::int64_t* dropped) {
  if (!options.has_capacity()) return chosen;
  const bool by_weight = options.order == drop_order::weight;
  TESSERA_EXPECTS(bounds.num_experts >= 1 && bounds.num_experts <= max_experts,
                  bounds.num_experts << " experts, expected 1 to " << max_experts << " with a capacity");
  TESSERA_EXPECTS(room.lists.expert_row_of != nullptr && room.lists.row_offsets != nullptr &&
                      (!by_weight || (room.lists.gather != nullptr && room.lists.pair_weights != nullptr)),
                  "exchange_routing with capacity_factor = "
                      << options.capacity_factor << " needs a capacity_workspace::layout of the same options");
  const std::int64_t pairs = chosen.expert_ids.rows * chosen.expert_ids.cols;
  const auto capacity = static_cast<int>(options.capacity(pairs, bounds.num_experts));
  const layout::block all(bounds.num_experts, 1);
  const sort_task<A, layout::block> task{
      .plan = make_list_plan(chosen.expert_ids.rows, bounds.num_experts, blocks, sort_scratch_bytes),
      .lists = {.ids = chosen.expert_ids,
                .weights = chosen.weights,
                .lists = room.lists,
                .workspace = sort,
                .counts = nullptr,
                .dropped = dropped,
                .kept = nullptr,
                .num_slots = bounds.num_experts,
                .capacity = by_weight ? INT32_MAX : capacity,
                .slot_of = {all},
                .max_rows = by_weight ? INT32_MAX : 0},  // rows by position are only counted
      .total = nullptr};
  launch_cooperative(stream, task.plan, list_threads, sort_pairs_kernel<A, layout::block>, task, "sort_pairs_kernel");
  if (by_weight) drop_light_pairs(stream, chosen.expert_ids, room.lists, bounds.num_experts, capacity, dropped);
  if (pairs > 0) {
    const auto grid = static_cast<unsigned>((pairs + keep_threads - 1) / keep_threads);
    keep_ids_kernel<<<grid, keep_threads, 0, stream.get()>>>(chosen.expert_ids, room.lists.expert_row_of);
    expect_launched("keep_ids_kernel");
  }
  return {{room.lists.expert_row_of, chosen.expert_ids.rows, chosen.expert_ids.cols}, chosen.weights};
}

}  // namespace detail

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
