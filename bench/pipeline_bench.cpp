// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The executor over threads against the simulator: the time of a training step of every schedule, measured and as
// `simulate` predicts it from the times of the stages. Counters: predicted_ms, and measured over predicted.
//
// `waiting` stages sleep instead of computing, so that ranks wait for each other as they would with a processor each,
// however few there are; their overlapped pairs run on two threads. `products` stages compute (gemm::reference) and
// need a processor for each rank: where there are fewer, the prediction is at least the work divided by the processors
// (counter processors_bound is 1 where that is the larger).

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <tessera/comm/comm.hpp>
#include <tessera/gemm/reference.hpp>
#include <tessera/pipeline/executor.hpp>
#include <tessera/pipeline/overlap.hpp>
#include <tessera/pipeline/schedules.hpp>
#include <tessera/pipeline/simulator.hpp>

#include "context.hpp"
#include "defaults.hpp"

namespace {

namespace ts = tessera;
namespace pl = tessera::pipeline;
using clock_type = std::chrono::steady_clock;
using ts::comm::threads;

constexpr int num_stages = 4;
constexpr int num_micro_batches = 12;
constexpr std::int64_t rows = 256;
constexpr std::int64_t width = 512;

std::int64_t ns_since(clock_type::time_point begin) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(clock_type::now() - begin).count();
}

// A layer whose phases sleep: 1 ms of computation each, and a time of its own for communication.
struct waiting_chunk {
  using element = float;
  static constexpr std::int64_t compute_ns = 1000000;
  int layers = 1;
  std::int64_t communication_ns = compute_ns;

  int num_layers() const { return layers; }
  static void wait(std::int64_t ns) { std::this_thread::sleep_for(std::chrono::nanoseconds(ns)); }
  void forward_attention(const auto&) { wait(compute_ns); }
  void forward_dispatch(const auto&) { wait(communication_ns); }
  void forward_mlp(const auto&) { wait(compute_ns); }
  void forward_combine(const auto&) { wait(communication_ns); }
  void backward_combine(const auto&) { wait(communication_ns); }
  void backward_mlp_input(const auto&) { wait(compute_ns); }
  void backward_mlp_weights(const auto&) { wait(compute_ns); }
  void backward_dispatch(const auto&) { wait(communication_ns); }
  void backward_attention_input(const auto&) { wait(compute_ns); }
  void backward_attention_weights(const auto&) { wait(compute_ns); }
};
using waiting_stage = pl::overlap_stage<waiting_chunk, pl::host_lanes>;

// y = x W^T, twice.
struct product_stage {
  using element = float;
  std::vector<float> weight = tessera_bench::normal<float>(static_cast<std::size_t>(width * width), 0.05F);
  std::vector<float> gradient = std::vector<float>(static_cast<std::size_t>(width * width));
  std::vector<float> input = tessera_bench::normal<float>(static_cast<std::size_t>(rows * width));  // of the first
  std::vector<float> scratch = std::vector<float>(static_cast<std::size_t>(rows * width));

  static void multiply(ts::matrix_view<const float> a, const std::vector<float>& w, bool transposed,
                       ts::matrix_view<float> c) {
    const std::array<std::int32_t, 2> all{0, static_cast<std::int32_t>(a.rows)};
    const auto b = transposed ? ts::gemm::group_operand<const float>{w.data(), 0, 1, width}
                              : ts::gemm::group_operand<const float>{w.data(), 0, width, 1};
    ts::gemm::reference::variable_m<float>(all, width, width, ts::gemm::row_operand<const float>{a.data, a.stride}, b,
                                           nullptr, c);
  }
  ts::matrix_view<float> or_scratch(ts::matrix_view<float> v) {
    return v.cols > 0 ? v : ts::matrix_view<float>{scratch.data(), v.rows, width};
  }
  ts::matrix_view<const float> or_input(ts::matrix_view<const float> v) const {
    return v.cols > 0 ? v : ts::matrix_view<const float>{input.data(), v.rows, width};
  }
  void forward(ts::host_stream, const pl::work_item&, ts::matrix_view<const float> x, ts::matrix_view<float> y) {
    multiply(or_input(x), weight, false, or_scratch(y));
  }
  void backward_input(ts::host_stream, const pl::work_item&, ts::matrix_view<const float>,
                      ts::matrix_view<const float> dy, ts::matrix_view<float> dx) {
    multiply(or_input(dy), weight, true, or_scratch(dx));
  }
  void backward_weights(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float> x,
                        ts::matrix_view<const float> dy) {
    const std::array<std::int32_t, 2> all{0, static_cast<std::int32_t>(item.rows)};
    x = or_input(x);
    dy = or_input(dy);
    ts::gemm::reference::variable_k<float>(all, width, width, ts::gemm::row_operand<const float>{dy.data, dy.stride},
                                           ts::gemm::row_operand<const float>{x.data, x.stride},
                                           ts::gemm::group_operand<float>{gradient.data(), 0, width, 1},
                                           item.gradient_mode);
  }
};

// Median time of a call.
template <class F>
std::int64_t median_ns(F&& f) {
  std::vector<std::int64_t> times;
  for (int i = 0; i < 15; ++i) {
    const auto begin = clock_type::now();
    f();
    times.push_back(ns_since(begin));
  }
  std::nth_element(times.begin(), times.begin() + 7, times.end());
  return times[7];
}

// Stages of every rank, chunk by chunk.
template <class Stage>
using stages_of_ranks = std::vector<std::vector<std::unique_ptr<Stage>>>;

// One step of every rank; the time from the first start to the last end.
template <class Stage>
std::int64_t step_ns(const pl::schedule& s, const stages_of_ranks<Stage>& all_stages) {
  std::vector<std::int64_t> took(static_cast<std::size_t>(s.num_ranks));
  const std::vector<std::int64_t> all_rows(static_cast<std::size_t>(s.num_micro_batches), rows);
  threads::run(s.num_ranks, [&](threads& comm) {
    const pl::executor_options options{rows, width};
    ts::host_buffer memory(pl::executor<threads, float>::activation_bytes(pl::plan_execution(s, comm.rank()), options));
    pl::executor<threads, float> runner(s, comm, memory, options);
    std::vector<Stage*> stages;
    for (const auto& stage : all_stages[static_cast<std::size_t>(comm.rank())]) stages.push_back(stage.get());
    comm.barrier(ts::host_stream{});
    const auto begin = clock_type::now();
    runner.run({}, std::span<Stage* const>(stages), all_rows);
    took[static_cast<std::size_t>(comm.rank())] = ns_since(begin);
  });
  return *std::max_element(took.begin(), took.end());
}

// The measured loop of a case: steps over `stages`, and what they take against the prediction.
template <class Stage>
void measure_steps(benchmark::State& state, const pl::schedule& s, const stages_of_ranks<Stage>& stages,
                   std::int64_t predicted) {
  std::int64_t measured = 0;
  std::int64_t steps = 0;
  for (auto _ : state) {
    const std::int64_t took = step_ns(s, stages);
    state.SetIterationTime(static_cast<double>(took) * 1e-9);
    measured += took;
    ++steps;
  }
  const std::int64_t mean = measured / std::max<std::int64_t>(steps, 1);
  state.counters["predicted_ms"] = static_cast<double>(predicted) * 1e-6;
  state.counters["measured/predicted"] = static_cast<double>(mean) / static_cast<double>(predicted);
}

void waiting(benchmark::State& state, const char* name) {
  const pl::schedule s = pl::named_schedule(name, num_stages, num_micro_batches);
  // What a sleep takes beyond its time belongs to the stage, not to the pipeline.
  const std::int64_t phase = median_ns([] { waiting_chunk::wait(waiting_chunk::compute_ns); });
  std::array<std::int64_t, pl::num_phases> times;
  times.fill(phase);
  pl::costs costs;
  costs.stages = {{.forward = 4 * phase,
                   .backward = 6 * phase,
                   .backward_input = 4 * phase,
                   .backward_weights = 2 * phase,
                   .overlapped = pl::estimate_overlap(pl::make_overlap_order(1, 1), times).time}};
  const std::int64_t predicted = pl::simulate(s, costs, pl::messages::rendezvous).makespan;
  std::vector<std::unique_ptr<pl::host_lanes>> lanes;
  stages_of_ranks<waiting_stage> stages(static_cast<std::size_t>(s.num_ranks));
  waiting_chunk chunk;
  for (auto& rank : stages) {
    lanes.push_back(std::make_unique<pl::host_lanes>());
    for (int i = 0; i < s.num_chunks; ++i) rank.push_back(std::make_unique<waiting_stage>(chunk, *lanes.back()));
  }
  measure_steps(state, s, stages, predicted);
}

void products(benchmark::State& state, const char* name) {
  const pl::schedule s = pl::named_schedule(name, num_stages, num_micro_batches);
  product_stage probe;
  std::vector<float> x(static_cast<std::size_t>(rows * width)), y = x;
  const ts::matrix_view<float> in{x.data(), rows, width}, out{y.data(), rows, width};
  const pl::work_item item{.rows = rows};
  const std::int64_t forward = median_ns([&] { probe.forward({}, item, in, out); });
  const std::int64_t input = median_ns([&] { probe.backward_input({}, item, in, in, out); });
  const std::int64_t weights = median_ns([&] { probe.backward_weights({}, item, in, in); });
  pl::costs costs;
  costs.stages = {{.forward = forward,
                   .backward = input + weights,
                   .backward_input = input,
                   .backward_weights = weights,
                   .overlapped = forward + input + weights}};
  const std::int64_t simulated = pl::simulate(s, costs, pl::messages::rendezvous).makespan;
  const auto processors = static_cast<std::int64_t>(std::max(1U, std::thread::hardware_concurrency()));
  const std::int64_t work = num_stages * num_micro_batches * (forward + input + weights);
  const std::int64_t predicted = std::max(simulated, work / processors);
  stages_of_ranks<product_stage> stages(static_cast<std::size_t>(s.num_ranks));
  for (auto& rank : stages)
    for (int i = 0; i < s.num_chunks; ++i) rank.push_back(std::make_unique<product_stage>());
  measure_steps(state, s, stages, predicted);
  state.counters["processors_bound"] = work / processors > simulated ? 1 : 0;
}

// An overlapped pair against the sum of its halves, with as much communication as computation.
void pair(benchmark::State& state) {
  waiting_chunk chunk;
  chunk.layers = static_cast<int>(state.range(0));
  chunk.communication_ns = waiting_chunk::compute_ns * 6 / 4;
  pl::host_lanes lanes;
  waiting_stage stage(chunk, lanes);
  const std::int64_t alone = median_ns([&] { stage.forward({}, {}, {}, {}); }) + median_ns([&] {
                               stage.backward_input({}, {}, {}, {}, {});
                               stage.backward_weights({}, {}, {}, {});
                             });
  std::int64_t measured = 0;
  std::int64_t pairs = 0;
  for (auto _ : state) {
    const auto begin = clock_type::now();
    stage.overlapped({}, {}, {}, {}, stage, {}, {}, {}, {});
    const std::int64_t took = ns_since(begin);
    state.SetIterationTime(static_cast<double>(took) * 1e-9);
    measured += took;
    ++pairs;
  }
  const double mean = static_cast<double>(measured) / static_cast<double>(std::max<std::int64_t>(pairs, 1));
  const double communication = 4.0 * chunk.layers * static_cast<double>(chunk.communication_ns);
  state.counters["sum_ms"] = static_cast<double>(alone) * 1e-6;
  state.counters["hidden"] = (static_cast<double>(alone) - mean) / communication;
}

BENCHMARK_CAPTURE(waiting, 1f1b, "1f1b")->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(waiting, zb1p, "zb1p")->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(waiting, dualpipe, "dualpipe")->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(waiting, dualpipev, "dualpipev")->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(products, 1f1b, "1f1b")->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(products, zb1p, "zb1p")->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(products, dualpipe, "dualpipe")->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(products, dualpipev, "dualpipev")->UseManualTime()->Unit(benchmark::kMillisecond);
BENCHMARK(pair)->Arg(1)->Arg(4)->Arg(8)->UseManualTime()->Unit(benchmark::kMillisecond);

}  // namespace

TESSERA_BENCHMARK_MAIN()
