// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of communication.hpp.

#include <algorithm>
#include <utility>
#include <vector>

#include <tessera/pipeline/communication.hpp>
#include <tessera/pipeline/simulator.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline::detail {

/// A message at the moment it is made.
struct message_pair {
  std::int64_t time;
  int from, to;
  action send, receive;
};

/// The messages that the computation `a` of `rank`, which ends at `now`, calls for.
inline void plan_messages(const schedule& s, int rank, const action& a, std::int64_t now,
                          std::vector<message_pair>& plan) {
  const auto add = [&](int stage, int step, int micro_batch, action_kind send, action_kind receive) {
    const int other = stage + step;
    if (other < 0 || other >= s.num_stages) return;
    const place to = s.place_of(other, micro_batch), from = s.place_of(stage, micro_batch);
    if (to.rank == rank) return;
    plan.push_back({now, rank, to.rank, {send, from.chunk, micro_batch}, {receive, to.chunk, micro_batch}});
  };
  if (has_forward(a.kind)) {
    add(s.stage_of(rank, a.chunk), 1, a.micro_batch, action_kind::send_forward, action_kind::receive_forward);
  }
  if (has_backward_input(a.kind)) {
    add(s.stage_of(rank, backward_chunk_of(a)), -1, backward_micro_batch_of(a), action_kind::send_backward,
        action_kind::receive_backward);
  }
}

}  // namespace pipeline::detail

namespace pipeline {

inline schedule computation_only(schedule s) {
  for (auto& list : s.actions) {
    list.erase(std::remove_if(list.begin(), list.end(), [](const action& a) { return is_communication(a.kind); }),
               list.end());
  }
  return s;
}

inline schedule with_communication(schedule s, const costs& c) {
  for (const stage_times& t : c.stages) {
    TESSERA_EXPECTS(t.forward > 0 && t.backward > 0 && t.backward_input > 0 && t.backward_weights > 0,
                    "with_communication: stage times F = " << t.forward << ", B = " << t.backward << ", input part = "
                                                           << t.backward_input << ", W = " << t.backward_weights
                                                           << ": all must be positive");
  }
  s = computation_only(std::move(s));
  const timeline t = simulate(s, c, messages::buffered);
  std::vector<detail::message_pair> plan;
  for (int rank = 0; rank < s.num_ranks; ++rank) {
    const auto r = static_cast<std::size_t>(rank);
    for (std::size_t i = 0; i < s.actions[r].size(); ++i) {
      detail::plan_messages(s, rank, s.actions[r][i], t.intervals[r][i].end, plan);
    }
  }
  std::stable_sort(plan.begin(), plan.end(), [](const auto& a, const auto& b) { return a.time < b.time; });

  std::vector<std::vector<action>> lists(s.actions.size());
  std::vector<std::size_t> next(s.actions.size(), 0);
  // Everything that has begun before `time` stands before what is sent or received at `time`.
  const auto take_computations = [&](int rank, std::int64_t time) {
    const auto r = static_cast<std::size_t>(rank);
    for (; next[r] < s.actions[r].size() && t.intervals[r][next[r]].begin < time; ++next[r]) {
      lists[r].push_back(s.actions[r][next[r]]);
    }
  };
  for (const detail::message_pair& m : plan) {
    take_computations(m.from, m.time);
    take_computations(m.to, m.time);
    lists[static_cast<std::size_t>(m.from)].push_back(m.send);
    lists[static_cast<std::size_t>(m.to)].push_back(m.receive);
  }
  for (int rank = 0; rank < s.num_ranks; ++rank) take_computations(rank, t.makespan + 1);
  s.actions = std::move(lists);
  return s;
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
