// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The gradient of a stage whose parameters lie in two places, as in DualPipe: one sum, in the order of micro-batches.

#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/pipeline/execution_plan.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// The gradients of one of a rank's stages.
template <accumulate_type G>
struct stage_gradients {
  G* data = nullptr;       ///< `[gradient_rows, count]`, packed, as `backward_weights` left them.
  std::int64_t count = 0;  ///< Parameters of the stage; the same in all places of the stage.
};

/// Bytes of workspace for `sum_mirrored_gradients` on any rank.
/// @param s              The schedule. @param order As for the executor.
/// @param block_elements As for `sum_mirrored_gradients`.
template <accumulate_type G>
std::size_t sum_mirrored_gradients_workspace_bytes(const schedule& s, gradient_order order,
                                                   std::int64_t block_elements = 65536);

/// Adds up the gradients of stages that lie in several places; in each of them row 0 holds the sum over all
/// micro-batches afterwards, the same bits everywhere. With `gradient_order::micro_batch` it is
/// `((g0 + g1) + g2) + ...`, bitwise what a serial run gives; with `gradient_order::schedule` the places' sums are
/// added in the order of the schedule's routes. A stage that lies in one place is left as it is: for such schedules
/// nothing happens.
///
/// Collective over the pipeline's ranks; call it once after `executor::run`. Host: returns when done. Device: enqueues;
/// defined in `mirrored_gradients.cuh`; the bits are the same. Each place sends and receives about as many elements as
/// its gradient rows hold.
/// @param stream         Order of the work.
/// @param comm           The pipeline's ranks.
/// @param s              The schedule.
/// @param order          As for the executor.
/// @param gradients      `[num_chunks]`, of this rank's stages.
/// @param workspace      `sum_mirrored_gradients_workspace_bytes` bytes in the communicator's space.
/// @param block_elements Parameters summed at a time, at least 1; the same on all ranks. It bounds the workspace and
///                       does not change the bits.
/// @throws invalid_argument for wrong arguments, comm_error if another rank does not do its part.
template <communicator Comm, accumulate_type G>
void sum_mirrored_gradients(stream_ref<typename Comm::space> stream, Comm& comm, const schedule& s,
                            gradient_order order, std::span<const stage_gradients<G>> gradients,
                            workspace_memory workspace, std::int64_t block_elements = 65536);

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/mirrored_gradients.hpp>
