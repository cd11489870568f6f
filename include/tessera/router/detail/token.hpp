// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Pieces of a router that work on one token's row. Fixed-size local arrays, no memory from elsewhere.

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <tessera/router/routing.hpp>
#include <tessera/router/score.hpp>
#include <tessera/router/select.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// By the bits of the exponent, so that a consumer's -ffast-math does not fold it to true.
template <accumulate_type A>
bool is_finite(A x) {
  using word = std::conditional_t<sizeof(A) == 4, std::uint32_t, std::uint64_t>;
  constexpr word exponent = sizeof(A) == 4 ? word{0x7f800000u} : static_cast<word>(0x7ff0000000000000ull);
  return (std::bit_cast<word>(x) & exponent) != exponent;
}

/// Index of the first element that is not finite, -1 where all are.
template <accumulate_type A>
int find_not_finite(const A* x, int n) {
  int bad = 0;
  for (int i = 0; i < n; ++i) bad += int(!is_finite(x[i]));
  if (bad == 0) [[likely]]
    return -1;
  int i = 0;
  while (is_finite(x[i])) ++i;
  return i;
}

/// Turns `x` into `exp(x - max)`. Returns the sum; `max` is written.
template <accumulate_type A>
A exponentials(A* x, int n, A& max) {
  max = -std::numeric_limits<A>::infinity();
  for (int i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
  A sum = A(0);
  for (int i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - max);
    sum += x[i];
  }
  return sum;
}

/// Softmax in place.
template <accumulate_type A>
void softmax_in_place(A* x, int n) {
  A max;
  const A sum = exponentials(x, n, max);
  for (int i = 0; i < n; ++i) x[i] /= sum;
}

/// Scores of all experts; for a score over the selected, the values that its softmax takes.
template <class Score, accumulate_type A>
void all_scores(const typename Score::options& options, const A* logits, int num_experts, A* scores) {
  for (int e = 0; e < num_experts; ++e) scores[e] = Score::value(logits[e], options);
  if constexpr (Score::over == score_over::all) softmax_in_place(scores, num_experts);
}

/// Turns what `all_scores` wrote into the probabilities of the balance losses. Returns the sum that scores over each
/// expert were divided by (0: they all underflowed, the probabilities are 0), 1 for the others.
template <class Score, accumulate_type A>
A scores_to_probabilities(A* scores, int num_experts) {
  if constexpr (Score::over == score_over::each) {
    A sum = A(0);
    for (int e = 0; e < num_experts; ++e) sum += scores[e];
    if (sum != A(0)) {
      for (int e = 0; e < num_experts; ++e) scores[e] /= sum;
    }
    return sum;
  } else {
    if constexpr (Score::over == score_over::selected) softmax_in_place(scores, num_experts);
    return A(1);
  }
}

/// The `size` largest keys seen, in descending order; of equal ones those offered first.
template <accumulate_type A, int Capacity>
class largest {
 public:
  explicit largest(int size) : size_(size) {
    for (int i = 0; i < size; ++i) {
      keys_[i] = -std::numeric_limits<A>::infinity();
      ids_[i] = no_expert;
    }
  }
  /// Neither NaN nor -inf ever enters.
  void offer(A key, std::int32_t id) {
    if (!(key > keys_[size_ - 1])) [[likely]]
      return;
    int i = size_ - 1;
    for (; i > 0 && key > keys_[i - 1]; --i) {
      keys_[i] = keys_[i - 1];
      ids_[i] = ids_[i - 1];
    }
    keys_[i] = key;
    ids_[i] = id;
    if (taken_ < size_) ++taken_;
  }
  std::int32_t id(int i) const { return ids_[i]; }
  bool full() const { return taken_ == size_; }

 private:
  int size_;
  int taken_ = 0;
  A keys_[Capacity];
  std::int32_t ids_[Capacity];
};

/// Ids of the K largest keys, in descending order, ties to the lowest id. False where fewer than K are above -inf.
template <accumulate_type A>
bool select_top_k(const A* keys, int num_experts, int k, std::int32_t* ids) {
  largest<A, max_top_k> best(k);
  for (int e = 0; e < num_experts; ++e) best.offer(keys[e], e);
  for (int i = 0; i < k; ++i) ids[i] = best.id(i);
  return best.full();
}

/// The same among the experts of the best groups.
template <class GroupScore, accumulate_type A>
bool select_in_groups(const A* keys, int num_experts, int k, int groups, int kept_groups, std::int32_t* ids) {
  const int group_size = num_experts / groups;
  largest<A, max_experts> best_groups(kept_groups);
  for (int g = 0; g < groups; ++g) {
    typename GroupScore::template accumulator<A> score;
    for (int e = g * group_size; e < (g + 1) * group_size; ++e) score.add(keys[e]);
    best_groups.offer(score.value(), g);
  }
  bool kept[max_experts];
  for (int g = 0; g < groups; ++g) kept[g] = false;
  for (int i = 0; i < kept_groups; ++i) {
    if (best_groups.id(i) != no_expert) kept[best_groups.id(i)] = true;
  }
  largest<A, max_top_k> best(k);
  for (int g = 0; g < groups; ++g) {
    if (!kept[g]) continue;
    for (int e = g * group_size; e < (g + 1) * group_size; ++e) best.offer(keys[e], e);
  }
  for (int i = 0; i < k; ++i) ids[i] = best.id(i);
  return best.full();
}

/// Scores of the selected experts; 0 in unused slots.
/// @param scores What `all_scores` wrote, or null where the score is over each expert or over the selected.
template <class Score, accumulate_type A>
void selected_scores(const typename Score::options& options, const A* logits, const A* scores, const std::int32_t* ids,
                     int k, A* selected) {
  A packed[max_top_k];
  int used = 0;
  for (int i = 0; i < k; ++i) {
    if (ids[i] == no_expert) continue;
    packed[used++] = scores != nullptr ? scores[ids[i]] : Score::value(logits[ids[i]], options);
  }
  if constexpr (Score::over == score_over::selected) {
    if (used > 0) softmax_in_place(packed, used);
  }
  used = 0;
  for (int i = 0; i < k; ++i) selected[i] = ids[i] == no_expert ? A(0) : packed[used++];
}

}  // namespace detail

TESSERA_NAMESPACE_END
