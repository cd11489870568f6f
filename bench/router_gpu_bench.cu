// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The router, its backward, combine and permute on one GPU. A figure is the median over replays of a graph with many
// launches, divided by their number; "alone" is the median of single launches between two events. Logits stay in L2
// between launches where they fit. GB/s counts the bytes that must be moved, and the share is that of a
// device-to-device copy in the same run.
//
//   router_gpu_bench [--json FILE]

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/core/version.hpp>
#include <tessera/dispatch/dispatch.cuh>
#include <tessera/router/router.cuh>

namespace {

namespace ts = tessera;
namespace score = ts::score;
namespace select = ts::select;
namespace weigh = ts::weigh;
namespace balance = ts::balance;

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

template <class T>
class buffer {
 public:
  explicit buffer(std::size_t size) : size_(size) { require(cudaMalloc(&data_, size * sizeof(T)), "cudaMalloc"); }
  buffer(const buffer&) = delete;
  buffer& operator=(const buffer&) = delete;
  ~buffer() { cudaFree(data_); }
  T* data() const { return data_; }
  void zero() { require(cudaMemset(data_, 0, size_ * sizeof(T)), "cudaMemset"); }
  void set(const std::vector<T>& values) {
    require(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

// Normal numbers; made once and repeated, because gigabytes of them would take longer than the measurement.
template <class T>
void fill_normal(T* data, std::size_t count) {
  std::mt19937 random(7);
  std::normal_distribution<float> distribution;
  std::vector<T> values(std::min<std::size_t>(count, std::size_t{1} << 22));
  for (T& x : values) x = static_cast<T>(distribution(random));
  for (std::size_t at = 0; at < count; at += values.size()) {
    const std::size_t some = std::min(values.size(), count - at);
    require(cudaMemcpy(data + at, values.data(), some * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
}

struct figure {
  std::string name;
  double us, alone_us, bytes, gb_per_s, share;
};

class recorder {
 public:
  recorder() {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    require(cudaEventCreate(&begin_), "cudaEventCreate");
    require(cudaEventCreate(&end_), "cudaEventCreate");
  }
  cudaStream_t stream() const { return stream_; }

  template <class F>
  void measure(const std::string& name, double bytes, int launches, F&& work) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    work();
    require(cudaStreamSynchronize(stream_), name.c_str());
    require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    for (int i = 0; i < launches; ++i) work();
    require(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    require(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    const auto replay = [&] { require(cudaGraphLaunch(exec, stream_), "cudaGraphLaunch"); };
    for (int i = 0; i < 5; ++i) replay();
    const double us = median(25, replay) / launches;
    const double alone = median(100, work);
    require(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
    require(cudaGraphDestroy(graph), "cudaGraphDestroy");
    const double rate = bytes / us * 1e-3;
    if (copy_rate_ == 0) copy_rate_ = bytes / std::min(us, alone) * 1e-3;  // copies in a graph are slower
    figures_.push_back({name, us, alone, bytes, rate, rate / copy_rate_});
    std::printf("%-58s %9.2f %9.2f %9.0f %7.3f\n", name.c_str(), us, alone, rate, rate / copy_rate_);
    std::fflush(stdout);
  }

  void write(const char* path, const cudaDeviceProp& device) const {
    std::FILE* file = std::fopen(path, "w");
    if (file == nullptr) {
      std::perror(path);
      std::exit(1);
    }
    int clock_khz = 0;
    require(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0), "cudaDeviceGetAttribute");
    std::fprintf(file,
                 "{\"device\": \"%s\", \"clock_mhz\": %d, \"cuda\": %d, \"tessera\": %d,\n \"unit\": \"microseconds, "
                 "median\",\n \"figures\": [\n",
                 device.name, clock_khz / 1000, CUDART_VERSION, TESSERA_VERSION);
    for (std::size_t i = 0; i < figures_.size(); ++i) {
      const figure& f = figures_[i];
      std::fprintf(file,
                   "  {\"name\": \"%s\", \"us\": %.3f, \"alone_us\": %.3f, \"bytes\": %.0f, \"gb_per_s\": %.1f, "
                   "\"share_of_copy\": %.4f}%s\n",
                   f.name.c_str(), f.us, f.alone_us, f.bytes, f.gb_per_s, f.share, i + 1 < figures_.size() ? "," : "");
    }
    std::fprintf(file, "]}\n");
    std::fclose(file);
  }

 private:
  template <class F>
  double median(int count, F&& work) {
    std::vector<float> times;
    for (int i = 0; i < count; ++i) {
      require(cudaEventRecord(begin_, stream_), "cudaEventRecord");
      work();
      require(cudaEventRecord(end_, stream_), "cudaEventRecord");
      require(cudaEventSynchronize(end_), "cudaEventSynchronize");
      float ms = 0;
      require(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
      times.push_back(ms);
    }
    std::nth_element(times.begin(), times.begin() + count / 2, times.end());
    return 1e3 * static_cast<double>(times[static_cast<std::size_t>(count / 2)]);
  }

  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  double copy_rate_ = 0;
  std::vector<figure> figures_;
};

struct size {
  int tokens, experts, k;
};

std::string name_of(const char* what, const size& s) {
  return std::string(what) + "/T" + std::to_string(s.tokens) + "/E" + std::to_string(s.experts) + "/K" +
         std::to_string(s.k);
}

// Everything a router reads and writes.
struct routing_memory {
  size s;
  buffer<float> logits, bias, weights, pair_weights, dweights, dlogits, losses, coefficients;
  buffer<std::int32_t> ids, row_offsets, gather, row_of;
  buffer<std::int64_t> counts;
  buffer<std::uint32_t> barrier;
  buffer<std::uint8_t> block_counts;

  explicit routing_memory(const size& s_)
      : s(s_),
        logits(elements()),
        bias(static_cast<std::size_t>(s.experts)),
        weights(pairs()),
        pair_weights(pairs()),
        dweights(pairs()),
        dlogits(elements()),
        losses(8),
        coefficients(8),
        ids(pairs()),
        row_offsets(static_cast<std::size_t>(s.experts) + 1),
        gather(pairs()),
        row_of(pairs()),
        counts(static_cast<std::size_t>(s.experts) + 2),
        barrier(1),
        block_counts(static_cast<std::size_t>(ts::router_workspace::block_count_bytes(s.experts))) {
    fill_normal(logits.data(), elements());
    fill_normal(dweights.data(), pairs());
    bias.zero();
    barrier.zero();
    coefficients.set(std::vector<float>(8, 0.01f));
  }
  std::size_t elements() const { return static_cast<std::size_t>(s.tokens) * static_cast<std::size_t>(s.experts); }
  std::size_t pairs() const { return static_cast<std::size_t>(s.tokens) * static_cast<std::size_t>(s.k); }
  ts::router_inputs<float> inputs(bool with_bias) const {
    ts::router_inputs<float> in;
    in.logits = {logits.data(), s.tokens, s.experts};
    if (with_bias) in.bias = bias.data();
    return in;
  }
  ts::routing<float> out() const { return {{ids.data(), s.tokens, s.k}, {weights.data(), s.tokens, s.k}}; }
  ts::balance_counts local() const { return {counts.data(), s.experts}; }
  ts::router_lists<float> lists() const {
    return {row_offsets.data(), gather.data(), row_of.data(), pair_weights.data()};
  }
  ts::router_workspace workspace() const { return {barrier.data(), block_counts.data()}; }
};

template <class Router>
Router make_router(const size& s) {
  typename Router::options options;
  options.num_experts = s.experts;
  options.top_k = s.k;
  if constexpr (Router::select_type::by == ts::select_by::group) options.select = {.groups = 8, .kept_groups = 4};
  return Router(options);
}

template <class Router>
void measure_router(recorder& r, const char* name, const size& s) {
  const routing_memory m(s);
  const Router router = make_router<Router>(s);
  const double pairs = static_cast<double>(m.pairs());
  const double bytes = 4.0 * static_cast<double>(m.elements()) + pairs * (8 + 12);
  r.measure(name_of(name, s), bytes, 20, [&] {
    ts::route_sorted(r.stream(), router, m.inputs(Router::has_bias), m.out(), m.local(), m.lists(), m.workspace());
  });
}

template <class Router>
void measure_backward(recorder& r, const char* name, const size& s) {
  const routing_memory m(s);
  const Router router = make_router<Router>(s);
  router.route(ts::device_stream(r.stream()), m.inputs(false), m.out(), m.local());
  const double elements = static_cast<double>(m.elements());
  const ts::const_balance_counts counts(m.local());
  r.measure(name_of((std::string(name) + " backward").c_str(), s), 8 * elements + 8 * static_cast<double>(m.pairs()),
            20, [&] {
              router.backward(ts::device_stream(r.stream()), m.inputs(false), m.out(),
                              ts::matrix_view<const float>(m.dweights.data(), s.tokens, s.k), counts,
                              m.coefficients.data(), 1.0f,
                              ts::matrix_view<float>(m.dlogits.data(), s.tokens, s.experts));
            });
  if constexpr (Router::num_losses > 0) {
    buffer<float> token_losses(static_cast<std::size_t>(s.tokens) * Router::num_losses);
    r.measure(name_of((std::string(name) + " losses with scratch").c_str(), s), 4 * elements, 20, [&] {
      ts::route_losses(ts::device_stream(r.stream()), router, m.inputs(false), counts, m.coefficients.data(), 0,
                       ts::matrix_view<float>(m.losses.data(), 1, Router::num_losses), token_losses.data());
    });
    r.measure(name_of((std::string(name) + " losses").c_str(), s), 4 * elements, 20, [&] {
      router.losses(ts::device_stream(r.stream()), m.inputs(false), counts, m.coefficients.data(), 0,
                    ts::matrix_view<float>(m.losses.data(), 1, Router::num_losses));
    });
  }
}

template <class S>
void measure_rows(recorder& r, const char* type, const size& s, int hidden) {
  const routing_memory m(s);
  using router_type = ts::router<score::softmax, select::top_k, weigh::normalized>;
  const auto router = make_router<router_type>(s);
  ts::route_sorted(r.stream(), router, m.inputs(false), m.out(), m.local(), m.lists(), m.workspace());
  const std::size_t token_elements = static_cast<std::size_t>(s.tokens) * static_cast<std::size_t>(hidden);
  buffer<S> rows(token_elements * static_cast<std::size_t>(s.k)), x(token_elements);
  fill_normal(rows.data(), token_elements * static_cast<std::size_t>(s.k));
  fill_normal(x.data(), token_elements);
  const std::int64_t pairs = static_cast<std::int64_t>(m.pairs());
  const double bytes = static_cast<double>(token_elements * sizeof(S)) * (1 + s.k);
  const ts::matrix_view<const S> source(rows.data(), pairs, hidden);
  const ts::matrix_view<const float> weights(m.weights.data(), s.tokens, s.k);
  const auto name = [&](const char* what) {
    return name_of((std::string(what) + "<" + type + ">").c_str(), s) + "/d" + std::to_string(hidden);
  };
  r.measure(name("combine"), bytes, 4, [&] {
    ts::combine_rows(r.stream(), source, m.row_of.data(), weights, ts::combine_addends<S, float>{},
                     ts::matrix_view<S>(x.data(), s.tokens, hidden));
  });
  r.measure(name("combine unweighted"), bytes, 4, [&] {
    ts::combine_rows(r.stream(), source, m.row_of.data(), ts::matrix_view<const float>(nullptr, s.tokens, s.k),
                     ts::combine_addends<S, float>{}, ts::matrix_view<S>(x.data(), s.tokens, hidden));
  });
  r.measure(name("expand_rows"), bytes, 4, [&] {
    ts::expand_rows(r.stream(), ts::matrix_view<const S>(x.data(), s.tokens, hidden), m.row_of.data(), s.k,
                    ts::matrix_view<S>(rows.data(), pairs, hidden));
  });
  r.measure(name("permute"), bytes, 4, [&] {
    ts::permute(r.stream(), ts::matrix_view<const S>(x.data(), s.tokens, hidden), m.lists().rows(s.experts),
                ts::matrix_view<S>(rows.data(), pairs, hidden));
  });
}

}  // namespace

int main(int argc, char** argv) {
  const char* json = nullptr;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
      json = argv[++i];
    } else {
      std::fprintf(stderr, "usage: %s [--json FILE]\n", argv[0]);
      return 2;
    }
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  cudaDeviceProp device{};
  require(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  std::printf("%s, %d multiprocessors\n%-58s %9s %9s %9s %7s\n", device.name, device.multiProcessorCount, "case", "us",
              "alone", "GB/s", "share");

  recorder r;
  {
    constexpr std::size_t bytes = std::size_t{1} << 30;
    buffer<std::byte> from(bytes), to(bytes);
    fill_normal(reinterpret_cast<float*>(from.data()), bytes / sizeof(float));
    r.measure("copy 1 GiB", 2.0 * static_cast<double>(bytes), 4, [&] {
      require(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, r.stream()), "copy");
    });
  }
  using softmax = ts::router<score::softmax, select::top_k, weigh::normalized>;
  using sigmoid = ts::router<score::sigmoid, select::top_k, weigh::normalized, balance::bias>;
  using grouped = ts::router<score::sigmoid, select::group_limited<>, weigh::normalized, balance::bias>;
  using lossy = ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss, balance::z_loss>;
  for (const size& s : {size{8192, 256, 8}, size{8192, 128, 8}, size{32768, 256, 16}})
    measure_router<softmax>(r, "softmax", s);
  for (const size& s :
       {size{128, 256, 8}, size{8192, 256, 8}, size{32768, 256, 8}, size{8192, 512, 8}, size{8192, 1024, 32}}) {
    measure_router<sigmoid>(r, "sigmoid+bias", s);
  }
  measure_router<grouped>(r, "sigmoid+bias group-limited", {8192, 256, 8});
  measure_backward<softmax>(r, "softmax", {8192, 256, 8});
  measure_backward<lossy>(r, "softmax+switch+z", {8192, 256, 8});
  measure_rows<ts::bfloat16>(r, "bf16", {8192, 128, 8}, 2048);
  measure_rows<ts::bfloat16>(r, "bf16", {24576, 128, 8}, 1536);
  measure_rows<ts::bfloat16>(r, "bf16", {8192, 256, 8}, 7168);
  measure_rows<float>(r, "fp32", {8192, 128, 8}, 2048);
  if (json != nullptr) r.write(json, device);
  return 0;
}
