// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Grouped products on one sm_90a GPU: alone, beside a cuBLAS product for each group, and in the six roles that they
// have in a layer, on N(0, 1) tokens and random routing. `forward` and `backward` are a layer's products one after
// another. A case's label is its kernel.
//
// Two options of its own: --sm_budget=COUNT bounds the multiprocessors of every product; --all_kernels adds a case for
// each kernel that could be forced, and one without the tile counter.

#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>

#include <tessera/experts/activation.hpp>
#include <tessera/gemm/hopper.cuh>

#include "gpu_timing.cuh"

namespace {

namespace ts = tessera;
namespace hp = ts::gemm::hopper;
using namespace tessera_bench;
using hp::contiguous;
using hp::gathered;
using swiglu = ts::activation::swiglu;
using ts::bfloat16;

struct bench_options {
  int sm_budget = 0;
  bool all_kernels = false;
};

// Takes the options above from the command line.
bench_options take_options(int& argc, char** argv) {
  bench_options o;
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    constexpr const char* budget = "--sm_budget=";
    if (std::strncmp(argv[i], budget, std::strlen(budget)) == 0)
      o.sm_budget = std::atoi(argv[i] + std::strlen(budget));
    else if (std::strcmp(argv[i], "--all_kernels") == 0)
      o.all_kernels = true;
    else
      argv[kept++] = argv[i];
  }
  argc = kept;
  return o;
}

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
    device_offsets.set(offsets);
    device_list.set(list);
  }
  hp::row_groups groups() const {
    return {device_offsets.data(), static_cast<std::int64_t>(offsets.size()) - 1,
            static_cast<std::int64_t>(list.size())};
  }
};

// A product whose kernel is a choice. `run(stream, options)` enqueues it.
struct product {
  hp::problem bounds;
  double flops;
  std::function<void(cudaStream_t, const hp::all_kernels_options&)> run;
  std::function<void(cudaStream_t)> before = {};  // untimed
};

// How a case departs from the library's choice.
struct variant {
  const char* suffix;
  bool static_order;
  bool forced;
  hp::config kernel;
};

constexpr variant as_chosen{"", false, false, {}};
constexpr variant variants[] = {
    {"/static_order", true, false, {}},
    {"/cooperative_128x256", false, true, {hp::schedule::cooperative, 128, 256, 1, 0}},
    {"/cooperative_128x256_cluster2", false, true, {hp::schedule::cooperative, 128, 256, 2, 0}},
    {"/ping_pong_128x128", false, true, {hp::schedule::ping_pong, 128, 128, 1, 0}},
};

void measure(benchmark::State& state, const bench_options& o, const hp::device& d, product p, const variant& v) {
  hp::all_kernels_options launch;
  launch.sm_budget = o.sm_budget;
  p.bounds.num_multiprocessors = d.num_multiprocessors;
  if (o.sm_budget > 0 && o.sm_budget < d.num_multiprocessors) p.bounds.num_multiprocessors = o.sm_budget;
  hp::config kernel = v.kernel;
  if (v.forced) {
    kernel.grid = p.bounds.num_multiprocessors / kernel.cluster * kernel.cluster;
    launch.forced = &kernel;
  } else {
    kernel = hp::choose(p.bounds);
  }
  const device_array<std::int32_t> counter(2);
  counter.set_bytes(0);
  if (!v.static_order) launch.tile_counter = counter.data();
  try {
    p.run(cudaStreamLegacy, launch);
  } catch (const ts::invalid_argument& e) {  // there is no such kernel for this product
    state.SkipWithError(e.what());
    return;
  }
  state.SetLabel(hp::to_string(kernel));
  report_time(state, median_us([&](cudaStream_t stream) { p.run(stream, launch); }, p.flops / 500e6, p.before),
              p.flops);
}

// Registers the cases of a product. `with_product(f)` makes it and its memory, and calls `f(device, product)`.
template <class F>
void add_product(const bench_options& o, const std::string& name, F with_product) {
  const auto add = [&](const variant& v) {
    add_case(name + v.suffix, [=](benchmark::State& state) {
      with_product([&](const hp::device& d, const product& p) { measure(state, o, d, p, v); });
    });
  };
  add(as_chosen);
  if (!o.all_kernels) return;
  for (const variant& v : variants) add(v);
}

struct plain_size {
  int E;
  std::int64_t rows, N, K;
  bool even;
};

constexpr plain_size plain_sizes[] = {{1, 8192, 8192, 8192, true},
                                      {8, 16384, 4096, 4096, true},
                                      {16, 16384, 4096, 4096, true},
                                      {16, 16384, 4096, 4096, false}};

// One product of rows that are sorted already.
struct plain_case {
  explicit plain_case(const plain_size& size)
      : s(size), routed(s.rows, s.E, 1, s.even), a(s.rows * s.K, 1, 1), b(s.E * s.N * s.K, 2, 1), c(s.rows * s.N) {}

  double flops() const {
    return 2.0 * static_cast<double>(s.rows) * static_cast<double>(s.N) * static_cast<double>(s.K);
  }
  product grouped(const hp::device& d) const {
    hp::problem p;
    p.max_rows = s.rows, p.num_groups = s.E, p.n = s.N, p.k = s.K, p.b_along_k = true;
    return {p, flops(), [this, d](cudaStream_t stream, const hp::all_kernels_options& launch) {
              hp::variable_m<contiguous::k, gathered::none>(
                  stream, d, routed.groups(), s.N, s.K, {a.data(), s.K, nullptr}, {b.data(), s.N * s.K, s.K, 1},
                  nullptr, ts::matrix_view<bfloat16>(c.data(), s.rows, s.N), ts::write::overwrite, launch);
            }};
  }

  plain_size s;
  routing routed;
  device_array<bfloat16> a, b, c;
};

void add_plain(const bench_options& o, const plain_size& s) {
  const std::string name = "alone/E" + std::to_string(s.E) + "/rows" + std::to_string(s.rows / s.E) + "/N" +
                           std::to_string(s.N) + "/K" + std::to_string(s.K) + (s.even ? "/even" : "/random");
  add_product(o, name, [=](auto&& use) {
    const plain_case c(s);
    const hp::device d = hp::device::current();
    use(d, c.grouped(d));
  });
#if defined(TESSERA_BENCH_CUBLAS)
  add_case(name + "/cublas_each", [=](benchmark::State& state) {
    const plain_case c(s);
    const cublas_products cublas;
    if (!cublas) return state.SkipWithError("cublasCreate failed");
    const auto all = [&](cudaStream_t stream) {
      for (std::size_t e = 0; e < static_cast<std::size_t>(s.E); ++e) {
        const std::int64_t first = c.routed.offsets[e], count = c.routed.offsets[e + 1] - first;
        if (count > 0)
          cublas.multiply(stream, count, s.N, s.K, c.a.data() + first * s.K,
                          c.b.data() + static_cast<std::int64_t>(e) * s.N * s.K, c.c.data() + first * s.N);
      }
    };
    state.SetLabel("cuBLAS, one call per group");
    report_time(state, median_us(all, c.flops() / 500e6), c.flops());
  });
#endif
}

struct layer_size {
  const char* name;
  std::int64_t T, d, n;
  int E, K;
};

constexpr layer_size layer_sizes[] = {
    {"7B_n256", 24576, 1536, 256, 128, 8},          {"30B_n256", 32768, 4096, 256, 256, 16},
    {"30B_n512", 32768, 4096, 512, 128, 8},         {"30B_n1024", 32768, 4096, 1024, 64, 4},
    {"120B_n1024", 32768, 4096, 1024, 128, 8},      {"Qwen3_30B_T8192", 8192, 2048, 768, 128, 8},
    {"Qwen3_30B_T32768", 32768, 2048, 768, 128, 8}, {"Mixtral_T8192", 8192, 4096, 14336, 8, 2},
};

// The products of a layer with concatenated gate and up columns.
struct layer_products {
  explicit layer_products(const layer_size& size)
      : s(size),
        P(s.T * s.K),
        U(2 * s.n),
        device(hp::device::current()),
        routed(s.T, s.E, s.K, false),
        x(s.T * s.d, 2, 1),
        dy(s.T * s.d, 3, 1),
        w1(s.E * U * s.d, 4, 1 / std::sqrt(static_cast<float>(s.d))),
        w2(s.E * s.d * s.n, 5, 1 / std::sqrt(static_cast<float>(s.n))),
        h(P * U, 6, 1),
        act(P * s.n, 7, 1),
        y(P * s.d),
        dw(s.E * U * s.d),
        weights(P),
        parts(hp::num_weight_parts(s.n) * P) {
    weights.set_bytes(0x3f);  // 0.747
  }

  ts::gemm::row_operand<bfloat16> tokens() const { return {x.data(), s.d, routed.device_list.data()}; }
  ts::gemm::row_operand<bfloat16> gradients() const { return {dy.data(), s.d, routed.device_list.data()}; }
  ts::gemm::row_operand<bfloat16> hidden() const { return {h.data(), U, nullptr}; }
  ts::gemm::row_operand<bfloat16> activation() const { return {act.data(), s.n, nullptr}; }
  ts::matrix_view<bfloat16> rows_of_y() const { return {y.data(), P, s.d}; }

  double unit() const { return 2.0 * static_cast<double>(P) * static_cast<double>(s.d) * static_cast<double>(s.n); }
  hp::problem sums_of_k(std::int64_t N, std::int64_t K, hp::epilogue_kind kind, bool b_along_k) const {
    hp::problem p;
    p.max_rows = P, p.num_groups = s.E, p.n = N, p.k = K, p.epilogue = kind, p.b_along_k = b_along_k;
    p.gathered = kind != hp::epilogue_kind::store;
    return p;
  }
  hp::problem sums_of_rows(std::int64_t M, std::int64_t N) const {
    hp::problem p;
    p.variable_k = true, p.max_rows = P, p.num_groups = s.E, p.m = M, p.n = N;
    return p;
  }

  product up() const {
    return {sums_of_k(U, s.d, hp::epilogue_kind::activation, true), 2 * unit(),
            [this](cudaStream_t stream, const hp::all_kernels_options& launch) {
              hp::variable_m_activation<contiguous::k, gathered::a, swiglu, false>(
                  stream, device, routed.groups(), s.n, s.d, tokens(), {w1.data(), U * s.d, s.d, 1}, nullptr,
                  {h.data(), P, U}, {act.data(), P, s.n}, {}, launch);
            }};
  }
  product down() const {
    return {sums_of_k(s.d, s.n, hp::epilogue_kind::store, true), unit(),
            [this](cudaStream_t stream, const hp::all_kernels_options& launch) {
              hp::variable_m<contiguous::k, gathered::none>(stream, device, routed.groups(), s.d, s.n, activation(),
                                                            {w2.data(), s.d * s.n, s.n, 1}, nullptr, rows_of_y(),
                                                            ts::write::overwrite, launch);
            }};
  }
  // It writes over H, so H is N(0, 1) again ahead of each.
  product dH() const {
    return {sums_of_k(s.n, s.d, hp::epilogue_kind::activation_backward, false), unit(),
            [this](cudaStream_t stream, const hp::all_kernels_options& launch) {
              hp::variable_m_activation_backward<contiguous::mn, gathered::a, swiglu, false>(
                  stream, device, routed.groups(), s.n, s.d, gradients(), {w2.data(), s.d * s.n, 1, s.n},
                  weights.data(), {h.data(), P, U}, {act.data(), P, s.n}, parts.data(), {}, launch);
            },
            [this](cudaStream_t stream) { h.fill(6, 1, stream); }};
  }
  product dX() const {
    return {sums_of_k(s.d, U, hp::epilogue_kind::store, false), 2 * unit(),
            [this](cudaStream_t stream, const hp::all_kernels_options& launch) {
              hp::variable_m<contiguous::mn, gathered::none>(stream, device, routed.groups(), s.d, U, hidden(),
                                                             {w1.data(), U * s.d, 1, s.d}, nullptr, rows_of_y(),
                                                             ts::write::overwrite, launch);
            }};
  }
  product dW1() const {
    return {sums_of_rows(U, s.d), 2 * unit(), [this](cudaStream_t stream, const hp::all_kernels_options& launch) {
              hp::variable_k<gathered::b>(stream, device, routed.groups(), U, s.d, hidden(), tokens(),
                                          ts::gemm::group_operand<bfloat16>{dw.data(), U * s.d, s.d, 1},
                                          ts::write::overwrite, launch);
            }};
  }
  product dW2() const {
    return {sums_of_rows(s.d, s.n), unit(), [this](cudaStream_t stream, const hp::all_kernels_options& launch) {
              hp::variable_k<gathered::a>(stream, device, routed.groups(), s.d, s.n, gradients(), activation(),
                                          ts::gemm::group_operand<bfloat16>{dw.data(), s.d * s.n, s.n, 1},
                                          ts::write::overwrite, launch);
            }};
  }

  layer_size s;
  std::int64_t P, U;
  hp::device device;
  routing routed;
  device_array<bfloat16> x, dy, w1, w2, h, act, y, dw;
  device_array<float> weights, parts;
};

// Several products in a row, with the kernels of the library's choice.
void measure_all(benchmark::State& state, const bench_options& o, const std::vector<product>& products) {
  const device_array<std::int32_t> counter(2);
  counter.set_bytes(0);
  hp::all_kernels_options launch;
  launch.sm_budget = o.sm_budget;
  launch.tile_counter = counter.data();
  double flops = 0;
  for (const product& p : products) flops += p.flops;
  const double us = median_us(
      [&](cudaStream_t stream) {
        for (const product& p : products) p.run(stream, launch);
      },
      flops / 500e6,
      [&](cudaStream_t stream) {
        for (const product& p : products)
          if (p.before) p.before(stream);
      });
  report_time(state, us, flops);
}

void add_layer(const bench_options& o, const layer_size& s) {
  const std::string prefix = std::string(s.name) + '/';
  using role = product (layer_products::*)() const;
  constexpr std::pair<const char*, role> roles[] = {{"up", &layer_products::up},   {"down", &layer_products::down},
                                                    {"dH", &layer_products::dH},   {"dX", &layer_products::dX},
                                                    {"dW1", &layer_products::dW1}, {"dW2", &layer_products::dW2}};
  for (const auto& [name, make] : roles)
    add_product(o, prefix + name, [s, make = make](auto&& use) {
      const layer_products layer(s);
      use(layer.device, (layer.*make)());
    });
  add_case(prefix + "forward", [=](benchmark::State& state) {
    const layer_products layer(s);
    measure_all(state, o, {layer.up(), layer.down()});
  });
  add_case(prefix + "backward", [=](benchmark::State& state) {
    const layer_products layer(s);
    measure_all(state, o, {layer.dH(), layer.dX(), layer.dW1(), layer.dW2()});
  });
}

}  // namespace

int main(int argc, char** argv) {
  const bench_options o = take_options(argc, argv);
  for (const plain_size& s : plain_sizes) add_plain(o, s);
  for (const layer_size& s : layer_sizes) add_layer(o, s);
  return run_on_gpu(argc, argv);
}
