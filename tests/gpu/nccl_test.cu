// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// comm::nccl with one thread per GPU, on as many GPUs as there are: collectives against host arithmetic, sub-
// communicators, an engine's communicator, CUDA graphs, refusals. With one GPU the parts that need two are left out.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include <cuda_runtime.h>
#include <nccl.h>

#include <tessera/comm/nccl.cuh>
#include <tessera/comm/self.hpp>
#include <tessera/comm/threads.hpp>

#include "../support/comm_checks.hpp"

namespace {

namespace ts = tessera;
using comm_checks::require;
using comm_checks::same_bits;
using comm_checks::values;
using device_test::num_gpus;
using device_test::on_ranks;
using device_test::rank_counts;
using device_test::rank_memory;
using nccl = ts::comm::nccl;
using staged = device_test::staged<nccl>;
using std::chrono::milliseconds;

static_assert(ts::device_communicator<nccl>);
static_assert(ts::host_communicator<staged>);

// Sums in an order that is NCCL's own: within the rounding errors of any order.
template <class T>
void check_float_reductions(staged& c) {
  for (const std::int64_t count : {1, 7, 1000, 50001}) {
    const auto send = values<T>(c.rank(), count, 5);
    std::vector<T> recv(send.size());
    c.all_reduce({}, send.data(), recv.data(), count);
    const auto rows = values<T>(c.rank(), count * c.size(), 6);
    std::vector<T> part(send.size());
    c.reduce_scatter({}, rows.data(), part.data(), count);
    const double unit = std::is_same_v<T, float> ? 1.2e-7 : 2.3e-16;
    const auto near_sum = [&](T got, std::int64_t i, int salt) {
      double sum = 0;
      double sizes = 0;
      for (int r = 0; r < c.size(); ++r) {
        const auto x = static_cast<double>(comm_checks::value<T>(r, i, salt));
        sum += x;
        sizes += std::abs(x);
      }
      return std::abs(static_cast<double>(got) - sum) <= unit * c.size() * sizes;
    };
    for (std::int64_t i = 0; i < count; ++i) {
      const auto k = static_cast<std::size_t>(i);
      require(near_sum(recv[k], i, 5), "all_reduce of ", count, ", element ", i);
      require(near_sum(part[k], i + c.rank() * count, 6), "reduce_scatter of ", count, ", element ", i);
    }
    for (const ts::reduce_op op : {ts::reduce_op::min, ts::reduce_op::max}) {
      c.all_reduce({}, send.data(), recv.data(), count, op);
      require(same_bits(recv, comm_checks::joined<T>(c.size(), op, 0, count, 5)), "min or max of ", count);
    }
  }
}

TEST_CASE("collectives, messages and sub-communicators do what those of host memory do") {
  for (const int ranks : rank_counts()) {
    CAPTURE(ranks);
    CHECK_NOTHROW(on_ranks(ranks, [](ts::comm::threads& t) {
      rank_memory device;
      staged c(nccl::create(t), device);
      require(c.rank() == t.rank() && c.size() == t.size(), "ranks are those of the bootstrap");
      for (int i = 0; i < 5; ++i) c.barrier({});
      comm_checks::check_reductions<std::int32_t>(c);
      comm_checks::check_reductions<std::int64_t>(c);
      comm_checks::check_reductions<std::uint64_t>(c);
      check_float_reductions<float>(c);
      check_float_reductions<double>(c);
      comm_checks::check_moves<std::uint8_t>(c);
      comm_checks::check_moves<ts::bfloat16>(c);
      comm_checks::check_moves<std::array<std::int32_t, 3>>(c);
      comm_checks::check_exchange(c, 40);
      comm_checks::check_order_of_messages(c);
      comm_checks::check_split(c);
    }));
  }
}

TEST_CASE("several GPUs of one process get their communicators at once") {
  std::vector<int> devices;
  for (int d = (std::min)(num_gpus(), 4) - 1; d >= 0; --d) devices.push_back(d);  // ranks need not be in that order
  int before = -1;
  int after = -2;
  cudaGetDevice(&before);
  std::vector<nccl> ranks = nccl::create_all(devices);
  cudaGetDevice(&after);
  CHECK(before == after);
  REQUIRE(ranks.size() == devices.size());
  std::vector<std::int64_t> sums(ranks.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    CHECK(ranks[r].rank() == static_cast<int>(r));
    CHECK(ranks[r].device() == devices[r]);
    threads.emplace_back([&sums, &devices, r, c = ranks[r]]() mutable {
      device_test::require(cudaSetDevice(devices[r]), "cudaSetDevice");
      rank_memory device;
      const std::int64_t value = static_cast<std::int64_t>(r) + 1;
      std::int64_t* data = device.put(&value, 1);
      c.all_reduce(device.stream(), static_cast<const std::int64_t*>(data), data, 1);
      c.wait(device.stream());
      device.get(&sums[r], data, 1);
    });
  }
  for (std::thread& t : threads) t.join();
  const auto n = static_cast<std::int64_t>(ranks.size());
  for (const std::int64_t sum : sums) CHECK(sum == n * (n + 1) / 2);

  const std::vector<int> twice{0, 0};
  const std::vector<int> missing{num_gpus()};
  CHECK_THROWS_AS(nccl::create_all(twice), ts::invalid_argument);
  CHECK_THROWS_AS(nccl::create_all(missing), ts::invalid_argument);
  CHECK_THROWS_AS(nccl::create_all({}), ts::invalid_argument);
}

TEST_CASE("an engine's communicator, blocking or not, is used and left to the engine") {
  for (const int blocking : {1, 0}) {
    CAPTURE(blocking);
    const int ranks = (std::min)(num_gpus(), 2);
    CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
      rank_memory device;
      ncclUniqueId id{};
      if (t.rank() == 0) require(ncclGetUniqueId(&id) == ncclSuccess, "ncclGetUniqueId");
      t.broadcast({}, &id, 1, 0);
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      config.blocking = blocking;
      ncclComm_t engine = nullptr;
      const ncclResult_t made = ncclCommInitRankConfig(&engine, t.size(), id, t.rank(), &config);
      require(made == ncclSuccess || made == ncclInProgress, "ncclCommInitRankConfig");
      {
        nccl c = nccl::wrap(engine);  // waits where the engine has not
        require(c.rank() == t.rank() && c.size() == t.size() && c.native() == engine, "wrap");
        staged s(c, device);
        comm_checks::check_moves<std::uint8_t>(s);
        comm_checks::check_exchange(s, 10);
        staged part = s.split(0, -s.rank());
        require(part.rank() == s.size() - 1 - s.rank(), "split of a wrapped communicator");
        comm_checks::check_moves<std::uint8_t>(part);
      }
      int count = 0;
      require(ncclCommCount(engine, &count) == ncclSuccess && count == t.size(), "the engine's is alive");
      t.barrier({});
      require(ncclCommDestroy(engine) == ncclSuccess, "ncclCommDestroy");
    }));
  }
  CHECK_THROWS_AS(nccl::wrap(nullptr), ts::invalid_argument);
}

TEST_CASE("collectives are captured in a graph that sees new data") {
  const int ranks = (std::min)(num_gpus(), 2);
  CHECK_NOTHROW(on_ranks(ranks, [](ts::comm::threads& t) {
    rank_memory device;
    nccl c = nccl::create(t);
    constexpr std::int64_t count = 1000;
    auto* data = device.take<float>(count);
    auto* sums = device.take<float>(count);
    auto* all = device.take<float>(count * c.size());
    const auto work = [&] {
      c.all_reduce(device.stream(), static_cast<const float*>(data), sums, count);
      c.all_gather(device.stream(), static_cast<const float*>(sums), all, count);
    };
    work();  // connects the GPUs
    c.wait(device.stream());
    t.barrier({});
    cudaGraphExec_t graph = device_test::capture(device.raw(), [&] {
      work();
      const auto error = comm_checks::caught<ts::invalid_argument>([&] { c.wait(device.stream()); });
      require(std::string(error.what()).find("captured") != std::string::npos, error.what());
    });
    for (int replay = 1; replay <= 5; ++replay) {
      const std::vector<float> mine(count, static_cast<float>(replay * (c.rank() + 1)));
      device_test::require(
          cudaMemcpyAsync(data, mine.data(), count * sizeof(float), cudaMemcpyHostToDevice, device.raw()), "copy");
      device_test::require(cudaGraphLaunch(graph, device.raw()), "cudaGraphLaunch");
      c.wait(device.stream());
      std::vector<float> got(static_cast<std::size_t>(count) * static_cast<std::size_t>(c.size()));
      device.get(got.data(), all, static_cast<std::int64_t>(got.size()));
      const auto expected = static_cast<float>(replay * c.size() * (c.size() + 1) / 2);
      for (const float x : got) require(x == expected, "replay ", replay, " gives ", x, ", not ", expected);
    }
    device_test::require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
  }));
}

TEST_CASE("wrong arguments throw before anything is enqueued, and the communicator goes on") {
  rank_memory device;
  ts::comm::self<ts::space::host> bootstrap;
  nccl c = nccl::create(bootstrap);
  const ts::device_stream s = device.stream();
  auto* p = device.take<double>(64);
  double* none = nullptr;
  const ts::transfer to_nobody{1, p, 8};
  const ts::transfer negative{0, p, -8};
  const ts::transfer without_data{0, nullptr, 8};
  const ts::transfer to_self{0, p, 8};
  const ts::transfer from_self{0, p + 8, 16};
  using bad = ts::invalid_argument;
  CHECK_THROWS_AS(c.exchange(s, {&to_nobody, 1}, {}), bad);
  CHECK_THROWS_AS(c.exchange(s, {&negative, 1}, {}), bad);
  CHECK_THROWS_AS(c.exchange(s, {}, {&without_data, 1}), bad);
  CHECK_THROWS_AS(c.exchange(s, {&to_self, 1}, {&from_self, 1}), bad);
  CHECK_THROWS_AS(c.exchange(s, {&to_self, 1}, {}), bad);
  CHECK_THROWS_AS(c.exchange(s, {}, {&from_self, 1}), bad);
  CHECK_THROWS_AS(c.broadcast(s, p, 1, 1), bad);
  CHECK_THROWS_AS(c.broadcast(s, p, -1, 0), bad);
  CHECK_THROWS_AS(c.all_reduce(s, static_cast<const double*>(none), p, 3), bad);
  CHECK_THROWS_AS(c.all_reduce(s, static_cast<const double*>(p), p + 1, 3), bad);
  CHECK_THROWS_AS(c.all_gather(s, static_cast<const double*>(p), p + 1, std::int64_t{1} << 60), bad);
  CHECK_THROWS_AS(c.split(-1, 0), bad);
  CHECK_THROWS_AS(c.wait(s, milliseconds(0)), bad);
  CHECK_THROWS_AS(nccl::create(bootstrap, {.timeout = milliseconds(0)}), bad);
  CHECK_THROWS_AS(nccl::create(bootstrap, {.min_ctas = 4, .max_ctas = 2}), bad);
  CHECK_THROWS_AS(nccl::create(1, 1, [](const void*, void*, std::size_t) {}), bad);
  CHECK_THROWS_AS(nccl::create(0, 1, nullptr), bad);
  CHECK_FALSE(c.failed());
  CHECK_NOTHROW(c.barrier(s));
  CHECK_NOTHROW(c.wait(s));

  // Two ranks that forgot to choose a GPU.
  std::mutex mutex;
  int refused = 0;
  ts::comm::threads::run(2, [&](ts::comm::threads& t) {
    device_test::require(cudaSetDevice(0), "cudaSetDevice");
    const auto error = comm_checks::caught<bad>([&] { nccl::create(t); });
    const std::lock_guard lock(mutex);
    refused += std::string(error.what()).find("the same GPU") != std::string::npos ? 1 : 0;
  });
  CHECK(refused == 2);
}

}  // namespace

#endif
