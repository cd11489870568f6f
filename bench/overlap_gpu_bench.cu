// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Two micro-batches of layers whose experts are spread over the GPUs of this machine: the forward of one under the
// backward of the other, as the overlapped pair of a pipeline's stage. A pair's time is the median of the slowest rank,
// from replays of a graph of two pairs in which the micro-batches change places. Beside it, of the same chunk: one
// stream, where nothing overlaps (`serial_us`), and its computing phases alone on all SMs (`compute_us`). Then
//
//     ratio = compute / (serial - compute)
//     hidden = (serial - overlapped) / (serial - compute)      exposed = 1 - compute / overlapped
//
// One stream is that of transport::all_to_all whatever the pair's transport is, because it is the fastest there. All of
// a combine counts as communication, the sums of expert rows too, which one GPU would have to make as well, so that
// `hidden` cannot be 1: they read 2 T K d bytes, and no computation hides what they take of the SMs. `with_sums_us` is
// the time of the computing phases with what one GPU does instead of a combine, `combine_rows` of T tokens with K rows
// each, behind each of the two products that a combine follows; `hidden_beside_sums` has it in the place of
// `compute_us`.
//
// Pairs differ in transport, order of `make_overlap_order` and options of `device_lanes`. Blocks have no attention:
// what comes before the experts is a copy, and in the shapes that are called so products of attention's projections,
// which count as computation and not in the flops. The layers of a chunk are one layer with its weights, called as
// often.
//
// `halves/...`: the forwards, or the whole backwards, of the two halves of a batch's tokens at once, each half in a
// chunk of its own over the same layers, and beside them the whole batch on one stream (`serial_us`).
//
// `phases/...` are pairs with an event around each phase. Counters are means over the layers of the time from when a
// phase may begin to its end, on rank 0, in microseconds; all begins and ends go to standard error. An option of its
// own, --all, adds these cases and more arrangements.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <nccl.h>

#include <tessera/layout/block.hpp>
#include <tessera/moe/moe_layer.cuh>
#include <tessera/pipeline/moe_chunk.cuh>
#include <tessera/pipeline/overlap.cuh>

#include "lanes_with_events.cuh"
#include "rank_layer.cuh"
#include "rank_timing.cuh"

namespace {

namespace ts = tessera;
namespace pl = tessera::pipeline;
using namespace tessera_bench;
using ts::bfloat16;

// h = u = x and dx = dh + du, eight numbers a thread.
__global__ void __launch_bounds__(256) copy_kernel(const uint4* x, uint4* h, uint4* u, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) h[i] = u[i] = x[i];
}
__global__ void __launch_bounds__(256) add_kernel(const uint4* dh, const uint4* du, uint4* dx, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  struct alignas(16) eight {
    bfloat16 value[8];
  };
  const uint4 a = dh[i], b = du[i];
  const auto& from_h = reinterpret_cast<const eight&>(a);
  const auto& from_u = reinterpret_cast<const eight&>(b);
  eight sum;
  for (int j = 0; j < 8; ++j)
    sum.value[j] = bfloat16(static_cast<float>(from_h.value[j]) + static_cast<float>(from_u.value[j]));
  dx[i] = reinterpret_cast<const uint4&>(sum);
}

#if defined(TESSERA_BENCH_CUBLAS)
// What attention's projections would take: products of [T, d] with [d, w] and back, once for each of its phases. Nobody
// reads their results.
class projections {
 public:
  explicit projections(const layer_shape& s)
      : shape_(s),
        weight_(s.projected * s.d, 61, 1 / std::sqrt(static_cast<float>(s.d))),
        narrow_(s.T * s.projected),
        wide_(s.T * s.d),
        gradient_(s.projected * s.d) {
    // Kernels are loaded when they first run, which waits for the device: not while it waits for another one.
    there_and_back(cudaStreamLegacy, wide_.data());
    of_weights(cudaStreamLegacy, wide_.data());
    require(cudaDeviceSynchronize(), "attention's projections");
  }

  void there_and_back(cudaStream_t stream, const bfloat16* x) const {
    const int T = static_cast<int>(shape_.T), d = static_cast<int>(shape_.d), w = static_cast<int>(shape_.projected);
    cublas_.multiply(stream, T, w, d, x, weight_.data(), narrow_.data());
    cublas_.multiply(stream, T, d, w, narrow_.data(), weight_.data(), wide_.data());
  }
  void of_weights(cudaStream_t stream, const bfloat16* x) const {
    const int T = static_cast<int>(shape_.T), d = static_cast<int>(shape_.d), w = static_cast<int>(shape_.projected);
    for (int i = 0; i < 2; ++i) cublas_.multiply(stream, w, d, T, narrow_.data(), x, gradient_.data());
  }

 private:
  layer_shape shape_;
  device_array<bfloat16> weight_, narrow_, wide_, gradient_;
  cublas_products cublas_;
};
#else
struct projections {
  explicit projections(const layer_shape&) {}
  void there_and_back(cudaStream_t, const bfloat16*) const {}
  void of_weights(cudaStream_t, const bfloat16*) const {}
};
#endif

// What comes before the experts: a copy, and perhaps projections.
struct copying_mixer {
  std::unique_ptr<projections> attention;

  void forward(ts::device_stream stream, const pl::work_item&, ts::matrix_view<const bfloat16> x,
               ts::matrix_view<bfloat16> h, ts::matrix_view<bfloat16> u) {
    const std::int64_t count = h.rows * h.cols / 8;
    copy_kernel<<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream.get()>>>(
        reinterpret_cast<const uint4*>(x.data), reinterpret_cast<uint4*>(h.data), reinterpret_cast<uint4*>(u.data),
        count);
    require(cudaGetLastError(), "copy_kernel");
    if (attention) attention->there_and_back(stream.get(), x.data);
  }
  void backward_input(ts::device_stream stream, const pl::work_item&, ts::matrix_view<const bfloat16>,
                      ts::matrix_view<const bfloat16> dh, ts::matrix_view<const bfloat16> du,
                      ts::matrix_view<bfloat16> dx) {
    const std::int64_t count = dx.rows * dx.cols / 8;
    add_kernel<<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream.get()>>>(
        reinterpret_cast<const uint4*>(dh.data), reinterpret_cast<const uint4*>(du.data),
        reinterpret_cast<uint4*>(dx.data), count);
    require(cudaGetLastError(), "add_kernel");
    if (attention) attention->there_and_back(stream.get(), dh.data);
  }
  void backward_weights(ts::device_stream stream, const pl::work_item&, ts::matrix_view<const bfloat16>,
                        ts::matrix_view<const bfloat16> dh, ts::matrix_view<const bfloat16>) {
    if (attention) attention->of_weights(stream.get(), dh.data);
  }
};

using chunk = pl::moe_chunk<spread_layer, copying_mixer>;

// What one GPU does instead of a combine: sums of K rows for each token, from rows that lie as products leave them.
struct local_sums {
  explicit local_sums(const layer_shape& s) : shape(s), rows(s.T * s.K * s.d, 51, 1), places(s.T * s.K) {
    std::vector<std::int32_t> all;
    for (std::int64_t t = 0; t < s.T; ++t) {
      for (std::int64_t k = 0; k < s.K; ++k) all.push_back(static_cast<std::int32_t>(k * s.T + t));
    }
    places.set(all);
  }
  void enqueue(cudaStream_t stream, ts::matrix_view<bfloat16> y) const {
    ts::combine_rows(stream, ts::matrix_view<const bfloat16>{rows.data(), shape.T * shape.K, shape.d}, places.data(),
                     ts::matrix_view<const float>{nullptr, shape.T, shape.K}, ts::matrix_view<const bfloat16>{}, y);
  }

  layer_shape shape;
  device_array<bfloat16> rows;
  device_array<std::int32_t> places;
};

// One rank's chunk with room for two micro-batches, and tokens.
struct chunk_case : rank_layer {
  chunk_case(ts::comm::symmetric& comm, const layer_shape& s, int num_layers, const ts::transport::automatic& how)
      : rank_layer(comm, s, options_of(how)),
        x(2 * s.T * s.d, static_cast<unsigned>(comm.rank()) + 11, 1),
        dy(2 * s.T * s.d, static_cast<unsigned>(comm.rank()) + 21, 1),
        y(2 * s.T * s.d),
        dx(2 * s.T * s.d),
        written(gradients()) {
    if (s.projected > 0) mixer.attention = std::make_unique<projections>(s);
    layers = make_chunk(comm, s, num_layers);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  std::unique_ptr<chunk> make_chunk(ts::comm::symmetric& comm, const layer_shape& s, int num_layers) {
    const pl::moe_block<spread_layer, copying_mixer> block{&mixer, &moe, weights(), {&written, 1}};
    const std::vector<pl::moe_block<spread_layer, copying_mixer>> blocks(static_cast<std::size_t>(num_layers), block);
    const auto all = chunk::sizes(blocks, s.T, s.d, 2);
    return std::make_unique<chunk>(blocks, s.T, s.d, 2,
                                   ts::saved_memory(comm.allocate(all.saved_bytes), all.saved_bytes),
                                   ts::deferred_memory(comm.allocate(all.deferred_bytes), all.deferred_bytes),
                                   ts::workspace_memory(comm.allocate(all.workspace_bytes), all.workspace_bytes));
  }
  static spread_layer::options options_of(const ts::transport::automatic& how) {
    spread_layer::options options;
    options.transport = how;
    return options;
  }
  pl::work_item item(int slot) const { return {.micro_batch = slot, .rows = tokens, .slot = slot}; }
  template <class T>
  ts::matrix_view<T> view(const device_array<std::remove_const_t<T>>& all, int slot) const {
    return {all.data() + slot * tokens * sizes.hidden, tokens, sizes.hidden};
  }

  template <class Lanes>
  void forward(pl::overlap_stage<chunk, Lanes>& stage, cudaStream_t stream, int slot) const {
    stage.forward(stream, item(slot), view<const bfloat16>(x, slot), view<bfloat16>(y, slot));
  }
  template <class Lanes>
  void backward(pl::overlap_stage<chunk, Lanes>& stage, cudaStream_t stream, int slot) const {
    stage.backward_input(stream, item(slot), view<const bfloat16>(x, slot), view<const bfloat16>(dy, slot),
                         view<bfloat16>(dx, slot));
    stage.backward_weights(stream, item(slot), view<const bfloat16>(x, slot), view<const bfloat16>(dy, slot));
  }
  // Forward of `slot` and backward of the other.
  template <class Lanes>
  void pair(pl::overlap_stage<chunk, Lanes>& stage, cudaStream_t stream, int slot) const {
    const int other = 1 - slot;
    stage.overlapped(stream, item(slot), view<const bfloat16>(x, slot), view<bfloat16>(y, slot), stage, item(other),
                     view<const bfloat16>(x, other), view<const bfloat16>(dy, other), view<bfloat16>(dx, other));
  }
  // Both slots, the second through another chunk, one way.
  template <class Lanes>
  void halves(pl::overlap_stage<chunk, Lanes>& stage, pl::overlap_stage<chunk, Lanes>& other, cudaStream_t stream,
              bool is_backward) const {
    if (is_backward) {
      stage.two_backwards(stream, item(0), view<const bfloat16>(x, 0), view<const bfloat16>(dy, 0),
                          view<bfloat16>(dx, 0), other, item(1), view<const bfloat16>(x, 1),
                          view<const bfloat16>(dy, 1), view<bfloat16>(dx, 1));
    } else {
      stage.two_forwards(stream, item(0), view<const bfloat16>(x, 0), view<bfloat16>(y, 0), other, item(1),
                         view<const bfloat16>(x, 1), view<bfloat16>(y, 1));
    }
  }
  // The computing phases of `pair`, on what the last exchange has brought. @param sums Null: without.
  void computing_phases(cudaStream_t stream, int slot, const local_sums* sums) const {
    using pl::phase;
    const int other = 1 - slot;
    chunk::forward_type f{item(slot), view<const bfloat16>(x, slot), view<bfloat16>(y, slot), 0, {stream, 0}};
    chunk::backward_type b{
        item(other), view<const bfloat16>(x, other), view<const bfloat16>(dy, other), view<bfloat16>(dx, other), 0,
        {stream, 0}};
    const int count = layers->num_layers();
    for (const pl::overlap_node& node : pl::make_overlap_order(count, count).nodes) {
      f.layer = b.layer = node.layer;
      if (node.what == phase::forward_attention) layers->forward_attention(f);
      if (node.what == phase::forward_mlp) layers->forward_mlp(f);
      if (node.what == phase::backward_mlp_input) layers->backward_mlp_input(b);
      if (sums != nullptr && node.what == phase::forward_mlp) sums->enqueue(stream, view<bfloat16>(y, slot));
      if (sums != nullptr && node.what == phase::backward_mlp_input) sums->enqueue(stream, view<bfloat16>(dx, other));
      if (node.what == phase::backward_mlp_weights) layers->backward_mlp_weights(b);
      if (node.what == phase::backward_attention_input) layers->backward_attention_input(b);
      if (node.what == phase::backward_attention_weights) layers->backward_attention_weights(b);
    }
  }

  device_array<bfloat16> x, dy, y, dx;
  spread_layer::gradients written;
  copying_mixer mixer;
  std::unique_ptr<chunk> layers;
};

// How a pair runs.
struct arrangement {
  const char* transport;
  pl::overlap_style style = pl::overlap_style::weights;
  pl::device_lanes_options lanes = {};

  ts::transport::automatic how() const {
    using namespace ts::transport;
    if (std::string(transport) == "copy_engines") return copy_engines{};
    if (std::string(transport) == "one_chunk") return copy_engines{.chunks = 1};
    if (std::string(transport) == "copies_there") return {copy_engines{}, all_to_all{}};
    return all_to_all{};
  }
  std::string name() const {
    return std::string(transport) + (style == pl::overlap_style::weights ? "/weights" : "/figure_4") +
           "/sms:" + std::to_string(lanes.communication_sms) + (lanes.head_start.count() > 0 ? "" : "/bounded");
  }
};
constexpr arrangement one_stream{"all_to_all"};

using serial = pl::serial_lanes<ts::space::device>;

// What is timed: two pairs in which micro-batches change places, or their computing phases.
enum class what { pair, compute, compute_and_sums };

// @param after Called with a rank and the lanes when all has run. @param options Of the lanes.
template <class Lanes, class After, class... Options>
double pair_us(const layer_shape& s, int num_layers, const arrangement& a, what which, After after,
               const Options&... options) {
  return 0.5 * slowest_median_us(1, [&](ts::comm::symmetric& comm) {
           comm.set_num_sms(0);
           auto c = std::make_shared<chunk_case>(comm, s, num_layers, a.how());
           auto one = std::make_shared<serial>();
           auto alone = std::make_shared<pl::overlap_stage<chunk, serial>>(*c->layers, *one);
           const work before = [c, one, alone, which](cudaStream_t stream) {
             for (const int slot : {0, 1}) c->forward(*alone, stream, slot);
             if (which == what::pair) return;
             // Products work on what a whole step has brought: their speed depends on the numbers.
             for (const int slot : {0, 1}) c->backward(*alone, stream, slot);
             for (const int slot : {0, 1}) c->forward(*alone, stream, slot);
           };
           if (which != what::pair) {
             const auto sums = which == what::compute_and_sums ? std::make_shared<local_sums>(s) : nullptr;
             return rank_work{before, [c, sums](cudaStream_t stream) {
                                for (const int slot : {1, 0}) c->computing_phases(stream, slot, sums.get());
                              }};
           }
           auto lanes = std::make_shared<Lanes>(options...);
           auto stage = std::make_shared<pl::overlap_stage<chunk, Lanes>>(*c->layers, *lanes, a.style);
           return rank_work{before,
                            [c, lanes, stage](cudaStream_t stream) {
                              for (const int slot : {1, 0}) c->pair(*stage, stream, slot);
                            },
                            true, [lanes, rank = comm.rank(), after] { after(rank, *lanes); }};
         });
}

// What the overlapped pair is compared with, measured once in a run.
struct bounds {
  double serial_us, compute_us, with_sums_us;
};
bounds without_overlap(const layer_shape& s, int num_layers) {
  static std::map<std::pair<std::string, int>, bounds> known;
  const auto key = std::make_pair(std::string(s.name), num_layers);
  const auto time = [&](what which) {
    return pair_us<serial>(s, num_layers, one_stream, which, [](int, const auto&) {});
  };
  if (!known.contains(key)) {
    known[key] = {time(what::pair), time(what::compute), time(what::compute_and_sums)};
  }
  return known[key];
}

void measure_pair(benchmark::State& state, const layer_shape& s, int num_layers, const arrangement& a) {
  const bounds b = without_overlap(s, num_layers);
  const double us = pair_us<pl::device_lanes>(
      s, num_layers, a, what::pair, [](int, const auto&) {}, a.lanes);
  const double unit = 2.0 * static_cast<double>(s.T) * s.K * static_cast<double>(s.n) * static_cast<double>(s.d);
  report_time(state, us, 9 * num_layers * unit);
  state.counters["serial_us"] = b.serial_us;
  state.counters["compute_us"] = b.compute_us;
  state.counters["with_sums_us"] = b.with_sums_us;
  state.counters["ratio"] = b.compute_us / (b.serial_us - b.compute_us);
  state.counters["hidden"] = (b.serial_us - us) / (b.serial_us - b.compute_us);
  state.counters["hidden_beside_sums"] = (b.serial_us - us) / (b.serial_us - b.with_sums_us);
  state.counters["exposed"] = 1 - b.compute_us / us;
}

// One batch of `s.T` tokens, whole on one stream or as halves by lanes.
double one_way_us(layer_shape s, int num_layers, const arrangement& a, bool is_backward, bool in_halves) {
  if (in_halves) s.T /= 2;
  return slowest_median_us(1, [&](ts::comm::symmetric& comm) {
    comm.set_num_sms(0);
    auto c = std::make_shared<chunk_case>(comm, s, num_layers, a.how());
    auto one = std::make_shared<serial>();
    auto alone = std::make_shared<pl::overlap_stage<chunk, serial>>(*c->layers, *one);
    if (!in_halves) {
      const work whole = [c, one, alone](cudaStream_t stream) { c->forward(*alone, stream, 0); };
      if (!is_backward) return rank_work{{}, whole};
      return rank_work{whole, [c, one, alone](cudaStream_t stream) { c->backward(*alone, stream, 0); }};
    }
    std::shared_ptr<chunk> other = c->make_chunk(comm, s, num_layers);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    auto lanes = std::make_shared<pl::device_lanes>(a.lanes);
    auto stage = std::make_shared<pl::overlap_stage<chunk, pl::device_lanes>>(*c->layers, *lanes);
    auto partner = std::make_shared<pl::overlap_stage<chunk, pl::device_lanes>>(*other, *lanes);
    const auto run = [c, other, lanes, stage, partner](bool back) {
      // stages refer to chunks and lanes, which are kept with them
      return
          [c, other, lanes, stage, partner, back](cudaStream_t stream) { c->halves(*stage, *partner, stream, back); };
    };
    if (!is_backward) return rank_work{{}, run(false), true};
    return rank_work{run(false), run(true), true};
  });
}

void measure_halves(benchmark::State& state, const layer_shape& s, int num_layers, const arrangement& a,
                    bool is_backward) {
  const double us = one_way_us(s, num_layers, a, is_backward, true);
  const double unit = 2.0 * static_cast<double>(s.T) * s.K * static_cast<double>(s.n) * static_cast<double>(s.d);
  report_time(state, us, (is_backward ? 6 : 3) * num_layers * unit);
  state.counters["serial_us"] = one_way_us(s, num_layers, one_stream, is_backward, false);
}

template <class Lanes, class... Options>
void measure_phases(benchmark::State& state, const layer_shape& s, int num_layers, const arrangement& a,
                    const std::string& name, const Options&... options) {
  using lanes_type = lanes_with_events<Lanes>;
  std::vector<typename lanes_type::span> spans;
  const double us = pair_us<lanes_type>(
      s, num_layers, a, what::pair,
      [&](int rank, const lanes_type& lanes) {
        if (rank == 0) spans = lanes.spans();
      },
      options...);
  report_time(state, us, 0);
  std::fprintf(stderr, "%s: begin and end of each phase in us\n", name.c_str());
  for (const auto& span : spans) {
    const bool communicates = pl::is_communication(span.node.what);
    const std::string phase = pl::symbol_of(span.node.what);
    std::fprintf(stderr, "%s%-12s %d %9.1f %9.1f  %8.1f\n",
                 communicates ? "                                      " : "", phase.c_str(), span.node.layer,
                 span.begin_us, span.end_us, span.end_us - span.begin_us);
    state.counters[phase] += (span.end_us - span.begin_us) / num_layers;
    state.counters[communicates ? "communication_us" : "computation_us"] += span.end_us - span.begin_us;
  }
}

// The arrangements that are tried: of each kind one, or all.
std::vector<arrangement> arrangements(bool all_of_them) {
  using enum pl::overlap_style;
  std::vector<arrangement> all;
  for (const char* transport : {"all_to_all", "copies_there", "copy_engines"})
    all.push_back({transport, weights, {.communication_sms = 24}});
  const auto add = [&](const char* transport, int sms) {
    all.push_back({transport, weights, {.communication_sms = sms}});
  };
  const auto add_bounded = [&](int sms) {
    all.push_back({"all_to_all", weights, {.communication_sms = sms, .head_start = std::chrono::nanoseconds(0)}});
  };
  add("all_to_all", 40);
  add_bounded(32);
  if (!all_of_them) return all;
  for (const int sms : {8, 16, 32, 48}) {
    for (const char* transport : {"all_to_all", "copies_there", "copy_engines"}) add(transport, sms);
  }
  for (const char* transport : {"copies_there", "copy_engines"}) add(transport, 40);
  for (const int sms : {16, 24, 40, 48}) add_bounded(sms);
  for (const int sms : {24, 32}) all.push_back({"all_to_all", attention, {.communication_sms = sms}});
  // Sums wait for the end of a product and have all SMs then.
  all.push_back({"one_chunk", weights, {}});
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  // Streams of a pair have hardware queues of their own, and kernels are there before GPUs wait for each other.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  const auto is_all = [](const char* argument) { return std::strcmp(argument, "--all") == 0; };
  const bool all = std::any_of(argv + 1, argv + argc, is_all);
  argc = static_cast<int>(std::remove_if(argv + 1, argv + argc, is_all) - argv);
  const int gpus = std::max(gpu_ranks::count(), 1);
  // Of the last ones computation takes about as long as communication: the first between two GPUs, the others with K or
  // n that make it so between two or four.
  const std::pair<layer_shape, int> chunks[] = {
      {{"Qwen3_30B_T8192", 8192, 2048, 768, 128, 8}, 4},
      {{"DeepSeek_V3_64_experts_a_GPU_T4096", 4096, 7168, 2048, 64 * gpus, 8}, 2},
      {{"even_n64", 4096, 7168, 64, 16 * gpus, 8}, 4},
      {{"even_n128", 4096, 7168, 128, 16 * gpus, 8}, 4},
      {{"even_n256_K2", 4096, 7168, 256, 8 * gpus, 2}, 4},
      {{"projected_w512_n64", 4096, 7168, 64, 16 * gpus, 8, 512}, 4},
      {{"projected_w512_n64_K2", 4096, 7168, 64, 8 * gpus, 2, 512}, 4},
      {{"projected_w1024_Qwen3_30B_T8192", 8192, 2048, 768, 128, 8, 1024}, 4}};
  for (const auto& [shape, layers] : chunks) {
    const layer_shape s = shape;
    const int num_layers = layers;
#if !defined(TESSERA_BENCH_CUBLAS)
    if (s.projected > 0) continue;
#endif
    const std::string chunk_name = std::string(s.name) + "/layers:" + std::to_string(num_layers) + "/";
    for (const arrangement& a : arrangements(all)) {
      add_case("pair/" + chunk_name + a.name(),
               [=](benchmark::State& state) { measure_pair(state, s, num_layers, a); });
      if (!all) continue;
      const std::string name = "phases/" + chunk_name + a.name();
      add_case(name, [=](benchmark::State& state) {
        measure_phases<pl::device_lanes>(state, s, num_layers, a, name, a.lanes);
      });
    }
    for (const int sms : {16, 32}) {
      const arrangement halves{"all_to_all", pl::overlap_style::weights, {.communication_sms = sms}};
      for (const bool is_backward : {false, true}) {
        add_case("halves/" + chunk_name + "sms:" + std::to_string(sms) + (is_backward ? "/backward" : "/forward"),
                 [=](benchmark::State& state) { measure_halves(state, s, num_layers, halves, is_backward); });
      }
    }
    if (!all) continue;
    const std::string name = "phases/" + chunk_name + "one_stream";
    add_case(name, [=](benchmark::State& state) { measure_phases<serial>(state, s, num_layers, one_stream, name); });
  }
  return run_on_ranks(argc, argv);
}
