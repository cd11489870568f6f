// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <cstdint>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/layout/layout.hpp>
#include <tessera/mesh/mesh.hpp>

#include "oracle.hpp"

namespace ts = tessera;

namespace {

using ts::placement;
using ts::placements;

static_assert(std::is_trivially_copyable_v<placements>);

// All of it is constexpr.
constexpr ts::mesh of_four{{"dp", 4}};
static_assert(ts::local_extents(of_four, {placement::shard(0)}, 2, ts::box::whole({6, 3})) == ts::box::whole({2, 3}));
static_assert(ts::local_extents(of_four, {placement::shard(0)}, 3, ts::box::whole({6, 3})).empty());
static_assert(ts::placed_boxes(of_four, {placement::shard(0)}, 3, ts::box::whole({6, 3})).empty());
static_assert(ts::replica_of(of_four, {placement::replicate()}, 3) == ts::replica{3, 4});
static_assert(placement::strided_shard(1, 1) == placement::shard(1));
constexpr ts::training_mesh of_8({.dp_replicate = 2, .ep = 2}, 8);
static_assert(ts::expert_placements(of_8, 8)[1] == placement::strided_shard(0, 2));
static_assert(ts::expert_placements(of_8, 2)[1] == placement::shard(1));

// Rows of a one-dimensional tensor that each rank holds.
std::vector<std::vector<std::int64_t>> rows_of_ranks(const ts::mesh& ranks, const placements& list,
                                                     std::int64_t extent) {
  std::vector<std::vector<std::int64_t>> result;
  for (int rank = 0; rank < ranks.size(); ++rank) {
    std::vector<std::int64_t>& rows = result.emplace_back();
    for (const ts::placed_box& part : ts::placed_boxes(ranks, list, rank, ts::box::whole({extent}))) {
      for (std::int64_t i = 0; i < part.logical.size[0]; ++i) rows.push_back(part.logical.offset[0] + i);
    }
  }
  return result;
}

using rows = std::vector<std::vector<std::int64_t>>;

// Differences between the boxes of all ranks and the lists of elements that the oracle gives.
int wrong_boxes(const ts::mesh& ranks, const placements& list, const ts::box& tensor) {
  int wrong = 0;
  for (int rank = 0; rank < ranks.size(); ++rank) {
    const mesh_oracle::indices expected = mesh_oracle::held_elements(ranks, list, rank, tensor);
    const ts::box local = ts::local_extents(ranks, list, rank, tensor);
    wrong += local.volume() != static_cast<std::int64_t>(expected.size());
    std::vector<int> written(expected.size(), 0);
    for (const ts::placed_box& part : ts::placed_boxes(ranks, list, rank, tensor)) {
      wrong += part.logical.empty() || !tensor.contains(part.logical) || !local.contains(part.local);
      for (std::int64_t i = 0; i < part.logical.volume(); ++i) {
        std::int64_t at[ts::max_box_rank] = {};
        std::int64_t local_at[ts::max_box_rank] = {};
        std::int64_t rest = i;
        for (int d = tensor.rank - 1; d >= 0; --d) {
          wrong += part.logical.size[d] != part.local.size[d];
          at[d] = part.logical.offset[d] + rest % part.logical.size[d];
          local_at[d] = part.local.offset[d] + rest % part.logical.size[d];
          rest /= part.logical.size[d];
        }
        const auto position = static_cast<std::size_t>(local.local_offset(local_at));
        wrong += position >= expected.size() || expected[position] != tensor.local_offset(at);
        if (position < written.size()) ++written[position];
      }
    }
    for (const int times : written) wrong += times != 1;
  }
  return wrong;
}

}  // namespace

TEST_CASE("a shard is a chunk of torch.chunk: 6 on 4 ranks are 2, 2, 2, 0") {
  CHECK(rows_of_ranks(of_four, {placement::shard(0)}, 6) == rows{{0, 1}, {2, 3}, {4, 5}, {}});
  CHECK(rows_of_ranks(of_four, {placement::shard(0)}, 5) == rows{{0, 1}, {2, 3}, {4}, {}});
  CHECK(rows_of_ranks(of_four, {placement::shard(0)}, 2) == rows{{0}, {1}, {}, {}});
  CHECK(rows_of_ranks(of_four, {placement::shard(0)}, 0) == rows{{}, {}, {}, {}});
}

TEST_CASE("shards of one dimension on two axes split from the outer axis to the inner one") {
  // The example of DTensor's documentation: 5 columns on (2, 2) are 2, 1, 1, 1.
  const ts::mesh ranks{{"dp", 2}, {"tp", 2}};
  CHECK(rows_of_ranks(ranks, {placement::shard(0), placement::shard(0)}, 5) == rows{{0, 1}, {2}, {3}, {4}});
}

TEST_CASE("a strided shard is as if the inner axis had split first") {
  // efsdp = 2 outside, ep = 2 inside, 8 experts: ep splits first, so rank (efsdp 0, ep 1) has 4 and 5.
  const ts::mesh ranks{{"efsdp", 2}, {"ep", 2}};
  CHECK(rows_of_ranks(ranks, {placement::strided_shard(0, 2), placement::shard(0)}, 8) ==
        rows{{0, 1}, {4, 5}, {2, 3}, {6, 7}});
  CHECK(rows_of_ranks(ranks, {placement::shard(0), placement::shard(0)}, 8) == rows{{0, 1}, {2, 3}, {4, 5}, {6, 7}});
  // Without the inner shard there are two boxes; 9 on 4 with 2 pieces is the example of torch's source.
  CHECK(rows_of_ranks(of_four, {placement::strided_shard(0, 2)}, 9) == rows{{0, 1, 5}, {2, 3, 6}, {4, 7}, {8}});
  const auto boxes = ts::placed_boxes(of_four, {placement::strided_shard(0, 2)}, 1, ts::box::whole({9, 2}));
  REQUIRE(boxes.size() == 2);
  CHECK(boxes[0].logical == ts::box{.rank = 2, .offset = {2, 0}, .size = {2, 2}});
  CHECK(boxes[0].local == ts::box{.rank = 2, .offset = {0, 0}, .size = {2, 2}});
  CHECK(boxes[1].logical == ts::box{.rank = 2, .offset = {6, 0}, .size = {1, 2}});
  CHECK(boxes[1].local == ts::box{.rank = 2, .offset = {2, 0}, .size = {1, 2}});
}

TEST_CASE("boxes of all placements are what cutting lists of indices gives") {
  const std::vector<placement> choices = {placement::replicate(),
                                          placement::shard(0),
                                          placement::shard(1),
                                          placement::strided_shard(0, 2),
                                          placement::strided_shard(0, 3),
                                          placement::strided_shard(1, 2),
                                          placement::partial()};
  const std::vector<ts::mesh> meshes = {
      {{"a", 2}, {"b", 2}}, {{"a", 2}, {"b", 3}}, {{"a", 4}, {"b", 1}}, {{"a", 3}, {"b", 4}}};
  int wrong = 0;
  int cases = 0;
  for (const ts::mesh& ranks : meshes) {
    for (const placement& outer : choices) {
      for (const placement& inner : choices) {
        for (const auto& [length, width] : {std::pair{1, 1}, {3, 2}, {6, 5}, {8, 4}, {13, 7}, {0, 3}}) {
          wrong += wrong_boxes(ranks, {outer, inner}, ts::box::whole({length, width}));
          ++cases;
        }
      }
    }
  }
  const ts::mesh three{{"a", 2}, {"b", 3}, {"c", 2}};
  for (const placement& a : choices) {
    for (const placement& b : choices) {
      for (const placement& c : choices) wrong += wrong_boxes(three, {a, b, c}, ts::box::whole({11, 5, 2}));
    }
  }
  CHECK(cases == 4 * 49 * 6);
  CHECK(wrong == 0);
}

TEST_CASE("experts are split over ep first, as the block layout splits them, whatever efsdp does") {
  int wrong = 0;
  int by_expert = 0;
  int by_row = 0;
  for (int world = 1; world <= 16; ++world) {
    for (int ep = 1; ep <= world; ++ep) {
      if (world % ep != 0) continue;
      const ts::training_mesh ranks({.ep = ep}, world);
      const ts::mesh stage = ranks.sparse_stage();
      for (int per_rank = 1; per_rank <= 5; ++per_rank) {
        const int num_experts = per_rank * ep;
        const ts::box tensor = ts::box::whole({num_experts, 3, 2});
        const placements list = ts::expert_placements(ranks, num_experts);
        (list[1].dim == 0 ? by_expert : by_row) += ranks.efsdp > 1;
        wrong += (list[1].dim == 0) != (ranks.efsdp * ep <= num_experts);
        wrong += wrong_boxes(stage, list, tensor);
        const ts::layout::block block(num_experts, ep);
        std::set<std::pair<std::int64_t, std::int64_t>> seen;  // (expert, row): all ranks together hold each once
        std::int64_t volume = 0;
        for (int rank = 0; rank < world; ++rank) {
          for (const ts::placed_box& part : ts::placed_boxes(stage, list, rank, tensor)) {
            volume += part.logical.volume();
            for (std::int64_t e = 0; e < part.logical.size[0]; ++e) {
              const auto expert = static_cast<int>(part.logical.offset[0] + e);
              wrong += block.owner(expert).rank != ranks.along("ep").index(rank);
              for (std::int64_t r = 0; r < part.logical.size[1]; ++r) {
                wrong += !seen.insert({expert, part.logical.offset[1] + r}).second;
              }
            }
          }
        }
        wrong += volume != tensor.volume();
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(by_expert > 0);
  CHECK(by_row > 0);
}

TEST_CASE("placements and layouts give the same boxes where they mean the same") {
  const ts::training_mesh ranks({.ep = 4}, 4);
  const ts::box tensor = ts::box::whole({8, 5});
  for (int rank = 0; rank < 4; ++rank) {
    const auto placed = ts::placed_boxes(ranks.sparse_stage(), ts::expert_placements(ranks, 8), rank, tensor);
    const auto held = ts::held_boxes(ts::layout::block(8, 4), rank, tensor);
    REQUIRE(placed.size() == 1);
    REQUIRE(held.size() == 1);
    CHECK(placed[0].logical == held[0].logical);
    CHECK(placed[0].local == held[0].local);
  }
}

TEST_CASE("ranks that hold the same boxes are replicas with different numbers, and all numbers occur") {
  const ts::mesh ranks{{"dp_replicate", 2}, {"fsdp", 3}, {"tp", 2}};
  for (const placements& list :
       {placements{placement::replicate(), placement::shard(0), placement::replicate()},
        placements{placement::replicate(), placement::shard(0), placement::shard(1)},
        placements{placement::shard(1), placement::shard(0), placement::replicate()}, placements::all(3)}) {
    std::set<std::pair<std::vector<std::int64_t>, int>> seen;
    for (int rank = 0; rank < ranks.size(); ++rank) {
      const ts::replica copy = ts::replica_of(ranks, list, rank);
      const ts::box tensor = ts::box::whole({6, 4});
      CHECK(seen.insert({mesh_oracle::held_elements(ranks, list, rank, tensor), copy.index}).second);
      int same = 0;
      for (int other = 0; other < ranks.size(); ++other) {
        same += mesh_oracle::held_elements(ranks, list, rank, tensor) ==
                mesh_oracle::held_elements(ranks, list, other, tensor);
      }
      CHECK(copy.count == same);
      CHECK(copy.index >= 0);
      CHECK(copy.index < copy.count);
    }
  }
  // A contribution is no copy.
  CHECK(ts::replica_of(of_four, {placement::partial()}, 3) == ts::replica{0, 1});
}

TEST_CASE("dense parameters are sharded over dp_shard and cp as one axis") {
  // 6 rows on fsdp = 2 x 2 are 2, 2, 2, 0; two axes one after another would make 2, 1, 2, 1 of them.
  const ts::training_mesh ranks({.dp_shard = 2, .cp = 2}, 4);
  CHECK(rows_of_ranks(ranks.fsdp_stage(), ts::dense_placements(), 6) == rows{{0, 1}, {2, 3}, {4, 5}, {}});
  CHECK(rows_of_ranks(ranks.dense_stage(),
                      {placement::replicate(), placement::shard(0), placement::shard(0), placement::replicate()},
                      6) == rows{{0, 1}, {2}, {3, 4}, {5}});
}

TEST_CASE("a scalar is replicated, and a tensor that starts elsewhere keeps its start") {
  CHECK(ts::placed_boxes(of_four, {placement::replicate()}, 2, ts::box{}).size() == 1);
  CHECK(ts::local_extents(of_four, {placement::partial()}, 2, ts::box{}) == ts::box{});
  const ts::box tensor{.rank = 1, .offset = {100}, .size = {8}};
  const auto boxes = ts::placed_boxes(of_four, {placement::shard(0)}, 1, tensor);
  REQUIRE(boxes.size() == 1);
  CHECK(boxes[0].logical == ts::box{.rank = 1, .offset = {102}, .size = {2}});
  CHECK(boxes[0].local == ts::box{.rank = 1, .offset = {0}, .size = {2}});
}

TEST_CASE("placements print as they are written") {
  CHECK(to_string(placements{placement::replicate(), placement::strided_shard(0, 4), placement::shard(1),
                             placement::partial(ts::reduce_op::max)}) ==
        "[replicate, strided_shard(0,4), shard(1), partial(max)]");
}

TEST_CASE("placements that do not fit are refused with the values") {
  const ts::mesh ranks{{"dp", 2}, {"tp", 2}};
  const ts::box tensor = ts::box::whole({4, 4});
  CHECK_THROWS_WITH_AS(ts::local_region(ranks, {placement::shard(0)}, 0, tensor),
                       "1 placements [shard(0)] on the mesh dp=2,tp=2: one for each of its 2 axes is needed",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(
      ts::placed_boxes(ranks, {placement::shard(0), placement::shard(2)}, 0, tensor),
      "shard(2) on axis 'tp' of a tensor that has 2 dimensions: a dimension that is sharded must exist",
      ts::invalid_argument);
  CHECK_THROWS_WITH_AS(
      ts::local_extents(ranks, {placement::partial(), placement::partial(ts::reduce_op::max)}, 0, tensor),
      "the placements [partial(sum), partial(max)] join contributions by different reductions: the result would depend "
      "on their order",
      ts::invalid_argument);
  CHECK_THROWS_AS(ts::local_region(ranks, placements::all(2), 4, tensor), ts::invalid_argument);
  CHECK_THROWS_AS(ts::replica_of(ranks, placements::all(3), 0), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(placement::shard(-1), "a tensor cannot be sharded on dimension -1, dimensions count from 0",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(placement::strided_shard(0, 0), "a strided shard with split_factor = 0, it must be at least 1",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(placements::all(9), "9 placements, a mesh has at most 8 axes", ts::invalid_argument);
  CHECK_THROWS_WITH_AS(ts::expert_placements(ts::training_mesh({.ep = 4}, 4), 6),
                       "num_experts = 6 over ep = 4 ranks: expert_placements needs ep to divide the experts; ep = 3 "
                       "would be right; layout::table and held_boxes describe uneven experts",
                       ts::invalid_argument);
}
