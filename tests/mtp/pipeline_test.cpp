// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The chain in the last stage of a pipeline: any schedule gives what a plain loop over micro-batches gives.

#include <memory>
#include <mutex>

#include <doctest/doctest.h>

#include <tessera/comm/comm.hpp>
#include <tessera/pipeline/pipeline.hpp>

#include "chain_case.hpp"

namespace {

using namespace mtp_test;
namespace pl = tessera::pipeline;

constexpr int stages = 2, depths = 2, micro_batches = 4;
constexpr std::int64_t d = 4, vocabulary = 7, max_rows = 12;

// Tokens of the micro-batches: ragged, packed, one of them empty.
const std::vector<problem>& batches() {
  static const std::vector<problem> all = {
      make_problem(depths, d, vocabulary, {{5, 3}, {4}}, true, 1), make_problem(depths, d, vocabulary, {}, true, 2),
      make_problem(depths, d, vocabulary, {{7}}, true, 3), make_problem(depths, d, vocabulary, {{2, 6}}, true, 4)};
  return all;
}

// x -> tanh(x W^T); stage 0 takes x from the table; stage 1 has final norm and head, and the chain behind its output.
// Parameters: those of the chain's map, then W, then the final norm's gain.
class stage {
 public:
  using element = float;
  using precision = ts::precision::fp32;
  using chain_type = mtp::chain<mean_block<precision>, precision, mtp::concat::hidden_first>;
  static constexpr parameter_map map{d, vocabulary, depths};
  static std::int64_t count() { return map.size() + d * d + d; }

  stage(int which, int slots, int gradient_rows)
      : values_(cast<float>(random_values(count(), 0.5, 77))),
        part_(static_cast<std::size_t>(count())),
        embedding_(vocabulary, d, at(map.table())),
        head_(d, vocabulary, at(map.head())),
        linear_(d, d, at(map.size())),
        norm_(d, at(map.size() + d * d)),
        which_(which) {
    // Stage 1 has a W of its own; the table is the same in both.
    if (which == 1)
      for (std::int64_t j = 0; j < d * d; ++j) values_[static_cast<std::size_t>(map.size() + j)] *= -0.7F;
    std::vector<chain_type::parts> parts;
    norms_.reserve(3 * depths);
    projections_.reserve(depths);
    blocks_.reserve(depths);
    for (int k = 1; k <= depths; ++k) {
      for (const auto gain : {map.hidden_gain(k), map.embedding_gain(k), map.output_gain(k)})
        norms_.emplace_back(d, at(gain));
      projections_.emplace_back(2 * d, d, at(map.projection(k)));
      blocks_.emplace_back(d, at(map.block(k)));
      const auto* last = norms_.data() + norms_.size();
      parts.push_back({const_cast<norm*>(last - 3), const_cast<norm*>(last - 2), &projections_.back(), &blocks_.back(),
                       const_cast<norm*>(last - 1)});
    }
    chain_ =
        std::make_unique<chain_type>(mtp::chain_shape{.hidden = d, .max_rows = max_rows}, parts, embedding_, head_);
    workspace_ = ts::host_buffer(chain_->sizes().workspace_bytes);
    gradients.assign(static_cast<std::size_t>(gradient_rows * count()), std::nanf(""));
    for (int s = 0; s < slots; ++s) {
      slots_.push_back({});
      slot& own = slots_.back();
      own.saved = ts::host_buffer(chain_->sizes().saved_bytes);
      own.deferred = ts::host_buffer(chain_->sizes().deferred_bytes);
      own.norm = ts::host_buffer(norm_.saved_bytes(max_rows));
      own.head = ts::host_buffer(head_.saved_bytes(max_rows));
      for (auto* rows : {&own.x, &own.y, &own.normed, &own.dnormed, &own.dy, &own.dpre, &own.dx})
        rows->resize(static_cast<std::size_t>(max_rows * d));
    }
    losses.resize(static_cast<std::size_t>(micro_batches * (1 + depths)));
  }

  void forward(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float> x, ts::matrix_view<float> y) {
    slot& own = slots_[static_cast<std::size_t>(item.slot)];
    const problem& p = batches()[static_cast<std::size_t>(item.micro_batch)];
    const auto in = rows(own.x, item), out = rows(own.y, item);
    const std::int32_t ends[] = {0, static_cast<std::int32_t>(item.rows)};
    if (which_ == 0)
      embedding_.forward({}, {.token_ids = p.token_ids, .chunk_offsets = ends}, in);
    else
      copy(x, in);
    linear_.forward({}, ts::pass::train, {}, in, out, {}, {});
    for (std::int64_t i = 0; i < item.rows * d; ++i) out.data[i] = std::tanh(out.data[i]);
    if (which_ == 0) return copy(out, y);
    const mtp::depth_rows main{.targets = p.targets, .chunk_offsets = ends};
    double* loss = losses.data() + item.micro_batch * (1 + depths);
    norm_.forward({}, ts::pass::train, main, out, rows(own.normed, item), own.norm, workspace_);
    head_.forward({}, ts::pass::train, main, rows(own.normed, item), {loss, 1}, own.head, workspace_);
    chain_->forward({}, ts::pass::train, p.batch(), out, {loss + 1, depths}, own.saved, workspace_);
  }

  void backward_input(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float>,
                      ts::matrix_view<const float> dy, ts::matrix_view<float> dx) {
    slot& own = slots_[static_cast<std::size_t>(item.slot)];
    const problem& p = batches()[static_cast<std::size_t>(item.micro_batch)];
    const std::int32_t ends[] = {0, static_cast<std::int32_t>(item.rows)};
    const mtp::depth_rows main{.targets = p.targets, .chunk_offsets = ends};
    const auto out = rows(own.y, item), dout = rows(own.dy, item), dpre = rows(own.dpre, item);
    if (which_ == 0) {
      copy(dy, dout);
    } else {
      head_.backward_input({}, main, rows(own.normed, item), 0.05, rows(own.dnormed, item), own.head, {}, workspace_);
      norm_.backward_input({}, main, out, rows(own.dnormed, item), dout, own.norm, {}, workspace_);
      chain_->backward_input({}, p.batch(), out, factors, dout, ts::write::accumulate, own.saved, own.deferred,
                             workspace_);
    }
    for (std::int64_t i = 0; i < item.rows * d; ++i) dpre.data[i] = dout.data[i] * (1 - out.data[i] * out.data[i]);
    linear_.backward_input({}, {}, {}, dpre, rows(own.dx, item), {}, {}, {});
    if (which_ == 1) copy(rows(own.dx, item), dx);
  }

  void backward_weights(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float>,
                        ts::matrix_view<const float>) {
    slot& own = slots_[static_cast<std::size_t>(item.slot)];
    const problem& p = batches()[static_cast<std::size_t>(item.micro_batch)];
    const std::int32_t ends[] = {0, static_cast<std::int32_t>(item.rows)};
    const mtp::depth_rows main{.token_ids = p.token_ids, .targets = p.targets, .chunk_offsets = ends};
    std::fill(part_.begin(), part_.end(), 0.0F);
    linear_.backward_weights({}, main, rows(own.x, item), rows(own.dpre, item), {}, {}, ts::write::accumulate, {});
    if (which_ == 0) {
      embedding_.backward_weights({}, main, rows(own.dx, item));
    } else {
      head_.backward_weights({}, main, rows(own.normed, item), 0.05, own.head, {}, workspace_);
      norm_.backward_weights({}, main, rows(own.y, item), rows(own.dnormed, item), own.norm, {}, ts::write::accumulate,
                             workspace_);
      chain_->backward_weights({}, p.batch(), rows(own.y, item), factors, ts::write::accumulate, own.saved,
                               own.deferred, workspace_);
    }
    float* to = gradients.data() + item.gradient_row * count();
    for (std::int64_t j = 0; j < count(); ++j)
      to[j] = item.gradient_mode == ts::write::overwrite ? part_[static_cast<std::size_t>(j)]
                                                         : to[j] + part_[static_cast<std::size_t>(j)];
    for (auto* buffer : {&own.saved, &own.deferred, &own.norm, &own.head}) poison(*buffer);
  }

  std::vector<float> gradients;  // [gradient_rows, count()]
  std::vector<double> losses;    // [micro_batches, 1 + D]

 private:
  using norm = mtp::rms_norm<precision>;
  static constexpr double factors[] = {0.03, 0.02};
  struct slot {
    ts::host_buffer saved, deferred, norm, head;
    std::vector<float> x, y, normed, dnormed, dy, dpre, dx;
  };

  mtp::parameter<float, float> at(std::int64_t place) {
    return {values_.data() + place, part_.data() + place, count()};
  }
  static ts::matrix_view<float> rows(std::vector<float>& data, const pl::work_item& item) {
    return {data.data(), item.rows, d};
  }
  static void copy(ts::matrix_view<const float> from, ts::matrix_view<float> to) {
    std::copy_n(from.data, from.rows * d, to.data);
  }

  std::vector<float> values_, part_;
  mtp::token_embedding<precision> embedding_;
  mtp::softmax_head<precision> head_;
  mtp::linear<precision> linear_;
  norm norm_;
  std::vector<norm> norms_;
  std::vector<mtp::linear<precision>> projections_;
  std::vector<mean_block<precision>> blocks_;
  std::unique_ptr<chain_type> chain_;
  ts::host_buffer workspace_;
  std::vector<slot> slots_;
  int which_;
};

struct outcome {
  std::vector<float> gradients[stages];
  std::vector<double> losses;
};

outcome serial() {
  stage first(0, 1, 1), last(1, 1, 1);
  std::vector<float> x(static_cast<std::size_t>(max_rows * d)), dx(x.size());
  for (int m = 0; m < micro_batches; ++m) {
    const std::int64_t n = batches()[static_cast<std::size_t>(m)].rows();
    pl::work_item item{.stage = 0,
                       .micro_batch = m,
                       .rows = n,
                       .gradient_mode = m == 0 ? ts::write::overwrite : ts::write::accumulate};
    const ts::matrix_view<float> between(x.data(), n, d), back(dx.data(), n, d), none(nullptr, n, 0);
    first.forward({}, item, none, between);
    item.stage = 1;
    last.forward({}, item, between, none);
    last.backward_input({}, item, between, none, back);
    last.backward_weights({}, item, between, none);
    item.stage = 0;
    first.backward_input({}, item, none, back, none);
    first.backward_weights({}, item, none, back);
  }
  return {{first.gradients, last.gradients}, last.losses};
}

outcome pipelined(const char* name) {
  const pl::schedule s = pl::named_schedule(name, stages, micro_batches);
  std::vector<std::int64_t> counts;
  for (const problem& p : batches()) counts.push_back(p.rows());
  outcome result;
  result.losses.assign(static_cast<std::size_t>(micro_batches * (1 + depths)), 0.0);
  std::mutex mutex;
  ts::comm::threads::run(s.num_ranks, [&](ts::comm::threads& comm) {
    const pl::executor_options options{.max_rows = max_rows, .width = d};
    const pl::execution_plan plan = pl::plan_execution(s, comm.rank(), options.order);
    ts::host_buffer activations(pl::executor<ts::comm::threads, float>::activation_bytes(plan, options));
    pl::executor<ts::comm::threads, float> executor(s, comm, activations, options);
    std::vector<std::unique_ptr<stage>> own;
    std::vector<stage*> list;
    std::vector<pl::stage_gradients<float>> gradients;
    for (int chunk = 0; chunk < s.num_chunks; ++chunk) {
      const auto c = static_cast<std::size_t>(chunk);
      own.push_back(
          std::make_unique<stage>(s.stage_of(comm.rank(), chunk), plan.saved_slots[c], plan.gradient_rows[c]));
      list.push_back(own.back().get());
      gradients.push_back({own.back()->gradients.data(), stage::count()});
    }
    executor.run({}, std::span<stage* const>(list), counts);
    ts::host_buffer workspace(pl::sum_mirrored_gradients_workspace_bytes<float>(s, options.order));
    pl::sum_mirrored_gradients<ts::comm::threads, float>({}, comm, s, options.order, gradients, workspace);
    const std::lock_guard lock(mutex);
    for (int chunk = 0; chunk < s.num_chunks; ++chunk) {
      const stage& mine = *own[static_cast<std::size_t>(chunk)];
      result.gradients[s.stage_of(comm.rank(), chunk)].assign(mine.gradients.begin(),
                                                              mine.gradients.begin() + stage::count());
      for (std::size_t i = 0; i < result.losses.size(); ++i) result.losses[i] += mine.losses[i];  // others have zeros
    }
  });
  return result;
}

}  // namespace

TEST_CASE("in the last stage of any schedule the chain gives the bits of a loop over micro-batches") {
  const outcome expected = serial();
  for (const char* name : {"1f1b", "zb1p", "dualpipe", "dualpipev"}) {
    CAPTURE(name);
    const outcome got = pipelined(name);
    CHECK(got.losses == expected.losses);
    CHECK(got.gradients[0] == expected.gradients[0]);
    CHECK(got.gradients[1] == expected.gradients[1]);
  }
  // Not vacuous: the chain's parameters, and both copies of the table, have gradients.
  const auto norm = [](const std::vector<float>& g, std::int64_t from, std::int64_t size) {
    double sum = 0;
    for (std::int64_t j = 0; j < size; ++j) sum += std::abs(g[static_cast<std::size_t>(from + j)]);
    return sum;
  };
  CHECK(norm(expected.gradients[0], 0, vocabulary * d) > 0);
  CHECK(norm(expected.gradients[1], 0, vocabulary * d) > 0);
  for (int k = 1; k <= depths; ++k) CHECK(norm(expected.gradients[1], stage::map.at(k), stage::map.depth_size()) > 0);
}
