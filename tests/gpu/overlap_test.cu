// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// An overlapped pair on two streams: phases are kernels that spin for a time and write down when they ran. Checks that
// every phase comes after what it needs, that lanes keep their order and their budget of multiprocessors, and that the
// pair takes less than three quarters of the sum of its phases. Without a GPU it says so and exits with 77, which CTest
// reports as skipped.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/pipeline/overlap.cuh>

namespace {

namespace ts = tessera;
namespace pl = tessera::pipeline;

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

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

int failures = 0;
void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

constexpr int blocks_without_limit = 4;

// A chunk whose phases are spinning kernels with as many blocks as their lane has multiprocessors.
struct spinning_chunk {
  using element = float;
  using forward_type = pl::forward_call<float, ts::space::device>;
  using backward_type = pl::backward_call<float, ts::space::device>;

  record* records = nullptr;  // [phase][layer]
  int throw_at_layer = -1;

  int num_layers() const { return layers; }
  void launch(pl::phase what, int layer, const pl::lane<ts::space::device>& where) {
    if (layer == throw_at_layer) throw std::runtime_error("refused");
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

template <class Lanes>
run_result run_pair(Lanes& lanes, cudaStream_t stream, record* records) {
  spinning_chunk forward{records}, backward{records};
  pl::overlap_stage<spinning_chunk, Lanes> f(forward, lanes), b(backward, lanes);
  const std::vector<record> empty(num_records, nothing);
  require(cudaMemcpy(records, empty.data(), num_records * sizeof(record), cudaMemcpyHostToDevice), "copy");
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin), "cudaEventCreate");
  require(cudaEventCreate(&end), "cudaEventCreate");
  require(cudaEventRecord(begin, stream), "cudaEventRecord");
  f.overlapped(stream, {}, {}, {}, b, {}, {}, {}, {});
  require(cudaEventRecord(end, stream), "cudaEventRecord");
  require(cudaEventSynchronize(end), "cudaEventSynchronize");
  run_result result;
  result.records.resize(num_records);
  require(cudaEventElapsedTime(&result.ms, begin, end), "cudaEventElapsedTime");
  require(cudaMemcpy(result.records.data(), records, num_records * sizeof(record), cudaMemcpyDeviceToHost), "copy");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return result;
}

void expect_order(const run_result& result, const char* what) {
  const pl::overlap_order order = pl::make_overlap_order(layers, layers);
  const record* last[2] = {nullptr, nullptr};
  for (const pl::overlap_node& node : order.nodes) {
    const std::string name = std::string(what) + ": " + pl::symbol_of(node.what) + std::to_string(node.layer);
    const record& r = result.of(node);
    expect(r.blocks > 0, name + " did not run");
    if (node.after >= 0)
      expect(result.of(order.nodes[static_cast<std::size_t>(node.after)]).end <= r.begin,
             name + " began before what it needs had ended");
    const record*& previous = last[pl::is_communication(node.what) ? 1 : 0];
    if (previous != nullptr) expect(previous->end <= r.begin, name + " began before the phase before it in its lane");
    previous = &r;
  }
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  int sms = 0;
  require(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0), "cudaDeviceGetAttribute");
  record* records = nullptr;
  require(cudaMalloc(&records, num_records * sizeof(record)), "cudaMalloc");
  cudaStream_t stream = nullptr;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");

  pl::serial_lanes<ts::space::device> serial;
  run_pair(serial, stream, records);  // warms up
  const run_result one = run_pair(serial, stream, records);
  const double sum_ms = 1e-6 * layers * (6.0 * compute_ns + 4.0 * communication_ns);
  expect(one.ms >= 0.95 * sum_ms, "one stream took " + std::to_string(one.ms) + " ms, less than its phases");

  const int budget = sms > 20 ? 20 : sms / 2;
  constexpr int dispatch_budget = 6;
  pl::device_lanes lanes(
      {.communication_sms = budget, .dispatch_sms = dispatch_budget, .head_start = std::chrono::nanoseconds(0)});
  const auto budget_of = [&](bool sends) { return sends ? dispatch_budget : budget; };
  for (const bool sends : {false, true})
    expect(lanes.communication_sms(sends) == budget_of(sends) && lanes.compute_sms(sends) == sms - budget_of(sends),
           "the budgets are not the device");
  run_pair(lanes, stream, records);
  const run_result two = run_pair(lanes, stream, records);
  expect_order(two, "two streams");
  const pl::overlap_order order = pl::make_overlap_order(layers, layers);
  for (const pl::overlap_node& node : order.nodes) {
    const int computes_on = node.communication > 0 ? sms - budget_of(node.sends) : blocks_without_limit;
    const int communicates_on = budget_of(pl::sends_rows(node.what));
    expect(
        two.of(node).blocks == static_cast<unsigned>(pl::is_communication(node.what) ? communicates_on : computes_on),
        std::string(pl::symbol_of(node.what)) + " did not get its budget");
  }
  const double hidden = (sum_ms - two.ms) / (1e-6 * layers * 4.0 * communication_ns);
  std::printf("phases in sum %.3f ms, one stream %.3f ms, two streams %.3f ms: %.0f %% of the communication hidden\n",
              sum_ms, one.ms, two.ms, 100 * hidden);
  expect(two.ms < 0.75 * sum_ms, "the pair took " + std::to_string(two.ms) + " ms of " + std::to_string(sum_ms));

  // With a head start computation has no budget.
  pl::device_lanes ahead({.communication_sms = budget, .dispatch_sms = 0});
  const run_result given = run_pair(ahead, stream, records);
  expect_order(given, "with a head start");
  for (const pl::overlap_node& node : order.nodes) {
    const bool communicates = pl::is_communication(node.what);
    const std::string name = pl::symbol_of(node.what);
    expect(given.of(node).blocks == static_cast<unsigned>(communicates ? budget : blocks_without_limit),
           name + " did not get its budget with a head start");
    const bool beside = !communicates && node.communication > 0;
    expect(given.of(node).share.shares == !communicates && given.of(node).share.first_sms == (beside ? sms : 0) &&
               two.of(node).share.shares == !communicates &&
               two.of(node).share.first_sms == (beside ? sms - budget_of(node.sends) : 0),
           name + " was not told how it shares the device");
  }

  // Work on the caller's stream comes before and after the pair, and a pair may be captured.
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  spinning_chunk chunk{records};
  pl::overlap_stage<spinning_chunk, pl::device_lanes> stage(chunk, lanes);
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  stage.overlapped(stream, {}, {}, {}, stage, {}, {}, {}, {});
  require(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  require(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  const std::vector<record> empty(num_records, nothing);
  require(cudaMemcpy(records, empty.data(), num_records * sizeof(record), cudaMemcpyHostToDevice), "copy");
  require(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
  require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  run_result captured;
  captured.records.resize(num_records);
  require(cudaMemcpy(captured.records.data(), records, num_records * sizeof(record), cudaMemcpyDeviceToHost), "copy");
  expect_order(captured, "captured");

  // A phase that throws leaves the streams joined and the lanes usable.
  chunk.throw_at_layer = 1;
  bool thrown = false;
  try {
    stage.overlapped(stream, {}, {}, {}, stage, {}, {}, {}, {});
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  expect(thrown, "an exception of a phase did not reach the caller");
  require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  expect_order(run_pair(lanes, stream, records), "after an exception");

  for (const int wrong : {-1, sms}) {
    bool refused = false;
    try {
      pl::device_lanes none({.communication_sms = wrong});
    } catch (const ts::invalid_argument&) {
      refused = true;
    }
    expect(refused, "a budget of " + std::to_string(wrong) + " multiprocessors was taken");
  }
  bool refused = false;
  try {
    pl::device_lanes none({.communication_sms = budget, .dispatch_sms = -1});
  } catch (const ts::invalid_argument&) {
    refused = true;
  }
  expect(refused, "a dispatch of -1 multiprocessors was taken");
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  cudaFree(records);
  std::printf(failures == 0 ? "ok\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
