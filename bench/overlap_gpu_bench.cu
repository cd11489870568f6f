// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Two micro-batches of layers whose experts are spread over the GPUs of this machine: the forward of one under the
// backward of the other, as the overlapped pair of a pipeline's stage. A pair's time is the median of the slowest rank,
// from replays of a graph of two pairs in which the micro-batches change places. Beside it, of the same chunk: one
// stream, where nothing overlaps (`serial_us`), and its computing phases alone on all SMs (`compute_us`). Then
//
//     hidden = (serial - overlapped) / (serial - compute)      exposed = 1 - compute / overlapped
//
// Both orders of `make_overlap_order` are tried. Blocks have no attention: what comes before the experts is a copy. The
// layers of a chunk are one layer with its weights, called as often.

#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nccl.h>

#include <tessera/layout/block.hpp>
#include <tessera/moe/moe_layer.cuh>
#include <tessera/pipeline/moe_chunk.cuh>
#include <tessera/pipeline/overlap.cuh>

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

struct copying_mixer {
  void forward(ts::device_stream stream, const pl::work_item&, ts::matrix_view<const bfloat16> x,
               ts::matrix_view<bfloat16> h, ts::matrix_view<bfloat16> u) {
    const std::int64_t count = h.rows * h.cols / 8;
    copy_kernel<<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream.get()>>>(
        reinterpret_cast<const uint4*>(x.data), reinterpret_cast<uint4*>(h.data), reinterpret_cast<uint4*>(u.data),
        count);
    require(cudaGetLastError(), "copy_kernel");
  }
  void backward_input(ts::device_stream stream, const pl::work_item&, ts::matrix_view<const bfloat16>,
                      ts::matrix_view<const bfloat16> dh, ts::matrix_view<const bfloat16> du,
                      ts::matrix_view<bfloat16> dx) {
    const std::int64_t count = dx.rows * dx.cols / 8;
    add_kernel<<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream.get()>>>(
        reinterpret_cast<const uint4*>(dh.data), reinterpret_cast<const uint4*>(du.data),
        reinterpret_cast<uint4*>(dx.data), count);
    require(cudaGetLastError(), "add_kernel");
  }
  void backward_weights(ts::device_stream, const pl::work_item&, ts::matrix_view<const bfloat16>,
                        ts::matrix_view<const bfloat16>, ts::matrix_view<const bfloat16>) {}
};

using chunk = pl::moe_chunk<spread_layer, copying_mixer>;

// One rank's chunk with room for two micro-batches, and tokens.
struct chunk_case : rank_layer {
  chunk_case(ts::comm::symmetric& comm, const layer_shape& s, int num_layers)
      : rank_layer(comm, s),
        x(2 * s.T * s.d, static_cast<unsigned>(comm.rank()) + 11, 1),
        dy(2 * s.T * s.d, static_cast<unsigned>(comm.rank()) + 21, 1),
        y(2 * s.T * s.d),
        dx(2 * s.T * s.d),
        written(gradients()) {
    const pl::moe_block<spread_layer, copying_mixer> block{&mixer, &moe, weights(), {&written, 1}};
    const std::vector<pl::moe_block<spread_layer, copying_mixer>> blocks(static_cast<std::size_t>(num_layers), block);
    const auto all = chunk::sizes(blocks, s.T, s.d, 2);
    layers =
        std::make_unique<chunk>(blocks, s.T, s.d, 2, ts::saved_memory(comm.allocate(all.saved_bytes), all.saved_bytes),
                                ts::deferred_memory(comm.allocate(all.deferred_bytes), all.deferred_bytes),
                                ts::workspace_memory(comm.allocate(all.workspace_bytes), all.workspace_bytes));
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
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
  // The computing phases of `pair`, on what the last exchange has brought.
  void computing_phases(cudaStream_t stream, int slot) const {
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

enum class what { serial, compute, overlapped };

double pair_us(const layer_shape& s, int num_layers, what which, const pl::device_lanes_options& split = {},
               pl::overlap_style style = pl::overlap_style::attention) {
  using serial = pl::serial_lanes<ts::space::device>;
  return 0.5 * slowest_median_us(1, [&](ts::comm::symmetric& comm) {
           comm.set_num_sms(0);
           auto c = std::make_shared<chunk_case>(comm, s, num_layers);
           auto one_stream = std::make_shared<serial>();
           auto alone = std::make_shared<pl::overlap_stage<chunk, serial>>(*c->layers, *one_stream);
           const work before = [c, one_stream, alone, which](cudaStream_t stream) {
             for (const int slot : {0, 1}) c->forward(*alone, stream, slot);
             if (which != what::compute) return;
             // Products work on what a whole step has brought: their speed depends on the numbers.
             for (const int slot : {0, 1}) c->backward(*alone, stream, slot);
             for (const int slot : {0, 1}) c->forward(*alone, stream, slot);
           };
           if (which == what::compute) {
             return rank_work{before, [c](cudaStream_t stream) {
                                c->computing_phases(stream, 1);
                                c->computing_phases(stream, 0);
                              }};
           }
           if (which == what::serial) {
             return rank_work{before, [c, one_stream, alone](cudaStream_t stream) {
                                c->pair(*alone, stream, 1);
                                c->pair(*alone, stream, 0);
                              }};
           }
           auto lanes = std::make_shared<pl::device_lanes>(split);
           auto stage = std::make_shared<pl::overlap_stage<chunk, pl::device_lanes>>(*c->layers, *lanes, style);
           return rank_work{before, [c, lanes, stage](cudaStream_t stream) {
                              c->pair(*stage, stream, 1);
                              c->pair(*stage, stream, 0);
                            }};
         });
}

// What the overlapped pair is compared with, measured once in a run.
std::pair<double, double> without_overlap(const layer_shape& s, int num_layers) {
  static std::map<std::pair<std::string, int>, std::pair<double, double>> known;
  const auto key = std::make_pair(std::string(s.name), num_layers);
  if (!known.contains(key)) {
    const double serial = pair_us(s, num_layers, what::serial);
    known[key] = {serial, pair_us(s, num_layers, what::compute)};
  }
  return known[key];
}

void measure_pair(benchmark::State& state, const layer_shape& s, int num_layers, const pl::device_lanes_options& split,
                  pl::overlap_style style) {
  const auto [serial, compute] = without_overlap(s, num_layers);
  const double us = pair_us(s, num_layers, what::overlapped, split, style);
  const double unit = 2.0 * static_cast<double>(s.T) * s.K * static_cast<double>(s.n) * static_cast<double>(s.d);
  report_time(state, us, 9 * num_layers * unit);
  state.counters["serial_us"] = serial;
  state.counters["compute_us"] = compute;
  state.counters["hidden"] = (serial - us) / (serial - compute);
  state.counters["exposed"] = 1 - compute / us;
}

}  // namespace

int main(int argc, char** argv) {
  // Streams of a pair have hardware queues of their own, and kernels are there before GPUs wait for each other.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess) gpus = 1;
  for (const layer_shape& s : {layer_shape{"Qwen3_30B_T8192", 8192, 2048, 768, 128, 8},
                               layer_shape{"DeepSeek_V3_64_experts_a_GPU_T4096", 4096, 7168, 2048, 64 * gpus, 8}}) {
    for (const int num_layers : {1, 4}) {
      for (const auto& [name, style] :
           {std::pair{"figure_4", pl::overlap_style::attention}, std::pair{"weights", pl::overlap_style::weights}}) {
        for (const int sms : {0, 8, 16, 24, 32}) {
          for (const int head_start_us : {0, 10}) {
            if (sms == 0 && head_start_us > 0) continue;
            add_case(std::string("pair/") + s.name + "/layers:" + std::to_string(num_layers) + "/" + name +
                         "/sms:" + std::to_string(sms) + (head_start_us > 0 ? "/head_start" : ""),
                     [=, order = style](benchmark::State& state) {
                       measure_pair(state, s, num_layers, {sms, std::chrono::microseconds(head_start_us)}, order);
                     });
          }
        }
      }
    }
  }
  return run_on_gpu(argc, argv);
}
