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

hp::problem products(std::int64_t num_groups, std::int64_t m, std::int64_t n) {
  hp::problem p;
  p.variable_k = true, p.max_rows = 16384, p.num_groups = num_groups, p.m = m, p.n = n;
  return p;
}

std::int64_t ceil_div(std::int64_t x, std::int64_t y) { return (x + y - 1) / y; }

}  // namespace

TEST_CASE("results of few columns get the narrow tile, except where epilogues read") {
  CHECK(hp::choose(rows(16384, 16, 4096, 4096)).tile_n == 256);
  CHECK(hp::choose(rows(16384, 16, 4096, 256)).order == hp::schedule::cooperative);
  CHECK(hp::choose(rows(16384, 16, 128, 4096)).order == hp::schedule::ping_pong);
  CHECK(hp::choose(rows(16384, 16, 64, 4096)).tile_n == 128);
  CHECK(hp::choose(rows(16384, 16, 128, 4096, hp::epilogue_kind::activation_backward)) ==
        hp::config{hp::schedule::cooperative, 128, 256, 1, 132});
}

TEST_CASE("clusters share columns where groups are long, except where epilogues read") {
  CHECK(hp::choose(rows(65536, 16, 4096, 4096)).cluster == 2);
  CHECK(hp::choose(rows(16384, 16, 4096, 4096)).cluster == 1);
  CHECK(hp::choose(rows(65536, 16, 4096, 4096, hp::epilogue_kind::activation_backward)).cluster == 1);
  CHECK(hp::choose(rows(65536, 16, 4096, 4096, hp::epilogue_kind::read_old)).cluster == 1);
}

TEST_CASE("a tile is narrow for half a tile's columns and no more, and never shared then") {
  CHECK(hp::choose(rows(65536, 16, 128, 16384)) == hp::config{hp::schedule::ping_pong, 128, 128, 1, 132});
  CHECK(hp::choose(rows(65536, 16, 136, 16384)) == hp::config{hp::schedule::cooperative, 128, 256, 2, 132});
  CHECK(hp::choose(products(8, 65536, 128)) == hp::config{hp::schedule::ping_pong, 128, 128, 1, 132});
}

TEST_CASE("variable_m shares columns from 1536 rows of a group on average") {
  hp::problem p = rows(16 * 1536, 16, 4096, 64);
  CHECK(hp::choose(p).cluster == 2);
  p.max_rows -= 1;
  CHECK(hp::choose(p).cluster == 1);
}

TEST_CASE("variable_m with B's columns contiguous shares them only where groups and sums are longer") {
  hp::problem p = rows(16 * 2048, 16, 4096, 8192);
  p.b_along_k = false;
  CHECK(hp::choose(p).cluster == 2);
  p.k = 8184;
  CHECK(hp::choose(p).cluster == 1);
  p.b_along_k = true;
  CHECK(hp::choose(p).cluster == 2);
  p.b_along_k = false, p.k = 16384, p.max_rows -= 1;
  CHECK(hp::choose(p).cluster == 1);
}

TEST_CASE("variable_k shares where results are tall and not small, whatever the rows and the order of B") {
  CHECK(hp::choose(products(16, 512, 512)).cluster == 2);
  CHECK(hp::choose(products(16, 504, 4096)).cluster == 1);  // not tall
  CHECK(hp::choose(products(16, 512, 504)).cluster == 1);   // small
  CHECK(hp::choose(products(16, 1536, 256)).cluster == 2);
  CHECK(hp::choose(products(16, 1016, 256)).cluster == 1);
  hp::problem p = products(16, 512, 2048);
  p.max_rows = 0, p.b_along_k = true;
  CHECK(hp::choose(p).cluster == 2);
  p = products(16, 256, 256);
  p.max_rows = 1 << 20;
  CHECK(hp::choose(p).cluster == 1);
}

TEST_CASE("fp32 results that are added to are read where sums are short") {
  hp::problem p = products(16, 512, 2048);
  CHECK(hp::reads_old_fp32(p));  // 1024 rows of a group on average
  p.max_rows = 16 * 1025;
  CHECK(!hp::reads_old_fp32(p));
  p.num_groups = 0;
  CHECK(hp::reads_old_fp32(p));
  CHECK(hp::reads_old_fp32(rows(16384, 1, 4096, 1024)));
  CHECK(!hp::reads_old_fp32(rows(16384, 1, 4096, 1032)));
}

TEST_CASE("rows that are gathered share columns in smaller groups; the fused activation changes nothing") {
  for (const std::int64_t max_rows : {16 * 511, 16 * 512, 16 * 1535, 65536}) {
    for (const std::int64_t n : {128, 4096}) {
      hp::problem p = rows(max_rows, 16, n, 4096);
      p.gathered = true;
      const hp::config gathered = hp::choose(p);
      CHECK(gathered.cluster == (n > 128 && max_rows >= 16 * 512 ? 2 : 1));
      p.epilogue = hp::epilogue_kind::activation;
      CHECK(hp::choose(p) == gathered);
    }
  }
}

TEST_CASE("the grid is what may run at once, or what there is to do") {
  CHECK(hp::choose(rows(65536, 16, 4096, 4096)).grid == 132);
  hp::problem p = rows(65536, 16, 4096, 4096);
  p.num_multiprocessors = 131;  // clusters of two
  CHECK(hp::choose(p).grid == 130);
  p = rows(16384, 16, 4096, 4096);
  p.num_multiprocessors = 131;
  CHECK(hp::choose(p).grid == 131);
  // 3 groups of 300 rows may end in a tile of one row each: (300 - 3) / 128 + 3 tiles of rows, 2 of columns.
  CHECK(hp::choose(rows(300, 3, 512, 512)).grid == 10);
  CHECK(hp::choose(products(3, 130, 600)).grid == 18);
}

TEST_CASE("one multiprocessor computes everything, by blocks that share nothing") {
  hp::problem p = rows(65536, 16, 4096, 4096);
  p.num_multiprocessors = 1;
  CHECK(hp::choose(p) == hp::config{hp::schedule::cooperative, 128, 256, 1, 1});
  p = products(16, 4096, 4096);
  p.num_multiprocessors = 1;
  CHECK(hp::choose(p) == hp::config{hp::schedule::cooperative, 128, 256, 1, 1});
}

TEST_CASE("the grid is a whole number of clusters within the budget, and no larger than the work") {
  std::mt19937 random(3);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    hp::problem p = rows(random() % 100000, random() % 300, 8 + random() % 4096 / 8 * 8, 8 + random() % 8192 / 8 * 8,
                         static_cast<hp::epilogue_kind>(random() % 3));
    p.variable_k = random() % 3 == 0 && p.epilogue == hp::epilogue_kind::store;
    p.m = 8 + random() % 4096 / 8 * 8;
    p.num_multiprocessors = 1 + static_cast<int>(random() % 132);
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
