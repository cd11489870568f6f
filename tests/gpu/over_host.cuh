// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A communicator of device memory for tests: messages go through the host, over one of host memory. So any number of
// ranks can be tried on one GPU, and on several hosts that are none.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/threads.hpp>
#include <tessera/core/stream.hpp>

#include "device_fixture.cuh"

namespace device_test {

/// One rank. Calls return when they are done.
class over_host {
 public:
  using space = tessera::space::device;
  explicit over_host(tessera::comm::threads inner) : inner_(std::move(inner)), words_(make_words()) {}

  int rank() const { return inner_.rank(); }
  int size() const { return inner_.size(); }
  over_host split(int color, int key) { return over_host(inner_.split(color, key)); }
  void wait(tessera::device_stream stream) { require(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize"); }
  std::span<std::int32_t> host_words() const { return {words_.get(), num_words}; }
  /// Bytes that this rank has sent to others by `all_to_all_v`.
  std::int64_t bytes_sent() const { return bytes_sent_; }

  void barrier(tessera::device_stream stream) {
    wait(stream);
    inner_.barrier({});
  }
  template <class T>
  void broadcast(tessera::device_stream stream, T* data, std::int64_t count, int root) {
    std::vector<T> host = bring(stream, data, count);
    inner_.broadcast({}, host.data(), count, root);
    put(stream, data, host);
  }
  template <class T>
  void all_reduce(tessera::device_stream stream, const T* send, T* recv, std::int64_t count,
                  tessera::reduce_op op = tessera::reduce_op::sum) {
    std::vector<T> host = bring(stream, send, count);
    inner_.all_reduce({}, host.data(), host.data(), count, op);
    put(stream, recv, host);
  }
  template <class T>
  void all_gather(tessera::device_stream stream, const T* send, T* recv, std::int64_t count) {
    const std::vector<T> own = bring(stream, send, count);
    std::vector<T> all(static_cast<std::size_t>(size() * count));
    inner_.all_gather({}, own.data(), all.data(), count);
    put(stream, recv, all);
  }
  template <class T>
  void reduce_scatter(tessera::device_stream stream, const T* send, T* recv, std::int64_t count,
                      tessera::reduce_op op = tessera::reduce_op::sum) {
    const std::vector<T> all = bring(stream, send, size() * count);
    std::vector<T> own(static_cast<std::size_t>(count));
    inner_.reduce_scatter({}, all.data(), own.data(), count, op);
    put(stream, recv, own);
  }
  template <class T>
  void all_to_all_v(tessera::device_stream stream, const T* send, const std::int64_t* send_counts,
                    const std::int64_t* send_offsets, T* recv, const std::int64_t* recv_counts,
                    const std::int64_t* recv_offsets) {
    // Every message has memory of its own, so that nothing but what was received is written.
    std::vector<std::vector<T>> out, in;
    std::vector<tessera::transfer> sends, receives;
    for (int r = 0; r < size(); ++r) {
      out.push_back(bring(stream, send + send_offsets[r], send_counts[r]));
      in.emplace_back(static_cast<std::size_t>(recv_counts[r]));
      sends.push_back(tessera::send_to(r, out.back().data(), send_counts[r]));
      receives.push_back(tessera::receive_from(r, in.back().data(), recv_counts[r]));
      if (r != rank()) bytes_sent_ += send_counts[r] * static_cast<std::int64_t>(sizeof(T));
    }
    inner_.exchange({}, sends, receives);
    for (int r = 0; r < size(); ++r) put(stream, recv + recv_offsets[r], in[static_cast<std::size_t>(r)]);
  }
  void exchange(tessera::device_stream, std::span<const tessera::transfer>, std::span<const tessera::transfer>) {
    throw std::logic_error("over_host: no test asks for it");
  }

 private:
  static constexpr std::size_t num_words = 4096;
  static std::shared_ptr<std::int32_t> make_words() {
    std::int32_t* words = nullptr;
    require(cudaMallocHost(&words, num_words * sizeof(*words)), "cudaMallocHost");
    std::fill_n(words, num_words, 0);
    return {words, [](std::int32_t* p) { cudaFreeHost(p); }};
  }
  template <class T>
  static std::vector<T> bring(tessera::device_stream stream, const T* from, std::int64_t count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    copy(stream, values.data(), from, values.size() * sizeof(T), cudaMemcpyDeviceToHost);
    return values;
  }
  template <class T>
  static void put(tessera::device_stream stream, T* to, const std::vector<T>& values) {
    copy(stream, to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  }
  static void copy(tessera::device_stream stream, void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    require(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
    require(cudaMemcpyAsync(to, from, bytes, kind, stream.get()), "cudaMemcpyAsync");
    require(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  }

  tessera::comm::threads inner_;
  std::shared_ptr<std::int32_t> words_;
  std::int64_t bytes_sent_ = 0;
};

static_assert(tessera::device_communicator<over_host>);

}  // namespace device_test
