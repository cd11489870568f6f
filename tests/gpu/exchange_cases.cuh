// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Routings of all ranks, and what each rank must make of them: lists and sums, made on the host.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <tessera/comm/self.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/dispatch/routing_exchange.hpp>
#include <tessera/layout/block.hpp>
#include <tessera/layout/expert_layout.hpp>

namespace exchange_cases {

namespace ts = tessera;
using bf16 = ts::bfloat16;

enum class routing_kind { uniform, skewed, one_expert, gaps };

struct routing_case {
  std::vector<int> tokens;  // of each rank
  int max_tokens;
  int hidden;
  int num_experts;
  int top_k;
  routing_kind kind;
  std::int64_t row_bound = ts::dispatch_options::full_row_bound;
  ts::overflow_policy overflow = ts::overflow_policy::error;
  double capacity_factor = 0;
  ts::drop_order order = ts::drop_order::position;
};

inline ts::dispatch_options options_of(const routing_case& c) {
  ts::dispatch_options options;
  options.row_bound = c.row_bound;
  options.overflow = c.overflow;
  options.capacity_factor = c.capacity_factor;
  options.order = c.order;
  return options;
}

// The routing and the tokens of all ranks.
struct world_data {
  std::vector<std::vector<std::int32_t>> ids;
  std::vector<std::vector<float>> weights;
  std::vector<std::vector<bf16>> x;
  std::vector<std::vector<bf16>> plus;
  std::vector<std::vector<std::int32_t>> kept;  // the ids without the pairs that a capacity drops
  std::vector<std::int64_t> capacity_drops;     // of each rank

  world_data(const routing_case& c, unsigned seed) {
    std::mt19937 generator(seed);
    for (const int tokens : c.tokens) {
      auto& own_ids = ids.emplace_back();
      auto& own_weights = weights.emplace_back();
      for (int t = 0; t < tokens; ++t) {
        std::vector<std::int32_t> chosen;
        while (static_cast<int>(chosen.size()) < c.top_k) {
          auto id = static_cast<std::int32_t>(generator() % static_cast<unsigned>(c.num_experts));
          if (c.kind == routing_kind::skewed && generator() % 4 != 0) id = static_cast<std::int32_t>(id % 3);
          if (c.kind == routing_kind::one_expert && chosen.empty()) id = c.num_experts - 1;
          if (std::find(chosen.begin(), chosen.end(), id) != chosen.end()) {
            id = static_cast<std::int32_t>(generator() % static_cast<unsigned>(c.num_experts));
            if (std::find(chosen.begin(), chosen.end(), id) != chosen.end()) continue;
          }
          chosen.push_back(id);
        }
        for (std::int32_t id : chosen) {
          const bool gap = c.kind == routing_kind::gaps && generator() % 3 == 0;
          own_ids.push_back(gap ? -1 : id);
          own_weights.push_back(static_cast<float>(generator() % 1000) / 1000.0f);
        }
      }
      const auto elements = static_cast<std::size_t>(tokens) * static_cast<std::size_t>(c.hidden);
      for (auto* rows : {&x.emplace_back(), &plus.emplace_back()}) {
        for (std::size_t i = 0; i < elements; ++i) {
          rows->push_back(bf16(static_cast<float>(static_cast<int>(generator() % 2001) - 1000) / 256.0f));
        }
      }
      drop_over_capacity(c, tokens);
    }
  }

 private:
  // What the host half keeps of the last rank's pairs. A capacity knows no other ranks: one that owns all will do.
  void drop_over_capacity(const routing_case& c, int tokens) {
    kept.push_back(ids.back());
    capacity_drops.push_back(0);
    if (c.capacity_factor == 0) return;
    auto options = options_of(c);
    options.row_bound = ts::dispatch_options::full_row_bound;
    const auto bounds = ts::dispatch_bounds::make(1, c.num_experts, c.num_experts, c.top_k, c.max_tokens, options);
    const auto carve = [&](ts::memory_builder& b) {
      return std::pair(ts::dispatch_handle<float>::layout(b, bounds),
                       ts::routing_exchange_workspace<float>::layout(b, bounds, options));
    };
    ts::memory_builder counting;
    carve(counting);
    ts::host_buffer memory(counting.bytes());
    ts::memory_builder builder(ts::workspace_memory(memory.data(), memory.size()), "the host's lists");
    const auto [handle, workspace] = carve(builder);
    ts::comm::self<ts::space::host> alone;
    const ts::routing<float> chosen{{ids.back().data(), tokens, c.top_k}, {weights.back().data(), tokens, c.top_k}};
    ts::exchange_routing({}, alone, ts::layout::block(c.num_experts, 1), bounds, options, chosen, handle, workspace);
    for (std::size_t pair = 0; pair < kept.back().size(); ++pair) {
      if (handle.pair_slots[pair] < 0) kept.back()[pair] = -1;
    }
    capacity_drops.back() = handle.total->capacity_drops;
  }
};

// What one rank must find.
struct expected_lists {
  std::vector<std::int32_t> offsets, gather, expert_row_of;
  std::vector<float> pair_weights;
  std::vector<int> expert_of_row;
  std::vector<bool> arrives;  // [R * max_tokens]
  std::int64_t dropped = 0;

  template <class Layout>
  expected_lists(const routing_case& c, const world_data& data, const Layout& layout, int me, std::int64_t max_pairs) {
    const int ranks = static_cast<int>(c.tokens.size());
    const auto K = static_cast<std::size_t>(c.top_k);
    expert_row_of.assign(static_cast<std::size_t>(ranks * c.max_tokens) * K, -1);
    arrives.assign(static_cast<std::size_t>(ranks * c.max_tokens), false);
    struct pair {
      int row, slot, expert;
      std::size_t place;
      float weight;
    };
    std::vector<pair> pairs;
    for (int s = 0; s < ranks; ++s) {
      for (int t = 0; t < c.tokens[static_cast<std::size_t>(s)]; ++t) {
        for (std::size_t k = 0; k < K; ++k) {
          const auto from = static_cast<std::size_t>(t) * K + k;
          const int id = data.kept[static_cast<std::size_t>(s)][from];
          if (id < 0) continue;
          const auto owner = layout.owner(id, ts::choose_replica(layout, id, t));
          if (owner.rank != me) continue;
          const int row = s * c.max_tokens + t;
          arrives[static_cast<std::size_t>(row)] = true;
          const auto place = static_cast<std::size_t>(row) * K + k;
          if (static_cast<std::int64_t>(pairs.size()) >= max_pairs) {
            expert_row_of[place] = -2;
            ++dropped;
            continue;
          }
          pairs.push_back({row, owner.slot, id, place, data.weights[static_cast<std::size_t>(s)][from]});
        }
      }
    }
    offsets.push_back(0);
    for (int slot = 0; slot < std::max(layout.num_slots(me), 1); ++slot) {
      for (const pair& p : pairs) {
        if (p.slot != slot) continue;
        expert_row_of[p.place] = static_cast<std::int32_t>(gather.size());
        gather.push_back(p.row);
        pair_weights.push_back(p.weight);
        expert_of_row.push_back(p.expert);
      }
      offsets.push_back(static_cast<std::int32_t>(gather.size()));
    }
  }
};

inline float as_float(bf16 x) { return static_cast<float>(x); }

inline bool same_bits(bf16 a, bf16 b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

struct findings {
  std::mutex mutex;
  std::vector<std::string> wrong;
  void add(int rank, const std::string& what) {
    const std::lock_guard lock(mutex);
    if (wrong.size() < 20) wrong.push_back("rank " + std::to_string(rank) + ": " + what);
  }
};

inline float expert_factor(int expert) { return 1.0f + 0.125f * static_cast<float>(expert % 7); }

// The output of an expert for a token, as the test defines it.
inline std::vector<bf16> expert_rows(const routing_case& c, const world_data& data, const expected_lists& lists) {
  std::vector<bf16> rows;
  for (std::size_t i = 0; i < lists.gather.size(); ++i) {
    const int s = lists.gather[i] / c.max_tokens;
    const int t = lists.gather[i] % c.max_tokens;
    for (int j = 0; j < c.hidden; ++j) {
      rows.push_back(bf16(as_float(data.x[static_cast<std::size_t>(s)][static_cast<std::size_t>(t * c.hidden + j)]) *
                          expert_factor(lists.expert_of_row[i])));
    }
  }
  return rows;
}

// The sum of a rank's rows of one token, in the order of k, as the kernel makes it.
inline float owner_sum(const routing_case& c, const expected_lists& lists, const std::vector<bf16>& rows, int row,
                       int column, bool weighted) {
  float sum = 0;
  for (int k = 0; k < c.top_k; ++k) {
    const std::int32_t place = lists.expert_row_of[static_cast<std::size_t>(row * c.top_k + k)];
    if (place < 0) continue;
    const float weight = weighted ? lists.pair_weights[static_cast<std::size_t>(place)] : 1.0f;
    sum = std::fmaf(weight,
                    as_float(rows[static_cast<std::size_t>(place) * static_cast<std::size_t>(c.hidden) +
                                  static_cast<std::size_t>(column)]),
                    sum);
  }
  return sum;
}

// The sum at home of all pairs of a token of `rank`, in the order of k, wherever they were computed.
inline float home_sum(const routing_case& c, const world_data& data, const std::vector<expected_lists>& lists,
                      const std::vector<std::vector<bf16>>& outputs, int rank, int token, int column, bool weighted) {
  float sum = 0;
  for (int k = 0; k < c.top_k; ++k) {
    const auto pair = static_cast<std::size_t>((rank * c.max_tokens + token) * c.top_k + k);
    for (std::size_t r = 0; r < lists.size(); ++r) {
      const std::int32_t place = lists[r].expert_row_of[pair];
      if (place < 0) continue;
      const float weight =
          weighted ? data.weights[static_cast<std::size_t>(rank)][static_cast<std::size_t>(token * c.top_k + k)] : 1.0f;
      const auto at = static_cast<std::size_t>(place) * static_cast<std::size_t>(c.hidden);
      sum = std::fmaf(weight, as_float(outputs[r][at + static_cast<std::size_t>(column)]), sum);
    }
  }
  return sum;
}

}  // namespace exchange_cases
