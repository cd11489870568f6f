// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The kernels that move rows between GPUs and add them up, run on the host (block.hpp): lanes in any order, copies as
// late as waits allow, ranks at the same time. What arrives must be right and complete, and the counters as before.

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <tessera/dispatch/detail/symmetric/expand_parts.cuh>
#include <tessera/dispatch/detail/symmetric/send_pairs.cuh>
#include <tessera/dispatch/detail/symmetric/send_parts.cuh>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/dispatch/detail/symmetric/send_sums.cuh>

#include "emulated/stream.hpp"

namespace {

namespace ts = tessera;
using namespace ts::detail::symmetric;
using ts::comm::symmetric_view;

struct shape {
  std::vector<int> tokens;  // of each rank
  int max_tokens;
  int top_k;
  int row_bytes;
  int pieces = 1;       // of a row
  int part_tokens = 1;  // of a flag
  int blocks = 2;

  int ranks() const { return static_cast<int>(tokens.size()); }
  std::int64_t rows() const { return static_cast<std::int64_t>(ranks()) * max_tokens; }
};

constexpr int warps = 2;  // with rings
constexpr int channels = 2;

// Windows and counters of all ranks, and a routing.
struct world {
  world(const shape& s, std::uint32_t seed) : of(s), random(seed) {
    plan = send_plan::divide(s.row_bytes, s.pieces);
    plan.warps = warps;
    const auto pairs = static_cast<std::size_t>(s.max_tokens) * static_cast<std::size_t>(s.top_k);
    // room for all ranks' rows, or for all pairs of this rank's tokens with their places
    const std::size_t places = (pairs * 4 + 15) / 16 * 16;
    places_at = flag_bytes + std::max(static_cast<std::size_t>(s.rows()), pairs) * row();
    for (int r = 0; r < s.ranks(); ++r) {
      windows.emplace_back((places_at + places) / 16 + 1);
      counters.emplace_back(channels * 8);
      for (int i = 0; i < 2; ++i) streams.emplace_back(static_cast<std::uint32_t>(random()));
    }
    failures.resize(windows.size());
  }
  std::size_t row() const { return static_cast<std::size_t>(of.row_bytes); }
  std::byte* window(int rank) { return reinterpret_cast<std::byte*>(windows[static_cast<std::size_t>(rank)].data()); }
  std::byte* received(int rank) { return window(rank) + flag_bytes; }
  symmetric_view view(int rank, int channel) {
    symmetric_view v;
    v.rank = rank;
    v.size = of.ranks();
    for (int r = 0; r < v.size; ++r) v.peer[r] = window(r);
    auto* const words = reinterpret_cast<std::uint32_t*>(window(rank));
    v.entered = words + channel * 16;
    v.arrived = v.entered + 8;
    v.chunks = words + channels * 16;
    v.generation = counters[static_cast<std::size_t>(rank)].data() + channel * 8;
    v.tickets = v.generation + 4;
    v.failure = &failures[static_cast<std::size_t>(rank)];
    v.timeout_ns = 30'000'000'000;
    return v;
  }
  // New tokens, and which ranks and rows of experts they go to.
  void route() {
    const auto ranks = static_cast<std::size_t>(of.ranks());
    const auto all = static_cast<std::size_t>(of.rows()) * static_cast<std::size_t>(of.top_k);
    x.assign(ranks, {});
    own_rows.assign(ranks, {});
    destinations.assign(ranks, std::vector<std::uint32_t>(static_cast<std::size_t>(of.max_tokens), 0));
    expert_row_of.assign(ranks, std::vector<std::int32_t>(all, -1));
    gather.assign(ranks, {});
    for (std::size_t s = 0; s < ranks; ++s) {
      for (std::size_t i = 0; i < static_cast<std::size_t>(of.max_tokens) * row(); ++i)
        x[s].push_back(static_cast<unsigned char>(random()));
      for (std::size_t t = 0; t < static_cast<std::size_t>(of.max_tokens); ++t) {
        own_rows[s].resize(t * (row() + 16));
        own_rows[s].insert(own_rows[s].end(), token(s * static_cast<std::size_t>(of.max_tokens) + t),
                           token(s * static_cast<std::size_t>(of.max_tokens) + t) + row());
      }
      for (int t = 0; t < of.tokens[s]; ++t) {
        for (int k = 0; k < of.top_k; ++k) {
          if (random() % 5 == 0) continue;
          const std::size_t owner = random() % ranks;
          destinations[s][static_cast<std::size_t>(t)] |= 1u << owner;
          const auto pair = (static_cast<std::int64_t>(s) * of.max_tokens + t) * of.top_k + k;
          expert_row_of[owner][static_cast<std::size_t>(pair)] = 0;
        }
      }
    }
    for (std::size_t r = 0; r < ranks; ++r) {  // in any order, some dropped
      std::vector<std::size_t> pairs;
      for (std::size_t p = 0; p < all; ++p)
        if (expert_row_of[r][p] == 0) pairs.push_back(p);
      std::shuffle(pairs.begin(), pairs.end(), random);
      for (const std::size_t p : pairs) {
        expert_row_of[r][p] = random() % 11 == 0 ? -2 : static_cast<std::int32_t>(gather[r].size());
        if (expert_row_of[r][p] >= 0) gather[r].push_back(p);
      }
    }
  }
  const unsigned char* token(std::size_t received_row) const {
    const auto tokens = static_cast<std::size_t>(of.max_tokens);
    return x[received_row / tokens].data() + received_row % tokens * row();
  }
  send_task sender(int rank) {
    const auto r = static_cast<std::size_t>(rank);
    return {view(rank, 0),
            reinterpret_cast<const std::byte*>(x[r].data()),
            of.row_bytes,
            of.tokens[r],
            destinations[r].data(),
            true,
            received(rank),
            of.row_bytes,
            of.max_tokens,
            plan,
            false};
  }
  send_parts_task parts_sender(int rank) {
    send_parts_task task{};
    static_cast<send_task&>(task) = sender(rank);
    task.sends_own = false;
    task.parts = view(rank, 1);
    task.part_tokens = of.part_tokens;
    return task;
  }
  expand_task expander(int rank, std::vector<unsigned char>& expanded) {
    expand_task task{};
    task.view = view(rank, 1);
    task.received = received(rank);
    task.max_tokens = of.max_tokens;
    task.own = reinterpret_cast<const std::byte*>(own_rows[static_cast<std::size_t>(rank)].data());
    task.own_stride = of.row_bytes + 16;
    task.expert_row_of = expert_row_of[static_cast<std::size_t>(rank)].data();
    task.top_k = of.top_k;
    task.expanded = reinterpret_cast<std::byte*>(expanded.data());
    task.expanded_stride = of.row_bytes;
    task.part_tokens = of.part_tokens;
    task.plan = plan;
    return task;
  }
  void expect_finished(std::uint32_t generation, int used_channels) {
    for (int r = 0; r < of.ranks(); ++r) {
      CHECK(failures[static_cast<std::size_t>(r)].state == 0);
      for (int c = 0; c < used_channels; ++c) {
        const symmetric_view v = view(r, c);
        CHECK(*v.generation == generation);
        for (int i = 0; i < 4; ++i) CHECK(v.tickets[i] == 0);
      }
    }
  }

  static constexpr std::size_t flag_bytes =
      (channels * 16 + std::size_t{ts::comm::max_symmetric_ranks} * ts::comm::max_symmetric_chunks) * 4;
  struct alignas(16) line {
    std::byte bytes[16];
  };
  emulated::stream& stream_of(int rank) { return streams[2 * static_cast<std::size_t>(rank)]; }
  emulated::stream& side_of(int rank) { return streams[2 * static_cast<std::size_t>(rank) + 1]; }

  shape of;
  std::mt19937 random;
  std::deque<emulated::stream> streams;
  send_plan plan{};
  std::size_t places_at = 0;
  std::vector<std::vector<line>> windows;
  std::vector<std::vector<std::uint32_t>> counters;
  std::vector<ts::comm::symmetric_failure> failures;
  std::vector<std::vector<unsigned char>> x;
  std::vector<std::vector<unsigned char>> own_rows;  // the same, 16 bytes apart
  std::vector<std::vector<std::uint32_t>> destinations;
  std::vector<std::vector<std::int32_t>> expert_row_of;
  std::vector<std::vector<std::size_t>> gather;  // of each rank's expert rows: the pair
};

const shape shapes[] = {
    {{20, 13}, 24, 4, 96, 1, 4},
    {{50, 41}, 50, 4, 64, 1, 1},
    {{31, 37, 22}, 40, 8, 192, 3, 3},
    {{20, 25}, 25, 32, 48, 1, 5},
    {{0, 9}, 9, 2, 32},
    {{0, 0, 0, 0}, 3, 2, 32},
    {{70, 66}, 70, 2, 4096, 2, 7, 1},
    {{33, 40}, 40, 3, 160, 1, 64, 3},
    {{7, 1}, 40, 1, 16, 1, 3},
    {{17, 9, 23, 12}, 24, 5, 80, 2, 2},
    {{40}, 40, 6, 64, 1, 4},
    {{9, 7}, 9, 3, 12304, 2, 2},
    {{60, 55}, 60, 3, 8192, 1, 4, 1},
    {{30, 25}, 400, 2, 16384, 1, 2},  // units of sums of several pieces
    {{20, 15}, 9000, 1, 16},          // and of several tokens
};

template <class Round>
void for_all_shapes(Round round) {
  std::uint32_t seed = 1;
  for (const shape& s : shapes) {
    CAPTURE(s.max_tokens);
    CAPTURE(s.row_bytes);
    world w(s, seed++);
    if (emulated::is_watched && s.row_bytes > 1024) continue;  // the same in fewer pieces is there
    for (std::uint32_t generation = 1; generation <= (emulated::is_watched ? 2 : 3); ++generation) {
      w.route();
      round(w, generation);
    }
  }
}

// Every byte that is not a token's must be as it was.
constexpr unsigned char untouched = 0xee;

}  // namespace

TEST_CASE("rows reach the ranks that own one of their experts") {
  for_all_shapes([](world& w, std::uint32_t generation) {
    for (int r = 0; r < w.of.ranks(); ++r)
      std::memset(w.received(r), untouched, static_cast<std::size_t>(w.of.rows()) * w.row());
    for (int r = 0; r < w.of.ranks(); ++r)
      w.stream_of(r).launch(send_rows_kernel, w.of.blocks, warps * 32, w.sender(r));
    run(w.streams);
    w.expect_finished(generation, 1);
    const std::vector<unsigned char> nothing(w.row(), untouched);
    int wrong = 0;
    for (int r = 0; r < w.of.ranks(); ++r) {
      for (std::size_t row = 0; row < static_cast<std::size_t>(w.of.rows()); ++row) {
        const std::size_t tokens = static_cast<std::size_t>(w.of.max_tokens);
        const bool comes = (w.destinations[row / tokens][row % tokens] >> r & 1) != 0;
        wrong += std::memcmp(w.received(r) + row * w.row(), comes ? w.token(row) : nothing.data(), w.row()) != 0;
      }
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("rows that arrive are put in the order of experts while others are under way") {
  for_all_shapes([](world& w, std::uint32_t generation) {
    std::vector<std::vector<unsigned char>> expanded;
    for (const auto& rows : w.gather) expanded.emplace_back((rows.size() + 1) * w.row(), untouched);
    for (int r = 0; r < w.of.ranks(); ++r)
      std::memset(w.received(r), untouched, static_cast<std::size_t>(w.of.rows()) * w.row());
    for (int r = 0; r < w.of.ranks(); ++r) {
      w.side_of(r).launch(expand_parts_kernel, w.of.blocks, warps * 32,
                          w.expander(r, expanded[static_cast<std::size_t>(r)]));
      w.stream_of(r).launch(send_parts_kernel, w.of.blocks, (warps + 1) * 32, w.parts_sender(r));
    }
    run(w.streams);
    w.expect_finished(generation, 2);
    int wrong = 0;
    for (std::size_t r = 0; r < expanded.size(); ++r) {
      for (std::size_t row = 0; row < w.gather[r].size(); ++row) {
        const std::size_t from = w.gather[r][row] / static_cast<std::size_t>(w.of.top_k);
        wrong += std::memcmp(expanded[r].data() + row * w.row(), w.token(from), w.row()) != 0;
      }
      wrong += std::count(expanded[r].end() - w.of.row_bytes, expanded[r].end(), untouched) != w.of.row_bytes;
    }
    CHECK(wrong == 0);
  });
}

TEST_CASE("expert rows come home to their pairs' places") {
  for_all_shapes([](world& w, std::uint32_t generation) {
    std::vector<std::vector<unsigned char>> outputs;
    for (const auto& rows : w.gather) {
      auto& of_rank = outputs.emplace_back();
      for (std::size_t i = 0; i < rows.size() * w.row(); ++i) of_rank.push_back(static_cast<unsigned char>(w.random()));
    }
    const std::int64_t pairs = static_cast<std::int64_t>(w.of.max_tokens) * w.of.top_k;
    const auto places_of = [&](int rank) { return reinterpret_cast<std::int32_t*>(w.window(rank) + w.places_at); };
    for (int r = 0; r < w.of.ranks(); ++r) std::fill_n(places_of(r), pairs, -1);
    for (int r = 0; r < w.of.ranks(); ++r) {
      const auto own = static_cast<std::size_t>(r);
      const pairs_task task{w.view(r, 0),   reinterpret_cast<const std::byte*>(outputs[own].data()),
                            w.of.row_bytes, w.expert_row_of[own].data(),
                            w.received(r),  places_of(r),
                            pairs,          w.plan};
      w.stream_of(r).launch(send_pairs_kernel, w.of.blocks, warps * 32, task);
    }
    run(w.streams);
    w.expect_finished(generation, 1);
    int wrong = 0, sent = 0;
    for (std::size_t r = 0; r < outputs.size(); ++r) {
      for (std::size_t row = 0; row < w.gather[r].size(); ++row, ++sent) {
        const auto home = static_cast<int>(w.gather[r][row] / static_cast<std::size_t>(pairs));
        const std::size_t place = w.gather[r][row] % static_cast<std::size_t>(pairs);
        wrong += places_of(home)[place] != static_cast<std::int32_t>(place);
        wrong += std::memcmp(w.received(home) + place * w.row(), outputs[r].data() + row * w.row(), w.row()) != 0;
      }
    }
    for (int r = 0; r < w.of.ranks(); ++r)
      sent -= static_cast<int>(std::count_if(places_of(r), places_of(r) + pairs, [](auto p) { return p >= 0; }));
    CHECK(wrong == 0);
    CHECK(sent == 0);
  });
}

namespace {

using sums_kernel = void (*)(sums_task<float, float, float>);

// Numbers that do not come home as they should. @param summed Whether owners have made sums before.
// @param end After rank 1's kernel.
int count_wrong_sums(world& w, std::uint32_t generation, bool summed, sums_kernel kernel, std::uint64_t timeout_ns,
                     const std::function<void()>& end) {
  // Whole numbers: every order of adding them gives the same.
  const auto ranks = static_cast<std::size_t>(w.of.ranks());
  const auto tokens = static_cast<std::size_t>(w.of.max_tokens), columns = w.row() / sizeof(float);
  std::vector<std::vector<float>> rows(ranks), weights(ranks), plus(ranks), y(ranks), expected(ranks);
  const auto number = [&] { return static_cast<float>(w.random() % 64); };
  for (std::size_t r = 0; r < ranks; ++r) {
    const std::size_t count = summed ? ranks * tokens : w.gather[r].size();
    for (std::size_t i = 0; i < count * columns; ++i) rows[r].push_back(number());
    for (std::size_t i = 0; i < w.gather[r].size(); ++i) weights[r].push_back(static_cast<float>(1 + w.random() % 3));
    for (std::size_t i = 0; i < tokens * columns; ++i) plus[r].push_back(number());
    y[r].assign(tokens * columns, -1);
    expected[r] = plus[r];
  }
  for (std::size_t r = 0; r < ranks; ++r) {
    const auto add = [&](std::size_t arrived, const float* row, float weight) {
      float* const to = expected[arrived / tokens].data() + arrived % tokens * columns;
      for (std::size_t j = 0; j < columns; ++j) to[j] += weight * row[j];
    };
    for (std::size_t i = 0; i < w.gather[r].size() && !summed; ++i)
      add(w.gather[r][i] / static_cast<std::size_t>(w.of.top_k), rows[r].data() + i * columns, weights[r][i]);
    for (std::size_t arrived = 0; arrived < ranks * tokens && summed; ++arrived) {
      const bool comes = (w.destinations[arrived / tokens][arrived % tokens] >> r & 1) != 0;
      if (comes) add(arrived, rows[r].data() + arrived * columns, 1);
    }
  }
  // What nobody sends is no number.
  for (int r = 0; r < w.of.ranks(); ++r)
    std::memset(w.received(r), 0xff, static_cast<std::size_t>(w.of.rows()) * w.row());
  const auto row_bytes = static_cast<std::int64_t>(w.of.row_bytes);
  const auto plan = sums_plan::make(w.of.max_tokens, row_bytes, w.of.ranks() - 1);
  {
    for (int rank = 0; rank < w.of.ranks(); ++rank) {
      const auto r = static_cast<std::size_t>(rank);
      const auto width = static_cast<std::int64_t>(columns);
      sums_task<float, float, float> task{};
      task.view = w.view(rank, 0);
      task.view.timeout_ns = timeout_ns;
      task.pairs = {rows[r].data(), static_cast<std::int64_t>(rows[r].size() / columns), width};
      task.expert_row_of = w.expert_row_of[r].data();
      task.weights = summed ? nullptr : weights[r].data();
      task.returned = reinterpret_cast<float*>(w.received(rank));
      task.destinations = w.destinations[r].data();
      task.num_tokens = w.of.tokens[r];
      task.max_tokens = w.of.max_tokens;
      task.top_k = w.of.top_k;
      task.plan = plan;
      task.home_plan = plan.at_home(row_bytes);
      task.summed = summed;
      task.senders = 1 + static_cast<int>((generation + r) % send_warps);
      task.plus = {plus[r].data(), w.of.tokens[r], width};
      task.y = {y[r].data(), w.of.tokens[r], width};
      w.stream_of(rank).launch(kernel, w.of.blocks, sums_threads, task);
      if (rank == 1) w.stream_of(rank).call(end);
    }
  }
  run(w.streams);
  int wrong = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    const auto own = static_cast<std::size_t>(w.of.tokens[r]) * columns;
    for (std::size_t i = 0; i < tokens * columns; ++i) wrong += y[r][i] != (i < own ? expected[r][i] : -1.0f);
  }
  return wrong;
}

std::atomic<bool> has_room;
// Something else has the multiprocessor of a block of rank 0, and waits for what comes behind rank 1's kernel.
void held_sums_kernel(sums_task<float, float, float> task) {
  if (task.view.rank == 0 && blockIdx.x == 1) emulated::block::own()->wait([] { return has_room.load(); });
  send_sums_kernel<float, float, float>(task);
}

}  // namespace

TEST_CASE("sums of expert rows, and of sums that owners have made, come home") {
  for_all_shapes([](world& w, std::uint32_t generation) {
    CHECK(count_wrong_sums(w, generation, generation == 2, send_sums_kernel<float, float, float>, 30'000'000'000,
                           [] {}) == 0);
    w.expect_finished(generation, 1);
  });
}

// Not while lanes are watched, for which half a second is too short.
TEST_CASE("sums come home though a block finds no room before another rank's kernel has ended" *
          doctest::skip(emulated::is_watched)) {
  world w({{40, 40}, 40, 4, 96, 1, 4}, 3);
  w.route();
  has_room = false;
  CHECK(count_wrong_sums(w, 1, false, held_sums_kernel, 500'000'000, [] { has_room = true; }) == 0);
  w.expect_finished(1, 1);
}

TEST_CASE("enough warps send sums, and more where few tokens, narrow rows or few blocks leave them little to do") {
  const auto senders = [](std::int64_t tokens, int row_bytes, int blocks, bool summed, int ranks = 2, int top_k = 8) {
    return sums_plan::make(tokens, row_bytes, ranks - 1).senders(blocks, ranks, top_k, summed);
  };
  CHECK(senders(128, 14336, 132, false) == send_warps);
  CHECK(senders(128, 14336, 132, true, 4) == send_warps);
  CHECK(senders(1024, 14336, 132, false) == 3);
  CHECK(senders(4096, 14336, 132, false) == 2);
  CHECK(senders(4096, 14336, 96, false) == 3);
  CHECK(senders(4096, 14336, 48, false) == send_warps - 1);
  CHECK(senders(4096, 14336, 40, false) == send_warps);
  CHECK(senders(4096, 14336, 48, false, 2, 4) == 3);
  CHECK(senders(4096, 14336, 32, false, 2, 4) == send_warps - 1);
  CHECK(senders(4096, 14336, 48, false, 4) == 3);
  CHECK(senders(4096, 14336, 48, true) == 2);
  CHECK(senders(4096, 14336, 32, true) == send_warps - 2);
  CHECK(senders(8192, 4096, 24, true) == send_warps);
  for (const std::int64_t tokens : {1, 700, 4097, 1 << 20}) {
    for (const int row_bytes : {16, 4096, 1 << 20}) {
      for (const int blocks : {1, 2, 7, 64, 132}) {
        for (const bool summed : {false, true}) {
          for (const int top_k : {1, 32}) {
            const int warps = senders(tokens, row_bytes, blocks, summed, 4, top_k);
            CHECK(warps >= 2);
            CHECK(warps <= send_warps);
          }
        }
      }
    }
  }
}

TEST_CASE("a rank that does not come is a failure of the others that names it, and their kernels end") {
  world w({{20, 13, 17}, 24, 4, 96, 1, 4}, 7);
  w.route();
  std::vector<std::vector<unsigned char>> expanded;
  for (const auto& rows : w.gather) expanded.emplace_back((rows.size() + 1) * w.row());
  for (const int r : {0, 2}) {
    send_parts_task send = w.parts_sender(r);
    send.view.timeout_ns = 2'000'000'000;  // before parts are given up: rows are to say who is missing
    w.side_of(r).launch(expand_parts_kernel, 2, warps * 32, w.expander(r, expanded[static_cast<std::size_t>(r)]));
    w.stream_of(r).launch(send_parts_kernel, 2, (warps + 1) * 32, send);
  }
  run(w.streams);
  for (const int r : {0, 2}) {
    const ts::comm::symmetric_failure& failure = w.failures[static_cast<std::size_t>(r)];
    CHECK(failure.state == 2);
    CHECK(failure.rank == r);
    CHECK(failure.peer == 1);
    CHECK(failure.step == ts::comm::symmetric_step::entry);
  }
}
