// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/dispatch/detail/device/drop.cuh>
#include <tessera/dispatch/detail/device/mark_pairs.cuh>
#include <tessera/dispatch/handle.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/layout/expert_layout.hpp>
#include <tessera/router/detail/device/route.cuh>

// Lists of a routing that exists already: the second half of the router's kernel.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

// Ids out of range are no pairs, nor are those that have no row in `rows_before`, if there is one.
template <class Layout>
struct layout_slot {
  Layout layout;
  const std::int32_t* rows_before = nullptr;  // what an earlier sort has written, and this one writes over
  __device__ int operator()(int expert, std::int64_t pair) const {
    if (expert < 0 || expert >= layout.num_experts()) return -1;
    if (rows_before != nullptr && rows_before[pair] < 0) return -1;
    return static_cast<int>(layout.owner(expert, 0).slot);
  }
};

template <class A, class Layout>
struct sort_task {
  list_plan plan;
  list_task<A, layout_slot<Layout>> lists;
  typename dispatch_handle<A>::totals* total;  // null: set already
};

template <class A, class Layout>
__launch_bounds__(list_threads, 1) TESSERA_KERNEL sort_pairs_kernel(const __grid_constant__ sort_task<A, Layout> task) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const list_shared shared(shared_bytes, sort_scratch_bytes, task.plan);
  const auto& lists = task.lists;
  const std::uint32_t phase = gridDim.x > 1 && threadIdx.x == 0 ? barrier_phase(lists.workspace.barrier) : 0u;
  shared.clear<list_threads>(task.plan);
  mark_pairs(task.plan, lists, shared);
  if (blockIdx.x == 0 && threadIdx.x == 0 && task.total != nullptr) {
    task.total->num_tokens = lists.ids.rows;
    task.total->received_rows = lists.ids.rows;
    task.total->overflow_drops = 0;
  }
  write_lists<list_threads>(task.plan, lists, shared, phase);
}

template <class Layout, class A>
void sort_on_device(device_stream stream, const Layout& layout, const dispatch_bounds& bounds,
                    const dispatch_options& options, const routing<A>& chosen, const dispatch_handle<A>& handle,
                    const router_workspace& workspace, device_status* status) {
  const std::int64_t pairs = chosen.expert_ids.rows * chosen.expert_ids.cols;
  TESSERA_EXPECTS(layout.num_ranks() == 1, "one rank sorts its own pairs, the layout has " << layout.num_ranks());
  TESSERA_EXPECTS(chosen.expert_ids.rows <= bounds.max_tokens,
                  chosen.expert_ids.rows << " tokens, the bound max_tokens is " << bounds.max_tokens);
  expect_matrix(chosen.expert_ids, -1, bounds.top_k, "expert_ids");
  expect_matrix(chosen.weights, chosen.expert_ids.rows, bounds.top_k, "weights");
  const bool by_weight = options.has_capacity() && options.order == drop_order::weight;
  const bool bounded = pairs > bounds.max_pairs;
  TESSERA_EXPECTS(!by_weight || !bounded, "drop_order::weight on the device needs row_bound >= T * K = "
                                              << pairs << ", it is " << bounds.max_pairs);
  TESSERA_EXPECTS(bounds.num_local_experts >= 1 && bounds.num_local_experts <= max_experts,
                  bounds.num_local_experts << " local experts, expected 1 to " << max_experts);
  TESSERA_EXPECTS(workspace.barrier != nullptr && workspace.block_counts != nullptr,
                  "sorting on the device needs a router_workspace with a barrier and counts of blocks");
  const int num_sms = expect_device("exchange_routing");
  const auto capacity = static_cast<int>(options.capacity(pairs, bounds.num_experts));
  sort_task<A, Layout> task{
      make_list_plan(chosen.expert_ids.rows, bounds.num_local_experts, num_sms, sort_scratch_bytes),
      {chosen.expert_ids,
       chosen.weights,
       {handle.expert_offsets, handle.gather, handle.expert_row_of, handle.pair_weights},
       workspace,
       nullptr,
       &handle.total->capacity_drops,
       &handle.total->received_pairs,
       bounds.num_local_experts,
       by_weight ? INT32_MAX : capacity,
       {layout},
       bounds.max_pairs},
      handle.total};
  const auto sort = [&] {
    launch_cooperative(stream, task.plan, list_threads, sort_pairs_kernel<A, Layout>, task, "sort_pairs_kernel");
  };
  sort();
  if (!by_weight && !bounded) return;
  if (by_weight) {
    drop_light_pairs<A>(stream, chosen.expert_ids, task.lists.lists, bounds.num_local_experts, capacity,
                        &handle.total->capacity_drops);
  } else {
    drop_late_pairs_kernel<typename dispatch_handle<A>::totals>
        <<<1, list_threads, 0, stream.get()>>>({handle.expert_row_of, pairs, bounds.max_pairs, handle.total,
                                                options.overflow == overflow_policy::error, status});
    check_cuda(cudaGetLastError(), "drop_late_pairs_kernel");
  }
  task.lists.slot_of.rows_before = handle.expert_row_of;
  task.lists.capacity = INT32_MAX;
  task.lists.dropped = nullptr;
  task.total = nullptr;
  sort();
}

}  // namespace detail

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
