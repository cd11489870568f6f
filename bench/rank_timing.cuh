// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the benchmarks of several GPUs share: a communicator for each, and medians of the slowest. GPUs are those of
// this process, with a thread each, or under mpirun one of each process.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <tessera/comm/symmetric.cuh>
#include <tessera/comm/threads.hpp>
#if defined(TESSERA_HAS_MPI)
#include <tessera/comm/mpi.hpp>
#endif

#include "gpu_timing.cuh"

namespace tessera_bench {

inline constexpr std::size_t window_bytes = std::size_t{20} << 30;

// The processes of mpirun, if it runs this program and that knows MPI; else none.
class mpi_processes {
 public:
  static mpi_processes& all() {
    static mpi_processes processes;
    return processes;
  }
  int rank() const { return rank_; }
  int size() const { return size_; }      // 0: none
  int device() const { return device_; }  // its number among those of its host

  // Of all ranks, in their order.
  std::vector<double> join(const std::vector<double>& own) {
    std::vector<double> joined(own.size() * static_cast<std::size_t>(size_));
#if defined(TESSERA_HAS_MPI)
    world_->all_gather({}, own.data(), joined.data(), static_cast<std::int64_t>(own.size()));
#endif
    return joined;
  }
  std::unique_ptr<tessera::comm::symmetric> make_comm(
      [[maybe_unused]] const tessera::comm::symmetric_options& options) {
#if defined(TESSERA_HAS_MPI)
    return std::make_unique<tessera::comm::symmetric>(tessera::comm::symmetric::create(*world_, options));
#else
    return nullptr;
#endif
  }

 private:
  mpi_processes() {
#if defined(TESSERA_HAS_MPI)
    if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr && std::getenv("PMI_SIZE") == nullptr) return;
    session_ = std::make_unique<tessera::comm::mpi_session>();
    world_ = std::make_unique<tessera::comm::mpi>(MPI_COMM_WORLD,
                                                  tessera::comm::mpi_options{.timeout = std::chrono::minutes(2)});
    rank_ = world_->rank();
    size_ = world_->size();
    MPI_Comm host = MPI_COMM_NULL;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
    MPI_Comm_rank(host, &device_);
    MPI_Comm_free(&host);
#endif
  }
#if defined(TESSERA_HAS_MPI)
  std::unique_ptr<tessera::comm::mpi_session> session_;
  std::unique_ptr<tessera::comm::mpi> world_;
#endif
  int rank_ = 0;
  int size_ = 0;
  int device_ = 0;
};

// The communicator of each GPU, made once.
class gpu_ranks {
 public:
  static gpu_ranks& all() {
    static gpu_ranks ranks;
    return ranks;
  }
  int size() const { return count(); }
  // GPUs, without making anything; 0 where there are none.
  static int count() {
    if (mpi_processes::all().size() > 0) return mpi_processes::all().size();
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess ? devices : 0;
  }

  // Calls `f(comm)` on every rank of this process, each in a thread of its own if there are several.
  template <class F>
  void run(F f) {
    if (mpi_processes::all().size() > 0) return f(*comms_[0]);
    tessera::comm::threads::run(size(),
                                [&](tessera::comm::threads& t) {
                                  require(cudaSetDevice(t.rank()), "cudaSetDevice");
                                  f(*comms_[static_cast<std::size_t>(t.rank())]);
                                },
                                {.timeout = std::chrono::minutes(2)});
  }

 private:
  gpu_ranks() {
    const int ranks = count();
    tessera::comm::symmetric_options options;
    options.window_bytes = window_bytes;
    options.copy_streams = std::clamp(ranks, 2, 8);
    if (mpi_processes::all().size() > 0) {
      comms_.push_back(mpi_processes::all().make_comm(options));
      return;
    }
    comms_.resize(static_cast<std::size_t>(ranks));
    tessera::comm::threads::run(
        ranks,
        [&](tessera::comm::threads& t) {
          require(cudaSetDevice(t.rank()), "cudaSetDevice");
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
  if (mpi_processes::all().size() > 0) {
    const std::vector<double> own = us[static_cast<std::size_t>(mpi_processes::all().rank())];
    const std::vector<double> joined = mpi_processes::all().join(own);
    for (std::size_t r = 0; r < us.size(); ++r) {
      const auto begin = joined.begin() + static_cast<std::ptrdiff_t>(r * own.size());
      us[r].assign(begin, begin + static_cast<std::ptrdiff_t>(own.size()));
    }
  }
  std::vector<double> slowest(us[0].size());
  for (const auto& rank : us) {
    for (std::size_t i = 0; i < slowest.size(); ++i) slowest[i] = std::max(slowest[i], rank[i]);
  }
  std::nth_element(slowest.begin(), slowest.begin() + static_cast<std::ptrdiff_t>(slowest.size() / 2), slowest.end());
  return slowest[slowest.size() / 2];
}

// `run_on_gpu` on every rank; of several processes the first one reports.
inline int run_on_ranks(int argc, char** argv) {
  const mpi_processes& processes = mpi_processes::all();
  if (processes.size() > 0) {
    int devices = 0;
    const bool has_gpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
    if (has_gpu && processes.device() >= devices) {
      std::printf("skipped: process %d has no GPU of its own, its host has %d\n", processes.rank(), devices);
      return 77;
    }
    if (has_gpu) require(cudaSetDevice(processes.device()), "cudaSetDevice");
    benchmark::AddCustomContext("processes", std::to_string(processes.size()));
    if (has_gpu && processes.rank() > 0) {
      const auto writes = [](const char* argument) { return std::strncmp(argument, "--benchmark_out", 15) == 0; };
      argc = static_cast<int>(std::remove_if(argv + 1, argv + argc, writes) - argv);
      if (std::freopen("/dev/null", "w", stdout) == nullptr) return 1;
    }
  }
  return run_on_gpu(argc, argv);
}

}  // namespace tessera_bench
