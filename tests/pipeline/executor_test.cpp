// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Schedules run over threads: the gradients of a serial run, bit for bit, within the memory that was planned.

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tessera/pipeline/dualpipe.hpp>
#include <tessera/pipeline/dualpipev.hpp>
#include <tessera/pipeline/one_f_one_b.hpp>
#include <tessera/pipeline/validate.hpp>
#include <tessera/pipeline/zb1p.hpp>

#include "../support/messages.hpp"
#include "pipeline_fixture.hpp"

namespace {

using namespace pipeline_test;
using tessera_test::contains;
using tessera_test::message_of;
using clock_type = std::chrono::steady_clock;
using ts::comm::threads;

// All schedules at sizes that are valid for them.
std::vector<pl::schedule> schedules() {
  std::vector<pl::schedule> list;
  for (const int ranks : {1, 2, 3, 4, 6})
    for (const int micro_batches : {1, ranks, 2 * ranks + 3}) {
      list.push_back(pl::one_f_one_b(ranks, micro_batches));
      if (micro_batches >= ranks) list.push_back(pl::zb1p(ranks, micro_batches));
    }
  for (const int ranks : {2, 4, 6})
    for (const int extra : {0, 2, 6}) list.push_back(pl::dualpipe(ranks, 2 * ranks + extra));
  for (const int ranks : {1, 2, 3, 4})
    for (const int extra : {0, 1, 5}) list.push_back(pl::dualpipev(ranks, 2 * ranks + extra));
  return list;
}

// A schedule of a user's own: two stages, micro-batches in the order 2 0 1, and back in the order 1 2 0.
pl::schedule shuffled() {
  using k = pl::action_kind;
  pl::schedule s;
  s.name = "shuffled";
  s.num_ranks = s.num_stages = 2;
  s.num_micro_batches = 3;
  s.routes = pl::straight_routes(2);
  s.route_of = {0, 0, 0};
  s.max_live_activations = 3;
  s.actions.resize(2);
  for (const int m : {2, 0, 1}) {
    s.actions[0].insert(s.actions[0].end(), {{k::forward, 0, m}, {k::send_forward, 0, m}});
    s.actions[1].insert(s.actions[1].end(), {{k::receive_forward, 0, m}, {k::forward, 0, m}});
  }
  for (const int m : {1, 2, 0}) {
    s.actions[1].insert(s.actions[1].end(), {{k::backward, 0, m}, {k::send_backward, 0, m}});
    s.actions[0].insert(s.actions[0].end(), {{k::receive_backward, 0, m}, {k::backward, 0, m}});
  }
  return s;
}

void expect_serial_gradients(const pl::schedule& s, const std::vector<std::int64_t>& rows, std::int64_t max_rows) {
  INFO(s.name, " of ", s.num_ranks, " ranks and ", s.num_micro_batches, " micro-batches");
  const auto expected = serial_gradients(s.num_stages, rows, max_rows);
  std::mutex mutex;
  threads::run(s.num_ranks, [&](threads& comm) {
    pipeline_rank<threads> rank(s, comm, max_rows);
    rank.run(rows);
    rank.sum_mirrored();
    const std::lock_guard lock(mutex);
    for (int chunk = 0; chunk < s.num_chunks; ++chunk) {
      INFO("rank ", comm.rank(), ", chunk ", chunk);
      const auto stage = static_cast<std::size_t>(s.stage_of(comm.rank(), chunk));
      CHECK(same_bits(rank.gradient(chunk), expected[stage]));
    }
  });
}

// The most buffers at the same time, counted from the list alone: x and dy until the weight part, y and dx until sent.
int peak_of_list(const pl::schedule& s, int rank) {
  int live = 0, peak = 0;
  const auto stage = [&](int chunk, int m) { return s.stage_of(rank, chunk, m); };
  const auto& list = s.actions[static_cast<std::size_t>(rank)];
  for (std::size_t i = 0; i < list.size();) {
    if (const std::size_t end = pl::batch_end(list, i); end > i) {
      for (std::size_t k = i; k < end; ++k) live += pl::is_receive(list[k].kind) ? 1 : 0;
      peak = std::max(peak, live);
      for (std::size_t k = i; k < end; ++k) live -= pl::is_send(list[k].kind) ? 1 : 0;
      i = end;
      continue;
    }
    const pl::action& a = list[i++];
    if (pl::has_forward(a.kind)) live += stage(a.chunk, a.micro_batch) + 1 < s.num_stages ? 1 : 0;
    const int m = pl::backward_micro_batch_of(a), chunk = pl::backward_chunk_of(a);
    if (pl::has_backward_input(a.kind)) live += stage(chunk, m) > 0 ? 1 : 0;
    peak = std::max(peak, live);
    if (pl::has_backward_weights(a.kind)) live -= (stage(chunk, m) > 0) + (stage(chunk, m) + 1 < s.num_stages);
  }
  return peak;
}

// The most micro-batches of a chunk between the beginning of the forward and the end of the weight part.
int slots_of_list(const pl::schedule& s, int rank, int chunk) {
  int live = 0, peak = 0;
  for (const pl::action& a : s.actions[static_cast<std::size_t>(rank)]) {
    if (pl::has_forward(a.kind) && a.chunk == chunk) ++live;
    peak = std::max(peak, live);
    if (pl::has_backward_weights(a.kind) && pl::backward_chunk_of(a) == chunk) --live;
  }
  return peak;
}

}  // namespace

TEST_CASE("every schedule gives the gradients of a serial run, bit for bit, for ragged micro-batches") {
  for (const pl::schedule& s : schedules()) expect_serial_gradients(s, ragged_rows(s.num_micro_batches, 4), 4);
}

TEST_CASE("gradients are added in the order of micro-batches even where the schedule has another order") {
  const pl::schedule s = shuffled();
  pl::validate(s);
  expect_serial_gradients(s, {3, 1, 4}, 4);
  threads::run(2, [&](threads& comm) {
    const std::vector<std::int64_t> rows{3, 1, 4};
    pipeline_rank<threads> rank(s, comm, 4);
    rank.run(rows);
    CHECK(rank.stages[0]->weight_order == std::vector<int>{0, 1, 2});
    pipeline_rank<threads> free(s, comm, 4, pl::gradient_order::schedule);
    free.run(rows);
    CHECK(free.stages[0]->weight_order == std::vector<int>{1, 2, 0});
    CHECK(free.runner->plan().num_buffers <= rank.runner->plan().num_buffers);
    for (std::size_t i = 0; i < free.gradient(0).size(); ++i)
      CHECK(free.gradient(0)[i] == doctest::Approx(rank.gradient(0)[i]).epsilon(1e-4));
  });
}

TEST_CASE("a mirrored place that no micro-batch passes adds nothing, and gets the sum") {
  pl::schedule s = pl::dualpipe(2, 4);
  std::fill(s.route_of.begin(), s.route_of.end(), 0);
  for (const auto order : {pl::gradient_order::schedule, pl::gradient_order::micro_batch}) {
    threads::run(2, [&](threads& comm) {
      std::vector<std::vector<float>> gradients;
      std::vector<pl::stage_gradients<float>> views;
      for (int chunk = 0; chunk < s.num_chunks; ++chunk) {
        const bool idle = pl::micro_batches_at(s, comm.rank(), chunk).empty();
        gradients.emplace_back(5, idle ? std::numeric_limits<float>::quiet_NaN() : 3.0f);
        views.push_back({gradients.back().data(), 5});
      }
      ts::host_buffer workspace(pl::sum_mirrored_gradients_workspace_bytes<float>(s, order, 2));
      pl::sum_mirrored_gradients<threads, float>({}, comm, s, order, views, workspace, 2);
      for (const std::vector<float>& g : gradients) CHECK(g == std::vector<float>(5, 3.0f));
    });
  }
}

TEST_CASE("a rank that holds a stage twice is refused when memory is sized") {
  pl::schedule s = pl::dualpipe(2, 4);
  const pl::place first = s.routes[0][0];
  s.routes[1][0] = {first.rank, 1 - first.chunk};
  for (const auto order : {pl::gradient_order::schedule, pl::gradient_order::micro_batch})
    CHECK(contains(message_of([&] { pl::sum_mirrored_gradients_workspace_bytes<float>(s, order, 2); }),
                   "rank 0 holds stage 0 twice"));
}

TEST_CASE("unordered addition of mirrored stages is the same up to rounding, with one row of gradients") {
  const pl::schedule s = pl::dualpipe(4, 10);
  const auto rows = ragged_rows(10, 4);
  const auto expected = serial_gradients(4, rows, 4);
  std::vector<std::vector<float>> first(4), second(4);
  threads::run(4, [&](threads& comm) {
    pipeline_rank<threads> rank(s, comm, 4, pl::gradient_order::schedule);
    for (int chunk = 0; chunk < 2; ++chunk)
      CHECK(rank.runner->plan().gradient_rows[static_cast<std::size_t>(chunk)] == 1);
    rank.run(rows);
    rank.sum_mirrored();
    first[static_cast<std::size_t>(s.stage_of(comm.rank(), 0))] = rank.gradient(0);
    second[static_cast<std::size_t>(s.stage_of(comm.rank(), 1))] = rank.gradient(1);
  });
  for (std::size_t stage = 0; stage < 4; ++stage) {
    CHECK(same_bits(first[stage], second[stage]));
    for (std::size_t i = 0; i < first[stage].size(); ++i)
      CHECK(first[stage][i] == doctest::Approx(expected[stage][i]).epsilon(1e-4));
  }
}

TEST_CASE("embedding and head are one object where a rank holds the first and the last stage") {
  for (const pl::schedule& s : {pl::dualpipe(4, 8), pl::dualpipev(3, 7)}) {
    INFO(s.name);
    const auto rows = ragged_rows(s.num_micro_batches, 3);
    const auto serial = serial_gradients(s.num_stages, rows, 3);
    // The table's gradient: the embedding's part plus the head's.
    std::vector<float> expected;
    for (std::int64_t i = 0; i < table_size; ++i)
      expected.push_back(serial.front()[static_cast<std::size_t>(width * width + i)] +
                         serial.back()[static_cast<std::size_t>(width * width + table_size + i)]);
    std::atomic<int> holders{0};
    threads::run(s.num_ranks, [&](threads& comm) {
      pipeline_rank<threads> rank(s, comm, 3);
      rank.run(rows);
      rank.sum_mirrored();
      const auto chunk_with = [&](int stage) { return s.stage_of(comm.rank(), 0) == stage ? 0 : 1; };
      if (s.stage_of(comm.rank(), chunk_with(0)) != 0) return;
      REQUIRE(s.stage_of(comm.rank(), chunk_with(s.num_stages - 1)) == s.num_stages - 1);
      ++holders;
      const auto embedding = rank.gradient(chunk_with(0));
      const auto head = rank.gradient(chunk_with(s.num_stages - 1));
      std::vector<float> sum;
      for (std::int64_t i = 0; i < table_size; ++i)
        sum.push_back(embedding[static_cast<std::size_t>(width * width + i)] +
                      head[static_cast<std::size_t>(width * width + table_size + i)]);
      CHECK(same_bits(sum, expected));
    });
    CHECK(holders == (s.name == pl::dualpipe(4, 8).name ? 2 : 1));
  }
}

TEST_CASE("the planned memory is what the list needs at its peak, and a run uses all of it and no more") {
  for (const pl::schedule& s : schedules()) {
    INFO(s.name, " of ", s.num_ranks, " ranks and ", s.num_micro_batches, " micro-batches");
    std::vector<std::size_t> used(static_cast<std::size_t>(s.num_ranks));
    const std::vector<std::int64_t> rows(static_cast<std::size_t>(s.num_micro_batches), 2);
    threads::run(s.num_ranks, [&](threads& comm) {
      pipeline_rank<threads> rank(s, comm, 2);
      rank.run(rows);
      std::set<const void*> all;
      for (const auto& stage : rank.stages) all.insert(stage->buffers.begin(), stage->buffers.end());
      for (const void* p : all)
        if (p < rank.memory.data() || p >= rank.memory.data() + rank.memory.size()) throw std::logic_error("outside");
      used[static_cast<std::size_t>(comm.rank())] = all.size();
    });
    for (int rank = 0; rank < s.num_ranks; ++rank) {
      INFO("rank ", rank);
      const pl::execution_plan plan = pl::plan_execution(s, rank);
      CHECK(plan.num_buffers == peak_of_list(s, rank));
      CHECK(used[static_cast<std::size_t>(rank)] == static_cast<std::size_t>(plan.num_buffers));
      for (int chunk = 0; chunk < s.num_chunks; ++chunk)
        CHECK(plan.saved_slots[static_cast<std::size_t>(chunk)] == slots_of_list(s, rank, chunk));
    }
  }
}

TEST_CASE("a stage that throws is reported to every rank with stage, micro-batch and text, whatever it was doing") {
  using k = pl::action_kind;
  const auto start = clock_type::now();
  for (const pl::schedule& s : {pl::one_f_one_b(3, 5), pl::zb1p(3, 5), pl::dualpipe(4, 8), pl::dualpipev(2, 5)}) {
    const auto rows = ragged_rows(s.num_micro_batches, 3);
    const auto expected = serial_gradients(s.num_stages, rows, 3);
    for (const k kind : {k::forward, k::backward_input, k::backward_weights}) {
      for (const int micro_batch : {0, s.num_micro_batches - 1}) {
        for (const int culprit : {0, s.num_stages - 1}) {
          INFO(s.name, ": ", pl::symbol_of(kind), " of ", micro_batch, " at stage ", culprit);
          std::atomic<int> told{0};
          threads::run(s.num_ranks, [&](threads& comm) {
            pipeline_rank<threads> rank(s, comm, 3);
            for (auto& stage : rank.stages) {
              stage->before = [&](const pl::work_item& item, k doing) {
                if (doing == kind && item.stage == culprit && item.micro_batch == micro_batch)
                  throw std::runtime_error("the disk is full");
              };
            }
            const int there = s.rank_of(culprit, micro_batch);
            const std::string text = comm.rank() == there ? message_of<pl::stage_error>([&] { rank.run(rows); })
                                                          : message_of<ts::comm_error>([&] { rank.run(rows); });
            const bool complete =
                contains(text, "stage " + std::to_string(culprit) + " (rank " + std::to_string(there) +
                                   "), micro-batch " + std::to_string(micro_batch)) &&
                contains(text, "the disk is full");
            told += complete ? 1 : 0;
            // Afterwards the same executor works again.
            comm.reset();
            for (auto& stage : rank.stages) stage->before = nullptr;
            rank.run(rows);
            rank.sum_mirrored();
            if (!same_bits(rank.gradient(0), expected[static_cast<std::size_t>(s.stage_of(comm.rank(), 0))]))
              throw std::logic_error("wrong gradients after an error");
          });
          CHECK(told == s.num_ranks);
        }
      }
    }
  }
  CHECK(clock_type::now() - start < std::chrono::seconds(10));  // nobody has waited for a timeout
}

TEST_CASE("the exception of a stage is nested in the error that its rank throws") {
  ts::comm::self<ts::space::host> comm;
  const pl::schedule s = pl::one_f_one_b(1, 2);
  pipeline_rank<ts::comm::self<ts::space::host>> rank(s, comm, 2);
  rank.stages[0]->before = [](const pl::work_item&, pl::action_kind kind) {
    if (kind == pl::action_kind::backward_weights) throw std::out_of_range("inner");
  };
  const std::vector<std::int64_t> rows{2, 1};
  try {
    rank.run(rows);
    FAIL("nothing was thrown");
  } catch (const pl::stage_error& e) {
    CHECK(e.rank() == 0);
    CHECK(e.stage() == 0);
    CHECK(e.micro_batch() == 0);
    CHECK(e.during() == pl::action_kind::backward_weights);
    CHECK(message_of<std::out_of_range>([&] { std::rethrow_if_nested(e); }) == "inner");
  }
  rank.stages[0]->before = [](const pl::work_item&, pl::action_kind) { throw 3; };
  CHECK(contains(message_of<pl::stage_error>([&] { rank.run(rows); }), "not a std::exception"));
}

TEST_CASE("a rank that dies in the middle gives an error on the others, and not after the timeout only") {
  const pl::schedule s = pl::dualpipe(4, 8);
  const auto rows = ragged_rows(8, 3);
  struct killed {};
  std::atomic<int> told{0};
  const auto start = clock_type::now();
  threads::run(4, [&](threads& comm) {
    pipeline_rank<threads> rank(s, comm, 3);
    if (comm.rank() == 2) return;  // gone without a word
    const std::string text = message_of<ts::comm_error>([&] { rank.run(rows); });
    told += contains(text, "rank 2 has left") ? 1 : 0;
  });
  CHECK(told == 3);
  CHECK(clock_type::now() - start < std::chrono::seconds(5));
}

TEST_CASE("a rank that hangs is named within the communicator's timeout") {
  const pl::schedule s = pl::one_f_one_b(3, 4);
  const auto rows = ragged_rows(4, 3);
  std::atomic<int> told{0};
  threads::run(3,
               [&](threads& comm) {
                 pipeline_rank<threads> rank(s, comm, 3);
                 if (comm.rank() == 1) {
                   std::this_thread::sleep_for(std::chrono::milliseconds(700));
                   return;
                 }
                 const std::string text = message_of<ts::comm_error>([&] { rank.run(rows); });
                 told += contains(text, "rank 1 did not arrive") ? 1 : 0;
               },
               {.timeout = std::chrono::milliseconds(200)});
  CHECK(told == 2);
}

TEST_CASE("arguments that do not fit are refused before anything runs") {
  ts::comm::self<ts::space::host> comm;
  using comm_type = ts::comm::self<ts::space::host>;
  using runner = pl::executor<comm_type, float>;
  const pl::schedule two = pl::one_f_one_b(2, 2);
  CHECK(contains(message_of([&] { runner(two, comm, {}, {2, width}); }), "2 ranks"));
  const pl::schedule s = pl::dualpipev(1, 2);  // both stages here: two buffers at least
  CHECK(contains(message_of([&] { runner(s, comm, {}, {2, width}); }), "too small"));
  CHECK(contains(message_of([&] { runner(s, comm, {}, {-1, width}); }), "max_rows = -1"));
  pipeline_rank<comm_type> rank(s, comm, 2);
  const std::vector<std::int64_t> few{1}, large{1, 3};
  CHECK(contains(message_of([&] { rank.run(few); }), "1 micro-batches"));
  CHECK(contains(message_of([&] { rank.run(large); }), "max_rows = 2"));
  CHECK(rank.stages[0]->buffers.empty());
}

TEST_CASE("a list that cannot be run is refused, naming the action") {
  using k = pl::action_kind;
  const auto refused = [](std::vector<pl::action> list) {
    pl::schedule s = pl::one_f_one_b(1, 1);
    s.actions[0] = std::move(list);
    return message_of([&] { pl::plan_execution(s, 0); });
  };
  CHECK(contains(refused({{k::backward, 0, 0}}), "before the forward"));
  CHECK(contains(refused({{k::forward, 0, 0}, {k::forward, 0, 0}}), "comes twice"));
  CHECK(contains(refused({{k::forward, 0, 0}, {k::backward_input, 0, 0}}), "not finished"));
  CHECK(contains(refused({{k::forward, 0, 0}, {k::backward_weights, 0, 0}}), "not in the queue"));
  CHECK(contains(refused({{k::forward, 0, 0}, {k::backward, 0, 0}, {k::backward_weights, 0, 0}}), "not in the queue"));
  CHECK(contains(refused({{k::forward, 1, 0}}), "chunk 1 of 1"));
  CHECK(contains(refused({{k::forward, 0, 0}, {k::send_forward, 0, 0}}), "no other rank"));
  CHECK_NOTHROW(pl::plan_execution(pl::one_f_one_b(1, 1), 0));
}
