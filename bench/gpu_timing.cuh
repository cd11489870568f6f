// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the GPU benchmarks share: device arrays of N(0, 1), medians of events, the dense product that figures are
// compared with, and what the run says of the device.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
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

  void fill(std::uint32_t seed, float scale = 1) const {
    fill_kernel<<<1024, 256>>>(data_, count_, seed, scale);
    require(cudaGetLastError(), "fill_kernel");
  }
  T* data() const { return data_; }
  std::int64_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  std::int64_t count_;
};

// Median time of `call(stream)` in microseconds, from events around replays of its graph, after a warm-up: engines
// replay graphs, and the time of launches from the host is not in the figure. `before` runs ahead of each, untimed.
inline double median_us(const std::function<void(cudaStream_t)>& call, double guess_us,
                        const std::function<void(cudaStream_t)>& before = {}) {
  cudaStream_t stream;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  require(cudaDeviceSynchronize(), "what ran before the measurement");
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  call(stream);
  require(cudaStreamEndCapture(stream, &graph), "the end of the capture");
  require(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  const int repeats = std::clamp(static_cast<int>(60e3 / std::max(guess_us, 20.0)), 9, 101);
  std::vector<cudaEvent_t> events(2 * static_cast<std::size_t>(repeats));
  for (cudaEvent_t& event : events) require(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < std::max(repeats / 3, 3); ++i) {
    if (before) before(stream);
    require(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
  }
  for (std::size_t i = 0; i < events.size(); i += 2) {
    if (before) before(stream);
    require(cudaEventRecord(events[i], stream), "cudaEventRecord");
    require(cudaGraphLaunch(replay, stream), "cudaGraphLaunch");
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
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[static_cast<std::size_t>(repeats) / 2];
}

// cuBLAS' dense bf16 product of 8192^3 in TFLOPS, measured once in a run; 0 without cuBLAS.
inline double dense_tflops() {
#if defined(TESSERA_BENCH_CUBLAS)
  static const double measured = [] {
    constexpr int size = 8192;
    constexpr double flops = 2.0 * size * size * size;
    const device_array<tessera::bfloat16> a(std::int64_t{size} * size, 8, 1), b(std::int64_t{size} * size, 9, 1),
        c(std::int64_t{size} * size);
    const device_array<char> workspace(64 << 20);
    cublasHandle_t handle;
    if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS) return 0.0;
    cublasSetWorkspace(handle, workspace.data(), 64 << 20);
    const double us = median_us(
        [&](cudaStream_t stream) {
          const float one = 1, zero = 0;
          cublasSetStream(handle, stream);
          cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, size, size, size, &one, b.data(), CUDA_R_16BF, size, a.data(),
                       CUDA_R_16BF, size, &zero, c.data(), CUDA_R_16BF, size, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        },
        1500);
    cublasDestroy(handle);
    return flops / us * 1e-6;
  }();
  return measured;
#else
  return 0;
#endif
}

// One measurement: its time, and floating-point operations as TFLOPS and as a share of the dense product.
inline void report_time(benchmark::State& state, double us, double flops) {
  state.SetIterationTime(us * 1e-6);
  state.counters["us"] = us;
  if (flops <= 0) return;
  state.counters["tflops"] = flops / us * 1e-6;
  if (dense_tflops() > 0) state.counters["of_dense"] = flops / us * 1e-6 / dense_tflops();
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
