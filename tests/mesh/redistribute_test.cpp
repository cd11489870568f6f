// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/comm/self.hpp>
#include <tessera/comm/threads.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/mesh/mesh.hpp>

#include "oracle.hpp"

namespace ts = tessera;

namespace {

using ts::placement;
using ts::placements;
using kind = ts::redistribution_kind;

// Element `i` of the tensor. Integers, so that sums are exact in any order.
double value_of(std::int64_t i) { return static_cast<double>(i * i + 3 * i + 1); }

// Coordinates of a rank on the partial axes as one number, and how many there are.
std::pair<int, int> contributor(const ts::mesh& ranks, const placements& list, int rank) {
  int index = 0;
  int count = 1;
  for (int axis = 0; axis < list.count; ++axis) {
    if (!list[axis].is_partial()) continue;
    index = index * ranks.axes[axis].size + ranks.coordinate(rank, axis);
    count *= ranks.axes[axis].size;
  }
  return {index, count};
}

ts::reduce_op op_of(const placements& list) {
  for (int axis = 0; axis < list.count; ++axis) {
    if (list[axis].is_partial()) return list[axis].op;
  }
  return ts::reduce_op::sum;
}

// What a contributor has of element `i`: joined over all contributors it is `value_of(i)`.
double contribution(std::int64_t i, ts::reduce_op op, int index, int count) {
  const int winner = static_cast<int>((i * 7 + 3) % count);
  const double other = static_cast<double>(1 + (i + index) % 5);
  if (op == ts::reduce_op::max) return index == winner ? value_of(i) : value_of(i) - other;
  if (op == ts::reduce_op::min) return index == winner ? value_of(i) : value_of(i) + other;
  if (index != winner) return other;
  double rest = value_of(i);
  for (int k = 0; k < count; ++k) rest -= k == winner ? 0.0 : static_cast<double>(1 + (i + k) % 5);
  return rest;
}

double join(ts::reduce_op op, double a, double b) {
  return op == ts::reduce_op::sum ? a + b : op == ts::reduce_op::min ? std::fmin(a, b) : std::fmax(a, b);
}

// Runs plans over threads and compares every element on every rank.
struct runner {
  ts::mesh ranks;
  ts::box tensor;
  int wrong = 0;
  int runs = 0;
  std::size_t longest = 0;

  void run(const std::vector<std::pair<placements, placements>>& pairs) {
    std::vector<ts::redistribution_plan> plans;
    for (const auto& [from, to] : pairs) {
      plans.push_back(ts::plan_redistribution(ranks, from, to, tensor, sizeof(double)));
      longest = std::max(longest, plans.back().steps.size());
    }
    const auto world = static_cast<std::size_t>(ranks.size());
    std::vector<std::vector<std::vector<double>>> results(plans.size(), std::vector<std::vector<double>>(world));
    ts::comm::threads::run(ranks.size(), [&](ts::comm::threads& comm) {
      ts::mesh_communicators comms(comm, ranks);
      for (std::size_t p = 0; p < plans.size(); ++p) {
        const auto [index, count] = contributor(ranks, plans[p].from, comm.rank());
        std::vector<double> in;
        for (const std::int64_t i : mesh_oracle::held_elements(ranks, plans[p].from, comm.rank(), tensor)) {
          in.push_back(contribution(i, op_of(plans[p].from), index, count));
        }
        std::vector<double>& out = results[p][static_cast<std::size_t>(comm.rank())];
        out.assign(mesh_oracle::held_elements(ranks, plans[p].to, comm.rank(), tensor).size(), std::nan(""));
        ts::host_buffer workspace(ts::redistribute_workspace_bytes(plans[p]));
        const std::vector<double> before = in;
        ts::redistribute({}, comms, plans[p], in.data(), out.data(), ts::workspace_memory(workspace));
        if (in != before) throw ts::error("redistribute wrote to its input");
      }
    });
    for (std::size_t p = 0; p < plans.size(); ++p) {
      const int before = wrong;
      check(plans[p], results[p]);
      if (wrong != before)
        MESSAGE(ranks.text() << ": " << to_string(plans[p].from) << " to " << to_string(plans[p].to) << ": "
                             << to_string(plans[p]));
      ++runs;
    }
  }

  // Every rank's array must be, joined over the contributors with the same coordinates elsewhere, the tensor's values.
  void check(const ts::redistribution_plan& plan, const std::vector<std::vector<double>>& arrays) {
    ts::mesh_group contributors{ranks, 0};
    for (int axis = 0; axis < plan.to.count; ++axis) {
      if (plan.to[axis].is_partial()) contributors.selected |= 1U << axis;
    }
    for (int rank = 0; rank < ranks.size(); ++rank) {
      const auto elements = mesh_oracle::held_elements(ranks, plan.to, rank, tensor);
      for (std::size_t i = 0; i < elements.size(); ++i) {
        double joined = arrays[static_cast<std::size_t>(contributors.member(rank, 0))][i];
        for (int k = 1; k < contributors.size(); ++k) {
          joined = join(op_of(plan.to), joined, arrays[static_cast<std::size_t>(contributors.member(rank, k))][i]);
        }
        wrong += !(joined == value_of(elements[i]));
      }
    }
  }
};

const std::vector<placement> all_choices = {placement::replicate(),
                                            placement::shard(0),
                                            placement::shard(1),
                                            placement::strided_shard(0, 2),
                                            placement::strided_shard(1, 3),
                                            placement::partial(),
                                            placement::partial(ts::reduce_op::max)};

bool mixes_reductions(const placements& list) {
  const placement* first = nullptr;
  for (int axis = 0; axis < list.count; ++axis) {
    if (!list[axis].is_partial()) continue;
    if (first != nullptr && !(*first == list[axis])) return true;
    first = &list[axis];
  }
  return false;
}

std::vector<kind> kinds(const ts::redistribution_plan& plan) {
  std::vector<kind> result;
  for (const auto& step : plan.steps) result.push_back(step.kind);
  return result;
}

}  // namespace

TEST_CASE("every pair of placements on 1 to 4 ranks, evenly and unevenly divided") {
  for (int size = 1; size <= 4; ++size) {
    for (const auto& [length, width] : {std::pair{12, 6}, {5, 3}, {2, 1}, {1, 7}}) {
      runner test{{{"a", size}}, ts::box::whole({length, width})};
      std::vector<std::pair<placements, placements>> pairs;
      for (const placement& from : all_choices) {
        for (const placement& to : all_choices) pairs.push_back({{from}, {to}});
      }
      pairs.push_back({{placement::partial(ts::reduce_op::min)}, {placement::shard(1)}});
      pairs.push_back({{placement::shard(0)}, {placement::partial(ts::reduce_op::min)}});
      test.run(pairs);
      CHECK(test.wrong == 0);
      CHECK(test.runs == 51);
      CHECK(test.longest <= 2);
    }
  }
}

TEST_CASE("every pair of placements on two axes, evenly and unevenly divided") {
  for (const ts::mesh& ranks :
       {ts::mesh{{"a", 2}, {"b", 2}}, ts::mesh{{"a", 2}, {"b", 3}}, ts::mesh{{"a", 2}, {"b", 1}}}) {
    std::vector<placements> lists;
    for (const placement& a : all_choices) {
      for (const placement& b : all_choices) {
        if (!mixes_reductions({a, b})) lists.push_back({a, b});
      }
    }
    REQUIRE(lists.size() == 47);
    std::vector<std::pair<placements, placements>> pairs;
    for (const placements& from : lists) {
      for (const placements& to : lists) pairs.push_back({from, to});
    }
    runner test{ranks, ranks.axes[1].size == 2 ? ts::box::whole({8, 4}) : ts::box::whole({7, 5})};
    test.run(pairs);
    CHECK(test.wrong == 0);
    CHECK(test.runs == 47 * 47);
    CHECK(test.longest <= 4);
  }
}

TEST_CASE("random placements of a tensor of three dimensions on three axes") {
  std::mt19937 random(7);
  runner test{{{"a", 2}, {"b", 2}, {"c", 2}}, ts::box::whole({7, 3, 5})};
  std::vector<placement> choices = all_choices;
  choices.push_back(placement::shard(2));
  choices.push_back(placement::strided_shard(0, 4));
  const auto pick = [&] {
    for (;;) {
      placements list;
      for (int i = 0; i < 3; ++i) list[list.count++] = choices[random() % choices.size()];
      if (!mixes_reductions(list)) return list;
    }
  };
  std::vector<std::pair<placements, placements>> pairs;
  for (int i = 0; i < 300; ++i) {
    const placements from = pick();
    pairs.push_back({from, pick()});
  }
  test.run(pairs);
  CHECK(test.wrong == 0);
  CHECK(test.runs == 300);
}

TEST_CASE("single steps are the collectives one expects, with the bytes that a rank receives") {
  const ts::mesh ranks{{"dp", 4}};
  const ts::box tensor = ts::box::whole({8, 4});  // 32 floats, 128 bytes
  const auto plan = [&](const placement& from, const placement& to) {
    return ts::plan_redistribution(ranks, {from}, {to}, tensor, 4);
  };
  const placement sharded = placement::shard(0);
  CHECK(to_string(plan(sharded, placement::replicate())) == "all_gather(dp, dim 0) 96 B");
  CHECK(to_string(plan(placement::partial(), sharded)) == "reduce_scatter(dp, dim 0) 96 B");
  CHECK(to_string(plan(placement::partial(), placement::replicate())) == "all_reduce(dp) 192 B");
  CHECK(to_string(plan(sharded, placement::shard(1))) == "all_to_all(dp, dim 0 to dim 1) 24 B");
  CHECK(to_string(plan(sharded, placement::strided_shard(0, 2))) == "all_to_all(dp, dim 0 to dim 0) 32 B");
  CHECK(to_string(plan(placement::replicate(), sharded)) == "slice(dp, dim 0) 0 B");
  CHECK(to_string(plan(placement::replicate(), placement::partial())) == "contribute(dp) 0 B");
  CHECK(to_string(plan(sharded, placement::partial())) == "contribute(dp) 0 B");
  CHECK(to_string(plan(sharded, sharded)) == "nothing");
  CHECK(to_string(plan(placement::partial(), placement::partial(ts::reduce_op::max))) ==
        "all_reduce(dp) 192 B; contribute(dp) 0 B");
  // Along an axis of one rank there is nothing to do.
  CHECK(ts::plan_redistribution({{"dp", 1}}, {placement::partial()}, {sharded}, tensor, 4).steps.empty());
}

TEST_CASE("gradients of replicated shards are scattered first and then reduced over the replicas") {
  const ts::training_mesh ranks({.dp_replicate = 2}, 8);
  const auto plan =
      ts::plan_redistribution(ranks.fsdp_stage(), {placement::partial(), placement::partial(), placement::replicate()},
                              ts::dense_placements(), ts::box::whole({8, 4}), 4);
  CHECK(to_string(plan) == "reduce_scatter(fsdp, dim 0) 96 B; all_reduce(dp_replicate) 32 B");
  CHECK(plan.bytes == 128);
}

TEST_CASE("experts are gathered over efsdp in one step, although ep shards the same dimension inside") {
  const ts::training_mesh ranks({.ep = 2}, 4);
  const ts::box experts = ts::box::whole({8, 3});
  const placements sharded = ts::expert_placements(ranks, 8);
  const placements gathered{placement::replicate(), placement::replicate(), placement::shard(0)};
  CHECK(to_string(ts::plan_redistribution(ranks.sparse_stage(), sharded, gathered, experts, 2)) ==
        "all_gather(efsdp, dim 0) 12 B");
  // With plain shards the ranks of an efsdp group do not hold what they need together: the inner axis goes first.
  const placements plain{placement::replicate(), placement::shard(0), placement::shard(0)};
  CHECK(kinds(ts::plan_redistribution(ranks.sparse_stage(), plain, gathered, experts, 2)) ==
        std::vector<kind>{kind::all_gather, kind::all_gather, kind::slice});
}

TEST_CASE("a plan is the same for any rank and never dearer than gathering everything") {
  const ts::mesh ranks{{"a", 2}, {"b", 3}};
  const ts::box tensor = ts::box::whole({7, 5});
  for (const placement& a : all_choices) {
    for (const placement& b : all_choices) {
      if (mixes_reductions({a, b})) continue;
      const placements to{placement::shard(1), placement::shard(0)};
      const auto plan = ts::plan_redistribution(ranks, {a, b}, to, tensor, 8);
      CHECK(plan == ts::plan_redistribution(ranks, {a, b}, to, tensor, 8));
      CHECK(plan.bytes <= ts::plan_redistribution(ranks, {a, b}, placements::all(2), tensor, 8).bytes);
      std::int64_t sum = 0;
      for (const auto& step : plan.steps) sum += step.bytes;
      CHECK(plan.bytes == sum);
    }
  }
}

TEST_CASE("the path of a replicated tensor through a partial sum keeps every bit") {
  const ts::mesh ranks{{"a", 3}};
  const ts::box tensor = ts::box::whole({4});
  const auto there = ts::plan_redistribution(ranks, {placement::replicate()}, {placement::partial()}, tensor, 8);
  const auto back = ts::plan_redistribution(ranks, {placement::partial()}, {placement::replicate()}, tensor, 8);
  ts::comm::threads::run(3, [&](ts::comm::threads& comm) {
    ts::mesh_communicators comms(comm, ranks);
    const double in[] = {-0.0, 0.0, 5e-324, -1.5};
    double partial[4];
    double out[4] = {1, 1, 1, 1};
    ts::host_buffer memory(std::max(ts::redistribute_workspace_bytes(there), ts::redistribute_workspace_bytes(back)));
    ts::redistribute({}, comms, there, in, partial, ts::workspace_memory(memory));
    ts::redistribute({}, comms, back, partial, out, ts::workspace_memory(memory));
    CHECK(std::memcmp(in, out, sizeof(in)) == 0);
  });
}

TEST_CASE("elements of any type move; only reducible ones are reduced") {
  const ts::mesh ranks{{"a", 2}};
  const ts::box tensor = ts::box::whole({3, 2});
  const auto plan = ts::plan_redistribution(ranks, {placement::shard(0)}, {placement::shard(1)}, tensor, 2);
  const auto reduces = ts::plan_redistribution(ranks, {placement::partial()}, {placement::shard(1)}, tensor, 2);
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
    ts::mesh_communicators comms(comm, ranks);
    std::vector<ts::bfloat16> in;
    for (const std::int64_t i : mesh_oracle::held_elements(ranks, plan.from, comm.rank(), tensor)) {
      in.push_back(ts::bfloat16(static_cast<float>(i)));
    }
    std::vector<ts::bfloat16> out(3);
    ts::host_buffer memory(ts::redistribute_workspace_bytes(plan));
    ts::redistribute({}, comms, plan, in.data(), out.data(), ts::workspace_memory(memory));
    for (int i = 0; i < 3; ++i)
      CHECK(static_cast<float>(out[static_cast<std::size_t>(i)]) == static_cast<float>(2 * i + comm.rank()));
    CHECK_THROWS_WITH_AS(
        ts::redistribute({}, comms, reduces, in.data(), out.data(), ts::workspace_memory(memory)),
        "redistribute: reduce_scatter(a, dim 1) 6 B joins contributions, which needs elements of type float, double, "
        "int32, int64 or uint64",
        ts::invalid_argument);
  });
}

TEST_CASE("a workspace that is too small is refused on every rank before anything is sent") {
  ts::comm::threads::run(2, [](ts::comm::threads& comm) {
    const ts::mesh ranks{{"a", 2}};
    ts::mesh_communicators comms(comm, ranks);
    const auto plan =
        ts::plan_redistribution(ranks, {placement::shard(0)}, {placement::replicate()}, ts::box::whole({4}), 8);
    double in[2] = {1, 2};
    double out[4] = {};
    CHECK_THROWS_AS(ts::redistribute({}, comms, plan, in, out, ts::workspace_memory()), ts::invalid_argument);
    ts::host_buffer memory(ts::redistribute_workspace_bytes(plan));
    ts::redistribute({}, comms, plan, in, out, ts::workspace_memory(memory));
    CHECK(out[3] == 2);
  });
}

TEST_CASE("wrong arguments are refused with a sentence before anything is sent") {
  ts::comm::self<ts::space::host> comm;
  const ts::mesh ranks{{"a", 1}};
  ts::mesh_communicators comms(comm, ranks);
  const ts::box tensor = ts::box::whole({2});
  const auto plan = ts::plan_redistribution(ranks, {placement::shard(0)}, {placement::replicate()}, tensor, 8);
  ts::host_buffer memory(ts::redistribute_workspace_bytes(plan));
  const ts::workspace_memory workspace(memory);
  double in[2] = {1, 2};
  double out[2] = {};
  float narrow[2] = {};
  ts::redistribute({}, comms, plan, in, out, workspace);
  CHECK(out[1] == 2);
  CHECK_THROWS_WITH_AS(ts::redistribute({}, comms, plan, narrow, narrow, workspace),
                       "redistribute: the plan is for elements of 8 bytes, these have 4", ts::invalid_argument);
  CHECK_THROWS_AS(ts::redistribute({}, comms, plan, in, in + 1, workspace), ts::invalid_argument);
  CHECK_THROWS_WITH_AS(ts::redistribute({}, comms, plan, static_cast<const double*>(nullptr), out, workspace),
                       "redistribute: rank 0 gives no data for 2 elements before or 2 elements afterwards",
                       ts::invalid_argument);
  const auto other = ts::plan_redistribution({{"b", 1}}, {placement::shard(0)}, {placement::shard(0)}, tensor, 8);
  CHECK_THROWS_WITH_AS(ts::redistribute({}, comms, other, in, out, workspace),
                       "redistribute: the plan is for the mesh b=1, the communicators are of the mesh a=1",
                       ts::invalid_argument);
  ts::memory_builder counting;
  CHECK_THROWS_AS(ts::redistribute({}, comms, plan, in, out, counting), ts::invalid_argument);
  CHECK_THROWS_AS(ts::plan_redistribution(ranks, {placement::shard(0)}, {placement::shard(1)}, tensor, 8),
                  ts::invalid_argument);
  CHECK_THROWS_WITH_AS(ts::plan_redistribution(ranks, {placement::shard(0)}, {placement::shard(0)}, tensor, 0),
                       "plan_redistribution: element_bytes = 0, it must be at least 1", ts::invalid_argument);
}
