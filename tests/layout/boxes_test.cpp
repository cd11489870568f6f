// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/layout/layout.hpp>

namespace ts = tessera;

namespace {

using lists = std::vector<std::vector<std::int32_t>>;

static_assert(std::is_trivially_copyable_v<ts::box>);
static_assert(ts::box{}.volume() == 1, "a scalar has one element");
static_assert(ts::box::whole({3, 4, 5}).volume() == 60);
static_assert(ts::box::whole({3, 0, 5}).empty());

constexpr ts::box inner{.rank = 2, .offset = {1, 2}, .size = {2, 2}};
static_assert(ts::box::whole({4, 5}).contains(inner) && !inner.contains(ts::box::whole({4, 5})));
static_assert(ts::box::whole({4, 5}).local_offset(inner) == 7);
static_assert(ts::box::whole({4, 5}).contiguous_run(inner) == 2);
static_assert(ts::intersect(ts::box::whole({2, 3}), inner) == ts::box{.rank = 2, .offset = {1, 2}, .size = {1, 1}});
static_assert(ts::intersect(inner, inner) == inner);

// Calls `visit(index)` for every element of a box, in row-major order.
template <class Visit>
void for_each(const ts::box& part, Visit&& visit) {
  std::int64_t index[ts::max_box_rank] = {};
  const std::int64_t volume = part.volume();
  for (std::int64_t i = 0; i < volume; ++i) {
    std::int64_t rest = i;
    for (int d = part.rank - 1; d >= 0; --d) {
      index[d] = part.offset[d] + rest % part.size[d];
      rest /= part.size[d];
    }
    visit(index);
  }
}

// All boxes along one dimension of extent `extent`, empty ones included.
std::vector<std::pair<int, int>> intervals(int extent) {
  std::vector<std::pair<int, int>> result;
  for (int begin = 0; begin <= extent; ++begin) {
    for (int size = 0; begin + size <= extent; ++size) result.push_back({begin, size});
  }
  return result;
}

std::vector<ts::box> boxes_in_3x4() {
  std::vector<ts::box> result;
  for (const auto& [row, rows] : intervals(3)) {
    for (const auto& [col, cols] : intervals(4)) {
      result.push_back({.rank = 2, .offset = {row, col}, .size = {rows, cols}});
    }
  }
  return result;
}

// The tensor over all experts, each element its own number, assembled from what the ranks hold.
template <ts::expert_layout Layout>
std::vector<int> times_written(const Layout& placement, const ts::box& tensor, ts::copies which, int& wrong_places) {
  std::vector<int> written(static_cast<std::size_t>(tensor.volume()), 0);
  for (int rank = 0; rank < placement.num_ranks(); ++rank) {
    ts::box own = tensor;
    own.size[0] = placement.num_slots(rank);
    // The rank's tensor: each element says which logical element it is.
    std::vector<std::int64_t> local(static_cast<std::size_t>(own.volume()));
    const std::int64_t inner_volume = tensor.volume() / tensor.size[0];
    for (int slot = 0; slot < placement.num_slots(rank); ++slot) {
      for (std::int64_t i = 0; i < inner_volume; ++i) {
        local[static_cast<std::size_t>(slot * inner_volume + i)] = placement.expert_at(rank, slot) * inner_volume + i;
      }
    }
    for (const ts::held_box& held : ts::held_boxes(placement, rank, tensor, which)) {
      wrong_places += !tensor.contains(held.logical) + !own.contains(held.local);
      wrong_places += held.logical.volume() != held.local.volume();
      wrong_places += own.contiguous_run(held.local) != held.local.volume();
      wrong_places += tensor.contiguous_run(held.logical) != held.logical.volume();
      const std::int64_t from = own.local_offset(held.local);
      const std::int64_t to = tensor.local_offset(held.logical);
      for (std::int64_t i = 0; i < held.local.volume(); ++i) {
        wrong_places += local[static_cast<std::size_t>(from + i)] != to + i;
        ++written[static_cast<std::size_t>(to + i)];
      }
    }
  }
  return written;
}

}  // namespace

TEST_CASE("intersection, containment and volume of boxes agree with their sets of elements") {
  const ts::box whole = ts::box::whole({3, 4});
  const std::vector<ts::box> all = boxes_in_3x4();
  int wrong = 0;
  for (const ts::box& a : all) {
    std::int64_t elements_of_a = 0;
    for_each(a, [&](const std::int64_t*) { ++elements_of_a; });
    wrong += a.volume() != elements_of_a;
    for (const ts::box& b : all) {
      const ts::box common = ts::intersect(a, b);
      std::int64_t in_both = 0;
      bool a_in_b = true;
      for_each(whole, [&](const std::int64_t* index) {
        const bool in_a = a.contains(index);
        const bool in_b = b.contains(index);
        in_both += in_a && in_b;
        a_in_b = a_in_b && (!in_a || in_b);
        wrong += common.contains(index) != (in_a && in_b);
      });
      wrong += common.volume() != in_both;
      wrong += b.contains(a) != a_in_b;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("the local offset of an element is its position in row-major order of the enclosing box") {
  int wrong = 0;
  const ts::box outer{.rank = 4, .offset = {5, 0, 2, 1}, .size = {2, 3, 1, 4}};
  std::int64_t position = 0;
  for_each(outer, [&](const std::int64_t* index) { wrong += outer.local_offset(index) != position++; });
  CHECK(position == outer.volume());
  CHECK(wrong == 0);
}

TEST_CASE("a contiguous run is a stretch of neighbours, and the longest one that all runs of the part share") {
  const ts::box whole = ts::box::whole({3, 4});
  int wrong = 0;
  for (const ts::box& part : boxes_in_3x4()) {
    if (part.empty()) continue;
    std::vector<std::int64_t> positions;
    for_each(part, [&](const std::int64_t* index) { positions.push_back(whole.local_offset(index)); });
    std::int64_t neighbours = 1;  // from the first element on
    while (neighbours < part.volume() && positions[static_cast<std::size_t>(neighbours)] == positions[0] + neighbours) {
      ++neighbours;
    }
    wrong += whole.contiguous_run(part) != neighbours;
    wrong += part.volume() % whole.contiguous_run(part) != 0;
  }
  CHECK(wrong == 0);
}

TEST_CASE("boxes of too many dimensions or with a negative extent are refused") {
  CHECK_THROWS_WITH_AS(ts::box::whole({1, 2, 3, 4, 5}), "a box has 5 dimensions, at most 4 are possible",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(ts::box::whole({1, -2}), "a box has extent -2, extents must be at least 0",
                       ts::invalid_argument);
}

TEST_CASE("a block is one range a rank, none where the rank holds nothing") {
  const ts::layout::block block(10, 4);
  for (int rank = 0; rank < 4; ++rank) {
    const auto ranges = ts::expert_ranges(block, rank);
    REQUIRE(ranges.size() == 1);
    CHECK(ranges[0] == ts::expert_range{block.expert_at(rank, 0), 0, block.num_slots(rank)});
  }
  CHECK(ts::expert_ranges(ts::layout::block(2, 3), 2).empty());
}

TEST_CASE("round-robin has one range an expert, except where there is one rank") {
  CHECK(ts::expert_ranges(ts::layout::round_robin(7, 3), 0).size() == 3);
  const auto alone = ts::expert_ranges(ts::layout::round_robin(7, 1), 0);
  REQUIRE(alone.size() == 1);
  CHECK(alone[0] == ts::expert_range{0, 0, 7});
}

TEST_CASE("a table's neighbours merge, and only they") {
  const ts::layout::table_storage storage(8, {{4, 5, 6, 2, 1, 0}, {3, 7}});
  using ranges = std::vector<ts::expert_range>;
  CHECK(ts::expert_ranges(storage.view(), 0) == ranges{{4, 0, 3}, {2, 3, 1}, {1, 4, 1}, {0, 5, 1}});
  CHECK(ts::expert_ranges(storage.view(), 1) == ranges{{3, 0, 1}, {7, 1, 1}});
}

TEST_CASE("primary copies leave replicas out and split the ranges around them") {
  const ts::layout::table_storage storage(4, {{0, 1}, {0, 1, 2, 3}, {2, 1, 3}});
  using ranges = std::vector<ts::expert_range>;
  CHECK(ts::expert_ranges(storage.view(), 1) == ranges{{0, 0, 4}});
  CHECK(ts::expert_ranges(storage.view(), 1, ts::copies::primary) == ranges{{2, 2, 2}});
  CHECK(ts::expert_ranges(storage.view(), 2, ts::copies::primary).empty());

  // A replica between two consecutive experts: their slots are not neighbours.
  const ts::layout::table_storage split(4, {{0, 1}, {2, 0, 3}});
  CHECK(ts::expert_ranges(split.view(), 1, ts::copies::primary) == ranges{{2, 0, 1}, {3, 2, 1}});
}

TEST_CASE("the boxes of all ranks, copied into place, make the whole tensor: each element once per copy") {
  int wrong = 0;
  const auto check = [&](const auto& placement) {
    const ts::box tensor = ts::box::whole({placement.num_experts(), 2, 3});
    int wrong_places = 0;
    const auto all = times_written(placement, tensor, ts::copies::all, wrong_places);
    const auto primary = times_written(placement, tensor, ts::copies::primary, wrong_places);
    for (std::size_t i = 0; i < all.size(); ++i) {
      wrong += all[i] != placement.num_replicas(static_cast<int>(i / 6));
      wrong += primary[i] != 1;
    }
    wrong += wrong_places;
  };
  for (int num_experts = 1; num_experts <= 20; ++num_experts) {
    for (int num_ranks = 1; num_ranks <= 24; ++num_ranks) {
      check(ts::layout::block(num_experts, num_ranks));
      check(ts::layout::round_robin(num_experts, num_ranks));
      // A table: every rank holds a stretch that wraps around, so neighbours overlap where slots are many.
      lists experts_of_rank(static_cast<std::size_t>(num_ranks));
      for (int rank = 0; rank < num_ranks; ++rank) {
        const int length = 1 + (num_experts * (1 + rank % 3) / num_ranks) % num_experts;
        for (int i = 0; i < length; ++i) {
          experts_of_rank[static_cast<std::size_t>(rank)].push_back((rank * num_experts / num_ranks + i) % num_experts);
        }
      }
      std::vector<bool> held(static_cast<std::size_t>(num_experts), false);
      for (const auto& list : experts_of_rank) {
        for (const std::int32_t expert : list) held[static_cast<std::size_t>(expert)] = true;
      }
      for (int expert = 0; expert < num_experts; ++expert) {
        if (!held[static_cast<std::size_t>(expert)]) experts_of_rank.back().push_back(expert);
      }
      check(ts::layout::table_storage(num_experts, experts_of_rank).view());
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("a tensor box that starts elsewhere keeps its start") {
  ts::box tensor = ts::box::whole({4, 2});
  tensor.offset[0] = 100;
  const auto held = ts::held_boxes(ts::layout::block(4, 2), 1, tensor);
  REQUIRE(held.size() == 1);
  CHECK(held[0].logical == ts::box{.rank = 2, .offset = {102, 0}, .size = {2, 2}});
  CHECK(held[0].local == ts::box{.rank = 2, .offset = {0, 0}, .size = {2, 2}});
}

TEST_CASE("ranks outside the layout and tensors of another size are refused with their values") {
  const ts::layout::block block(8, 2);
  CHECK_THROWS_WITH_AS(ts::expert_ranges(block, 2), "the layout has no rank 2, ranks are in [0, 2)",
                       ts::invalid_argument);
  CHECK_THROWS_AS(ts::expert_ranges(block, -1), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(ts::held_boxes(block, 0, ts::box::whole({4, 3})),
                       "a tensor of 2 dimensions with first extent 4 is not one over all experts: dimension 0 must "
                       "have extent 8",
                       ts::invalid_argument);
  CHECK_THROWS_AS(ts::held_boxes(block, 0, ts::box{}), ts::invalid_argument);
}
