// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/detail/launch.cuh>
#include <tessera/dispatch/detail/device/arrivals.cuh>
#include <tessera/dispatch/detail/device/mark_pairs.cuh>
#include <tessera/dispatch/handle.hpp>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/dispatch/symmetric.hpp>
#include <tessera/layout/expert_layout.hpp>
#include <tessera/router/detail/device/lists.cuh>

// The routing of every rank, pushed to every rank before the rows, and sorted there while rows travel. The source looks
// the owner up: a destination sees the slots of its own experts, and no_slot where a pair is another's.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

inline constexpr int push_threads = 512;
inline constexpr int destination_threads = 128;
// Blocks of a sort that wait for tables by themselves; more would keep SMs from other work, and fewer would wait for a
// launch that few tokens notice.
inline constexpr int most_waiting_blocks = 16;

// Whether one kernel pushes the tables and sorts what arrives, for routings of `rows` tokens of all ranks: while so few
// rows travel there is no time for two kernels, and one block is enough to push them.
constexpr bool push_and_sort_at_once(std::int64_t rows) { return rows <= most_waiting_blocks * warp_size; }

template <class A, class Layout>
struct push_task {
  comm::symmetric_view view;
  Layout layout;
  matrix_view<const std::int32_t> ids;  // [T, K]
  matrix_view<const A> weights;         // [T, K]
  std::int64_t max_tokens;
  routing_tables<A> tables;
  const std::int64_t* expert_counts;  // [num_counts] of this rank; null: nobody asks
  int num_counts;
};

template <class Layout>
__device__ __forceinline__ slot_ref owner_of(const Layout& layout, const matrix_view<const std::int32_t>& ids,
                                             std::int64_t token, int k) {
  const std::int32_t id = ids.row(token)[k];
  if (id < 0 || id >= layout.num_experts()) return {-1, no_slot};
  return layout.owner(id, choose_replica(layout, id, token));
}

// [T] bit r: rank r owns an expert of the token. All that rows and sums need of a routing, before others know it.
template <class Layout>
__launch_bounds__(destination_threads) TESSERA_KERNEL
    find_destinations_kernel(const __grid_constant__ Layout layout,
                             const __grid_constant__ matrix_view<const std::int32_t> ids, std::uint32_t* destinations) {
  // in this order: a kernel behind this one is not to take the room of what the one ahead waits for
  await_stream();
  let_next_start();
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * destination_threads + threadIdx.x;
  if (token >= ids.rows) return;
  std::uint32_t mask = 0;
#pragma unroll 4
  for (int k = 0; k < static_cast<int>(ids.cols); ++k) {
    const auto owner = owner_of(layout, ids, token, k);
    if (owner.rank >= 0) mask |= 1u << owner.rank;
  }
  destinations[token] = mask;
}

// Adds the pairs of thread `index` of `threads` to `counts` [R] in shared memory, by owner.
template <class A, class Layout>
__device__ __forceinline__ void count_pairs(const push_task<A, Layout>& task, std::int64_t index, std::int64_t threads,
                                            int* counts) {
  for (std::int64_t token = index; token < task.ids.rows; token += threads) {
    for (int k = 0; k < static_cast<int>(task.ids.cols); ++k) {
      const auto owner = owner_of(task.layout, task.ids, token, k);
      if (owner.rank >= 0) atomicAdd(counts + owner.rank, 1);
    }
  }
}

// Writes the pairs of thread `index` of `threads` to all ranks. Tokens that this rank does not have are written too:
// the destination need not know how many there are.
template <class A, class Layout>
__device__ __forceinline__ void push_pairs(const push_task<A, Layout>& task, std::int64_t index, std::int64_t threads) {
  const comm::symmetric_view& view = task.view;
  const int top_k = static_cast<int>(task.ids.cols);
  const std::int64_t pairs = task.max_tokens * top_k;
  std::int32_t* const own_slots = task.tables.slots + view.rank * pairs;
  A* const own_weights = task.tables.weights + view.rank * pairs;
  for (std::int64_t pair = index; pair < pairs; pair += threads) {
    const std::int64_t token = pair / top_k;
    const int k = static_cast<int>(pair - token * top_k);
    slot_ref owner{-1, no_slot};
    A weight = A(0);
    if (token < task.ids.rows) {
      owner = owner_of(task.layout, task.ids, token, k);
      weight = task.weights.row(token)[k];
    }
    for (int r = 0; r < view.size; ++r) {
      *at_peer(view, own_slots + pair, r) = owner.rank == r ? static_cast<std::int32_t>(owner.slot) : no_slot;
      *at_peer(view, own_weights + pair, r) = weight;
    }
  }
}

// Writes the counts to all ranks and says that everything is there. All threads of the block that knows what all blocks
// have written call. @param sum In thread r: pairs for rank r.
template <class A, class Layout>
__device__ __forceinline__ void push_counts(const push_task<A, Layout>& task, std::int32_t sum,
                                            std::uint32_t generation) {
  const comm::symmetric_view& view = task.view;
  const int tid = static_cast<int>(threadIdx.x);
  if (tid < view.size) {
    for (int r = 0; r < view.size; ++r) *at_peer(view, task.tables.counts + view.rank * view.size + tid, r) = sum;
  }
  if (task.expert_counts != nullptr) {
    std::int64_t* const own = task.tables.expert_counts + view.rank * task.num_counts;
    for (int i = tid; i < task.num_counts; i += static_cast<int>(blockDim.x)) {
      const std::int64_t count = task.expert_counts[i];
      for (int r = 0; r < view.size; ++r) *at_peer(view, own + i, r) = count;
    }
  }
  __syncthreads();
  if (tid < view.size) post(at_peer(view, view.arrived + view.rank, tid), generation);
}

template <class A, class Layout>
__launch_bounds__(push_threads) TESSERA_KERNEL push_routing_kernel(const __grid_constant__ push_task<A, Layout> task) {
  const comm::symmetric_view& view = task.view;
  if (block_failed(view)) return;
  __shared__ int counts[comm::max_symmetric_ranks];
  const int tid = static_cast<int>(threadIdx.x);
  const std::uint32_t generation = next_generation(view);
  if (blockIdx.x == 0 && tid < warp_size) announce(view, generation);
  if (tid < comm::max_symmetric_ranks) counts[tid] = 0;
  __syncthreads();

  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * push_threads + tid;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * push_threads;
  count_pairs(task, index, threads, counts);
  __syncthreads();
  if (tid < view.size) task.tables.block_counts[blockIdx.x * comm::max_symmetric_ranks + tid] = counts[tid];
  if (!all_entered(view, generation)) return;
  push_pairs(task, index, threads);

  __shared__ bool last;
  __syncthreads();
  if (tid == 0) last = last_block(view);
  __syncthreads();
  if (!last) return;
  std::int32_t sum = 0;
  for (unsigned b = 0; tid < view.size && b < gridDim.x; ++b)
    sum += __ldcg(task.tables.block_counts + b * comm::max_symmetric_ranks + tid);
  push_counts(task, sum, generation);
  if (tid == 0) finish(view, generation);
}

// ---------------------------------------------------------------------------------------------------------------------
// At the destination

template <class A>
struct arrival_task {
  comm::symmetric_view view;
  list_plan plan;
  list_task<A, same_slot> lists;  // over [R * max_tokens, K]
  std::int32_t* slots;            // the tables' again, written where pairs are dropped
  const std::int32_t* counts;     // [R, R] pairs from each rank to each
  std::int64_t max_tokens;
  std::int64_t max_pairs;  // of every rank
  bool drops;              // beyond max_pairs; otherwise that is a failure
  typename dispatch_handle<A>::totals* total;
  const std::int64_t* expert_counts;  // [R, num_counts] of all ranks
  std::int64_t* sum_of_counts;        // [num_counts], written; null: nobody asks
  int num_counts;
};

// Pairs that rank `to` would receive.
__device__ __forceinline__ std::int64_t pairs_to(const comm::symmetric_view& view, const std::int32_t* counts, int to) {
  std::int64_t sum = 0;
  for (int from = 0; from < view.size; ++from) sum += __ldcg(counts + from * view.size + to);
  return sum;
}

// True in all threads of the block when the tables of every rank are there. @param usable Whether to wait at all.
__device__ __forceinline__ bool all_arrived(const comm::symmetric_view& view, std::uint32_t generation, bool usable) {
  const int r = static_cast<int>(threadIdx.x);
  if (r < view.size) usable = usable && await(view, view.arrived + r, generation, r, symmetric_step::arrival);
  return __syncthreads_and(usable) != 0;
}

// Sorts the tables. After a failure lists are empty, and valid: what reads them does nothing. All threads of all blocks
// call, after `shared` has been cleared. @param usable Whether the tables are there. @param phase As for `write_lists`.
template <class A>
__device__ __forceinline__ void sort_arrivals(const arrival_task<A>& task, const list_shared& shared, bool usable,
                                              std::uint32_t phase) {
  const comm::symmetric_view& view = task.view;
  const int tid = static_cast<int>(threadIdx.x);
  std::int64_t needed = 0;
  if (usable) {
    int over = -1;
    for (int r = 0; r < view.size; ++r) {
      const std::int64_t pairs = pairs_to(view, task.counts, r);
      if (r == view.rank) needed = pairs;
      if (over < 0 && pairs > task.max_pairs) over = r;
    }
    if (over >= 0 && !task.drops) {
      if (tid == 0) {
        record(view, over, symmetric_step::overflow, static_cast<std::uint32_t>(pairs_to(view, task.counts, over)));
      }
      usable = false;
    } else if (needed > task.max_pairs) {
      drop_over_bound(task.plan, task.lists.ids, task.slots, task.max_pairs);
    }
  }
  auto lists = task.lists;
  if (!usable) forget_pairs(task.plan, lists);
  if (blockIdx.x == 0 && task.sum_of_counts != nullptr) {
    for (int i = tid; i < task.num_counts; i += list_threads) {
      std::int64_t sum = 0;
      for (int r = 0; usable && r < view.size; ++r) sum += __ldcg(task.expert_counts + r * task.num_counts + i);
      task.sum_of_counts[i] = sum;
    }
  }
  mark_pairs(task.plan, lists, shared);
  if (blockIdx.x == 0 && tid == 0) {
    task.total->num_tokens = task.max_tokens;
    task.total->received_rows = lists.ids.rows;
    task.total->overflow_drops = usable && needed > task.max_pairs ? needed - task.max_pairs : 0;
  }
  write_lists<list_threads>(task.plan, lists, shared, phase);
}

template <class A>
__launch_bounds__(list_threads, 1) TESSERA_KERNEL sort_arrivals_kernel(const __grid_constant__ arrival_task<A> task) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const comm::symmetric_view& view = task.view;
  const list_shared shared(shared_bytes, sort_scratch_bytes, task.plan);
  const std::uint32_t phase = gridDim.x > 1 && threadIdx.x == 0 ? barrier_phase(task.lists.workspace.barrier) : 0u;
  shared.clear<list_threads>(task.plan);
  const bool usable = all_arrived(view, current_generation(view), !failed(view));
  sort_arrivals(task, shared, usable, phase);
}

// ---------------------------------------------------------------------------------------------------------------------
// Both, for few tokens

template <class A, class Layout>
struct exchange_task {
  push_task<A, Layout> push;
  arrival_task<A> sort;
};

// The first block pushes with one release, all blocks sort. Tables are under way before rows fill the links, and
// nothing is launched between them and the sort. All blocks run at once: those that sort wait for the one that pushes.
template <class A, class Layout>
__launch_bounds__(list_threads, 1) TESSERA_KERNEL
    exchange_tables_kernel(const __grid_constant__ exchange_task<A, Layout> task) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ int counts[comm::max_symmetric_ranks];
  const comm::symmetric_view& view = task.push.view;
  const int tid = static_cast<int>(threadIdx.x);
  const std::uint32_t generation = next_generation(view);
  const list_shared shared(shared_bytes, sort_scratch_bytes, task.sort.plan);
  const std::uint32_t phase = gridDim.x > 1 && tid == 0 ? barrier_phase(task.sort.lists.workspace.barrier) : 0u;
  if (tid < comm::max_symmetric_ranks) counts[tid] = 0;
  bool usable = !block_failed(view);
  if (blockIdx.x == 0 && usable) {
    if (tid < warp_size) announce(view, generation);
    count_pairs(task.push, tid, list_threads, counts);
  }
  shared.clear<list_threads>(task.sort.plan);
  // Every block waits for entries, though only one writes: a rank that does not come is to be missed by this name.
  usable = usable && all_entered(view, generation);
  const bool pushes = blockIdx.x == 0 && usable;
  if (pushes) {
    push_pairs(task.push, tid, list_threads);
    push_counts(task.push, tid < view.size ? counts[tid] : 0, generation);  // counted before the barrier of the wait
  }
  sort_arrivals(task.sort, shared, all_arrived(view, generation, usable), phase);
  // The others have read the generation before they came to the barrier of the lists.
  if (pushes && tid == 0) finish(view, generation);
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
