// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include <tessera/core/device_status.hpp>
#include <tessera/router/detail/device/lists.cuh>
#include <tessera/router/detail/device/select.cuh>
#include <tessera/router/router.hpp>

// Logits to routing, and on to sorted lists, in one launch: one warp per token.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

// Only the first fault is kept.
__device__ inline void report(device_status* status, device_fault fault, std::int64_t token, int expert) {
  if (status == nullptr) return;
  if (atomicCAS(reinterpret_cast<int*>(&status->fault), 0, static_cast<int>(fault)) != 0) return;
  status->token = static_cast<std::int32_t>(token);
  status->expert = expert;
}

// Shared memory of the kernel before the barrier; the lists need 16 KiB of it.
template <class A>
struct list_scratch {
  ranked_key<A> key[list_threads];
  unsigned char rest[sizeof(ranked_key<A>) < 16 ? list_threads * (16 - sizeof(ranked_key<A>)) : 16];
};

template <class Score, class Select, class Weigh, class A>
struct route_task {
  typename Score::options score;
  typename Select::options select;
  typename Weigh::options weigh;
  cell_map map;
  group_plan groups;
  list_plan plan;
  matrix_view<const A> logits;
  const float* bias;
  const std::int32_t* token_ids;
  matrix_view<const std::int32_t> given;
  const std::int32_t* sequence_offsets;
  std::int64_t num_sequence_offsets;
  matrix_view<std::int32_t> ids;
  matrix_view<A> weights;
  std::int64_t* counts;
  bool has_lists;
  list_task<A, same_slot> lists;
  device_status* status;
};

// Ids from a table or from the caller: the lane of each slot keeps a valid id.
template <class Select, class Task>
__device__ __forceinline__ chosen_expert take_given(const Task& task, std::int64_t t, int lane, int k,
                                                    int num_experts) {
  chosen_expert mine;
  const std::int32_t* row = nullptr;
  if constexpr (Select::by == select_by::token_id) {
    const std::int32_t id = task.token_ids[t];
    if (id < 0 || id >= task.select.vocab) {
      if (lane == 0) report(task.status, device_fault::token_id_out_of_range, t, id);
      return mine;
    }
    row = task.select.table + std::int64_t{id} * k;
  } else {
    row = task.given.row(t);
  }
  const int id = lane < k ? row[lane] : no_expert;
  bool valid = lane < k && id >= 0 && id < num_experts;
  if (lane < k && !valid && (id != no_expert || Select::by == select_by::token_id)) {
    report(task.status, device_fault::expert_out_of_range, t, id);
  }
  for (int i = 0; i + 1 < k; ++i) {
    const int other = __shfl_sync(full_warp, id, i);
    if (valid && i < lane && other == id) {
      valid = false;
      report(task.status, device_fault::expert_repeated, t, id);
    }
  }
  if (valid) mine = {id, lane};
  return mine;
}

// One slot of a token's routing, to the stash or to memory.
template <class Task, class A>
__device__ __forceinline__ void keep_pair(const Task& task, const list_stash<A>& stash, std::int64_t t, int local,
                                          int slot, std::int32_t id, A weight) {
  if (task.plan.stash_pairs != 0) {
    const int pair = local * static_cast<int>(task.ids.cols) + slot;
    stash.ids[pair] = id;
    stash.weights[pair] = weight;
  } else {
    task.ids.row(t)[slot] = id;
    task.weights.row(t)[slot] = weight;
  }
}

// Sequences with a token, by one warp.
__device__ inline std::int64_t count_sequences(const std::int32_t* offsets, std::int64_t num_offsets,
                                               std::int64_t num_tokens) {
  if (num_offsets == 0) return num_tokens > 0 ? 1 : 0;
  int sum = 0;
#pragma unroll 4
  for (std::int64_t s = 1 + threadIdx.x % warp_size; s < num_offsets; s += warp_size) {
    sum += offsets[s - 1] < offsets[s] ? 1 : 0;
  }
  return warp_sum(sum);
}

// The barrier's phase, in thread 0.
template <class Task>
__device__ __forceinline__ std::uint32_t phase_of(const Task& task) {
  return task.has_lists && gridDim.x > 1 && threadIdx.x == 0 ? barrier_phase(task.lists.workspace.barrier) : 0u;
}

// After the tokens: counts, and lists where there are any. All threads of all blocks call; E <= Threads.
template <int Threads, class Task>
__device__ __forceinline__ void finish_route(const Task& task, const list_shared& shared, std::uint32_t phase) {
  const int num_experts = task.map.num_experts;
  const int tid = static_cast<int>(threadIdx.x);
  if (task.counts != nullptr && blockIdx.x == 0 && tid < warp_size) {
    const std::int64_t sequences = count_sequences(task.sequence_offsets, task.num_sequence_offsets, task.logits.rows);
    if (tid == 0) {
      task.counts[num_experts] = task.logits.rows;
      task.counts[num_experts + 1] = sequences;
    }
  }
  if (task.has_lists) {
    write_lists<Threads>(task.plan, task.lists, shared, phase);
  } else if (task.counts != nullptr) {
    __syncthreads();
    if (tid < num_experts) {
      const int count = task.plan.one_tile() ? shared.count(task.plan, tid) : static_cast<int>(shared.masks[tid]);
      if (count != 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(task.counts + tid), static_cast<unsigned long long>(count));
      }
    }
  }
}

template <class Score, class Select, class Weigh, bool HasBias, int Chunks, class A>
__launch_bounds__(list_threads, 1) TESSERA_KERNEL
    route_kernel(const __grid_constant__ route_task<Score, Select, Weigh, A> task) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const list_shared shared(shared_bytes, sizeof(list_scratch<A>), task.plan);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  auto* const scratch = reinterpret_cast<ranked_key<A>*>(shared_bytes) + warp * warp_size;

  constexpr bool selects = Select::by == select_by::key || Select::by == select_by::group;
  constexpr bool on_logits = score_selects_on_logits<Score>;
  constexpr bool prefetches = Chunks == 1;
  const cell_map map = task.map;
  const int num_experts = map.num_experts;
  const int k = static_cast<int>(task.ids.cols);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * task.plan.tokens_per_block;
  const std::int64_t block_end = first + task.plan.tokens_per_block;
  const std::int64_t end = block_end < task.logits.rows ? block_end : task.logits.rows;

  const list_stash<A> stash(shared, task.plan);
  shared.clear<list_threads>(task.plan);
  start_early();
  const std::uint32_t phase = phase_of(task);
  cells<Chunks, A> next;
  std::int64_t t = first + warp;
  if (prefetches && t < end) load_cells<Chunks>(task.logits.row(t), map, lane, next);
  __syncthreads();

  for (; t < end; t += list_warps) {
    const A* const row = task.logits.row(t);
    cells<Chunks, A> x;
    if constexpr (prefetches) {
      x = next;
      if (t + list_warps < end) load_cells<Chunks>(task.logits.row(t + list_warps), map, lane, next);
    } else {
      load_cells<Chunks>(row, map, lane, x);
    }
    const bool finite = all_finite<Chunks>(x);
    softmax_terms<A> terms;
    chosen_expert mine;
    if (!finite) {
      if (lane == 0) report(task.status, device_fault::logit_not_finite, t, 0);
    } else if constexpr (selects) {
      if constexpr (!on_logits || Score::over == score_over::all) {
        terms = all_scores<Score, Chunks>(x, map, lane, task.score);
        if constexpr (on_logits) load_cells<Chunks>(row, map, lane, x);
      }
      if constexpr (HasBias) {
        if (task.bias != nullptr) {
          cells<Chunks, float> bias;
          load_cells<Chunks>(task.bias, map, lane, bias);
          if (!all_finite<Chunks>(bias) && lane == 0) report(task.status, device_fault::key_not_finite, t, 0);
          for_each_cell<Chunks>(
              [&](int c, int j) { x.value[c][j] = plain_sum(x.value[c][j], static_cast<A>(bias.value[c][j])); });
        }
      }
      fill_missing<Chunks>(x, map, lane, minus_infinity<A>());
      const auto key_of = [&](int expert) {
        A key = __ldg(row + expert);
        if constexpr (!on_logits) key = score_of<Score>(key, task.score, terms);
        if constexpr (HasBias) {
          if (task.bias != nullptr) key = plain_sum(key, static_cast<A>(__ldg(task.bias + expert)));
        }
        return key;
      };
      if constexpr (Select::by == select_by::group) {
        mask_groups<typename Select::group_score, Chunks>(x, map, task.groups, lane, key_of,
                                                          reinterpret_cast<A*>(scratch));
      }
      mine = select_largest<Chunks>(x, map, lane, k, key_of, scratch);
    } else {
      if constexpr (Score::over == score_over::all) terms = all_scores<Score, Chunks>(x, map, lane, task.score);
      mine = take_given<Select>(task, t, lane, k, num_experts);
    }

    const bool chosen = mine.rank < k;
    A score = A(0);
    if (chosen) {
      const A logit = __ldg(row + mine.id);
      if constexpr (Score::over == score_over::selected) {
        score = score_value<Score>(logit, task.score);
      } else {
        score = score_of<Score>(logit, task.score, terms);
      }
    }
    score = softmax_over_chosen<Score>(score, chosen);
    A sum = A(0);
    if constexpr (!std::is_base_of_v<weigh::raw, Weigh>) sum = warp_sum(score);
    if (chosen) {
      keep_pair(task, stash, t, static_cast<int>(t - first), mine.rank, mine.id,
                weigh_value<Weigh>(score, sum, task.weigh));
      if (task.has_lists || task.counts != nullptr) {
        shared.mark(task.plan, static_cast<int>(t - first), mine.id);
      }
    }
    // unused slots
    const unsigned used = __ballot_sync(full_warp, chosen);
    if (__popc(used) < k) {
      bool unused = lane < k && !chosen;
      if constexpr (selects) {
        unused = lane < k && lane >= __popc(used);
        if (finite && lane == 0) report(task.status, device_fault::too_few_experts, t, __popc(used));
      }
      if (unused) keep_pair(task, stash, t, static_cast<int>(t - first), lane, no_expert, A(0));
    }
  }

  finish_route<list_threads>(task, shared, phase);
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side

inline bool is_vector_aligned(const void* data, std::int64_t stride_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

inline int num_chunks_for(int num_experts) { return num_experts <= warp_size * cell_width ? 1 : 4; }

// @param aligned Whether all rows start on 16 bytes. @param per_lane 0: as many as fill the warp.
inline cell_map make_cell_map(int num_experts, bool aligned, int per_lane = 0) {
  if (per_lane == 0) {
    per_lane = 1;
    while (per_lane < cell_width && warp_size * per_lane < num_experts) per_lane *= 2;
  }
  const bool vectors = aligned && per_lane % 4 == 0 && num_experts % per_lane == 0;
  const bool full = per_lane == cell_width && num_experts == num_chunks_for(num_experts) * warp_size * cell_width;
  return {num_experts, per_lane, vectors, full};
}

// The most experts per lane with which groups are whole lanes, a power of two of them; 0 where there is none.
inline int lanes_for_groups(int num_experts, int group_size) {
  for (const int per_lane : {8, 4, 2, 1, 7, 6, 5, 3}) {
    if (group_size % per_lane != 0) continue;
    const int lanes = group_size / per_lane;
    if ((lanes & (lanes - 1)) != 0 || lanes > warp_size) continue;
    if (num_experts <= num_chunks_for(num_experts) * warp_size * per_lane) return per_lane;
  }
  return 0;
}

// @param starts_early The kernel calls `start_early`.
template <class Task>
void launch_cooperative(device_stream stream, const list_plan& plan, int threads, void (*kernel)(Task),
                        const Task& task, const char* what, bool starts_early = false) {
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (plan.num_blocks > 1) {
    attributes[count].id = cudaLaunchAttributeCooperative;  // blocks wait for each other: all of them run, or none
    attributes[count++].val.cooperative = 1;
  }
  if (starts_early) allow_early_start(kernel, attributes, count, what);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream.get();
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(count);
  check_cuda(cudaLaunchKernelEx(&config, kernel, task), what);
}

}  // namespace detail

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
