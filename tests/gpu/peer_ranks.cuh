// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Ranks of a dispatch between GPUs without NCCL: plain memory of one process, and any number of ranks on a GPU, so that
// four ranks can be tried on two GPUs, or on one. Kernels of ranks that share a GPU wait for each other: give each few
// SMs.

#include <algorithm>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/stream.hpp>

#include "device_fixture.cuh"

namespace device_test {

class peer_ranks;

/// A failure in words, or nothing where there is none.
inline std::string text_of(const tessera::comm::symmetric_failure& f) {
  if (f.state == 0) return {};
  constexpr const char* channels[] = {"tables", "rows", "sums", "values", "parts"};
  constexpr const char* steps[] = {"entry", "arrival", "chunk", "overflow"};
  return "rank " + std::to_string(f.rank) + " failed over rank " + std::to_string(f.peer) + ": " +
         channels[static_cast<int>(f.channel)] + ", " + steps[static_cast<int>(f.step)] + ", generation " +
         std::to_string(f.generation);
}

/// One rank: a model of `peer_communicator`.
class peer_rank {
 public:
  int rank() const { return rank_; }
  int size() const { return size_; }
  int device() const { return device_; }
  int num_sms() const { return num_sms_; }
  int slots() const { return 1; }
  void set_num_sms(int sms) { num_sms_ = sms; }
  bool contains(const void* p) const {
    const auto* b = static_cast<const std::byte*>(p);
    return b >= window_[rank_] && b < window_[rank_] + window_bytes;
  }
  tessera::device_stream stream() const { return stream_; }
  tessera::device_stream side_stream() const { return side_; }
  cudaEvent_t fork_event() const { return fork_; }
  cudaEvent_t join_event() const { return join_; }
  int copy_streams() const { return static_cast<int>(copies_.size()); }
  tessera::device_stream copy_stream(int i) const { return copies_.at(static_cast<std::size_t>(i)); }
  cudaEvent_t copy_event() const { return copied_; }

  tessera::comm::symmetric_view view(tessera::comm::symmetric_channel channel) const {
    using namespace tessera::comm;
    const int c = static_cast<int>(channel);
    symmetric_view v{};
    v.rank = rank_;
    v.size = size_;
    v.channel = channel;
    std::copy(window_.begin(), window_.end(), v.peer);
    auto* words = reinterpret_cast<std::uint32_t*>(window_[rank_]);
    v.entered = words + c * 2 * max_symmetric_ranks;
    v.arrived = v.entered + max_symmetric_ranks;
    v.chunks = words + num_symmetric_channels * 2 * max_symmetric_ranks;
    if (channel == symmetric_channel::parts) v.chunks += max_symmetric_ranks * max_symmetric_chunks;
    v.generation = local_ + c * 8;
    v.tickets = v.generation + 4;
    v.failure = reinterpret_cast<symmetric_failure*>(local_ + 64);
    v.timeout_ns = timeout_ns;
    return v;
  }

  /// Memory at the same offset on all ranks that ask in the same order.
  template <class T>
  T* take(std::int64_t count) {
    used_ = (used_ + 1023) / 1024 * 1024;
    auto* place = reinterpret_cast<T*>(window_[rank_] + used_);
    used_ += static_cast<std::size_t>(count) * sizeof(T);
    if (used_ > window_bytes) {
      std::printf("the window of %zu bytes is too small, %zu are needed so far\n", window_bytes, used_);
      std::exit(1);
    }
    return place;
  }
  void release_all() { used_ = flag_bytes; }

  tessera::comm::symmetric_failure failure() const {
    tessera::comm::symmetric_failure f{};
    require(cudaMemcpy(&f, local_ + 64, sizeof(f), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return f;
  }

  static constexpr std::size_t flag_bytes = 512 * 1024;
  std::size_t window_bytes = 0;
  std::uint64_t timeout_ns = 10'000'000'000ull;

 private:
  friend class peer_ranks;
  int rank_ = 0;
  int size_ = 1;
  int device_ = 0;
  int num_sms_ = 0;
  std::vector<std::byte*> window_;
  std::uint32_t* local_ = nullptr;
  std::size_t used_ = flag_bytes;
  cudaStream_t stream_ = nullptr;
  cudaStream_t side_ = nullptr;
  cudaEvent_t fork_ = nullptr;
  cudaEvent_t join_ = nullptr;
  std::vector<cudaStream_t> copies_;
  cudaEvent_t copied_ = nullptr;
};

/// Whether ranks need not share GPUs more than `sharing` ranks to one; says so where they would. Ranks that share one
/// take turns at its launches, too, and many small operations that wait for each other may not come to an end in time.
inline bool has_gpus(int ranks, int sharing) {
  int devices = 0;
  require(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  if (ranks <= devices * sharing) return true;
  std::printf("%d ranks on %d GPUs: left out\n", ranks, devices);
  return false;
}

class peer_ranks {
 public:
  peer_ranks(int size, std::size_t window_bytes, int copy_streams = 0)
      : ranks_(static_cast<std::size_t>(size)), all_(size) {
    int devices = 0;
    require(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    devices = std::min(devices, size);
    const int sharing = (size + devices - 1) / devices;
    for (int d = 0; d < devices; ++d) {
      require(cudaSetDevice(d), "cudaSetDevice");
      for (int e = 0; e < devices; ++e) {
        if (e == d) continue;
        static bool reached[16][16];  // enabling it twice is an error
        if (!reached[d][e]) require(cudaDeviceEnablePeerAccess(e, 0), "cudaDeviceEnablePeerAccess");
        reached[d][e] = true;
      }
    }
    std::vector<std::byte*> windows;
    for (int r = 0; r < size; ++r) {
      auto& rank = ranks_[static_cast<std::size_t>(r)];
      rank.rank_ = r;
      rank.size_ = size;
      rank.device_ = r % devices;
      rank.window_bytes = window_bytes;
      if (sharing > 1) rank.num_sms_ = 40 / sharing;
      require(cudaSetDevice(rank.device_), "cudaSetDevice");
      std::byte* window = nullptr;
      require(cudaMalloc(&window, window_bytes), "cudaMalloc");
      require(cudaMemset(window, 0xff, window_bytes), "cudaMemset");
      require(cudaMemset(window, 0, peer_rank::flag_bytes), "cudaMemset");
      windows.push_back(window);
      require(cudaMalloc(&rank.local_, local_bytes), "cudaMalloc");
      require(cudaMemset(rank.local_, 0, local_bytes), "cudaMemset");
      rank.stream_ = make_stream();
      rank.side_ = make_stream();
      require(cudaEventCreateWithFlags(&rank.fork_, cudaEventDisableTiming), "cudaEventCreate");
      require(cudaEventCreateWithFlags(&rank.join_, cudaEventDisableTiming), "cudaEventCreate");
      for (int i = 0; i < copy_streams; ++i) rank.copies_.push_back(make_stream());
      require(cudaEventCreateWithFlags(&rank.copied_, cudaEventDisableTiming), "cudaEventCreate");
      require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    }
    for (auto& rank : ranks_) rank.window_ = windows;
  }
  peer_ranks(const peer_ranks&) = delete;
  peer_ranks& operator=(const peer_ranks&) = delete;
  ~peer_ranks() {
    for (auto& rank : ranks_) {
      cudaSetDevice(rank.device_);
      cudaDeviceSynchronize();
      cudaStreamDestroy(rank.stream_);
      cudaStreamDestroy(rank.side_);
      cudaEventDestroy(rank.fork_);
      cudaEventDestroy(rank.join_);
      for (cudaStream_t copies : rank.copies_) cudaStreamDestroy(copies);
      cudaEventDestroy(rank.copied_);
      cudaFree(rank.local_);
      cudaFree(rank.window_[static_cast<std::size_t>(rank.rank_)]);
    }
  }

  /// Flags and counts as they were at the start, no failure: what `comm::symmetric::reset` does when all are back.
  void reset() {
    for (auto& rank : ranks_) {
      require(cudaSetDevice(rank.device_), "cudaSetDevice");
      require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    }
    for (auto& rank : ranks_) {
      require(cudaSetDevice(rank.device_), "cudaSetDevice");
      require(cudaMemset(rank.window_[static_cast<std::size_t>(rank.rank_)], 0, peer_rank::flag_bytes), "cudaMemset");
      require(cudaMemset(rank.local_, 0, local_bytes), "cudaMemset");
      require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    }
  }

  peer_rank& operator[](int r) { return ranks_[static_cast<std::size_t>(r)]; }
  int size() const { return static_cast<int>(ranks_.size()); }

  /// Calls `f(rank)` for each rank, in a thread of its own.
  void run(const std::function<void(peer_rank&)>& f) {
    std::vector<std::thread> threads;
    for (auto& rank : ranks_) {
      threads.emplace_back([&] {
        require(cudaSetDevice(rank.device_), "cudaSetDevice");
        f(rank);
      });
    }
    for (auto& thread : threads) thread.join();
  }

  /// Called by all ranks of a `run`: nobody returns before all have come. Ranks that launch many graphs call it before
  /// each. A launch that finds its queue full keeps others from launching on the same GPU until there is room: what the
  /// queue waits for must have been launched by then.
  void wait_for_all() { all_.arrive_and_wait(); }

 private:
  static constexpr std::size_t local_bytes = 1024;
  std::vector<peer_rank> ranks_;
  std::barrier<> all_;
};

}  // namespace device_test
