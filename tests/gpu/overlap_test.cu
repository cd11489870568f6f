// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// An overlapped pair on two streams: phases are kernels that spin for a time and write down when they ran. Checks that
// every phase comes after what it needs, that lanes keep their order and their budget of multiprocessors, and that the
// pair takes less than three quarters of the sum of its phases. Without a GPU it says so and exits with 77, which CTest
// reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/pipeline/overlap.cuh>

#include "device_fixture.cuh"

namespace {

namespace ts = tessera;
namespace pl = tessera::pipeline;
using device_test::require;

constexpr int layers = 4;
constexpr long long compute_ns = 300000;        // 6 phases of a layer
constexpr long long communication_ns = 450000;  // 4 phases of a layer: as much in sum

// Of one phase: first begin and last end on the device's clock, its blocks, and how its products share the device.
struct record {
  unsigned long long begin;
  unsigned long long end;
  unsigned int blocks;
  ts::sm_share share;
};
constexpr record nothing{~0ULL, 0, 0, {}};

__device__ unsigned long long global_ns() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

__global__ void spin_kernel(record* r, long long ns, ts::sm_share share) {
  if (threadIdx.x != 0) return;
  r->share = share;
  const unsigned long long begin = global_ns();
  atomicMin(&r->begin, begin);
  atomicAdd(&r->blocks, 1u);
  while (global_ns() - begin < static_cast<unsigned long long>(ns)) {
  }
  atomicMax(&r->end, global_ns());
}

constexpr int blocks_without_limit = 4;

// What no failed call throws.
struct refused : std::logic_error {
  using std::logic_error::logic_error;
};

// A chunk whose phases are spinning kernels with as many blocks as their lane has multiprocessors.
struct spinning_chunk {
  using element = float;
  using forward_type = pl::forward_call<float, ts::space::device>;
  using backward_type = pl::backward_call<float, ts::space::device>;

  record* records = nullptr;  // [phase][layer]
  int throw_at_layer = -1;

  int num_layers() const { return layers; }
  void launch(pl::phase what, int layer, const pl::lane<ts::space::device>& where) {
    if (layer == throw_at_layer) throw refused("refused");
    const int blocks = where.num_sms == 0 ? blocks_without_limit : where.num_sms;
    const long long ns = pl::is_communication(what) ? communication_ns : compute_ns;
    spin_kernel<<<blocks, 32, 0, where.stream.get()>>>(records + static_cast<int>(what) * layers + layer, ns,
                                                       where.share);
    require(cudaGetLastError(), "spin_kernel");
  }
  void forward_attention(const forward_type& c) { launch(pl::phase::forward_attention, c.layer, c.lane); }
  void forward_dispatch(const forward_type& c) { launch(pl::phase::forward_dispatch, c.layer, c.lane); }
  void forward_mlp(const forward_type& c) { launch(pl::phase::forward_mlp, c.layer, c.lane); }
  void forward_combine(const forward_type& c) { launch(pl::phase::forward_combine, c.layer, c.lane); }
  void backward_combine(const backward_type& c) { launch(pl::phase::backward_combine, c.layer, c.lane); }
  void backward_mlp_input(const backward_type& c) { launch(pl::phase::backward_mlp_input, c.layer, c.lane); }
  void backward_mlp_weights(const backward_type& c) { launch(pl::phase::backward_mlp_weights, c.layer, c.lane); }
  void backward_dispatch(const backward_type& c) { launch(pl::phase::backward_dispatch, c.layer, c.lane); }
  void backward_attention_input(const backward_type& c) {
    launch(pl::phase::backward_attention_input, c.layer, c.lane);
  }
  void backward_attention_weights(const backward_type& c) {
    launch(pl::phase::backward_attention_weights, c.layer, c.lane);
  }
};

constexpr std::size_t num_records = pl::num_phases * layers;

struct run_result {
  std::vector<record> records;
  float ms = 0;

  const record& of(const pl::overlap_node& node) const {
    return records[static_cast<std::size_t>(node.what) * layers + static_cast<std::size_t>(node.layer)];
  }
};

std::string name_of(const pl::overlap_node& node) { return pl::symbol_of(node.what) + std::to_string(node.layer); }

constexpr double sum_ms = 1e-6 * layers * (6.0 * compute_ns + 4.0 * communication_ns);

// A stream, memory for what phases write down, and lanes of two budgets.
struct overlap_case {
  const int sms = [] {
    int count = 0;
    require(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "cudaDeviceGetAttribute");
    return count;
  }();
  const int budget = sms > 20 ? 20 : sms / 2;
  static constexpr int dispatch_budget = 6;
  const pl::overlap_order order = pl::make_overlap_order(layers, layers);
  device_test::buffer<record> records{num_records};
  const cudaStream_t stream = device_test::make_stream();
  pl::device_lanes lanes{
      {.communication_sms = budget, .dispatch_sms = dispatch_budget, .head_start = std::chrono::nanoseconds(0)}};

  overlap_case() = default;
  overlap_case(const overlap_case&) = delete;
  overlap_case& operator=(const overlap_case&) = delete;
  ~overlap_case() { cudaStreamDestroy(stream); }

  int budget_of(bool sends) const { return sends ? dispatch_budget : budget; }

  void clear() { records.set(std::vector<record>(num_records, nothing)); }

  template <class Lanes>
  run_result run_pair(Lanes& on) {
    spinning_chunk forward{records.data()}, backward{records.data()};
    pl::overlap_stage<spinning_chunk, Lanes> f(forward, on), b(backward, on);
    clear();
    cudaEvent_t begin, end;
    require(cudaEventCreate(&begin), "cudaEventCreate");
    require(cudaEventCreate(&end), "cudaEventCreate");
    require(cudaEventRecord(begin, stream), "cudaEventRecord");
    f.overlapped(stream, {}, {}, {}, b, {}, {}, {}, {});
    require(cudaEventRecord(end, stream), "cudaEventRecord");
    require(cudaEventSynchronize(end), "cudaEventSynchronize");
    run_result result;
    require(cudaEventElapsedTime(&result.ms, begin, end), "cudaEventElapsedTime");
    result.records = records.get();
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return result;
  }

  // That every phase ran after what it needs and after the phase before it in its lane.
  void check_order(const run_result& result) const {
    const record* last[2] = {nullptr, nullptr};
    for (const pl::overlap_node& node : order.nodes) {
      const std::string name = name_of(node);
      CAPTURE(name);
      const record& r = result.of(node);
      CHECK(r.blocks > 0);
      if (node.after >= 0) CHECK(result.of(order.nodes[static_cast<std::size_t>(node.after)]).end <= r.begin);
      const record*& previous = last[pl::is_communication(node.what) ? 1 : 0];
      if (previous != nullptr) CHECK(previous->end <= r.begin);
      previous = &r;
    }
  }

  // That computing phases, and they alone, were told that they share the device, and how many multiprocessors their
  // first product has: beside communication `first_sms(node)`, otherwise all.
  template <class F>
  void check_shares(const run_result& result, const F& first_sms) const {
    for (const pl::overlap_node& node : order.nodes) {
      const std::string name = name_of(node);
      CAPTURE(name);
      const bool communicates = pl::is_communication(node.what);
      const bool beside = !communicates && node.communication > 0;
      CHECK(result.of(node).share.shares == !communicates);
      CHECK(result.of(node).share.first_sms == (beside ? first_sms(node) : 0));
    }
  }
};

}  // namespace

TEST_CASE("a pair on two streams keeps the order and the budgets, and takes less than its phases in sum") {
  overlap_case c;
  pl::serial_lanes<ts::space::device> serial;
  c.run_pair(serial);  // warms up
  const run_result one = c.run_pair(serial);
  CHECK(one.ms >= 0.95 * sum_ms);

  for (const bool sends : {false, true}) {
    CHECK(c.lanes.communication_sms(sends) == c.budget_of(sends));
    CHECK(c.lanes.compute_sms(sends) == c.sms - c.budget_of(sends));
  }
  c.run_pair(c.lanes);
  const run_result two = c.run_pair(c.lanes);
  c.check_order(two);
  for (const pl::overlap_node& node : c.order.nodes) {
    const std::string name = name_of(node);
    CAPTURE(name);
    const int computes_on = node.communication > 0 ? c.sms - c.budget_of(node.sends) : blocks_without_limit;
    const int communicates_on = c.budget_of(pl::sends_rows(node.what));
    CHECK(two.of(node).blocks ==
          static_cast<unsigned>(pl::is_communication(node.what) ? communicates_on : computes_on));
  }
  c.check_shares(two, [&](const pl::overlap_node& node) { return c.sms - c.budget_of(node.sends); });
  const double hidden = (sum_ms - two.ms) / (1e-6 * layers * 4.0 * communication_ns);
  std::printf("phases in sum %.3f ms, one stream %.3f ms, two streams %.3f ms: %.0f %% of the communication hidden\n",
              sum_ms, one.ms, two.ms, 100 * hidden);
  CHECK(two.ms < 0.75 * sum_ms);
}

TEST_CASE("with a head start computation has no budget") {
  overlap_case c;
  pl::device_lanes ahead({.communication_sms = c.budget, .dispatch_sms = 0});
  const run_result given = c.run_pair(ahead);
  c.check_order(given);
  for (const pl::overlap_node& node : c.order.nodes) {
    const std::string name = name_of(node);
    CAPTURE(name);
    CHECK(given.of(node).blocks ==
          static_cast<unsigned>(pl::is_communication(node.what) ? c.budget : blocks_without_limit));
  }
  c.check_shares(given, [&](const pl::overlap_node&) { return c.sms; });
}

TEST_CASE("a captured pair keeps the order") {
  overlap_case c;
  c.run_pair(c.lanes);  // loads the kernel
  spinning_chunk chunk{c.records.data()};
  pl::overlap_stage<spinning_chunk, pl::device_lanes> stage(chunk, c.lanes);
  const cudaGraphExec_t exec =
      device_test::capture(c.stream, [&] { stage.overlapped(c.stream, {}, {}, {}, stage, {}, {}, {}, {}); });
  c.clear();
  require(cudaGraphLaunch(exec, c.stream), "cudaGraphLaunch");
  require(cudaStreamSynchronize(c.stream), "cudaStreamSynchronize");
  c.check_order({.records = c.records.get()});
  cudaGraphExecDestroy(exec);
}

TEST_CASE("a phase that throws leaves the streams joined and the lanes usable") {
  overlap_case c;
  spinning_chunk chunk{.records = c.records.data(), .throw_at_layer = 1};
  pl::overlap_stage<spinning_chunk, pl::device_lanes> stage(chunk, c.lanes);
  CHECK_THROWS_AS(stage.overlapped(c.stream, {}, {}, {}, stage, {}, {}, {}, {}), refused);
  require(cudaStreamSynchronize(c.stream), "cudaStreamSynchronize");
  c.check_order(c.run_pair(c.lanes));
}

TEST_CASE("a budget that leaves nothing or is negative is refused") {
  const overlap_case c;
  for (const int wrong : {-1, c.sms}) {
    CAPTURE(wrong);
    CHECK_THROWS_AS(pl::device_lanes({.communication_sms = wrong}), ts::invalid_argument);
  }
  CHECK_THROWS_AS(pl::device_lanes({.communication_sms = c.budget, .dispatch_sms = -1}), ts::invalid_argument);
}
