// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Dispatch and combine over NCCL, one thread per GPU, with one level and with two hosts that are none; the same bits as
// over comm::symmetric; a rank that never comes. With one GPU there is one rank.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <string>
#include <vector>

#include <tessera/comm/hosts.hpp>
#include <tessera/comm/nccl.cuh>
#include <tessera/comm/symmetric.cuh>
#include <tessera/comm/threads.hpp>
#include <tessera/layout/block.hpp>
#include <tessera/layout/round_robin.hpp>

#include "host_sized_checks.cuh"

namespace {

using namespace exchange_cases;
using device_test::on_ranks;
using device_test::rank_counts;
using std::chrono::milliseconds;
using hosts = ts::comm::hosts<ts::comm::nccl>;

// Kernels are loaded before GPUs wait for each other.
const int loading = setenv("CUDA_MODULE_LOADING", "EAGER", 1);

constexpr routing_kind all_kinds[] = {routing_kind::uniform, routing_kind::skewed, routing_kind::one_expert,
                                      routing_kind::gaps};

std::vector<int> uneven(int ranks, int most) {
  std::vector<int> tokens;
  for (int r = 0; r < ranks; ++r) tokens.push_back(r == 1 ? 0 : most - 7 * r);
  return tokens;
}

// Every case over one communicator, which `make(bootstrap)` makes once.
template <class Make>
void check_cases(int ranks, const std::vector<routing_case>& cases, Make make) {
  findings found;
  std::vector<std::vector<expected_world>> expected;
  for (const routing_case& c : cases) {
    auto& rounds = expected.emplace_back();
    for (unsigned round = 0; round < 2; ++round) {
      rounds.emplace_back(c, ts::layout::block(c.num_experts, ranks), options_of(c), 31 + round);
    }
  }
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto comm = make(t);
    for (std::size_t i = 0; i < cases.size(); ++i) {
      t.barrier({});  // allocations are done before GPUs wait for one another
      host_sized_rank rank(comm, cases[i], ts::layout::block(cases[i].num_experts, ranks), options_of(cases[i]));
      t.barrier({});
      for (const expected_world& e : expected[i]) rank.check(e.data, e.lists, e.outputs, found);
      t.barrier({});
    }
  }));
  for (const std::string& what : found.wrong) FAIL_CHECK(what);
}

std::vector<routing_case> cases_for(int ranks) {
  std::vector<routing_case> cases;
  for (const auto kind : all_kinds) cases.push_back({uneven(ranks, 61), 64, 192, 18, 4, kind});
  cases.push_back({uneven(ranks, 1500), 1500, 64, 64, 8, routing_kind::uniform});
  cases.push_back({uneven(ranks, 40), 40, 7168, 64, 8, routing_kind::uniform});
  cases.push_back({uneven(ranks, 50), 50, 5, 64, 32, routing_kind::uniform});
  for (const auto order : {ts::drop_order::position, ts::drop_order::weight}) {
    auto& c = cases.emplace_back(routing_case{uneven(ranks, 300), 300, 64, 8, 4, routing_kind::skewed});
    c.capacity_factor = 1.1;
    c.order = order;
    c.row_bound = 500;
    c.overflow = ts::overflow_policy::drop;
  }
  return cases;
}

}  // namespace

TEST_CASE("rows and sums reach every rank over NCCL") {
  for (const int ranks : rank_counts()) {
    CAPTURE(ranks);
    check_cases(ranks, cases_for(ranks), [](ts::comm::threads& t) { return ts::comm::nccl::create(t); });
  }
}

TEST_CASE("where GPUs share memory and where they do not, comm::symmetric takes this path all the same") {
  for (const bool direct : {true, false}) {
    CAPTURE(direct);
    const int ranks = *rank_counts().rbegin();
    check_cases(ranks, cases_for(ranks), [&](ts::comm::threads& t) {
      ts::comm::symmetric_options options;
      options.window_bytes = std::size_t{1} << 20;
      options.allow_direct = direct;
      return ts::comm::symmetric::create(t, options);
    });
  }
}

TEST_CASE("a row crosses once to each of two hosts of two GPUs") {
  const int ranks = *rank_counts().rbegin();
  if (ranks < 4) {
    MESSAGE("needs 4 GPUs");
    return;
  }
  check_cases(4, cases_for(4), [](ts::comm::threads& t) { return hosts::create(ts::comm::nccl::create(t), 2); });
}

TEST_CASE("a rank that never comes is an error on the others within the timeout, before rows and on their way") {
  const int ranks = (std::min)(device_test::num_gpus(), 4);
  if (ranks < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  const ts::layout::block layout(18, ranks);
  const routing_case c{uneven(ranks, 61), 64, 192, 18, 4, routing_kind::uniform};
  const expected_world e(c, layout, options_of(c), 3);
  for (const bool after_routing : {false, true}) {
    CAPTURE(after_routing);
    std::vector<std::string> texts(static_cast<std::size_t>(ranks));
    std::vector<milliseconds> took(texts.size());
    CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
      auto comm = ts::comm::nccl::create(t, {.timeout = milliseconds(5000)});
      host_sized_rank rank(comm, c, layout, options_of(c));
      rank.set_routing(e.data);
      const auto once = [&] {
        const auto counts = rank.exchange();
        rank.dispatch(counts);
        rank.combine(counts, ts::combine_weights::none, false);
        rank.wait();
      };
      once();  // connects GPUs
      t.barrier({});
      const bool absent = t.rank() == ranks - 1;
      if (absent && after_routing) static_cast<void>(rank.exchange());
      const auto start = std::chrono::steady_clock::now();
      if (!absent) {
        try {
          once();
        } catch (const ts::comm_error& error) {
          texts[static_cast<std::size_t>(t.rank())] = error.what();
        }
        CHECK(comm.failed());
        CHECK(cudaStreamSynchronize(rank.stream()) == cudaSuccess);
      }
      took[static_cast<std::size_t>(t.rank())] =
          std::chrono::duration_cast<milliseconds>(std::chrono::steady_clock::now() - start);
      t.barrier({});
    }));
    for (int r = 0; r + 1 < ranks; ++r) {
      const std::string& text = texts[static_cast<std::size_t>(r)];
      CHECK_MESSAGE(text.find("rank " + std::to_string(r)) != std::string::npos, text);
      CHECK(took[static_cast<std::size_t>(r)] < milliseconds(12000));
    }
  }
}

#endif
