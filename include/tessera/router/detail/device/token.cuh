// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include <tessera/router/detail/device/warp.cuh>
#include <tessera/router/score.hpp>
#include <tessera/router/select.hpp>
#include <tessera/router/weigh.hpp>

// One token in the registers of one warp. A lane holds `per_lane` neighbouring experts of each chunk of
// `32 * per_lane`, so that 16-byte loads and groups of experts fall into whole lanes.

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr int cell_width = 8;  // registers for the experts of a lane in one chunk

// Which lane holds which expert. `vectors`: rows can be moved 16 bytes at a time. `full`: every register has an expert.
struct cell_map {
  int num_experts;
  int per_lane;
  bool vectors;
  bool full;

  __device__ int first_expert(int chunk, int lane) const { return (chunk * warp_size + lane) * per_lane; }
  __device__ bool holds(int expert, int j) const { return j < per_lane && expert < num_experts; }
};

template <int Chunks, class A>
struct cells {
  A value[Chunks][cell_width];
};

// Calls f(chunk, j) for every register of this lane, in ascending order of the experts.
template <int Chunks, class F>
__device__ __forceinline__ void for_each_cell(F&& f) {
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
#pragma unroll
    for (int j = 0; j < cell_width; ++j) f(c, j);
  }
}

// Gives registers without an expert a value.
template <int Chunks, class A>
__device__ __forceinline__ void fill_missing(cells<Chunks, A>& x, const cell_map& map, int lane, A value) {
  if (map.full) return;
  for_each_cell<Chunks>([&](int c, int j) {
    if (!map.holds(map.first_expert(c, lane) + j, j)) x.value[c][j] = value;
  });
}

template <class A>
struct alignas(16) vector16 {
  A element[16 / sizeof(A)];
};

// Cells without an expert become 0.
template <int Chunks, class A>
__device__ __forceinline__ void load_cells(const A* row, const cell_map& map, int lane, cells<Chunks, A>& x) {
  constexpr int width = 16 / sizeof(A);
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int first = map.first_expert(c, lane);
    if (map.vectors) {
#pragma unroll
      for (int v = 0; v < cell_width; v += width) {
        vector16<A> packed{};
        if (v < map.per_lane && first < map.num_experts) {
          const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row + first + v));
          packed = *reinterpret_cast<const vector16<A>*>(&bits);
        }
#pragma unroll
        for (int j = 0; j < width; ++j) x.value[c][v + j] = packed.element[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < cell_width; ++j) x.value[c][j] = map.holds(first + j, j) ? __ldg(row + first + j) : A(0);
    }
  }
}

template <int Chunks, class A>
__device__ __forceinline__ void store_cells(A* row, const cell_map& map, int lane, const cells<Chunks, A>& x) {
  constexpr int width = 16 / sizeof(A);
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int first = map.first_expert(c, lane);
    if (map.vectors) {
#pragma unroll
      for (int v = 0; v < cell_width; v += width) {
        if (v < map.per_lane && first < map.num_experts) {
          vector16<A> packed;
#pragma unroll
          for (int j = 0; j < width; ++j) packed.element[j] = x.value[c][v + j];
          *reinterpret_cast<vector16<A>*>(row + first + v) = packed;
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < cell_width; ++j) {
        if (map.holds(first + j, j)) row[first + j] = x.value[c][j];
      }
    }
  }
}

// Whether all logits of the token are finite. Every lane gets the answer.
template <int Chunks, class A>
__device__ __forceinline__ bool all_finite(const cells<Chunks, A>& x) {
  A zero = A(0);
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
#pragma unroll
    for (int j = 0; j < cell_width; ++j) zero += x.value[c][j] * A(0);
  }
  return __all_sync(full_warp, is_number(zero));
}

// ---------------------------------------------------------------------------------------------------------------------
// Scores

// `Score::value`, with the library's own logistic functions in a few instructions.
template <class Score, accumulate_type A>
__device__ __forceinline__ A score_value(A logit, const typename Score::options& options) {
  if constexpr (std::is_base_of_v<score::sigmoid, Score> && std::is_same_v<A, float>) {
    static_cast<void>(options);
    return fast_reciprocal(1.0f + fast_exp(-logit));
  } else {
    return Score::value(logit, options);
  }
}

// `Weigh::value`, with the library's own quotient by a reciprocal where that is accurate.
template <class Weigh, accumulate_type A>
__device__ __forceinline__ A weigh_value(A score, A sum, const typename Weigh::options& options) {
  if constexpr (std::is_base_of_v<weigh::normalized, Weigh> && std::is_same_v<A, float>) {
    const float total = sum + options.epsilon;
    if (total > 1e-30f && total < 1e30f) return score * fast_reciprocal(total) * options.scale;
  }
  return Weigh::value(score, sum, options);
}

template <class Score, accumulate_type A>
__device__ __forceinline__ A score_derivative(A logit, A value, const typename Score::options& options) {
  return Score::derivative(logit, value, options);
}

// What turns `value(logit)` into a softmax over all experts.
template <class A>
struct softmax_terms {
  A max = A(0);
  A inverse_sum = A(1);
  __device__ A operator()(A x) const { return fast_exp(x - max) * inverse_sum; }
};

// Replaces values (-inf where there is no expert) by `exp(x - max)`. Returns the terms of the softmax and the sum.
template <int Chunks, class A>
__device__ __forceinline__ softmax_terms<A> exponentials(cells<Chunks, A>& x, A& sum) {
  softmax_terms<A> terms;
  A max = minus_infinity<A>();
  for_each_cell<Chunks>([&](int c, int j) { max = larger(max, x.value[c][j]); });
  terms.max = warp_max_value(max);
  sum = A(0);
  for_each_cell<Chunks>([&](int c, int j) {
    x.value[c][j] = fast_exp(x.value[c][j] - terms.max);
    sum += x.value[c][j];
  });
  sum = warp_sum(sum);
  terms.inverse_sum = fast_reciprocal(sum);
  return terms;
}

// The score of an expert before selection, from its logit. Not for scores over the selected.
template <class Score, accumulate_type A>
__device__ __forceinline__ A score_of(A logit, const typename Score::options& options, const softmax_terms<A>& terms) {
  const A value = score_value<Score>(logit, options);
  if constexpr (Score::over == score_over::all) {
    return terms(value);
  } else {
    return value;
  }
}

// Replaces logits by scores before selection; registers without an expert hold anything.
template <class Score, int Chunks, class A>
__device__ __forceinline__ softmax_terms<A> all_scores(cells<Chunks, A>& x, const cell_map& map, int lane,
                                                       const typename Score::options& options) {
  for_each_cell<Chunks>([&](int c, int j) { x.value[c][j] = score_value<Score>(x.value[c][j], options); });
  softmax_terms<A> terms;
  if constexpr (Score::over == score_over::all) {
    fill_missing<Chunks>(x, map, lane, minus_infinity<A>());
    A sum;
    terms = exponentials<Chunks>(x, sum);
    for_each_cell<Chunks>([&](int c, int j) { x.value[c][j] *= terms.inverse_sum; });
  }
  return terms;
}

// Softmax over the lanes that are `chosen`, for scores over the selected experts.
template <class Score, accumulate_type A>
__device__ __forceinline__ A softmax_over_chosen(A value, bool chosen) {
  if constexpr (Score::over == score_over::selected) {
    const A max = warp_max_value(chosen ? value : minus_infinity<A>());
    const A exponential = chosen ? fast_exp(value - max) : A(0);
    const A sum = warp_sum(exponential);
    return chosen ? exponential * fast_reciprocal(sum) : A(0);
  } else {
    return value;
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END
