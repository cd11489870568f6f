// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A pipeline's schedule as data: where each stage lies, and what each rank does in which order.
///
/// A schedule is a plain value, made by a function of sizes (`one_f_one_b`, `zb1p`, `dualpipe`, `dualpipev`, or one of
/// the user's), checked by `validate`, timed by `simulate`, drawn by `timeline_svg` and run by the executor.

#include <ostream>
#include <span>
#include <string>
#include <vector>

#include <tessera/core/config.hpp>
#include <tessera/core/error.hpp>
#include <tessera/pipeline/action.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// Where a stage lies: the rank and which of the rank's stages it is.
struct place {
  int rank = 0;   ///< The rank.
  int chunk = 0;  ///< Which of its stages.

  /// The same place.
  constexpr bool operator==(const place&) const = default;
};

/// The way of a micro-batch through the pipeline: the place of every stage, first to last.
using route = std::vector<place>;

/// What every rank does, in order, to train on one batch.
///
/// Computations of a rank happen in the order of its list, one at a time. A maximal run of communication actions is one
/// batch (see `is_communication`). From one rank to another, the k-th message sent meets the k-th receive. Where two
/// neighbouring stages lie on the same rank, the schedule has no message between them: the output of the one is handed
/// to the other. In schedules of two directions the same stage lies in two places, and every micro-batch uses one.
struct schedule {
  std::string name = {};                          ///< For people.
  int num_ranks = 0;                              ///< P.
  int num_stages = 0;                             ///< Stages that every micro-batch passes.
  int num_micro_batches = 0;                      ///< M; they are numbered from 0.
  int num_chunks = 1;                             ///< Stages that each rank holds.
  std::vector<route> routes = {};                 ///< The ways there are; each has num_stages places.
  std::vector<int> route_of = {};                 ///< [num_micro_batches], which of the ways each micro-batch goes.
  int max_live_activations = 0;                   ///< Bound of every rank's `memory_peak::activations`; 0: none stated.
  std::vector<std::vector<action>> actions = {};  ///< [num_ranks], the lists.

  /// The stage at a place, -1 if there is none. @param rank The rank. @param chunk Which of its stages.
  int stage_of(int rank, int chunk) const {
    for (const route& way : routes) {
      for (int stage = 0; stage < static_cast<int>(way.size()); ++stage) {
        if (way[static_cast<std::size_t>(stage)] == place{rank, chunk}) return stage;
      }
    }
    return -1;
  }

  /// The stage at a place if the micro-batch passes there, else -1. @param rank The rank. @param chunk Which of its
  /// stages. @param micro_batch In `[0, num_micro_batches)`.
  int stage_of(int rank, int chunk, int micro_batch) const {
    const int stage = stage_of(rank, chunk);
    return stage >= 0 && place_of(stage, micro_batch) == place{rank, chunk} ? stage : -1;
  }

  /// Where a micro-batch meets a stage. @param stage In `[0, num_stages)`. @param micro_batch In
  /// `[0, num_micro_batches)`.
  place place_of(int stage, int micro_batch) const {
    return routes[static_cast<std::size_t>(route_of[static_cast<std::size_t>(micro_batch)])]
                 [static_cast<std::size_t>(stage)];
  }

  /// The rank on which a micro-batch meets a stage. @param stage In `[0, num_stages)`. @param micro_batch In
  /// `[0, num_micro_batches)`.
  int rank_of(int stage, int micro_batch) const { return place_of(stage, micro_batch).rank; }

  /// The chunk of that rank. @param stage In `[0, num_stages)`. @param micro_batch In `[0, num_micro_batches)`.
  int chunk_of(int stage, int micro_batch) const { return place_of(stage, micro_batch).chunk; }

  /// The rank on the other side of a send or receive, -1 if there is none: the first stage receives no input, the last
  /// no gradient. @param rank The rank whose action it is. @param a The send or receive.
  int peer_of(int rank, const action& a) const {
    const int step = a.kind == action_kind::send_forward || a.kind == action_kind::receive_backward ? 1 : -1;
    const int stage = stage_of(rank, a.chunk, a.micro_batch);
    const int other = stage + step;
    return stage < 0 || other < 0 || other >= num_stages ? -1 : rank_of(other, a.micro_batch);
  }

  /// The same lists for the same pipeline.
  bool operator==(const schedule&) const = default;
};

/// End of the batch of communication that begins at `begin`: the first position whose action computes, or the end of
/// the list. @param actions The list of one rank. @param begin Position in it.
inline std::size_t batch_end(std::span<const action> actions, std::size_t begin) {
  while (begin < actions.size() && is_communication(actions[begin].kind)) ++begin;
  return begin;
}

/// What `to_string(schedule)` shows.
enum class detail_level {
  computation,  ///< Only what is computed.
  everything,   ///< Also batches of communication, in square brackets.
};

/// The schedule as text: its sizes, then one line per rank. See `to_string(action)` for the words.
/// @param s The schedule. @param level What to show.
inline std::string to_string(const schedule& s, detail_level level = detail_level::everything) {
  std::string text = s.name + ": " + std::to_string(s.num_ranks) + " ranks, " + std::to_string(s.num_stages) +
                     " stages, " + std::to_string(s.num_micro_batches) + " micro-batches\n";
  for (std::size_t rank = 0; rank < s.actions.size(); ++rank) {
    text += "rank " + std::to_string(rank) + ":";
    bool open = false;
    for (const action& a : s.actions[rank]) {
      const bool talks = is_communication(a.kind);
      if (talks && level == detail_level::computation) continue;
      text += talks == open ? (" ") : (talks ? " [" : "] ");
      open = talks;
      text += to_string(a);
    }
    text += open ? "]\n" : "\n";
  }
  return text;
}

/// Writes the schedule as text. @param out Where to. @param s The schedule.
inline std::ostream& operator<<(std::ostream& out, const schedule& s) { return out << to_string(s); }

/// Routes of a pipeline in which rank r holds stage r: one way, from rank 0 to the last.
/// @param num_ranks P, at least 1.
inline std::vector<route> straight_routes(int num_ranks) {
  route way;
  for (int rank = 0; rank < num_ranks; ++rank) way.push_back({rank, 0});
  return {way};
}

/// Routes of DualPipe: rank r holds stage r as chunk 0 and stage P-1-r as chunk 1; way 0 goes from rank 0 to the last
/// through the chunks 0, way 1 from the last rank to rank 0 through the chunks 1. Rank 0 and the last rank each hold
/// the first and the last stage. @param num_ranks P, at least 1.
inline std::vector<route> mirrored_routes(int num_ranks) {
  std::vector<route> ways = {{}, {}};
  for (int stage = 0; stage < num_ranks; ++stage) {
    ways[0].push_back({stage, 0});
    ways[1].push_back({num_ranks - 1 - stage, 1});
  }
  return ways;
}

/// Routes of DualPipeV: 2P stages, rank r holds stage r as chunk 0 and stage 2P-1-r as chunk 1; one way, down the ranks
/// and up again. Rank 0 holds the first and the last stage. @param num_ranks P, at least 1.
inline std::vector<route> v_routes(int num_ranks) {
  route way;
  for (int rank = 0; rank < num_ranks; ++rank) way.push_back({rank, 0});
  for (int rank = num_ranks - 1; rank >= 0; --rank) way.push_back({rank, 1});
  return {way};
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
