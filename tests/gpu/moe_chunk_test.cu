// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A chunk of layers in device memory against the same layers called one by one: the same bits, alone and as an
// overlapped pair on two streams. Without a GPU it says so and exits with 77, which CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include "device_fixture.cuh"

#include <cstring>
#include <memory>
#include <vector>

#include <tessera/layout/layout.hpp>
#include <tessera/moe/moe_layer.cuh>
#include <tessera/pipeline/moe_chunk.cuh>
#include <tessera/pipeline/overlap.cuh>

namespace {

namespace ts = tessera;
namespace pl = tessera::pipeline;
using device_test::buffer;
using S = ts::bfloat16;
using layer_type = ts::moe_layer<ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized>,
                                 ts::experts<ts::activation::swiglu, ts::precision::bf16>, ts::layout::block,
                                 ts::comm::self<ts::space::device>>;

constexpr ts::shape sizes{.num_experts = 8, .top_k = 2, .hidden = 128, .intermediate = 64, .max_tokens = 200};
constexpr std::int64_t d = 128, n = 64, max_rows = 200;
constexpr std::int64_t rows_of[] = {200, 77};  // of two micro-batches

// to = a x + b y, rounded; y may be null.
__global__ void scale_kernel(const S* x, float a, const S* y, float b, S* to, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float sum = a * static_cast<float>(x[i]);
  to[i] = S(y == nullptr ? sum : sum + b * static_cast<float>(y[i]));
}

void scale(ts::device_stream stream, const S* x, float a, const S* y, float b, S* to, std::int64_t count) {
  scale_kernel<<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream.get()>>>(x, a, y, b, to, count);
  device_test::require(cudaGetLastError(), "scale_kernel");
}

// h = x, u = x / 2; or h = -x where there are no experts.
struct half_mixer {
  void forward(ts::device_stream stream, const pl::work_item& item, ts::matrix_view<const S> x, ts::matrix_view<S> h,
               ts::matrix_view<S> u) {
    scale(stream, x.data, u.cols == 0 ? -1.0f : 1.0f, nullptr, 0, h.data, item.rows * d);
    if (u.cols > 0) scale(stream, x.data, 0.5f, nullptr, 0, u.data, item.rows * d);
  }
  void backward_input(ts::device_stream stream, const pl::work_item& item, ts::matrix_view<const S>,
                      ts::matrix_view<const S> dh, ts::matrix_view<const S> du, ts::matrix_view<S> dx) {
    scale(stream, dh.data, du.cols == 0 ? -1.0f : 1.0f, du.data, 0.5f, dx.data, item.rows * d);
  }
  void backward_weights(ts::device_stream, const pl::work_item&, ts::matrix_view<const S>, ts::matrix_view<const S>,
                        ts::matrix_view<const S>) {}
};

using chunk_type = pl::moe_chunk<layer_type, half_mixer>;
using serial = pl::serial_lanes<ts::space::device>;

std::vector<S> rounded(const std::vector<float>& values) {
  std::vector<S> result;
  for (const float x : values) result.push_back(S(x));
  return result;
}

// A layer with parameters that depend on a number alone.
struct one_layer {
  explicit one_layer(unsigned seed)
      : bytes(layer_type::sizes(sizes, placement, 0)),
        state(bytes.state_bytes),
        gate(device_test::normal(8 * d, seed, 0.2)),
        up(rounded(device_test::normal(8 * 2 * n * d, seed + 1, 0.1))),
        down(rounded(device_test::normal(8 * d * n, seed + 2, 0.1))),
        gate_gradient(gate.size()),
        up_gradient(up.size()),
        down_gradient(down.size()),
        layer(sizes, {}, placement, comm, ts::state_memory(state.data(), state.size())) {
    const cudaStream_t stream = device_test::make_stream();
    layer.reset_state(stream);
    device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }
  layer_type::weights weights() const {
    return {.gate = {gate.data(), 8, d}, .experts = {.up = up.data(), .down = down.data()}};
  }
  layer_type::gradients gradients() const {
    return {.gate = gate_gradient.data(), .experts = {.up = up_gradient.data(), .down = down_gradient.data()}};
  }

  ts::layout::block placement{8, 1};
  ts::comm::self<ts::space::device> comm;
  ts::layer_sizes bytes;
  buffer<std::byte> state;
  buffer<float> gate;
  buffer<S> up, down;
  buffer<float> gate_gradient, up_gradient, down_gradient;
  layer_type layer;
};

struct result {
  std::vector<S> y[2], dx[2];
  std::vector<float> gradients;
  std::vector<std::int64_t> load;
};

void collect(result& r, const one_layer& l) {
  for (const auto* g : {&l.gate_gradient, &l.up_gradient, &l.down_gradient}) {
    for (const float x : g->get()) r.gradients.push_back(x);
  }
  std::vector<std::int64_t> load(8);
  device_test::require(cudaMemcpy(load.data(), l.layer.state().load, 64, cudaMemcpyDeviceToHost), "copy");
  r.load.insert(r.load.end(), load.begin(), load.end());
}

// Blocks: experts, no experts, experts.
struct problem {
  one_layer first{10}, last{20};
  std::unique_ptr<buffer<S>> x[2], y[2], dy[2], dx[2];

  problem() {
    for (unsigned m = 0; m < 2; ++m) {
      const auto count = static_cast<std::size_t>(rows_of[m] * d);
      x[m] = std::make_unique<buffer<S>>(rounded(device_test::normal(count, 100 + m)));
      dy[m] = std::make_unique<buffer<S>>(rounded(device_test::normal(count, 200 + m)));
      y[m] = std::make_unique<buffer<S>>(count);
      dx[m] = std::make_unique<buffer<S>>(count);
    }
    device_test::synchronize();
  }
  result results() const {
    result r;
    for (int m = 0; m < 2; ++m) {
      r.y[m] = y[m]->get();
      r.dx[m] = dx[m]->get();
    }
    collect(r, first);
    collect(r, last);
    return r;
  }
};

// Layer by layer, each with memory of its own.
result one_by_one() {
  problem p;
  half_mixer mixer;
  const cudaStream_t stream = device_test::make_stream();
  for (int m = 0; m < 2; ++m) {
    const std::int64_t rows = rows_of[m], count = rows * d;
    const pl::work_item item{.rows = rows};
    const auto mode = m == 0 ? ts::write::overwrite : ts::write::accumulate;
    one_layer* const layers[] = {&p.first, &p.last};
    std::vector<std::unique_ptr<buffer<S>>> kept;  // x0 u0 .. of every block
    const auto array = [&] {
      kept.push_back(std::make_unique<buffer<S>>(static_cast<std::size_t>(count)));
      return kept.back()->data();
    };
    const auto view = [&](S* data) { return ts::matrix_view<S>{data, rows, d}; };
    const buffer<std::byte> saved0(p.first.bytes.saved_bytes), saved1(p.first.bytes.saved_bytes);
    const buffer<std::byte> deferred0(p.first.bytes.deferred_bytes), deferred1(p.first.bytes.deferred_bytes);
    const buffer<std::byte> workspace(p.first.bytes.workspace_bytes);
    const ts::workspace_memory scratch(workspace.data(), workspace.size());
    const ts::saved_memory saved[] = {{saved0.data(), saved0.size()}, {saved1.data(), saved1.size()}};
    const ts::deferred_memory deferred[] = {{deferred0.data(), deferred0.size()}, {deferred1.data(), deferred1.size()}};
    S *const h = array(), *const u0 = array(), *const u1 = array(), *const x1 = array(), *const x2 = array();
    S *const dy0 = array(), *const dy1 = array(), *const du = array();
    device_test::synchronize();

    const auto block = [&](int i, S* from, S* u, S* to) {
      mixer.forward(stream, item, view(from), view(h), view(u));
      layers[i]->layer.forward(stream, ts::pass::train, {.x = view(u)}, layers[i]->weights(), view(to), saved[i],
                               scratch);
      scale(stream, h, 1, to, 1, to, count);
    };
    block(0, p.x[m]->data(), u0, x1);
    scale(stream, x1, -1, nullptr, 0, x2, count);
    block(1, x2, u1, p.y[m]->data());

    const auto back = [&](int i, S* u, S* dy, S* dx) {
      auto& l = *layers[i];
      l.layer.backward_input(stream, {.x = view(u)}, view(dy), l.weights(), saved[i], view(du), deferred[i], scratch);
      l.layer.backward_weights(stream, {.x = view(u)}, view(dy), saved[i], deferred[i], l.gradients(), mode);
      mixer.backward_input(stream, item, {}, view(dy), view(du), view(dx));
    };
    back(1, u1, p.dy[m]->data(), dy1);
    scale(stream, dy1, -1, nullptr, 0, dy0, count);
    back(0, u0, dy0, p.dx[m]->data());
    device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return p.results();
}

// Through the chunk. `pair`: the forward of micro-batch 1 and the backward of micro-batch 0 as an overlapped pair.
template <class Lanes>
result through_chunk(Lanes& lanes, bool pair) {
  problem p;
  half_mixer mixer;
  const auto gradients0 = p.first.gradients(), gradients1 = p.last.gradients();
  const std::vector<pl::moe_block<layer_type, half_mixer>> blocks{
      {&mixer, &p.first.layer, p.first.weights(), {&gradients0, 1}},
      {.before = &mixer},
      {&mixer, &p.last.layer, p.last.weights(), {&gradients1, 1}}};
  const auto bytes = chunk_type::sizes(blocks, max_rows, d, 2);
  const buffer<std::byte> saved(bytes.saved_bytes), deferred(bytes.deferred_bytes), workspace(bytes.workspace_bytes);
  chunk_type chunk(blocks, max_rows, d, 2, {saved.data(), saved.size()}, {deferred.data(), deferred.size()},
                   {workspace.data(), workspace.size()});
  pl::overlap_stage<chunk_type, Lanes> stage(chunk, lanes);
  const cudaStream_t stream = device_test::make_stream();
  device_test::synchronize();
  const auto item = [&](int m) {
    return pl::work_item{.micro_batch = m,
                         .rows = rows_of[m],
                         .slot = m,
                         .gradient_mode = m == 0 ? ts::write::overwrite : ts::write::accumulate};
  };
  const auto view = [&](const auto& b, int m) { return ts::matrix_view<S>{b[m]->data(), rows_of[m], d}; };
  stage.forward(stream, item(0), view(p.x, 0), view(p.y, 0));
  if (pair) {
    stage.overlapped(stream, item(1), view(p.x, 1), view(p.y, 1), stage, item(0), view(p.x, 0), view(p.dy, 0),
                     view(p.dx, 0));
  } else {
    stage.forward(stream, item(1), view(p.x, 1), view(p.y, 1));
    stage.backward_input(stream, item(0), view(p.x, 0), view(p.dy, 0), view(p.dx, 0));
    stage.backward_weights(stream, item(0), view(p.x, 0), view(p.dy, 0));
  }
  stage.backward_input(stream, item(1), view(p.x, 1), view(p.dy, 1), view(p.dx, 1));
  stage.backward_weights(stream, item(1), view(p.x, 1), view(p.dy, 1));
  device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return p.results();
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void check_same(const result& got, const result& expected) {
  for (int m = 0; m < 2; ++m) {
    CAPTURE(m);
    CHECK(same(got.y[m], expected.y[m]));
    CHECK(same(got.dx[m], expected.dx[m]));
  }
  CHECK(same(got.gradients, expected.gradients));
  CHECK(same(got.load, expected.load));
}

TEST_CASE("a chunk in device memory has the bits of its layers, alone and as an overlapped pair") {
  const result expected = one_by_one();
  double norm = 0;
  for (const S x : expected.dx[1]) norm += static_cast<double>(static_cast<float>(x)) * static_cast<float>(x);
  CHECK(std::isfinite(norm));
  CHECK(norm > 1);
  CHECK(expected.load.size() == 16);
  CHECK(expected.load[0] + expected.load[1] + expected.load[2] + expected.load[3] + expected.load[4] +
            expected.load[5] + expected.load[6] + expected.load[7] ==
        2 * (200 + 77));
  serial one_stream;
  check_same(through_chunk(one_stream, false), expected);
  check_same(through_chunk(one_stream, true), expected);
  pl::device_lanes two_streams;
  check_same(through_chunk(two_streams, true), expected);
}

}  // namespace
