// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the benchmarks of several GPUs share: a communicator and a thread for each, and medians of the slowest.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include <tessera/comm/symmetric.cuh>
#include <tessera/comm/threads.hpp>

#include "gpu_timing.cuh"

namespace tessera_bench {

inline constexpr std::size_t window_bytes = std::size_t{20} << 30;

// The communicator of each GPU, made once.
class gpu_ranks {
 public:
  static gpu_ranks& all() {
    static gpu_ranks ranks;
    return ranks;
  }
  int size() const { return static_cast<int>(comms_.size()); }
  // GPUs, without making anything; 0 where there are none.
  static int count() {
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
  }

  // Calls `f(comm, stream)` on every rank, each in a thread of its own.
  template <class F>
  void run(F f) {
    tessera::comm::threads::run(size(),
                                [&](tessera::comm::threads& t) {
                                  require(cudaSetDevice(t.rank()), "cudaSetDevice");
                                  f(*comms_[static_cast<std::size_t>(t.rank())]);
                                },
                                {.timeout = std::chrono::minutes(2)});
  }

 private:
  gpu_ranks() {
    int devices = 0;
    require(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    comms_.resize(static_cast<std::size_t>(devices));
    tessera::comm::threads::run(
        devices,
        [&](tessera::comm::threads& t) {
          require(cudaSetDevice(t.rank()), "cudaSetDevice");
          tessera::comm::symmetric_options options;
          options.window_bytes = window_bytes;
          options.copy_streams = std::clamp(devices, 2, 8);
          comms_[static_cast<std::size_t>(t.rank())] =
              std::make_unique<tessera::comm::symmetric>(tessera::comm::symmetric::create(t, options));
        },
        {.timeout = std::chrono::minutes(2)});
  }
  std::vector<std::unique_ptr<tessera::comm::symmetric>> comms_;
};

using work = std::function<void(cudaStream_t)>;

inline cudaGraphExec_t graph_of(cudaStream_t stream, const work& f, int times) {
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < times; ++i) f(stream);
  require(cudaStreamEndCapture(stream, &graph), "the end of the capture");
  // Streams of communication go first in the graph, too.
  require(cudaGraphInstantiate(&replay, graph, cudaGraphInstantiateFlagUseNodePriority), "cudaGraphInstantiate");
  cudaGraphDestroy(graph);
  return replay;
}

// Median over repeats of the slowest rank's time for one `f`, in microseconds. `make(comm)` gives a rank its work:
// {what runs before, untimed; what is timed; whether that is captured; what is called in the end, when all has run}.
struct rank_work {
  work before;
  work timed;
  bool captured = true;
  std::function<void()> after = {};
};
template <class Make>
double slowest_median_us(int times, Make make) {
  constexpr std::size_t repeats = 12, warm_up = 3;
  auto& ranks = gpu_ranks::all();
  std::vector<std::vector<double>> us(static_cast<std::size_t>(ranks.size()));
  ranks.run([&](tessera::comm::symmetric& comm) {
    comm.release_all();
    const cudaStream_t stream = make_stream();
    const rank_work w = make(comm);
    if (w.before) w.before(stream);
    w.timed(stream);  // first calls load kernels and connect GPUs
    comm.wait(stream);
    const cudaGraphExec_t before = w.before ? graph_of(stream, w.before, 1) : nullptr;
    const cudaGraphExec_t timed = w.captured ? graph_of(stream, w.timed, times) : nullptr;
    std::vector<cudaEvent_t> events(2 * repeats);
    for (cudaEvent_t& event : events) require(cudaEventCreate(&event), "cudaEventCreate");
    for (std::size_t i = 0; i < repeats; ++i) {
      comm.barrier(stream);
      if (before != nullptr) require(cudaGraphLaunch(before, stream), "cudaGraphLaunch");
      require(cudaEventRecord(events[2 * i], stream), "cudaEventRecord");
      if (timed != nullptr) {
        require(cudaGraphLaunch(timed, stream), "cudaGraphLaunch");
      } else {
        for (int n = 0; n < times; ++n) w.timed(stream);
      }
      require(cudaEventRecord(events[2 * i + 1], stream), "cudaEventRecord");
    }
    comm.wait(stream);
    for (std::size_t i = warm_up; i < repeats; ++i) {
      float ms = 0;
      require(cudaEventElapsedTime(&ms, events[2 * i], events[2 * i + 1]), "cudaEventElapsedTime");
      us[static_cast<std::size_t>(comm.rank())].push_back(1e3 * static_cast<double>(ms) / times);
    }
    if (w.after) w.after();
    for (cudaEvent_t event : events) cudaEventDestroy(event);
    if (before != nullptr) cudaGraphExecDestroy(before);
    if (timed != nullptr) cudaGraphExecDestroy(timed);
    cudaStreamDestroy(stream);
  });
  std::vector<double> slowest(us[0].size());
  for (const auto& rank : us) {
    for (std::size_t i = 0; i < slowest.size(); ++i) slowest[i] = std::max(slowest[i], rank[i]);
  }
  std::nth_element(slowest.begin(), slowest.begin() + static_cast<std::ptrdiff_t>(slowest.size() / 2), slowest.end());
  return slowest[slowest.size() / 2];
}

}  // namespace tessera_bench
