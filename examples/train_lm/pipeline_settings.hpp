// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a pipelined run, or one with multi-token prediction, may be told, and which ranks it takes.

#include <cstdint>

#include <tessera/core/error.hpp>
#include <tessera/mtp/loss.hpp>
#include <tessera/mtp/speculative.hpp>
#include <tessera/pipeline/schedules.hpp>

#include "settings.hpp"

namespace train_lm {

/// Whether the pipelined trainer does the run. It also does runs without a pipeline that split the batch into
/// micro-batches of their own, or that predict more bytes than one: as a pipeline of one stage.
inline bool is_pipelined(const settings& s) { return !s.pipeline.empty() || s.micro_batches > 0 || s.mtp > 0; }

/// Micro-batches of a step. By default they are the chunks in which a run without a pipeline sums its gradients.
inline int micro_batches_of(const settings& s) {
  return s.micro_batches > 0 ? s.micro_batches : static_cast<int>(num_chunks);
}

/// The schedule of a run. @throws tessera::error with the rule if the schedule does not have these sizes.
inline ts::pipeline::schedule schedule_of(const settings& s) {
  if (s.pipeline.empty()) return ts::pipeline::one_f_one_b(1, micro_batches_of(s));
  return ts::pipeline::named_schedule(s.pipeline, s.stages, micro_batches_of(s));
}

/// How the weight of the additional losses changes: the first value for two thirds of the run, as long as
/// DeepSeek-V3's, then the second.
inline ts::mtp::lambda_schedule lambda_of(const settings& s) {
  const std::int64_t tokens = s.steps * s.batch * s.length;
  return {.before = s.mtp_weights.front(), .after = s.mtp_weights.back(), .switch_tokens = tokens * 2 / 3};
}

/// Checks a pipelined run, and gives it the schedule's ranks if it was told none.
/// @throws tessera::error with the values and what would be right.
inline void prepare_pipeline(settings& s) {
  if (!is_pipelined(s)) {
    TESSERA_EXPECTS(s.stages == 1, "--stages " << s.stages << " needs --pipeline SCHEDULE");
    return;
  }
  TESSERA_EXPECTS(s.stages >= 1 && s.stages <= s.layers, "--stages is "
                                                             << s.stages << ", it must be between 1 and --layers "
                                                             << s.layers << ": a stage has at least one layer");
  TESSERA_EXPECTS(!s.pipeline.empty() || s.stages == 1, "--stages " << s.stages << " needs --pipeline SCHEDULE");
  TESSERA_EXPECTS(s.micro_batches >= 0, "--micro-batches is " << s.micro_batches << ", it must not be negative");
  const int columns = schedule_of(s).num_ranks, micro_batches = micro_batches_of(s);
  if (s.ranks == 0) s.ranks = columns;
  TESSERA_EXPECTS(s.ranks >= columns && s.ranks % columns == 0,
                  "--ranks is " << s.ranks << ", it must be a multiple of the " << columns
                                << " ranks of the pipeline: its stages are spread over them, and ranks of one place "
                                   "divide experts and sequences");
  const int group = s.ranks / columns;
  TESSERA_EXPECTS(s.batch % micro_batches == 0 && s.batch / micro_batches % group == 0,
                  "--batch " << s.batch << " in " << micro_batches << " micro-batches on " << group
                             << " ranks for each place of the pipeline: --batch must be a multiple of "
                             << micro_batches * group << ", so that each of them has whole sequences");
  TESSERA_EXPECTS(s.experts >= group, "--experts " << s.experts << " cannot be divided among " << group
                                                   << " ranks for each place of the pipeline");
  TESSERA_EXPECTS(s.mesh.empty(), "--mesh " << s.mesh
                                            << " and a pipeline do not go together here: a pipelined run's mesh is "
                                               "pp = the ranks of the schedule, ep = --ranks / pp");
  TESSERA_EXPECTS(s.checkpoint.empty() && !s.resume,
                  "--checkpoint and --resume are for runs without --pipeline, --micro-batches and --mtp");
  TESSERA_EXPECTS(s.combine == combine_kind::ordered,
                  "--combine reduced: a pipelined run, or one with --mtp, always sums in order; leave --combine out");
  TESSERA_EXPECTS(s.mtp >= 0 && s.mtp <= ts::mtp::max_draft_depth && s.mtp < s.length,
                  "--mtp is " << s.mtp << ", it must be between 0 and " << ts::mtp::max_draft_depth
                              << ", and less than --seq-len " << s.length);
  TESSERA_EXPECTS(s.mtp_weights.size() == 1 || s.mtp_weights.size() == 2,
                  "--mtp-weight takes one weight, or one for the first two thirds of the run and one for the rest");
  for (const double weight : s.mtp_weights)
    TESSERA_EXPECTS(weight >= 0, "--mtp-weight is " << weight << ", it must not be negative");
}

}  // namespace train_lm
