// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the GPU benchmarks share: device arrays of N(0, 1), medians of events, the dense product and the copy that
// figures are compared with, and what the run says of the device.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include <cuda_runtime.h>
#if __has_include(<cublas_v2.h>)
#include <cublas_v2.h>
#define TESSERA_BENCH_CUBLAS 1
#endif

#include <tessera/core/dtype.hpp>

#include "context.hpp"

namespace tessera_bench {

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// N(0, scale^2), from a counter: the values of element i are the same in every run.
template <class T>
__global__ void fill_kernel(T* data, std::int64_t count, std::uint32_t seed, float scale) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    std::uint32_t h[2];
    for (std::uint32_t j = 0; j < 2; ++j) {
      std::uint64_t x = static_cast<std::uint64_t>(2 * i + j) * 0x9e3779b97f4a7c15ull + seed;
      x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9ull;
      x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
      h[j] = static_cast<std::uint32_t>(x >> 32);
    }
    const float u = (static_cast<float>(h[0]) + 1.0f) * 0x1p-32f, v = static_cast<float>(h[1]) * 0x1p-31f;
    data[i] = static_cast<T>(scale * sqrtf(-2.0f * logf(u)) * cospif(v));
  }
}

// Device memory that the owner of the object frees.
template <class T>
class device_array {
 public:
  explicit device_array(std::int64_t count) : count_(count) {
    require(cudaMalloc(&data_, static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(T)), "cudaMalloc");
  }
  device_array(std::int64_t count, std::uint32_t seed, float scale) : device_array(count) { fill(seed, scale); }
  ~device_array() { cudaFree(data_); }
  device_array(const device_array&) = delete;
  device_array& operator=(const device_array&) = delete;

  void fill(std::uint32_t seed, float scale = 1, cudaStream_t stream = cudaStreamLegacy) const {
    fill_kernel<<<1024, 256, 0, stream>>>(data_, count_, seed, scale);
    require(cudaGetLastError(), "fill_kernel");
  }
  void set(const std::vector<T>& values) const {
    require(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void set_bytes(int byte) const {
    require(cudaMemset(data_, byte, static_cast<std::size_t>(count_) * sizeof(T)), "cudaMemset");
  }
  T* data() const { return data_; }
  std::int64_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  std::int64_t count_;
};

// Median time of `launch()` on the stream in microseconds, from events around it, after a warm-up. `before` runs ahead
// of each, untimed.
template <class F>
double median_of_events(cudaStream_t stream, double guess_us, F&& launch,
                        const std::function<void(cudaStream_t)>& before) {
  const int repeats = std::clamp(static_cast<int>(60e3 / std::max(guess_us, 20.0)), 9, 101);
  std::vector<cudaEvent_t> events(2 * static_cast<std::size_t>(repeats));
  for (cudaEvent_t& event : events) require(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < std::max(repeats / 3, 3); ++i) {
    if (before) before(stream);
    launch();
  }
  for (std::size_t i = 0; i < events.size(); i += 2) {
    if (before) before(stream);
    require(cudaEventRecord(events[i], stream), "cudaEventRecord");
    launch();
    require(cudaEventRecord(events[i + 1], stream), "cudaEventRecord");
  }
  require(cudaStreamSynchronize(stream), "the measured call");
  std::vector<double> times;
  for (std::size_t i = 0; i < events.size(); i += 2) {
    float ms = 0;
    require(cudaEventElapsedTime(&ms, events[i], events[i + 1]), "cudaEventElapsedTime");
    times.push_back(1e3 * static_cast<double>(ms));
  }
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[static_cast<std::size_t>(repeats) / 2];
}

inline cudaStream_t make_stream() {
  cudaStream_t stream;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  require(cudaDeviceSynchronize(), "what ran before the measurement");
  return stream;
}

// Median time of `call(stream)` in microseconds, as replays of its graph: engines replay graphs, and the time of
// launches from the host is not in the figure.
inline double median_us(const std::function<void(cudaStream_t)>& call, double guess_us,
                        const std::function<void(cudaStream_t)>& before = {}) {
  const cudaStream_t stream = make_stream();
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  call(stream);
  require(cudaStreamEndCapture(stream, &graph), "the end of the capture");
  require(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  const double us = median_of_events(
      stream, guess_us, [&] { require(cudaGraphLaunch(replay, stream), "cudaGraphLaunch"); }, before);
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return us;
}

// Median time of `call(stream)` in microseconds, enqueued by the host on an idle stream.
inline double median_alone_us(const std::function<void(cudaStream_t)>& call, double guess_us) {
  const cudaStream_t stream = make_stream();
  const double us = median_of_events(
      stream, guess_us, [&] { call(stream); },
      [](cudaStream_t busy) { require(cudaStreamSynchronize(busy), "the measured call"); });
  cudaStreamDestroy(stream);
  return us;
}

#if defined(TESSERA_BENCH_CUBLAS)
// `c [rows, columns] = a [rows, depth] b^T, b [columns, depth]`, all packed, by cuBLAS.
class cublas_products {
 public:
  cublas_products() : workspace_(64 << 20) {
    if (cublasCreate(&handle_) != CUBLAS_STATUS_SUCCESS) handle_ = nullptr;
    if (handle_ != nullptr) cublasSetWorkspace(handle_, workspace_.data(), 64 << 20);
  }
  ~cublas_products() {
    if (handle_ != nullptr) cublasDestroy(handle_);
  }
  cublas_products(const cublas_products&) = delete;
  cublas_products& operator=(const cublas_products&) = delete;

  explicit operator bool() const { return handle_ != nullptr; }
  void multiply(cudaStream_t stream, std::int64_t rows, std::int64_t columns, std::int64_t depth,
                const tessera::bfloat16* a, const tessera::bfloat16* b, tessera::bfloat16* c) const {
    const float one = 1, zero = 0;
    const int m = static_cast<int>(columns), n = static_cast<int>(rows), k = static_cast<int>(depth);
    cublasSetStream(handle_, stream);
    cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, m, n, k, &one, b, CUDA_R_16BF, k, a, CUDA_R_16BF, k, &zero, c,
                 CUDA_R_16BF, m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  }

 private:
  device_array<char> workspace_;
  cublasHandle_t handle_ = nullptr;
};
#endif

// cuBLAS' dense bf16 product of 8192^3 in TFLOPS, measured once in a run; 0 without cuBLAS.
inline double dense_tflops() {
#if defined(TESSERA_BENCH_CUBLAS)
  static const double measured = [] {
    constexpr std::int64_t size = 8192;
    constexpr double flops = 2.0 * size * size * size;
    const device_array<tessera::bfloat16> a(size * size, 8, 1), b(size * size, 9, 1), c(size * size);
    const cublas_products cublas;
    if (!cublas) return 0.0;
    const double us = median_us(
        [&](cudaStream_t stream) { cublas.multiply(stream, size, size, size, a.data(), b.data(), c.data()); }, 1500);
    return flops / us * 1e-6;
  }();
  return measured;
#else
  return 0;
#endif
}

// Bytes read and written by a copy of 1 GiB on the device in GB/s, measured once in a run.
inline double copy_gbs() {
  static const double measured = [] {
    constexpr std::int64_t bytes = std::int64_t{1} << 30;
    const device_array<float> from(bytes / 4, 8, 1), to(bytes / 4);
    const auto copy = [&](cudaStream_t stream) {
      require(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
    };
    // Copies in a graph are slower.
    return 2.0 * bytes / std::min(median_us(copy, 700), median_alone_us(copy, 700)) * 1e-3;
  }();
  return measured;
}

// One measurement: its time, and floating-point operations as TFLOPS and as a share of the dense product.
inline void report_time(benchmark::State& state, double us, double flops) {
  state.SetIterationTime(us * 1e-6);
  state.counters["us"] = us;
  if (flops <= 0) return;
  state.counters["tflops"] = flops / us * 1e-6;
  if (dense_tflops() > 0) state.counters["of_dense"] = flops / us * 1e-6 / dense_tflops();
}

// Bytes that a measurement had to move, as GB/s and as a share of a copy's.
inline void report_bytes(benchmark::State& state, double us, double bytes) {
  state.counters["gb_per_s"] = bytes / us * 1e-3;
  state.counters["share_of_copy"] = bytes / us * 1e-3 / copy_gbs();
}

// Registers a case that measures itself once: `measure(state)` calls `report_time` and sets counters.
template <class F>
void add_case(const std::string& name, F measure) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [measure](benchmark::State& state) {
                                 for (auto step : state) {
                                   static_cast<void>(step);
                                   measure(state);
                                 }
                               })
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMicrosecond);
}

// Sets the context and runs what the command line asks for; 77 without a GPU, but cases can be listed without one.
inline int run_on_gpu(int argc, char** argv) {
  bool lists = false;
  for (int i = 1; i < argc; ++i) lists = lists || std::string(argv[i]).rfind("--benchmark_list_tests", 0) == 0;
  int devices = 0;
  if (!lists) {
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      std::printf("skipped: no CUDA device\n");
      return 77;
    }
    cudaDeviceProp properties{};
    require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    int sm_khz = 0, memory_khz = 0, runtime = 0, driver = 0;
    cudaDeviceGetAttribute(&sm_khz, cudaDevAttrClockRate, 0);
    cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, 0);
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    benchmark::AddCustomContext("device", properties.name);
    benchmark::AddCustomContext("most_sm_mhz", std::to_string(sm_khz / 1000));
    benchmark::AddCustomContext("memory_mhz", std::to_string(memory_khz / 1000));
    benchmark::AddCustomContext("cuda_runtime", std::to_string(runtime));
    benchmark::AddCustomContext("cuda_driver", std::to_string(driver));
    benchmark::AddCustomContext("dense_8192_tflops", std::to_string(dense_tflops()));
  }
  return run(argc, argv);
}

}  // namespace tessera_bench
