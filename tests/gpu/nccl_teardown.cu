// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// NCCL alone, nothing of Tessera: a thread for each GPU makes a communicator, one split from it with a symmetric
// window, gathers something and ends both, again and again. With NCCL 2.28.9 a round ends now and then in "double free
// or corruption (out)", inside the driver's cuMemUnmap that ncclCommDestroy has called; a shorter form of this program
// did so in 6 of 1205 rounds with windows on 2 H200.
//
// By NCCL's source, built against a driver that only checks, no handle or mapping is given back twice. But two threads
// unmap the same memory at the same moment: after ncclCommFinalize each rank's service thread frees its buffers in its
// own time (p2p.cc, ncclCudaFree), and the last rank to destroy frees the communicators of all ranks of the process,
// where it unmaps its peers' buffers (init.cc, commReclaim), having waited for the service threads of its own alone.
// The last ncclCommDestroy of a communicator takes half a second, so a rank that is late with the communicator that had
// a window is late with the one it was split from, and meets this.
//
// So it is by what was counted on 2 H200: `no-window late` was aborted six times in some 480 rounds, `no-window late
// pause` never in 838, `no-window early` never in 211; with windows, `pause` never in 355, `no-gather` never in 117.
// comm/detail/nccl/state.cuh pauses there for this reason. Not a test: it is built by hand,
//
//     nvcc -std=c++20 -arch=native tests/gpu/nccl_teardown.cu -o nccl_teardown -lnccl -lpthread
//     for i in $(seq 12); do ./nccl_teardown 45 & done; wait    # each counts its rounds until it aborts
//
// Further arguments leave something out: `no-window`, `no-gather`, `no-deregister`, `keep` (the split communicator is
// never ended), `plain-window` (one that collectives do not use); or change who does what when: `threads` (each end in
// a thread of its own), `phased` (all meet between the steps of a teardown), `stress` (who is done first allocates and
// frees while the last one ends all communicators), `late` and `early` (the last rank, or the first, begins to end the
// communicator that was split 700 ms after the others), `pause` (100 ms between finalizing and destroying).

#include <atomic>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include <cuda_runtime.h>
#include <nccl.h>

namespace {

void require(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", call, cudaGetErrorString(status));
  std::exit(1);
}
void require(ncclResult_t status, const char* call) {
  if (status == ncclSuccess || status == ncclInProgress) return;
  std::printf("%s: %s\n", call, ncclGetErrorString(status));
  std::exit(1);
}

// Communicators that do not block are asked until they are done.
void settle(ncclComm_t comm) {
  ncclResult_t state = ncclInProgress;
  while (state == ncclInProgress) {
    require(ncclCommGetAsyncError(comm, &state), "ncclCommGetAsyncError");
    std::this_thread::yield();
  }
  require(state, "a communicator's state");
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> options(argv + 1, argv + argc);
  const auto given = [&](const char* name) {
    for (const std::string& option : options) {
      if (option == name) return true;
    }
    return false;
  };
  const int seconds = options.empty() ? 45 : std::atoi(options[0].c_str());
  int size = 0;
  require(cudaGetDeviceCount(&size), "cudaGetDeviceCount");
  const bool windows = !given("no-window"), gathers = !given("no-gather"), deregisters = !given("no-deregister");
  const bool keeps = given("keep"), in_threads = given("threads"), phased = given("phased");
  const bool plain = given("plain-window"), stress = given("stress");
  constexpr std::size_t window_bytes = 64 << 20, part_bytes = 4096;

  const auto begin = std::chrono::steady_clock::now();
  std::barrier all(size);
  ncclUniqueId id;
  std::atomic<int> rounds = 0;
  std::atomic<bool> goes_on = true;
  const auto run = [&](int rank) {
    require(cudaSetDevice(rank), "cudaSetDevice");
    const auto meet = [&] {
      if (phased) all.arrive_and_wait();
    };
    const auto end = [&](ncclComm_t comm) {
      require(ncclCommFinalize(comm), "ncclCommFinalize");
      settle(comm);
      meet();
      if (phased) std::this_thread::sleep_for(std::chrono::milliseconds(50));  // NCCL's threads free their part
      if (given("pause")) std::this_thread::sleep_for(std::chrono::milliseconds(100));
      const auto destroy = [comm, rank] {
        require(cudaSetDevice(rank), "cudaSetDevice");
        require(ncclCommDestroy(comm), "ncclCommDestroy");
      };
      if (in_threads)
        std::thread(destroy).join();
      else
        destroy();
      meet();
      for (int i = 0; stress && i < 200; ++i) {
        void* small = nullptr;
        require(ncclMemAlloc(&small, 2 << 20), "ncclMemAlloc");
        require(ncclMemFree(small), "ncclMemFree");
      }
    };
    while (true) {
      if (rank == 0) {
        require(ncclGetUniqueId(&id), "ncclGetUniqueId");
        goes_on = std::chrono::steady_clock::now() - begin < std::chrono::seconds(seconds);
        if (goes_on) std::fprintf(stderr, "round %d\n", ++rounds);
      }
      all.arrive_and_wait();
      if (!goes_on) return;
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      config.blocking = 0;
      ncclComm_t over = nullptr, own = nullptr;
      require(ncclCommInitRankConfig(&over, size, id, rank, &config), "ncclCommInitRankConfig");
      settle(over);
      cudaStream_t stream = nullptr;
      std::byte* parts = nullptr;
      require(cudaStreamCreate(&stream), "cudaStreamCreate");
      require(cudaMalloc(reinterpret_cast<void**>(&parts), part_bytes * static_cast<std::size_t>(size + 1)),
              "cudaMalloc");
      const auto gather = [&] {
        if (!gathers) return;
        require(ncclAllGather(parts, parts + part_bytes, part_bytes, ncclChar, over, stream), "ncclAllGather");
        settle(over);
        require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      };
      gather();
      void* memory = nullptr;
      ncclWindow_t window = nullptr;
      if (windows) {
        require(ncclCommSplit(over, 0, rank, &own, &config), "ncclCommSplit");
        settle(over);
        settle(own);
        require(ncclMemAlloc(&memory, window_bytes), "ncclMemAlloc");
        const int flags = plain ? NCCL_WIN_DEFAULT : NCCL_WIN_COLL_SYMMETRIC;
        require(ncclCommWindowRegister(own, memory, window_bytes, &window, flags), "ncclCommWindowRegister");
        settle(own);
      }
      gather();
      if (windows) {
        meet();
        if (deregisters) require(ncclCommWindowDeregister(own, window), "ncclCommWindowDeregister");
        meet();
        if (!keeps) end(own);
        require(ncclMemFree(memory), "ncclMemFree");
      }
      if ((given("late") && rank == size - 1) || (given("early") && rank == 0))
        std::this_thread::sleep_for(std::chrono::milliseconds(700));
      end(over);
      require(cudaFree(parts), "cudaFree");
      require(cudaStreamDestroy(stream), "cudaStreamDestroy");
      all.arrive_and_wait();
    }
  };
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < size; ++rank) ranks.emplace_back(run, rank);
  for (std::thread& rank : ranks) rank.join();
  std::printf("%d rounds without an abort\n", rounds.load());
}
