// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// When every action of a schedule begins and ends, for given times of its parts.

#include <cstddef>
#include <cstdint>
#include <vector>

#include <tessera/core/config.hpp>
#include <tessera/pipeline/costs.hpp>
#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// How messages hold up the ranks.
enum class messages {
  /// As the papers count: sends and receives never hold up a rank. A computation begins when the rank has finished the
  /// one before it and its own inputs have arrived, a latency after they were made. Communication actions are not
  /// looked at, so a schedule without any can be simulated.
  buffered,
  /// As host communicators do it: a rank that comes to a batch of communication posts all of it and goes on when every
  /// message has arrived; a message leaves when both sides have posted it, and arrives a latency later.
  rendezvous,
};

/// Begin and end of an action, in the unit of the costs.
struct interval {
  std::int64_t begin = 0;  ///< When it begins; the first computation of the schedule begins at 0.
  std::int64_t end = 0;    ///< When it has ended.

  /// The same interval.
  constexpr bool operator==(const interval&) const = default;
};

/// What `simulate` returns.
struct timeline {
  std::vector<std::vector<interval>> intervals;  ///< [rank][action]; buffered messages take no time.
  std::vector<std::int64_t> busy;                ///< [rank], the sum of its computations.
  std::vector<std::int64_t> idle;                ///< [rank], what is left of the step, communication included.
  std::vector<int> live_activations;             ///< [rank], `peak_memory(schedule)[rank].activations`.
  std::int64_t makespan = 0;                     ///< End of the last computation.

  /// Of all ranks, the longest idle time: what the published formulas give.
  std::int64_t max_idle() const {
    std::int64_t most = 0;
    for (const std::int64_t t : idle) most = t > most ? t : most;
    return most;
  }
};

/// Runs a schedule on a clock. Host: returns when done; time proportional to the number of actions times the ranks that
/// a wait passes through.
/// @param s The schedule. It may be one that `validate` has not seen.
/// @param c Times of its parts.
/// @param how How messages hold up the ranks.
/// @throws invalid_argument if the schedule names what does not exist, if the costs do not fit it, or if it stops
/// before its end; the text says which rank waits for what.
timeline simulate(const schedule& s, const costs& c = {}, messages how = messages::buffered);

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/simulator.hpp>
