// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Device memory for tests, reasons to skip them, and the main function of a doctest program that needs a GPU: define
// DOCTEST_CONFIG_IMPLEMENT before including it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <doctest/doctest.h>

namespace device_test {

/// What CTest reports as skipped.
inline constexpr int skip_return_code = 77;

/// Says why nothing can be tested here, if there is a reason. @return whether there is one.
inline bool skips(const std::string& reason) {
  if (!reason.empty()) std::printf("skipped: %s\n", reason.c_str());
  return !reason.empty();
}

/// A reason to skip: there is no GPU. "" if there is one.
inline std::string no_device() {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found == cudaSuccess && devices > 0) return "";
  return std::string("no CUDA device (") + (found == cudaSuccess ? "none found" : cudaGetErrorString(found)) + ")";
}

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));  // a rank's thread may not exit
}

inline void synchronize() { require(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

/// Waits for the default stream. Streams of `make_stream` do not, and setting memory returns before it is set, as does
/// a copy out of pageable memory: without this a kernel on such a stream may come first.
inline void finish_default_stream() { require(cudaStreamSynchronize(cudaStream_t{}), "cudaStreamSynchronize"); }

/// Device memory, filled with bytes that are no plausible result (NaN as float, a large negative number as integer).
/// What is written has been written when a call returns, for every stream.
template <class T>
class buffer {
 public:
  buffer() = default;
  explicit buffer(std::size_t size) : size_(size) {
    if (size > 0) require(cudaMalloc(&data_, size * sizeof(T)), "cudaMalloc");
    fill(0xff);
  }
  explicit buffer(const std::vector<T>& values) : buffer(values.size()) { set(values); }
  buffer(buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  buffer& operator=(buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~buffer() { cudaFree(data_); }

  void fill(int byte) {
    if (size_ == 0) return;
    require(cudaMemset(data_, byte, size_ * sizeof(T)), "cudaMemset");
    finish_default_stream();
  }
  void set(const std::vector<T>& values) {
    if (size_ == 0) return;
    require(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "copy");
    finish_default_stream();
  }
  std::vector<T> get() const {
    std::vector<T> values(size_);
    if (size_ > 0) require(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return values;
  }
  T* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

inline std::vector<float> normal(std::size_t count, unsigned seed, double deviation = 1.0) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution(0.0, deviation);
  std::vector<float> values(count);
  for (float& x : values) x = static_cast<float>(distribution(generator));
  return values;
}

/// |a - b| / |b| in the 2-norm; infinite where something is not finite.
template <class A, class B>
double relative_error(const std::vector<A>& a, const std::vector<B>& b) {
  if (a.size() != b.size()) return HUGE_VAL;
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(a[i]);
    const double y = static_cast<double>(b[i]);
    if (!std::isfinite(x)) return HUGE_VAL;
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

inline cudaStream_t make_stream() {
  cudaStream_t stream = nullptr;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}

/// What `work` enqueues on the stream, as a graph.
template <class F>
cudaGraphExec_t capture(cudaStream_t stream, F&& work) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  work();
  require(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  require(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  require(cudaGraphDestroy(graph), "cudaGraphDestroy");
  return exec;
}

}  // namespace device_test

#if defined(DOCTEST_CONFIG_IMPLEMENT)
int main(int argc, char** argv) {
  if (device_test::skips(device_test::no_device())) return device_test::skip_return_code;
  cudaDeviceProp properties{};
  device_test::require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  if (properties.major < 8) {
    std::printf("skipped: compute capability %d.%d, 8.0 is needed\n", properties.major, properties.minor);
    return device_test::skip_return_code;
  }
  return doctest::Context(argc, argv).run();
}
#endif
