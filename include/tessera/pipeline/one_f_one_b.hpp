// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The schedule 1F1B: one forward, one backward in turn.

#include <algorithm>
#include <cstdint>
#include <utility>

#include <tessera/pipeline/communication.hpp>
#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// 1F1B (Narayanan et al., "PipeDream-Flush", arXiv 2006.09503): rank r holds stage r, begins with `P - 1 - r`
/// forwards, then does a forward and a backward in turn, then the backwards that are left. Host: returns when done.
/// @param num_ranks         P, at least 1; also the number of stages.
/// @param num_micro_batches M, at least 1.
/// @throws invalid_argument for other sizes.
inline schedule one_f_one_b(int num_ranks, int num_micro_batches) {
  TESSERA_EXPECTS(num_ranks >= 1, "1F1B: num_ranks = " << num_ranks << "; right is at least 1");
  TESSERA_EXPECTS(num_micro_batches >= 1, "1F1B: num_micro_batches = " << num_micro_batches << "; right is at least 1");
  schedule s{.name = "1F1B",
             .num_ranks = num_ranks,
             .num_stages = num_ranks,
             .num_micro_batches = num_micro_batches,
             .num_chunks = 1,
             .routes = straight_routes(num_ranks),
             .route_of = std::vector<int>(static_cast<std::size_t>(num_micro_batches), 0),
             .max_live_activations = std::min(num_ranks, num_micro_batches)};
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int ahead = std::min(num_ranks - 1 - rank, num_micro_batches);
    std::vector<action> list;
    for (int m = 0; m < ahead; ++m) list.push_back({action_kind::forward, 0, m});
    for (int m = ahead; m < num_micro_batches; ++m) {
      list.push_back({action_kind::forward, 0, m});
      list.push_back({action_kind::backward, 0, m - ahead});
    }
    for (int m = num_micro_batches - ahead; m < num_micro_batches; ++m) list.push_back({action_kind::backward, 0, m});
    s.actions.push_back(std::move(list));
  }
  return with_communication(std::move(s));
}

/// Idle time of every rank with 1F1B, `(P - 1)(F + B)`, if all stages take the same times and messages none.
/// @param num_ranks P. @param t Times of a stage.
inline std::int64_t one_f_one_b_idle(int num_ranks, const stage_times& t) {
  return (num_ranks - 1) * (t.forward + t.backward);
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
