// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/detail/device/arrivals.cuh>
#include <tessera/dispatch/detail/host_sized/find_rows.cuh>
#include <tessera/dispatch/detail/host_sized/levels.cuh>
#include <tessera/dispatch/detail/host_sized/place_pairs.cuh>
#include <tessera/dispatch/handle.hpp>
#include <tessera/dispatch/host_sized.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/router/routing.hpp>

// The phases of an exchange of routings that is sized on the host, in their order.

TESSERA_NAMESPACE_BEGIN

namespace detail::host_sized {

// What all phases of one exchange read. Lives as long as the call.
template <class A>
struct exchange_call {
  device_stream stream;
  token_grid tokens;
  const dispatch_bounds& bounds;
  const dispatch_options& options;
  const dispatch_handle<A>& handle;
  const host_sized_lists& lists;
  const host_sized_tables<A>& tables;
  int num_sms;

  std::int64_t pairs_per_rank() const { return bounds.max_tokens * bounds.top_k; }
  int num_slots() const { return std::max(bounds.num_local_experts, 1); }
  // [3, R], null where pairs do not go straight home
  std::int32_t* pairs_before() const { return lists.ordered() ? lists.pairs_before(tokens.grid) : nullptr; }
  level_task within() const {
    return {.ranks = tokens.grid.ranks_per_host,
            .own = tokens.place(),
            .tokens = tokens.rail_tokens(),
            .placed = tables.places_within,
            .lists = lists.within};
  }
  level_task across() const {
    return {.ranks = tokens.grid.hosts(),
            .own = tokens.host(),
            .tokens = tokens.grid.two_levels() ? tokens.max_tokens : 0,
            .placed = tables.places_across,
            .lists = lists.across};
  }
};

// Brings the routing of all ranks here.
template <class Comm, class A>
void gather_routing(const exchange_call<A>& call, Comm& comm, const routing<A>& kept) {
  const std::int64_t own_pairs = call.pairs_per_rank();
  const record_task<A> record{.ids = kept.expert_ids,
                              .weights = kept.weights,
                              .max_tokens = call.bounds.max_tokens,
                              .num_experts = call.bounds.num_experts,
                              .own = call.tables.records + comm.rank() * own_pairs};
  record_routing_kernel<A><<<blocks_for(own_pairs, pair_threads), pair_threads, 0, call.stream.get()>>>(record);
  expect_launched("record_routing_kernel");
  comm.all_gather(call.stream, static_cast<const routing_record<A>*>(record.own), call.tables.records, own_pairs);
}

// Who owns the expert of each pair, and how many pairs each rank receives.
template <class A, class Layout>
void find_owners(const exchange_call<A>& call, const Layout& layout) {
  const host_grid& grid = call.tokens.grid;
  std::int32_t* const pairs = call.lists.pairs(grid);
  const auto counted = static_cast<std::size_t>(grid.num_ranks) * (call.lists.ordered() ? 4 : 1);
  check_cuda(cudaMemsetAsync(pairs, 0, counted * sizeof(*pairs), call.stream.get()), "cudaMemsetAsync");
  const owner_task<A, Layout> owners{.layout = layout,
                                     .tokens = call.tokens,
                                     .top_k = call.bounds.top_k,
                                     .tables = call.tables,
                                     .pairs = pairs,
                                     .before = call.pairs_before()};
  const std::int64_t pairs_of_all = call.bounds.addressed_rows() * call.bounds.top_k;
  find_owners_kernel<A, Layout><<<blocks_for(pairs_of_all, pair_threads), pair_threads, 0, call.stream.get()>>>(owners);
  expect_launched("find_owners_kernel");
}

// Numbers the rows that each level sends and receives, and counts them.
template <class A>
void number_rows(const exchange_call<A>& call) {
  const host_grid& grid = call.tokens.grid;
  const number_task number{.tokens = call.tokens,
                           .top_k = call.bounds.top_k,
                           .slots = call.tables.slots,
                           .owners_within = call.tables.owners_within,
                           .owners_across = call.tables.owners_across,
                           .sent_within = call.lists.within.places,
                           .placed_within = call.tables.places_within,
                           .sent_across = call.lists.across.places,
                           .placed_across = call.tables.places_across,
                           .counts = call.tables.counts};
  const auto jobs = static_cast<unsigned>(2 * (grid.ranks_per_host + grid.hosts()));
  number_rows_kernel<<<jobs, number_threads, 0, call.stream.get()>>>(number);
  expect_launched("number_rows_kernel");
}

// Turns the numbers into lists of rows.
template <class A>
void list_rows(const exchange_call<A>& call) {
  const list_rows_task list{call.tokens, call.tables.counts, call.within(), call.across()};
  const auto blocks =
      std::min(blocks_for(call.bounds.addressed_rows(), pair_threads), static_cast<unsigned>(2 * call.num_sms));
  list_rows_kernel<<<blocks, pair_threads, 0, call.stream.get()>>>(list);
  expect_launched("list_rows_kernel");
}

// Sorts this rank's pairs by expert, and names the row that each reads.
template <class A>
void sort_pairs(const exchange_call<A>& call) {
  const auto& [stream, tokens, bounds, options, handle, lists, tables, num_sms] = call;
  const int slots = call.num_slots();
  const sort_tables_task<A> sort{
      .plan = make_list_plan(bounds.addressed_rows(), slots, num_sms, sort_scratch_bytes),
      .lists = make_arrival_lists<A>(bounds, options, tables.slots, tables.weights, handle, tables.sort),
      .slots = tables.slots,
      .pairs = lists.pairs(tokens.grid),
      .num_ranks = tokens.grid.num_ranks,
      .rank = tokens.rank,
      .max_tokens = bounds.max_tokens,
      .max_pairs = bounds.max_pairs,
      .drops = options.overflow == overflow_policy::drop,
      .total = handle.total};
  launch_cooperative(stream, sort.plan, list_threads, sort_tables_kernel<A>, sort, "sort_tables_kernel");
  const resolve_task resolve{tokens, handle.expert_offsets + slots, handle.gather, call.within()};
  resolve_rows_kernel<<<blocks_for(bounds.max_pairs, pair_threads), pair_threads, 0, stream.get()>>>(resolve);
  expect_launched("resolve_rows_kernel");
}

// Where pairs stand that go straight home: `combine::ordered`.
template <class A>
void place_pairs(const exchange_call<A>& call) {
  const int ranks = call.tokens.grid.num_ranks;
  const place_pairs_task place{.num_ranks = ranks,
                               .rank = call.tokens.rank,
                               .pairs_per_rank = static_cast<int>(call.pairs_per_rank()),
                               .max_pairs = call.bounds.max_pairs,
                               .before = call.pairs_before(),
                               .owners = call.tables.owners_home,
                               .expert_row_of = call.handle.expert_row_of,
                               .lists = call.lists.pairs_home};
  place_pairs_kernel<<<static_cast<unsigned>(2 * ranks), number_threads, 0, call.stream.get()>>>(place);
  expect_launched("place_pairs_kernel");
}

// Waits on the host for the numbers of rows. Throws on every rank if one's bound would be exceeded, unless pairs are
// dropped then.
template <class Comm, class A>
host_sized_counts wait_for_counts(const exchange_call<A>& call, Comm& comm) {
  const host_grid& grid = call.tokens.grid;
  const bool ordered = call.lists.ordered();
  const std::int64_t offsets = host_sized_counts::words(grid, ordered);
  const std::int32_t* const words = read_words(call.stream, comm, call.lists.words, call.lists.num_words(grid));
  const bool drops = call.options.overflow == overflow_policy::drop;
  for (int r = 0; r < grid.num_ranks; ++r) {
    TESSERA_EXPECTS_AS(error, drops || words[offsets + r] <= call.bounds.max_pairs,
                       "rank " << r << " would receive " << words[offsets + r]
                               << " pairs, which is more than its bound " << call.bounds.max_pairs
                               << ": raise dispatch_options::row_bound, or choose overflow_policy::drop");
  }
  return host_sized_counts::read(grid, comm.rank(), words, ordered);
}

}  // namespace detail::host_sized

TESSERA_NAMESPACE_END
