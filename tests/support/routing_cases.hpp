// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Global batches with chosen skew, split over ranks contiguously: the input of tests that compare numbers of ranks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <tessera/router/routing.hpp>

namespace tessera_test {

enum class skew { uniform, zipf, one_hot, sparse };

inline const char* name_of(skew s) {
  switch (s) {
    case skew::uniform:
      return "uniform";
    case skew::zipf:
      return "zipf";
    case skew::one_hot:
      return "one_hot";
    case skew::sparse:
      return "sparse";
  }
  return "?";
}

inline constexpr skew all_skews[] = {skew::uniform, skew::zipf, skew::one_hot, skew::sparse};

// The routing of a global batch, rows of all ranks one after another.
template <class A>
struct global_routing {
  std::int64_t num_tokens = 0;
  int num_experts = 0;
  int top_k = 0;
  std::vector<std::int32_t> ids;  // [T, K]
  std::vector<A> weights;         // [T, K]

  // The part of a rank with tokens [first, first + count).
  tessera::routing<A> part(std::int64_t first, std::int64_t count) {
    return {{ids.data() + first * top_k, count, top_k}, {weights.data() + first * top_k, count, top_k}};
  }
};

// K distinct experts per token. one_hot: all tokens choose experts 0..K-1. sparse: some slots are empty (-1), few
// experts are used.
template <class A>
global_routing<A> make_routing(std::int64_t num_tokens, int num_experts, int top_k, skew kind, std::uint32_t seed) {
  std::mt19937 engine(seed);
  global_routing<A> r{num_tokens, num_experts, top_k, {}, {}};
  std::vector<int> order(static_cast<std::size_t>(num_experts));
  std::uniform_real_distribution<double> unit(0, 1);
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    std::iota(order.begin(), order.end(), 0);
    if (kind == skew::uniform) std::shuffle(order.begin(), order.end(), engine);
    if (kind == skew::zipf || kind == skew::sparse) {
      std::vector<double> key(order.size());
      for (std::size_t e = 0; e < key.size(); ++e)
        key[e] = -std::log(unit(engine) + 1e-12) * static_cast<double>(e + 1);
      std::sort(order.begin(), order.end(), [&](int a, int b) { return key[std::size_t(a)] < key[std::size_t(b)]; });
    }
    for (int k = 0; k < top_k; ++k) {
      const bool empty = kind == skew::sparse && unit(engine) < 0.4;
      r.ids.push_back(empty ? -1 : order[static_cast<std::size_t>(k)]);
      r.weights.push_back(empty ? A{0} : static_cast<A>(unit(engine)));
    }
  }
  return r;
}

// Contiguous split of `num_tokens` over `num_ranks`: offsets [R + 1]. `uneven` leaves the second rank empty and gives
// the last the rest.
inline std::vector<std::int64_t> split_tokens(std::int64_t num_tokens, int num_ranks, bool uneven) {
  std::vector<std::int64_t> offsets{0};
  for (int r = 1; r <= num_ranks; ++r) {
    std::int64_t end = num_tokens * r / num_ranks;
    if (uneven && r == 2 && num_ranks > 2) end = offsets.back();
    offsets.push_back(r == num_ranks ? num_tokens : end);
  }
  return offsets;
}

}  // namespace tessera_test
