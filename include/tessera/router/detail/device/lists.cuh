// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

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
  int mask_words;  // a tile is 32 * mask_words tokens
  int experts32;   // E rounded up to 32
  std::size_t shared_bytes;

  __host__ __device__ bool one_tile() const { return tokens_per_block <= warp_size * mask_words; }
  // Counts of a block in one byte each, so that fewer bytes are read by every block.
  __host__ __device__ bool narrow() const { return tokens_per_block <= 255; }
};

// @param scratch_bytes What the caller needs before the barrier, at least 8 KiB; the partial sums take its place.
// @param num_sms       Blocks that run at once.
inline list_plan make_list_plan(std::int64_t num_tokens, int num_experts, int num_sms, std::size_t scratch_bytes) {
  list_plan plan;
  const int most = std::max(1, std::min(num_sms, router_workspace::max_blocks));
  const std::int64_t per_block = std::max<std::int64_t>((num_tokens + most - 1) / most, warp_size);
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

  __device__ void clear(const list_plan& plan) const {
    for (int i = static_cast<int>(threadIdx.x); i < plan.mask_words * plan.experts32; i += list_threads) masks[i] = 0;
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
    for (int w = 0; w < plan.mask_words; ++w) sum += __popc(masks[w * plan.experts32 + expert]);
    return sum;
  }
  // Tokens of the tile before `token` that chose `expert`.
  __device__ int place(const list_plan& plan, int token, int expert) const {
    const int word = token / warp_size;
    int sum = __popc(masks[word * plan.experts32 + expert] & ((1u << (token % warp_size)) - 1u));
    for (int w = 0; w < word; ++w) sum += __popc(masks[w * plan.experts32 + expert]);
    return sum;
  }
};

// What is sorted, and what for. `SlotOf` turns an expert id into the slot that the lists are sorted by.
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
};

struct same_slot {
  __device__ int operator()(int expert) const { return expert; }
};

// Adds up the counts of all blocks, and of those before this one, for 32 experts per warp. A thread reads the counts of
// 4 experts in some of the blocks.
template <class Word>
__device__ __forceinline__ void add_block_counts(const list_plan& plan, const std::uint8_t* counts,
                                                 const list_shared& shared) {
  constexpr bool narrow = sizeof(Word) == 4;
  constexpr int batch = 8;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int groups = plan.experts32 / warp_size;
  const int supers = list_warps / groups;
  const int group = warp % groups;
  const int super = warp / groups;
  if (super >= supers) return;
  const int column = group * 8 + lane % 8;
  const int num_slices = supers * 4;
  const int num_blocks = static_cast<int>(gridDim.x);
  const int own = static_cast<int>(blockIdx.x);
  const Word* const words = reinterpret_cast<const Word*>(counts) + column;
  const int row_words = plan.experts32 / 4;

  int total[4] = {};
  int before[4] = {};
  std::uint32_t packed[4] = {};  // total of experts 0 and 2, 1 and 3; before of the same: 16 bits hold 192 * 255
  for (int row = super * 4 + lane / 8; row < num_blocks; row += batch * num_slices) {
    Word word[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int r = row + i * num_slices;
      word[i] = r < num_blocks ? __ldcg(words + static_cast<std::int64_t>(r) * row_words) : Word{};
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const bool earlier = row + i * num_slices < own;
      if constexpr (narrow) {
        const std::uint32_t even = word[i] & 0x00ff00ffu;
        const std::uint32_t odd = (word[i] >> 8) & 0x00ff00ffu;
        packed[0] += even;
        packed[1] += odd;
        packed[2] += earlier ? even : 0u;
        packed[3] += earlier ? odd : 0u;
      } else {
        const int value[4] = {static_cast<int>(word[i].x & 0xffffu), static_cast<int>(word[i].x >> 16),
                              static_cast<int>(word[i].y & 0xffffu), static_cast<int>(word[i].y >> 16)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total[j] += value[j];
          before[j] += earlier ? value[j] : 0;
        }
      }
    }
  }
#pragma unroll
  for (int step = 8; step < warp_size; step *= 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (narrow) {
        packed[j] += __shfl_xor_sync(full_warp, packed[j], step);
      } else {
        total[j] += __shfl_xor_sync(full_warp, total[j], step);
        before[j] += __shfl_xor_sync(full_warp, before[j], step);
      }
    }
  }
  if constexpr (narrow) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int half = (j / 2) * 16;
      total[j] = static_cast<int>((packed[j % 2] >> half) & 0xffffu);
      before[j] = static_cast<int>((packed[2 + j % 2] >> half) & 0xffffu);
    }
  }
  if (lane < 8) {
    int* const out = shared.partial + super * 2 * plan.experts32 + column * 4;
    *reinterpret_cast<int4*>(out) = make_int4(total[0], total[1], total[2], total[3]);
    *reinterpret_cast<int4*>(out + plan.experts32) = make_int4(before[0], before[1], before[2], before[3]);
  }
}

// Everything after the pairs of this block have been marked. All threads of all blocks call.
template <class A, class SlotOf>
__device__ __forceinline__ void write_lists(const list_plan& plan, const list_task<A, SlotOf>& task,
                                            const list_shared& shared) {
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
  std::uint32_t arrived = 0;
  const bool others = gridDim.x > 1;
  if (others && tid == 0) arrived = barrier_arrive(task.workspace.barrier);

  // the first pair of each thread is ready before the others are
  const auto load_pair = [&](int pair, int& slot, A& weight) {
    const int t = pair / top_k;
    const int k = pair - t * top_k;
    const int id = task.ids.row(first + t)[k];
    slot = id < 0 ? -1 : task.slot_of(id);
    weight = task.weights.row(first + t)[k];
    return t;
  };
  const auto write_pair = [&](int pair, int t, int slot, A weight, int place) {
    int row = -1;
    if (slot >= 0) {
      row = shared.base[slot] + place;
      if (row < shared.end[slot]) {
        task.lists.gather[row] = static_cast<std::int32_t>(first + t);
        task.lists.pair_weights[row] = weight;
      } else {
        row = -1;
      }
    }
    task.lists.expert_row_of[first * top_k + pair] = row;
  };
  int ready_slot = -1;
  int ready_token = 0;
  int ready_place = 0;
  A ready_weight = A(0);
  const int pairs = tokens * top_k;
  if (one_tile && tid < pairs) {
    ready_token = load_pair(tid, ready_slot, ready_weight);
    if (ready_slot >= 0) ready_place = shared.place(plan, ready_token, ready_slot);
  }

  if (others && tid == 0) barrier_wait(task.workspace.barrier, arrived);
  __syncthreads();
  if (plan.narrow()) {
    add_block_counts<std::uint32_t>(plan, task.workspace.block_counts, shared);
  } else {
    add_block_counts<uint2>(plan, task.workspace.block_counts, shared);
  }
  __syncthreads();

  // rows before each expert
  const int groups = plan.experts32 / warp_size;
  int total = 0;
  int before = 0;
  int inclusive = 0;
  int kept = 0;
  if (warp < groups) {
    for (int super = 0; super < list_warps / groups; ++super) {
      total += shared.partial[super * 2 * plan.experts32 + tid];
      before += shared.partial[(super * 2 + 1) * plan.experts32 + tid];
    }
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
    for (int pair = tid + list_threads; pair < pairs; pair += list_threads) {
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
    shared.clear(plan);
    __syncthreads();
    int slot;
    A weight;
    for (int pair = tile * top_k + tid; pair < tile_end * top_k; pair += list_threads) {
      const int t = load_pair(pair, slot, weight) - tile;
      if (slot >= 0) {
        atomicOr(shared.masks + (t / warp_size) * plan.experts32 + slot, 1u << (t % warp_size));
      }
    }
    __syncthreads();
    for (int pair = tile * top_k + tid; pair < tile_end * top_k; pair += list_threads) {
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
