// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/device/arrivals.cuh>
#include <tessera/dispatch/detail/device/sort.cuh>
#include <tessera/dispatch/host_sized.hpp>
#include <tessera/layout/expert_layout.hpp>
#include <tessera/router/detail/device/lists.cuh>
#include <tessera/router/detail/device/warp.cuh>

// From the routing of all ranks, which every rank has gathered, to the rows that each level sends and receives. All
// ranks come to the same answer by themselves, so nobody tells anybody how many rows will come.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::host_sized {

inline constexpr int pair_threads = 512;
inline constexpr int number_threads = 1024;

// Tokens of all ranks, and those of this rank's rail.
struct token_grid {
  host_grid grid;
  int rank;
  int max_tokens;

  TESSERA_HD int host() const { return grid.host_of(rank); }
  TESSERA_HD int place() const { return grid.place_of(rank); }
  TESSERA_HD int rail_tokens() const { return grid.hosts() * max_tokens; }
  // Row in tables of all ranks of token `u = h * max_tokens + t` of rail `place`.
  TESSERA_HD int row_of(int place, int u) const {
    const int h = u / max_tokens;
    return (h * grid.ranks_per_host + place) * max_tokens + (u - h * max_tokens);
  }
};

// Tokens that this rank does not have are told, too: nobody need know how many there are.
template <class A>
struct record_task {
  matrix_view<const std::int32_t> ids;  // [T, K]
  matrix_view<const A> weights;         // [T, K]
  std::int64_t max_tokens;
  int num_experts;
  routing_record<A>* own;  // [max_tokens, K]
};

template <class A>
__launch_bounds__(pair_threads) TESSERA_KERNEL record_routing_kernel(const __grid_constant__ record_task<A> task) {
  const std::int64_t pair = static_cast<std::int64_t>(blockIdx.x) * pair_threads + threadIdx.x;
  const int top_k = static_cast<int>(task.ids.cols);
  if (pair >= task.max_tokens * top_k) return;
  const std::int64_t token = pair / top_k;
  const int k = static_cast<int>(pair - token * top_k);
  routing_record<A> record{-1, A(0)};
  if (token < task.ids.rows) {
    const std::int32_t id = task.ids.row(token)[k];
    if (id >= 0 && id < task.num_experts) record = {id, task.weights.row(token)[k]};
  }
  task.own[pair] = record;
}

template <class A, class Layout>
struct owner_task {
  Layout layout;
  token_grid tokens;
  int top_k;
  host_sized_tables<A> tables;
  std::int32_t* pairs;   // [R], 0 before
  std::int32_t* before;  // [3, R], 0 before, see host_sized_lists::pairs_before; null: nobody asks
};

// Who owns the expert of each pair, and how many pairs each rank receives.
template <class A, class Layout>
__launch_bounds__(pair_threads) TESSERA_KERNEL find_owners_kernel(const __grid_constant__ owner_task<A, Layout> task) {
  __shared__ int counts[max_host_sized_ranks];
  __shared__ int counts_before[3][max_host_sized_ranks];
  const token_grid& tokens = task.tokens;
  const host_grid& grid = tokens.grid;
  const bool counted_here = grid.num_ranks <= max_host_sized_ranks;
  for (int r = static_cast<int>(threadIdx.x); r < max_host_sized_ranks; r += pair_threads) {
    counts[r] = 0;
    for (int i = 0; task.before != nullptr && i < 3; ++i) counts_before[i][r] = 0;
  }
  __syncthreads();
  const int pair = static_cast<int>(blockIdx.x) * pair_threads + static_cast<int>(threadIdx.x);
  if (pair < grid.num_ranks * tokens.max_tokens * task.top_k) {
    const int row = pair / task.top_k;
    const int k = pair - row * task.top_k;
    const int source = row / tokens.max_tokens;
    const int t = row - source * tokens.max_tokens;
    const routing_record<A> record = task.tables.records[pair];
    slot_ref owner{-1, no_slot};
    if (record.id >= 0) owner = task.layout.owner(record.id, choose_replica(task.layout, record.id, t));
    const bool any = owner.rank >= 0;
    task.tables.slots[pair] = owner.rank == tokens.rank ? owner.slot : no_slot;
    task.tables.weights[pair] = record.weight;
    if (any) atomicAdd(counted_here ? counts + owner.rank : task.pairs + owner.rank, 1);
    if (grid.place_of(source) == tokens.place()) {
      const bool here = any && grid.host_of(owner.rank) == tokens.host();
      task.tables.owners_within[(grid.host_of(source) * tokens.max_tokens + t) * task.top_k + k] =
          here ? grid.place_of(owner.rank) : -1;
    }
    if (grid.two_levels() && source == tokens.rank) {
      task.tables.owners_across[t * task.top_k + k] = any ? grid.host_of(owner.rank) : -1;
    }
    if (task.before != nullptr) {
      if (source == tokens.rank) task.tables.owners_home[t * task.top_k + k] = any ? owner.rank : -1;
      if (any && source <= tokens.rank) atomicAdd(&counts_before[source == tokens.rank ? 1 : 0][owner.rank], 1);
      if (any && owner.rank == tokens.rank) atomicAdd(&counts_before[2][source], 1);
    }
  }
  __syncthreads();
  if (!counted_here) return;
  for (int r = static_cast<int>(threadIdx.x); r < grid.num_ranks; r += pair_threads) {
    if (counts[r] != 0) atomicAdd(task.pairs + r, counts[r]);
    for (int i = 0; task.before != nullptr && i < 3; ++i) {
      if (counts_before[i][r] != 0) atomicAdd(task.before + i * grid.num_ranks + r, counts_before[i][r]);
    }
  }
}

// Numbers the tokens of `0 <= u < tokens` for which `is_sent(u)`, in order. All threads of a block call.
// @return how many there are.
template <class IsSent, class Write>
__device__ __forceinline__ int number_tokens(int tokens, IsSent is_sent, Write write) {
  __shared__ int sums[number_threads / warp_size];
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  int before = 0;
  for (int first = 0; first < tokens; first += number_threads) {
    const int u = first + static_cast<int>(threadIdx.x);
    const bool sent = u < tokens && is_sent(u);
    const unsigned ballot = __ballot_sync(full_warp, sent);
    if (lane == 0) sums[warp] = __popc(ballot);
    __syncthreads();
    const int earlier = __reduce_add_sync(full_warp, lane < warp ? sums[lane] : 0);
    const int all = __reduce_add_sync(full_warp, sums[lane]);
    if (u < tokens) write(u, sent ? before + earlier + __popc(ballot & ((1u << lane) - 1u)) : -1);
    before += all;
    __syncthreads();  // before the sums are written again
  }
  return before;
}

struct number_task {
  token_grid tokens;
  int top_k;
  const std::int32_t* slots;
  const std::int32_t* owners_within;
  const std::int32_t* owners_across;
  std::int32_t* sent_within;    // [V, G] out: number of a token's row among those for a rank, as are the next
  std::int32_t* placed_within;  // [G * V]
  std::int32_t* sent_across;    // [max_tokens, H]
  std::int32_t* placed_across;  // [H * max_tokens]
  std::int32_t* counts;         // [2 G + 2 H] out: rows sent and received inside the host, then between hosts
};

// A block for each (level, direction, rank).
static __launch_bounds__(number_threads) TESSERA_KERNEL number_rows_kernel(const __grid_constant__ number_task task) {
  const token_grid& tokens = task.tokens;
  const int G = tokens.grid.ranks_per_host;
  const int H = tokens.grid.hosts();
  const int top_k = task.top_k;
  int job = static_cast<int>(blockIdx.x);
  const auto any = [&](const std::int32_t* table, int row, auto is_it) {
    for (int k = 0; k < top_k; ++k) {
      if (is_it(__ldg(table + row * top_k + k))) return true;
    }
    return false;
  };
  const auto named = [](std::int32_t owner) { return owner != -1; };
  const auto finish = [&](int count) {
    if (threadIdx.x == 0) task.counts[blockIdx.x] = count;
  };
  // What stays here is no row to send.
  const auto send = [&](const std::int32_t* owners, std::int32_t* out, int num_tokens, int ranks, int to, int own) {
    return number_tokens(
        num_tokens, [&](int u) { return to != own && any(owners, u, [&](std::int32_t owner) { return owner == to; }); },
        [&](int u, int number) { out[u * ranks + to] = number; });
  };
  if (job < G) return finish(send(task.owners_within, task.sent_within, tokens.rail_tokens(), G, job, tokens.place()));
  job -= G;
  if (job < G) {
    return finish(number_tokens(
        tokens.rail_tokens(), [&](int u) { return any(task.slots, tokens.row_of(job, u), named); },
        [&](int u, int number) { task.placed_within[job * tokens.rail_tokens() + u] = number; }));
  }
  job -= G;
  if (job < H) {
    return finish(send(task.owners_across, task.sent_across, H > 1 ? tokens.max_tokens : 0, H, job, tokens.host()));
  }
  job -= H;
  const int first = job * tokens.max_tokens;
  finish(number_tokens(
      H > 1 ? tokens.max_tokens : 0, [&](int t) { return any(task.owners_within, first + t, named); },
      [&](int t, int number) { task.placed_across[first + t] = number; }));
}

// One level, as kernels see it.
struct level_task {
  int ranks;
  int own;
  int tokens;
  const std::int32_t* placed;  // [P * V]
  level_lists lists;
};

struct list_rows_task {
  token_grid tokens;
  const std::int32_t* counts;  // [2 G + 2 H]
  level_task within, across;
};

// Offsets from counts: rows for each rank or from it. Threads of one warp call. @param count Of a rank.
template <class Count>
__device__ __forceinline__ void prefix_sums(Count count, int ranks, int* offsets) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  int before = 0;
  for (int first = 0; first < ranks; first += warp_size) {
    const int r = first + lane;
    int sum = r < ranks ? count(r) : 0;
#pragma unroll
    for (int step = 1; step < warp_size; step *= 2) {
      const int lower = __shfl_up_sync(full_warp, sum, step);
      if (lane >= step) sum += lower;
    }
    if (r < ranks) offsets[r + 1] = before + sum;
    before += __shfl_sync(full_warp, sum, warp_size - 1);
  }
  if (lane == 0) offsets[0] = 0;
}

// Turns numbers into lists of rows.
static __launch_bounds__(pair_threads) TESSERA_KERNEL list_rows_kernel(const __grid_constant__ list_rows_task task) {
  __shared__ int offsets[4][max_host_sized_ranks + 1];
  const token_grid& tokens = task.tokens;
  const int G = task.within.ranks;
  const int H = task.across.ranks;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  if (warp < 4) {
    const std::int32_t* const from = task.counts + (warp >= 1 ? G : 0) + (warp >= 2 ? G : 0) + (warp >= 3 ? H : 0);
    prefix_sums([&](int r) { return from[r]; }, warp < 2 ? G : H, offsets[warp]);
  }
  __syncthreads();
  const int first = static_cast<int>(blockIdx.x) * pair_threads + static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(gridDim.x) * pair_threads;
  if (blockIdx.x == 0) {
    const auto publish = [&](const int* from, std::int32_t* to, int ranks) {
      for (int r = static_cast<int>(threadIdx.x); r <= ranks; r += pair_threads) to[r] = from[r];
    };
    publish(offsets[0], task.within.lists.sent_offsets, G);
    publish(offsets[1], task.within.lists.received_offsets, G);
    publish(offsets[2], task.across.lists.sent_offsets, H);
    publish(offsets[3], task.across.lists.received_offsets, H);
  }

  // @param source Row that the row of a token is a copy of. @param name What stands for a token in the list.
  const auto list = [&](const level_task& level, const int* sent, const int* received, auto source, auto name) {
    const int sent_pairs = level.tokens * level.ranks;
    for (int i = first; i < sent_pairs; i += threads) {
      const int number = level.lists.places[i];
      if (number < 0) continue;
      const int u = i / level.ranks;
      level.lists.sent_rows[sent[i - u * level.ranks] + number] = source(u);
    }
    for (int i = first; i < sent_pairs; i += threads) {
      const int number = level.placed[i];
      if (number < 0) continue;
      const int from = i / level.tokens;
      const int u = i - from * level.tokens;
      level.lists.arrived[received[from] + number] = name(from, u);
      if (from == level.own) level.lists.sent_rows[sent[level.ranks] + number] = source(u);
    }
  };
  list(
      task.across, offsets[2], offsets[3], [](int t) { return t; },
      [&](int host, int t) { return host * tokens.max_tokens + t; });
  list(
      task.within, offsets[0], offsets[1],
      [&](int u) { return H > 1 ? offsets[3][u / tokens.max_tokens] + task.across.placed[u] : u; },
      [&](int place, int u) { return tokens.row_of(place, u); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Lists of the owner

template <class A>
struct sort_tables_task {
  list_plan plan;
  list_task<A, same_slot> lists;  // over [R * max_tokens, K]
  std::int32_t* slots;            // the tables' again, written where pairs are dropped
  const std::int32_t* pairs;      // [R] that each rank receives
  int num_ranks;
  int rank;
  std::int64_t max_tokens;
  std::int64_t max_pairs;  // of every rank
  bool drops;              // beyond max_pairs; otherwise the host throws
  typename dispatch_handle<A>::totals* total;
};

template <class A>
__launch_bounds__(list_threads, 1) TESSERA_KERNEL sort_tables_kernel(const __grid_constant__ sort_tables_task<A> task) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const list_shared shared(shared_bytes, sort_scratch_bytes, task.plan);
  auto lists = task.lists;
  const std::uint32_t phase = gridDim.x > 1 && threadIdx.x == 0 ? barrier_phase(lists.workspace.barrier) : 0u;
  shared.clear<list_threads>(task.plan);
  bool over = false;
  for (int r = 0; r < task.num_ranks; ++r) over = over || __ldg(task.pairs + r) > task.max_pairs;
  const std::int64_t needed = __ldg(task.pairs + task.rank);
  const bool usable = task.drops || !over;
  if (!usable) {
    forget_pairs(task.plan, lists);
  } else if (needed > task.max_pairs) {
    drop_over_bound(task.plan, lists.ids, task.slots, task.max_pairs);
  }
  mark_pairs(task.plan, lists, shared);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    task.total->num_tokens = task.max_tokens;
    task.total->received_rows = task.lists.ids.rows;
    task.total->overflow_drops = usable && needed > task.max_pairs ? needed - task.max_pairs : 0;
  }
  write_lists<list_threads>(task.plan, lists, shared, phase);
}

// gather[i] = where the row of that token has arrived.
struct resolve_task {
  token_grid tokens;
  const std::int32_t* num_pairs;  // one
  std::int32_t* gather;
  level_task within;
};

static __launch_bounds__(pair_threads) TESSERA_KERNEL resolve_rows_kernel(const __grid_constant__ resolve_task task) {
  const int pair = static_cast<int>(blockIdx.x) * pair_threads + static_cast<int>(threadIdx.x);
  if (pair >= *task.num_pairs) return;
  const token_grid& tokens = task.tokens;
  const int row = task.gather[pair];
  const int source = row / tokens.max_tokens;
  const int place = tokens.grid.place_of(source);
  const int u = tokens.grid.host_of(source) * tokens.max_tokens + (row - source * tokens.max_tokens);
  task.gather[pair] = task.within.lists.received_offsets[place] + task.within.placed[place * task.within.tokens + u];
}

}  // namespace detail::host_sized

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
