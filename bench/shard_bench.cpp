// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Sharded training state on the host: AdamW and the gradient norm against copies of the same bytes in the same run, and
// gathering and reducing a group over threads.

#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include <tessera/comm/threads.hpp>
#include <tessera/shard/shard.hpp>

#include "context.hpp"
#include "rank_loop.hpp"

namespace {

namespace ts = tessera;
namespace sh = tessera::shard;

constexpr std::int64_t num_elements = std::int64_t{1} << 24;  // far more than any cache holds

void report(benchmark::State& bench, double elements, double bytes) {
  bench.counters["elements"] = benchmark::Counter(elements, benchmark::Counter::kIsIterationInvariantRate);
  bench.counters["bytes"] =
      benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1024);
}

// The yardstick: reads and writes one byte for each byte counted.
void copy_bytes(benchmark::State& bench) {
  std::vector<char> from(static_cast<std::size_t>(num_elements) * 8, 1), to(from.size(), 2);
  for (auto _ : bench) {
    std::memcpy(to.data(), from.data(), from.size());
    benchmark::DoNotOptimize(to.data());
    benchmark::ClobberMemory();
  }
  bench.counters["bytes"] =
      benchmark::Counter(2.0 * static_cast<double>(from.size()), benchmark::Counter::kIsIterationInvariantRate,
                         benchmark::Counter::kIs1024);
}

// Bytes: gradient read, master and moments read and written, parameter written.
template <class S, class M>
void adamw(benchmark::State& bench) {
  const auto count = static_cast<std::size_t>(num_elements);
  std::vector<S> parameter(count, S{});
  std::vector<float> master(count, 0.5F), gradient(count, 1e-3F);
  std::vector<M> m(count, M{}), v(count, M{});
  const sh::adamw_tensor<S, float, M> tensor{
      parameter.data(), std::is_same_v<S, float> ? reinterpret_cast<float*>(parameter.data()) : master.data(),
      gradient.data(),  m.data(),
      v.data(),         num_elements};
  std::int64_t step = 0;
  for (auto _ : bench) {
    sh::adamw<S, float, M>({}, {}, ++step, 1e-3, 1.0, {&tensor, 1});
    benchmark::ClobberMemory();
  }
  const double each = 4 + 8 + 4.0 * sizeof(M) + (std::is_same_v<S, float> ? 0 : sizeof(S));
  report(bench, static_cast<double>(num_elements), each * static_cast<double>(num_elements));
}

// Bytes: gradient read.
void squares(benchmark::State& bench) {
  std::vector<float> gradient(static_cast<std::size_t>(num_elements));
  for (std::size_t i = 0; i < gradient.size(); ++i) gradient[i] = 1e-3F * static_cast<float>(i % 1000);
  sh::exact_sum sum;
  for (auto _ : bench) {
    sum.clear();
    sum.add_squares(gradient.data(), num_elements);
    benchmark::DoNotOptimize(sum);
  }
  report(bench, static_cast<double>(num_elements), 4.0 * static_cast<double>(num_elements));
}

// A group of 4 matrices [1024, 1024], over range(0) ranks. Elements: of the whole group, per rank.
template <class Reduction, class Work>
void run_group(benchmark::State& bench, std::int64_t chunks, double bytes_per_element, Work&& work) {
  constexpr std::int64_t side = 1024;
  const int ranks = static_cast<int>(bench.range(0));
  tessera_bench::rank_loop loop(bench, ranks);
  ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
    sh::group<ts::comm::threads> group{.name = "layer", .ranks = &comm, .chunks = chunks, .max_chunks = chunks};
    for (int i = 0; i < 4; ++i) {
      group.parameters.push_back({.name = std::to_string(i), .whole = ts::box::whole({side, side})});
    }
    const sh::group_shape shape = sh::shape_of(group);
    const auto sizes = sh::memory_of<ts::precision::bf16, float, Reduction>({&shape, 1}, {});
    ts::host_buffer state(sizes.state()), step(sizes.step());
    sh::fully_sharded<ts::precision::bf16, float, Reduction, ts::comm::threads> model(
        {group}, {}, ts::state_memory(state), sh::step_memory(step));
    loop.run(comm, [&] { work(model); });
  });
  const auto elements = static_cast<double>(4 * side * side);
  report(bench, elements, elements * bytes_per_element);
}

// Bytes: bf16, received and copied to its place.
void gather(benchmark::State& bench) {
  run_group<ts::reduction::native>(bench, 1, 2 * 2, [](auto& model) {
    model.begin_gather(0);
    model.end_gather(0);
    model.release(0);
  });
}

// Bytes: fp32, packed and received.
template <class Reduction>
void reduce(benchmark::State& bench) {
  run_group<Reduction>(bench, 1, 2 * 4, [](auto& model) {
    model.full_gradient(0, 0);
    model.reduce(0);
  });
}

void axes(benchmark::internal::Benchmark* b) {
  b->ArgName("ranks")->UseManualTime()->Unit(benchmark::kMillisecond);
  for (const int ranks : {1, 2, 4}) b->Arg(ranks);
}

BENCHMARK(copy_bytes)->Unit(benchmark::kMillisecond);
BENCHMARK(adamw<ts::bfloat16, float>)->Name("adamw<bf16, moments fp32>")->Unit(benchmark::kMillisecond);
BENCHMARK(adamw<ts::bfloat16, ts::bfloat16>)->Name("adamw<bf16, moments bf16>")->Unit(benchmark::kMillisecond);
BENCHMARK(adamw<float, float>)->Name("adamw<fp32>")->Unit(benchmark::kMillisecond);
BENCHMARK(squares)->Unit(benchmark::kMillisecond);
BENCHMARK(gather)->Apply(axes);
BENCHMARK(reduce<ts::reduction::native>)->Name("reduce<native>")->Apply(axes);
BENCHMARK(reduce<ts::reduction::ordered>)->Name("reduce<ordered>")->Apply(axes);

}  // namespace

TESSERA_BENCHMARK_MAIN()
