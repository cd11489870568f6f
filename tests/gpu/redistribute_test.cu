// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Redistribution in device memory over NCCL against the host half on the same numbers, bit for bit, on as many GPUs as
// there are (one thread each). Without a GPU or without NCCL it says so and exits with 77, which CTest reports as
// skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/comm/nccl.cuh>
#include <tessera/comm/threads.hpp>
#include <tessera/mesh/mesh.hpp>
#include <tessera/mesh/redistribute.cuh>

#include "../support/comm_checks.hpp"

namespace {

namespace ts = tessera;
using comm_checks::require;
using device_test::num_gpus;
using ts::placement;
using ts::placements;
using nccl = ts::comm::nccl;
using threads = ts::comm::threads;

const std::vector<placement> choices = {placement::replicate(),
                                        placement::shard(0),
                                        placement::shard(1),
                                        placement::shard(2),
                                        placement::strided_shard(0, 2),
                                        placement::strided_shard(1, 3),
                                        placement::partial(),
                                        placement::partial(ts::reduce_op::max)};

bool mixes_reductions(const placements& list) {
  const placement* first = nullptr;
  for (int axis = 0; axis < list.count; ++axis) {
    if (!list[axis].is_partial()) continue;
    if (first != nullptr && !(*first == list[axis])) return true;
    first = &list[axis];
  }
  return false;
}

// What a rank starts with: small integers, so that sums have the same bits in any order.
double value(int rank, std::int64_t i) { return static_cast<double>((i * 37 + rank * 11 + 5) % 101 - 50); }

void check_pair(threads& t, ts::mesh_communicators<threads>& host, ts::mesh_communicators<nccl>& device, nccl& world,
                cudaStream_t stream, const ts::redistribution_plan& plan) {
  const auto before = static_cast<std::size_t>(ts::local_region(plan.ranks, plan.from, t.rank(), plan.tensor).volume());
  const auto after = static_cast<std::size_t>(ts::local_region(plan.ranks, plan.to, t.rank(), plan.tensor).volume());
  std::vector<double> in;
  for (std::size_t i = 0; i < before; ++i) in.push_back(value(t.rank(), static_cast<std::int64_t>(i)));
  std::vector<double> expected(after);
  ts::host_buffer workspace(ts::redistribute_workspace_bytes(plan));
  ts::redistribute({}, host, plan, in.data(), expected.data(), ts::workspace_memory(workspace));

  const device_test::buffer<double> from(in), to(after);
  const device_test::buffer<std::byte> scratch(workspace.size());
  device_test::synchronize();
  t.barrier({});  // GPUs wait for one another from here on
  ts::redistribute(stream, device, plan, static_cast<const double*>(from.data()), to.data(),
                   ts::workspace_memory(scratch.data(), scratch.size()));
  world.wait(stream);
  const auto got = to.get();
  require(after == 0 || std::memcmp(got.data(), expected.data(), after * sizeof(double)) == 0, plan.ranks.text(), ": ",
          to_string(plan.from), " to ", to_string(plan.to), " (", to_string(plan), ") differs on rank ", t.rank());
  require(from.get() == in, "redistribute wrote to its input");
  t.barrier({});
}

void check_mesh(const ts::mesh& ranks, const ts::box& tensor, int every) {
  std::vector<placements> lists;
  for (const placement& a : choices) {
    if (ranks.num_axes == 1) {
      lists.push_back({a});
      continue;
    }
    for (const placement& b : choices) {
      if (!mixes_reductions({a, b})) lists.push_back({a, b});
    }
  }
  std::vector<ts::redistribution_plan> plans;
  int number = 0;
  for (const placements& from : lists) {
    for (const placements& to : lists) {
      if (number++ % every == 0) plans.push_back(ts::plan_redistribution(ranks, from, to, tensor, sizeof(double)));
    }
  }
  threads::run(ranks.size(),
               [&](threads& t) {
                 device_test::require(cudaSetDevice(t.rank()), "cudaSetDevice");
                 nccl world = nccl::create(t);
                 ts::mesh_communicators<threads> host(t, ranks);
                 ts::mesh_communicators<nccl> device(world, ranks);
                 const cudaStream_t stream = device_test::make_stream();
                 for (const auto& plan : plans) check_pair(t, host, device, world, stream, plan);
                 device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
               },
               {.timeout = std::chrono::milliseconds(120000)});
}

TEST_CASE("every pair of placements along one axis, evenly and unevenly divided") {
  for (const int size : {1, 2, 4}) {
    if (size > num_gpus()) continue;
    CAPTURE(size);
    CHECK_NOTHROW(check_mesh({{"a", size}}, ts::box::whole({12, 6, 4}), 1));
    CHECK_NOTHROW(check_mesh({{"a", size}}, ts::box::whole({5, 3, 7}), 1));
    CHECK_NOTHROW(check_mesh({{"a", size}}, ts::box::whole({1, 130, 3}), 1));
  }
}

TEST_CASE("pairs of placements on two axes") {
  if (num_gpus() < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  CHECK_NOTHROW(check_mesh({{"a", 2}, {"b", 1}}, ts::box::whole({7, 5, 2}), 13));
  if (num_gpus() >= 4) CHECK_NOTHROW(check_mesh({{"a", 2}, {"b", 2}}, ts::box::whole({7, 5, 2}), 13));
}

}  // namespace

#endif
