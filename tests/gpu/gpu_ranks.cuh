// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Tests with one thread per GPU: the ranks, their memory, and a communicator of device memory that host code can check.
// As with device_fixture.cuh, define DOCTEST_CONFIG_IMPLEMENT before including it for a main function.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/threads.hpp>
#include <tessera/core/stream.hpp>

#include "device_fixture.cuh"

namespace device_test {

inline int num_gpus() {
  int count = 0;
  require(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

/// 1, 2, and all of at most 8.
inline std::set<int> rank_counts() {
  const int all = (std::min)(num_gpus(), 8);
  return {1, (std::min)(2, all), all};
}

/// A thread, a GPU and a bootstrap for each rank; what a rank throws comes out of here. Rank r has GPU r as its
/// thread's current device.
inline void on_ranks(int ranks, const std::function<void(tessera::comm::threads&)>& f) {
  tessera::comm::threads::run(ranks,
                              [&](tessera::comm::threads& t) {
                                require(cudaSetDevice(t.rank()), "cudaSetDevice");
                                f(t);
                              },
                              {.timeout = std::chrono::milliseconds(120000)});
}

/// Device memory and a stream of one rank, allocated before GPUs wait for one another: an allocation may wait for them.
class rank_memory {
 public:
  static constexpr std::size_t capacity = std::size_t{16} << 20;
  rank_memory() {
    require(cudaMalloc(&memory_, capacity), "cudaMalloc");
    require(cudaMemset(memory_, 0xff, capacity), "cudaMemset");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    stream_ = make_stream();
  }
  rank_memory(const rank_memory&) = delete;
  rank_memory& operator=(const rank_memory&) = delete;
  ~rank_memory() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    cudaFree(memory_);
  }
  tessera::device_stream stream() const { return stream_; }
  cudaStream_t raw() const { return stream_; }
  void clear() { used_ = 0; }
  /// Aligned to 16 bytes and no more: NCCL's callers need not be aligned better.
  template <class T>
  T* take(std::int64_t count) {
    used_ = (used_ + 15) / 16 * 16;
    T* place = reinterpret_cast<T*>(memory_ + used_);
    used_ += static_cast<std::size_t>(count) * sizeof(T);
    if (used_ > capacity) throw std::logic_error("the test needs " + std::to_string(used_) + " bytes of device memory");
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
    require(cudaMemcpyAsync(to, from, bytes, kind, stream_), "cudaMemcpyAsync");
    require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }
  std::byte* memory_ = nullptr;
  std::size_t used_ = 0;
  cudaStream_t stream_ = nullptr;
};

/// A communicator of host memory over one of device memory, so that the checks of the former check the latter: each
/// call copies to the device, lets `Comm` work there, waits with its `wait(stream)`, and copies back.
template <class Comm>
class staged {
 public:
  using space = tessera::space::host;
  staged(Comm inner, rank_memory& device) : inner_(std::move(inner)), device_(&device) {}

  int rank() const { return inner_.rank(); }
  int size() const { return inner_.size(); }
  staged split(int color, int key) { return {inner_.split(color, key), *device_}; }

  void barrier(tessera::host_stream) {
    inner_.barrier(device_->stream());
    inner_.wait(device_->stream());
  }
  template <class T>
  void broadcast(tessera::host_stream, T* data, std::int64_t count, int root) {
    device_->clear();
    T* there = device_->put(data, count);
    inner_.broadcast(device_->stream(), there, count, root);
    bring(data, there, count);
  }
  template <class T>
  void all_reduce(tessera::host_stream, const T* send, T* recv, std::int64_t count,
                  tessera::reduce_op op = tessera::reduce_op::sum) {
    device_->clear();
    const T* in = device_->put(send, count);
    T* out = send == recv ? const_cast<T*>(in) : device_->put(recv, count);
    inner_.all_reduce(device_->stream(), in, out, count, op);
    bring(recv, out, count);
  }
  template <class T>
  void all_gather(tessera::host_stream, const T* send, T* recv, std::int64_t count) {
    device_->clear();
    const bool in_place = send == recv + rank() * count;
    T* out = device_->put(recv, size() * count);
    const T* in = in_place ? out + rank() * count : device_->put(send, count);
    inner_.all_gather(device_->stream(), in, out, count);
    bring(recv, out, size() * count);
  }
  template <class T>
  void reduce_scatter(tessera::host_stream, const T* send, T* recv, std::int64_t count,
                      tessera::reduce_op op = tessera::reduce_op::sum) {
    device_->clear();
    const bool in_place = recv == send + rank() * count;
    T* in = device_->put(send, size() * count);
    T* out = in_place ? in + rank() * count : device_->put(recv, count);
    inner_.reduce_scatter(device_->stream(), static_cast<const T*>(in), out, count, op);
    bring(recv, out, count);
  }
  template <class T>
  void all_to_all_v(tessera::host_stream, const T* send, const std::int64_t* send_counts,
                    const std::int64_t* send_offsets, T* recv, const std::int64_t* recv_counts,
                    const std::int64_t* recv_offsets) {
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
  void exchange(tessera::host_stream, std::span<const tessera::transfer> sends,
                std::span<const tessera::transfer> receives) {
    device_->clear();
    std::vector<tessera::transfer> out(sends.begin(), sends.end());
    std::vector<tessera::transfer> in(receives.begin(), receives.end());
    for (tessera::transfer& t : out) t.data = device_->put(static_cast<const std::byte*>(t.data), t.bytes);
    for (tessera::transfer& t : in) t.data = device_->put(static_cast<const std::byte*>(t.data), t.bytes);
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

  Comm inner_;
  rank_memory* device_;
};

}  // namespace device_test
