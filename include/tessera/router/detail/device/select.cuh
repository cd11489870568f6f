// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>

#include <tessera/router/detail/device/token.cuh>
#include <tessera/router/routing.hpp>

// The K largest keys of a token, by one warp. A lower bound of the K-th key comes from the lanes' own maxima; the few
// keys above it are ranked against each other, one per lane. Where more than 32 are left (ties, K near 32, keys that
// crowd in a few lanes), K rounds take one key each.

TESSERA_NAMESPACE_BEGIN

namespace detail {

// Orders keys, descending, and equal keys by ascending expert id.
template <class A>
struct ranked_key;
template <>
struct ranked_key<float> {
  std::uint64_t word;
  ranked_key() = default;
  __device__ ranked_key(std::uint32_t key, int id)
      : word((static_cast<std::uint64_t>(key) << 32) | static_cast<std::uint32_t>(~id)) {}
  __device__ bool before(const ranked_key& other) const { return word > other.word; }
};
template <>
struct ranked_key<double> {
  std::uint64_t key;
  std::uint64_t id;
  ranked_key() = default;
  __device__ ranked_key(std::uint64_t key_, int id_) : key(key_), id(static_cast<std::uint64_t>(id_)) {}
  __device__ bool before(const ranked_key& other) const {
    return key > other.key || (key == other.key && id < other.id);
  }
};

// What one lane knows after the selection: an expert and its place among the chosen, K or more where it is not chosen.
struct chosen_expert {
  int id = no_expert;
  int rank = INT_MAX;
};

// K rounds, each of which takes the largest key that is left. Lane r gets the expert of rank r.
template <int Chunks, class A>
__device__ chosen_expert select_by_rounds(cells<Chunks, A>& keys, const cell_map& map, int lane, int k) {
  chosen_expert mine;
  const ordered_t<A> nothing = ordered(minus_infinity<A>());
  for (int round = 0; round < k; ++round) {
    ordered_t<A> best = nothing;
    unsigned best_id = INT_MAX;
    for_each_cell<Chunks>([&](int c, int j) {
      const ordered_t<A> u = ordered(keys.value[c][j]);
      if (u > best) {
        best = u;
        best_id = static_cast<unsigned>(map.first_expert(c, lane) + j);
      }
    });
    const ordered_t<A> top = warp_max(best);
    if (top <= nothing) break;
    const int id = static_cast<int>(__reduce_min_sync(full_warp, best == top ? best_id : unsigned{INT_MAX}));
    if (lane == round) mine = {id, round};
    for_each_cell<Chunks>([&](int c, int j) {
      if (j < map.per_lane && map.first_expert(c, lane) + j == id) keys.value[c][j] = minus_infinity<A>();
    });
  }
  return mine;
}

// @param keys    -inf where an expert may not be chosen, or where there is none; spent by the call.
// @param key_of  The key of an expert again, with the same bits.
// @param scratch 32 words of this warp.
template <int Chunks, class A, class KeyOf>
__device__ __forceinline__ chosen_expert select_largest(cells<Chunks, A>& keys, const cell_map& map, int lane, int k,
                                                        KeyOf&& key_of, ranked_key<A>* scratch) {
  // the K-th of the lanes' maxima, or something smaller where maxima are equal
  A max = minus_infinity<A>();
  for_each_cell<Chunks>([&](int c, int j) { max = larger(max, keys.value[c][j]); });
  ordered_t<A> own = ordered(max);
  ordered_t<A> bound = 0;
  for (int round = 0; round < k; ++round) {
    bound = warp_max(own);
    if (own == bound) own = 0;
  }
  // -inf is no key, so the smallest bound is the smallest number
  const A least = bound <= ordered(minus_infinity<A>()) ? -largest_number<A>() : unordered(bound);
  unsigned mine = 0;
  for_each_cell<Chunks>([&](int c, int j) {
    if (keys.value[c][j] >= least) mine |= 1u << (c * cell_width + j);
  });

  auto* const ids = reinterpret_cast<int*>(scratch);
  const unsigned below = (1u << lane) - 1u;
  int count = 0;
  for (unsigned live = __ballot_sync(full_warp, mine != 0); live != 0; live = __ballot_sync(full_warp, mine != 0)) {
    if (mine != 0) {
      const int bit = __ffs(static_cast<int>(mine)) - 1;
      mine &= mine - 1u;
      const int position = count + __popc(live & below);
      if (position < warp_size) ids[position] = map.first_expert(bit / cell_width, lane) + bit % cell_width;
    }
    count += __popc(live);
  }
  if (count > warp_size) return select_by_rounds<Chunks>(keys, map, lane, k);

  __syncwarp();
  chosen_expert result;
  ranked_key<A> own_key(ordered_t<A>{0}, 0);
  if (lane < count) {
    result.id = ids[lane];
    own_key = ranked_key<A>(ordered(key_of(result.id)), result.id);
  }
  __syncwarp();
  scratch[lane] = own_key;
  __syncwarp();
  int rank = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) rank += scratch[i].before(own_key) ? 1 : 0;
  __syncwarp();  // the next token writes here
  if (lane < count) result.rank = rank;
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Groups

inline constexpr int max_device_groups = 32;

struct group_plan {
  int groups = 1;
  int kept = 1;
  int group_size = 1;
  int lanes_per_group = 0;  // 0: groups do not fall into whole lanes, a power of two of them
};

// Sets the keys of experts of unselected groups to -inf; keys without an expert are -inf. @param scratch 32 numbers of
// this warp.
template <class GroupScore, int Chunks, class A, class KeyOf>
__device__ __forceinline__ void mask_groups(cells<Chunks, A>& keys, const cell_map& map, const group_plan& plan,
                                            int lane, KeyOf&& key_of, A* scratch) {
  constexpr bool is_max = std::is_same_v<GroupScore, select::group_score::max>;
  constexpr bool is_top2 = std::is_same_v<GroupScore, select::group_score::top2_sum>;
  bool done = false;
  if constexpr (is_max || is_top2) {
    if (plan.lanes_per_group != 0) {
      done = true;
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        const int expert = map.first_expert(c, lane);
        A first = minus_infinity<A>();
        A second = minus_infinity<A>();
#pragma unroll
        for (int j = 0; j < cell_width; ++j) {
          const A key = keys.value[c][j];
          if constexpr (is_top2) second = larger(second, smaller(key, first));
          first = larger(first, key);
        }
        for (int step = 1; step < plan.lanes_per_group; step *= 2) {
          const A other = __shfl_xor_sync(full_warp, first, step);
          if constexpr (is_top2) {
            const A other_second = __shfl_xor_sync(full_warp, second, step);
            second = larger(larger(second, other_second), smaller(first, other));
          }
          first = larger(first, other);
        }
        if (expert < map.num_experts && (lane & (plan.lanes_per_group - 1)) == 0) {
          scratch[expert / plan.group_size] = is_top2 ? first + second : first;
        }
      }
    }
  }
  if (!done) {  // any score of groups: one lane goes through each group
    A score = minus_infinity<A>();
    if (lane < plan.groups) {
      typename GroupScore::template accumulator<A> running;
      for (int i = 0; i < plan.group_size; ++i) running.add(key_of(lane * plan.group_size + i));
      score = running.value();
    }
    scratch[lane] = score;
  }
  __syncwarp();
  const A own = lane < plan.groups ? scratch[lane] : minus_infinity<A>();
  int rank = 0;
  for (int g = 0; g < plan.groups; ++g) {
    const A other = scratch[g];
    if (other > own || (other == own && g < lane)) ++rank;
  }
  const bool keep = lane < plan.groups && rank < plan.kept && own > minus_infinity<A>();
  const unsigned kept = __ballot_sync(full_warp, keep);
  __syncwarp();
  if (plan.lanes_per_group != 0) {
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int group = map.first_expert(c, lane) / plan.group_size;
      if (group < plan.groups && ((kept >> group) & 1u) != 0) continue;
#pragma unroll
      for (int j = 0; j < cell_width; ++j) keys.value[c][j] = minus_infinity<A>();
    }
  } else {
    for_each_cell<Chunks>([&](int c, int j) {
      const int group = (map.first_expert(c, lane) + j) / plan.group_size;
      if (group >= plan.groups || ((kept >> group) & 1u) == 0) keys.value[c][j] = minus_infinity<A>();
    });
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END
