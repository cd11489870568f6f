// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The three passes of SwiGLU experts on the host, weights on the output, by precision and backend.
//
// flops: of the matrix products alone, 6 * rows * d * n. bytes: weights or gradients once, rows once per use. items:
// rows.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include <tessera/experts/experts.hpp>
#if defined(TESSERA_HAS_CBLAS)
#include <tessera/gemm/blas.hpp>
#endif

#include "context.hpp"
#include "defaults.hpp"

namespace ts = tessera;

namespace {

// Experts with their weights, rows and memory; every token goes to `top_k` experts, `rows` each.
template <class Precision, class Gemm>
struct fixture {
  using experts_type = ts::experts<ts::activation::swiglu, Precision, ts::weight_layout::out_in_concatenated, Gemm>;
  using S = typename Precision::storage;
  using A = typename Precision::accumulate;
  using G = typename Precision::gradient;
  static constexpr std::int64_t top_k = 4;

  std::int64_t d, n, L, pairs, tokens;
  experts_type experts;
  std::vector<S> x, dy, up, down, y, dx;
  std::vector<A> weight, dweight;
  std::vector<G> dup, ddown;
  std::vector<std::int32_t> offsets, gather;
  ts::host_buffer buffer;
  typename experts_type::saved_view saved;
  typename experts_type::deferred_view deferred;
  typename experts_type::forward_scratch forward_scratch;
  typename experts_type::backward_input_scratch input_scratch;
  typename experts_type::backward_weights_scratch weights_scratch;

  explicit fixture(const benchmark::State& state)
      : d(state.range(0)),
        n(state.range(1)),
        L(state.range(2)),
        pairs(L * state.range(3)),
        tokens(pairs / top_k),
        experts({.num_local_experts = static_cast<int>(L),
                 .hidden = static_cast<int>(d),
                 .intermediate = static_cast<int>(n)}) {
    const auto elements = [](std::int64_t count) { return static_cast<std::size_t>(count); };
    x = tessera_bench::normal<S>(elements(tokens * d)), dy = tessera_bench::normal<S>(elements(tokens * d));
    up = tessera_bench::normal<S>(elements(L * 2 * n * d), 0.05f);
    down = tessera_bench::normal<S>(elements(L * d * n), 0.05f);
    weight = tessera_bench::normal<A>(elements(pairs));
    y.resize(elements(pairs * d)), dx.resize(elements(pairs * d)), dweight.resize(elements(pairs));
    dup.resize(up.size()), ddown.resize(down.size());
    for (std::int64_t e = 0; e <= L; ++e) offsets.push_back(static_cast<std::int32_t>(e * state.range(3)));
    for (std::int64_t i = 0; i < pairs; ++i) gather.push_back(static_cast<std::int32_t>(i * 7919 % tokens));
    ts::memory_builder count;
    carve(count);
    buffer = ts::host_buffer(count.bytes());
    ts::memory_builder memory(ts::workspace_memory(buffer), "the benchmark's buffer");
    carve(memory);
    forward(), backward_input();
  }

  void carve(ts::memory_builder& memory) {
    saved = experts.carve_saved(memory, pairs);
    deferred = experts.carve_deferred(memory, pairs);
    forward_scratch = experts.carve_forward(memory, pairs, ts::weight_on::output);
    input_scratch = experts.carve_backward_input(memory, pairs, ts::weight_on::output);
    weights_scratch = experts.carve_backward_weights(memory, pairs, ts::weight_on::output);
  }

  ts::expert_rows rows() const { return {static_cast<std::int32_t>(L), offsets.data(), gather.data()}; }
  void forward() {
    experts.forward({}, rows(), {x.data(), tokens, d}, {weight.data()}, {up.data(), down.data()}, saved,
                    {y.data(), pairs, d}, forward_scratch);
  }
  void backward_input() {
    experts.backward_input({}, rows(), {x.data(), tokens, d}, {dy.data(), tokens, d}, {weight.data()},
                           {up.data(), down.data()}, saved, deferred, {dx.data(), pairs, d}, dweight.data(),
                           input_scratch);
  }
  void backward_weights() {
    experts.backward_weights({}, rows(), {x.data(), tokens, d}, {dy.data(), tokens, d}, {weight.data()}, saved,
                             deferred, {dup.data(), ddown.data()}, ts::write::overwrite, weights_scratch);
  }

  // `row_elements` and `sum_elements`: of storage and of sums, that each row reads or writes.
  void report(benchmark::State& state, std::int64_t row_elements, std::int64_t sum_elements, std::size_t weight_bytes) {
    const double weights = static_cast<double>(3 * d * n), rows = static_cast<double>(pairs);
    const double row_bytes =
        static_cast<double>(row_elements) * sizeof(S) + static_cast<double>(sum_elements) * sizeof(A);
    tessera_bench::report_rates(state, 2 * weights * rows,
                                weights * static_cast<double>(L) * static_cast<double>(weight_bytes) + row_bytes * rows,
                                rows);
  }
};

template <class Precision, class Gemm>
void forward(benchmark::State& state) {
  fixture<Precision, Gemm> f(state);
  for (auto _ : state) {
    f.forward();
    benchmark::ClobberMemory();
  }
  f.report(state, 2 * f.d + 6 * f.n, 0, sizeof(typename Precision::storage));  // x, y; H and A, written and read
}

template <class Precision, class Gemm>
void backward_input(benchmark::State& state) {
  fixture<Precision, Gemm> f(state);
  f.forward();
  const std::vector<typename Precision::storage> h(f.saved.h.data, f.saved.h.data + f.pairs * 2 * f.n);
  for (auto _ : state) {
    state.PauseTiming();  // dH stands in the place of H
    std::copy(h.begin(), h.end(), f.saved.h.data);
    state.ResumeTiming();
    f.backward_input();
    benchmark::ClobberMemory();
  }
  // dy, dx; H read, dH written and read, A written; dA written and read
  f.report(state, 2 * f.d + 7 * f.n, 2 * f.n, sizeof(typename Precision::storage));
}

template <class Precision, class Gemm>
void backward_weights(benchmark::State& state) {
  fixture<Precision, Gemm> f(state);
  for (auto _ : state) {
    f.backward_weights();
    benchmark::ClobberMemory();
  }
  f.report(state, 2 * f.d + 3 * f.n, 0, sizeof(typename Precision::gradient));  // x, dy, dH, A
}

// Hidden, intermediate, local experts, rows per expert: a small language model's layer, and a wide one.
void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"d", "n", "experts", "rows"})->Unit(benchmark::kMicrosecond);
  b->Args({128, 64, 32, 16})->Args({128, 64, 32, 64})->Args({256, 128, 16, 128})->Args({1024, 512, 8, 512});
}

using ts::gemm::reference;
using float_precision = ts::precision::fp32;
using bf16_precision = ts::precision::bf16;
BENCHMARK(forward<float_precision, reference>)->Name("forward<fp32,reference>")->Apply(shapes);
BENCHMARK(backward_input<float_precision, reference>)->Name("backward_input<fp32,reference>")->Apply(shapes);
BENCHMARK(backward_weights<float_precision, reference>)->Name("backward_weights<fp32,reference>")->Apply(shapes);
BENCHMARK(forward<bf16_precision, reference>)->Name("forward<bf16,reference>")->Apply(shapes);
BENCHMARK(backward_input<bf16_precision, reference>)->Name("backward_input<bf16,reference>")->Apply(shapes);
BENCHMARK(backward_weights<bf16_precision, reference>)->Name("backward_weights<bf16,reference>")->Apply(shapes);
#if defined(TESSERA_HAS_CBLAS)
using ts::gemm::blas;
BENCHMARK(forward<float_precision, blas>)->Name("forward<fp32,blas>")->Apply(shapes);
BENCHMARK(backward_input<float_precision, blas>)->Name("backward_input<fp32,blas>")->Apply(shapes);
BENCHMARK(backward_weights<float_precision, blas>)->Name("backward_weights<fp32,blas>")->Apply(shapes);
#endif

}  // namespace

TESSERA_BENCHMARK_MAIN()
