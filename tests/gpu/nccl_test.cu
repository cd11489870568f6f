// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// comm::nccl with one thread per GPU, on as many GPUs as there are: collectives against host arithmetic, sub-
// communicators, an engine's communicator, CUDA graphs, and ranks that fail. With one GPU the parts that need two are
// left out. Without a GPU or without NCCL it says so and exits with 77, which CTest reports as skipped.

#include <cstdio>

#if !__has_include(<nccl.h>)
int main() {
  std::printf("skipped: NCCL's header was not found\n");
  return 77;
}
#else

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#undef DOCTEST_CONFIG_IMPLEMENT  // the main function is the one below

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <cuda_runtime.h>
#include <nccl.h>

#include <tessera/comm/nccl.cuh>
#include <tessera/comm/ordered_reduce.cuh>
#include <tessera/comm/self.cuh>
#include <tessera/comm/threads.hpp>

#include "../support/comm_checks.hpp"
#include "device_fixture.cuh"

namespace {

namespace ts = tessera;
using comm_checks::require;
using comm_checks::same_bits;
using comm_checks::values;
using nccl = ts::comm::nccl;
using std::chrono::milliseconds;
using clock_type = std::chrono::steady_clock;

static_assert(ts::device_communicator<nccl>);

int num_gpus() {
  int count = 0;
  device_test::require(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

// 1, 2, and all of at most 8.
std::set<int> rank_counts() {
  const int all = (std::min)(num_gpus(), 8);
  return {1, (std::min)(2, all), all};
}

// A thread, a GPU and a bootstrap for each rank; what a rank throws comes out of here.
void on_ranks(int ranks, const std::function<void(ts::comm::threads&)>& f) {
  ts::comm::threads::run(ranks,
                         [&](ts::comm::threads& t) {
                           device_test::require(cudaSetDevice(t.rank()), "cudaSetDevice");
                           f(t);
                         },
                         {.timeout = milliseconds(120000)});
}

// Device memory and a stream of one rank, allocated before GPUs wait for one another: an allocation may wait for them.
class bench_rank {
 public:
  static constexpr std::size_t capacity = std::size_t{16} << 20;
  bench_rank() {
    device_test::require(cudaMalloc(&memory_, capacity), "cudaMalloc");
    device_test::require(cudaMemset(memory_, 0xff, capacity), "cudaMemset");
    device_test::require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    stream_ = device_test::make_stream();
  }
  bench_rank(const bench_rank&) = delete;
  bench_rank& operator=(const bench_rank&) = delete;
  ~bench_rank() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    cudaFree(memory_);
  }
  ts::device_stream stream() const { return stream_; }
  cudaStream_t raw() const { return stream_; }
  void clear() { used_ = 0; }
  // Aligned to 16 bytes and no more: NCCL's callers need not be aligned better.
  template <class T>
  T* take(std::int64_t count) {
    used_ = (used_ + 15) / 16 * 16;
    T* place = reinterpret_cast<T*>(memory_ + used_);
    used_ += static_cast<std::size_t>(count) * sizeof(T);
    require(used_ <= capacity, "the test needs ", used_, " bytes of device memory");
    return place;
  }
  template <class T>
  T* put(const T* host, std::int64_t count) {
    T* place = take<T>(count);
    if (count > 0) copy(place, host, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyHostToDevice);
    return place;
  }
  template <class T>
  void get(T* host, const T* device, std::int64_t count) {
    if (count > 0) copy(host, device, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyDeviceToHost);
  }

 private:
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    device_test::require(cudaMemcpyAsync(to, from, bytes, kind, stream_), "cudaMemcpyAsync");
    device_test::require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }
  std::byte* memory_ = nullptr;
  std::size_t used_ = 0;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

namespace nccl_checks {  // named: what the concept names and no check calls is no reason to warn

// A communicator of host memory over one of device memory, so that the checks of the former check the latter: each call
// copies to the device, lets NCCL work there, waits, and copies back.
class staged {
 public:
  using space = ts::space::host;
  staged(nccl inner, bench_rank& device) : inner_(std::move(inner)), device_(&device) {}

  int rank() const { return inner_.rank(); }
  int size() const { return inner_.size(); }
  staged split(int color, int key) { return {inner_.split(color, key), *device_}; }

  void barrier(ts::host_stream) {
    inner_.barrier(device_->stream());
    inner_.wait(device_->stream());
  }
  template <class T>
  void broadcast(ts::host_stream, T* data, std::int64_t count, int root) {
    device_->clear();
    T* there = device_->put(data, count);
    inner_.broadcast(device_->stream(), there, count, root);
    bring(data, there, count);
  }
  template <class T>
  void all_reduce(ts::host_stream, const T* send, T* recv, std::int64_t count, ts::reduce_op op = ts::reduce_op::sum) {
    device_->clear();
    const T* in = device_->put(send, count);
    T* out = send == recv ? const_cast<T*>(in) : device_->put(recv, count);
    inner_.all_reduce(device_->stream(), in, out, count, op);
    bring(recv, out, count);
  }
  template <class T>
  void all_gather(ts::host_stream, const T* send, T* recv, std::int64_t count) {
    device_->clear();
    const bool in_place = send == recv + rank() * count;
    T* out = device_->put(recv, size() * count);
    const T* in = in_place ? out + rank() * count : device_->put(send, count);
    inner_.all_gather(device_->stream(), in, out, count);
    bring(recv, out, size() * count);
  }
  template <class T>
  void reduce_scatter(ts::host_stream, const T* send, T* recv, std::int64_t count,
                      ts::reduce_op op = ts::reduce_op::sum) {
    device_->clear();
    const bool in_place = recv == send + rank() * count;
    T* in = device_->put(send, size() * count);
    T* out = in_place ? in + rank() * count : device_->put(recv, count);
    inner_.reduce_scatter(device_->stream(), static_cast<const T*>(in), out, count, op);
    bring(recv, out, count);
  }
  template <class T>
  void all_to_all_v(ts::host_stream, const T* send, const std::int64_t* send_counts, const std::int64_t* send_offsets,
                    T* recv, const std::int64_t* recv_counts, const std::int64_t* recv_offsets) {
    const auto end = [&](const std::int64_t* counts, const std::int64_t* offsets) {
      std::int64_t most = 0;
      for (int r = 0; r < size(); ++r) {
        if (counts[r] > 0) most = (std::max)(most, offsets[r] + counts[r]);
      }
      return most;
    };
    device_->clear();
    const std::int64_t received = end(recv_counts, recv_offsets);
    const T* in = device_->put(send, end(send_counts, send_offsets));
    T* out = device_->put(recv, received);
    inner_.all_to_all_v(device_->stream(), in, send_counts, send_offsets, out, recv_counts, recv_offsets);
    bring(recv, out, received);
  }
  void exchange(ts::host_stream, std::span<const ts::transfer> sends, std::span<const ts::transfer> receives) {
    device_->clear();
    std::vector<ts::transfer> out(sends.begin(), sends.end());
    std::vector<ts::transfer> in(receives.begin(), receives.end());
    for (ts::transfer& t : out) t.data = device_->put(static_cast<const std::byte*>(t.data), t.bytes);
    for (ts::transfer& t : in) t.data = device_->put(static_cast<const std::byte*>(t.data), t.bytes);
    inner_.exchange(device_->stream(), out, in);
    inner_.wait(device_->stream());
    for (std::size_t i = 0; i < in.size(); ++i) {
      device_->get(static_cast<std::byte*>(receives[i].data), static_cast<const std::byte*>(in[i].data), in[i].bytes);
    }
  }

 private:
  template <class T>
  void bring(T* host, const T* device, std::int64_t count) {
    inner_.wait(device_->stream());
    device_->get(host, device, count);
  }

  nccl inner_;
  bench_rank* device_;
};
static_assert(ts::host_communicator<staged>);

}  // namespace nccl_checks

namespace {

using nccl_checks::staged;

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
      bench_rank device;
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

// The ordered sums of `Comm` in device memory against the sum by definition, bit by bit.
template <class A, class Comm>
void check_ordered(Comm& c, bench_rank& device, const std::function<void()>& wait) {
  const auto ranks = static_cast<std::size_t>(c.size());
  for (const std::int64_t total : {0, 1, 5, 12}) {
    for (const std::int64_t count : {0, 1, 3, 100, 2501}) {
      for (int division = 0; division < 3; ++division) {
        std::vector<std::int64_t> chunks(ranks, 0);
        for (std::int64_t chunk = 0; chunk < total; ++chunk) {
          if (division == 0) ++chunks[static_cast<std::size_t>(chunk * c.size() / total)];
          if (division == 1) ++chunks[ranks - 1];
          if (division == 2) ++chunks[static_cast<std::size_t>(chunk == 2 ? 0 : (total - chunk) % c.size())];
        }
        std::int64_t first = 0;
        for (int r = 0; r < c.rank(); ++r) first += chunks[static_cast<std::size_t>(r)];
        const std::int64_t local = chunks[static_cast<std::size_t>(c.rank())];
        const auto sum_by_definition = [&](std::int64_t length) {
          std::vector<A> sum(static_cast<std::size_t>(length), A{0});
          for (std::int64_t chunk = 0; chunk < total; ++chunk) {
            const auto next = comm_checks::chunk_values<A>(chunk, length);
            for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = chunk == 0 ? next[i] : sum[i] + next[i];
          }
          return sum;
        };
        const auto contributions = [&](std::int64_t length) {
          std::vector<A> all;
          for (std::int64_t chunk = first; chunk < first + local; ++chunk) {
            const auto next = comm_checks::chunk_values<A>(chunk, length);
            all.insert(all.end(), next.begin(), next.end());
          }
          return all;
        };
        const auto workspace = [&](std::size_t bytes) {
          auto* start = device.take<std::byte>(static_cast<std::int64_t>(bytes + ts::memory_alignment));
          const std::size_t gap = ts::memory_alignment - reinterpret_cast<std::uintptr_t>(start) % ts::memory_alignment;
          return ts::memory_builder(ts::workspace_memory(start + gap, bytes), "the test's workspace");
        };
        std::vector<A> got(static_cast<std::size_t>(count), A{-1});
        {
          device.clear();
          const auto mine = contributions(count);
          const A* in = device.put(mine.data(), static_cast<std::int64_t>(mine.size()));
          A* out = device.put(got.data(), count);
          auto memory = workspace(ts::ordered_all_reduce_workspace_bytes<A>(c.size(), total, count));
          ts::ordered_all_reduce(device.stream(), c, in, std::span<const std::int64_t>(chunks), count, out, memory);
          wait();
          device.get(got.data(), out, count);
          require(same_bits(got, sum_by_definition(count)), "ordered_all_reduce of ", total, " chunks of ", count,
                  ", division ", division);
        }
        {
          device.clear();
          const std::int64_t whole = count * c.size();
          const auto mine = contributions(whole);
          const A* in = device.put(mine.data(), static_cast<std::int64_t>(mine.size()));
          A* out = device.put(got.data(), count);
          auto memory = workspace(ts::ordered_reduce_scatter_workspace_bytes<A>(c.size(), total, count));
          ts::ordered_reduce_scatter(device.stream(), c, in, std::span<const std::int64_t>(chunks), count, out, memory);
          wait();
          device.get(got.data(), out, count);
          const auto sum = sum_by_definition(whole);
          const std::vector<A> row(sum.begin() + count * c.rank(), sum.begin() + count * (c.rank() + 1));
          require(same_bits(got, row), "ordered_reduce_scatter of ", total, " chunks of ", count, ", division ",
                  division);
        }
      }
    }
  }
}

TEST_CASE("ordered sums have the bits of the sum by definition, however chunks are spread") {
  for (const int ranks : rank_counts()) {
    CAPTURE(ranks);
    CHECK_NOTHROW(on_ranks(ranks, [](ts::comm::threads& t) {
      bench_rank device;
      nccl c = nccl::create(t);
      check_ordered<float>(c, device, [&] { c.wait(device.stream()); });
      check_ordered<double>(c, device, [&] { c.wait(device.stream()); });
    }));
  }
  bench_rank device;
  ts::comm::self<ts::space::device> alone;
  CHECK_NOTHROW(check_ordered<float>(alone, device, [] { device_test::synchronize(); }));
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
      bench_rank device;
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
      bench_rank device;
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
    bench_rank device;
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
  bench_rank device;
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

struct outcome {
  std::string text;
  std::string phase;
  milliseconds took{0};
};

outcome observe(const std::function<void()>& f) {
  outcome result;
  const auto start = clock_type::now();
  try {
    f();
  } catch (const ts::comm_error& e) {
    result = {e.what(), e.phase(), {}};
  } catch (const std::exception& e) {
    result.text = std::string("not a comm_error: ") + e.what();
  }
  result.took = std::chrono::duration_cast<milliseconds>(clock_type::now() - start);
  return result;
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST_CASE("a communicator that is given up says so on every call, its sub-communicators too") {
  bench_rank device;
  ts::comm::self<ts::space::host> bootstrap;
  nccl c = nccl::create(bootstrap);
  nccl part = c.split(0, 0);
  nccl copy = c;
  c.barrier(device.stream());
  c.wait(device.stream());
  part.fail("expert 300 of 256");
  for (nccl* each : {&part, &c, &copy}) {
    const outcome o = observe([&] { each->barrier(device.stream()); });
    CHECK(o.phase == "barrier");
    CHECK(contains(o.text, "rank 0 failed: expert 300 of 256"));
    CHECK(contains(o.text, "not usable any more"));
    CHECK(each->failed());
    CHECK(each->native() == nullptr);
    CHECK_THROWS_AS(each->check(), ts::comm_error);
    CHECK_THROWS_AS(each->wait(device.stream()), ts::comm_error);
    CHECK_THROWS_AS(each->split(0, 0), ts::comm_error);
  }
  nccl again = nccl::create(bootstrap);
  CHECK_NOTHROW(again.barrier(device.stream()));
  CHECK_NOTHROW(again.wait(device.stream()));
}

// All ranks but the last do `work`, which that one never calls; then all start again with a new communicator.
void check_absent_rank(const char* phase, bool warm, const std::function<void(nccl&, bench_rank&)>& work) {
  const int ranks = (std::min)(num_gpus(), 4);
  std::vector<outcome> outcomes(static_cast<std::size_t>(ranks));
  std::vector<outcome> later(static_cast<std::size_t>(ranks));
  CAPTURE(phase);
  CAPTURE(warm);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    bench_rank device;
    {
      nccl c = nccl::create(t, {.timeout = milliseconds(warm ? 20000 : 1000)});
      if (warm) {
        work(c, device);
        c.wait(device.stream());
      }
      t.barrier({});
      if (c.rank() + 1 < c.size()) {
        outcomes[static_cast<std::size_t>(t.rank())] = observe([&] {
          work(c, device);
          c.wait(device.stream(), milliseconds(1000));
        });
        later[static_cast<std::size_t>(t.rank())] = observe([&] { c.barrier(device.stream()); });
        require(c.failed(), "a survivor has given up");
        require(cudaStreamSynchronize(device.raw()) == cudaSuccess, "the stream ends and the context lives");
      }
      t.barrier({});
    }
    staged again(nccl::create(t), device);
    comm_checks::check_moves<std::uint8_t>(again);
  }));
  for (int r = 0; r + 1 < ranks; ++r) {
    const outcome& o = outcomes[static_cast<std::size_t>(r)];
    CHECK_MESSAGE(o.phase == phase, o.text);
    CHECK(contains(o.text, "rank " + std::to_string(r) + " in " + phase));
    CHECK(o.took < milliseconds(3000));
    CHECK(contains(later[static_cast<std::size_t>(r)].text, "not usable any more"));
  }
}

TEST_CASE("a rank that never calls becomes an error on the others within the timeout, and all start again") {
  if (num_gpus() < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  for (const bool warm : {true, false}) {
    check_absent_rank("all_reduce", warm, [](nccl& c, bench_rank& device) {
      auto* data = device.take<float>(100);
      c.all_reduce(device.stream(), static_cast<const float*>(data), data, 100);
    });
    check_absent_rank("exchange", warm, [](nccl& c, bench_rank& device) {
      // Everyone waits for a message of the last rank.
      auto* data = device.take<float>(100 * (c.size() + 1));
      const int last = c.size() - 1;
      std::vector<ts::transfer> sends;
      std::vector<ts::transfer> receives;
      for (int peer = 0; peer < c.size(); ++peer) {
        if ((peer == last) == (c.rank() == last)) continue;
        sends.push_back(ts::send_to(peer, data, 100));
        receives.push_back(ts::receive_from(peer, data + 100 * (peer + 1), 100));
      }
      c.exchange(device.stream(), sends, receives);
    });
  }
}

TEST_CASE("an engine's communicator is aborted after a failure where the engine allows it, and left alone otherwise") {
  if (num_gpus() < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  for (const bool may_abort : {false, true}) {
    CAPTURE(may_abort);
    outcome seen;
    CHECK_NOTHROW(on_ranks(2, [&](ts::comm::threads& t) {
      bench_rank device;
      auto* data = device.take<float>(100);
      ncclUniqueId id{};
      if (t.rank() == 0) require(ncclGetUniqueId(&id) == ncclSuccess, "ncclGetUniqueId");
      t.broadcast({}, &id, 1, 0);
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      ncclComm_t engine = nullptr;
      require(ncclCommInitRankConfig(&engine, 2, id, t.rank(), &config) == ncclSuccess, "ncclCommInitRankConfig");
      nccl c = nccl::wrap(engine, {.abort_wrapped = may_abort});
      c.all_reduce(device.stream(), static_cast<const float*>(data), data, 100);
      c.wait(device.stream());
      t.barrier({});
      if (t.rank() == 0) {
        seen = observe([&] {
          c.all_reduce(device.stream(), static_cast<const float*>(data), data, 100);
          c.wait(device.stream(), milliseconds(500));
        });
        require(c.failed() && c.native() == (may_abort ? nullptr : engine), "who has the communicator");
        if (!may_abort) require(ncclCommAbort(engine) == ncclSuccess, "the engine aborts");
        require(cudaStreamSynchronize(device.raw()) == cudaSuccess, "the stream ends");
      }
      t.barrier({});
      if (t.rank() == 1) require(ncclCommAbort(engine) == ncclSuccess, "the engine aborts");
      t.barrier({});
    }));
    CHECK_MESSAGE(seen.phase == "all_reduce", seen.text);
    CHECK(seen.took < milliseconds(3000));
  }
}

TEST_CASE("a rank that never comes to the creation becomes an error on the others") {
  if (num_gpus() < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  outcome seen;
  CHECK_NOTHROW(on_ranks(2, [&](ts::comm::threads& t) {
    // The last rank takes part in the bootstrap with a GPU of its own, and goes away.
    const auto gather = [&](const void* send, void* recv, std::size_t bytes) {
      t.all_gather({}, static_cast<const std::byte*>(send), static_cast<std::byte*>(recv),
                   static_cast<std::int64_t>(bytes));
      if (t.rank() == 1) throw std::runtime_error("gone");
    };
    const ts::comm::nccl_options options{.timeout = milliseconds(1000), .creation_timeout = milliseconds(1000)};
    if (t.rank() == 0) {
      seen = observe([&] { nccl::create(t.rank(), t.size(), gather, options); });
    } else {
      comm_checks::caught<std::runtime_error>([&] { nccl::create(t.rank(), t.size(), gather, options); });
    }
    t.barrier({});
  }));
  CHECK_MESSAGE(seen.phase == "create", seen.text);
  CHECK(seen.took < milliseconds(3000));
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device (%s)\n", found == cudaSuccess ? "none found" : cudaGetErrorString(found));
    return 77;
  }
  if (const std::string problem = ts::detail::nccl::version_problem(); !problem.empty()) {
    std::printf("skipped: %s\n", problem.c_str());
    return 77;
  }
  int version = 0;
  static_cast<void>(ncclGetVersion(&version));
  std::printf("%d GPUs, NCCL %s\n", devices, ts::detail::nccl::version_text(version).c_str());
  return doctest::Context(argc, argv).run();
}

#endif
