// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/comm/threads.hpp>
#include <tessera/mesh/mesh.hpp>

namespace ts = tessera;

namespace {

static_assert(std::is_trivially_copyable_v<ts::mesh> && std::is_trivially_copyable_v<ts::training_mesh>);

// Meshes are values of structural types: template arguments.
template <ts::mesh Ranks>
struct sized_by_mesh {
  static constexpr int ranks = Ranks.size();
  static constexpr int stride_of_first = Ranks.stride(0);
};
static_assert(sized_by_mesh<ts::mesh{{"a", 2}, {"b", 3}, {"c", 4}}>::ranks == 24);
static_assert(sized_by_mesh<ts::mesh{{"a", 2}, {"b", 3}, {"c", 4}}>::stride_of_first == 12);
static_assert(std::is_same_v<sized_by_mesh<ts::mesh{{"a", 2}}>, sized_by_mesh<ts::mesh{{"a", 2}}>>);
static_assert(!std::is_same_v<sized_by_mesh<ts::mesh{{"a", 2}}>, sized_by_mesh<ts::mesh{{"b", 2}}>>);

template <ts::training_mesh Ranks>
struct sized_by_training_mesh {
  static constexpr int shards = Ranks.size("fsdp");
};
constexpr ts::training_mesh of_16({.pp = 2, .dp_shard = 2, .cp = 2, .tp = 2, .ep = 4}, 16);
static_assert(sized_by_training_mesh<of_16>::shards == 4);
static_assert(ts::training_mesh(of_16.sizes, of_16.efsdp, of_16.dense, of_16.sparse) == of_16);
static_assert(ts::mesh(2, {{"a", 2}, {"b", 3}}) == ts::mesh{{"a", 2}, {"b", 3}});
static_assert(of_16.efsdp == 2 && of_16.sparse.size("ep") == 4);
static_assert(of_16.stage(9) == 1 && of_16.stage_rank(9) == 1);
static_assert(of_16.along("ep").member(9, 3) == 11);
static_assert(ts::mesh{}.size() == 1 && ts::mesh{}.coordinates(0) == ts::mesh_coordinates{});

// Calls `visit(sizes)` for every list of `axes` sizes whose product is `world`.
template <class Visit>
void for_each_factorisation(int world, int axes, std::vector<int>& sizes, Visit&& visit) {
  if (axes == 1) {
    sizes.push_back(world);
    visit(sizes);
    sizes.pop_back();
    return;
  }
  for (int size = 1; size <= world; ++size) {
    if (world % size != 0) continue;
    sizes.push_back(size);
    for_each_factorisation(world / size, axes - 1, sizes, visit);
    sizes.pop_back();
  }
}

// Ranks and coordinates against an odometer, which knows neither strides nor divisions.
int wrong_places(const ts::mesh& ranks) {
  int wrong = 0;
  ts::mesh_coordinates place;
  for (int rank = 0; rank < ranks.size(); ++rank) {
    wrong += !(ranks.coordinates(rank) == place);
    wrong += ranks.rank_at(place) != rank;
    for (int i = 0; i < ranks.num_axes; ++i) wrong += ranks.coordinate(rank, i) != place[i];
    for (int i = ranks.num_axes - 1; i >= 0 && ++place[i] == ranks.axes[i].size; --i) place[i] = 0;
  }
  return wrong + !(place == ts::mesh_coordinates{});
}

// Groups against their definition: same coordinates on all other axes.
int wrong_groups(const ts::mesh_group& group) {
  const ts::mesh& ranks = group.ranks;
  int wrong = 0;
  std::vector<int> members_of(static_cast<std::size_t>(group.count()), 0);
  for (int rank = 0; rank < ranks.size(); ++rank) {
    int place = 0;  // members with lower ranks
    for (int other = 0; other < ranks.size(); ++other) {
      bool together = true;
      for (int i = 0; i < ranks.num_axes; ++i) {
        together = together && (group.has(i) || ranks.coordinate(rank, i) == ranks.coordinate(other, i));
      }
      wrong += together != (group.color(rank) == group.color(other));
      if (!together) continue;
      wrong += group.member(rank, group.index(other)) != other;
      place += other < rank;
    }
    wrong += group.index(rank) != place;
    ++members_of[static_cast<std::size_t>(group.color(rank))];
  }
  for (const int members : members_of) wrong += members != group.size();
  return wrong;
}

template <class... Names>
std::set<int> members(const ts::training_mesh& ranks, int rank, const Names&... names) {
  const ts::mesh_group group = ranks.along(names...);
  std::set<int> result;
  for (int i = 0; i < group.size(); ++i) result.insert(group.member(rank, i));
  return result;
}

}  // namespace

TEST_CASE("ranks and coordinates are a bijection in row-major order, for every mesh of up to 16 ranks and 4 axes") {
  int wrong = 0;
  int meshes = 0;
  for (int world = 1; world <= 16; ++world) {
    std::vector<int> sizes;
    for_each_factorisation(world, 4, sizes, [&](const std::vector<int>& of) {
      const ts::mesh ranks{{"a", of[0]}, {"b", of[1]}, {"c", of[2]}, {"d", of[3]}};
      wrong += wrong_places(ranks);
      for (unsigned selected = 0; selected < 16; ++selected) wrong += wrong_groups({ranks, selected});
      ++meshes;
    });
  }
  CHECK(meshes == 204);
  CHECK(wrong == 0);
}

TEST_CASE("both views of every training mesh of up to 16 ranks have the same stages, replicas and blocks of ranks") {
  int wrong = 0;
  int meshes = 0;
  for (int world = 1; world <= 16; ++world) {
    std::vector<int> sizes;
    for_each_factorisation(world, 5, sizes, [&](const std::vector<int>& of) {
      const int shared = of[2] * of[3] * of[4];
      for (int ep = 1; ep <= shared; ++ep) {
        if (shared % ep != 0) continue;
        ++meshes;
        const ts::training_mesh ranks(
            {.pp = of[0], .dp_replicate = of[1], .dp_shard = of[2], .cp = of[3], .tp = of[4], .ep = ep}, world);
        wrong += ranks.size() != world || ranks.sparse.size() != world;
        wrong += ranks.efsdp * ep != shared;
        wrong += wrong_places(ranks.dense) + wrong_places(ranks.sparse);
        wrong += ranks.size("dp") != of[1] * of[2] || ranks.size("batch") != of[1] * of[2];
        wrong += ranks.size("fsdp") != of[2] * of[3] || ranks.size("loss") != of[1] * of[2] * of[3];
        for (int rank = 0; rank < world; ++rank) {
          // A stage and a replica are the same ranks in both views, and so is what shards a parameter.
          wrong += ranks.dense.coordinate(rank, 0) != ranks.sparse.coordinate(rank, 0);
          wrong += ranks.dense.coordinate(rank, 1) != ranks.sparse.coordinate(rank, 1);
          wrong += members(ranks, rank, "dp_shard", "cp", "tp") != members(ranks, rank, "efsdp", "ep");
          wrong += members(ranks, rank, "fsdp") != members(ranks, rank, "cp", "dp_shard");
          wrong += members(ranks, rank, "loss") != members(ranks, rank, "dp", "cp");
          // A group of ep is `ep` neighbouring ranks.
          const std::set<int> experts = members(ranks, rank, "ep");
          wrong += *experts.begin() % ep != 0 || *experts.rbegin() - *experts.begin() != ep - 1;
          wrong += ranks.stage_rank(rank) + ranks.stage(rank) * ranks.stage_size() != rank;
          // A stage's meshes number its ranks as the world does.
          wrong += ranks.sparse_stage().coordinate(ranks.stage_rank(rank), 2) != ranks.sparse.coordinate(rank, 3);
          wrong += ranks.dense_stage().coordinate(ranks.stage_rank(rank), 3) != ranks.dense.coordinate(rank, 4);
          wrong += ranks.fsdp_stage().coordinate(ranks.stage_rank(rank), 1) != ranks.along("fsdp").index(rank);
        }
        wrong += !(ts::training_mesh::parse(to_string(ranks), world) == ranks);
      }
    });
  }
  CHECK(meshes > 500);
  CHECK(wrong == 0);
}

TEST_CASE("a mesh is read from the text that it writes") {
  const ts::mesh ranks{{"rows", 3}, {"cols_2", 5}};
  CHECK(to_string(ranks) == "rows=3,cols_2=5");
  CHECK(ts::mesh::parse("rows=3,cols_2=5") == ranks);
  CHECK(ts::mesh::parse("") == ts::mesh{});
  CHECK(ranks.axis("cols_2") == 1);
  CHECK(ranks.find("cols") == -1);
  CHECK(ranks.without("rows") == ts::mesh{{"cols_2", 5}});
  const ts::mesh three{{"a", 2}, {"b", 3}, {"c", 4}};
  CHECK(three.flattened("ab", "a", "b") == ts::mesh{{"ab", 6}, {"c", 4}});
  CHECK(three.flattened("b", "b", "b") == three);
}

TEST_CASE("a training mesh is read from any of its sizes, dp_shard being what is left") {
  const ts::training_mesh ranks = ts::training_mesh::parse("dp_shard=2,ep=2", 2);
  CHECK(ranks.sizes == ts::training_sizes{.dp_shard = 2, .ep = 2});
  CHECK(ranks.efsdp == 1);
  CHECK(ts::training_mesh::parse("", 6).sizes.dp_shard == 6);
  CHECK(ts::training_mesh::parse("tp=2,pp=3", 24).sizes == ts::training_sizes{.pp = 3, .dp_shard = 4, .tp = 2});
  CHECK(to_string(ts::training_mesh::parse("ep=4", 8)) == "pp=1,dp_replicate=1,dp_shard=8,cp=1,tp=1,ep=4");
  CHECK(ts::training_mesh({.dp_replicate = 2}, 8).sizes.dp_shard == 4);
}

TEST_CASE("a sub-communicator has the members of the group in their order") {
  constexpr ts::training_mesh ranks({.pp = 1, .dp_replicate = 2, .dp_shard = 2, .cp = 1, .tp = 2, .ep = 2}, 8);
  std::vector<int> wrong(8, 0);
  ts::comm::threads::run(8, [&](ts::comm::threads& comm) {
    const auto check = [&](ts::comm::threads group, const ts::mesh_group& expected) {
      std::vector<int> world_ranks(static_cast<std::size_t>(group.size()));
      const int own = comm.rank();
      group.all_gather({}, &own, world_ranks.data(), 1);
      int& count = wrong[static_cast<std::size_t>(own)];
      count += group.size() != expected.size() || group.rank() != expected.index(own);
      for (int i = 0; i < group.size(); ++i) {
        count += world_ranks[static_cast<std::size_t>(i)] != expected.member(own, i);
      }
    };
    check(ts::sub_communicator(comm, ranks, "ep"), ranks.along("ep"));
    check(ts::sub_communicator(comm, ranks, "loss"), ranks.along("loss"));
    check(ts::sub_communicator(comm, ranks, "efsdp", "dp_replicate"), ranks.along("efsdp", "dp_replicate"));
    check(ts::sub_communicator(comm, ranks.dense, "tp"), ranks.dense.along("tp"));
    check(ts::sub_communicator(comm, ranks.dense), ranks.dense.along());
    ts::mesh_communicators all(comm, ranks.sparse);
    for (int i = 0; i < 4; ++i) check(all.on(i), ts::mesh_group{ranks.sparse, 1U << i});
    wrong[static_cast<std::size_t>(comm.rank())] += all.on("ep").size() != 2 || all.rank() != comm.rank();
    CHECK_THROWS_WITH_AS(ts::sub_communicator(comm, ts::mesh{{"dp", 4}}, "dp"),
                         "sub_communicator: the communicator has 8 ranks, the mesh dp=4 has 4", ts::invalid_argument);
    CHECK_THROWS_AS(ts::mesh_communicators(comm, ts::mesh{}), ts::invalid_argument);
  });
  CHECK(wrong == std::vector<int>(8, 0));
}

TEST_CASE("meshes that cannot be are refused with their numbers") {
  using ts::mesh;
  CHECK_THROWS_WITH_AS((mesh{{"dp", 0}}), "mesh axis 'dp' has size 0, it must be at least 1", ts::invalid_argument);
  CHECK_THROWS_WITH_AS((mesh{{"dp", 2}, {"dp", 2}}), "mesh axis 'dp' is named twice", ts::invalid_argument);
  CHECK_THROWS_WITH_AS((mesh{{"2d", 2}}),
                       "'2d' is no name for a mesh axis: 1 to 23 letters, digits and underscores, not a digit first",
                       ts::invalid_argument);
  CHECK_THROWS_AS((mesh{{"", 2}}), ts::invalid_argument);
  CHECK_THROWS_AS((mesh{{"d p", 2}}), ts::invalid_argument);
  CHECK_THROWS_AS(ts::mesh_axis::named("a_name_that_is_far_too_long", 2), ts::invalid_argument);
  CHECK_THROWS_AS(mesh::parse("a_name_that_is_far_too_long=2"), ts::invalid_argument);
  CHECK_THROWS_AS(mesh(9, {{"a", 2}}), ts::invalid_argument);
  CHECK_THROWS_WITH_AS((mesh{{"a", 1}, {"b", 1}, {"c", 1}, {"d", 1}, {"e", 1}, {"f", 1}, {"g", 1}, {"h", 1}, {"i", 1}}),
                       "a mesh of 9 axes, at most 8 are possible", ts::invalid_argument);
  CHECK_THROWS_WITH_AS((mesh{{"a", 65536}, {"b", 65536}}),
                       "a mesh of more than 2147483647 ranks: axis 'b' makes it too large", ts::invalid_argument);

  const mesh ranks{{"dp", 2}, {"tp", 3}};
  CHECK_THROWS_WITH_AS(ranks.axis("ep"), "the mesh dp=2,tp=3 has no axis 'ep'", ts::invalid_argument);
  CHECK_THROWS_WITH_AS(ranks.stride(2), "the mesh dp=2,tp=3 has no axis 2, axes are in [0, 2)", ts::invalid_argument);
  CHECK_THROWS_WITH_AS(ranks.coordinates(6), "the mesh dp=2,tp=3 has no rank 6, ranks are in [0, 6)",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(ranks.rank_at({{0, 3}}), "coordinate 3 on mesh axis 'tp', coordinates are in [0, 3)",
                       ts::invalid_argument);
  CHECK_THROWS_AS(ranks.along("tp", "tp"), ts::invalid_argument);
  CHECK_THROWS_AS(ranks.along("tp").member(0, 3), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(ranks.flattened("all", "tp", "dp"),
                       "axes 'tp' to 'dp' of the mesh dp=2,tp=3 cannot be merged: the first must not stand behind the "
                       "last",
                       ts::invalid_argument);
  for (const char* text : {"dp", "dp=", "dp=x", "dp=2x", "dp=2,", ",dp=2", "dp=2,,tp=2", "dp=99999999999"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(mesh::parse(text), ts::invalid_argument);
  }
  CHECK_THROWS_WITH_AS(mesh::parse("dp=2,tp"),
                       "the mesh 'dp=2,tp' cannot be read at 'tp': write axis=size,axis=size, for example "
                       "dp_shard=2,ep=2",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(mesh::parse("dp=2,"),
                       "the mesh 'dp=2,' ends in a comma: write axis=size,axis=size, for example dp_shard=2,ep=2",
                       ts::invalid_argument);
}

TEST_CASE("training meshes that cannot be are refused with the nearest right numbers") {
  using ts::training_mesh;
  CHECK_THROWS_WITH_AS(training_mesh({.dp_shard = 4, .tp = 2}, 16),
                       "pp * dp_replicate * dp_shard * cp * tp = 1 * 1 * 4 * 1 * 2 must be the number of ranks, 16; "
                       "dp_shard = 8 would be right",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(training_mesh({.tp = 4}, 6),
                       "pp * dp_replicate * cp * tp = 1 * 1 * 1 * 4 must divide the number of ranks, 6; the nearest "
                       "numbers of ranks that a dp_shard exists for are 4 and 8",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(training_mesh({.pp = 4, .tp = 4}, 8),
                       "pp * dp_replicate * cp * tp = 4 * 1 * 1 * 4 must divide the number of ranks, 8; these axes "
                       "alone have more ranks",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(training_mesh({.ep = 5}, 24),
                       "ep = 5 must divide dp_shard * cp * tp = 24; the nearest that do are 4 and 6",
                       ts::invalid_argument);
  CHECK_THROWS_WITH_AS(training_mesh({.dp_replicate = 3, .ep = 24}, 24),
                       "ep = 24 must divide dp_shard * cp * tp = 8; the nearest that does is 8", ts::invalid_argument);
  CHECK_THROWS_WITH_AS(training_mesh({.cp = -1}, 4), "mesh axis 'cp' has size -1, it must be at least 1",
                       ts::invalid_argument);
  CHECK_THROWS_AS(training_mesh({.dp_shard = -1}, 4), ts::invalid_argument);
  CHECK_THROWS_AS(training_mesh({}, 0), ts::invalid_argument);
  CHECK_THROWS_AS(training_mesh(of_16.sizes, 4, of_16.dense, of_16.sparse), ts::invalid_argument);
  constexpr int huge = 2147483647;  // products must not wrap around to something that looks right
  CHECK_THROWS_AS(training_mesh({.pp = huge, .dp_replicate = huge, .dp_shard = huge, .cp = huge, .tp = huge}, huge),
                  ts::invalid_argument);
  CHECK_THROWS_WITH_AS(training_mesh::parse("dp_shard=2,efsdp=2", 4),
                       "the mesh 'dp_shard=2,efsdp=2' names an axis 'efsdp': the sizes to choose are pp, dp_replicate, "
                       "dp_shard, cp, tp and ep, others follow from them",
                       ts::invalid_argument);
  CHECK_THROWS_AS(training_mesh::parse("ep=2,ep=2", 4), ts::invalid_argument);
  CHECK_THROWS_AS(training_mesh::parse("dp_shard=0", 4), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(of_16.along("tp", "ep"),
                       "axis 'tp' and another one of the group belong to different views, "
                       "pp=2,dp_replicate=1,dp_shard=2,cp=2,tp=2 and pp=2,dp_replicate=1,efsdp=2,ep=4: name axes of "
                       "one view",
                       ts::invalid_argument);
  CHECK_THROWS_AS(of_16.along("fsdp", "efsdp"), ts::invalid_argument);
  CHECK_THROWS_AS(of_16.along("fsdp", "cp"), ts::invalid_argument);  // cp is part of fsdp
  CHECK_THROWS_WITH_AS(of_16.size("etp"), "the mesh pp=2,dp_replicate=1,dp_shard=2,cp=2,tp=2,ep=4 has no axis 'etp'",
                       ts::invalid_argument);
}
