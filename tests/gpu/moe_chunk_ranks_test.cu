// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A chunk of layers whose experts are spread over GPUs, one thread a GPU, against the same layers called one by one:
// the same bits, whatever lanes run the chunk, whichever rank is late. With one GPU the communicator has one rank.
// Without a GPU or without NCCL it exits with 77, which CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include <tessera/comm/symmetric.cuh>
#include <tessera/comm/threads.hpp>

#include "moe_chunk_cases.cuh"

namespace {

using namespace chunk_test;

// Kernels are loaded before GPUs wait for each other; streams of a pair have queues of their own.
const int settings = setenv("CUDA_MODULE_LOADING", "EAGER", 1) + setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);

// Calls `check(comm, meet, rank)` on each GPU.
template <class Check>
void on_gpus(int slots, int slot, Check&& check) {
  const int ranks = (std::min)(device_test::num_gpus(), 4);
  CHECK_NOTHROW(device_test::on_ranks(ranks, [&](ts::comm::threads& t) {
    ts::comm::symmetric_options window;
    window.window_bytes = std::size_t{64} << 20;
    window.timeout = std::chrono::milliseconds(20000);
    window.slots = slots;
    window.copy_streams = 3;
    auto comm = ts::comm::symmetric::create(t, window).on_slot(slot);
    check(comm, meeting([&] { t.barrier({}); }), t.rank());
  }));
}

void check_chunks(int slots, int slot) {
  on_gpus(slots, slot, [](ts::comm::symmetric& comm, const meeting& meet, int rank) {
    const result expected = one_by_one(comm, meet);
    check_plausible(expected, rank);
    const auto run = [&](auto& lanes, how mode, unsigned long long delay_ns) {
      check_same(through_chunk(comm, lanes, mode, delay_ns, meet), expected);
      meet();
    };
    pl::serial_lanes<ts::space::device> one_stream;
    run(one_stream, how::alone, 0);
    run(one_stream, how::pair, 20000);
    run(one_stream, how::together, 0);
    pl::device_lanes two_streams;
    pl::device_lanes bounded({.communication_sms = 16, .head_start = std::chrono::nanoseconds(0)});
    pl::device_lanes ahead({.communication_sms = 16});
    for (const unsigned long long delay_ns : {0ull, 20000ull, 200000ull}) {
      run(two_streams, how::pair, delay_ns);
      run(bounded, how::pair, delay_ns);
      run(ahead, how::pair, delay_ns);
      run(two_streams, how::together, delay_ns);
      run(ahead, how::together, delay_ns);
    }
    run(bounded, how::graph_of_pair, 50000);
    run(ahead, how::graph_of_pair, 50000);
    check_same(through_chunk(comm, ahead, how::pair, 20000, meet, {.rows = ts::saved_rows::resend}), expected);
    meet();

    // without shared experts combine adds the residual itself
    const travel routed{.num_shared_experts = 0};
    const result without = one_by_one(comm, meet, routed);
    check_plausible(without, rank);
    for (const how mode : {how::pair, how::together, how::graph_of_pair}) {
      for (pl::device_lanes* lanes : {&bounded, &ahead}) {
        check_same(through_chunk(comm, *lanes, mode, 50000, meet, routed), without);
        meet();
      }
    }
  });
}

TEST_CASE("a chunk spread over GPUs has the bits of its layers, alone and as an overlapped pair") {
  check_chunks(1, 0);
}

TEST_CASE("a chunk on the second of two slots") { check_chunks(2, 1); }

TEST_CASE("a chunk whose rows are copied has the same bits, one way or both") {
  using namespace ts::transport;
  on_gpus(2, 1, [](ts::comm::symmetric& comm, const meeting& meet, int) {
    const result expected = one_by_one(comm, meet);
    pl::serial_lanes<ts::space::device> one_stream;
    pl::device_lanes two_streams;
    pl::device_lanes with_budgets({.communication_sms = 16});
    for (const automatic& transport :
         {automatic(copy_engines{}), automatic(copy_engines{.streams = 2, .chunks = 3}),
          automatic(copy_engines{}, all_to_all{}), automatic(all_to_all{.copies_own_rows = true}, copy_engines{})}) {
      for (const ts::saved_rows rows : {ts::saved_rows::received, ts::saved_rows::resend}) {
        const auto run = [&](auto& lanes, how mode, unsigned long long delay_ns) {
          check_same(through_chunk(comm, lanes, mode, delay_ns, meet, {rows, transport}), expected);
          meet();
        };
        run(one_stream, how::pair, 0);
        for (const unsigned long long delay_ns : {0ull, 50000ull}) {
          run(two_streams, how::pair, delay_ns);
          run(with_budgets, how::pair, delay_ns);
        }
        run(with_budgets, how::graph_of_pair, 50000);
      }
    }
  });
}

}  // namespace

#endif
