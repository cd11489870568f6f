// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A small language model cut into stages, run by the executor and, for comparison, by a plain loop over micro-batches.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <tessera/comm/comm.hpp>
#include <tessera/pipeline/executor.hpp>
#include <tessera/pipeline/mirrored_gradients.hpp>

#include "../support/bits.hpp"

namespace pipeline_test {

namespace ts = tessera;
namespace pl = tessera::pipeline;
using tessera_test::same_bits;

constexpr std::int64_t width = 5;
constexpr std::int64_t vocabulary = 7;
constexpr std::int64_t table_size = vocabulary * width;

// Pseudo-random numbers from a seed and a position: the same on every rank without sending anything.
inline float noise(std::uint64_t seed, std::uint64_t i) {
  std::uint64_t z = (seed + 1) * 0x9e3779b97f4a7c15ULL + i * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  z ^= z >> 31;
  return static_cast<float>(static_cast<double>(z >> 11) / 9007199254740992.0 - 0.5);
}

inline int token(int micro_batch, std::int64_t row) {
  return static_cast<int>((micro_batch * 31 + row * 17 + micro_batch * row) % vocabulary);
}

// Parameters of one stage. Embedding and head are one table, which a rank with the first and the last stage has once.
using table = std::vector<float>;

inline std::shared_ptr<table> make_table() {
  auto t = std::make_shared<table>(static_cast<std::size_t>(table_size));
  for (std::size_t i = 0; i < t->size(); ++i) (*t)[i] = noise(99, i);
  return t;
}

// Pre = x W^T, A = tanh(Pre); the first stage takes x from the table, the last adds logits = A table^T and the loss.
class model_stage {
 public:
  using element = float;

  model_stage(int stage, int num_stages, std::int64_t max_rows, int slots, int gradient_rows,
              std::shared_ptr<table> shared)
      : stage_(stage), first_(stage == 0), last_(stage + 1 == num_stages), max_rows_(max_rows), table_(shared) {
    weight_.resize(static_cast<std::size_t>(width * width));
    for (std::size_t i = 0; i < weight_.size(); ++i) weight_[i] = 2 * noise(static_cast<std::uint64_t>(stage), i);
    saved.resize(static_cast<std::size_t>(slots));
    for (auto& s : saved) s.resize(static_cast<std::size_t>(max_rows * (3 * width + vocabulary)), 1e30F);
    // [rows, weight | embedding | head]
    gradients.assign(static_cast<std::size_t>(gradient_rows * count()), std::nanf(""));
  }

  static constexpr std::int64_t count() { return width * width + 2 * table_size; }

  void forward(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float> x, ts::matrix_view<float> y) {
    enter(item, pl::action_kind::forward, x.data, y.data);
    float* in = saved_input(item);
    float* act = in + max_rows_ * width;
    float* probability = act + 2 * max_rows_ * width;
    for (std::int64_t r = 0; r < item.rows; ++r) {
      for (std::int64_t j = 0; j < width; ++j)
        in[r * width + j] =
            first_ ? (*table_)[static_cast<std::size_t>(token(item.micro_batch, r) * width + j)] : x(r, j);
      for (std::int64_t i = 0; i < width; ++i) {
        float sum = 0;
        for (std::int64_t j = 0; j < width; ++j)
          sum += weight_[static_cast<std::size_t>(i * width + j)] * in[r * width + j];
        act[r * width + i] = std::tanh(sum);
        if (!last_) y(r, i) = act[r * width + i];
      }
      if (!last_) continue;
      float total = 0;
      for (std::int64_t v = 0; v < vocabulary; ++v) {
        float sum = 0;
        for (std::int64_t j = 0; j < width; ++j)
          sum += (*table_)[static_cast<std::size_t>(v * width + j)] * act[r * width + j];
        probability[r * vocabulary + v] = std::exp(sum);
        total += probability[r * vocabulary + v];
      }
      for (std::int64_t v = 0; v < vocabulary; ++v) probability[r * vocabulary + v] /= total;
      const int target = token(item.micro_batch, r + 1);
      losses.push_back(-std::log(probability[r * vocabulary + target]));
      probability[r * vocabulary + target] -= 1;  // gradient of the logits
    }
  }

  void backward_input(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float> x,
                      ts::matrix_view<const float> dy, ts::matrix_view<float> dx) {
    enter(item, pl::action_kind::backward_input, x.data, dy.data, dx.data);
    const float* act = saved_input(item) + max_rows_ * width;
    float* dpre = saved_input(item) + 2 * max_rows_ * width;
    const float* dlogits = dpre + max_rows_ * width;
    for (std::int64_t r = 0; r < item.rows; ++r) {
      if (!first_) check(item, x.data, r);
      for (std::int64_t i = 0; i < width; ++i) {
        float da = 0;
        if (last_) {
          for (std::int64_t v = 0; v < vocabulary; ++v)
            da += dlogits[r * vocabulary + v] * (*table_)[static_cast<std::size_t>(v * width + i)];
        } else {
          da = dy(r, i);
        }
        dpre[r * width + i] = da * (1 - act[r * width + i] * act[r * width + i]);
      }
      if (first_) continue;
      for (std::int64_t j = 0; j < width; ++j) {
        float sum = 0;
        for (std::int64_t i = 0; i < width; ++i)
          sum += dpre[r * width + i] * weight_[static_cast<std::size_t>(i * width + j)];
        dx(r, j) = sum;
      }
    }
  }

  void backward_weights(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float> x,
                        ts::matrix_view<const float> dy) {
    enter(item, pl::action_kind::backward_weights, x.data, dy.data);
    const float* in = saved_input(item);
    const float* act = in + max_rows_ * width;
    const float* dpre = in + 2 * max_rows_ * width;
    const float* dlogits = dpre + max_rows_ * width;
    std::vector<float> part(static_cast<std::size_t>(count()), 0.0F);
    for (std::int64_t r = 0; r < item.rows; ++r) {
      if (!first_) check(item, x.data, r);
      for (std::int64_t i = 0; i < width; ++i)
        for (std::int64_t j = 0; j < width; ++j)
          part[static_cast<std::size_t>(i * width + j)] += dpre[r * width + i] * in[r * width + j];
      if (first_) {
        for (std::int64_t j = 0; j < width; ++j) {
          float sum = 0;
          for (std::int64_t i = 0; i < width; ++i)
            sum += dpre[r * width + i] * weight_[static_cast<std::size_t>(i * width + j)];
          part[static_cast<std::size_t>(width * width + token(item.micro_batch, r) * width + j)] += sum;
        }
      }
      if (last_) {
        for (std::int64_t v = 0; v < vocabulary; ++v)
          for (std::int64_t j = 0; j < width; ++j)
            part[static_cast<std::size_t>(width * width + table_size + v * width + j)] +=
                dlogits[r * vocabulary + v] * act[r * width + j];
      }
    }
    float* out = gradients.data() + item.gradient_row * count();
    for (std::int64_t i = 0; i < count(); ++i) {
      const float value = part[static_cast<std::size_t>(i)];
      out[i] = item.gradient_mode == ts::write::overwrite ? value : out[i] + value;
    }
    weight_order.push_back(item.micro_batch);
    std::fill_n(saved_input(item), max_rows_ * (3 * width + vocabulary), 1e30F);  // nobody may need it any more
  }

  // What a test may look at, and make happen.
  std::vector<std::vector<float>> saved;
  std::vector<float> gradients;
  std::vector<float> losses;                                          // of the last stage, in the order in which it ran
  std::vector<int> weight_order;                                      // micro-batches in the order of their weight part
  std::set<const void*> buffers;                                      // all that the executor has shown
  std::function<void(const pl::work_item&, pl::action_kind)> before;  // called first, may throw

 private:
  void enter(const pl::work_item& item, pl::action_kind kind, const void* a, const void* b, const void* c = nullptr) {
    if (before) before(item, kind);
    for (const void* p : {a, b, c})
      if (p != nullptr) buffers.insert(p);
    if (item.stage != stage_ || item.slot < 0 || item.slot >= static_cast<int>(saved.size()))
      throw std::logic_error("a call for another stage, or a slot that does not exist");
  }
  // The input must still be what forward saw.
  void check(const pl::work_item& item, const float* x, std::int64_t row) {
    for (std::int64_t j = 0; j < width; ++j)
      if (x[row * width + j] != saved_input(item)[row * width + j]) throw std::logic_error("the input has changed");
  }
  float* saved_input(const pl::work_item& item) { return saved[static_cast<std::size_t>(item.slot)].data(); }

  int stage_;
  bool first_, last_;
  std::int64_t max_rows_;
  std::shared_ptr<table> table_;
  std::vector<float> weight_;
};

inline std::vector<std::int64_t> ragged_rows(int micro_batches, std::int64_t max_rows) {
  std::vector<std::int64_t> rows;
  for (int m = 0; m < micro_batches; ++m) rows.push_back((m * 5 + 3) % (max_rows + 1));  // 0 occurs
  return rows;
}

// One micro-batch after another through all stages: the gradients [num_stages][count].
inline std::vector<std::vector<float>> serial_gradients(int num_stages, std::span<const std::int64_t> rows,
                                                        std::int64_t max_rows) {
  const auto shared = make_table();
  std::vector<model_stage> stages;
  for (int s = 0; s < num_stages; ++s) stages.emplace_back(s, num_stages, max_rows, 1, 1, shared);
  const auto size = static_cast<std::size_t>(max_rows * width);
  std::vector<std::vector<float>> x(static_cast<std::size_t>(num_stages) + 1, std::vector<float>(size));
  std::vector<std::vector<float>> dx = x;
  for (int m = 0; m < static_cast<int>(rows.size()); ++m) {
    const std::int64_t n = rows[static_cast<std::size_t>(m)];
    const auto view = [&](std::vector<float>& v) { return ts::matrix_view<float>(v.data(), n, width); };
    const auto item = [&](int s) {
      return pl::work_item{.stage = s,
                           .micro_batch = m,
                           .rows = n,
                           .gradient_mode = m == 0 ? ts::write::overwrite : ts::write::accumulate};
    };
    for (int s = 0; s < num_stages; ++s) {
      const auto i = static_cast<std::size_t>(s);
      stages[i].forward({}, item(s), view(x[i]), view(x[i + 1]));
    }
    for (int s = num_stages - 1; s >= 0; --s) {
      const auto i = static_cast<std::size_t>(s);
      stages[i].backward_input({}, item(s), view(x[i]), view(dx[i + 1]), view(dx[i]));
      stages[i].backward_weights({}, item(s), view(x[i]), view(dx[i + 1]));
    }
  }
  std::vector<std::vector<float>> result;
  for (auto& s : stages) result.push_back(s.gradients);
  return result;
}

// One rank of a pipeline.
template <class Comm>
struct pipeline_rank {
  pipeline_rank(const pl::schedule& s_, Comm& comm_, std::int64_t max_rows,
                pl::gradient_order order = pl::gradient_order::micro_batch)
      : s(s_), comm(comm_), options{max_rows, width, order} {
    const pl::execution_plan plan = pl::plan_execution(s, comm.rank(), order);
    memory = ts::host_buffer(pl::executor<Comm, float>::activation_bytes(plan, options));
    std::fill_n(memory.data(), memory.size(), std::byte{0xff});
    runner = std::make_unique<pl::executor<Comm, float>>(s, comm, memory, options);
    const auto shared = make_table();
    for (int chunk = 0; chunk < s.num_chunks; ++chunk) {
      const auto c = static_cast<std::size_t>(chunk);
      stages.push_back(std::make_unique<model_stage>(s.stage_of(comm.rank(), chunk), s.num_stages, max_rows,
                                                     plan.saved_slots[c], plan.gradient_rows[c], shared));
    }
  }

  void run(std::span<const std::int64_t> rows) {
    std::vector<model_stage*> list;
    for (auto& stage : stages) list.push_back(stage.get());
    runner->run({}, std::span<model_stage* const>(list), rows);
  }

  void sum_mirrored(std::int64_t block = 13) {
    std::vector<pl::stage_gradients<float>> list;
    for (auto& stage : stages) list.push_back({stage->gradients.data(), model_stage::count()});
    ts::host_buffer workspace(pl::sum_mirrored_gradients_workspace_bytes<float>(s, options.order, block));
    pl::sum_mirrored_gradients<Comm, float>({}, comm, s, options.order, list, workspace, block);
  }

  // Row 0 of a chunk's gradients.
  std::vector<float> gradient(int chunk) const {
    const auto& all = stages[static_cast<std::size_t>(chunk)]->gradients;
    return {all.begin(), all.begin() + model_stage::count()};
  }

  const pl::schedule& s;
  Comm& comm;
  pl::executor_options options;
  ts::host_buffer memory;
  std::unique_ptr<pl::executor<Comm, float>> runner;
  std::vector<std::unique_ptr<model_stage>> stages;
};

}  // namespace pipeline_test
