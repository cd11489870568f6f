// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Grouped matrix products: the forward and input-gradient product (variable_m, over weights stored [out, in] and
// [in, out]) and the weight-gradient product (variable_k), by backend and storage type.
//
// flops: 2 * groups * rows * n * k. bytes: both operands and the result once, gather lists left out.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <string>
#include <vector>

#include <tessera/gemm/gemm.hpp>
#if defined(TESSERA_HAS_CBLAS)
#include <tessera/gemm/blas.hpp>
#endif

#include "context.hpp"
#include "defaults.hpp"

namespace {

namespace ts = tessera;
using ts::gemm::group_operand;
using ts::gemm::row_operand;

struct grouped_product {
  tessera_bench::gemm_size size;
  std::vector<std::int32_t> row_offsets;

  explicit grouped_product(const benchmark::State& state)
      : size{state.range(0), state.range(1), state.range(2), state.range(3)} {
    for (std::int64_t g = 0; g <= size.groups; ++g) row_offsets.push_back(static_cast<std::int32_t>(g * size.rows));
  }
  std::int64_t rows() const { return size.groups * size.rows; }
  std::size_t elements(std::int64_t per_group) const { return static_cast<std::size_t>(size.groups * per_group); }
  double flops() const { return 2.0 * static_cast<double>(rows() * size.n * size.k); }
};

// y = x w^T + bias, storage S throughout. With `in_out` the weights are [k, n] in memory, otherwise [n, k].
template <class Gemm, class S, bool InOut>
void variable_m(benchmark::State& state) {
  const grouped_product p(state);
  const auto [groups, rows, n, k] = p.size;
  const auto x = tessera_bench::normal<S>(p.elements(rows * k));
  const auto w = tessera_bench::normal<S>(p.elements(n * k));
  const auto bias = tessera_bench::normal<S>(p.elements(n));
  std::vector<S> y(p.elements(rows * n));
  const row_operand<S> a{x.data(), k};
  const group_operand<const S> b{w.data(), n * k, InOut ? 1 : k, InOut ? n : 1};
  for (auto _ : state) {
    Gemm::template variable_m<float>(p.row_offsets, n, k, a, b, bias.data(), ts::matrix_view<S>(y.data(), p.rows(), n));
    benchmark::ClobberMemory();
  }
  tessera_bench::report_rates(state, p.flops(), static_cast<double>((x.size() + w.size() + y.size()) * sizeof(S)));
}

// dw = dy^T x, storage S, gradients in float.
template <class Gemm, class S>
void variable_k(benchmark::State& state) {
  const grouped_product p(state);
  const auto [groups, rows, n, k] = p.size;
  const auto x = tessera_bench::normal<S>(p.elements(rows * k));
  const auto dy = tessera_bench::normal<S>(p.elements(rows * n));
  std::vector<float> dw(p.elements(n * k));
  for (auto _ : state) {
    Gemm::template variable_k<float>(p.row_offsets, n, k, row_operand<S>{dy.data(), n}, row_operand<S>{x.data(), k},
                                     group_operand<float>{dw.data(), n * k, k, 1}, ts::write::overwrite);
    benchmark::ClobberMemory();
  }
  tessera_bench::report_rates(state, p.flops(),
                              static_cast<double>((x.size() + dy.size()) * sizeof(S) + dw.size() * sizeof(float)));
}

void add(const std::string& name, void (*function)(benchmark::State&)) {
  auto* const bench = benchmark::RegisterBenchmark(name.c_str(), function);
  bench->ArgNames({"groups", "rows", "n", "k"});
  for (const auto& size : tessera_bench::gemm_sizes) bench->Args({size.groups, size.rows, size.n, size.k});
}

template <class Gemm, class S>
void add_all(const std::string& backend_and_type) {
  add("variable_m<" + backend_and_type + ">", variable_m<Gemm, S, false>);
  add("variable_m_in_out<" + backend_and_type + ">", variable_m<Gemm, S, true>);
  add("variable_k<" + backend_and_type + ">", variable_k<Gemm, S>);
}

const bool added = [] {
  add_all<ts::gemm::reference, float>("reference,float");
  add_all<ts::gemm::reference, ts::bfloat16>("reference,bfloat16");
#if defined(TESSERA_HAS_CBLAS)
  add_all<ts::gemm::blas, float>("blas,float");
#endif
  return true;
}();

}  // namespace

TESSERA_BENCHMARK_MAIN()
