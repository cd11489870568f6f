// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <cstdint>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include <tessera/layout/layout.hpp>
#include <tessera/shard/group_layout.hpp>

#include "../support/messages.hpp"

namespace {

namespace ts = tessera;
namespace sh = tessera::shard;

std::string lengths(std::int64_t extent, int ranks) {
  std::string result;
  std::int64_t next = 0;
  for (int r = 0; r < ranks; ++r) {
    const sh::chunk c = sh::chunk_of(extent, ranks, r);
    CHECK(c.begin == next);
    next += c.length;
    result += (r == 0 ? "" : " ") + std::to_string(c.length);
  }
  CHECK(next == extent);
  return result;
}

TEST_CASE("ranks divide a dimension as torch.chunk does") {
  CHECK(lengths(6, 4) == "2 2 2 0");
  CHECK(lengths(7, 3) == "3 3 1");
  CHECK(lengths(1, 4) == "1 0 0 0");
  CHECK(lengths(0, 2) == "0 0");
  CHECK(lengths(9, 8) == "2 2 2 2 1 0 0 0");
  static_assert(sh::chunk_of(6, 4, 2) == sh::chunk{4, 2});
}

std::string refusal(std::vector<sh::parameter> parameters, int ranks) {
  return tessera_test::message_of([&] { sh::group_layout(std::move(parameters), ranks); });
}

TEST_CASE("what cannot be divided is refused by name") {
  CHECK(refusal({{.name = "a.weight", .whole = ts::box::whole({4, 6}), .dim = 1}}, 4)
            .find("'a.weight': its dimension 1 has 6") == 10);
  CHECK(refusal({{.name = "t", .whole = ts::box::whole({})}}, 2).find("scalar") != std::string::npos);
  CHECK(refusal({{.name = "t", .whole = ts::box::whole({4}), .dim = 1}}, 2).find("dimension 1") != std::string::npos);
  CHECK(refusal({}, 0).find("at least 1 rank") != std::string::npos);
  const ts::box whole = ts::box::whole({8, 3}), local = ts::box::whole({2, 3});
  const auto with_held = [&](const ts::box& logical, const ts::box& in_local) {
    return refusal({{.name = "e", .whole = whole, .local = local, .held = {{logical, in_local}}}}, 2);
  };
  ts::box last = local, behind = local;
  last.offset[0] = 6;
  behind.offset[0] = 7;
  CHECK(with_held(last, local).empty());
  CHECK(with_held(behind, local).find("'e': held part 0") != std::string::npos);
  CHECK(with_held(local, last).find("'e': held part 0") != std::string::npos);
  CHECK(with_held(ts::box::whole({1, 3}), local).find("same extents") != std::string::npos);
}

// Element k of a tensor, told apart from those of other tensors.
std::int32_t element(int tensor, std::int64_t k) { return static_cast<std::int32_t>(1000 * (tensor + 1) + k); }

TEST_CASE("packing puts each element in the row of the rank that holds it, once, and unpacking brings it back") {
  const std::vector<sh::parameter> parameters = {{.name = "a", .whole = ts::box::whole({6, 5})},
                                                 {.name = "b", .whole = ts::box::whole({3, 12, 2}), .dim = 1},
                                                 {.name = "c", .whole = ts::box::whole({1})},
                                                 {.name = "d", .whole = ts::box::whole({0, 4})},
                                                 {.name = "e", .whole = ts::box::whole({7, 12}), .dim = 1},
                                                 {.name = "f", .whole = ts::box::whole({5, 2, 2, 3})}};
  const int num = static_cast<int>(parameters.size());
  for (int ranks = 1; ranks <= 4; ++ranks) {
    CAPTURE(ranks);
    const sh::group_layout layout(parameters, ranks);
    const std::int64_t row = layout.row_elements();
    CHECK(row == layout.shard_elements(0));
    std::vector<std::vector<std::int32_t>> full(parameters.size());
    std::vector<std::int32_t*> pointers;
    for (int i = 0; i < num; ++i) {
      auto& values = full[static_cast<std::size_t>(i)];
      for (std::int64_t k = 0; k < layout.elements(i); ++k) values.push_back(element(i, k));
      pointers.push_back(values.data());
    }
    std::vector<std::int32_t> buffer(static_cast<std::size_t>(ranks * row), -1), expected(buffer.size(), 0);
    layout.pack(std::span<std::int32_t* const>(pointers), buffer.data());

    // brute force: every element of every tensor asks every rank
    std::vector<std::int64_t> used(static_cast<std::size_t>(ranks), 0);
    for (int i = 0; i < num; ++i) {
      const ts::box& shape = parameters[static_cast<std::size_t>(i)].whole;
      for (int rank = 0; rank < ranks; ++rank) {
        const ts::box part = layout.part(i, rank);
        std::int64_t inside = 0;
        for (std::int64_t k = 0; k < shape.volume(); ++k) {
          std::int64_t index[ts::max_box_rank] = {};
          std::int64_t left = k;
          for (int d = shape.rank - 1; d >= 0; --d) {
            index[d] = left % shape.size[d];
            left /= shape.size[d];
          }
          if (!part.contains(index)) continue;
          ++inside;
          const std::int64_t place = rank * row + used[static_cast<std::size_t>(rank)] + part.local_offset(index);
          CHECK(expected[static_cast<std::size_t>(place)] == 0);
          expected[static_cast<std::size_t>(place)] = element(i, k);
        }
        CHECK(inside == layout.part_elements(i, rank));
        used[static_cast<std::size_t>(rank)] += inside;
      }
    }
    CHECK(std::accumulate(used.begin(), used.end(), std::int64_t{0}) == layout.full_elements());
    CHECK(buffer == expected);

    layout.pack(std::span<std::int32_t* const>(pointers), buffer.data(), true);
    for (auto& x : expected) x *= 2;
    CHECK(buffer == expected);
    auto back = full;
    for (int i = 0; i < num; ++i) {
      std::fill(back[static_cast<std::size_t>(i)].begin(), back[static_cast<std::size_t>(i)].end(), -1);
      pointers[static_cast<std::size_t>(i)] = back[static_cast<std::size_t>(i)].data();
      for (auto& x : full[static_cast<std::size_t>(i)]) x *= 2;
    }
    layout.unpack(buffer.data(), std::span<std::int32_t* const>(pointers));
    CHECK(back == full);
  }
}

// Every element of the logical tensor, and what the ranks' boxes say of it.
template <class Layout>
void check_experts(const Layout& placement, int shard_ranks, int dim, std::int64_t f) {
  const ts::box tensor = ts::box::whole({placement.num_experts(), f, 3});
  std::map<std::vector<std::int64_t>, int> seen;
  for (int ep = 0; ep < placement.num_ranks(); ++ep) {
    const sh::group_layout layout({sh::expert_parameter("w", placement, ep, tensor, dim)}, shard_ranks);
    for (int rank = 0; rank < shard_ranks; ++rank) {
      const ts::box part = layout.part(0, rank);
      const ts::box packed = [&] {
        ts::box b = part;
        for (int d = 0; d < 3; ++d) b.offset[d] = 0;
        return b;
      }();
      std::int64_t volume = 0;
      for (const ts::held_box& held : layout.logical_part(0, rank)) {
        CHECK(tensor.contains(held.logical));
        CHECK(packed.contains(held.local));
        CHECK(packed.contiguous_run(held.local) == held.local.volume());
        volume += held.local.volume();
        for (std::int64_t e = 0; e < held.logical.size[0]; ++e) {
          for (std::int64_t k = 0; k < held.logical.size[1]; ++k) {
            const std::int64_t expert = held.logical.offset[0] + e;
            // the slot this rank keeps the expert in, from the layout alone
            const std::int64_t slot = part.offset[0] + held.local.offset[0] + e;
            CHECK(placement.expert_at(ep, static_cast<int>(slot)) == expert);
            CHECK(part.offset[1] + held.local.offset[1] + k == held.logical.offset[1] + k);
            ++seen[{expert, held.logical.offset[1] + k}];
          }
        }
      }
      CHECK(volume == part.volume());
    }
  }
  CHECK(static_cast<std::int64_t>(seen.size()) == placement.num_experts() * f);
  for (const auto& [index, count] : seen) CHECK(count == 1);
}

TEST_CASE("experts are divided among expert-parallel ranks first, then among shard ranks, in logical terms") {
  for (int shard_ranks = 1; shard_ranks <= 4; ++shard_ranks) {
    CAPTURE(shard_ranks);
    check_experts(ts::layout::block(8, 2), shard_ranks, 0, 5);
    check_experts(ts::layout::round_robin(8, 2), shard_ranks, 0, 5);
    check_experts(ts::layout::round_robin(9, 3), shard_ranks, 1, 12);
  }
  // 4 experts on ep = 2, efsdp = 2: what DTensor's (_StridedShard(0, split_factor=2), Shard(0)) gives is experts
  // 0 | 2 to ep 0 | 1 of the first efsdp rank, 1 | 3 to the second
  const ts::box tensor = ts::box::whole({4, 1});
  const int expected[2][2] = {{0, 2}, {1, 3}};
  for (int ep = 0; ep < 2; ++ep) {
    const sh::group_layout layout({sh::expert_parameter("w", ts::layout::block(4, 2), ep, tensor)}, 2);
    for (int rank = 0; rank < 2; ++rank) {
      const auto parts = layout.logical_part(0, rank);
      REQUIRE(parts.size() == 1);
      CHECK(parts[0].logical.offset[0] == expected[rank][ep]);
      CHECK(parts[0].logical.size[0] == 1);
    }
  }
}

TEST_CASE("an expert with several copies is refused: the norm would count each of them") {
  const ts::layout::table_storage experts(3, {{0, 1}, {1, 2}});
  for (int rank = 0; rank < 2; ++rank) {
    CHECK(tessera_test::message_of([&] {
            sh::expert_parameter("w", experts.view(), rank, ts::box::whole({3, 4}));
          }).find("parameter 'w': expert 1 has 2 copies") == 0);
  }
}

}  // namespace
