// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The schedule ZB1P: 1F1B whose weight gradients fill the gaps.

#include <algorithm>
#include <cstdint>
#include <utility>

#include <tessera/pipeline/communication.hpp>
#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// ZB1P, the schedule ZB-H1 of Qi et al., "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241): as 1F1B, but every
/// backward is split. Rank r lets the weight part stay r micro-batches behind the input part, so that all ranks keep as
/// much as rank 0 does, and does the parts that are left while it would wait at the end. Host: returns when done.
/// @param num_ranks         P, at least 1; also the number of stages.
/// @param num_micro_batches M, at least 1.
/// @throws invalid_argument for other sizes.
inline schedule zb1p(int num_ranks, int num_micro_batches) {
  TESSERA_EXPECTS(num_ranks >= 1, "ZB1P: num_ranks = " << num_ranks << "; right is at least 1");
  TESSERA_EXPECTS(num_micro_batches >= 1, "ZB1P: num_micro_batches = " << num_micro_batches << "; right is at least 1");
  schedule s{.name = "ZB1P",
             .num_ranks = num_ranks,
             .num_stages = num_ranks,
             .num_micro_batches = num_micro_batches,
             .num_chunks = 1,
             .routes = straight_routes(num_ranks),
             .route_of = std::vector<int>(static_cast<std::size_t>(num_micro_batches), 0),
             .max_live_activations = std::min(num_ranks, num_micro_batches)};
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int ahead = std::min(num_ranks - 1 - rank, num_micro_batches);
    int inputs = 0, weights = 0;
    std::vector<action> list;
    const auto backward = [&] {
      list.push_back({action_kind::backward_input, 0, inputs++});
      if (inputs - weights > rank) list.push_back({action_kind::backward_weights, 0, weights++});
    };
    for (int m = 0; m < ahead; ++m) list.push_back({action_kind::forward, 0, m});
    for (int m = ahead; m < num_micro_batches; ++m) {
      list.push_back({action_kind::forward, 0, m});
      backward();
    }
    while (inputs < num_micro_batches) backward();
    while (weights < num_micro_batches) list.push_back({action_kind::backward_weights, 0, weights++});
    s.actions.push_back(std::move(list));
  }
  return with_communication(std::move(s));
}

/// The published longest idle time of a rank with ZB1P, `(P - 1)(F + B - 2W)`. It is exact if all stages take the same
/// times, messages none, and W is no longer than F and than the input part: a weight part must fit where it fills a
/// gap.
/// @param num_ranks P. @param t Times of a stage.
inline std::int64_t zb1p_idle(int num_ranks, const stage_times& t) {
  return (num_ranks - 1) * (t.forward + t.backward - 2 * t.backward_weights);
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
