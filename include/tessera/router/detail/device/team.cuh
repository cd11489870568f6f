// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include <tessera/router/detail/device/route.cuh>

// The common case of the router's kernel: float, at most 256 experts and 8 per token. A team of 8 lanes holds a token,
// so that a warp works on 4 tokens at once and what a token costs beside its experts is paid by a quarter of a warp.
// Lane l of a team holds experts [8 l, 8 l + 8) of every 64.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr int team_threads = 512;
inline constexpr int team_warps = team_threads / warp_size;
inline constexpr int team_size = 8;
inline constexpr int teams_per_warp = warp_size / team_size;
inline constexpr int team_max_k = 8;
inline constexpr int team_max_experts = 256;
inline constexpr int team_slots = 4;  // candidates of a lane
inline constexpr int team_candidates = team_slots * team_size;

struct team_scratch {
  std::uint64_t word[team_threads / team_size][team_candidates];
  float bias[team_max_experts];
};

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

// Sets the keys of experts of unselected groups to -inf. A group is whole lanes of a team, a power of two of them.
template <class GroupScore, int Cells>
__device__ __forceinline__ void mask_team_groups(float (&key)[Cells], const group_plan& plan, int num_experts, int lane,
                                                 float* scratch) {
  constexpr bool is_top2 = std::is_same_v<GroupScore, select::group_score::top2_sum>;
  const int member = lane % team_size;
#pragma unroll
  for (int c = 0; c < Cells / cell_width; ++c) {
    float first = minus_infinity<float>();
    float second = minus_infinity<float>();
#pragma unroll
    for (int j = 0; j < cell_width; ++j) {
      const float x = key[c * cell_width + j];
      if constexpr (is_top2) second = fmaxf(second, fminf(x, first));
      first = fmaxf(first, x);
    }
    for (int step = 1; step < plan.lanes_per_group; step *= 2) {
      const float other = __shfl_xor_sync(full_warp, first, step);
      if constexpr (is_top2) {
        second = fmaxf(fmaxf(second, __shfl_xor_sync(full_warp, second, step)), fminf(first, other));
      }
      first = fmaxf(first, other);
    }
    const int cell = c * team_size + member;
    if (cell * cell_width < num_experts && member % plan.lanes_per_group == 0) {
      scratch[cell / plan.lanes_per_group] = is_top2 ? first + second : first;
    }
  }
  __syncwarp();
  // at most 32 groups: 4 per lane, and a bit for each in every lane
  unsigned kept = 0;
  for (int g = member; g < plan.groups; g += team_size) {
    const float own = scratch[g];
    int rank = 0;
    for (int i = 0; i < plan.groups; ++i) {
      const float other = scratch[i];
      rank += other > own || (other == own && i < g) ? 1 : 0;
    }
    if (rank < plan.kept && own > minus_infinity<float>()) kept |= 1u << g;
  }
#pragma unroll
  for (int step = 1; step < team_size; step *= 2) kept |= __shfl_xor_sync(full_warp, kept, step);
  __syncwarp();
#pragma unroll
  for (int c = 0; c < Cells / cell_width; ++c) {
    const bool keep = ((kept >> ((c * team_size + member) / plan.lanes_per_group)) & 1u) != 0;
#pragma unroll
    for (int j = 0; j < cell_width; ++j)
      key[c * cell_width + j] = keep ? key[c * cell_width + j] : minus_infinity<float>();
  }
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

// @tparam Chunks Of 64 experts.
template <class Score, class Select, class Weigh, bool HasBias, int Chunks>
__launch_bounds__(team_threads, 1) TESSERA_KERNEL
    route_team_kernel(const __grid_constant__ route_task<Score, Select, Weigh, float> task) {
  constexpr int cells = Chunks * cell_width;
  constexpr bool on_logits = score_selects_on_logits<Score>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const list_shared shared(shared_bytes, sizeof(team_scratch), task.plan);
  auto& scratch = *reinterpret_cast<team_scratch*>(shared_bytes);
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % warp_size;
  const int warp = tid / warp_size;
  const int member = lane % team_size;
  const int team = tid / team_size;
  const int num_experts = task.map.num_experts;
  const bool full = num_experts == cells * team_size;
  const int k = static_cast<int>(task.ids.cols);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * task.plan.tokens_per_block;
  const std::int64_t left = task.logits.rows - first;
  const int tokens = static_cast<int>(left < task.plan.tokens_per_block ? left : task.plan.tokens_per_block);
  std::uint64_t* const words = scratch.word[team];
  auto* const candidate_ids = reinterpret_cast<int*>(words);

  float key[cells];
  const auto token_of = [&](int base) {
    const int local = base + lane / team_size;
    return first + (local < tokens ? local : base);
  };
  const auto load = [&](int base) {
    const float* const row = task.logits.row(token_of(base));
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int expert = team_expert(c * cell_width, member);
      float4 low{};
      float4 high{};
      if (full || expert < num_experts) {
        low = __ldg(reinterpret_cast<const float4*>(row + expert));
        high = __ldg(reinterpret_cast<const float4*>(row + expert + 4));
      }
      float* const x = key + c * cell_width;
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    }
  };
  int base = warp * teams_per_warp;
  if (base < tokens) load(base);

  const std::uint32_t phase = phase_of(task);
  bool bad_bias = false;
  if constexpr (HasBias) {
    for (int e = tid; e < team_max_experts; e += team_threads) {
      const float b = task.bias != nullptr && e < num_experts ? __ldg(task.bias + e) : 0.0f;
      scratch.bias[e] = b;
      bad_bias = bad_bias || !is_number(b * 0.0f);
    }
    if (bad_bias) report(task.status, device_fault::key_not_finite, 0, tid);
  }
  shared.clear<team_threads>(task.plan);
  __syncthreads();

  for (; base < tokens;) {
    const int local = base + lane / team_size;
    const bool active = local < tokens;
    const std::int64_t t = token_of(base);
    const float* const row = task.logits.row(t);
    float zero = 0.0f;
#pragma unroll
    for (int i = 0; i < cells; ++i) zero += key[i] * 0.0f;
    const bool finite = team_ballot(!is_number(zero), lane) == 0;

    // keys
    const auto fill = [&] {
      if (full) return;
#pragma unroll
      for (int i = 0; i < cells; ++i) key[i] = team_expert(i, member) < num_experts ? key[i] : minus_infinity<float>();
    };
    softmax_terms<float> terms;
    if constexpr (!on_logits) {
#pragma unroll
      for (int i = 0; i < cells; ++i) key[i] = score_value<Score>(key[i], task.score);
    }
    if constexpr (Score::over == score_over::all) {
      fill();
      float max = minus_infinity<float>();
#pragma unroll
      for (int i = 0; i < cells; ++i) max = fmaxf(max, key[i]);
      terms.max = team_max(max);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < cells; ++i) {
        key[i] = fast_exp(key[i] - terms.max);
        sum += key[i];
      }
      terms.inverse_sum = fast_reciprocal(team_sum(sum));
#pragma unroll
      for (int i = 0; i < cells; ++i) key[i] *= terms.inverse_sum;
    }
    if constexpr (HasBias) {
#pragma unroll
      for (int i = 0; i < cells; i += 4) {
        const float4 b = *reinterpret_cast<const float4*>(scratch.bias + team_expert(i, member));
        key[i] = plain_sum(key[i], b.x);
        key[i + 1] = plain_sum(key[i + 1], b.y);
        key[i + 2] = plain_sum(key[i + 2], b.z);
        key[i + 3] = plain_sum(key[i + 3], b.w);
      }
    }
    fill();
    if constexpr (Select::by == select_by::group) {
      mask_team_groups<typename Select::group_score>(key, task.groups, num_experts, lane,
                                                     reinterpret_cast<float*>(words));
    }

    // the K-th of the cells' maxima bounds the K-th key from below
    float top[Chunks];
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      top[c] = key[c * cell_width];
#pragma unroll
      for (int j = 1; j < cell_width; ++j) top[c] = fmaxf(top[c], key[c * cell_width + j]);
    }
#pragma unroll
    for (int end = Chunks - 1; end > 0; --end) {
#pragma unroll
      for (int c = 0; c < end; ++c) {
        const float low = fminf(top[c], top[c + 1]);
        top[c] = fmaxf(top[c], top[c + 1]);
        top[c + 1] = low;
      }
    }
    float bound = 0.0f;
    for (int round = 0; round < k; ++round) {
      bound = team_max(top[0]);
      if (top[0] == bound) {
#pragma unroll
        for (int c = 0; c + 1 < Chunks; ++c) top[c] = top[c + 1];
        top[Chunks - 1] = minus_infinity<float>();
      }
    }
    bound = fmaxf(bound, -largest_number<float>());
    unsigned above = 0;
#pragma unroll
    for (int i = 0; i < cells; ++i) above |= key[i] >= bound ? 1u << i : 0u;
    if (!finite) above = 0;

    // candidates of the team, in any order
    const int own = __popc(above);
    int after = own;
#pragma unroll
    for (int step = 1; step < team_size; step *= 2) {
      const int lower = __shfl_up_sync(full_warp, after, step, team_size);
      if (member >= step) after += lower;
    }
    const int count = __shfl_sync(full_warp, after, team_size - 1, team_size);
    int id[team_slots];
    int rank[team_slots];
    float score[team_slots];
    bool chosen[team_slots];
#pragma unroll
    for (int s = 0; s < team_slots; ++s) {
      id[s] = no_expert;
      rank[s] = member;
      score[s] = 0.0f;
    }
    const auto set_score = [&](int s) {
      const float logit = __ldg(row + id[s]);
      if constexpr (Score::over == score_over::selected) {
        score[s] = score_value<Score>(logit, task.score);
      } else {
        score[s] = score_of<Score>(logit, task.score, terms);
      }
      return logit;
    };
    // slots that some team of the warp uses; most of the time no more than two
    const auto most = static_cast<int>(__reduce_max_sync(full_warp, static_cast<unsigned>(count)));
    int slots = (most + team_size - 1) / team_size;
    if (slots <= team_slots) {
      for (int at = after - own; above != 0; ++at) {
        const int bit = 31 - __clz(static_cast<int>(above));
        above ^= 1u << bit;
        candidate_ids[at] = team_expert(bit, member);
      }
      __syncwarp();
      std::uint64_t word[team_slots];
#pragma unroll
      for (int s = 0; s < team_slots; ++s) {
        if (s < slots && member + s * team_size < count) id[s] = candidate_ids[member + s * team_size];
      }
#pragma unroll
      for (int s = 0; s < team_slots; ++s) {
        word[s] = 0;
        if (id[s] != no_expert) {
          const float logit = set_score(s);
          float value = on_logits ? logit : score[s];
          if constexpr (HasBias) value = plain_sum(value, scratch.bias[id[s]]);
          word[s] = key_word(value, id[s]);
        }
      }
      __syncwarp();
#pragma unroll
      for (int s = 0; s < team_slots; ++s) {
        if (s < slots) {
          reinterpret_cast<std::uint32_t*>(words)[member + s * team_size] = static_cast<std::uint32_t>(word[s] >> 32);
        }
        rank[s] = 0;
      }
      __syncwarp();
      // Keys first; equal ones make the sum of the ranks too small, and then the ids count too.
      const auto* const keys32 = reinterpret_cast<const std::uint32_t*>(words);
      const auto add_ranks = [&](auto used_slots) {
        std::uint32_t own_key[decltype(used_slots)::value];
#pragma unroll
        for (int s = 0; s < decltype(used_slots)::value; ++s) own_key[s] = static_cast<std::uint32_t>(word[s] >> 32);
        for (int i = 0; i < most; i += 4) {
          const uint4 other = *reinterpret_cast<const uint4*>(keys32 + i);
#pragma unroll
          for (int s = 0; s < decltype(used_slots)::value; ++s) {
            if (other.x > own_key[s]) ++rank[s];
            if (other.y > own_key[s]) ++rank[s];
            if (other.z > own_key[s]) ++rank[s];
            if (other.w > own_key[s]) ++rank[s];
          }
        }
      };
      if (slots <= 2) {
        add_ranks(std::integral_constant<int, 2>{});
      } else {
        add_ranks(std::integral_constant<int, team_slots>{});
      }
      int ranks = 0;
#pragma unroll
      for (int s = 0; s < team_slots; ++s) ranks += id[s] != no_expert ? rank[s] : 0;
#pragma unroll
      for (int step = 1; step < team_size; step *= 2) ranks += __shfl_xor_sync(full_warp, ranks, step);
      if (__any_sync(full_warp, ranks != count * (count - 1) / 2)) {
        __syncwarp();
#pragma unroll
        for (int s = 0; s < team_slots; ++s) {
          if (s < slots) words[member + s * team_size] = word[s];
          rank[s] = 0;
        }
        __syncwarp();
        for (int i = 0; i < most; ++i) {
          const std::uint64_t other = words[i];
#pragma unroll
          for (int s = 0; s < team_slots; ++s) rank[s] += other > word[s] ? 1 : 0;
        }
      }
      __syncwarp();  // the next tokens write here
    } else {
      // more candidates than there is room for: many equal keys, or large ones in few lanes
      slots = 1;
      float copy[cells];
#pragma unroll
      for (int i = 0; i < cells; ++i) copy[i] = finite ? key[i] : minus_infinity<float>();
      id[0] = team_rounds<cells>(copy, lane, k);
      if (id[0] != no_expert) set_score(0);
    }

    float partial = 0.0f;
    float largest_score = minus_infinity<float>();
#pragma unroll
    for (int s = 0; s < team_slots; ++s) {
      chosen[s] = active && id[s] != no_expert && rank[s] < k;
      if (chosen[s]) largest_score = fmaxf(largest_score, score[s]);
    }
    if constexpr (Score::over == score_over::selected) {
      const float max = team_max(largest_score);
#pragma unroll
      for (int s = 0; s < team_slots; ++s) {
        score[s] = fast_exp(score[s] - max);
        partial += chosen[s] ? score[s] : 0.0f;
      }
      const float inverse = fast_reciprocal(team_sum(partial));
      partial *= inverse;
#pragma unroll
      for (int s = 0; s < team_slots; ++s) score[s] *= inverse;
    } else {
#pragma unroll
      for (int s = 0; s < team_slots; ++s) partial += chosen[s] ? score[s] : 0.0f;
    }
    float sum = 0.0f;
    if constexpr (!std::is_base_of_v<weigh::raw, Weigh>) sum = team_sum(partial);
    const bool marks = task.has_lists || task.counts != nullptr;
    std::int32_t* const ids_row = task.ids.row(t);
    float* const weights_row = task.weights.row(t);
    int used = 0;
#pragma unroll
    for (int s = 0; s < team_slots; ++s) {
      if (s >= slots) continue;
      used += __popc(team_ballot(chosen[s], lane));
      if (!chosen[s]) continue;
      ids_row[rank[s]] = id[s];
      weights_row[rank[s]] = weigh_value<Weigh>(score[s], sum, task.weigh);
      if (marks) shared.mark(task.plan, local, id[s]);
    }
    if (active && used < k) {
      if (member == 0) {
        report(task.status, finite ? device_fault::too_few_experts : device_fault::logit_not_finite, t,
               finite ? used : 0);
      }
      if (member >= used && member < k) {
        ids_row[member] = no_expert;
        weights_row[member] = 0.0f;
      }
    }
    base += team_warps * teams_per_warp;
    if (base < tokens) load(base);
  }
  finish_route<team_threads>(task, shared, phase);
}

// Whether the team's kernel can do it.
template <class Select, class A>
bool fits_team(const router_inputs<A>& in, int num_experts, int top_k, const group_plan& groups) {
  if (!std::is_same_v<A, float> || num_experts > team_max_experts || num_experts % cell_width != 0 ||
      top_k > team_max_k || num_experts <= team_size * cell_width / 2) {
    return false;
  }
  if (!is_vector_aligned(in.logits.data, in.logits.stride * static_cast<std::int64_t>(sizeof(A)))) return false;
  if constexpr (Select::by == select_by::group) {
    using score = typename Select::group_score;
    const int lanes = groups.group_size / cell_width;
    return (std::is_same_v<score, select::group_score::max> ||
            std::is_same_v<score, select::group_score::top2_sum>)&&groups.group_size %
                   cell_width ==
               0 &&
           (lanes & (lanes - 1)) == 0 && lanes <= team_size;
  } else {
    static_cast<void>(groups);
    return Select::by == select_by::key;
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
