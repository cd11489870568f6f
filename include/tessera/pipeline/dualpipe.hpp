// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The schedule DualPipe: micro-batches enter at both ends, and forwards are overlapped with backwards.

#include <algorithm>
#include <cstdint>
#include <utility>

#include <tessera/pipeline/communication.hpp>
#include <tessera/pipeline/detail/dualpipe_steps.hpp>
#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1 and figure 5): rank r holds stage r (chunk 0) and stage
/// `P-1-r` (chunk 1). Micro-batches `[0, M/2)` go from rank 0 to the last through the chunks 0, micro-batches `[M/2,
/// M)` the other way through the chunks 1. Both ends hold first and last stage. Every stage's parameters lie on two
/// ranks, r and `P-1-r`, whose gradients must be summed. Host: returns when done.
/// @param num_ranks         P, even; also the number of stages.
/// @param num_micro_batches M, even, at least 2P.
/// @throws invalid_argument for other sizes.
inline schedule dualpipe(int num_ranks, int num_micro_batches) {
  TESSERA_EXPECTS(
      num_ranks >= 2 && num_ranks % 2 == 0,
      "DualPipe: num_ranks = " << num_ranks << "; right is an even number, so that the two directions meet");
  TESSERA_EXPECTS(
      num_micro_batches % 2 == 0 && num_micro_batches >= 2 * num_ranks,
      "DualPipe: num_micro_batches = " << num_micro_batches << " on " << num_ranks
                                       << " ranks; right is an even number (half of them go each way) of at "
                                          "least 2 * num_ranks = "
                                       << 2 * num_ranks);
  const int half = num_micro_batches / 2;
  schedule s{.name = "DualPipe",
             .num_ranks = num_ranks,
             .num_stages = num_ranks,
             .num_micro_batches = num_micro_batches,
             .num_chunks = 2,
             .routes = mirrored_routes(num_ranks),
             .route_of = std::vector<int>(static_cast<std::size_t>(num_micro_batches), 0),
             .max_live_activations = num_ranks + 1};
  std::fill(s.route_of.begin() + half, s.route_of.end(), 1);
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int position = std::min(rank, num_ranks - 1 - rank), near_chunk = rank < num_ranks / 2 ? 0 : 1;
    detail::dualpipe_writer writer({near_chunk, near_chunk * half}, {1 - near_chunk, (1 - near_chunk) * half});
    s.actions.push_back(writer.write(position, num_ranks / 2, half));
  }
  return with_communication(std::move(s));
}

/// The published longest idle time of a rank with DualPipe, `(P/2 - 1)(F&B + B - 3W)`. It is exact if all stages take
/// the same times, messages none, the input part as long as F, and W no longer than that. Other ranks may idle less.
/// @param num_ranks P. @param t Times of a stage.
inline std::int64_t dualpipe_idle(int num_ranks, const stage_times& t) {
  return (num_ranks / 2 - 1) * (t.overlapped + t.backward - 3 * t.backward_weights);
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
