// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A chunk of layers on one GPU against the same layers called one by one: the same bits, alone and as an overlapped
// pair on two streams. Without a GPU it says so and exits with 77, which CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include "device_fixture.cuh"

#include "moe_chunk_cases.cuh"

namespace {

using namespace chunk_test;

TEST_CASE("a chunk in device memory has the bits of its layers, alone and as an overlapped pair") {
  ts::comm::self<ts::space::device> comm;
  const result expected = one_by_one(comm);
  check_plausible(expected, 0);
  pl::serial_lanes<ts::space::device> one_stream;
  check_same(through_chunk(comm, one_stream, how::alone), expected);
  check_same(through_chunk(comm, one_stream, how::pair), expected);
  pl::device_lanes two_streams;
  check_same(through_chunk(comm, two_streams, how::pair), expected);
  check_same(through_chunk(comm, two_streams, how::pair, 30000), expected);
  check_same(through_chunk(comm, two_streams, how::together, 30000), expected);
  check_same(through_chunk(comm, two_streams, how::graph_of_pair), expected);
  pl::device_lanes ahead({.communication_sms = 8});
  check_same(through_chunk(comm, ahead, how::pair), expected);
  pl::device_lanes bounded({.communication_sms = 8, .head_start = std::chrono::nanoseconds(0)});
  check_same(through_chunk(comm, bounded, how::pair), expected);

  // without shared experts combine adds the residual itself
  const auto alone = [] {};
  const travel routed{.num_shared_experts = 0};
  const result without = one_by_one(comm, alone, routed);
  check_plausible(without, 0);
  for (const how mode : {how::pair, how::together, how::graph_of_pair})
    check_same(through_chunk(comm, ahead, mode, 30000, alone, routed), without);
}

}  // namespace
