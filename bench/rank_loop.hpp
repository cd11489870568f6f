// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Iterations of a benchmark of several ranks, which are threads.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

#include <tessera/comm/threads.hpp>

namespace tessera_bench {

// Keeps ranks in step: rank 0 asks whether there is another iteration and tells the others, and an iteration takes as
// long as its slowest rank. One for all ranks; the benchmark uses manual time.
class rank_loop {
 public:
  rank_loop(benchmark::State& bench, int ranks) : bench_(bench), seconds_(static_cast<std::size_t>(ranks)) {}

  // Calls `work()` on this rank until the benchmark has enough. All ranks call this.
  template <class Work>
  void run(tessera::comm::threads& comm, Work&& work) {
    while (goes_on(comm)) measure(comm, work);
  }

  // The same with `before()` ahead of each `work()`: it is not timed, and all ranks are done with it.
  template <class Before, class Work>
  void run(tessera::comm::threads& comm, Before&& before, Work&& work) {
    while (goes_on(comm)) {
      before();
      comm.barrier(tessera::host_stream{});
      measure(comm, work);
    }
  }

 private:
  using clock_type = std::chrono::steady_clock;

  bool goes_on(tessera::comm::threads& comm) {
    int go = comm.rank() == 0 && bench_.KeepRunning() ? 1 : 0;
    comm.broadcast(tessera::host_stream{}, &go, 1, 0);
    return go == 1;
  }

  template <class Work>
  void measure(tessera::comm::threads& comm, Work& work) {
    const auto begin = clock_type::now();
    work();
    seconds_[static_cast<std::size_t>(comm.rank())] = std::chrono::duration<double>(clock_type::now() - begin).count();
    comm.barrier(tessera::host_stream{});
    if (comm.rank() == 0) bench_.SetIterationTime(*std::max_element(seconds_.begin(), seconds_.end()));
  }

  benchmark::State& bench_;
  std::vector<double> seconds_;  // of each rank's last iteration
};

}  // namespace tessera_bench
