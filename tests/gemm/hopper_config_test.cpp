// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Which kernel a grouped product gets, from bounds alone: no GPU is needed to know.

#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <vector>

#include <tessera/gemm/hopper_config.hpp>

namespace {

namespace hp = tessera::gemm::hopper;

hp::problem rows(std::int64_t max_rows, std::int64_t num_groups, std::int64_t n, std::int64_t k,
                 hp::epilogue_kind epilogue = hp::epilogue_kind::store) {
  hp::problem p;
  p.max_rows = max_rows, p.num_groups = num_groups, p.n = n, p.k = k, p.epilogue = epilogue;
  p.b_along_k = true;
  return p;
}

std::int64_t ceil_div(std::int64_t x, std::int64_t y) { return (x + y - 1) / y; }

}  // namespace

TEST_CASE("results of few columns get the narrow tile") {
  CHECK(hp::choose(rows(16384, 16, 4096, 4096)).tile_n == 256);
  CHECK(hp::choose(rows(16384, 16, 4096, 256)).order == hp::schedule::cooperative);
  CHECK(hp::choose(rows(16384, 16, 128, 4096)).order == hp::schedule::ping_pong);
  CHECK(hp::choose(rows(16384, 16, 64, 4096)).tile_n == 128);
}

TEST_CASE("clusters share columns where groups are long, except where H is read") {
  CHECK(hp::choose(rows(65536, 16, 4096, 4096)).cluster == 2);
  CHECK(hp::choose(rows(16384, 16, 4096, 4096)).cluster == 1);
  CHECK(hp::choose(rows(65536, 16, 4096, 4096, hp::epilogue_kind::activation_backward)).cluster == 1);
}

TEST_CASE("the grid is a whole number of clusters within the budget, and no larger than the work") {
  std::mt19937 random(3);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    hp::problem p = rows(random() % 100000, random() % 300, 8 + random() % 4096 / 8 * 8, 8 + random() % 8192 / 8 * 8,
                         static_cast<hp::epilogue_kind>(random() % 3));
    p.variable_k = random() % 3 == 0 && p.epilogue == hp::epilogue_kind::store;
    p.m = 8 + random() % 4096 / 8 * 8;
    p.num_multiprocessors = 2 + static_cast<int>(random() % 131);
    const hp::config c = hp::choose(p);
    INFO(hp::to_string(c));
    CHECK(c.grid % c.cluster == 0);
    CHECK(c.grid <= p.num_multiprocessors);
    CHECK(c.grid <= hp::max_tiles(p, c) * c.cluster);
    CHECK((c.grid > 0) == (hp::max_tiles(p, c) > 0));
  }
}

TEST_CASE("no distribution of rows over groups needs more tiles than the bound") {
  std::mt19937 random(4);
  for (int repeat = 0; repeat < 500; ++repeat) {
    const int groups = 1 + static_cast<int>(random() % 9);
    hp::config c;
    c.cluster = 1 + static_cast<int>(random() % 2);
    std::int64_t total = 0, tiles = 0;
    for (int g = 0; g < groups; ++g) {
      const std::int64_t count = random() % 3 == 0 ? random() % 3 : random() % 700;
      total += count;
      tiles += ceil_div(count, 128 * c.cluster) * ceil_div(520, c.tile_n);
    }
    CHECK(tiles <= hp::max_tiles(rows(total, groups, 520, 64), c));
  }
}

TEST_CASE("nothing to do is an empty grid") {
  CHECK(hp::choose(rows(0, 8, 256, 256)).grid == 0);
  CHECK(hp::choose(rows(100, 0, 256, 256)).grid == 0);
}

TEST_CASE("gradients of weights are written even where no group has rows") {
  hp::problem p;
  p.variable_k = true, p.num_groups = 3, p.m = 256, p.n = 256;
  CHECK(hp::choose(p).grid > 0);
}

TEST_CASE("a configuration prints as one line") {
  CHECK(hp::to_string({hp::schedule::cooperative, 128, 256, 2, 132}) == "cooperative 128x256 cluster 2 grid 132");
  CHECK(hp::to_string({hp::schedule::ping_pong, 128, 128, 1, 7}) == "ping-pong 128x128 cluster 1 grid 7");
}
