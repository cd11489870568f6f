// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Schedules over comm::nccl with stages made of kernels, one thread per GPU, on as many GPUs as there are: the
// gradients of a serial run on one GPU, bit for bit, also where a stage lies in two places; and a stage that throws.
// With one GPU the parts that need two are left out. Without a GPU or without NCCL it says so and exits with 77, which
// CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/comm/nccl.cuh>
#include <tessera/comm/self.cuh>
#include <tessera/comm/threads.hpp>
#include <tessera/pipeline/executor.hpp>
#include <tessera/pipeline/mirrored_gradients.cuh>
#include <tessera/pipeline/schedules.hpp>

#include "../support/comm_checks.hpp"

namespace {

namespace ts = tessera;
namespace pl = tessera::pipeline;
using comm_checks::require;
using comm_checks::same_bits;
using device_test::num_gpus;
using device_test::on_ranks;
using nccl = ts::comm::nccl;
using threads = ts::comm::threads;
using self = ts::comm::self<ts::space::device>;
using std::chrono::milliseconds;

constexpr std::int64_t width = 48;
constexpr std::int64_t max_rows = 70;
constexpr std::int64_t num_parameters = width * width;

// Any number that looks random, the same everywhere.
__device__ float noise(unsigned long long seed, unsigned long long i) {
  unsigned long long z = (seed + 1) * 0x9e3779b97f4a7c15ULL + i * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return static_cast<float>(static_cast<int>((z ^ (z >> 31)) >> 40) - (1 << 23)) / static_cast<float>(1 << 23);
}

__global__ void fill_kernel(float* to, std::int64_t count, unsigned long long seed, float scale) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) to[i] = scale * noise(seed, static_cast<unsigned long long>(i));
}

// y = p / (1 + |p|) with p = x W^T; p stays for the backward.
__global__ void forward_kernel(const float* x, const float* weight, float* pre, float* y, std::int64_t rows) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * width) return;
  const std::int64_t r = i / width, c = i % width;
  float sum = 0;
  for (std::int64_t j = 0; j < width; ++j) sum = fmaf(x[r * width + j], weight[c * width + j], sum);
  pre[i] = sum;
  if (y != nullptr) y[i] = sum / (1.0f + fabsf(sum));
}

// dp = dy / (1 + |p|)^2; the last stage's dy is its output less a target.
__global__ void derivative_kernel(const float* pre, const float* dy, float* dpre, std::int64_t rows, int micro_batch) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * width) return;
  const float p = pre[i], d = 1.0f + fabsf(p);
  const float g = dy != nullptr ? dy[i]
                                : p / d - noise(1000 + static_cast<unsigned long long>(micro_batch),
                                                static_cast<unsigned long long>(i));
  dpre[i] = g / (d * d);
}

__global__ void input_gradient_kernel(const float* dpre, const float* weight, float* dx, std::int64_t rows) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * width) return;
  const std::int64_t r = i / width, c = i % width;
  float sum = 0;
  for (std::int64_t j = 0; j < width; ++j) sum = fmaf(dpre[r * width + j], weight[j * width + c], sum);
  dx[i] = sum;
}

// The contribution is complete before it is added.
__global__ void weight_gradient_kernel(const float* dpre, const float* x, float* gradient, std::int64_t rows,
                                       bool add) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= num_parameters) return;
  const std::int64_t c = i / width, j = i % width;
  float sum = 0;
  for (std::int64_t r = 0; r < rows; ++r) sum = fmaf(dpre[r * width + c], x[r * width + j], sum);
  gradient[i] = add ? gradient[i] + sum : sum;
}

unsigned blocks_for(std::int64_t count) { return static_cast<unsigned>((count + 127) / 128); }

class kernel_stage {
 public:
  using element = float;

  kernel_stage(int stage, int num_stages, int slots, int gradient_rows)
      : gradients(static_cast<std::size_t>(gradient_rows * num_parameters)),
        stage_(stage),
        last_(stage + 1 == num_stages),
        weight_(static_cast<std::size_t>(num_parameters)),
        saved_(static_cast<std::size_t>(slots * 3 * max_rows * width)) {
    fill_kernel<<<blocks_for(num_parameters), 128>>>(weight_.data(), num_parameters,
                                                     static_cast<unsigned long long>(stage), 0.3f);
    device_test::synchronize();
  }

  void forward(ts::device_stream stream, const pl::work_item& item, ts::matrix_view<const float> x,
               ts::matrix_view<float> y) {
    enter(item, pl::action_kind::forward);
    if (item.rows == 0) return;
    if (stage_ == 0) {
      fill_kernel<<<blocks_for(item.rows * width), 128, 0, stream.get()>>>(
          input(item), item.rows * width, 500 + static_cast<unsigned long long>(item.micro_batch), 1.0f);
    }
    forward_kernel<<<blocks_for(item.rows * width), 128, 0, stream.get()>>>(
        stage_ == 0 ? input(item) : x.data, weight_.data(), pre(item), last_ ? nullptr : y.data, item.rows);
    device_test::require(cudaGetLastError(), "forward_kernel");
  }
  void backward_input(ts::device_stream stream, const pl::work_item& item, ts::matrix_view<const float>,
                      ts::matrix_view<const float> dy, ts::matrix_view<float> dx) {
    enter(item, pl::action_kind::backward_input);
    if (item.rows == 0) return;
    derivative_kernel<<<blocks_for(item.rows * width), 128, 0, stream.get()>>>(pre(item), last_ ? nullptr : dy.data,
                                                                               dpre(item), item.rows, item.micro_batch);
    if (stage_ > 0) {
      input_gradient_kernel<<<blocks_for(item.rows * width), 128, 0, stream.get()>>>(dpre(item), weight_.data(),
                                                                                     dx.data, item.rows);
    }
    device_test::require(cudaGetLastError(), "input_gradient_kernel");
  }
  void backward_weights(ts::device_stream stream, const pl::work_item& item, ts::matrix_view<const float> x,
                        ts::matrix_view<const float>) {
    enter(item, pl::action_kind::backward_weights);
    weight_gradient_kernel<<<blocks_for(num_parameters), 128, 0, stream.get()>>>(
        dpre(item), stage_ == 0 ? input(item) : x.data, gradients.data() + item.gradient_row * num_parameters,
        item.rows, item.gradient_mode == ts::write::accumulate);
    device_test::require(cudaGetLastError(), "weight_gradient_kernel");
  }

  device_test::buffer<float> gradients;                               // [rows, num_parameters]
  std::function<void(const pl::work_item&, pl::action_kind)> before;  // called first, may throw

 private:
  void enter(const pl::work_item& item, pl::action_kind kind) {
    if (before) before(item, kind);
    require(item.stage == stage_, "a call for another stage");
  }
  float* input(const pl::work_item& item) { return saved_.data() + item.slot * 3 * max_rows * width; }
  float* pre(const pl::work_item& item) { return input(item) + max_rows * width; }
  float* dpre(const pl::work_item& item) { return pre(item) + max_rows * width; }

  int stage_;
  bool last_;
  device_test::buffer<float> weight_;
  device_test::buffer<float> saved_;
};

std::vector<std::int64_t> ragged_rows(int micro_batches) {
  std::vector<std::int64_t> rows;
  for (int m = 0; m < micro_batches; ++m) rows.push_back((m * 29 + 33) % (max_rows + 1));
  if (micro_batches > 2) rows[2] = 0;
  return rows;
}

std::vector<float> first_row(const kernel_stage& stage) {
  auto all = stage.gradients.get();
  all.resize(static_cast<std::size_t>(num_parameters));
  return all;
}

// One micro-batch after another through all stages: the gradients of each stage.
std::vector<std::vector<float>> serial_gradients(int num_stages, const std::vector<std::int64_t>& rows) {
  const cudaStream_t stream = device_test::make_stream();
  std::vector<std::unique_ptr<kernel_stage>> stages;
  std::vector<std::unique_ptr<device_test::buffer<float>>> x, dx;
  for (int s = 0; s <= num_stages; ++s) {
    if (s < num_stages) stages.push_back(std::make_unique<kernel_stage>(s, num_stages, 1, 1));
    x.push_back(std::make_unique<device_test::buffer<float>>(static_cast<std::size_t>(max_rows * width)));
    dx.push_back(std::make_unique<device_test::buffer<float>>(static_cast<std::size_t>(max_rows * width)));
  }
  device_test::synchronize();
  for (int m = 0; m < static_cast<int>(rows.size()); ++m) {
    const std::int64_t n = rows[static_cast<std::size_t>(m)];
    const auto view = [&](const auto& b) { return ts::matrix_view<float>(b->data(), n, width); };
    const auto item = [&](int s) {
      return pl::work_item{.stage = s,
                           .micro_batch = m,
                           .rows = n,
                           .gradient_mode = m == 0 ? ts::write::overwrite : ts::write::accumulate};
    };
    for (int s = 0; s < num_stages; ++s) {
      const auto i = static_cast<std::size_t>(s);
      stages[i]->forward(stream, item(s), view(x[i]), view(x[i + 1]));
    }
    for (int s = num_stages - 1; s >= 0; --s) {
      const auto i = static_cast<std::size_t>(s);
      stages[i]->backward_input(stream, item(s), view(x[i]), view(dx[i + 1]), view(dx[i]));
      stages[i]->backward_weights(stream, item(s), view(x[i]), view(dx[i + 1]));
    }
  }
  device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  std::vector<std::vector<float>> result;
  for (const auto& stage : stages) result.push_back(first_row(*stage));
  device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return result;
}

// One rank of a pipeline; everything is allocated before GPUs wait for one another.
template <class Comm>
struct pipeline_rank {
  pipeline_rank(const pl::schedule& s_, Comm& comm_)
      : s(s_),
        comm(comm_),
        options{max_rows, width},
        plan(pl::plan_execution(s_, comm_.rank(), options.order)),
        memory(pl::executor<Comm, float>::activation_bytes(plan, options)),
        workspace(pl::sum_mirrored_gradients_workspace_bytes<float>(s_, options.order, block)),
        runner(s_, comm_, {memory.data(), memory.size()}, options),
        stream(device_test::make_stream()) {
    for (int chunk = 0; chunk < s.num_chunks; ++chunk) {
      const auto c = static_cast<std::size_t>(chunk);
      stages.push_back(std::make_unique<kernel_stage>(s.stage_of(comm.rank(), chunk), s.num_stages, plan.saved_slots[c],
                                                      plan.gradient_rows[c]));
    }
    device_test::synchronize();
  }
  ~pipeline_rank() {
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  }
  pipeline_rank(const pipeline_rank&) = delete;
  pipeline_rank& operator=(const pipeline_rank&) = delete;

  void run(const std::vector<std::int64_t>& rows) {
    std::vector<kernel_stage*> list;
    std::vector<pl::stage_gradients<float>> gradients;
    for (auto& stage : stages) {
      list.push_back(stage.get());
      gradients.push_back({stage->gradients.data(), num_parameters});
    }
    runner.run(stream, std::span<kernel_stage* const>(list), rows);
    pl::sum_mirrored_gradients<Comm, float>(stream, comm, s, options.order, gradients,
                                            {workspace.data(), workspace.size()}, block);
  }

  static constexpr std::int64_t block = 1000;  // several blocks, the last one shorter
  const pl::schedule& s;
  Comm& comm;
  pl::executor_options options;
  pl::execution_plan plan;
  device_test::buffer<std::byte> memory;
  device_test::buffer<std::byte> workspace;
  pl::executor<Comm, float> runner;
  cudaStream_t stream;
  std::vector<std::unique_ptr<kernel_stage>> stages;
};

template <class Comm>
void check_gradients(const pl::schedule& s, const pipeline_rank<Comm>& rank,
                     const std::vector<std::vector<float>>& serial) {
  for (int chunk = 0; chunk < s.num_chunks; ++chunk) {
    const int stage = s.stage_of(rank.comm.rank(), chunk);
    require(
        same_bits(first_row(*rank.stages[static_cast<std::size_t>(chunk)]), serial[static_cast<std::size_t>(stage)]),
        s.name, ", ", s.num_micro_batches, " micro-batches, rank ", rank.comm.rank(), ": the gradient of stage ", stage,
        " is not that of the serial run");
  }
}

std::vector<pl::schedule> schedules_for(int ranks) {
  std::vector<pl::schedule> list{pl::one_f_one_b(ranks, 2 * ranks + 3), pl::one_f_one_b(ranks, 1),
                                 pl::zb1p(ranks, 2 * ranks + 3), pl::dualpipev(ranks, 2 * ranks),
                                 pl::dualpipev(ranks, 2 * ranks + 5)};
  if (ranks % 2 == 0) {
    list.push_back(pl::dualpipe(ranks, 2 * ranks));
    list.push_back(pl::dualpipe(ranks, 2 * ranks + 6));
  }
  return list;
}

TEST_CASE("every schedule over NCCL has the gradients of a serial run, bit for bit, step after step") {
  std::vector<int> counts{1};
  for (const int n : {2, 4, 8}) {
    if (num_gpus() >= n) counts.push_back(n);
  }
  for (const int ranks : counts) {
    CAPTURE(ranks);
    const auto schedules = schedules_for(ranks);
    std::vector<std::vector<std::vector<float>>> serial;
    device_test::require(cudaSetDevice(0), "cudaSetDevice");
    for (const pl::schedule& s : schedules) {
      serial.push_back(serial_gradients(s.num_stages, ragged_rows(s.num_micro_batches)));
    }
    CHECK_NOTHROW(on_ranks(ranks, [&](threads& t) {
      nccl c = nccl::create(t);
      for (std::size_t i = 0; i < schedules.size(); ++i) {
        pipeline_rank<nccl> rank(schedules[i], c);
        t.barrier({});
        for (int step = 0; step < 2; ++step) {
          rank.run(ragged_rows(schedules[i].num_micro_batches));
          c.wait(rank.stream);
          check_gradients(schedules[i], rank, serial[i]);
          for (auto& stage : rank.stages) stage->gradients.fill(0xff);
          device_test::synchronize();
          t.barrier({});
        }
      }
    }));
  }
}

TEST_CASE("a rank alone runs its stages without NCCL, and its step can be captured") {
  self alone;
  for (const pl::schedule& s : {pl::one_f_one_b(1, 3), pl::dualpipev(1, 5)}) {
    CAPTURE(s.name);
    const auto rows = ragged_rows(s.num_micro_batches);
    const auto serial = serial_gradients(s.num_stages, rows);
    pipeline_rank<self> rank(s, alone);
    rank.run(rows);
    CHECK(cudaStreamSynchronize(rank.stream) == cudaSuccess);
    CHECK_NOTHROW(check_gradients(s, rank, serial));
    for (auto& stage : rank.stages) stage->gradients.fill(0xff);
    device_test::synchronize();
    cudaGraphExec_t graph = device_test::capture(rank.stream, [&] { rank.run(rows); });
    for (int replay = 0; replay < 2; ++replay) {
      device_test::require(cudaGraphLaunch(graph, rank.stream), "cudaGraphLaunch");
      device_test::require(cudaStreamSynchronize(rank.stream), "cudaStreamSynchronize");
      CHECK_NOTHROW(check_gradients(s, rank, serial));
    }
    device_test::require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
  }
}

TEST_CASE("many rows are added in their order, whichever of them the result lies in") {
  constexpr std::int64_t size = 1003;
  for (const std::size_t count : {1U, 2U, 63U, 64U, 65U, 130U, 200U}) {
    CAPTURE(count);
    const auto values = device_test::normal(count * size, 7);
    std::vector<float> expected(values.begin(), values.begin() + size);
    for (std::size_t k = 1; k < count; ++k) {
      for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += values[k * size + i];
    }
    for (const std::size_t place : {std::size_t{0}, count / 2, count - 1}) {
      device_test::buffer<float> rows(values);
      device_test::buffer<float> sum(size);
      std::vector<const float*> list;
      for (std::size_t k = 0; k < count; ++k) list.push_back(rows.data() + k * size);
      device_test::synchronize();
      const cudaStream_t stream = device_test::make_stream();
      pl::detail::sum_rows<float>(stream, list, size, sum.data(), rows.data() + place * size);
      device_test::require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      const auto all = rows.get();
      CHECK(std::memcmp(all.data() + place * size, expected.data(), size * sizeof(float)) == 0);
      device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
    }
  }
}

TEST_CASE("a stage that throws ends the step on every rank, and a new communicator goes on") {
  if (num_gpus() < 2) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  const pl::schedule s = pl::dualpipe(2, 6);
  const auto rows = ragged_rows(s.num_micro_batches);
  const auto serial = serial_gradients(s.num_stages, rows);
  std::vector<std::string> said(2);
  CHECK_NOTHROW(on_ranks(2, [&](threads& t) {
    {
      nccl c = nccl::create(t, {.timeout = milliseconds(20000)});
      pipeline_rank<nccl> rank(s, c);
      t.barrier({});
      rank.run(rows);  // connects the GPUs
      c.wait(rank.stream);
      t.barrier({});
      if (t.rank() == 1) {
        for (auto& stage : rank.stages) {
          stage->before = [](const pl::work_item& item, pl::action_kind kind) {
            if (item.micro_batch == 1 && kind == pl::action_kind::backward_input) throw std::runtime_error("refused");
          };
        }
      }
      try {
        rank.run(rows);
        c.wait(rank.stream, milliseconds(2000));
      } catch (const pl::stage_error& e) {
        said[static_cast<std::size_t>(t.rank())] = std::string("stage_error ") + e.what();
      } catch (const ts::error& e) {  // by timeout, or because NCCL saw the other side go
        said[static_cast<std::size_t>(t.rank())] = std::string("error ") + e.what();
      }
      require(c.failed(), "the communicator is given up on every rank");
      require(cudaStreamSynchronize(rank.stream) == cudaSuccess, "the stream ends and the context lives");
      t.barrier({});
    }
    nccl again = nccl::create(t);
    pipeline_rank<nccl> rank(s, again);
    t.barrier({});
    rank.run(rows);
    again.wait(rank.stream);
    check_gradients(s, rank, serial);
    t.barrier({});
  }));
  CHECK_MESSAGE(said[0].find("error ") == 0, said[0]);
  CHECK_MESSAGE(said[1].find("stage_error") == 0, said[1]);
  CHECK_MESSAGE(said[1].find("micro-batch 1, in backward_input: refused") != std::string::npos, said[1]);
}

}  // namespace

#endif
