// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What one rank does for a schedule, step by step, with the buffer that every activation lies in: a pure function, so
/// that memory is known before anything runs.

#include <cstddef>
#include <vector>

#include <tessera/core/error.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/pipeline/gradient_order.hpp>
#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// A micro-batch at a chunk, with its buffers: numbers in `[0, execution_plan::num_buffers)`, -1 for none.
struct planned_work {
  int chunk = 0;                           ///< Which of the rank's stages.
  int stage = 0;                           ///< The stage.
  int micro_batch = 0;                     ///< The micro-batch.
  int slot = 0;                            ///< `work_item::slot`.
  int x = -1;                              ///< Buffer of the input.
  int y = -1;                              ///< Buffer of the output; forward only.
  int dy = -1;                             ///< Buffer of the output's gradient; backward only.
  int dx = -1;                             ///< Buffer of the input's gradient; input part of the backward only.
  int gradient_row = 0;                    ///< `work_item::gradient_row`.
  write gradient_mode = write::overwrite;  ///< `work_item::gradient_mode`.
};

/// A message of a batch.
struct planned_message {
  int peer = 0;         ///< Rank of the other side.
  int buffer = 0;       ///< Where it lies.
  int micro_batch = 0;  ///< Whose activations: tells the size.
};

/// One step of a rank.
struct planned_step {
  /// What happens.
  enum class kinds {
    forward,           ///< `forward`.
    backward_input,    ///< `backward`, the input part.
    backward_weights,  ///< `backward`, the weight part.
    overlapped,        ///< `forward` and both parts of `backward`, interleaved.
    exchange,          ///< A batch of messages.
  };

  kinds kind = kinds::exchange;   ///< What happens.
  planned_work forward = {};      ///< Of a forward.
  planned_work backward = {};     ///< Of a backward or a part of it.
  std::size_t first_send = 0;     ///< First of the batch in `execution_plan::sends`.
  std::size_t num_sends = 0;      ///< Messages it sends.
  std::size_t first_receive = 0;  ///< First of the batch in `execution_plan::receives`.
  std::size_t num_receives = 0;   ///< Messages it receives.
};

/// All steps of one rank, and what they need.
struct execution_plan {
  int rank = 0;                           ///< The rank.
  std::vector<planned_step> steps;        ///< In order.
  std::vector<planned_message> sends;     ///< Of all batches.
  std::vector<planned_message> receives;  ///< Of all batches.
  std::size_t max_sends = 0;              ///< Most messages that one batch sends.
  std::size_t max_receives = 0;           ///< Most messages that one batch receives.
  /// Activations and their gradients, `[rows, width]` each, that are alive at the same time at most: inputs and output
  /// gradients until the weight part of the backward, outputs and input gradients until they are sent.
  int num_buffers = 0;
  std::vector<int> saved_slots;    ///< `[num_chunks]`: most micro-batches between forward and weight part.
  std::vector<int> gradient_rows;  ///< `[num_chunks]`: rows of gradients that the stage needs.
  std::vector<int> most_deferred;  ///< `[num_chunks]`: most weight parts put off at the same time.
};

/// Micro-batches that pass a place, ascending. @param s The schedule. @param rank The rank. @param chunk Which of its
/// stages.
inline std::vector<int> micro_batches_at(const schedule& s, int rank, int chunk) {
  std::vector<int> result;
  const int stage = s.stage_of(rank, chunk);
  for (int m = 0; stage >= 0 && m < s.num_micro_batches; ++m) {
    if (s.place_of(stage, m) == place{rank, chunk}) result.push_back(m);
  }
  return result;
}

/// The row of a place's gradients that a micro-batch contributes to, with `gradient_order::micro_batch`. Contributions
/// are added where they arise as long as no other place comes between them from micro-batch 0 on; from then on each has
/// a row of its own, to be added in order by `sum_mirrored_gradients`. A stage that lies in one place has one row; a
/// stage of DualPipe has one row where micro-batch 0 passes first, and about half as many as there are micro-batches in
/// the other place.
/// @param s           The schedule.
/// @param at          A place.
/// @param micro_batch One that passes there.
inline int gradient_row_of(const schedule& s, place at, int micro_batch) {
  const int stage = s.stage_of(at.rank, at.chunk);
  int leading = 0;  // micro-batches from 0 on that meet the stage where micro-batch 0 does
  while (leading < s.num_micro_batches && s.place_of(stage, leading) == s.place_of(stage, 0)) ++leading;
  const bool leads = s.place_of(stage, 0) == at;
  if (leads && micro_batch < leading) return 0;
  int row = leads ? 1 : 0;
  for (int m = leading; m < micro_batch; ++m) row += s.place_of(stage, m) == at ? 1 : 0;
  return row;
}

/// Rows of a place's gradients, 1 with `gradient_order::schedule`.
/// @param s The schedule. @param at A place. @param order Order of addition.
inline int gradient_rows_of(const schedule& s, place at, gradient_order order) {
  const std::vector<int> passing = micro_batches_at(s, at.rank, at.chunk);
  if (order == gradient_order::schedule || passing.empty()) return 1;
  return gradient_row_of(s, at, passing.back()) + 1;
}

/// Lays out the steps of a rank: pure, the same on every call.
/// @param s     A schedule that `validate` accepts.
/// @param rank  In `[0, s.num_ranks)`.
/// @param order Order in which weight gradients are added. Where a user's schedule asks for the whole backward of an
///              overlapped pair before its turn, the pair is run one after the other.
/// @throws invalid_argument if the rank's list cannot be run, naming the action.
execution_plan plan_execution(const schedule& s, int rank, gradient_order order = gradient_order::micro_batch);

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/execution_plan.hpp>
