// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The check that every index in a schedule means something, before anything is looked up by it.

#include <cstddef>
#include <vector>

#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline::detail {

/// Where an action stands, for messages.
inline std::string at(int rank, std::size_t position, const action& a) {
  return "rank " + std::to_string(rank) + ", action " + std::to_string(position) + " (" + to_string(a) + ")";
}

inline void expect_routes(const schedule& s) {
  TESSERA_EXPECTS(s.num_ranks >= 1 && s.num_stages >= 1 && s.num_micro_batches >= 1 && s.num_chunks >= 1,
                  "schedule '" << s.name << "': num_ranks = " << s.num_ranks << ", num_stages = " << s.num_stages
                               << ", num_micro_batches = " << s.num_micro_batches << ", num_chunks = " << s.num_chunks
                               << ": all must be at least 1");
  TESSERA_EXPECTS(
      s.actions.size() == static_cast<std::size_t>(s.num_ranks),
      "schedule '" << s.name << "': " << s.actions.size() << " lists of actions for " << s.num_ranks << " ranks");
  TESSERA_EXPECTS(s.route_of.size() == static_cast<std::size_t>(s.num_micro_batches),
                  "schedule '" << s.name << "': route_of has " << s.route_of.size() << " entries for "
                               << s.num_micro_batches << " micro-batches");
  std::vector<int> held(static_cast<std::size_t>(s.num_ranks) * static_cast<std::size_t>(s.num_chunks), -1);
  for (std::size_t i = 0; i < s.routes.size(); ++i) {
    TESSERA_EXPECTS(s.routes[i].size() == static_cast<std::size_t>(s.num_stages),
                    "schedule '" << s.name << "': route " << i << " has " << s.routes[i].size() << " places for "
                                 << s.num_stages << " stages");
    for (int stage = 0; stage < s.num_stages; ++stage) {
      const place p = s.routes[i][static_cast<std::size_t>(stage)];
      TESSERA_EXPECTS(p.rank >= 0 && p.rank < s.num_ranks && p.chunk >= 0 && p.chunk < s.num_chunks,
                      "schedule '" << s.name << "': route " << i << " puts stage " << stage << " on rank " << p.rank
                                   << " as chunk " << p.chunk << "; there are " << s.num_ranks << " ranks of "
                                   << s.num_chunks << " chunks");
      int& holds = held[static_cast<std::size_t>(p.rank * s.num_chunks + p.chunk)];
      TESSERA_EXPECTS(holds == -1 || holds == stage, "schedule '" << s.name << "': chunk " << p.chunk << " of rank "
                                                                  << p.rank << " is stage " << holds << " and stage "
                                                                  << stage << "; it can hold one stage");
      holds = stage;
    }
  }
  for (const int way : s.route_of) {
    TESSERA_EXPECTS(way >= 0 && way < static_cast<int>(s.routes.size()),
                    "schedule '" << s.name << "': route_of names route " << way << " of " << s.routes.size());
  }
}

inline void expect_action(const schedule& s, int rank, std::size_t position, const action& a) {
  const auto expect_stage = [&](int chunk, int micro_batch) {
    TESSERA_EXPECTS(micro_batch >= 0 && micro_batch < s.num_micro_batches,
                    "schedule '" << s.name << "': " << at(rank, position, a) << " names micro-batch " << micro_batch
                                 << " of " << s.num_micro_batches);
    TESSERA_EXPECTS(s.stage_of(rank, chunk, micro_batch) >= 0,
                    "schedule '" << s.name << "': " << at(rank, position, a) << ": micro-batch " << micro_batch
                                 << " does not pass chunk " << chunk << " of this rank");
  };
  TESSERA_EXPECTS(a.kind <= action_kind::receive_backward,
                  "schedule '" << s.name << "': rank " << rank << ", action " << position << " is of no known kind");
  expect_stage(a.chunk, a.micro_batch);
  if (a.kind == action_kind::overlapped) expect_stage(a.backward_chunk, a.backward_micro_batch);
  if (is_communication(a.kind)) {
    const int peer = s.peer_of(rank, a);
    TESSERA_EXPECTS(peer >= 0, "schedule '" << s.name << "': " << at(rank, position, a)
                                            << " has no other side: the stage is the first or the last");
    TESSERA_EXPECTS(peer != rank, "schedule '" << s.name << "': " << at(rank, position, a)
                                               << " is between stages of one rank, which need no message");
  }
}

/// Throws unless routes and actions name stages, ranks and micro-batches that exist.
inline void expect_well_formed(const schedule& s) {
  expect_routes(s);
  for (int rank = 0; rank < s.num_ranks; ++rank) {
    const auto& list = s.actions[static_cast<std::size_t>(rank)];
    for (std::size_t i = 0; i < list.size(); ++i) expect_action(s, rank, i, list[i]);
  }
}

}  // namespace pipeline::detail

TESSERA_NAMESPACE_END
