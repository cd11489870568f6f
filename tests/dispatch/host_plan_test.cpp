// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Hops of rows over hosts, against a simulation in which ranks may send only what they have; and the sizes of memory of
// a dispatch that is sized on the host.

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include <tessera/dispatch/capacity.hpp>
#include <tessera/dispatch/host_plan.hpp>
#include <tessera/layout/layout.hpp>

#include "../support/routing_cases.hpp"

namespace {

namespace ts = tessera;
using namespace tessera_test;

using row_id = std::pair<int, int>;  // source, token

struct simulated {
  std::vector<std::set<row_id>> has;           // rows that each rank has
  std::map<std::pair<int, row_id>, int> came;  // how often a row came to a rank
  std::map<std::pair<int, row_id>, int> over;  // how often a row crossed to a host

  // @return whether everybody had what it sent.
  bool move(const std::vector<ts::row_hop>& hops, const ts::host_grid& grid) {
    const auto before = has;
    bool good = true;
    for (const ts::row_hop& hop : hops) {
      const row_id row{hop.source, hop.token};
      good = good && hop.from != hop.to && before[static_cast<std::size_t>(hop.from)].count(row) == 1;
      has[static_cast<std::size_t>(hop.to)].insert(row);
      ++came[{hop.to, row}];
      if (grid.host_of(hop.from) != grid.host_of(hop.to)) ++over[{grid.host_of(hop.to), row}];
    }
    return good;
  }
};

template <class Layout>
void check_plan(const Layout& placement, int ranks_per_host, skew kind, int top_k) {
  const int ranks = placement.num_ranks();
  std::vector<global_routing<float>> parts;
  std::vector<ts::matrix_view<const std::int32_t>> ids;
  parts.reserve(static_cast<std::size_t>(ranks));
  for (int r = 0; r < ranks; ++r) {
    parts.push_back(make_routing<float>(r == 1 ? 0 : 40 - r, placement.num_experts(), top_k, kind,
                                        static_cast<std::uint32_t>(7 + r)));
    ids.push_back({parts.back().ids.data(), r == 1 ? 0 : 40 - r, top_k});
  }
  const auto plan = ts::host_plan::make(placement, ranks_per_host, ids);
  const ts::host_grid grid = plan.grid;

  simulated world;
  world.has.resize(static_cast<std::size_t>(ranks));
  std::set<std::tuple<int, row_id>> wanted;  // (owner, row)
  std::set<std::tuple<int, row_id>> hosts;   // (other host with an owner, row)
  std::int64_t flat = 0;
  for (int s = 0; s < ranks; ++s) {
    const auto& view = ids[static_cast<std::size_t>(s)];
    for (int t = 0; t < view.rows; ++t) {
      world.has[static_cast<std::size_t>(s)].insert({s, t});
      for (int k = 0; k < top_k; ++k) {
        const int id = view(t, k);
        if (id < 0) continue;
        const int owner = placement.owner(id, ts::choose_replica(placement, id, t)).rank;
        const bool is_new = wanted.insert({owner, {s, t}}).second;
        if (grid.host_of(owner) == grid.host_of(s)) continue;
        flat += is_new;
        hosts.insert({grid.host_of(owner), {s, t}});
      }
    }
  }
  CHECK(world.move(plan.across, grid));
  CHECK(world.move(plan.within, grid));
  for (const auto& [owner, row] : wanted) CHECK(world.has[static_cast<std::size_t>(owner)].count(row) == 1);
  for (const auto& [where, times] : world.came) CHECK(times == 1);
  CHECK(world.over.size() == (grid.two_levels() ? hosts.size() : 0));
  for (const auto& [where, times] : world.over) CHECK(times == 1);
  CHECK(plan.flat_across == flat);
  for (const ts::row_hop& hop : plan.across) CHECK(grid.place_of(hop.from) == grid.place_of(hop.to));
  for (const ts::row_hop& hop : plan.within) CHECK(grid.host_of(hop.from) == grid.host_of(hop.to));
  const auto key = [](const ts::row_hop& h) { return std::make_tuple(h.from, h.to, h.source, h.token); };
  for (const auto* hops : {&plan.across, &plan.within}) {
    CHECK(std::is_sorted(hops->begin(), hops->end(),
                         [&](const ts::row_hop& a, const ts::row_hop& b) { return key(a) < key(b); }));
    const auto sent = plan.sent(*hops);
    const auto received = plan.received(*hops);
    std::int64_t most = 0;
    for (int r = 0; r < ranks; ++r) {
      const auto at = static_cast<std::size_t>(r);
      CHECK(sent[at] == std::count_if(hops->begin(), hops->end(), [&](const auto& h) { return h.from == r; }));
      CHECK(received[at] == std::count_if(hops->begin(), hops->end(), [&](const auto& h) { return h.to == r; }));
      most = std::max({most, sent[at], received[at]});
    }
    CHECK(plan.busiest_bytes(*hops, 14336) == most * 14336);
  }
}

}  // namespace

TEST_CASE("every owner gets each of its rows once, and every host each row once over the network") {
  struct grid {
    int ranks, ranks_per_host;
  };
  for (const grid g :
       {grid{1, 0}, grid{4, 0}, grid{4, 1}, grid{4, 2}, grid{4, 4}, grid{6, 2}, grid{6, 3}, grid{8, 4}, grid{16, 8}}) {
    for (const skew kind : all_skews) {
      CAPTURE(g.ranks);
      CAPTURE(g.ranks_per_host);
      CAPTURE(name_of(kind));
      check_plan(ts::layout::block(19, g.ranks), g.ranks_per_host, kind, 4);
      check_plan(ts::layout::round_robin(19, g.ranks), g.ranks_per_host, kind, 3);
    }
  }
  const ts::layout::table_storage copies(6, {{0, 1, 2, 3}, {3, 4}, {5, 0, 3}, {}});
  check_plan(copies.view(), 2, skew::uniform, 3);
}

TEST_CASE("hosts that ranks do not fill are refused, and routings of another number of ranks") {
  const ts::layout::block placement(8, 4);
  const std::vector<ts::matrix_view<const std::int32_t>> four(4), three(3);
  CHECK_THROWS_AS(ts::host_plan::make(placement, 3, four), ts::invalid_argument);
  CHECK_THROWS_AS(ts::host_plan::make(placement, 2, three), ts::invalid_argument);
  CHECK(ts::host_plan::make(placement, 2, four).across.empty());
}

TEST_CASE("counts are read from words in the order that kernels write them") {
  const ts::host_grid grid = ts::host_grid::make(6, 3);
  CHECK(grid.hosts() == 2);
  CHECK(ts::host_grid::make(6, 1).hosts() == 1);  // one rank a host: all of them are one level
  CHECK(ts::host_grid::make(6, 6).hosts() == 1);
  std::vector<std::int32_t> words;
  for (int i = 0; i < ts::host_sized_counts::words(grid); ++i) words.push_back(i);
  REQUIRE(words.size() == 14);
  const auto counts = ts::host_sized_counts::read(grid, 4, words.data());
  CHECK(counts.rows_within() == 3);    // words 0 to 3: sent inside the host
  CHECK(counts.received_rows() == 7);  // 4 to 7: received there
  CHECK(counts.rows_across() == 10);   // 8 to 10: sent to hosts
  CHECK(counts.across.received[2] == 13);
  CHECK(counts.within.own_rows(1) == 1);

  ts::dispatch_bounds bounds = ts::dispatch_bounds::make(6, 8, 2, 4, 100, {});
  ts::memory_builder counting;
  static_cast<void>(ts::host_sized_lists::layout(counting, bounds, grid));
  ts::host_buffer memory(counting.bytes());
  ts::memory_builder builder(ts::workspace_memory(memory), "test");
  const auto lists = ts::host_sized_lists::layout(builder, bounds, grid);
  CHECK(lists.within.sent_offsets == lists.words);
  CHECK(lists.within.received_offsets == lists.words + 4);
  CHECK(lists.across.sent_offsets == lists.words + 8);
  CHECK(lists.across.received_offsets == lists.words + 11);
  CHECK(lists.pairs(grid) == lists.words + 14);
  const auto within = ts::level_bounds::within(bounds, grid);
  CHECK(within.ranks == 3);
  CHECK(within.tokens == 200);
  CHECK(within.sent_rows() == 400);
  CHECK(within.received_rows() == 600);
  const auto across = ts::level_bounds::across(bounds, grid);
  CHECK(across.sent_rows() == 100);
  CHECK(ts::level_bounds::across(bounds, ts::host_grid::make(6, 0)).received_rows() == 0);
}

TEST_CASE("pairs that come home one by one add offsets behind those of both levels, and room for every pair") {
  const ts::host_grid grid = ts::host_grid::make(6, 3);
  std::vector<std::int32_t> words;
  for (int i = 0; i < ts::host_sized_counts::words(grid, true); ++i) words.push_back(i);
  REQUIRE(words.size() == 28);
  const auto counts = ts::host_sized_counts::read(grid, 4, words.data(), true);
  CHECK(counts.across.received[2] == 13);
  CHECK(counts.pairs.sent[0] == 14);
  CHECK(counts.pairs.sent[6] == 20);
  CHECK(counts.pairs.received[0] == 21);
  CHECK(counts.pairs.received[6] == 27);

  const ts::dispatch_bounds bounds = ts::dispatch_bounds::make(6, 8, 2, 4, 100, {.row_bound = 700});
  const auto bytes = [&](auto layout, auto combine) {
    ts::memory_builder counting;
    static_cast<void>(layout(counting, combine));
    return static_cast<std::int64_t>((counting.bytes() + 255) / 256 * 256);
  };
  const auto aligned = [](std::int64_t n) { return (n + 255) / 256 * 256; };
  const auto list = [&](ts::memory_builder& b, auto combine) {
    return ts::host_sized_lists::layout(b, bounds, grid, combine);
  };
  // words: 14 + 6 without pairs, 28 + 6 * 4 with them; both less than a line
  CHECK(bytes(list, ts::combine::ordered{}) ==
        bytes(list, ts::combine::reduced{}) + aligned(700 * 4) + aligned(400 * 4));
  ts::host_buffer memory(static_cast<std::size_t>(bytes(list, ts::combine::ordered{})));
  ts::memory_builder builder(ts::workspace_memory(memory), "test");
  const auto lists = list(builder, ts::combine::ordered{});
  CHECK(lists.ordered());
  CHECK(lists.pairs_home.sent_offsets == lists.words + 14);
  CHECK(lists.pairs_home.received_offsets == lists.words + 21);
  CHECK(lists.pairs(grid) == lists.words + 28);
  CHECK(lists.num_words(grid) == 34);
  CHECK(lists.pairs_before(grid) == lists.words + 34);

  const auto buffers = [&](ts::memory_builder& b, auto combine) {
    return ts::host_sized_buffers::layout(b, bounds, grid, 64, combine);
  };
  // within: 400 rows to send there, and 400 pairs at home; on the way home 700 pairs, or 400 sums
  CHECK(bytes(buffers, ts::combine::ordered{}) == bytes(buffers, ts::combine::reduced{}) + 300 * 64);
  const auto tables = [&](ts::memory_builder& b, auto combine) {
    return ts::host_sized_tables<float>::layout(b, bounds, grid, {}, combine);
  };
  CHECK(bytes(tables, ts::combine::ordered{}) == bytes(tables, ts::combine::reduced{}) + aligned(400 * 4));

  ts::memory_builder counting;
  const auto many = ts::dispatch_bounds::make(512, 512, 1, 2, 4, {});
  CHECK_NOTHROW(static_cast<void>(ts::host_sized_lists::layout(counting, many, ts::host_grid::make(512, 8))));
  CHECK_THROWS_AS(static_cast<void>(ts::host_sized_lists::layout(counting, many, ts::host_grid::make(512, 8),
                                                                 ts::combine::ordered{})),
                  ts::invalid_argument);
}

TEST_CASE("a capacity is a share of this call's pairs, rounded up, and takes memory where there is one") {
  ts::dispatch_options options;
  CHECK_FALSE(options.has_capacity());
  CHECK(options.capacity(40, 4) == 40);
  options.capacity_factor = 0.7;
  CHECK(options.capacity(6, 2) == 3);  // of 2.1
  CHECK(options.capacity(0, 2) == 0);
  options.capacity_factor = 1.0;
  CHECK(options.capacity(40, 4) == 10);
  CHECK(options.capacity(41, 4) == 11);
  options.capacity_factor = 1e300;  // no more than there are
  CHECK(options.capacity(41, 4) == 41);

  const auto bytes = [](const ts::dispatch_options& chosen) {
    const auto bounds = ts::dispatch_bounds::make(4, 100, 25, 8, 1000, chosen);
    ts::memory_builder counting;
    static_cast<void>(ts::capacity_workspace<float>::layout(counting, bounds, chosen));
    return counting.bytes();
  };
  constexpr std::size_t pairs = 8 * 1000 * 4;  // a multiple of 256
  CHECK(bytes({}) == 0);
  CHECK(bytes({.order = ts::drop_order::weight}) == 0);
  CHECK(bytes({.capacity_factor = 1}) == 512 + pairs);
  CHECK(bytes({.capacity_factor = 1, .order = ts::drop_order::weight}) == 512 + 3 * pairs);
}
