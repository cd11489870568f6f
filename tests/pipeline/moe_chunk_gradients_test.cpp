// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A pipeline of mixture-of-experts blocks, expert-parallel, with overlapped pairs on two threads per rank: the bits of
// moe_layer called block after block and micro-batch after micro-batch.

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <tessera/layout/layout.hpp>
#include <tessera/pipeline/dualpipe.hpp>
#include <tessera/pipeline/dualpipev.hpp>
#include <tessera/pipeline/moe_chunk.hpp>
#include <tessera/pipeline/one_f_one_b.hpp>

#include "../support/messages.hpp"
#include "pipeline_fixture.hpp"

namespace {

using namespace pipeline_test;
using ts::comm::threads;

constexpr std::int64_t hidden = 6;
constexpr std::int64_t tokens = 5;  // at most, per rank and micro-batch
constexpr int experts = 4;
constexpr int expert_ranks = 2;
constexpr int moe_blocks = 2;  // per stage

using router = ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized, ts::balance::switch_loss,
                          ts::balance::sequence_loss>;
using layer =
    ts::moe_layer<router, ts::experts<ts::activation::swiglu, ts::precision::fp32>, ts::layout::block, threads>;
const ts::shape sizes{.num_experts = experts,
                      .top_k = 2,
                      .hidden = static_cast<int>(hidden),
                      .intermediate = 4,
                      .max_tokens = tokens,
                      .num_shared_experts = 1,
                      .gate_bias = true};
const router::options routing{.balance = {{.coefficient = 0.1F}, {.coefficient = 0.2F}}};
// Every other block keeps no rows; where the same layers are called one by one, all keep them.
layer::options options_of(bool resends) {
  return {.dispatch = {.row_bound = ts::dispatch_options::full_row_bound},
          .rows = resends ? ts::saved_rows::resend : ts::saved_rows::received};
}

std::vector<float> noise_of(std::uint64_t seed, std::int64_t count, float scale = 1) {
  std::vector<float> v(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = scale * noise(seed, i);
  return v;
}

std::atomic<bool> throw_in_mixer{false};

// h = x (1 + a), u = g h with vectors a and g; the embedding gives h from the micro-batch, the head is half the squared
// distance to a target.
struct test_mixer {
  enum class kinds { embedding, middle, head };

  kinds kind;
  int expert_rank;
  std::vector<float> a, g;
  std::vector<std::vector<float>> saved;  // per slot: dh of the middle, dx of the head
  std::vector<float> gradient;            // [rows][2 d]
  std::vector<float> loss;                // of each micro-batch

  test_mixer(kinds kind_, int expert_rank_, std::uint64_t seed, int slots, int rows)
      : kind(kind_), expert_rank(expert_rank_), a(noise_of(seed, hidden)), g(noise_of(seed + 1, hidden, 2)) {
    saved.assign(static_cast<std::size_t>(slots), std::vector<float>(static_cast<std::size_t>(tokens * hidden)));
    gradient.assign(static_cast<std::size_t>(rows * 2 * hidden), 77.0F);
    loss.assign(64, 0.0F);
  }
  // Each micro-batch is two sequences.
  layer::inputs inputs(const pl::work_item& item) const {
    static const auto offsets = [] {
      std::array<std::array<std::int32_t, 3>, tokens + 1> all{};
      for (std::int32_t n = 0; n <= tokens; ++n) all[static_cast<std::size_t>(n)] = {0, n / 2, n};
      return all;
    }();
    if (item.rows < 2) return {};
    return {.x = {}, .sequence_offsets = offsets[static_cast<std::size_t>(item.rows)]};
  }
  std::vector<float>& slot(const pl::work_item& item) { return saved[static_cast<std::size_t>(item.slot)]; }
  float given(const pl::work_item& item, std::int64_t i, bool target) const {
    return 2 * noise(static_cast<std::uint64_t>(1000 + item.micro_batch * 4 + expert_rank * 2 + (target ? 1 : 0)),
                     static_cast<std::uint64_t>(i));
  }

  void forward(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float> x, ts::matrix_view<float> h,
               ts::matrix_view<float> u) {
    if (throw_in_mixer && item.micro_batch == 3 && expert_rank == 0) throw std::runtime_error("no attention");
    for (std::int64_t t = 0; t < item.rows; ++t) {
      for (std::int64_t j = 0; j < hidden; ++j) {
        const auto k = static_cast<std::size_t>(j);
        if (kind == kinds::embedding) h(t, j) = given(item, t * hidden + j, false);
        if (kind == kinds::middle) {
          h(t, j) = x(t, j) * (1 + a[k]);
          u(t, j) = g[k] * h(t, j);
        }
        if (kind == kinds::head) {
          const float difference = x(t, j) - given(item, t * hidden + j, true);
          slot(item)[static_cast<std::size_t>(t * hidden + j)] = difference;
          loss[static_cast<std::size_t>(item.micro_batch)] += difference * difference / 2;
        }
      }
    }
  }
  void backward_input(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float>,
                      ts::matrix_view<const float> dh, ts::matrix_view<const float> du, ts::matrix_view<float> dx) {
    for (std::int64_t t = 0; t < item.rows; ++t) {
      for (std::int64_t j = 0; j < hidden; ++j) {
        const auto k = static_cast<std::size_t>(j);
        float& kept = slot(item)[static_cast<std::size_t>(t * hidden + j)];
        if (kind == kinds::head) dx(t, j) = kept;
        if (kind != kinds::middle) continue;
        kept = dh(t, j) + g[k] * du(t, j);
        dx(t, j) = kept * (1 + a[k]);
      }
    }
  }
  void backward_weights(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float> x,
                        ts::matrix_view<const float>, ts::matrix_view<const float> du) {
    if (kind != kinds::middle) return;
    for (std::int64_t j = 0; j < hidden; ++j) {
      const auto k = static_cast<std::size_t>(j);
      float da = 0, dg = 0;
      for (std::int64_t t = 0; t < item.rows; ++t) {
        da += slot(item)[static_cast<std::size_t>(t * hidden + j)] * x(t, j);
        dg += du(t, j) * x(t, j) * (1 + a[k]);
      }
      float* out = gradient.data() + item.gradient_row * 2 * hidden + j;
      const bool fresh = item.gradient_mode == ts::write::overwrite;
      out[0] = fresh ? da : out[0] + da;
      out[hidden] = fresh ? dg : out[hidden] + dg;
    }
  }
};

// One mixture-of-experts layer with its parameters and gradients.
struct test_layer {
  static constexpr std::int64_t local = experts / expert_ranks;
  static constexpr std::int64_t n = 4;
  static constexpr std::int64_t parts[] = {experts * hidden, experts,       local * 2 * n* hidden,
                                           local* hidden* n, 2 * n* hidden, hidden* n};
  static constexpr std::int64_t count() {
    std::int64_t sum = 0;
    for (const auto p : parts) sum += p;
    return sum;
  }

  test_layer(threads& comm, std::uint64_t seed, int gradient_rows, bool resends)
      : state(layer::sizes(sizes, ts::layout::block(experts, expert_ranks), comm.rank()).state_bytes),
        moe(sizes, routing, ts::layout::block(experts, expert_ranks), comm, state, options_of(resends)),
        values(noise_of(seed + static_cast<std::uint64_t>(comm.rank()), count(), 1.5F)),
        gradient(static_cast<std::size_t>(gradient_rows * count()), 55.0F) {
    const auto common = noise_of(seed + 17, count(), 1.5F);  // gate and shared experts are the same on all ranks
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      if (at < parts[0] + parts[1] || at >= count() - parts[4] - parts[5]) values[i] = common[i];
    }
    moe.reset_state({});
    for (int row = 0; row < gradient_rows; ++row) rows.push_back(gradients_at(row));
  }
  test_layer(const test_layer&) = delete;

  template <class T>
  static std::array<T*, 6> split(T* data) {
    std::array<T*, 6> p{};
    for (std::size_t i = 0; i < 6; data += parts[i++]) p[i] = data;
    return p;
  }
  layer::weights weights() const {
    const auto p = split(values.data());
    return {.gate = {p[0], experts, hidden},
            .gate_bias = p[1],
            .experts = {p[2], p[3], nullptr, nullptr},
            .shared = {p[4], p[5], nullptr, nullptr}};
  }
  layer::gradients gradients_at(int row) {
    const auto p = split(gradient.data() + row * count());
    return {.gate = p[0],
            .gate_bias = p[1],
            .experts = {p[2], p[3], nullptr, nullptr},
            .shared = {p[4], p[5], nullptr, nullptr}};
  }

  ts::host_buffer state;
  layer moe;
  std::vector<float> values, gradient;
  std::vector<layer::gradients> rows;
};

std::uint64_t seed_of(int stage, int block) { return static_cast<std::uint64_t>(5000 + 100 * stage + 30 * block); }

// A stage: [embedding] block block [head].
struct stage_parts {
  stage_parts(threads& expert_comm, int stage_, int num_stages, int slots, int rows, bool resends) : stage(stage_) {
    using kinds = test_mixer::kinds;
    const auto mix = [&](kinds kind, int block) {
      mixers.push_back(
          std::make_unique<test_mixer>(kind, expert_comm.rank(), seed_of(stage, block) + 500, slots, rows));
    };
    if (stage == 0) mix(kinds::embedding, 0);
    for (int b = 0; b < moe_blocks; ++b) {
      mix(kinds::middle, b);
      layers.push_back(std::make_unique<test_layer>(expert_comm, seed_of(stage, b), rows, resends && b % 2 == 1));
    }
    if (stage + 1 == num_stages) mix(kinds::head, 0);
  }

  std::vector<float> gradient() const {  // row 0 of everything
    std::vector<float> all;
    for (const auto& m : mixers)
      if (m->kind == test_mixer::kinds::middle)
        all.insert(all.end(), m->gradient.begin(), m->gradient.begin() + 2 * hidden);
    for (const auto& l : layers) all.insert(all.end(), l->gradient.begin(), l->gradient.begin() + test_layer::count());
    return all;
  }
  std::vector<std::int64_t> load() const {
    std::vector<std::int64_t> all;
    for (const auto& l : layers) all.insert(all.end(), l->moe.state().load, l->moe.state().load + experts);
    return all;
  }

  int stage;
  std::vector<std::unique_ptr<test_mixer>> mixers;
  std::vector<std::unique_ptr<test_layer>> layers;
};

struct outcome {
  std::vector<float> gradient;
  std::vector<std::int64_t> load;
  std::vector<float> loss;
};
using outcomes = std::vector<std::vector<outcome>>;  // [stage][expert rank]

// moe_layer's own calls, one micro-batch after another.
outcomes serial(int num_stages, const std::vector<std::int64_t>& rows) {
  outcomes result(static_cast<std::size_t>(num_stages), std::vector<outcome>(expert_ranks));
  threads::run(expert_ranks, [&](threads& comm) {
    std::vector<std::unique_ptr<stage_parts>> stages;
    for (int s = 0; s < num_stages; ++s)
      stages.push_back(std::make_unique<stage_parts>(comm, s, num_stages, 1, 1, false));
    const auto bytes = layer::sizes(sizes, ts::layout::block(experts, expert_ranks), comm.rank(), options_of(false));
    ts::host_buffer workspace(bytes.workspace_bytes);
    struct block {
      test_mixer* mixer;
      test_layer* moe;
      ts::host_buffer saved, deferred;
      std::vector<float> x, h, u, dx, du;
    };
    std::vector<block> blocks;
    const auto size = static_cast<std::size_t>(tokens * hidden);
    for (auto& s : stages) {
      std::size_t next = 0;
      for (auto& m : s->mixers) {
        const bool middle = m->kind == test_mixer::kinds::middle;
        blocks.push_back({m.get(), middle ? s->layers[next++].get() : nullptr, ts::host_buffer(bytes.saved_bytes),
                          ts::host_buffer(bytes.deferred_bytes), std::vector<float>(size), std::vector<float>(size),
                          std::vector<float>(size), std::vector<float>(size), std::vector<float>(size)});
      }
    }
    for (int m = 0; m < static_cast<int>(rows.size()); ++m) {
      const std::int64_t n = rows[static_cast<std::size_t>(m)];
      const pl::work_item item{
          .micro_batch = m, .rows = n, .gradient_mode = m == 0 ? ts::write::overwrite : ts::write::accumulate};
      const auto view = [&](std::vector<float>& v) { return ts::matrix_view<float>(v.data(), n, hidden); };
      std::vector<float> end(size);
      for (std::size_t i = 0; i < blocks.size(); ++i) {
        block& b = blocks[i];
        std::vector<float>& y = i + 1 < blocks.size() ? blocks[i + 1].x : end;
        if (b.moe == nullptr) {
          b.mixer->forward({}, item, view(b.x), view(y), {});
          continue;
        }
        b.mixer->forward({}, item, view(b.x), view(b.h), view(b.u));
        layer::inputs in = b.mixer->inputs(item);
        in.x = view(b.u);
        in.residual = view(b.h);
        b.moe->moe.forward({}, ts::pass::train, in, b.moe->weights(), view(y), b.saved, workspace);
      }
      for (std::size_t i = blocks.size(); i-- > 0;) {
        block& b = blocks[i];
        std::vector<float>& dy = i + 1 < blocks.size() ? blocks[i + 1].dx : end;
        if (b.moe == nullptr) {
          b.mixer->backward_input({}, item, view(b.x), view(dy), {}, view(b.dx));
          b.mixer->backward_weights({}, item, view(b.x), view(dy), {});
          continue;
        }
        layer::inputs in = b.mixer->inputs(item);
        in.x = view(b.u);
        b.moe->moe.backward_input({}, in, view(dy), b.moe->weights(), b.saved, view(b.du), b.deferred, workspace);
        b.mixer->backward_input({}, item, view(b.x), view(dy), view(b.du), view(b.dx));
        b.mixer->backward_weights({}, item, view(b.x), view(dy), view(b.du));
        const std::vector<float> before = b.moe->gradient;
        b.moe->moe.backward_weights({}, in, view(dy), b.saved, b.deferred, b.moe->rows[0], ts::write::overwrite);
        if (m > 0)
          for (std::size_t k = 0; k < before.size(); ++k) b.moe->gradient[k] = before[k] + b.moe->gradient[k];
      }
    }
    for (auto& s : stages)
      result[static_cast<std::size_t>(s->stage)][static_cast<std::size_t>(comm.rank())] = {s->gradient(), s->load(),
                                                                                           s->mixers.back()->loss};
  });
  return result;
}

// The pipeline: pipeline ranks x expert ranks threads, and with host_lanes twice as many.
template <class Lanes>
struct moe_rank {
  using chunk_type = pl::moe_chunk<layer, test_mixer>;
  using stage_type = pl::overlap_stage<chunk_type, Lanes>;

  moe_rank(const pl::schedule& s_, threads& world)
      : s(s_),
        pipe(world.split(world.rank() % expert_ranks, 0)),
        group(world.split(world.rank() / expert_ranks, 0)),
        options{tokens, hidden},
        plan(pl::plan_execution(s, pipe.rank())),
        activations(pl::executor<threads, float>::activation_bytes(plan, options)),
        runner(s, pipe, activations, options) {
    for (int c = 0; c < s.num_chunks; ++c) {
      const auto i = static_cast<std::size_t>(c);
      parts.push_back(std::make_unique<stage_parts>(group, s.stage_of(pipe.rank(), c), s.num_stages,
                                                    plan.saved_slots[i], plan.gradient_rows[i], true));
      std::vector<chunk_type::block> blocks;
      std::size_t next = 0;
      for (auto& m : parts.back()->mixers) {
        test_layer* l = m->kind == test_mixer::kinds::middle ? parts.back()->layers[next++].get() : nullptr;
        if (l == nullptr)
          blocks.push_back({.before = m.get()});
        else
          blocks.push_back({.before = m.get(), .layer = &l->moe, .weights = l->weights(), .gradients = l->rows});
      }
      const auto bytes = chunk_type::sizes(blocks, tokens, hidden, plan.saved_slots[i]);
      for (const std::size_t size : {bytes.saved_bytes, bytes.deferred_bytes, bytes.workspace_bytes}) {
        memory.emplace_back(size);
        std::fill_n(memory.back().data(), size, std::byte{0xff});
      }
      chunks.push_back(std::make_unique<chunk_type>(blocks, tokens, hidden, plan.saved_slots[i],
                                                    memory[memory.size() - 3], memory[memory.size() - 2],
                                                    memory[memory.size() - 1]));
      stages.push_back(std::make_unique<stage_type>(*chunks.back(), lanes));
      list.push_back(stages.back().get());
    }
  }

  void run(const std::vector<std::int64_t>& rows) {
    runner.run({}, std::span<stage_type* const>(list), rows);
    for (int part = 0; part < 2 * moe_blocks; ++part) {  // mixers, then layers
      std::vector<pl::stage_gradients<float>> grads;
      for (auto& p : parts) {
        const auto b = static_cast<std::size_t>(part % moe_blocks);
        if (part < moe_blocks) {
          grads.push_back({p->mixers[b + (p->stage == 0 ? 1 : 0)]->gradient.data(), 2 * hidden});
        } else {
          grads.push_back({p->layers[b]->gradient.data(), test_layer::count()});
        }
      }
      ts::host_buffer workspace(pl::sum_mirrored_gradients_workspace_bytes<float>(s, options.order, 64));
      pl::sum_mirrored_gradients<threads, float>({}, pipe, s, options.order, grads, workspace, 64);
    }
  }

  const pl::schedule& s;
  threads pipe, group;
  Lanes lanes;
  pl::executor_options options;
  pl::execution_plan plan;
  ts::host_buffer activations;
  pl::executor<threads, float> runner;
  std::vector<ts::host_buffer> memory;
  std::vector<std::unique_ptr<stage_parts>> parts;
  std::vector<std::unique_ptr<chunk_type>> chunks;
  std::vector<std::unique_ptr<stage_type>> stages;
  std::vector<stage_type*> list;
};

template <class Lanes>
void expect_serial(const pl::schedule& s) {
  INFO(s.name);
  const auto rows = ragged_rows(s.num_micro_batches, tokens);
  const outcomes expected = serial(s.num_stages, rows);
  std::mutex mutex;
  std::vector<std::vector<std::int64_t>> loads(static_cast<std::size_t>(s.num_stages * expert_ranks));
  std::vector<std::vector<float>> losses(expert_ranks, std::vector<float>(64));
  threads::run(s.num_ranks * expert_ranks, [&](threads& world) {
    moe_rank<Lanes> rank(s, world);
    rank.run(rows);
    const std::lock_guard lock(mutex);
    for (const auto& p : rank.parts) {
      const auto e = static_cast<std::size_t>(rank.group.rank());
      const outcome& want = expected[static_cast<std::size_t>(p->stage)][e];
      INFO("stage ", p->stage, ", pipeline rank ", rank.pipe.rank(), ", expert rank ", rank.group.rank());
      CHECK(same_bits(p->gradient(), want.gradient));
      auto& load = loads[static_cast<std::size_t>(p->stage * expert_ranks) + e];
      load.resize(want.load.size());
      for (std::size_t i = 0; i < load.size(); ++i) load[i] += p->load()[i];  // of both places
      if (p->mixers.back()->kind == test_mixer::kinds::head)
        for (std::size_t i = 0; i < 64; ++i) losses[e][i] += p->mixers.back()->loss[i];
    }
  });
  for (int stage = 0; stage < s.num_stages; ++stage) {
    for (std::size_t e = 0; e < expert_ranks; ++e) {
      CHECK(loads[static_cast<std::size_t>(stage * expert_ranks) + e] ==
            expected[static_cast<std::size_t>(stage)][e].load);
      if (stage + 1 == s.num_stages) CHECK(same_bits(losses[e], expected[static_cast<std::size_t>(stage)][e].loss));
    }
  }
}

}  // namespace

TEST_CASE("overlapped mixture-of-experts blocks on two threads give the bits of moe_layer called one by one") {
  expect_serial<pl::host_lanes>(pl::dualpipe(2, 6));
  expect_serial<pl::host_lanes>(pl::dualpipev(2, 6));
}

TEST_CASE("the same holds for one thread, and for a schedule that overlaps nothing") {
  expect_serial<pl::serial_lanes<ts::space::host>>(pl::dualpipev(2, 5));
  expect_serial<pl::host_lanes>(pl::one_f_one_b(2, 3));
}

TEST_CASE("two halves of the tokens that go the same way have the bits of one behind the other") {
  struct halves {
    std::vector<float> y, dx, gradient;
    std::vector<std::int64_t> load;
  };
  using chunk_type = pl::moe_chunk<layer, test_mixer>;
  const auto run = [](threads& world, bool together) {
    threads group = world.split(0, 0);
    pl::host_lanes lanes;
    stage_parts parts(group, 1, 3, 2, 1, true);
    std::vector<chunk_type::block> blocks;
    for (std::size_t b = 0; b < moe_blocks; ++b) {
      test_layer& l = *parts.layers[b];
      blocks.push_back({.before = parts.mixers[b].get(), .layer = &l.moe, .weights = l.weights(), .gradients = l.rows});
    }
    // Chunks of the same layers, each with memory of its own.
    const auto bytes = chunk_type::sizes(blocks, tokens, hidden, 2);
    std::vector<ts::host_buffer> memory;
    for (int i = 0; i < 2; ++i) {
      for (const std::size_t size : {bytes.saved_bytes, bytes.deferred_bytes, bytes.workspace_bytes}) {
        memory.emplace_back(size);
        std::fill_n(memory.back().data(), size, std::byte{0xff});
      }
    }
    chunk_type first(blocks, tokens, hidden, 2, memory[0], memory[1], memory[2]);
    chunk_type second(blocks, tokens, hidden, 2, memory[3], memory[4], memory[5]);
    pl::overlap_stage<chunk_type, pl::host_lanes> a(first, lanes), b(second, lanes);

    constexpr std::int64_t rows[2] = {tokens, tokens - 2};
    const auto size = static_cast<std::size_t>((rows[0] + rows[1]) * hidden);
    const auto seed = static_cast<std::uint64_t>(900 + group.rank());
    const auto x = noise_of(seed, (rows[0] + rows[1]) * hidden), dy = noise_of(seed + 2, (rows[0] + rows[1]) * hidden);
    halves result{std::vector<float>(size), std::vector<float>(size), {}, {}};
    const auto part = [&](auto& all, int half) {
      using T = std::remove_reference_t<decltype(*all.data())>;
      return ts::matrix_view<T>{all.data() + half * rows[0] * hidden, rows[half], hidden};
    };
    const pl::work_item items[2] = {
        {.micro_batch = 0, .rows = rows[0], .slot = 0, .gradient_mode = ts::write::overwrite},
        {.micro_batch = 1, .rows = rows[1], .slot = 1, .gradient_mode = ts::write::accumulate}};
    if (together) {
      a.two_forwards({}, items[0], part(x, 0), part(result.y, 0), b, items[1], part(x, 1), part(result.y, 1));
      a.two_backwards({}, items[0], part(x, 0), part(dy, 0), part(result.dx, 0), b, items[1], part(x, 1), part(dy, 1),
                      part(result.dx, 1));
    } else {
      for (const int half : {0, 1}) {
        auto& stage = half == 0 ? a : b;
        stage.forward({}, items[half], part(x, half), part(result.y, half));
        stage.backward_input({}, items[half], part(x, half), part(dy, half), part(result.dx, half));
        stage.backward_weights({}, items[half], part(x, half), part(dy, half));
      }
    }
    result.gradient = parts.gradient();
    result.load = parts.load();
    return result;
  };
  std::array<std::array<halves, expert_ranks>, 2> results;
  for (const bool together : {false, true}) {
    threads::run(expert_ranks, [&](threads& world) {
      results[together ? 1 : 0][static_cast<std::size_t>(world.rank())] = run(world, together);
    });
  }
  for (std::size_t r = 0; r < expert_ranks; ++r) {
    const halves &want = results[0][r], &got = results[1][r];
    CHECK(same_bits(got.y, want.y));
    CHECK(same_bits(got.dx, want.dx));
    CHECK(same_bits(got.gradient, want.gradient));
    CHECK(got.load == want.load);
    CHECK(std::all_of(want.y.begin(), want.y.end(), [](float v) { return std::abs(v) < 1e3F && v != 0; }));
    CHECK(std::all_of(want.gradient.begin(), want.gradient.end(), [](float v) { return std::abs(v) < 1e3F; }));
  }
}

TEST_CASE("a phase that throws inside an overlapped pair reaches every rank of every group at once") {
  const pl::schedule s = pl::dualpipev(2, 6);
  const auto rows = ragged_rows(6, tokens);
  std::atomic<int> told{0};
  throw_in_mixer = true;
  const auto start = std::chrono::steady_clock::now();
  threads::run(s.num_ranks * expert_ranks, [&](threads& world) {
    moe_rank<pl::host_lanes> rank(s, world);
    std::string text;
    try {
      rank.run(rows);
    } catch (const ts::error& e) {
      text = e.what();
    }
    told += text.find("no attention") != std::string::npos ? 1 : 0;
    world.reset();
  });
  throw_in_mixer = false;
  CHECK(told == s.num_ranks * expert_ranks);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
}

TEST_CASE("a micro-batch whose row of gradients a block does not have is refused with the numbers") {
  using chunk_type = pl::moe_chunk<layer, test_mixer>;
  threads::run(expert_ranks, [](threads& world) {
    threads group = world.split(0, 0);
    stage_parts parts(group, 1, 3, 1, 1, true);
    test_layer& l = *parts.layers[0];
    const std::vector<chunk_type::block> blocks{
        {.before = parts.mixers[0].get(), .layer = &l.moe, .weights = l.weights(), .gradients = l.rows}};
    const auto bytes = chunk_type::sizes(blocks, tokens, hidden, 1);
    ts::host_buffer saved(bytes.saved_bytes), deferred(bytes.deferred_bytes), workspace(bytes.workspace_bytes);
    chunk_type chunk(blocks, tokens, hidden, 1, saved, deferred, workspace);
    for (const int row : {-1, 1}) {
      chunk_type::backward_type call{};
      call.item = {.stage = 1, .micro_batch = 4, .gradient_row = row};
      for (const auto phase : {&chunk_type::backward_mlp_weights, &chunk_type::backward_attention_weights})
        CHECK(tessera_test::message_of([&] { (chunk.*phase)(call); }) ==
              "moe_chunk: block 0 has 1 rows of gradients, micro-batch 4 adds to row " + std::to_string(row) +
                  ": give execution_plan::gradient_rows of the chunk");
    }
  });
}
