// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Rounds of dispatch and combine one behind the other, as dispatch/symmetric.cuh and dispatch/expanded.cuh enqueue
// them, run on the host (block.hpp): every rank comes at its own time, lists are made beside rows, and all rounds use
// the same windows. Sums are of whole numbers, so that every order of adding them gives the same.

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include <tessera/dispatch/detail/symmetric/expand_parts.cuh>
#include <tessera/dispatch/detail/symmetric/push_routing.cuh>
#include <tessera/dispatch/detail/symmetric/return_values.cuh>
#include <tessera/dispatch/detail/symmetric/send_pairs.cuh>
#include <tessera/dispatch/detail/symmetric/send_parts.cuh>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/dispatch/detail/symmetric/send_sums.cuh>
#include <tessera/layout/block.hpp>

#include "emulated/stream.hpp"

namespace {

namespace ts = tessera;
using namespace ts::detail::symmetric;
using ts::comm::symmetric_channel;
using ts::comm::symmetric_view;

struct shape {
  std::vector<int> tokens;  // of each rank
  int max_tokens;
  int num_experts;
  int top_k;
  int hidden;
  int list_blocks;
  int push_blocks;
  int row_blocks;
  int row_bound = 0;  // pairs that a rank receives at most, others are dropped; 0: all
};

// How a round goes.
struct way {
  bool lists_at_once = false;  // one kernel pushes tables and sorts them
  bool cached = false;         // lists of the round before
  bool awaits = false;         // the kernel that sends rows waits for those of others
  bool expanded = false;       // rows are put in the order of experts as they come
  bool by_pairs = false;       // every row goes home
  bool summed = false;         // owners have added up before
  bool values = false;         // numbers of expert rows go home, too
  bool lists_alone = false;    // nothing follows them
};

// What a rank is given in a round, and what it makes of it.
struct rank_round {
  std::vector<float> x;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  std::vector<bool> kept;  // pairs that their owners have room for
  std::vector<float> y;
  std::vector<float> values;  // that came home
};

// A rank's memory: what peers write, at the same place on all ranks, and its own.
struct rank_memory {
  rank_memory(const shape& s, const ts::dispatch_bounds& bounds) {
    ts::memory_builder counts;
    layout_window(counts, s, bounds);
    window = ts::host_buffer(counts.bytes());
    ts::memory_builder shared(ts::workspace_memory(window), "the window");
    layout_window(shared, s, bounds);
    counts = {};
    layout_own(counts, s, bounds);
    own = ts::host_buffer(counts.bytes());
    ts::memory_builder local(ts::workspace_memory(own), "local memory");
    layout_own(local, s, bounds);
  }
  void layout_window(ts::memory_builder& builder, const shape& s, const ts::dispatch_bounds& bounds) {
    constexpr int flags = ts::comm::num_symmetric_channels * 2 * ts::comm::max_symmetric_ranks;
    words = builder.take<std::uint32_t>("flags", flags);
    chunks = builder.take<std::uint32_t>(
        "flags of chunks", 2 * ts::comm::max_symmetric_ranks * std::int64_t{ts::comm::max_symmetric_chunks});
    workspace.tables = ts::routing_tables<float>::layout(builder, bounds);
    received = builder.take<float>("received rows", bounds.addressed_rows() * s.hidden);
    pairs = ts::returned_rows<float>::layout(builder, bounds, s.hidden, ts::combine::ordered{});
    values = builder.take<float>("values", bounds.max_sent_pairs());
  }
  void layout_own(ts::memory_builder& builder, const shape& s, const ts::dispatch_bounds& bounds) {
    generations = builder.take<std::uint32_t>("generations", ts::comm::num_symmetric_channels * 8);
    workspace.sort = ts::router_workspace::layout(builder, s.num_experts, builder.take<std::uint32_t>("barrier", 1));
    handle = ts::dispatch_handle<float>::layout_device(builder, bounds, true);
    expanded = builder.take<float>("expanded rows", bounds.max_pairs * s.hidden);
    outputs = builder.take<float>("outputs", bounds.max_pairs * s.hidden);
    sums = builder.take<float>("sums", bounds.addressed_rows() * s.hidden);
    row_values = builder.take<float>("values of rows", bounds.max_pairs);
  }

  ts::host_buffer window, own;
  std::uint32_t* words = nullptr;
  std::uint32_t* chunks = nullptr;
  std::uint32_t* generations = nullptr;
  ts::symmetric_routing_workspace<float> workspace;
  ts::dispatch_handle<float> handle;
  ts::returned_rows<float> pairs;
  float* received = nullptr;
  float* values = nullptr;
  float* expanded = nullptr;
  float* outputs = nullptr;
  float* sums = nullptr;
  float* row_values = nullptr;
  ts::comm::symmetric_failure failure;
};

class world {
 public:
  world(const shape& s, std::uint32_t seed) : of_(s), placement_(s.num_experts, ranks()), random_(seed) {
    for (int r = 0; r < ranks(); ++r) {
      memory_.emplace_back(s, bounds(r));
      for (int i = 0; i < 2; ++i) streams_.emplace_back(static_cast<std::uint32_t>(random_()));
    }
  }

  void run_rounds(const std::vector<way>& ways) {
    rounds_.assign(ways.size(), std::vector<rank_round>(static_cast<std::size_t>(ranks())));
    for (std::size_t i = 0; i < ways.size(); ++i) {
      for (int r = 0; r < ranks(); ++r) {
        prepare(i, r, ways[i].cached);
        enqueue(r, ways[i], rounds_[i][static_cast<std::size_t>(r)]);
      }
      admit(rounds_[i]);
    }
    run(streams_);
    for (int r = 0; r < ranks(); ++r) REQUIRE(memory(r).failure.state == 0);
    for (std::size_t i = 0; i < ways.size(); ++i) {
      CAPTURE(i);
      int wrong = 0;
      for (const rank_round& round : rounds_[i])
        if (!ways[i].lists_alone) wrong += count_wrong(round, ways[i].values);
      CHECK(wrong == 0);
    }
  }

 private:
  int ranks() const { return static_cast<int>(of_.tokens.size()); }
  rank_memory& memory(int rank) { return memory_[static_cast<std::size_t>(rank)]; }
  ts::dispatch_bounds bounds(int rank) const {
    return ts::dispatch_bounds::make(
        ranks(), of_.num_experts, placement_.num_slots(rank), of_.top_k, of_.max_tokens,
        {.row_bound = of_.row_bound == 0 ? ts::dispatch_options::full_row_bound : of_.row_bound});
  }
  symmetric_view view(int rank, symmetric_channel channel) {
    rank_memory& m = memory(rank);
    const int c = static_cast<int>(channel);
    symmetric_view v;
    v.rank = rank;
    v.size = ranks();
    for (int r = 0; r < v.size; ++r) v.peer[r] = memory(r).window.data();
    v.channel = channel;
    v.entered = m.words + c * 2 * ts::comm::max_symmetric_ranks;
    v.arrived = v.entered + ts::comm::max_symmetric_ranks;
    v.chunks = m.chunks + (channel == symmetric_channel::parts ? ts::comm::max_symmetric_ranks : 0) *
                              std::int64_t{ts::comm::max_symmetric_chunks};
    v.generation = m.generations + c * 8;
    v.tickets = v.generation + 4;
    v.failure = &m.failure;
    v.timeout_ns = 60'000'000'000;
    return v;
  }

  void prepare(std::size_t i, int rank, bool cached) {
    const auto r = static_cast<std::size_t>(rank);
    const auto tokens = static_cast<std::size_t>(of_.tokens[r]), k = static_cast<std::size_t>(of_.top_k);
    rank_round& round = rounds_[i][r];
    for (std::size_t j = 0; j < tokens * static_cast<std::size_t>(of_.hidden); ++j)
      round.x.push_back(static_cast<float>(random_() % 16));
    if (cached) {
      round.ids = rounds_[i - 1][r].ids;
      round.weights = rounds_[i - 1][r].weights;
    } else {
      std::vector<std::int32_t> experts(static_cast<std::size_t>(of_.num_experts));
      std::iota(experts.begin(), experts.end(), 0);
      for (std::size_t t = 0; t < tokens; ++t) {
        std::shuffle(experts.begin(), experts.end(), random_);
        for (std::size_t j = 0; j < k; ++j) {
          round.ids.push_back(random_() % 6 == 0 ? -1 : experts[j]);
          round.weights.push_back(static_cast<float>(1 + random_() % 3));
        }
      }
    }
    round.y.assign(round.x.size(), -1);
    round.values.assign(tokens * k, -1);
  }

  // Owners take pairs in the order (source, token, k).
  void admit(std::vector<rank_round>& ranks_of_round) const {
    std::vector<std::int64_t> room;
    for (int r = 0; r < ranks(); ++r) room.push_back(bounds(r).max_pairs);
    for (rank_round& round : ranks_of_round) {
      for (const std::int32_t id : round.ids)
        round.kept.push_back(id >= 0 && --room[static_cast<std::size_t>(placement_.owner(id).rank)] >= 0);
    }
  }

  // An expert's output for an element of a token's row.
  static float output(float x, int expert) { return 2 * x + static_cast<float>(expert); }

  int count_wrong(const rank_round& round, bool values) const {
    const auto hidden = static_cast<std::size_t>(of_.hidden), k = static_cast<std::size_t>(of_.top_k);
    int wrong = 0;
    for (std::size_t t = 0; t < round.x.size() / hidden; ++t) {
      for (std::size_t j = 0; j < hidden; ++j) {
        float sum = 0;
        for (std::size_t p = t * k; p < (t + 1) * k; ++p)
          if (round.kept[p]) sum += round.weights[p] * output(round.x[t * hidden + j], round.ids[p]);
        wrong += round.y[t * hidden + j] != sum;
      }
      for (std::size_t p = t * k; p < (t + 1) * k && values; ++p)
        wrong += round.values[p] != (round.kept[p] ? output(round.x[t * hidden], round.ids[p]) : 0);
    }
    return wrong;
  }

  ts::matrix_view<const float> rows_of(const std::vector<float>& x) const {
    return {x.data(), static_cast<std::int64_t>(x.size()) / of_.hidden, of_.hidden};
  }

  void enqueue(int rank, const way& how, rank_round& round) {
    emulated::stream& stream = streams_[2 * static_cast<std::size_t>(rank)];
    emulated::stream& side = streams_[2 * static_cast<std::size_t>(rank) + 1];
    stream.call([pause = random_() % 3000] { std::this_thread::sleep_for(std::chrono::microseconds(pause)); });
    if (!how.cached) enqueue_lists(rank, how, round, stream, side);
    if (how.lists_alone) return stream.follow(side);
    enqueue_rows(rank, how, round, stream, side);
    stream.follow(side);
    if (how.expanded) stream.launch_early(await_kernel, 1, 32, view(rank, symmetric_channel::rows));
    stream.call([this, rank, how] { compute(rank, how); });
    enqueue_combine(rank, how, round, stream);
    if (how.values) enqueue_values(rank, round, stream);
  }

  void enqueue_values(int rank, rank_round& round, emulated::stream& stream) {
    rank_memory& m = memory(rank);
    const auto values_view = view(rank, symmetric_channel::values);
    const std::int64_t pairs = m.handle.max_tokens * of_.top_k;
    stream.call([&m, pairs] { std::fill_n(m.values, pairs, 0.0f); });
    stream.launch_early(return_values_kernel<float>, 1, values_threads,
                        {values_view, m.row_values, m.handle.expert_row_of, m.values, pairs});
    stream.launch_early(await_kernel, 1, 32, values_view);
    stream.call([&m, &round] { std::copy_n(m.values, round.values.size(), round.values.data()); });
  }

  void enqueue_lists(int rank, const way& how, const rank_round& round, emulated::stream& stream,
                     emulated::stream& side) {
    rank_memory& m = memory(rank);
    const ts::dispatch_bounds b = bounds(rank);
    const std::int64_t rows = b.addressed_rows();
    const int slots = std::max(b.num_local_experts, 1);
    const auto tokens = static_cast<std::int64_t>(round.ids.size()) / of_.top_k;
    const ts::matrix_view<const std::int32_t> ids{round.ids.data(), tokens, of_.top_k};
    side.follow(stream);
    stream.launch_early(find_destinations_kernel<ts::layout::block>, 1, destination_threads, placement_, ids,
                        m.handle.destinations);
    push_task<float, ts::layout::block> push{view(rank, symmetric_channel::tables),
                                             placement_,
                                             ids,
                                             {round.weights.data(), tokens, of_.top_k},
                                             b.max_tokens,
                                             m.workspace.tables,
                                             nullptr,
                                             0};
    arrival_task<float> sort{};
    sort.view = push.view;
    sort.plan = ts::detail::make_list_plan(rows, slots, of_.list_blocks, ts::detail::sort_scratch_bytes);
    sort.lists = {{m.workspace.tables.slots, rows, of_.top_k},
                  {m.workspace.tables.weights, rows, of_.top_k},
                  {m.handle.expert_offsets, m.handle.gather, m.handle.expert_row_of, m.handle.pair_weights},
                  m.workspace.sort,
                  nullptr,
                  &m.handle.total->capacity_drops,
                  &m.handle.total->received_pairs,
                  slots,
                  INT32_MAX,
                  {}};
    sort.slots = m.workspace.tables.slots;
    sort.counts = m.workspace.tables.counts;
    sort.max_tokens = b.max_tokens;
    sort.max_pairs = b.max_pairs;
    sort.drops = of_.row_bound > 0;
    sort.total = m.handle.total;
    if (how.lists_at_once) {
      side.launch(exchange_tables_kernel<float, ts::layout::block>, sort.plan.num_blocks, ts::detail::list_threads,
                  {push, sort});
    } else {
      side.launch(push_routing_kernel<float, ts::layout::block>, of_.push_blocks, push_threads, push);
      side.launch(sort_arrivals_kernel<float>, sort.plan.num_blocks, ts::detail::list_threads, sort);
    }
  }

  void enqueue_rows(int rank, const way& how, const rank_round& round, emulated::stream& stream,
                    emulated::stream& side) {
    rank_memory& m = memory(rank);
    auto plan = send_plan::make(of_.hidden * static_cast<int>(sizeof(float)));
    plan.warps = 2;
    const auto x = rows_of(round.x);
    send_parts_task send{};
    static_cast<send_task&>(send) = {view(rank, symmetric_channel::rows),
                                     reinterpret_cast<const std::byte*>(x.data),
                                     plan.row_bytes,
                                     x.rows,
                                     m.handle.destinations,
                                     !how.expanded,
                                     reinterpret_cast<std::byte*>(m.received),
                                     plan.row_bytes,
                                     m.handle.max_tokens,
                                     plan,
                                     how.awaits};
    if (!how.expanded) {
      stream.launch_early(send_rows_kernel, of_.row_blocks, plan.warps * 32, send);
      if (!how.awaits) stream.launch_early(await_kernel, 1, 32, send.view);
      return;
    }
    side.follow(stream);
    send.parts = view(rank, symmetric_channel::parts);
    send.part_tokens = 3;
    stream.launch_early(send_parts_kernel, of_.row_blocks, (plan.warps + 1) * 32, send);
    expand_task expand{};
    expand.view = send.parts;
    expand.received = send.received;
    expand.max_tokens = m.handle.max_tokens;
    expand.own = send.rows;
    expand.own_stride = send.row_stride;
    expand.expert_row_of = m.handle.expert_row_of;
    expand.top_k = of_.top_k;
    expand.expanded = reinterpret_cast<std::byte*>(m.expanded);
    expand.expanded_stride = plan.row_bytes;
    expand.part_tokens = send.part_tokens;
    expand.plan = plan;
    side.launch(expand_parts_kernel, of_.row_blocks, plan.warps * 32, expand);
  }

  // What experts do, and owners that add up by themselves.
  void compute(int rank, const way& how) {
    rank_memory& m = memory(rank);
    const auto hidden = static_cast<std::size_t>(of_.hidden);
    const std::int32_t* const offsets = m.handle.expert_offsets;
    const int first_expert = first_expert_of(rank);
    std::fill_n(m.sums, static_cast<std::size_t>(bounds(rank).addressed_rows()) * hidden, 0.0f);
    for (int slot = 0; slot < m.handle.num_local_experts; ++slot) {
      for (auto row = static_cast<std::size_t>(offsets[slot]); row < static_cast<std::size_t>(offsets[slot + 1]);
           ++row) {
        const auto arrived = static_cast<std::size_t>(m.handle.gather[row]);
        const float* const x = how.expanded ? m.expanded + row * hidden : m.received + arrived * hidden;
        for (std::size_t j = 0; j < hidden; ++j) {
          m.outputs[row * hidden + j] = output(x[j], first_expert + slot);
          m.sums[arrived * hidden + j] += m.handle.pair_weights[row] * m.outputs[row * hidden + j];
        }
        m.row_values[row] = m.outputs[row * hidden];
      }
    }
    // What rows arrived in is the engine's own until it comes to the next operation.
    std::fill_n(m.received, static_cast<std::size_t>(bounds(rank).addressed_rows()) * hidden, -1.0f);
  }
  int first_expert_of(int rank) const {
    for (int e = 0; e < of_.num_experts; ++e)
      if (placement_.owner(e).rank == rank) return e;
    return of_.num_experts;
  }

  void enqueue_combine(int rank, const way& how, rank_round& round, emulated::stream& stream) {
    rank_memory& m = memory(rank);
    const symmetric_view v = view(rank, symmetric_channel::sums);
    const std::int64_t row_bytes = of_.hidden * static_cast<std::int64_t>(sizeof(float));
    const std::int64_t max_tokens = m.handle.max_tokens;
    if (how.by_pairs) {
      const std::int64_t pairs = max_tokens * of_.top_k;
      auto plan = send_plan::make(static_cast<int>(row_bytes));
      plan.warps = 2;
      stream.call([&m, pairs] { std::fill_n(m.pairs.places, pairs, -1); });
      stream.launch(send_pairs_kernel, of_.row_blocks, plan.warps * 32,
                    {v, reinterpret_cast<const std::byte*>(m.outputs), row_bytes, m.handle.expert_row_of,
                     reinterpret_cast<std::byte*>(m.pairs.rows), m.pairs.places, pairs, plan});
      stream.launch_early(await_kernel, 1, 32, v);
      stream.call([this, &m, &round] { add_pairs(m, round); });
      return;
    }
    const auto plan = sums_plan::make(max_tokens, row_bytes, ranks() - 1);
    const std::int64_t rows = how.summed ? max_tokens * ranks() : bounds(rank).max_pairs;
    sums_task<float, float, float> task{};
    task.view = v;
    task.pairs = {how.summed ? m.sums : m.outputs, rows, of_.hidden};
    task.expert_row_of = m.handle.expert_row_of;
    task.weights = how.summed ? nullptr : m.handle.pair_weights;
    task.returned = m.received;  // rows have been read
    task.destinations = m.handle.destinations;
    task.num_tokens = of_.tokens[static_cast<std::size_t>(rank)];
    task.max_tokens = static_cast<int>(max_tokens);
    task.top_k = of_.top_k;
    task.plan = plan;
    task.home_plan = plan.at_home(row_bytes);
    task.summed = how.summed;
    task.senders = 2;
    task.y = {round.y.data(), static_cast<std::int64_t>(round.y.size()) / of_.hidden, of_.hidden};
    stream.launch_early(send_sums_kernel<float, float, float>, 1, sums_threads, task);
  }
  void add_pairs(const rank_memory& m, rank_round& round) const {
    const auto hidden = static_cast<std::size_t>(of_.hidden), k = static_cast<std::size_t>(of_.top_k);
    for (std::size_t i = 0; i < round.y.size(); ++i) {
      round.y[i] = 0;
      for (std::size_t p = i / hidden * k; p < (i / hidden + 1) * k; ++p) {
        if (m.pairs.places[p] >= 0)
          round.y[i] +=
              round.weights[p] * m.pairs.rows[static_cast<std::size_t>(m.pairs.places[p]) * hidden + i % hidden];
      }
    }
  }

  shape of_;
  ts::layout::block placement_;
  std::mt19937 random_;
  std::deque<rank_memory> memory_;
  std::deque<emulated::stream> streams_;  // two of each rank
  std::vector<std::vector<rank_round>> rounds_;
};

}  // namespace

TEST_CASE("rounds of every kind follow each other over the same windows") {
  const shape shapes[] = {
      {{13, 20}, 20, 5, 3, 16, 2, 2, 2}, {{9, 0, 11}, 12, 4, 2, 8, 1, 1, 1}, {{20, 18}, 20, 6, 3, 16, 1, 1, 2, 24}};
  // Without values nothing but the operations themselves keeps a rank from running ahead of another.
  const way ways[] = {
      {.lists_at_once = true, .awaits = true},
      {.by_pairs = true, .values = true},
      {.cached = true, .awaits = true, .summed = true},
      {.lists_at_once = true, .expanded = true},
      {.expanded = true, .summed = true},
      {.cached = true, .expanded = true, .by_pairs = true},
      {.awaits = true},
      {.lists_at_once = true, .by_pairs = true},
      {.cached = true},
      {.cached = true, .summed = true, .values = true},
      {.lists_alone = true},
  };
  const std::vector<way> lists_in_a_row = {{.lists_alone = true}, {.lists_alone = true}, {.lists_at_once = true}};
  std::uint32_t seed = 1;
  for (shape s : shapes) {
    CAPTURE(s.tokens.size());
    if (emulated::is_watched) {  // a lane takes a megabyte then
      if (s.tokens.size() > 2) continue;
      s.list_blocks = 1;
    }
    std::mt19937 random(seed);
    std::vector<way> order(std::begin(ways), std::end(ways));
    if (!emulated::is_watched) order.insert(order.end(), std::begin(ways), std::end(ways));
    std::shuffle(order.begin() + 1, order.end(), random);  // the first one makes lists
    order.insert(order.end(), lists_in_a_row.begin(), lists_in_a_row.end());
    world(s, seed++).run_rounds(order);
  }
}
