// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The whole layer on the host. Counted flops: 6TKnd forward, 12TKnd backward (gated experts); the gate is not counted.

#include <string>

#include <tessera/gemm/gemm.hpp>
#if defined(TESSERA_HAS_CBLAS)
#include <tessera/gemm/blas.hpp>
#endif

#include "../tests/support/layer_fixture.hpp"
#include "context.hpp"
#include "defaults.hpp"
#include "rank_loop.hpp"

namespace {

using namespace tessera_test;

using router = ts::router<ts::score::sigmoid, ts::select::top_k, ts::weigh::normalized, ts::balance::bias>;

template <class Precision, class Gemm, class Combine>
using layer_of =
    ts::moe_layer<router, ts::experts<ts::activation::swiglu, Precision, ts::weight_layout::out_in_concatenated, Gemm>,
                  ts::layout::block, ts::comm::threads, Combine>;

enum class work { forward, backward };

template <class Layer>
void layer(benchmark::State& bench, work what) {
  const int ranks = static_cast<int>(bench.range(0));
  const std::int64_t tokens = bench.range(1);  // of all ranks together
  const ts::shape sizes{.num_experts = static_cast<int>(bench.range(2)),
                        .top_k = static_cast<int>(bench.range(3)),
                        .hidden = static_cast<int>(bench.range(4)),
                        .intermediate = static_cast<int>(bench.range(5))};
  const auto problem = make_problem(sizes, tokens, true, 1);
  const std::int64_t part = tokens / ranks;
  tessera_bench::rank_loop loop(bench, ranks);
  ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
    layer_rank<Layer> rank(problem, ts::layout::block(sizes.num_experts, ranks), comm, comm.rank() * part, part, part,
                           {}, {});
    const auto forward = [&] { rank.forward(ts::pass::recompute); };
    if (what == work::forward) {
      loop.run(comm, forward);
    } else {
      loop.run(comm, forward, [&] {
        rank.backward_input();
        rank.backward_weights();
      });
    }
  });
  const double flops = (what == work::forward ? 6.0 : 12.0) * static_cast<double>(tokens * sizes.top_k) *
                       sizes.intermediate * static_cast<double>(sizes.hidden);
  bench.counters["flops"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
  bench.counters["tokens"] =
      benchmark::Counter(static_cast<double>(tokens), benchmark::Counter::kIsIterationInvariantRate);
  const double weight_bytes =
      3.0 * sizes.num_experts * sizes.hidden * sizes.intermediate * sizeof(typename Layer::storage);
  const double row_bytes = static_cast<double>(tokens * sizes.top_k) * (2 * sizes.hidden + 3 * sizes.intermediate) *
                           sizeof(typename Layer::storage);
  bench.counters["bytes"] =
      benchmark::Counter((weight_bytes + row_bytes) * (what == work::forward ? 1 : 2),
                         benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1024);
}

// The example's layer, and a slice of a real one (Qwen3-30B-A3B's experts, an eighth of them).
void axes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"ranks", "T", "E", "K", "d", "n"})->UseManualTime()->Unit(benchmark::kMillisecond);
  for (const int ranks : {1, 2}) {
    b->Args({ranks, 1536, 32, 4, 64, 64});
    b->Args({ranks, 1024, 16, 4, 2048, 768});
  }
}

template <class Layer>
void add(const char* name) {
  benchmark::RegisterBenchmark((std::string(name) + "/forward").c_str(), layer<Layer>, work::forward)->Apply(axes);
  benchmark::RegisterBenchmark((std::string(name) + "/backward").c_str(), layer<Layer>, work::backward)->Apply(axes);
}

const bool added = [] {
  add<layer_of<ts::precision::fp32, ts::gemm::reference, ts::combine::ordered>>("layer<fp32,reference,ordered>");
  add<layer_of<ts::precision::fp32, ts::gemm::reference, ts::combine::reduced>>("layer<fp32,reference,reduced>");
  add<layer_of<ts::precision::bf16, ts::gemm::reference, ts::combine::reduced>>("layer<bf16,reference,reduced>");
#if defined(TESSERA_HAS_CBLAS)
  add<layer_of<ts::precision::fp32, ts::gemm::blas, ts::combine::reduced>>("layer<fp32,blas,reduced>");
#endif
  return true;
}();

}  // namespace

TESSERA_BENCHMARK_MAIN()
