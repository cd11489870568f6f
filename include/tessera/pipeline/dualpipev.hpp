// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The schedule DualPipeV: DualPipe folded in the middle, without a second copy of the parameters.

#include <cstdint>
#include <utility>

#include <tessera/pipeline/communication.hpp>
#include <tessera/pipeline/detail/dualpipe_steps.hpp>
#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// DualPipeV (Sea AI Lab's "cut in half" of DualPipe, in DeepSeek's public DualPipe repository): 2P stages on P ranks,
/// rank r holds stage r (chunk 0) and stage `2P-1-r` (chunk 1). Every micro-batch goes down the ranks and up again; the
/// last rank hands over to itself. Rank 0 holds first and last stage. Host: returns when done.
/// @param num_ranks         P, at least 1; half of the number of stages.
/// @param num_micro_batches M, at least 2P.
/// @throws invalid_argument for other sizes.
inline schedule dualpipev(int num_ranks, int num_micro_batches) {
  TESSERA_EXPECTS(num_ranks >= 1, "DualPipeV: num_ranks = " << num_ranks << "; right is at least 1");
  TESSERA_EXPECTS(num_micro_batches >= 2 * num_ranks,
                  "DualPipeV: num_micro_batches = " << num_micro_batches << " on " << num_ranks
                                                    << " ranks; right is at least 2 * num_ranks = " << 2 * num_ranks);
  schedule s{.name = "DualPipeV",
             .num_ranks = num_ranks,
             .num_stages = 2 * num_ranks,
             .num_micro_batches = num_micro_batches,
             .num_chunks = 2,
             .routes = v_routes(num_ranks),
             .route_of = std::vector<int>(static_cast<std::size_t>(num_micro_batches), 0),
             .max_live_activations = 2 * num_ranks + 1};
  for (int rank = 0; rank < num_ranks; ++rank) {
    detail::dualpipe_writer writer({0, 0}, {1, 0});
    s.actions.push_back(writer.write(rank, num_ranks, num_micro_batches));
  }
  return with_communication(std::move(s));
}

/// The published longest idle time of a rank with DualPipeV: DualPipe's, whose P counts stages, so `(P - 1)(F&B + B -
/// 3W)` on P ranks. It is exact where DualPipe's is. @param num_ranks P. @param t Times of a stage.
inline std::int64_t dualpipev_idle(int num_ranks, const stage_times& t) {
  return (num_ranks - 1) * (t.overlapped + t.backward - 3 * t.backward_weights);
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
