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

#include "../support/messages.hpp"

namespace ts = tessera;

namespace {

using lists = std::vector<std::vector<std::int32_t>>;

static_assert(ts::is_expert_layout<ts::layout::block>());
static_assert(ts::is_expert_layout<ts::layout::round_robin>());
static_assert(ts::is_expert_layout<ts::layout::table>());
static_assert(!ts::expert_layout<ts::layout::table_storage>);
static_assert(!ts::expert_layout<int>);
static_assert(std::is_trivially_copyable_v<ts::slot_ref> && sizeof(ts::slot_ref) == 8);

// Everything is a constant expression.
constexpr ts::layout::block five_over_two(5, 2);
static_assert(five_over_two.num_slots(0) == 3 && five_over_two.num_slots(1) == 2 && five_over_two.max_slots() == 3);
static_assert(five_over_two.owner(2) == ts::slot_ref{0, 2} && five_over_two.owner(3, 0) == ts::slot_ref{1, 0});
static_assert(five_over_two.expert_at(1, 1) == 4);
static_assert(ts::choose_replica(five_over_two, 3, 12345) == 0);

constexpr ts::layout::round_robin dealt(5, 2);
static_assert(dealt.num_slots(0) == 3 && dealt.num_slots(1) == 2 && dealt.max_slots() == 3);
static_assert(dealt.owner(3) == ts::slot_ref{1, 1} && dealt.expert_at(0, 2) == 4);

constexpr bool table_is_constexpr() {
  lists experts_of_rank(3);
  experts_of_rank[0] = {2, 0};
  experts_of_rank[2] = {1, 2};
  const ts::layout::table_storage storage(3, experts_of_rank);
  const ts::layout::table table = storage.view();
  return table.num_slots(1) == 0 && table.num_replicas(2) == 2 && table.owner(2, 0) == ts::slot_ref{0, 0} &&
         table.owner(2, 1) == ts::slot_ref{2, 1} && table.expert_at(2, 0) == 1 &&
         ts::choose_replica(table, 2, 7) == 1 && ts::choose_replica(table, 0, 7) == 0;
}
static_assert(table_is_constexpr());

// A small generator of its own, so that the cases do not depend on the standard library's distributions.
class generator {
 public:
  explicit generator(std::uint64_t seed) : state_(seed * 2654435769u + 1) {}
  int below(int bound) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int>((state_ >> 33) % static_cast<std::uint64_t>(bound));
  }

 private:
  std::uint64_t state_;
};

lists random_lists(generator& random, int num_experts, int num_ranks) {
  lists experts_of_rank(static_cast<std::size_t>(num_ranks));
  std::vector<std::set<int>> on_rank(static_cast<std::size_t>(num_ranks));
  const auto place = [&](int expert, int rank) {
    if (!on_rank[static_cast<std::size_t>(rank)].insert(expert).second) return;
    auto& list = experts_of_rank[static_cast<std::size_t>(rank)];
    list.insert(list.begin() + random.below(static_cast<int>(list.size()) + 1), expert);
  };
  const int used_ranks = 1 + random.below(num_ranks);  // the others stay empty unless a replica lands there
  for (int expert = 0; expert < num_experts; ++expert) place(expert, random.below(used_ranks));
  for (int i = random.below(num_experts + 1); i > 0; --i) place(random.below(num_experts), random.below(num_ranks));
  return experts_of_rank;
}

// The slots of every rank, written down without any formula of a layout.
lists brute_force_block(int num_experts, int num_ranks) {
  lists result(static_cast<std::size_t>(num_ranks));
  std::vector<int> sizes(static_cast<std::size_t>(num_ranks), 0);
  for (int i = 0; i < num_experts; ++i) ++sizes[static_cast<std::size_t>(i % num_ranks)];
  int expert = 0;
  for (std::size_t rank = 0; rank < result.size(); ++rank) {
    for (int i = 0; i < sizes[rank]; ++i) result[rank].push_back(expert++);
  }
  return result;
}

lists brute_force_round_robin(int num_experts, int num_ranks) {
  lists result(static_cast<std::size_t>(num_ranks));
  std::size_t rank = 0;
  for (int expert = 0; expert < num_experts; ++expert) {
    result[rank].push_back(expert);
    rank = rank + 1 == result.size() ? 0 : rank + 1;
  }
  return result;
}

// Compares all members with the lists; counts mismatches, since a CHECK per element would dominate the run time.
template <ts::expert_layout Layout>
int mismatches(const Layout& placement, int num_experts, const lists& expected) {
  int wrong = 0;
  std::vector<std::vector<ts::slot_ref>> owners(static_cast<std::size_t>(num_experts));
  int max_slots = 0;
  for (std::size_t rank = 0; rank < expected.size(); ++rank) {
    const int slots = static_cast<int>(expected[rank].size());
    max_slots = slots > max_slots ? slots : max_slots;
    wrong += placement.num_slots(static_cast<int>(rank)) != slots;
    for (int slot = 0; slot < slots; ++slot) {
      const std::int32_t expert = expected[rank][static_cast<std::size_t>(slot)];
      wrong += placement.expert_at(static_cast<int>(rank), slot) != expert;
      owners[static_cast<std::size_t>(expert)].push_back({static_cast<std::int32_t>(rank), slot});
    }
  }
  wrong += placement.num_experts() != num_experts;
  wrong += placement.num_ranks() != static_cast<int>(expected.size());
  wrong += placement.max_slots() != max_slots;
  for (int expert = 0; expert < num_experts; ++expert) {
    const auto& places = owners[static_cast<std::size_t>(expert)];
    wrong += placement.num_replicas(expert) != static_cast<int>(places.size());
    for (std::size_t i = 0; i < places.size(); ++i) wrong += placement.owner(expert, static_cast<int>(i)) != places[i];
    for (std::int64_t token = 0; token < 7; ++token) {
      const int expected_replica = static_cast<int>(token % static_cast<std::int64_t>(places.size()));
      wrong += ts::choose_replica(placement, expert, token) != expected_replica;
    }
  }
  return wrong;
}

std::string message_of(int num_experts, const lists& experts_of_rank) {
  return tessera_test::message_of([&] { const ts::layout::table_storage storage(num_experts, experts_of_rank); });
}

}  // namespace

TEST_CASE("block and round-robin agree with dealing experts out one by one, for any number of experts and ranks") {
  int wrong = 0;
  for (int num_experts = 1; num_experts <= 40; ++num_experts) {
    for (int num_ranks = 1; num_ranks <= 48; ++num_ranks) {
      wrong +=
          mismatches(ts::layout::block(num_experts, num_ranks), num_experts, brute_force_block(num_experts, num_ranks));
      wrong += mismatches(ts::layout::round_robin(num_experts, num_ranks), num_experts,
                          brute_force_round_robin(num_experts, num_ranks));
    }
  }
  for (const int num_experts : {128, 256, 384, 896, 1000, 1023, 1024}) {
    for (const int num_ranks : {1, 3, 7, 64, 72, 320, 1024, 2048}) {
      wrong +=
          mismatches(ts::layout::block(num_experts, num_ranks), num_experts, brute_force_block(num_experts, num_ranks));
      wrong += mismatches(ts::layout::round_robin(num_experts, num_ranks), num_experts,
                          brute_force_round_robin(num_experts, num_ranks));
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("a block gives the first E mod R ranks one expert more") {
  const ts::layout::block ten_over_four(10, 4);
  CHECK(ten_over_four.num_slots(0) == 3);
  CHECK(ten_over_four.num_slots(1) == 3);
  CHECK(ten_over_four.num_slots(2) == 2);
  CHECK(ten_over_four.num_slots(3) == 2);
  CHECK(ten_over_four.expert_at(2, 0) == 6);
  CHECK(ten_over_four.owner(9) == ts::slot_ref{3, 1});
}

TEST_CASE("ranks beyond the number of experts hold none") {
  const ts::layout::block block(3, 5);
  const ts::layout::round_robin dealt_out(3, 5);
  for (int rank = 3; rank < 5; ++rank) {
    CHECK(block.num_slots(rank) == 0);
    CHECK(dealt_out.num_slots(rank) == 0);
  }
  CHECK(block.owner(2) == ts::slot_ref{2, 0});
}

TEST_CASE("a table agrees with its lists: uneven, replicated, shuffled, with empty ranks, up to 1024 experts") {
  generator random(7);
  int wrong = 0;
  int replicated = 0;
  int empty_ranks = 0;
  for (int i = 0; i < 300; ++i) {
    const int num_experts = i % 30 == 0 ? 1024 : 1 + random.below(48);
    const int num_ranks = 1 + random.below(i % 30 == 0 ? 96 : 12);
    const lists experts_of_rank = random_lists(random, num_experts, num_ranks);
    const ts::layout::table_storage storage(num_experts, experts_of_rank);
    wrong += mismatches(storage.view(), num_experts, experts_of_rank);
    replicated += storage.view().total_slots() > num_experts;
    for (const auto& list : experts_of_rank) empty_ranks += list.empty();
  }
  CHECK(wrong == 0);
  CHECK(replicated > 100);  // the generator makes the cases the title speaks of
  CHECK(empty_ranks > 100);
}

TEST_CASE("a table reads the same from a copy of its integers, as a device would") {
  const lists experts_of_rank{{3, 1}, {}, {0, 2, 1}};
  const ts::layout::table_storage storage(4, experts_of_rank);
  const std::vector<std::int32_t> copy(storage.packed().begin(), storage.packed().end());
  CHECK(storage.packed().size() == ts::layout::table::packed_size(4, 3, 5));
  CHECK(mismatches(storage.view_at(copy.data()), 4, experts_of_rank) == 0);
}

TEST_CASE("a copied or moved table storage has a table of its own") {
  const lists experts_of_rank{{1}, {0}};
  ts::layout::table_storage first(2, experts_of_rank);
  const ts::layout::table_storage second = first;
  first = ts::layout::table_storage(1, {{0}});
  CHECK(mismatches(second.view(), 2, experts_of_rank) == 0);
  const ts::layout::table_storage third = std::move(first);
  CHECK(mismatches(third.view(), 1, {{0}}) == 0);
}

TEST_CASE("a table can say what block and round-robin say") {
  for (const int num_ranks : {1, 3, 4, 9}) {
    const ts::layout::block block(8, num_ranks);
    const ts::layout::table_storage storage(8, brute_force_block(8, num_ranks));
    CHECK(mismatches(storage.view(), 8, brute_force_block(8, num_ranks)) == 0);
    CHECK(mismatches(block, 8, brute_force_block(8, num_ranks)) == 0);
  }
}

TEST_CASE("the error of a table names every expert that no rank holds") {
  CHECK(message_of(6, {{0, 4}, {2}}) ==
        "layout::table: no rank holds expert 1, 3, 5; each of the 6 experts needs at least one slot");
}

TEST_CASE("the error of a table names rank, slot and id that are wrong") {
  CHECK(message_of(3, {{0, 1}, {2, 3}}) == "layout::table: slot 1 of rank 1 holds expert 3, ids must be in [0, 3)");
  CHECK(message_of(3, {{0, -1}, {2, 1}}) == "layout::table: slot 1 of rank 0 holds expert -1, ids must be in [0, 3)");
  CHECK(message_of(3, {{0, 1}, {2, 1, 2}}) ==
        "layout::table: slot 2 of rank 1 holds expert 2, which an earlier slot of that rank holds already; "
        "copies must be on different ranks");
}

TEST_CASE("sizes below one are refused with their values") {
  CHECK_THROWS_WITH_AS(ts::layout::block(0, 4),
                       "layout::block of 0 experts over 4 ranks: both must be at least 1 (a rank may hold no expert)",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(
      ts::layout::round_robin(8, 0),
      "layout::round_robin of 8 experts over 0 ranks: both must be at least 1 (a rank may hold no expert)",
      ts::invalid_argument);
  CHECK_THROWS_AS(ts::layout::block(8, -1), ts::invalid_argument);
  CHECK_THROWS_AS(ts::layout::table_storage(2, {}), ts::invalid_argument);
  CHECK_THROWS_AS(ts::layout::table_storage(0, {{}}), ts::invalid_argument);
}
