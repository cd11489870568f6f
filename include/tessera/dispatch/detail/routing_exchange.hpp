// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include <tessera/comm/communicator.hpp>
#include <tessera/dispatch/detail/exchange_blocks.hpp>
#include <tessera/dispatch/handle.hpp>
#include <tessera/layout/expert_layout.hpp>
#include <tessera/router/routing.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class A>
struct routing_exchange_scratch {
  std::int32_t* pair_rank = nullptr;      // [T, K] owner, -1 where nothing is sent
  std::int32_t* pair_expert = nullptr;    // [T, K] slot on the owner
  std::int32_t* expert_cursor = nullptr;  // [max(E, local experts) + 1]
  std::int32_t* by_expert = nullptr;      // [T, K] pairs sorted by expert, for the capacity
  std::int32_t* last_token = nullptr;     // [R]
  std::int32_t* row_cursor = nullptr;     // [R]
  std::int32_t* pair_cursor = nullptr;    // [R]
  std::int64_t* own_counts = nullptr;     // [2R + 2] rows to each rank, pairs to each rank, bounds of rows and of pairs
  std::int64_t* counts = nullptr;         // [R, 2R + 2] everybody's
  std::int32_t* sent_row_pairs = nullptr;
  std::int32_t* received_row_pairs = nullptr;
  std::int32_t* sent_experts = nullptr;
  std::int32_t* received_experts = nullptr;
  A* sent_weights = nullptr;
  A* received_weights = nullptr;
  transfer* sends = nullptr;     // [3R]
  transfer* receives = nullptr;  // [3R]

  static routing_exchange_scratch layout(memory_builder& builder, const dispatch_bounds& bounds,
                                         const dispatch_options& options) {
    const std::int64_t ranks = bounds.num_ranks;
    const std::int64_t sent = bounds.max_sent_pairs();
    routing_exchange_scratch s;
    s.pair_rank = builder.take<std::int32_t>("pair ranks", sent);
    s.pair_expert = builder.take<std::int32_t>("pair experts", sent);
    s.expert_cursor =
        builder.take<std::int32_t>("expert cursors", std::max(bounds.num_experts, bounds.num_local_experts) + 1);
    s.by_expert = builder.take<std::int32_t>("pairs by expert", options.has_capacity() ? sent : 0);
    s.last_token = builder.take<std::int32_t>("last tokens", ranks);
    s.row_cursor = builder.take<std::int32_t>("row cursors", ranks);
    s.pair_cursor = builder.take<std::int32_t>("pair cursors", ranks);
    s.own_counts = builder.take<std::int64_t>("own counts", counts_per_rank(bounds));
    s.counts = builder.take<std::int64_t>("counts", ranks * counts_per_rank(bounds));
    s.sent_row_pairs = builder.take<std::int32_t>("pairs of sent rows", bounds.max_sent_rows());
    s.received_row_pairs = builder.take<std::int32_t>("pairs of received rows", bounds.max_received_rows());
    s.sent_experts = builder.take<std::int32_t>("experts of sent pairs", sent);
    s.received_experts = builder.take<std::int32_t>("experts of received pairs", bounds.max_pairs);
    s.sent_weights = builder.take<A>("weights of sent pairs", sent);
    s.received_weights = builder.take<A>("weights of received pairs", bounds.max_pairs);
    s.sends = builder.take<transfer>("sends", 3 * ranks);
    s.receives = builder.take<transfer>("receives", 3 * ranks);
    return s;
  }

  static std::int64_t counts_per_rank(const dispatch_bounds& bounds) { return 2 * bounds.num_ranks + 2; }
};

// How a row of `counts` reads: what rank `source` announced.
struct announced_counts {
  const std::int64_t* counts;
  std::int64_t ranks;

  const std::int64_t* of(int source) const { return counts + source * (2 * ranks + 2); }
  std::int64_t rows(int source, int target) const { return of(source)[target]; }
  std::int64_t pairs(int source, int target) const { return of(source)[ranks + target]; }
  std::int64_t max_rows(int rank) const { return of(rank)[2 * ranks]; }
  std::int64_t max_pairs(int rank) const { return of(rank)[2 * ranks + 1]; }

  std::int64_t rows_to(int target) const {
    std::int64_t sum = 0;
    for (int source = 0; source < ranks; ++source) sum += rows(source, target);
    return sum;
  }
  std::int64_t pairs_to(int target) const {
    std::int64_t sum = 0;
    for (int source = 0; source < ranks; ++source) sum += pairs(source, target);
    return sum;
  }
};

template <class Layout, class A>
void find_destinations(const Layout& layout, const dispatch_bounds& bounds, int rank, const routing<A>& chosen,
                       const routing_exchange_scratch<A>& s) {
  const auto& ids = chosen.expert_ids;
  TESSERA_EXPECTS(ids.rows <= bounds.max_tokens,
                  ids.rows << " tokens on rank " << rank << ", the bound max_tokens is " << bounds.max_tokens);
  expect_matrix(ids, -1, bounds.top_k, "expert_ids");
  expect_matrix(chosen.weights, ids.rows, bounds.top_k, "weights");
  for (std::int64_t t = 0; t < ids.rows; ++t) {
    for (std::int64_t k = 0; k < ids.cols; ++k) {
      const std::int32_t expert = ids(t, k);
      TESSERA_EXPECTS(expert >= no_expert && expert < bounds.num_experts,
                      "token " << t << " chose expert " << expert << " in slot " << k << ", ids go from -1 (none) to "
                               << bounds.num_experts - 1);
      const std::int64_t pair = t * ids.cols + k;
      if (expert == no_expert) {
        s.pair_rank[pair] = -1;
        continue;
      }
      const auto owner = layout.owner(expert, choose_replica(layout, expert, t));
      s.pair_rank[pair] = owner.rank;
      s.pair_expert[pair] = owner.slot;
    }
  }
}

// Keeps at most ceil(T*K*factor/E) pairs of each expert; returns how many went.
template <class A>
std::int64_t drop_over_capacity(const dispatch_bounds& bounds, const dispatch_options& options,
                                const routing<A>& chosen, const routing_exchange_scratch<A>& s) {
  const std::int64_t top_k = chosen.expert_ids.cols;
  const std::int64_t pairs = chosen.expert_ids.rows * top_k;
  const std::int64_t capacity = options.capacity(pairs, bounds.num_experts);
  const auto expert_of = [&](std::int64_t pair) { return chosen.expert_ids(pair / top_k, pair % top_k); };
  const auto weight_of = [&](std::int64_t pair) { return chosen.weights(pair / top_k, pair % top_k); };

  std::int32_t* end = s.expert_cursor;  // after the sort: one past the pairs of each expert
  std::fill_n(end, bounds.num_experts + 1, 0);
  for (std::int64_t pair = 0; pair < pairs; ++pair)
    if (s.pair_rank[pair] >= 0) ++end[expert_of(pair) + 1];
  for (int e = 0; e < bounds.num_experts; ++e) end[e + 1] += end[e];
  for (std::int64_t pair = 0; pair < pairs; ++pair)
    if (s.pair_rank[pair] >= 0) s.by_expert[end[expert_of(pair)]++] = static_cast<std::int32_t>(pair);

  std::int64_t dropped = 0;
  std::int32_t begin = 0;
  for (int e = 0; e < bounds.num_experts; ++e) {
    std::int32_t* first = s.by_expert + begin;
    const std::int64_t count = end[e] - begin;
    begin = end[e];
    if (count <= capacity) continue;
    if (options.order == drop_order::weight)
      std::sort(first, first + count, [&](std::int32_t a, std::int32_t b) {
        return weight_of(a) != weight_of(b) ? weight_of(a) > weight_of(b) : a < b;
      });
    for (std::int64_t i = capacity; i < count; ++i) s.pair_rank[first[i]] = -1;
    dropped += count - capacity;
  }
  return dropped;
}

template <class A>
void count_destinations(const dispatch_bounds& bounds, const routing<A>& chosen, const routing_exchange_scratch<A>& s) {
  const std::int64_t ranks = bounds.num_ranks;
  std::int64_t* rows = s.own_counts;
  std::int64_t* pairs = s.own_counts + ranks;
  std::fill_n(rows, 2 * ranks, 0);
  s.own_counts[2 * ranks] = bounds.max_received_rows();
  s.own_counts[2 * ranks + 1] = bounds.max_pairs;
  std::fill_n(s.last_token, ranks, -1);
  for (std::int64_t t = 0; t < chosen.expert_ids.rows; ++t) {
    for (std::int64_t k = 0; k < chosen.expert_ids.cols; ++k) {
      const std::int32_t rank = s.pair_rank[t * chosen.expert_ids.cols + k];
      if (rank < 0) continue;
      ++pairs[rank];
      if (s.last_token[rank] != t) ++rows[rank];
      s.last_token[rank] = static_cast<std::int32_t>(t);
    }
  }
  if (ranks == 1) rows[0] = chosen.expert_ids.rows;  // read in place: every token is a row
}

// True if some receiver must drop. Every rank sees the same counts, so every rank gives the same answer or throws the
// same error.
template <class A>
bool receiver_overflows(const dispatch_bounds& bounds, const dispatch_options& options,
                        const routing_exchange_scratch<A>& s) {
  const announced_counts counts{s.counts, bounds.num_ranks};
  bool overflows = false;
  for (int rank = 0; rank < bounds.num_ranks; ++rank) {
    const std::int64_t rows = counts.rows_to(rank);
    const std::int64_t pairs = counts.pairs_to(rank);
    const bool over = pairs > counts.max_pairs(rank);
    TESSERA_EXPECTS_AS(error, !over || options.overflow == overflow_policy::drop,
                       "rank " << rank << " would receive " << pairs << " pairs, its bound is "
                               << counts.max_pairs(rank) << ": raise dispatch_options::row_bound to " << pairs
                               << " or more, or choose overflow_policy::drop");
    TESSERA_EXPECTS_AS(error, over || rows <= counts.max_rows(rank),
                       "rank " << rank << " would receive " << rows << " rows, its bound is " << counts.max_rows(rank)
                               << ": max_tokens must be the same on all ranks");
    overflows = overflows || over;
  }
  return overflows;
}

// Drops this rank's pairs that a receiver does not admit; returns how many.
template <class A>
std::int64_t drop_over_bound(const dispatch_bounds& bounds, int rank, const routing<A>& chosen,
                             const routing_exchange_scratch<A>& s) {
  const announced_counts counts{s.counts, bounds.num_ranks};
  for (int target = 0; target < bounds.num_ranks; ++target) {
    std::int64_t free = counts.max_pairs(target);
    for (int source = 0; source < rank; ++source) free -= counts.pairs(source, target);
    s.pair_cursor[target] = static_cast<std::int32_t>(std::max<std::int64_t>(free, 0));  // pairs still admitted
  }
  std::int64_t dropped = 0;
  const std::int64_t pairs = chosen.expert_ids.rows * chosen.expert_ids.cols;
  for (std::int64_t pair = 0; pair < pairs; ++pair) {
    const std::int32_t target = s.pair_rank[pair];
    if (target < 0) continue;
    if (s.pair_cursor[target] > 0) {
      --s.pair_cursor[target];
    } else {
      s.pair_rank[pair] = -1;
      ++dropped;
    }
  }
  return dropped;
}

template <class A>
void set_offsets(const dispatch_bounds& bounds, int rank, const dispatch_handle<A>& h,
                 const routing_exchange_scratch<A>& s) {
  const announced_counts counts{s.counts, bounds.num_ranks};
  h.sent_row_offsets[0] = h.sent_pair_offsets[0] = h.received_row_offsets[0] = h.received_pair_offsets[0] = 0;
  for (int r = 0; r < bounds.num_ranks; ++r) {
    h.sent_row_offsets[r + 1] = h.sent_row_offsets[r] + static_cast<std::int32_t>(counts.rows(rank, r));
    h.sent_pair_offsets[r + 1] = h.sent_pair_offsets[r] + static_cast<std::int32_t>(counts.pairs(rank, r));
    h.received_row_offsets[r + 1] = h.received_row_offsets[r] + static_cast<std::int32_t>(counts.rows(r, rank));
    h.received_pair_offsets[r + 1] = h.received_pair_offsets[r] + static_cast<std::int32_t>(counts.pairs(r, rank));
  }
  h.total->received_rows = h.received_row_offsets[bounds.num_ranks];
  h.total->received_pairs = h.received_pair_offsets[bounds.num_ranks];
}

// Numbers the pairs and writes what each owner has to know.
template <class A>
void fill_messages(const dispatch_bounds& bounds, const routing<A>& chosen, const dispatch_handle<A>& h,
                   const routing_exchange_scratch<A>& s) {
  const std::int64_t top_k = chosen.expert_ids.cols;
  std::copy_n(h.sent_row_offsets, bounds.num_ranks, s.row_cursor);
  std::copy_n(h.sent_pair_offsets, bounds.num_ranks, s.pair_cursor);
  std::fill_n(s.last_token, bounds.num_ranks, -1);
  const auto open_row = [&](std::int32_t rank, std::int64_t t) {
    if (s.last_token[rank] == t) return;
    s.last_token[rank] = static_cast<std::int32_t>(t);
    h.sent_tokens[s.row_cursor[rank]] = static_cast<std::int32_t>(t);
    s.sent_row_pairs[s.row_cursor[rank]++] = 0;
  };
  for (std::int64_t t = 0; t < chosen.expert_ids.rows; ++t) {
    if (bounds.num_ranks == 1) open_row(0, t);
    for (std::int64_t k = 0; k < top_k; ++k) {
      const std::int32_t rank = s.pair_rank[t * top_k + k];
      h.pair_slots[t * top_k + k] = -1;
      if (rank < 0) continue;
      open_row(rank, t);
      ++s.sent_row_pairs[s.row_cursor[rank] - 1];
      const std::int32_t pair = s.pair_cursor[rank]++;
      h.pair_slots[t * top_k + k] = pair;
      s.sent_experts[pair] = s.pair_expert[t * top_k + k];
      s.sent_weights[pair] = chosen.weights(t, k);
    }
  }
}

template <class Comm, class A>
void exchange_messages(host_stream stream, Comm& comm, const dispatch_handle<A>& h,
                       const routing_exchange_scratch<A>& s) {
  block_messages sends{s.sends};
  block_messages receives{s.receives};
  for (int r = 0; r < comm.size(); ++r) {
    sends.add(r, s.sent_row_pairs, h.sent_row_offsets);
    sends.add(r, s.sent_experts, h.sent_pair_offsets);
    sends.add(r, s.sent_weights, h.sent_pair_offsets);
    receives.add(r, s.received_row_pairs, h.received_row_offsets);
    receives.add(r, s.received_experts, h.received_pair_offsets);
    receives.add(r, s.received_weights, h.received_pair_offsets);
  }
  comm.exchange(stream, sends.all(), receives.all());
}

// Sorts the arriving pairs by local expert; stable, so an expert's rows stay in the order (source, token, k).
template <class A>
void build_lists(const dispatch_bounds& bounds, const dispatch_handle<A>& h, const routing_exchange_scratch<A>& s) {
  std::int32_t* next = s.expert_cursor;
  std::fill_n(next, bounds.num_local_experts + 1, 0);
  for (std::int64_t p = 0; p < h.total->received_pairs; ++p) ++next[s.received_experts[p] + 1];
  for (int e = 0; e < bounds.num_local_experts; ++e) next[e + 1] += next[e];
  std::copy_n(next, bounds.num_local_experts + 1, h.expert_offsets);

  std::int32_t pair = 0;
  for (std::int64_t row = 0; row < h.total->received_rows; ++row) {
    h.row_pair_offsets[row] = pair;
    for (const std::int32_t end = pair + s.received_row_pairs[row]; pair < end; ++pair) {
      const std::int32_t expert_row = next[s.received_experts[pair]]++;
      h.expert_row_of[pair] = expert_row;
      h.gather[expert_row] = static_cast<std::int32_t>(row);
      h.pair_weights[expert_row] = s.received_weights[pair];
    }
  }
  h.row_pair_offsets[h.total->received_rows] = pair;
}

}  // namespace detail

TESSERA_NAMESPACE_END
