// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of validate.hpp.

#include <cstddef>
#include <string>
#include <vector>

#include <tessera/pipeline/detail/well_formed.hpp>
#include <tessera/pipeline/memory.hpp>
#include <tessera/pipeline/simulator.hpp>
#include <tessera/pipeline/validate.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline::detail {

/// What has been done for one micro-batch at one stage.
struct stage_progress {
  bool input = false;           ///< Received, or handed over.
  bool forward = false;         ///< Computed.
  bool output_sent = false;     ///< The output has left.
  bool gradient = false;        ///< Of the output: received, or handed over.
  bool input_gradient = false;  ///< Computed.
  bool gradient_sent = false;   ///< The input's gradient has left.
  bool split = false;           ///< The backward is done in parts.
  bool weights = false;         ///< The gradients of the weights are complete.
};

/// Walks each rank's list and keeps account.
class accountant {
 public:
  explicit accountant(const schedule& s)
      : s_(s), progress_(static_cast<std::size_t>(s.num_stages) * static_cast<std::size_t>(s.num_micro_batches)) {}

  void check() {
    for (int rank = 0; rank < s_.num_ranks; ++rank) {
      const auto& list = s_.actions[static_cast<std::size_t>(rank)];
      for (std::size_t i = 0; i < list.size(); ++i) {
        rank_ = rank;
        position_ = i;
        action_ = &list[i];
        take(list[i]);
      }
    }
    expect_complete();
  }

 private:
  stage_progress& of(int stage, int micro_batch) {
    return progress_[static_cast<std::size_t>(stage) * static_cast<std::size_t>(s_.num_micro_batches) +
                     static_cast<std::size_t>(micro_batch)];
  }

  void expect(bool holds, const char* problem) const {
    TESSERA_EXPECTS(holds, "schedule '" << s_.name << "': " << at(rank_, position_, *action_) << " " << problem);
  }
  void once(bool& done, const char* problem) const {
    expect(!done, problem);
    done = true;
  }

  void take(const action& a) {
    const int stage = s_.stage_of(rank_, a.chunk);
    stage_progress& p = of(stage, a.micro_batch);
    switch (a.kind) {
      case action_kind::send_forward:
        expect(p.forward, "sends an output that has not been computed");
        return once(p.output_sent, "sends this output a second time");
      case action_kind::receive_forward:
        return once(p.input, "receives this input a second time");
      case action_kind::send_backward:
        expect(p.input_gradient, "sends a gradient that has not been computed");
        return once(p.gradient_sent, "sends this gradient a second time");
      case action_kind::receive_backward:
        return once(p.gradient, "receives this gradient a second time");
      case action_kind::backward_weights:
        expect(p.input_gradient && p.split, "is not preceded by its input part");
        return once(p.weights, "computes these weight gradients a second time");
      default:
        break;
    }
    // Both halves of a pair begin before either has ended, so neither may need the other's result.
    if (has_forward(a.kind)) begin_forward(stage, a.micro_batch);
    if (has_backward_input(a.kind)) {
      backward(s_.stage_of(rank_, backward_chunk_of(a)), backward_micro_batch_of(a),
               a.kind == action_kind::backward_input);
    }
    if (has_forward(a.kind)) end_forward(stage, a.micro_batch);
  }

  void begin_forward(int stage, int micro_batch) {
    stage_progress& p = of(stage, micro_batch);
    expect(!p.forward, "computes this forward a second time");
    expect(stage == 0 || p.input, "has not received its input");
  }
  void end_forward(int stage, int micro_batch) {
    of(stage, micro_batch).forward = true;
    if (stage + 1 < s_.num_stages && s_.rank_of(stage + 1, micro_batch) == rank_)
      of(stage + 1, micro_batch).input = true;
  }
  void backward(int stage, int micro_batch, bool split) {
    stage_progress& p = of(stage, micro_batch);
    expect(p.forward, "is a backward before the forward");
    expect(stage + 1 == s_.num_stages || p.gradient, "has not received the gradient of its output");
    once(p.input_gradient, "computes this backward a second time");
    p.split = split;
    p.weights = !split;
    if (stage > 0 && s_.rank_of(stage - 1, micro_batch) == rank_) of(stage - 1, micro_batch).gradient = true;
  }

  void expect_complete() {
    for (int stage = 0; stage < s_.num_stages; ++stage) {
      for (int m = 0; m < s_.num_micro_batches; ++m) {
        const stage_progress& p = of(stage, m);
        const char* missing = !p.forward ? "forward" : !p.input_gradient ? "backward" : !p.weights ? "weight part" : "";
        TESSERA_EXPECTS(*missing == '\0', "schedule '" << s_.name << "': micro-batch " << m << " has no " << missing
                                                       << " at stage " << stage << " (rank " << s_.rank_of(stage, m)
                                                       << ", chunk " << s_.chunk_of(stage, m) << ")");
      }
    }
  }

  const schedule& s_;
  std::vector<stage_progress> progress_;
  int rank_ = 0;
  std::size_t position_ = 0;
  const action* action_ = nullptr;
};

}  // namespace pipeline::detail

namespace pipeline {

inline void validate(const schedule& s) {
  detail::expect_well_formed(s);
  detail::accountant(s).check();
  // Whether somebody waits forever does not depend on times; a send without its receive is such a wait.
  detail::clockwork(s, costs{}, messages::rendezvous).run();
  const std::vector<memory_peak> peaks = peak_memory(s);
  for (std::size_t rank = 0; rank < peaks.size(); ++rank) {
    TESSERA_EXPECTS(
        s.max_live_activations == 0 || peaks[rank].activations <= s.max_live_activations,
        "schedule '" << s.name << "': rank " << rank << " keeps " << peaks[rank].activations
                     << " activations at once, more than max_live_activations = " << s.max_live_activations);
  }
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
