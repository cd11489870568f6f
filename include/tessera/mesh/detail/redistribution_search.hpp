// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The search for the cheapest redistribution: shortest path over the placements that a tensor may have on its way.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <queue>
#include <tuple>
#include <utility>
#include <vector>

#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/mesh/axes.hpp>
#include <tessera/mesh/placement.hpp>
#include <tessera/mesh/redistribution_plan.hpp>
#include <tessera/mesh/region.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// What a step takes. Elements, the largest of all ranks.
struct step_cost {
  redistribution_kind kind = redistribution_kind::slice;
  std::int64_t received = 0;  // what arrives from other ranks
  std::int64_t result = 0;    // the local array afterwards
  std::int64_t send = 0;      // packed for sending
  std::int64_t receive = 0;   // packed as received
};

/// The kind of step between two placements of an axis, none where no single step does it.
inline std::optional<redistribution_kind> kind_of_step(const placement& from, const placement& to) {
  if (from.is_shard()) {
    if (to.is_replicate()) return redistribution_kind::all_gather;
    if (to.is_shard()) return redistribution_kind::all_to_all;
    if (to.op == reduce_op::sum) return redistribution_kind::contribute;
  } else if (from.is_replicate()) {
    return to.is_shard() ? redistribution_kind::slice : redistribution_kind::contribute;
  } else {
    if (to.is_replicate()) return redistribution_kind::all_reduce;
    if (to.is_shard()) return redistribution_kind::reduce_scatter;
  }
  return std::nullopt;
}

/// Whether all indices of one list are in another.
inline bool covers(const index_ranges& all, const index_ranges& some) {
  return count_of(intersect(all, some)) == count_of(some);
}

/// All indices of ascending lists that are disjoint.
inline index_ranges join(std::vector<index_range>& parts) {
  std::sort(parts.begin(), parts.end(), [](const index_range& a, const index_range& b) { return a.begin < b.begin; });
  index_ranges result;
  for (const index_range& range : parts) append(result, range.begin, range.count);
  return result;
}

/// Calls `visit(place)` for the places with coordinate 0 on axes that are not in `axes` (a bit each).
template <class Visit>
void for_each_place(const mesh& ranks, std::uint32_t axes, Visit&& visit) {
  mesh_coordinates place;
  for (;;) {
    if (!visit(std::as_const(place))) return;
    int axis = ranks.num_axes - 1;
    for (; axis >= 0; --axis) {
      if ((axes >> axis & 1U) == 0) continue;
      if (++place[axis] < ranks.axes[axis].size) break;
      place[axis] = 0;
    }
    if (axis < 0) return;
  }
}

/// Whether one step along `axis` can do it: what each rank will hold of `dim` is there, in its group where the axis
/// shards `dim` before the step, otherwise on the rank itself.
inline bool dimension_is_there(const mesh& ranks, const placements& before, const placements& after, int axis,
                               const box& tensor, int dim) {
  bool last = true;  // nothing that comes after the axis depends on how it cuts
  std::uint32_t axes = 0;
  for (int i = 0; i < ranks.num_axes; ++i) {
    if (i != axis && (before[i].is_shard_of(dim) || after[i].is_shard_of(dim))) {
      axes |= 1U << i;
      last = last && i < axis;
    }
  }
  if (last) return true;
  const int num_ranks = ranks.axes[axis].size;
  bool good = true;
  for_each_place(ranks, axes, [&](mesh_coordinates place) {
    std::vector<index_range> parts;
    const int sources = before[axis].is_shard_of(dim) ? num_ranks : 1;
    for (place[axis] = 0; place[axis] < sources; ++place[axis]) {
      const index_ranges held = held_indices(ranks, before, place, tensor, dim);
      parts.insert(parts.end(), held.begin(), held.end());
    }
    const index_ranges there = join(parts);
    const int targets = after[axis].is_shard_of(dim) ? num_ranks : 1;
    for (place[axis] = 0; good && place[axis] < targets; ++place[axis]) {
      good = covers(there, held_indices(ranks, after, place, tensor, dim));
    }
    return good;
  });
  return good;
}

/// What it takes to change the placement of one axis, nothing where one step cannot do it.
inline std::optional<step_cost> cost_of_step(const mesh& ranks, const placements& before, const placements& after,
                                             int axis, const box& tensor) {
  const std::optional<redistribution_kind> kind = kind_of_step(before[axis], after[axis]);
  if (!kind) return std::nullopt;
  for (int i = 0; i < ranks.num_axes; ++i) {  // different reductions do not commute
    if (i != axis && after[i].is_partial() && after[axis].is_partial() && after[i].op != after[axis].op) {
      return std::nullopt;
    }
  }
  std::uint32_t axes = 1U << axis;
  for (int i = 0; i < ranks.num_axes; ++i) axes |= before[i].is_shard() || after[i].is_shard() ? 1U << i : 0U;
  for (int dim = 0; dim < tensor.rank; ++dim) {
    if (!before[axis].is_shard_of(dim) && !after[axis].is_shard_of(dim)) continue;
    if (!dimension_is_there(ranks, before, after, axis, tensor, dim)) return std::nullopt;
  }
  step_cost cost{.kind = *kind};
  const std::int64_t group = ranks.axes[axis].size;
  const auto raise = [](std::int64_t& most, std::int64_t value) { most = most < value ? value : most; };
  for_each_place(ranks, axes, [&](const mesh_coordinates& place) {
    const region old(ranks, before, place, tensor);
    const region now(ranks, after, place, tensor);
    raise(cost.result, now.volume());
    switch (*kind) {
      case redistribution_kind::all_gather:
        raise(cost.received, now.volume() - old.volume());
        raise(cost.send, old.volume());
        raise(cost.receive, old.volume());  // times the ranks, below
        break;
      case redistribution_kind::reduce_scatter:
        raise(cost.received, now.volume() * (group - 1));
        raise(cost.send, now.volume());  // times the ranks, below
        raise(cost.receive, now.volume());
        break;
      case redistribution_kind::all_reduce:
        raise(cost.received, (2 * (group - 1) * now.volume() + group - 1) / group);
        break;
      case redistribution_kind::all_to_all:
        raise(cost.received, now.volume() - region::common(old, now).volume());
        raise(cost.send, old.volume());
        raise(cost.receive, now.volume());
        break;
      case redistribution_kind::slice:
      case redistribution_kind::contribute:
        break;
    }
    return true;
  });
  if (*kind == redistribution_kind::all_gather) cost.receive *= group;
  if (*kind == redistribution_kind::reduce_scatter) cost.send *= group;
  return cost;
}

/// The placements that each axis may have on the way, and the numbering of their combinations.
class redistribution_space {
 public:
  redistribution_space(const mesh& ranks, const placements& from, const placements& to) : axes_(ranks.num_axes) {
    for (int i = 0; i < axes_; ++i) {
      choice& one = choices_[i];
      for (const placement& candidate : {from[i], to[i], placement::replicate()}) {
        bool known = false;
        for (int k = 0; k < one.count; ++k) known = known || one.at[k] == candidate;
        if (!known) one.at[one.count++] = candidate;
      }
      one.weight = size_;
      size_ *= one.count;
    }
  }

  int size() const { return size_; }
  int num_choices(int axis) const { return choices_[axis].count; }

  placements at(int state) const {
    placements result = placements::all(axes_);
    for (int i = 0; i < axes_; ++i) result[i] = choices_[i].at[choice_of(state, i)];
    return result;
  }

  int choice_of(int state, int axis) const { return state / choices_[axis].weight % choices_[axis].count; }

  int with(int state, int axis, int chosen) const {
    return state + (chosen - choice_of(state, axis)) * choices_[axis].weight;
  }

  int find(const placements& list) const {
    int state = 0;
    for (int i = 0; i < axes_; ++i) {
      int chosen = 0;
      while (!(choices_[i].at[chosen] == list[i])) ++chosen;
      state += chosen * choices_[i].weight;
    }
    return state;
  }

 private:
  struct choice {
    placement at[3];
    int count = 0;
    int weight = 1;
  };
  choice choices_[max_mesh_axes];
  int axes_;
  int size_ = 1;
};

/// The buffers of a redistribution.
template <class T>
struct redistribution_buffers {
  T* array[2] = {};  // results of steps in turn
  T* send = nullptr;
  T* receive = nullptr;
};

/// Takes the buffers of a plan from a builder: the same code counts and carves.
template <class T>
redistribution_buffers<T> lay_out(const redistribution_plan& plan, memory_builder& memory,
                                  std::int64_t elements_per_item) {
  redistribution_buffers<T> buffers;
  for (T*& array : buffers.array) array = memory.take<T>("redistribute.array", plan.array_elements * elements_per_item);
  buffers.send = memory.take<T>("redistribute.send", plan.send_elements * elements_per_item);
  buffers.receive = memory.take<T>("redistribute.receive", plan.receive_elements * elements_per_item);
  return buffers;
}

}  // namespace detail

inline redistribution_plan plan_redistribution(const mesh& ranks, const placements& from, const placements& to,
                                               const box& tensor, std::int64_t element_bytes) {
  TESSERA_EXPECTS(element_bytes >= 1,
                  "plan_redistribution: element_bytes = " << element_bytes << ", it must be at least 1");
  expect_placements(ranks, from, tensor.rank);
  expect_placements(ranks, to, tensor.rank);

  placements start = from;
  placements goal = to;
  for (int i = 0; i < ranks.num_axes; ++i) {  // one rank alone holds everything, whatever the placement
    if (ranks.axes[i].size == 1) start[i] = goal[i] = placement::replicate();
  }

  const detail::redistribution_space space(ranks, start, goal);
  struct visited {
    std::int64_t paid = -1;  // by the best way so far; -1: none
    int steps = 0;
    int previous = -1;
    int axis = -1;
    bool done = false;
    detail::step_cost cost;  // of the last step of that way
  };
  std::vector<visited> states(static_cast<std::size_t>(space.size()));
  const auto at = [&](int state) -> visited& { return states[static_cast<std::size_t>(state)]; };
  using entry = std::tuple<std::int64_t, int, int>;  // paid, steps, state: ties go to the lowest number
  std::priority_queue<entry, std::vector<entry>, std::greater<entry>> open;
  const int first = space.find(start);
  const int last = space.find(goal);
  at(first).paid = 0;
  open.push({0, 0, first});
  while (!at(last).done) {
    const int state = std::get<2>(open.top());
    open.pop();
    if (std::exchange(at(state).done, true)) continue;
    const placements before = space.at(state);
    for (int axis = 0; axis < ranks.num_axes; ++axis) {
      for (int chosen = 0; chosen < space.num_choices(axis); ++chosen) {
        const int next = space.with(state, axis, chosen);
        if (next == state || at(next).done) continue;
        const auto cost = detail::cost_of_step(ranks, before, space.at(next), axis, tensor);
        if (!cost) continue;
        const bool starts = cost->kind != redistribution_kind::slice && cost->kind != redistribution_kind::contribute;
        const std::int64_t paid =
            at(state).paid + cost->received * element_bytes + (starts ? redistribution_start_bytes : 0);
        const int steps = at(state).steps + 1;
        visited& there = at(next);
        if (there.paid >= 0 && std::pair(there.paid, there.steps) <= std::pair(paid, steps)) continue;
        there = {paid, steps, state, axis, false, *cost};
        open.push({paid, steps, next});
      }
    }
  }

  redistribution_plan plan{ranks, tensor, from, to, element_bytes, {}};
  for (int state = last; state != first; state = at(state).previous) {
    const visited& step = at(state);
    plan.steps.push_back({step.cost.kind, step.axis, space.at(step.previous)[step.axis], space.at(state)[step.axis],
                          step.cost.received * element_bytes});
    plan.bytes += step.cost.received * element_bytes;
    if (state != last) plan.array_elements = (std::max)(plan.array_elements, step.cost.result);
    plan.send_elements = (std::max)(plan.send_elements, step.cost.send);
    plan.receive_elements = (std::max)(plan.receive_elements, step.cost.receive);
  }
  std::reverse(plan.steps.begin(), plan.steps.end());
  return plan;
}

inline std::size_t redistribute_workspace_bytes(const redistribution_plan& plan) {
  memory_builder memory;
  detail::lay_out<std::byte>(plan, memory, plan.element_bytes);
  return memory.bytes();
}

TESSERA_NAMESPACE_END
