// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include <tessera/router/detail/device/select.cuh>

// A team of 8 lanes holds the keys of a token: its groups, a bound of its K-th key, and the selection in rounds. Lane l
// of a team holds experts [8 l, 8 l + 8) of every 64, which are a cell.

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr int team_threads = 512;
inline constexpr int team_warps = team_threads / warp_size;
inline constexpr int team_size = 8;
inline constexpr int teams_per_warp = warp_size / team_size;
inline constexpr int team_max_k = 8;
inline constexpr int team_max_experts = 256;
inline constexpr int team_most_slots = 4;  // candidates of a lane
inline constexpr int team_candidates = team_most_slots * team_size;

struct team_scratch {
  std::uint64_t word[team_threads / team_size][team_candidates];
  float bias[team_max_experts];
};
static_assert(sizeof(team_scratch) >= 16 * 1024, "the lists' sums take its place");

__device__ __forceinline__ float team_max(float x) {
#pragma unroll
  for (int step = 1; step < team_size; step *= 2) x = fmaxf(x, __shfl_xor_sync(full_warp, x, step));
  return x;
}
__device__ __forceinline__ float team_sum(float x) {
#pragma unroll
  for (int step = 1; step < team_size; step *= 2) x += __shfl_xor_sync(full_warp, x, step);
  return x;
}
// Bit l: lane l of the own team.
__device__ __forceinline__ unsigned team_ballot(bool x, int lane) {
  return (__ballot_sync(full_warp, x) >> (lane & ~(team_size - 1))) & ((1u << team_size) - 1u);
}

__device__ __forceinline__ int team_expert(int cell, int member) {
  return (cell / cell_width) * (team_size * cell_width) + member * cell_width + cell % cell_width;
}

__device__ __forceinline__ std::uint64_t key_word(float key, int id) {
  return (static_cast<std::uint64_t>(ordered(key)) << 32) | static_cast<std::uint32_t>(~id);
}

// The largest key of each cell.
template <int Cells>
__device__ __forceinline__ void cell_maxima(const float (&key)[Cells], float (&top)[Cells / cell_width]) {
#pragma unroll
  for (int c = 0; c < Cells / cell_width; ++c) {
    const float* const x = key + c * cell_width;
    top[c] = fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])), fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7])));
  }
}

// Sets the keys of experts of unselected groups to -inf. A group is whole cells, a power of two of them.
// @param top Written: the largest key of each cell, masked too.
template <class GroupScore, int Cells>
__device__ __forceinline__ void mask_team_groups(float (&key)[Cells], float (&top)[Cells / cell_width],
                                                 const group_plan& plan, int lane, float* scratch) {
  constexpr bool is_top2 = std::is_same_v<GroupScore, select::group_score::top2_sum>;
  const int member = lane % team_size;
  constexpr int chunks = Cells / cell_width;
  float first[chunks];
  float second[chunks];
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    first[c] = minus_infinity<float>();
    second[c] = minus_infinity<float>();
#pragma unroll
    for (int j = 0; j < cell_width; ++j) {
      const float x = key[c * cell_width + j];
      if constexpr (is_top2) second[c] = fmaxf(second[c], fminf(x, first[c]));
      first[c] = fmaxf(first[c], x);
    }
    top[c] = first[c];
  }
  for (int step = 1; step < plan.lanes_per_group; step *= 2) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const float other = __shfl_xor_sync(full_warp, first[c], step);
      if constexpr (is_top2) {
        second[c] = fmaxf(fmaxf(second[c], __shfl_xor_sync(full_warp, second[c], step)), fminf(first[c], other));
      }
      first[c] = fmaxf(first[c], other);
    }
  }
  const int group_shift = __ffs(plan.lanes_per_group) - 1;
  if (member % plan.lanes_per_group == 0) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      const int group = (c * team_size + member) >> group_shift;
      if (group < plan.groups) scratch[group] = is_top2 ? first[c] + second[c] : first[c];
    }
  }
  for (int g = member; g < max_device_groups; g += team_size) {
    if (g >= plan.groups) scratch[g] = minus_infinity<float>();
  }
  __syncwarp();
  // at most 32 groups: 4 per lane, and a bit for each in every lane
  unsigned kept = 0;
  for (int g = member; g < plan.groups; g += team_size) {
    const float own = scratch[g];
    int rank = 0;
#pragma unroll 2
    for (int i = 0; i < plan.groups; i += 4) {
      const float4 other = *reinterpret_cast<const float4*>(scratch + i);
      rank += other.x > own || (other.x == own && i < g) ? 1 : 0;
      rank += other.y > own || (other.y == own && i + 1 < g) ? 1 : 0;
      rank += other.z > own || (other.z == own && i + 2 < g) ? 1 : 0;
      rank += other.w > own || (other.w == own && i + 3 < g) ? 1 : 0;
    }
    if (rank < plan.kept && own > minus_infinity<float>()) kept |= 1u << g;
  }
#pragma unroll
  for (int step = 1; step < team_size; step *= 2) kept |= __shfl_xor_sync(full_warp, kept, step);
  __syncwarp();
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    const bool keep = ((kept >> ((c * team_size + member) >> group_shift)) & 1u) != 0;
    top[c] = keep ? top[c] : minus_infinity<float>();
#pragma unroll
    for (int j = 0; j < cell_width; ++j)
      key[c * cell_width + j] = keep ? key[c * cell_width + j] : minus_infinity<float>();
  }
}

// Sorts a sequence that descends and then ascends, or the other way round: descending.
template <int Count>
__device__ __forceinline__ void sort_bitonic(float (&x)[Count]) {
#pragma unroll
  for (int step = Count / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if ((i & step) != 0) continue;
      const float low = fminf(x[i], x[i + step]);
      x[i] = fmaxf(x[i], x[i + step]);
      x[i + step] = low;
    }
  }
}

// This lane's descending numbers and those of the lane `step` away: descending.
template <int Count>
__device__ __forceinline__ void join_lanes(const float (&own)[Count], int step, float (&all)[2 * Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    all[i] = own[i];
    all[2 * Count - 1 - i] = __shfl_xor_sync(full_warp, own[i], step);
  }
  sort_bitonic(all);
}

// The larger half of this lane's numbers and those of the lane `step` away, both descending; the result is bitonic.
template <int Count>
__device__ __forceinline__ void larger_half(float (&x)[Count], int step) {
  float other[Count];
#pragma unroll
  for (int i = 0; i < Count; ++i) other[i] = __shfl_xor_sync(full_warp, x[i], step);
#pragma unroll
  for (int i = 0; i < Count; ++i) x[i] = fmaxf(x[i], other[Count - 1 - i]);
}

// The K-th largest of the numbers of a team, K at most 8; each lane has 2 or 4 of them, descending.
template <int Count>
__device__ __forceinline__ float team_kth(const float (&own)[Count], int lane, int k) {
  static_assert((Count == 2 || Count == 4) && team_size == 8 && team_max_k == 8);
  float best[team_max_k];
  if constexpr (Count == 4) {
    join_lanes(own, 1, best);
    larger_half(best, 2);
    sort_bitonic(best);
  } else {
    float pair[4];
    join_lanes(own, 1, pair);
    join_lanes(pair, 2, best);
  }
  // The K-th is the smallest of the K largest: with 8 - K numbers above all others it is the eighth.
  for (int more = k; more < team_max_k; ++more) {
    if ((lane & 4) != 0) continue;
#pragma unroll
    for (int i = team_max_k - 1; i > 0; --i) best[i] = best[i - 1];
    best[0] = -minus_infinity<float>();
  }
  larger_half(best, 4);
  float least = best[0];
#pragma unroll
  for (int i = 1; i < team_max_k; ++i) least = fminf(least, best[i]);
  return least;
}

// K rounds, each of which takes the largest key that is left; lane r of the team gets the expert of rank r, or -1.
template <int Cells>
__device__ __noinline__ int team_rounds(float (&key)[Cells], int lane, int k) {
  const int member = lane % team_size;
  int mine = no_expert;
  for (int round = 0; round < k; ++round) {
    std::uint64_t best = 0;
    for (int i = 0; i < Cells; ++i) {
      if (key[i] > minus_infinity<float>()) {
        const std::uint64_t word = key_word(key[i], team_expert(i, member));
        best = word > best ? word : best;
      }
    }
    for (int step = 1; step < team_size; step *= 2) {
      const std::uint64_t other = __shfl_xor_sync(full_warp, best, step);
      best = other > best ? other : best;
    }
    if (best == 0) continue;
    const int id = static_cast<int>(~static_cast<std::uint32_t>(best));
    if (member == round) mine = id;
    for (int i = 0; i < Cells; ++i) {
      if (team_expert(i, member) == id) key[i] = minus_infinity<float>();
    }
  }
  return mine;
}

}  // namespace detail

TESSERA_NAMESPACE_END
