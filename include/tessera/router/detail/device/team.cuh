// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include <tessera/router/detail/device/route.cuh>
#include <tessera/router/detail/device/team_select.cuh>

// The common case of the router's kernel: float, at most 256 experts and 8 per token. A team of 8 lanes holds a token,
// so that a warp works on 4 tokens at once and what a token costs beside its experts is paid by a quarter of a warp.
// What counts here is the number of instructions: a warp goes through all of them once, and a multiprocessor has 16.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

// @tparam Chunks Of 64 experts.
template <class Score, class Select, class Weigh, bool HasBias, int Chunks>
__launch_bounds__(team_threads, 1) TESSERA_KERNEL
    route_team_kernel(const __grid_constant__ route_task<Score, Select, Weigh, float> task) {
  constexpr int cells = Chunks * cell_width;
  constexpr bool on_logits = score_selects_on_logits<Score>;
  constexpr bool over_all = Score::over == score_over::all;
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
  const auto exists = [&](int c) { return full || team_expert(c * cell_width, member) < num_experts; };
  const auto load = [&](int base) {
    const float* const own = task.logits.row(token_of(base)) + member * cell_width;
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      float4 low{};
      float4 high{};
      if (exists(c)) {
        low = __ldg(reinterpret_cast<const float4*>(own + c * team_size * cell_width));
        high = __ldg(reinterpret_cast<const float4*>(own + c * team_size * cell_width + 4));
      }
      float* const x = key + c * cell_width;
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    }
  };
  const list_stash<float> stash(shared, task.plan);
  int base = warp * teams_per_warp;
  shared.clear<team_threads>(task.plan);
  start_early();
  if (base < tokens) load(base);

  const std::uint32_t phase = phase_of(task);
  bool bad_bias = false;
  if constexpr (HasBias) {
    for (int e = tid; e < team_max_experts; e += team_threads) {
      const float b = task.bias != nullptr && e < num_experts ? __ldg(task.bias + e) : 0.0f;
      scratch.bias[e] = b == b ? b : minus_infinity<float>();  // keys are numbers, whatever the bias
      bad_bias = bad_bias || !is_number(b * 0.0f);
    }
    if (bad_bias) report(task.status, device_fault::key_not_finite, 0, tid);
  }
  __syncthreads();

  for (; base < tokens;) {
    const int local = base + lane / team_size;
    const bool active = local < tokens;
    const std::int64_t t = token_of(base);
    const float* const row = task.logits.row(t);
    // four sums: one would be a chain as long as the keys
    float zero[4] = {};
#pragma unroll
    for (int i = 0; i < cells; ++i) zero[i % 4] += key[i] * 0.0f;
    const bool finite = team_ballot(!is_number((zero[0] + zero[1]) + (zero[2] + zero[3])), lane) == 0;

    // keys, and the largest of each cell
    const auto fill = [&](float(&x)[cells]) {
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        if (exists(c)) continue;
#pragma unroll
        for (int j = 0; j < cell_width; ++j) x[c * cell_width + j] = minus_infinity<float>();
      }
    };
    float top[Chunks];
    float scaled_max = 0.0f;
    float inverse_sum = 1.0f;
    // of the softmax over all experts, before it is divided by the sum
    const auto exponential = [&](float value) { return fast_exp2(fmaf(value, log2_of_e, -scaled_max)); };
    if constexpr (!on_logits) {
#pragma unroll
      for (int i = 0; i < cells; ++i) key[i] = score_value<Score>(key[i], task.score);
    }
    fill(key);
    if constexpr (over_all) {
      cell_maxima(key, top);
      float max = top[0];
#pragma unroll
      for (int c = 1; c < Chunks; ++c) max = fmaxf(max, top[c]);
      scaled_max = team_max(max) * log2_of_e;
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < cells; ++i) {
        key[i] = exponential(key[i]);
        sum[i % 4] += key[i];
      }
      inverse_sum = fast_reciprocal(team_sum((sum[0] + sum[1]) + (sum[2] + sum[3])));
      if constexpr (HasBias) {
#pragma unroll
        for (int i = 0; i < cells; ++i) key[i] *= inverse_sum;
      } else {
#pragma unroll
        for (int c = 0; c < Chunks; ++c) top[c] = exists(c) ? exponential(top[c]) : minus_infinity<float>();
      }
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
    if constexpr (over_all) fill(key);
    if constexpr (Select::by == select_by::group) {
      mask_team_groups<typename Select::group_score>(key, top, task.groups, lane, reinterpret_cast<float*>(words));
    } else if constexpr (!over_all || HasBias) {
      cell_maxima(key, top);
    }

    // the K-th of the cells' maxima bounds the K-th key from below
#pragma unroll
    for (int end = Chunks - 1; end > 0; --end) {
#pragma unroll
      for (int c = 0; c < end; ++c) {
        const float low = fminf(top[c], top[c + 1]);
        top[c] = fmaxf(top[c], top[c + 1]);
        top[c + 1] = low;
      }
    }
    const float bound = fmaxf(team_kth(top, lane, k), -largest_number<float>());
    // bit cells - 1 - i: the sign of what key i has beyond the bound
    unsigned above = 0;
#pragma unroll
    for (int i = 0; i < cells; ++i) above = __funnelshift_l(__float_as_uint(key[i] - bound), above, 1);
    above = finite ? ~above & (0xffffffffu >> (32 - cells)) : 0u;

    // candidates of the team, in any order
    const int own = __popc(above);
    int after = own;
#pragma unroll
    for (int step = 1; step < team_size; step *= 2) {
      const int lower = __shfl_up_sync(full_warp, after, step, team_size);
      if (member >= step) after += lower;
    }
    const int count = __shfl_sync(full_warp, after, team_size - 1, team_size);
    const auto most = static_cast<int>(__reduce_max_sync(full_warp, static_cast<unsigned>(count)));

    // the score of a candidate, and the key that it was selected by, again
    const auto score_again = [&](int expert, float& value) {
      const float logit = __ldg(row + expert);
      float score = score_value<Score>(logit, task.score);
      value = on_logits ? logit : score;
      if constexpr (over_all) {
        value = exponential(score);
        score = value * inverse_sum;
        if constexpr (HasBias) value = score;
      }
      if constexpr (HasBias) value = plain_sum(value, scratch.bias[expert]);
      return score;
    };
    // Lane r of a team leaves with the candidate of rank r.
    struct ranked_score {
      int id;
      float score;
    };
    const auto rank_candidates = [&](auto slots) {
      constexpr int most_slots = decltype(slots)::value;
      int id[most_slots];
      float score[most_slots];
      std::uint64_t word[most_slots];
#pragma unroll
      for (int s = 0; s < most_slots; ++s) {
        id[s] = member + s * team_size < count ? candidate_ids[member + s * team_size] : no_expert;
      }
#pragma unroll
      for (int s = 0; s < most_slots; ++s) {
        word[s] = 0;
        score[s] = 0.0f;
        if (id[s] == no_expert) continue;
        float value;
        score[s] = score_again(id[s], value);
        word[s] = key_word(value, id[s]);
      }
      __syncwarp();
#pragma unroll
      for (int s = 0; s < most_slots; ++s) words[member + s * team_size] = word[s];
      __syncwarp();
      int rank[most_slots] = {};
      for (int i = 0; i < most; i += 2) {
        const ulonglong2 other = *reinterpret_cast<const ulonglong2*>(words + i);
#pragma unroll
        for (int s = 0; s < most_slots; ++s) {
          if (other.x > word[s]) ++rank[s];
          if (other.y > word[s]) ++rank[s];
        }
      }
      __syncwarp();
#pragma unroll
      for (int s = 0; s < most_slots; ++s) {
        if (id[s] != no_expert && rank[s] < k) reinterpret_cast<ranked_score*>(words)[rank[s]] = {id[s], score[s]};
      }
    };
    int used = count < k ? count : k;
    ranked_score mine{no_expert, 0.0f};
    if (most <= team_candidates) {
      for (int at = after - own; above != 0; ++at) {
        const int bit = 31 - __clz(static_cast<int>(above));
        above ^= 1u << bit;
        candidate_ids[at] = team_expert(cells - 1 - bit, member);
      }
      __syncwarp();
      if (most <= team_candidates / 2) {
        rank_candidates(std::integral_constant<int, team_most_slots / 2>{});
      } else {
        rank_candidates(std::integral_constant<int, team_most_slots>{});
      }
      __syncwarp();
      if (member < used) mine = reinterpret_cast<const ranked_score*>(words)[member];
      __syncwarp();  // the next tokens write here
    } else {
      // more candidates than there is room for: many equal keys, or large ones in few lanes
      float copy[cells];
#pragma unroll
      for (int i = 0; i < cells; ++i) copy[i] = finite ? key[i] : minus_infinity<float>();
      mine.id = team_rounds<cells>(copy, lane, k);
      float value;
      if (mine.id != no_expert) mine.score = score_again(mine.id, value);
      used = __popc(team_ballot(mine.id != no_expert, lane));
    }

    const bool chosen = mine.id != no_expert;
    float score = mine.score;
    if constexpr (Score::over == score_over::selected) {
      const float max = team_max(chosen ? score : minus_infinity<float>());
      score = chosen ? fast_exp(score - max) : 0.0f;
      score *= fast_reciprocal(team_sum(score));
    }
    float sum = 0.0f;
    if constexpr (!std::is_base_of_v<weigh::raw, Weigh>) sum = team_sum(score);
    if (active && member < k) {
      float weight = 0.0f;
      if (chosen) weight = weigh_value<Weigh>(score, sum, task.weigh);
      keep_pair(task, stash, t, local, member, mine.id, weight);
      if (chosen && (task.has_lists || task.counts != nullptr)) shared.mark(task.plan, local, mine.id);
      if (used < k && member == 0) {
        report(task.status, finite ? device_fault::too_few_experts : device_fault::logit_not_finite, t,
               finite ? used : 0);
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
