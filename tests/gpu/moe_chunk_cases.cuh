// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A chunk of layers in device memory, and the same layers called one by one, over any communicator of device memory:
// the results of the two are to be the same bits.

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/layout/layout.hpp>
#include <tessera/moe/moe_layer.cuh>
#include <tessera/pipeline/moe_chunk.cuh>
#include <tessera/pipeline/overlap.cuh>

#include "device_fixture.cuh"
#include "stay.cuh"

namespace chunk_test {

namespace ts = tessera;
namespace pl = tessera::pipeline;
using device_test::buffer;
using S = ts::bfloat16;
template <class Comm>
using layer_over = ts::moe_layer<ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized,
                                            ts::balance::switch_loss, ts::balance::z_loss>,
                                 ts::experts<ts::activation::swiglu, ts::precision::bf16>, ts::layout::block, Comm>;

constexpr int E = 8;
constexpr std::int64_t d = 128, n = 64, max_rows = 200;

// How rows travel, whether they are kept, and whether there are shared experts.
struct travel {
  ts::saved_rows rows = ts::saved_rows::received;
  ts::transport::automatic transport = {};
  int num_shared_experts = 1;
};

inline ts::shape sizes_of(const travel& how) {
  return {.num_experts = E,
          .top_k = 2,
          .hidden = static_cast<int>(d),
          .intermediate = static_cast<int>(n),
          .max_tokens = max_rows,
          .num_shared_experts = how.num_shared_experts};
}

// Every routing has room.
template <class Comm>
typename layer_over<Comm>::options options_of(const travel& how) {
  return {
      .dispatch = {.row_bound = ts::dispatch_options::full_row_bound}, .transport = how.transport, .rows = how.rows};
}

// Of two micro-batches.
inline std::int64_t rows_of(int micro_batch, int rank) {
  return micro_batch == 0 ? max_rows - 13 * rank : 77 / (rank + 1);
}

// to = a x + b y, rounded; y may be null.
static __global__ void scale_kernel(const S* x, float a, const S* y, float b, S* to, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float sum = a * static_cast<float>(x[i]);
  to[i] = S(y == nullptr ? sum : sum + b * static_cast<float>(y[i]));
}

inline void scale(ts::device_stream stream, const S* x, float a, const S* y, float b, S* to, std::int64_t count) {
  scale_kernel<<<static_cast<unsigned>((count + 255) / 256), 256, 0, stream.get()>>>(x, a, y, b, to, count);
  device_test::require(cudaGetLastError(), "scale_kernel");
}

// h = x, u = x / 2; or h = -x where there are no experts.
struct half_mixer {
  int rank = 0;
  unsigned long long delay_ns = 0;
  unsigned calls = 0;

  // Ranks are late, each at another place.
  void delay(ts::device_stream stream) {
    if (delay_ns == 0) return;
    stay_kernel<<<1, 1, 0, stream.get()>>>((++calls * 7u + static_cast<unsigned>(rank) * 3u) % 5u * delay_ns);
    device_test::require(cudaGetLastError(), "stay_kernel");
  }
  void forward(ts::device_stream stream, const pl::work_item& item, ts::matrix_view<const S> x, ts::matrix_view<S> h,
               ts::matrix_view<S> u) {
    delay(stream);
    scale(stream, x.data, u.cols == 0 ? -1.0f : 1.0f, nullptr, 0, h.data, item.rows * d);
    if (u.cols > 0) scale(stream, x.data, 0.5f, nullptr, 0, u.data, item.rows * d);
  }
  void backward_input(ts::device_stream stream, const pl::work_item& item, ts::matrix_view<const S>,
                      ts::matrix_view<const S> dh, ts::matrix_view<const S> du, ts::matrix_view<S> dx) {
    delay(stream);
    scale(stream, dh.data, du.cols == 0 ? -1.0f : 1.0f, du.data, 0.5f, dx.data, item.rows * d);
  }
  void backward_weights(ts::device_stream stream, const pl::work_item&, ts::matrix_view<const S>,
                        ts::matrix_view<const S>, ts::matrix_view<const S>) {
    delay(stream);
  }
};

inline std::vector<S> rounded(const std::vector<float>& values) {
  std::vector<S> result;
  for (const float x : values) result.push_back(S(x));
  return result;
}

// Memory for layers: of the communicator where other ranks write to it. Poisoned.
template <class Comm>
class layer_memory {
 public:
  explicit layer_memory(Comm& comm) : comm_(comm) {}
  std::byte* take(std::size_t bytes) {
    std::byte* data = nullptr;
    if constexpr (requires { comm_.allocate(bytes); }) {
      data = comm_.allocate(bytes);
      device_test::require(cudaMemset(data, 0xff, bytes), "cudaMemset");
    } else {
      owned_.push_back(std::make_unique<buffer<std::byte>>(bytes));
      data = owned_.back()->data();
    }
    return data;
  }
  template <class Memory>
  Memory take(std::size_t bytes) {
    return {take(bytes), bytes};
  }

 private:
  Comm& comm_;
  std::vector<std::unique_ptr<buffer<std::byte>>> owned_;
};

// A layer with parameters that depend on a number and the experts of the rank.
template <class Comm>
struct one_layer {
  using layer_type = layer_over<Comm>;
  one_layer(Comm& c, unsigned seed, const ts::shape& sizes, const typename layer_type::options& options)
      : comm(c),
        has_shared(sizes.num_shared_experts > 0),
        placement(E, c.size()),
        bytes(layer_type::sizes(sizes, placement, c.rank(), options)),
        state(bytes.state_bytes),
        gate(device_test::normal(E * d, seed, 0.2)),
        up(of_rank(device_test::normal(E * 2 * n * d, seed + 1, 0.1))),
        down(of_rank(device_test::normal(E * d * n, seed + 2, 0.1))),
        shared_up(rounded(device_test::normal(2 * n * d, seed + 3, 0.1))),
        shared_down(rounded(device_test::normal(d * n, seed + 4, 0.1))),
        gate_gradient(gate.size()),
        up_gradient(up.size()),
        down_gradient(down.size()),
        shared_up_gradient(shared_up.size()),
        shared_down_gradient(shared_down.size()),
        layer(sizes, {}, placement, comm, ts::state_memory(state.data(), state.size()), options) {
    const cudaStream_t stream = device_test::make_stream();
    layer.reset_state(stream);
    device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }
  std::vector<S> of_rank(const std::vector<float>& all) const {
    const auto each = all.size() / E;
    const auto first = static_cast<std::size_t>(placement.expert_at(comm.rank(), 0)) * each;
    const auto count = static_cast<std::size_t>(placement.num_slots(comm.rank())) * each;
    return rounded(
        {all.begin() + static_cast<std::ptrdiff_t>(first), all.begin() + static_cast<std::ptrdiff_t>(first + count)});
  }
  typename layer_type::weights weights() const {
    return {
        .gate = {gate.data(), E, d},
        .experts = {.up = up.data(), .down = down.data()},
        .shared = {.up = has_shared ? shared_up.data() : nullptr, .down = has_shared ? shared_down.data() : nullptr}};
  }
  typename layer_type::gradients gradients() const {
    return {.gate = gate_gradient.data(),
            .experts = {.up = up_gradient.data(), .down = down_gradient.data()},
            .shared = {.up = has_shared ? shared_up_gradient.data() : nullptr,
                       .down = has_shared ? shared_down_gradient.data() : nullptr}};
  }

  Comm& comm;
  bool has_shared;
  ts::layout::block placement;
  ts::layer_sizes bytes;
  buffer<std::byte> state;
  buffer<float> gate;
  buffer<S> up, down, shared_up, shared_down;
  buffer<float> gate_gradient, up_gradient, down_gradient, shared_up_gradient, shared_down_gradient;
  layer_type layer;
};

struct result {
  std::vector<S> y[2], dx[2];
  std::vector<float> gradients, losses;
  std::vector<std::int64_t> load;
};

// Blocks: experts, no experts, experts.
template <class Comm>
struct problem {
  using layer_type = layer_over<Comm>;
  one_layer<Comm> first, last;
  layer_memory<Comm> memory;
  std::unique_ptr<buffer<S>> x[2], y[2], dy[2], dx[2];
  int rank;

  problem(Comm& comm, const travel& how)
      : first(comm, 10, sizes_of(how), options_of<Comm>(how)),
        last(comm, 20, sizes_of(how), options_of<Comm>(how)),
        memory(comm),
        rank(comm.rank()) {
    for (int m = 0; m < 2; ++m) {
      const auto count = static_cast<std::size_t>(rows_of(m, rank) * d);
      const auto seed = static_cast<unsigned>(100 + 10 * rank + m);
      x[m] = std::make_unique<buffer<S>>(rounded(device_test::normal(count, seed)));
      dy[m] = std::make_unique<buffer<S>>(rounded(device_test::normal(count, seed + 100)));
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
    for (const one_layer<Comm>* l : {&first, &last}) {
      for (const auto* g :
           {&l->gate_gradient, &l->up_gradient, &l->down_gradient, &l->shared_up_gradient, &l->shared_down_gradient}) {
        if (!l->has_shared && (g == &l->shared_up_gradient || g == &l->shared_down_gradient)) continue;
        const auto values = g->get();
        r.gradients.insert(r.gradients.end(), values.begin(), values.end());
      }
      const auto copy = [](auto& all, const auto* from, std::size_t count) {
        const std::size_t before = all.size();
        all.resize(before + count);
        device_test::require(cudaMemcpy(all.data() + before, from, count * sizeof(*from), cudaMemcpyDeviceToHost),
                             "copy");
      };
      copy(r.load, l->layer.state().load, E);
      copy(r.losses, l->layer.state().losses, 2);
    }
    return r;
  }
  // Waits, and says what kernels have found.
  void wait(cudaStream_t stream) {
    if constexpr (requires { first.comm.wait(stream); }) {
      first.comm.wait(stream);
    } else {
      device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    }
    for (const one_layer<Comm>* l : {&first, &last}) {
      ts::device_status status;
      device_test::require(cudaMemcpy(&status, l->layer.state().status, sizeof(status), cudaMemcpyDeviceToHost),
                           "copy");
      ts::expect_ok(status);
    }
  }
};

// What ranks do between allocations, which may wait for kernels of other GPUs, and kernels that wait for each other.
using meeting = std::function<void()>;

// Layer by layer, each with memory of its own.
template <class Comm>
result one_by_one(
    Comm& comm, const meeting& meet = [] {}, const travel& policy = {}) {
  if constexpr (requires { comm.release_all(); }) comm.release_all();
  problem<Comm> p(comm, policy);
  half_mixer mixer;
  const cudaStream_t stream = device_test::make_stream();
  const ts::layer_sizes& bytes = p.first.bytes;
  const auto scratch = p.memory.template take<ts::workspace_memory>(bytes.workspace_bytes);
  ts::saved_memory saved[2];
  ts::deferred_memory deferred[2];
  for (int i = 0; i < 2; ++i) {
    saved[i] = p.memory.template take<ts::saved_memory>(bytes.saved_bytes);
    deferred[i] = p.memory.template take<ts::deferred_memory>(bytes.deferred_bytes);
  }
  std::vector<std::unique_ptr<buffer<S>>> kept;  // x0 u0 .. of every block
  std::vector<S*> arrays;
  for (int i = 0; i < 8; ++i) {
    kept.push_back(std::make_unique<buffer<S>>(static_cast<std::size_t>(max_rows * d)));
    arrays.push_back(kept.back()->data());
  }
  device_test::synchronize();
  meet();
  for (int m = 0; m < 2; ++m) {
    const std::int64_t rows = rows_of(m, p.rank), count = rows * d;
    const pl::work_item item{.rows = rows};
    const auto mode = m == 0 ? ts::write::overwrite : ts::write::accumulate;
    one_layer<Comm>* const layers[] = {&p.first, &p.last};
    const auto view = [&](S* data) { return ts::matrix_view<S>{data, rows, d}; };
    S *const h = arrays[0], *const u0 = arrays[1], *const u1 = arrays[2], *const x1 = arrays[3], *const x2 = arrays[4];
    S *const dy0 = arrays[5], *const dy1 = arrays[6], *const du = arrays[7];

    const auto block = [&](int i, S* from, S* u, S* to) {
      mixer.forward(stream, item, view(from), view(h), view(u));
      layers[i]->layer.forward(stream, ts::pass::train, {.x = view(u), .residual = view(h)}, layers[i]->weights(),
                               view(to), saved[i], scratch);
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
    p.wait(stream);
    meet();
  }
  device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return p.results();
}

enum class how { alone, pair, graph_of_pair, together };

// Through the chunk. In a pair: the forward of micro-batch 1 and the backward of micro-batch 0. Together: both
// forwards, then both backwards, micro-batch 1 through another chunk of the same layers.
template <class Comm, class Lanes>
result through_chunk(
    Comm& comm, Lanes& lanes, how mode, unsigned long long delay_ns = 0, const meeting& meet = [] {},
    const travel& policy = {}) {
  using layer_type = layer_over<Comm>;
  using chunk_type = pl::moe_chunk<layer_type, half_mixer>;
  if constexpr (requires { comm.release_all(); }) comm.release_all();
  problem<Comm> p(comm, policy);
  half_mixer mixer{p.rank, delay_ns};
  const auto gradients0 = p.first.gradients(), gradients1 = p.last.gradients();
  const std::vector<pl::moe_block<layer_type, half_mixer>> blocks{
      {&mixer, &p.first.layer, p.first.weights(), {&gradients0, 1}},
      {.before = &mixer},
      {&mixer, &p.last.layer, p.last.weights(), {&gradients1, 1}}};
  const auto bytes = chunk_type::sizes(blocks, max_rows, d, 2);
  std::optional<chunk_type> chunk, other;
  const auto make = [&](std::optional<chunk_type>& to) {
    to.emplace(blocks, max_rows, d, 2, p.memory.template take<ts::saved_memory>(bytes.saved_bytes),
               p.memory.template take<ts::deferred_memory>(bytes.deferred_bytes),
               p.memory.template take<ts::workspace_memory>(bytes.workspace_bytes));
  };
  make(chunk);
  if (mode == how::together) make(other);
  // both orders of phases, in turn
  const auto style = delay_ns > 0 ? pl::overlap_style::weights : pl::overlap_style::attention;
  pl::overlap_stage<chunk_type, Lanes> stage(*chunk, lanes, style);
  const cudaStream_t stream = device_test::make_stream();
  device_test::synchronize();
  const auto item = [&](int m) {
    return pl::work_item{.micro_batch = m,
                         .rows = rows_of(m, p.rank),
                         .slot = m,
                         .gradient_mode = m == 0 ? ts::write::overwrite : ts::write::accumulate};
  };
  const auto view = [&](const auto& b, int m) { return ts::matrix_view<S>{b[m]->data(), rows_of(m, p.rank), d}; };
  const auto pair = [&] {
    stage.overlapped(stream, item(1), view(p.x, 1), view(p.y, 1), stage, item(0), view(p.x, 0), view(p.dy, 0),
                     view(p.dx, 0));
  };
  cudaGraphExec_t graph = nullptr;
  if (mode == how::graph_of_pair) graph = device_test::capture(stream, pair);
  meet();
  if (mode == how::together) {
    pl::overlap_stage<chunk_type, Lanes> partner(*other, lanes, style);
    stage.two_forwards(stream, item(0), view(p.x, 0), view(p.y, 0), partner, item(1), view(p.x, 1), view(p.y, 1));
    stage.two_backwards(stream, item(0), view(p.x, 0), view(p.dy, 0), view(p.dx, 0), partner, item(1), view(p.x, 1),
                        view(p.dy, 1), view(p.dx, 1));
  } else {
    stage.forward(stream, item(0), view(p.x, 0), view(p.y, 0));
    if (mode == how::alone) {
      stage.forward(stream, item(1), view(p.x, 1), view(p.y, 1));
      stage.backward_input(stream, item(0), view(p.x, 0), view(p.dy, 0), view(p.dx, 0));
      stage.backward_weights(stream, item(0), view(p.x, 0), view(p.dy, 0));
    } else if (mode == how::pair) {
      pair();
    } else {
      device_test::require(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
    }
    stage.backward_input(stream, item(1), view(p.x, 1), view(p.dy, 1), view(p.dx, 1));
    stage.backward_weights(stream, item(1), view(p.x, 1), view(p.dy, 1));
  }
  p.wait(stream);
  meet();
  if (graph != nullptr) device_test::require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
  device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return p.results();
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

inline void check_same(const result& got, const result& expected) {
  for (int m = 0; m < 2; ++m) {
    CAPTURE(m);
    CHECK(same(got.y[m], expected.y[m]));
    CHECK(same(got.dx[m], expected.dx[m]));
  }
  CHECK(same(got.gradients, expected.gradients));
  CHECK(same(got.losses, expected.losses));
  CHECK(same(got.load, expected.load));
}

// Finite, and of all tokens.
inline void check_plausible(const result& expected, int rank) {
  double norm = 0;
  for (const S x : expected.dx[1]) norm += static_cast<double>(static_cast<float>(x)) * static_cast<float>(x);
  for (const float g : expected.gradients) norm += static_cast<double>(g) * g;
  CHECK(std::isfinite(norm));
  CHECK(norm > 1);
  std::int64_t load = 0;
  for (const std::int64_t count : expected.load) load += count;
  CHECK(load == 2 * 2 * (rows_of(0, rank) + rows_of(1, rank)));
}

}  // namespace chunk_test
