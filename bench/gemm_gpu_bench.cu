// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Grouped products on one sm_90a GPU: alone, and in the six roles that they have in a layer. Times are medians of CUDA
// events after a warm-up, on N(0, 1) data and random routing. With cuBLAS at hand (compile with -lcublas), its dense
// 8192^3 product and a loop of its products over the experts run beside them.
//
//   gemm_gpu_bench [--json FILE] [--only TEXT] [--sweep] [--sms COUNT]

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>
#if __has_include(<cublas_v2.h>)
#include <cublas_v2.h>
#define TESSERA_BENCH_CUBLAS 1
#endif

#include <tessera/experts/activation.hpp>
#include <tessera/gemm/hopper.cuh>

namespace {

namespace ts = tessera;
namespace hp = ts::gemm::hopper;
using hp::contiguous;
using hp::gathered;
using swiglu = ts::activation::swiglu;
using ts::bfloat16;

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// N(0, 1), from a counter: the values of element i are the same in every run.
__global__ void fill_kernel(bfloat16* data, std::int64_t count, std::uint32_t seed) {
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
    data[i] = bfloat16(sqrtf(-2.0f * logf(u)) * cospif(v));
  }
}

template <class T>
struct device_array {
  T* data = nullptr;
  explicit device_array(std::int64_t count) {
    require(cudaMalloc(&data, static_cast<std::size_t>(count) * sizeof(T)), "cudaMalloc");
  }
  ~device_array() { cudaFree(data); }
  device_array(const device_array&) = delete;
  device_array& operator=(const device_array&) = delete;
};

struct random_array : device_array<bfloat16> {
  std::int64_t count;
  explicit random_array(std::int64_t elements, std::uint32_t seed = 1) : device_array(elements), count(elements) {
    fill(seed);
  }
  void fill(std::uint32_t seed) const {
    fill_kernel<<<1024, 256>>>(data, count, seed);
    require(cudaGetLastError(), "fill_kernel");
  }
};

struct options {
  std::string json, only;
  bool sweep = false;
  int sms = 0;
};

struct result {
  std::string name, kernel;
  double us, tflops;
};

// Median time of a call in microseconds.
template <class F>
double median_us(F&& call, double flops) {
  const double guess_us = std::max(flops / 500e6, 20.0);
  const int repeats = std::clamp(static_cast<int>(60e3 / guess_us), 7, 101);
  std::vector<cudaEvent_t> events(static_cast<std::size_t>(repeats) + 1);
  for (cudaEvent_t& event : events) require(cudaEventCreate(&event), "cudaEventCreate");
  for (int i = 0; i < std::max(repeats / 2, 3); ++i) call();
  for (int i = 0; i < repeats; ++i) {
    require(cudaEventRecord(events[static_cast<std::size_t>(i)]), "cudaEventRecord");
    call();
  }
  require(cudaEventRecord(events.back()), "cudaEventRecord");
  require(cudaDeviceSynchronize(), "the measured call");
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    float ms = 0;
    require(cudaEventElapsedTime(&ms, events[static_cast<std::size_t>(i)], events[static_cast<std::size_t>(i) + 1]),
            "cudaEventElapsedTime");
    times.push_back(1e3 * static_cast<double>(ms));
  }
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[static_cast<std::size_t>(repeats) / 2];
}

class report {
 public:
  explicit report(const options& o) : options_(o) {}

  template <class F>
  double add(const std::string& name, const std::string& kernel, double flops, F&& call) {
    if (name.find(options_.only) == std::string::npos) return 0;
    const double us = median_us(call, flops);
    results_.push_back({name, kernel, us, flops / us * 1e-6});
    std::printf("%-34s %-38s %9.1f us %7.1f TFLOPS", name.c_str(), kernel.c_str(), us, results_.back().tflops);
    if (dense_ > 0) std::printf("  %.3f of dense", results_.back().tflops / dense_);
    std::printf("\n");
    std::fflush(stdout);
    return results_.back().tflops;
  }
  void set_dense(double tflops) { dense_ = tflops; }

  void write_json() const {
    if (options_.json.empty()) return;
    std::FILE* file = std::fopen(options_.json.c_str(), "w");
    if (file == nullptr) {
      std::printf("cannot write %s\n", options_.json.c_str());
      std::exit(1);
    }
    cudaDeviceProp properties{};
    require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    std::fprintf(file, "{\"device\": \"%s\", \"cuda\": %d, \"dense_tflops\": %.1f, \"results\": [\n", properties.name,
                 CUDART_VERSION, dense_);
    for (std::size_t i = 0; i < results_.size(); ++i)
      std::fprintf(file, "  {\"name\": \"%s\", \"kernel\": \"%s\", \"us\": %.2f, \"tflops\": %.2f}%s\n",
                   results_[i].name.c_str(), results_[i].kernel.c_str(), results_[i].us, results_[i].tflops,
                   i + 1 == results_.size() ? "" : ",");
    std::fprintf(file, "]}\n");
    std::fclose(file);
  }

 private:
  options options_;
  std::vector<result> results_;
  double dense_ = 0;
};

// Rows sorted by expert, of tokens that choose K distinct experts at random, or as evenly as it goes.
struct routing {
  std::vector<std::int32_t> offsets, list;
  device_array<std::int32_t> device_offsets, device_list;

  routing(std::int64_t T, int E, int K, bool even) : device_offsets(E + 1), device_list(T * K) {
    std::vector<std::vector<std::int32_t>> tokens(static_cast<std::size_t>(E));
    std::mt19937 random(5);
    std::vector<int> experts(static_cast<std::size_t>(E));
    for (int e = 0; e < E; ++e) experts[static_cast<std::size_t>(e)] = e;
    for (std::int64_t t = 0; t < T; ++t)
      for (int k = 0; k < K; ++k) {
        if (even) {
          tokens[static_cast<std::size_t>((t * K + k) % E)].push_back(static_cast<std::int32_t>(t));
        } else {
          std::swap(experts[static_cast<std::size_t>(k)],
                    experts[static_cast<std::size_t>(k) + random() % static_cast<unsigned>(E - k)]);
          tokens[static_cast<std::size_t>(experts[static_cast<std::size_t>(k)])].push_back(
              static_cast<std::int32_t>(t));
        }
      }
    offsets.push_back(0);
    for (const auto& of_expert : tokens) {
      list.insert(list.end(), of_expert.begin(), of_expert.end());
      offsets.push_back(static_cast<std::int32_t>(list.size()));
    }
    require(cudaMemcpy(device_offsets.data, offsets.data(), offsets.size() * 4, cudaMemcpyHostToDevice), "upload");
    require(cudaMemcpy(device_list.data, list.data(), list.size() * 4, cudaMemcpyHostToDevice), "upload");
  }
  hp::row_groups groups() const {
    return {device_offsets.data, static_cast<std::int64_t>(offsets.size()) - 1, static_cast<std::int64_t>(list.size())};
  }
};

// Runs `call(launch_options)` with the chosen kernel, and with every other one on request.
template <class F>
double measure(report& r, const options& o, const std::string& name, const hp::problem& p, double flops, F&& call) {
  hp::launch_options launch;
  launch.sm_budget = o.sms;
  hp::problem bounded = p;
  if (o.sms > 0) bounded.num_multiprocessors = o.sms;
  const hp::config chosen = hp::choose(bounded);
  const device_array<std::int32_t> counter(2);
  require(cudaMemset(counter.data, 0, 8), "cudaMemset");
  launch.tile_counter = counter.data;
  const double best = r.add(name, hp::to_string(chosen), flops, [&] { call(launch); });
  if (!o.sweep) return best;
  launch.tile_counter = nullptr;
  r.add(name, "same, static order", flops, [&] { call(launch); });
  for (const hp::config& kernel :
       {hp::config{hp::schedule::cooperative, 128, 256, 1, 0}, hp::config{hp::schedule::cooperative, 128, 256, 2, 0},
        hp::config{hp::schedule::ping_pong, 128, 128, 1, 0}}) {
    hp::config other = kernel;
    other.grid = bounded.num_multiprocessors / other.cluster * other.cluster;
    if (other == chosen) continue;
    launch.forced = &other;
    launch.tile_counter = counter.data;
    try {
      r.add(name, hp::to_string(other), flops, [&] { call(launch); });
    } catch (const ts::invalid_argument&) {  // there is no such kernel for this product
    }
  }
  return best;
}

void bench_alone(report& r, const options& o, const hp::device& d, int E, std::int64_t rows, std::int64_t N,
                 std::int64_t K, bool even, [[maybe_unused]] void* cublas) {
  const std::string name = "alone E" + std::to_string(E) + " Te" + std::to_string(rows / E) + " N" + std::to_string(N) +
                           " K" + std::to_string(K) + (even ? " even" : " random");
  if (name.find(o.only) == std::string::npos) return;
  const routing routed(rows, E, 1, even);
  const random_array a(rows * K), b(E * N * K);
  const device_array<bfloat16> c(rows * N);
  hp::problem p;
  p.max_rows = rows, p.num_groups = E, p.n = N, p.k = K, p.b_along_k = true;
  const double flops = 2.0 * static_cast<double>(rows) * static_cast<double>(N) * static_cast<double>(K);
  measure(r, o, name, p, flops, [&](const hp::launch_options& launch) {
    hp::variable_m<contiguous::k, gathered::none>(
        cudaStreamLegacy, d, routed.groups(), N, K, {a.data, K, nullptr}, {b.data, N * K, K, 1}, nullptr,
        ts::matrix_view<bfloat16>(c.data, rows, N), ts::write::overwrite, launch);
  });
#if defined(TESSERA_BENCH_CUBLAS)
  r.add(name, "cuBLAS, one call per expert", flops, [&] {
    const float one = 1, zero = 0;
    for (std::size_t e = 0; e < static_cast<std::size_t>(E); ++e) {
      const std::int64_t first = routed.offsets[e], count = routed.offsets[e + 1] - first;
      if (count > 0)
        cublasGemmEx(static_cast<cublasHandle_t>(cublas), CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(N),
                     static_cast<int>(count), static_cast<int>(K), &one, b.data + static_cast<std::int64_t>(e) * N * K,
                     CUDA_R_16BF, static_cast<int>(K), a.data + first * K, CUDA_R_16BF, static_cast<int>(K), &zero,
                     c.data + first * N, CUDA_R_16BF, static_cast<int>(N), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    }
  });
#endif
}

struct layer_size {
  const char* name;
  std::int64_t T, d, n;
  int E, K;
};

void bench_layer(report& r, const options& o, const hp::device& device, const layer_size& s) {
  if (std::string(s.name).find(o.only) == std::string::npos && o.only.find(s.name) == std::string::npos) return;
  const routing routed(s.T, s.E, s.K, false);
  const hp::row_groups groups = routed.groups();
  const std::int64_t P = s.T * s.K, d = s.d, n = s.n, U = 2 * n;
  const random_array x(s.T * d, 2), dy(s.T * d, 3), w1(s.E * U * d, 4), w2(s.E * d * n, 5), h(P * U, 6), act(P * n, 7);
  const device_array<bfloat16> y(P * d), dw(s.E * U * d);
  const device_array<float> weights(P), parts(hp::num_weight_parts(n) * P);
  require(cudaMemset(weights.data, 0x3f, static_cast<std::size_t>(P) * 4), "cudaMemset");  // 0.747
  const double unit = 2.0 * static_cast<double>(P) * static_cast<double>(d) * static_cast<double>(n);
  hp::problem p;
  p.max_rows = P, p.num_groups = s.E;
  const ts::gemm::row_operand<bfloat16> tokens{x.data, d, routed.device_list.data},
      gradients{dy.data, d, routed.device_list.data}, hidden{h.data, U, nullptr}, activation{act.data, n, nullptr};
  const auto problem = [&](std::int64_t N, std::int64_t K, hp::epilogue_kind kind, bool b_along_k) {
    hp::problem q = p;
    q.n = N, q.k = K, q.epilogue = kind, q.b_along_k = b_along_k;
    return q;
  };
  const auto sums = [&](std::int64_t M, std::int64_t N) {
    hp::problem q = p;
    q.variable_k = true, q.m = M, q.n = N;
    return q;
  };
  const std::string prefix = std::string(s.name) + ' ';
  double us = 0;
  const auto add = [&](const char* role, const hp::problem& q, double flops, auto&& call) {
    h.fill(6), act.fill(7);  // what earlier roles left there is not N(0, 1)
    const double tflops = measure(r, o, prefix + role, q, flops, call);
    if (tflops > 0) us += flops / tflops * 1e-6;
  };
  add("up", problem(U, d, hp::epilogue_kind::activation, true), 2 * unit, [&](const hp::launch_options& launch) {
    hp::variable_m_activation<contiguous::k, gathered::a, swiglu, false>(cudaStreamLegacy, device, groups, n, d, tokens,
                                                                         {w1.data, U * d, d, 1}, nullptr,
                                                                         {h.data, P, U}, {act.data, P, n}, {}, launch);
  });
  add("down", problem(d, n, hp::epilogue_kind::store, true), unit, [&](const hp::launch_options& launch) {
    hp::variable_m<contiguous::k, gathered::none>(
        cudaStreamLegacy, device, groups, d, n, activation, {w2.data, d * n, n, 1}, nullptr,
        ts::matrix_view<bfloat16>(y.data, P, d), ts::write::overwrite, launch);
  });
  std::printf("%-34s %47.1f us %7.1f TFLOPS\n", (prefix + "forward products").c_str(), us, 3 * unit / us * 1e-6);
  us = 0;
  add("dH", problem(n, d, hp::epilogue_kind::activation_backward, false), unit, [&](const hp::launch_options& launch) {
    hp::variable_m_activation_backward<contiguous::mn, gathered::a, swiglu, false>(
        cudaStreamLegacy, device, groups, n, d, gradients, {w2.data, d * n, 1, n}, weights.data, {h.data, P, U},
        {act.data, P, n}, parts.data, {}, launch);
  });
  add("dX", problem(d, U, hp::epilogue_kind::store, false), 2 * unit, [&](const hp::launch_options& launch) {
    hp::variable_m<contiguous::mn, gathered::none>(
        cudaStreamLegacy, device, groups, d, U, hidden, {w1.data, U * d, 1, d}, nullptr,
        ts::matrix_view<bfloat16>(y.data, P, d), ts::write::overwrite, launch);
  });
  add("dW1", sums(U, d), 2 * unit, [&](const hp::launch_options& launch) {
    hp::variable_k<gathered::b>(cudaStreamLegacy, device, groups, U, d, hidden, tokens,
                                ts::gemm::group_operand<bfloat16>{dw.data, U * d, d, 1}, ts::write::overwrite, launch);
  });
  add("dW2", sums(d, n), unit, [&](const hp::launch_options& launch) {
    hp::variable_k<gathered::a>(cudaStreamLegacy, device, groups, d, n, gradients, activation,
                                ts::gemm::group_operand<bfloat16>{dw.data, d * n, n, 1}, ts::write::overwrite, launch);
  });
  std::printf("%-34s %47.1f us %7.1f TFLOPS\n", (prefix + "backward products").c_str(), us, 6 * unit / us * 1e-6);
}

}  // namespace

int main(int argc, char** argv) {
  options o;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--sweep")
      o.sweep = true;
    else if (argument == "--json" && i + 1 < argc)
      o.json = argv[++i];
    else if (argument == "--only" && i + 1 < argc)
      o.only = argv[++i];
    else if (argument == "--sms" && i + 1 < argc)
      o.sms = std::atoi(argv[++i]);
    else {
      std::printf("usage: %s [--json FILE] [--only TEXT] [--sweep] [--sms COUNT]\n", argv[0]);
      return 2;
    }
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  try {
    const hp::device d = hp::device::current();
    report r(o);
    void* cublas = nullptr;
#if defined(TESSERA_BENCH_CUBLAS)
    cublasHandle_t handle;
    if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS) {
      std::printf("cublasCreate failed\n");
      return 1;
    }
    cublas = handle;
    {
      constexpr int size = 8192;
      const random_array a(std::int64_t{size} * size, 8), b(std::int64_t{size} * size, 9);
      const device_array<bfloat16> c(std::int64_t{size} * size);
      options all = o;
      all.only.clear();
      report dense(all);
      r.set_dense(dense.add("dense 8192^3", "cuBLAS", 2.0 * size * size * size, [&] {
        const float one = 1, zero = 0;
        cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, size, size, size, &one, b.data, CUDA_R_16BF, size, a.data,
                     CUDA_R_16BF, size, &zero, c.data, CUDA_R_16BF, size, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
      }));
    }
#endif
    bench_alone(r, o, d, 1, 8192, 8192, 8192, true, cublas);
    bench_alone(r, o, d, 8, 16384, 4096, 4096, true, cublas);
    bench_alone(r, o, d, 16, 16384, 4096, 4096, true, cublas);
    bench_alone(r, o, d, 16, 16384, 4096, 4096, false, cublas);
    for (const layer_size& s :
         {layer_size{"7B-n256", 24576, 1536, 256, 128, 8}, layer_size{"30B-n256", 32768, 4096, 256, 256, 16},
          layer_size{"30B-n512", 32768, 4096, 512, 128, 8}, layer_size{"30B-n1024", 32768, 4096, 1024, 64, 4},
          layer_size{"120B-n1024", 32768, 4096, 1024, 128, 8}, layer_size{"Qwen3-T8192", 8192, 2048, 768, 128, 8},
          layer_size{"Qwen3-T32768", 32768, 2048, 768, 128, 8}, layer_size{"Mixtral", 8192, 4096, 14336, 8, 2}})
      bench_layer(r, o, d, s);
    r.write_json();
  } catch (const ts::error& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return 0;
}
