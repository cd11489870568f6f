// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Dispatch and combine that are sized on the host, with one level and with hosts, on any number of ranks: messages go
// through host memory, and ranks share GPUs. tests/gpu/nccl_exchange_test.cu does the same over NCCL.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include <tessera/comm/hosts.hpp>
#include <tessera/layout/block.hpp>
#include <tessera/layout/round_robin.hpp>
#include <tessera/layout/table.hpp>

#include "gpu_ranks.cuh"
#include "host_sized_checks.cuh"
#include "over_host.cuh"

namespace {

using namespace exchange_cases;
using device_test::over_host;
using device_test::require;
using hosts = ts::comm::hosts<over_host>;

// Calls `f(comm)` for each rank; rank r has GPU r modulo their number.
template <class F>
void on_shared_gpus(int ranks, F f) {
  const int gpus = device_test::num_gpus();
  ts::comm::threads::run(ranks,
                         [&](ts::comm::threads& t) {
                           require(cudaSetDevice(t.rank() % gpus), "cudaSetDevice");
                           over_host comm(t);
                           f(comm);
                         },
                         {.timeout = std::chrono::milliseconds(120000)});
}

// `layout_on(rank)` on the device, `layout` on the host. @param ranks_per_host 0: one level.
template <class Layout, class LayoutOn>
void check_case(const routing_case& c, const Layout& layout, LayoutOn layout_on, int ranks_per_host, int rounds = 2,
                bool ordered = true) {
  const auto options = options_of(c);
  findings found;
  std::vector<expected_world> expected;
  for (int round = 0; round < rounds; ++round) expected.emplace_back(c, layout, options, 31u + unsigned(round));
  CHECK_NOTHROW(on_shared_gpus(static_cast<int>(c.tokens.size()), [&](over_host& comm) {
    const auto run = [&](auto& over) {
      host_sized_rank rank(over, c, layout_on(comm.rank()), layout.num_slots(comm.rank()), options, ordered);
      for (const expected_world& e : expected) rank.check(e.data, e.lists, e.outputs, found);
    };
    if (ranks_per_host == 0) {
      run(comm);
    } else {
      hosts over = hosts::create(comm, ranks_per_host);
      run(over);
    }
  }));
  for (const std::string& what : found.wrong) FAIL_CHECK(what);
}

template <class Layout>
void check_case(const routing_case& c, const Layout& layout, int ranks_per_host, int rounds = 2, bool ordered = true) {
  check_case(
      c, layout, [&](int) { return layout; }, ranks_per_host, rounds, ordered);
}

std::vector<int> uneven(int ranks, int most) {
  std::vector<int> tokens;
  for (int r = 0; r < ranks; ++r) tokens.push_back(r == 1 ? 0 : most - 7 * r);
  return tokens;
}

}  // namespace

TEST_CASE("rows and sums reach every rank with every routing, and ranks without tokens") {
  for (const int ranks : {1, 2, 3, 4}) {
    CAPTURE(ranks);
    for (const auto kind :
         {routing_kind::uniform, routing_kind::skewed, routing_kind::one_expert, routing_kind::gaps}) {
      check_case({uneven(ranks, 61), 64, 72, 18, 4, kind}, ts::layout::block(18, ranks), 0);
    }
  }
}

TEST_CASE("a row crosses to each host once, whatever the hosts") {
  struct grid {
    int ranks, ranks_per_host;
  };
  for (const grid g : {grid{4, 2}, grid{6, 2}, grid{6, 3}, grid{8, 4}, grid{4, 1}, grid{4, 4}}) {
    CAPTURE(g.ranks);
    CAPTURE(g.ranks_per_host);
    for (const auto kind : {routing_kind::uniform, routing_kind::skewed, routing_kind::gaps}) {
      check_case({uneven(g.ranks, 60), 64, 72, 24, 5, kind}, ts::layout::block(24, g.ranks), g.ranks_per_host);
    }
  }
  const ts::layout::round_robin turns(10, 4);
  check_case({{50, 40, 31, 9}, 50, 40, 10, 3, routing_kind::uniform}, turns, 2);
  const ts::layout::block few(3, 4);  // nothing on the last rank
  check_case({{50, 40, 31, 9}, 50, 40, 3, 2, routing_kind::uniform}, few, 2);
}

TEST_CASE("without pairs that come home one by one the rest is the same") {
  for (const int ranks_per_host : {0, 2}) {
    check_case({uneven(4, 61), 64, 72, 18, 4, routing_kind::skewed}, ts::layout::block(18, 4), ranks_per_host, 1,
               false);
  }
}

TEST_CASE("a capacity drops each rank's own pairs before they travel, by position and by weight, as on the host") {
  for (const int ranks : {1, 2, 4}) {
    CAPTURE(ranks);
    for (const auto order : {ts::drop_order::position, ts::drop_order::weight}) {
      for (const double factor : {0.4, 1.0, 1.7}) {
        CAPTURE(factor);
        routing_case c{uneven(ranks, 61), 64, 72, 18, 4, factor > 1 ? routing_kind::skewed : routing_kind::gaps};
        c.capacity_factor = factor;
        c.order = order;
        check_case(c, ts::layout::block(18, ranks), ranks == 4 ? 2 : 0, 1);
      }
    }
  }
}

TEST_CASE("many tokens, wide rows, rows of odd widths, many experts for one token") {
  const ts::layout::block wide(64, 3);
  check_case({{2500, 1300, 1111}, 2600, 24, 64, 8, routing_kind::uniform}, wide, 0, 1);
  check_case({{20, 9, 13}, 20, 7168, 64, 2, routing_kind::uniform}, wide, 0, 1);
  check_case({{50, 0, 31}, 50, 5, 64, 32, routing_kind::uniform}, wide, 0, 1);
  const ts::layout::block four(64, 4);
  check_case({{1500, 1300, 1111, 40}, 1500, 24, 64, 8, routing_kind::uniform}, four, 2, 1);
  check_case({{50, 0, 31, 3}, 50, 5, 64, 32, routing_kind::uniform}, four, 2, 1);
}

TEST_CASE("an uneven table with replicas") {
  const ts::layout::table_storage storage(6, {{0, 1, 2, 3}, {3, 4}, {5, 0, 3}, {}});
  for (const int ranks_per_host : {0, 2}) {
    check_case(
        {{40, 33, 64, 5}, 64, 136, 6, 3, routing_kind::uniform}, storage.view(),
        [&](int) {
          std::int32_t* copy = nullptr;
          const auto packed = storage.packed();
          require(cudaMalloc(&copy, packed.size_bytes()), "cudaMalloc");  // as long as the program
          require(cudaMemcpy(copy, packed.data(), packed.size_bytes(), cudaMemcpyHostToDevice), "copy");
          return storage.view_at(copy);
        },
        ranks_per_host);
  }
}

TEST_CASE("pairs beyond the bound are dropped in the order of source, token and slot") {
  for (const int ranks : {2, 4}) {
    CAPTURE(ranks);
    routing_case c{std::vector<int>(static_cast<std::size_t>(ranks), 280), 300, 40, 8, 4, routing_kind::skewed};
    c.row_bound = 700;
    c.overflow = ts::overflow_policy::drop;
    check_case(c, ts::layout::block(8, ranks), ranks == 2 ? 0 : 2);
    c.capacity_factor = 1.5;
    c.order = ts::drop_order::weight;
    c.row_bound = 500;
    check_case(c, ts::layout::block(8, ranks), ranks == 2 ? 0 : 2, 1);
  }
}

TEST_CASE("pairs beyond the bound are an error of all ranks that names the one and its need, and nobody is harmed") {
  const ts::layout::block layout(8, 2);
  routing_case c{{300, 280}, 300, 40, 8, 4, routing_kind::skewed};
  const expected_world roomy(c, layout, options_of(c), 7);
  c.row_bound = 700;
  const auto needed = static_cast<std::int64_t>(roomy.lists[0].gather.size());
  REQUIRE(needed > 700);
  std::vector<std::string> texts(2);
  CHECK_NOTHROW(on_shared_gpus(2, [&](over_host& comm) {
    host_sized_rank rank(comm, c, layout, options_of(c));
    rank.set_routing(roomy.data);
    try {
      static_cast<void>(rank.exchange());
    } catch (const ts::error& e) {
      texts[static_cast<std::size_t>(comm.rank())] = e.what();
    }
    // The communicator goes on.
    routing_case other = c;
    other.row_bound = ts::dispatch_options::full_row_bound;
    findings found;
    host_sized_rank again(comm, other, layout, options_of(other));
    again.check(roomy.data, roomy.lists, roomy.outputs, found);
    for (const std::string& what : found.wrong) FAIL_CHECK(what);
  }));
  CHECK(texts[0] == texts[1]);
  CHECK(texts[0].find("rank 0 would receive " + std::to_string(needed) + " pairs") != std::string::npos);
  CHECK(texts[0].find("bound 700") != std::string::npos);
}

TEST_CASE("what cannot be is refused before anything is enqueued") {
  using bad = ts::invalid_argument;
  CHECK_THROWS_AS(ts::host_grid::make(4, 3), bad);
  CHECK_THROWS_AS(ts::host_grid::make(257, 0), bad);
  const ts::layout::block layout(8, 1);
  const routing_case c{{30}, 30, 40, 8, 4, routing_kind::uniform};
  const expected_world e(c, layout, options_of(c), 3);
  CHECK_NOTHROW(on_shared_gpus(1, [&](over_host& comm) {
    host_sized_rank rank(comm, c, layout, options_of(c));
    rank.set_routing(e.data);
    const auto counts = rank.exchange();
    const cudaGraphExec_t graph = device_test::capture(rank.stream(), [&] {
      CHECK_THROWS_AS(static_cast<void>(rank.exchange()), bad);
      CHECK_THROWS_AS(rank.dispatch(counts), bad);
      CHECK_THROWS_AS(rank.combine(counts, ts::combine_weights::none, false), bad);
    });
    require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
    ts::host_sized_counts others = counts;
    others.rank = 1;
    CHECK_THROWS_AS(rank.dispatch(others), bad);
    auto dropping = options_of(c);
    dropping.capacity_factor = 1.5;
    CHECK_THROWS_AS(static_cast<void>(rank.exchange(dropping)), bad);  // there is no memory for it
    host_sized_rank reduced(comm, c, layout, layout.num_slots(0), options_of(c), false);
    reduced.set_routing(e.data);
    const auto rows_alone = reduced.exchange();
    CHECK_THROWS_AS(reduced.combine_at_home(rows_alone, false, false), bad);
    reduced.wait();
    rank.wait();
  }));
}
