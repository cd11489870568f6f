// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Dispatch and combine on the host: rows to their experts and back. Times are those of the slowest rank; ranks are
// threads.

#include <type_traits>
#include <vector>

#include <tessera/comm/comm.hpp>
#include <tessera/layout/layout.hpp>

#include "../tests/support/dispatch_fixture.hpp"
#include "../tests/support/routing_cases.hpp"
#include "context.hpp"
#include "defaults.hpp"
#include "rank_loop.hpp"

namespace {

namespace ts = tessera;
using namespace tessera_test;

constexpr int num_experts = 64;
constexpr int top_k = 6;
constexpr std::int64_t hidden = 1024;

// Runs `work(rank)` on all ranks once per iteration and reports the slowest rank's time.
template <class Combine, class Work>
void run_case(benchmark::State& bench, double& bytes, Work&& work) {
  const int ranks = static_cast<int>(bench.range(0));
  const std::int64_t tokens = bench.range(1);
  auto batch = make_routing<float>(tokens * ranks, num_experts, top_k, skew::uniform, 1);
  tessera_bench::rank_loop loop(bench, ranks);
  bytes = 0;
  ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
    dispatch_rank<ts::layout::block, float, float, Combine> rank(ts::layout::block(num_experts, ranks), comm.rank(),
                                                                 top_k, tokens, hidden,
                                                                 {.row_bound = ts::dispatch_options::full_row_bound});
    const auto chosen = batch.part(comm.rank() * tokens, tokens);
    std::vector<float> x(static_cast<std::size_t>(tokens * hidden), 1.0F);
    rank.exchange(comm, chosen);
    std::vector<float> pairs(static_cast<std::size_t>(rank.handle.total->received_pairs * hidden), 1.0F);
    std::vector<float> y(x.size());
    loop.run(comm, [&] {
      const double moved = work(rank, comm, chosen, x, pairs, y);
      if (comm.rank() == 0) bytes = moved;
    });
  });
}

void report(benchmark::State& bench, double bytes_per_rank) {
  bench.counters["bytes"] =
      benchmark::Counter(bytes_per_rank * static_cast<double>(bench.range(0)),
                         benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1024);
  bench.counters["tokens"] = benchmark::Counter(static_cast<double>(bench.range(0) * bench.range(1)),
                                                benchmark::Counter::kIsIterationInvariantRate);
}

// Bytes: rows read and written by packing, and written once more where they arrive.
void dispatch(benchmark::State& bench) {
  double bytes = 0;
  run_case<ts::combine::reduced>(bench, bytes, [](auto& rank, auto& comm, const auto&, auto& x, auto&, auto&) {
    rank.dispatch(comm, {x.data(), static_cast<std::int64_t>(x.size()) / hidden, hidden});
    return static_cast<double>(rank.handle.sent_row_offsets[comm.size()]) * hidden * sizeof(float) * 4;
  });
  report(bench, bytes);
}

// Bytes: counts, slots and weights of the pairs.
void exchange_routing(benchmark::State& bench) {
  double bytes = 0;
  run_case<ts::combine::reduced>(bench, bytes, [](auto& rank, auto& comm, const auto& chosen, auto&, auto&, auto&) {
    rank.exchange(comm, chosen);
    return static_cast<double>(rank.handle.total->received_pairs) * 12;
  });
  report(bench, bytes);
}

// Bytes: every pair's row read once, returned rows written and read, sums written.
template <class Combine>
void combine(benchmark::State& bench) {
  double bytes = 0;
  run_case<Combine>(bench, bytes, [](auto& rank, auto& comm, const auto& chosen, auto&, auto& pairs, auto& y) {
    const ts::matrix_view<const float> from{pairs.data(), rank.handle.total->received_pairs, hidden};
    ts::combine_begin<Combine>({}, comm, rank.handle, ts::combine_weights::routing, from, rank.sums);
    ts::combine_end<Combine>({}, comm, rank.handle, ts::combine_weights::routing, from,
                             ts::matrix_view<const float>(chosen.weights),
                             ts::matrix_view<float>{y.data(), chosen.weights.rows, hidden}, rank.sums);
    const bool ordered = std::is_same_v<Combine, ts::combine::ordered>;
    const double returned = static_cast<double>(ordered ? rank.handle.sent_pair_offsets[comm.size()]
                                                        : rank.handle.sent_row_offsets[comm.size()]);
    const double rows = static_cast<double>(rank.handle.total->received_pairs) + (comm.size() == 1 ? 0 : 4 * returned) +
                        static_cast<double>(chosen.weights.rows);
    return rows * hidden * sizeof(float);
  });
  report(bench, bytes);
}

void axes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"ranks", "tokens"})->UseManualTime()->Unit(benchmark::kMicrosecond);
  for (const int ranks : {1, 2}) b->Args({ranks, 1024});
}

BENCHMARK(exchange_routing)->Apply(axes);
BENCHMARK(dispatch)
    ->ArgNames({"ranks", "tokens"})
    ->Args({2, 1024})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);  // one rank moves nothing
BENCHMARK(combine<ts::combine::reduced>)->Name("combine<reduced>")->Apply(axes);
BENCHMARK(combine<ts::combine::ordered>)->Name("combine<ordered>")->Apply(axes);

}  // namespace

TESSERA_BENCHMARK_MAIN()
