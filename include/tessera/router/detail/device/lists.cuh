// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include <tessera/core/views.hpp>
#include <tessera/router/detail/device/warp.cuh>
#include <tessera/router/lists.hpp>

// Sorts pairs by expert, without atomics whose order could show: a block owns neighbouring tokens; it marks which token
// chose which expert in bit masks, publishes how many chose each, waits for the other blocks once, and adds up the
// counts of the blocks before it. A pair's place among those of its block is the number of bits below its own.

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr int list_threads = 1024;
inline constexpr int list_warps = list_threads / warp_size;
inline constexpr std::size_t max_static_shared_bytes = 48 * 1024;

// How tokens are spread over blocks, and shared memory over its uses.
struct list_plan {
  int num_blocks;
  int tokens_per_block;
  int mask_words;   // a tile is 32 * mask_words tokens
  int experts32;    // E rounded up to 32
  int stash_pairs;  // pairs that wait in shared memory until the counts are on their way; 0: they do not
  std::size_t shared_bytes;

  __host__ __device__ bool one_tile() const { return tokens_per_block <= warp_size * mask_words; }
  // Counts of a block in one byte each, so that fewer bytes are read by every block.
  __host__ __device__ bool narrow() const { return tokens_per_block <= 255; }
  // Words of 4 bytes in a row of counts.
  __host__ __device__ int columns() const { return narrow() ? experts32 / 4 : experts32 / 2; }
};

// @param num_sms       Blocks that run at once.
// @param scratch_bytes What the caller needs before the barrier, at least 16 KiB; the partial sums take its place.
// @param least_tokens  A block takes no fewer where there are so many.
// @param top_k         Pairs of a token, where the caller has them for `list_stash`. @param pair_bytes Of one of them.
inline list_plan make_list_plan(std::int64_t num_tokens, int num_experts, int num_sms, std::size_t scratch_bytes,
                                int least_tokens = warp_size, int top_k = 0, std::size_t pair_bytes = 0) {
  list_plan plan;
  const int most = std::max(1, std::min(num_sms, router_workspace::max_blocks));
  const std::int64_t per_block = std::max<std::int64_t>((num_tokens + most - 1) / most, least_tokens);
  TESSERA_EXPECTS(per_block <= 65535, num_tokens << " tokens are too many for one call on the device, at most "
                                                 << std::int64_t{65535} * most << " are possible");
  plan.tokens_per_block = static_cast<int>(per_block);
  plan.num_blocks = static_cast<int>(std::max<std::int64_t>((num_tokens + per_block - 1) / per_block, 1));
  plan.experts32 = (num_experts + warp_size - 1) / warp_size * warp_size;
  const std::size_t fixed = scratch_bytes + (2 * static_cast<std::size_t>(plan.experts32) + 2 * warp_size) * 4;
  const std::size_t mask_bytes = static_cast<std::size_t>(plan.experts32) * 4;
  const auto room = static_cast<int>((max_static_shared_bytes - fixed) / mask_bytes);
  plan.mask_words = std::max(1, std::min({(plan.tokens_per_block + warp_size - 1) / warp_size, room, 8}));
  plan.shared_bytes = fixed + mask_bytes * static_cast<std::size_t>(plan.mask_words);
  plan.stash_pairs = plan.tokens_per_block * top_k;
  const std::size_t stash_bytes = static_cast<std::size_t>(plan.stash_pairs) * pair_bytes;
  if (plan.shared_bytes + stash_bytes <= max_static_shared_bytes) {
    plan.shared_bytes += stash_bytes;
  } else {
    plan.stash_pairs = 0;
  }
  return plan;
}

// Shared memory behind the scratch.
struct list_shared {
  int* partial;          // takes the place of the scratch
  int* base;             // [experts32] first row of the block's pairs of each expert
  int* end;              // [experts32] one past the last row of each expert
  int* sums;             // [2 * 32]
  std::uint32_t* masks;  // [mask_words, experts32]; with several tiles, counts [experts32] until the barrier

  __device__ list_shared(unsigned char* shared, std::size_t scratch_bytes, const list_plan& plan)
      : partial(reinterpret_cast<int*>(shared)),
        base(reinterpret_cast<int*>(shared + scratch_bytes)),
        end(base + plan.experts32),
        sums(end + plan.experts32),
        masks(reinterpret_cast<std::uint32_t*>(sums + 2 * warp_size)) {}

  template <int Threads>
  __device__ void clear(const list_plan& plan) const {
    for (int i = static_cast<int>(threadIdx.x); i < plan.mask_words * plan.experts32; i += Threads) masks[i] = 0;
  }
  // Notes that a token of this block chose `expert`.
  __device__ void mark(const list_plan& plan, int token, int expert) const {
    if (plan.one_tile()) {
      atomicOr(masks + (token / warp_size) * plan.experts32 + expert, 1u << (token % warp_size));
    } else {
      atomicAdd(masks + expert, 1u);
    }
  }
  __device__ int count(const list_plan& plan, int expert) const {
    int sum = 0;
#pragma unroll 2
    for (int w = 0; w < plan.mask_words; ++w) sum += __popc(masks[w * plan.experts32 + expert]);
    return sum;
  }
  // Tokens of the tile before `token` that chose `expert`.
  __device__ int place(const list_plan& plan, int token, int expert) const {
    const int word = token / warp_size;
    int sum = __popc(masks[word * plan.experts32 + expert] & ((1u << (token % warp_size)) - 1u));
#pragma unroll 2
    for (int w = 0; w < word; ++w) sum += __popc(masks[w * plan.experts32 + expert]);
    return sum;
  }
};

// Ids and weights of the block's pairs behind the masks, where the plan has room for them: they go to memory while the
// block waits for the others, and not before it tells them its counts, which would have to wait for these writes.
template <class A>
struct list_stash {
  A* weights;
  std::int32_t* ids;

  __device__ list_stash(const list_shared& shared, const list_plan& plan)
      : weights(reinterpret_cast<A*>(shared.masks + plan.mask_words * plan.experts32)),
        ids(reinterpret_cast<std::int32_t*>(weights + plan.stash_pairs)) {}
};

// What is sorted, and what for. `SlotOf` turns an expert id, of the pair with a number t * K + k, into the slot that
// the lists are sorted by.
template <class A, class SlotOf>
struct list_task {
  matrix_view<const std::int32_t> ids;  // [T, K]
  matrix_view<const A> weights;         // [T, K]
  router_lists<A> lists;
  router_workspace workspace;
  std::int64_t* counts;   // [E + 2]: E counts are written here; null: nobody counts
  std::int64_t* dropped;  // one: pairs beyond the capacity; null: nobody counts
  std::int64_t* kept;     // one: rows; null: nobody asks
  int num_slots;
  int capacity;  // rows of an expert at most
  SlotOf slot_of;
  std::int64_t max_rows = INT32_MAX;           // room in `gather` and `pair_weights`
  matrix_view<std::int32_t> stashed_ids = {};  // where `list_stash` goes, if the plan has one
  matrix_view<A> stashed_weights = {};
};

// Ids that are negative are no pairs. Lists have -1 in their place, and -2 for ids below -1, which say more to those
// who wrote them.
struct same_slot {
  __device__ int operator()(int expert, std::int64_t /*pair*/) const { return expert; }
};

// Words of a row of counts that a thread adds up, 4 or 2 experts each; their sums take 16 bytes each of `partial`.
template <int Threads>
inline constexpr int count_words = Threads >= 1024 ? 1 : 2;

__device__ __forceinline__ uint1 load_counts(const uint1* from) {
  return {__ldcg(reinterpret_cast<const unsigned*>(from))};
}
__device__ __forceinline__ uint2 load_counts(const uint2* from) { return __ldcg(from); }

// Adds up the counts of all blocks, and of those before this one. A thread does so for its words in every `slices`-th
// block; a warp reads whole lines. The sums of a slice go to `partial`.
template <int Threads, bool Narrow>
__device__ __forceinline__ void add_block_counts(const list_plan& plan, const std::uint8_t* counts,
                                                 const list_shared& shared) {
  constexpr int words = count_words<Threads>;
  constexpr int batch = 9;  // with 256 experts and 132 blocks, all of a thread's loads
  constexpr int shift = Narrow ? 8 : 16;
  using word_group = std::conditional_t<words == 2, uint2, uint1>;
  const int columns = plan.columns() / words;
  const int slices = Threads / columns;
  const int slice = static_cast<int>(threadIdx.x) / columns;
  if (slice >= slices) return;
  const int num_blocks = static_cast<int>(gridDim.x);
  const int own = static_cast<int>(blockIdx.x);
  const auto* const column =
      reinterpret_cast<const word_group*>(counts) + (static_cast<int>(threadIdx.x) - slice * columns);

  // Sums of words, and of their odd experts, from which those of the even ones follow. Narrow: experts 0 and 2, then 1
  // and 3, in the halves of a word, which hold 192 * 255.
  std::uint32_t total[2 * words] = {};
  std::uint32_t before[2 * words] = {};
  // every block starts with the row after its own, so that they do not all ask for the same line at once
  int row = slice + own;
  for (int first = slice; first < num_blocks; first += batch * slices) {
    word_group group[batch];
    bool earlier[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      earlier[i] = row >= num_blocks;
      const int wrapped = earlier[i] ? row - num_blocks : row;
      group[i] = word_group{};
      if (first + i * slices < num_blocks) group[i] = load_counts(column + static_cast<unsigned>(wrapped * columns));
      row += slices;
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
#pragma unroll
      for (int w = 0; w < words; ++w) {
        const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(&group[i])[w];
        const std::uint32_t odd = Narrow ? __byte_perm(word, 0, 0x4341) : word >> 16;
        total[2 * w] += word;
        total[2 * w + 1] += odd;
        if (earlier[i]) {
          before[2 * w] += word;
          before[2 * w + 1] += odd;
        }
      }
    }
  }
  auto* const sums = reinterpret_cast<uint4*>(shared.partial) + words * threadIdx.x;
#pragma unroll
  for (int w = 0; w < words; ++w) {
    sums[w] = make_uint4(total[2 * w] - (total[2 * w + 1] << shift), total[2 * w + 1],
                         before[2 * w] - (before[2 * w + 1] << shift), before[2 * w + 1]);
  }
}

// The sums of one expert over the slices.
template <int Threads>
__device__ __forceinline__ void sum_slices(const list_plan& plan, const list_shared& shared, int expert, int& total,
                                           int& before) {
  const int columns = plan.columns();
  const bool narrow = plan.narrow();
  const int column = narrow ? expert / 4 : expert / 2;
  const int which = expert % 2;
  const int shift = narrow && expert % 4 >= 2 ? 16 : 0;
  const std::uint32_t keep = narrow ? 0xffffu : 0xffffffffu;
  const auto* at = shared.partial + column * 4 + which;
  std::uint32_t sums[2] = {};
  // halves do not carry: they hold the sums over all blocks
#pragma unroll 4
  for (int slice = Threads / (columns / count_words<Threads>); slice > 0; --slice, at += columns * 4) {
    sums[0] += static_cast<std::uint32_t>(at[0]);
    sums[1] += static_cast<std::uint32_t>(at[2]);
  }
  total = static_cast<int>((sums[0] >> shift) & keep);
  before = static_cast<int>((sums[1] >> shift) & keep);
}

// Everything after the pairs of this block have been marked. All threads of all blocks call; E <= Threads.
// @param phase In thread 0: of the barrier, read before.
template <int Threads, class A, class SlotOf>
__device__ __forceinline__ void write_lists(const list_plan& plan, const list_task<A, SlotOf>& task,
                                            const list_shared& shared, std::uint32_t phase) {
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % warp_size;
  const int warp = tid / warp_size;
  const int num_slots = task.num_slots;
  const int top_k = static_cast<int>(task.ids.cols);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * plan.tokens_per_block;
  const std::int64_t left = task.ids.rows - first;
  const int tokens = static_cast<int>(left < 0 ? 0 : (left < plan.tokens_per_block ? left : plan.tokens_per_block));
  const bool one_tile = plan.one_tile();

  // publish
  __syncthreads();
  if (tid < plan.experts32) {
    const int count = one_tile ? shared.count(plan, tid) : static_cast<int>(shared.masks[tid]);
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * plan.experts32 + tid;
    if (plan.narrow()) {
      task.workspace.block_counts[at] = static_cast<std::uint8_t>(count);
    } else {
      reinterpret_cast<std::uint16_t*>(task.workspace.block_counts)[at] = static_cast<std::uint16_t>(count);
    }
  }
  __syncthreads();
  const bool others = gridDim.x > 1;
  if (others && tid == 0) barrier_arrive(task.workspace.barrier);

  const int pairs = tokens * top_k;
  const list_stash<A> stash(shared, plan);
  const bool stashed = plan.stash_pairs != 0;
  const auto load_pair = [&](int pair, int& slot, A& weight) {
    const int t = pair / top_k;
    const int k = pair - t * top_k;
    slot = task.slot_of(stashed ? stash.ids[pair] : task.ids.row(first + t)[k], first * top_k + pair);
    weight = stashed ? stash.weights[pair] : task.weights.row(first + t)[k];
    return t;
  };
  const auto write_pair = [&](int pair, int t, int slot, A weight, int place) {
    int row = slot < -1 ? -2 : -1;
    if (slot >= 0) {
      row = shared.base[slot] + place;
      if (row < shared.end[slot]) {
        if (row < task.max_rows) {
          task.lists.gather[row] = static_cast<std::int32_t>(first + t);
          task.lists.pair_weights[row] = weight;
        }
      } else {
        row = -1;
      }
    }
    task.lists.expert_row_of[first * top_k + pair] = row;
  };
  // what does not need the others: the first pair of each thread is ready before they are
  if (stashed) {
#pragma unroll 1
    for (int pair = tid; pair < pairs; pair += Threads) {
      const int t = pair / top_k;
      task.stashed_ids.row(first + t)[pair - t * top_k] = stash.ids[pair];
      task.stashed_weights.row(first + t)[pair - t * top_k] = stash.weights[pair];
    }
  }
  int ready_slot = -1;
  int ready_token = 0;
  int ready_place = 0;
  A ready_weight = A(0);
  if (one_tile && tid < pairs) {
    ready_token = load_pair(tid, ready_slot, ready_weight);
    if (ready_slot >= 0) ready_place = shared.place(plan, ready_token, ready_slot);
  }

  if (others && tid == 0) barrier_wait(task.workspace.barrier, phase);
  __syncthreads();
  if (plan.narrow()) {
    add_block_counts<Threads, true>(plan, task.workspace.block_counts, shared);
  } else {
    add_block_counts<Threads, false>(plan, task.workspace.block_counts, shared);
  }
  __syncthreads();

  // rows before each expert
  const int groups = plan.experts32 / warp_size;
  int total = 0;
  int before = 0;
  int inclusive = 0;
  int kept = 0;
  if (warp < groups) {
    sum_slices<Threads>(plan, shared, tid, total, before);
    kept = total < task.capacity ? total : task.capacity;
    inclusive = kept;
#pragma unroll
    for (int step = 1; step < warp_size; step *= 2) {
      const int lower = __shfl_up_sync(full_warp, inclusive, step);
      if (lane >= step) inclusive += lower;
    }
    if (lane == warp_size - 1) shared.sums[warp] = inclusive;
  }
  __syncthreads();
  if (warp < groups) {
    const int offset = __reduce_add_sync(full_warp, lane < warp ? shared.sums[lane] : 0);
    const int begin = offset + inclusive - kept;
    shared.base[tid] = begin + before;
    shared.end[tid] = begin + kept;
    if (blockIdx.x == 0) {
      if (tid < num_slots) {
        task.lists.row_offsets[tid] = begin;
        if (task.counts != nullptr) task.counts[tid] = total;
      }
      if (tid == num_slots - 1) {
        task.lists.row_offsets[num_slots] = begin + kept;
        if (task.kept != nullptr) *task.kept = begin + kept;
      }
      if (task.dropped != nullptr) {
        const int over = __reduce_add_sync(full_warp, total - kept);
        if (lane == 0) shared.sums[warp_size + warp] = over;
      }
    }
  }
  __syncthreads();
  if (task.dropped != nullptr && blockIdx.x == 0 && warp == 0) {
    const int over = __reduce_add_sync(full_warp, lane < groups ? shared.sums[warp_size + lane] : 0);
    if (lane == 0) *task.dropped = over;
  }

  if (one_tile) {
    if (tid < pairs) write_pair(tid, ready_token, ready_slot, ready_weight, ready_place);
#pragma unroll 1
    for (int pair = tid + Threads; pair < pairs; pair += Threads) {
      int slot;
      A weight;
      const int t = load_pair(pair, slot, weight);
      write_pair(pair, t, slot, weight, slot < 0 ? 0 : shared.place(plan, t, slot));
    }
    return;
  }
  // several tiles: the masks of each again, the bases moving on
  const int tile_tokens = warp_size * plan.mask_words;
  for (int tile = 0; tile < tokens; tile += tile_tokens) {
    const int tile_end = min(tile + tile_tokens, tokens);
    shared.clear<Threads>(plan);
    __syncthreads();
    int slot;
    A weight;
#pragma unroll 1
    for (int pair = tile * top_k + tid; pair < tile_end * top_k; pair += Threads) {
      const int t = load_pair(pair, slot, weight) - tile;
      if (slot >= 0) {
        atomicOr(shared.masks + (t / warp_size) * plan.experts32 + slot, 1u << (t % warp_size));
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int pair = tile * top_k + tid; pair < tile_end * top_k; pair += Threads) {
      const int t = load_pair(pair, slot, weight);
      write_pair(pair, t, slot, weight, slot < 0 ? 0 : shared.place(plan, t - tile, slot));
    }
    __syncthreads();
    if (tid < plan.experts32) shared.base[tid] += shared.count(plan, tid);
    __syncthreads();
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END
