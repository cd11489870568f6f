// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What the actions of a pipeline cost: the times that the simulator works with.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <tessera/core/config.hpp>
#include <tessera/core/error.hpp>
#include <tessera/pipeline/action.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// Times of one stage for one micro-batch, as integers in any unit (nanoseconds, say), so that sums are exact. The
/// defaults are those of the papers' figures: a backward is twice a forward, and its halves are equal.
struct stage_times {
  std::int64_t forward = 1;           ///< F.
  std::int64_t backward = 2;          ///< B, the whole of it.
  std::int64_t backward_input = 1;    ///< The input part alone.
  std::int64_t backward_weights = 1;  ///< W, the weight part alone.
  std::int64_t overlapped = 3;        ///< F&B: a forward and a whole backward of this stage, interleaved.

  /// The same times.
  constexpr bool operator==(const stage_times&) const = default;
};

/// Times of a whole pipeline.
struct costs {
  std::vector<stage_times> stages = {stage_times{}};  ///< [num_stages], or one that holds for all.
  std::int64_t latency = 0;  ///< From one rank to another, per message; handing over on one rank is free.
  /// [num_stages - 1], between stages s and s+1; if not empty, instead of latency.
  std::vector<std::int64_t> links = {};

  /// Times of a stage. @param stage In `[0, num_stages)`.
  const stage_times& of(int stage) const { return stages.size() == 1 ? stages[0] : stages[std::size_t(stage)]; }

  /// Latency between a stage and the next. @param stage The earlier one.
  std::int64_t link(int stage) const { return links.empty() ? latency : links[std::size_t(stage)]; }

  /// Time of the forward of one stage interleaved with the backward of another: the sum of both, less what the overlap
  /// hides of a pair of equal stages, the smaller of the two stages' savings. For equal stages this is `overlapped`.
  /// @param forward_stage Stage of the forward. @param backward_stage Stage of the backward.
  std::int64_t overlapped(int forward_stage, int backward_stage) const {
    const stage_times &f = of(forward_stage), &b = of(backward_stage);
    return f.forward + b.backward -
           std::min(f.forward + f.backward - f.overlapped, b.forward + b.backward - b.overlapped);
  }
};

/// Throws unless the times fit a pipeline. Host: returns when done.
/// @param c The times. @param num_stages Stages of the pipeline.
/// @throws invalid_argument if there are neither times for one stage nor for all, not as many links as gaps between
/// stages, if a time is negative, or an overlapped pair shorter than one of its halves.
inline void expect_costs(const costs& c, int num_stages) {
  TESSERA_EXPECTS(c.stages.size() == 1 || c.stages.size() == static_cast<std::size_t>(num_stages),
                  "costs.stages has " << c.stages.size() << " entries; right is 1 (for all stages) or " << num_stages
                                      << " (one for each)");
  TESSERA_EXPECTS(c.links.empty() || c.links.size() + 1 == static_cast<std::size_t>(num_stages),
                  "costs.links has " << c.links.size() << " entries; right is none (costs.latency holds for all) or "
                                     << num_stages - 1 << ", one between each stage and the next");
  TESSERA_EXPECTS(c.latency >= 0, "costs.latency = " << c.latency << " is negative");
  for (const std::int64_t link : c.links)
    TESSERA_EXPECTS(link >= 0, "costs.links holds " << link << ", a negative time");
  for (const stage_times& t : c.stages) {
    TESSERA_EXPECTS(t.forward >= 0 && t.backward >= 0 && t.backward_input >= 0 && t.backward_weights >= 0,
                    "stage times F = " << t.forward << ", B = " << t.backward << ", input part = " << t.backward_input
                                       << ", W = " << t.backward_weights << ": none may be negative");
    TESSERA_EXPECTS(t.overlapped >= std::max(t.forward, t.backward),
                    "an overlapped pair takes F&B = " << t.overlapped << "; right is at least the longer of F = "
                                                      << t.forward << " and B = " << t.backward);
  }
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
