// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of memory.hpp.

#include <algorithm>

#include <tessera/pipeline/detail/well_formed.hpp>
#include <tessera/pipeline/memory.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline::detail {

/// A number of things kept, and the most it has been.
struct gauge {
  int now = 0;
  int most = 0;
  void add() { most = std::max(most, ++now); }
  void remove() { --now; }
};

/// Counts along the list of one rank.
class memory_count {
 public:
  memory_count(const schedule& s, int rank) : s_(s), rank_(rank) {}

  void count(const action& a) {
    switch (a.kind) {
      case action_kind::receive_forward:
        inputs_.add();
        return;
      case action_kind::receive_backward:
        gradients_.add();
        return;
      case action_kind::send_forward:
        outputs_.remove();
        return;
      case action_kind::send_backward:
        input_gradients_.remove();
        return;
      default:
        break;
    }
    // Everything begins before anything ends: both halves of a pair are alive together.
    if (has_forward(a.kind)) begin_forward(s_.stage_of(rank_, a.chunk));
    const int backward_stage = s_.stage_of(rank_, backward_chunk_of(a));
    const bool splits = a.kind == action_kind::backward_input;
    if (has_backward_input(a.kind)) begin_backward(backward_stage, splits);
    if (has_forward(a.kind)) end_forward(s_.stage_of(rank_, a.chunk), a.micro_batch);
    if (has_backward_input(a.kind)) end_backward(backward_stage, backward_micro_batch_of(a), splits);
    if (a.kind == action_kind::backward_weights) {
      deferred_.remove();
      activations_.remove();
    }
  }

  memory_peak peak() const {
    return {activations_.most, undifferentiated_.most, deferred_.most,       inputs_.most,
            outputs_.most,     gradients_.most,        input_gradients_.most};
  }

 private:
  bool local(int stage, int micro_batch) const { return s_.rank_of(stage, micro_batch) == rank_; }

  void begin_forward(int stage) {
    if (stage > 0) inputs_.remove();
    activations_.add();
    undifferentiated_.add();
  }
  void end_forward(int stage, int micro_batch) {
    if (stage + 1 == s_.num_stages) return;
    if (local(stage + 1, micro_batch)) {
      inputs_.add();
    } else {
      outputs_.add();
    }
  }
  void begin_backward(int stage, bool splits) {
    if (stage + 1 < s_.num_stages) gradients_.remove();
    if (splits) deferred_.add();
  }
  void end_backward(int stage, int micro_batch, bool splits) {
    undifferentiated_.remove();
    if (!splits) activations_.remove();
    if (stage == 0) return;
    if (local(stage - 1, micro_batch)) {
      gradients_.add();
    } else {
      input_gradients_.add();
    }
  }

  const schedule& s_;
  int rank_;
  gauge activations_, undifferentiated_, deferred_, inputs_, outputs_, gradients_, input_gradients_;
};

}  // namespace pipeline::detail

namespace pipeline {

inline std::vector<memory_peak> peak_memory(const schedule& s) {
  detail::expect_well_formed(s);
  std::vector<memory_peak> peaks;
  for (int rank = 0; rank < s.num_ranks; ++rank) {
    detail::memory_count count(s, rank);
    for (const action& a : s.actions[static_cast<std::size_t>(rank)]) count.count(a);
    peaks.push_back(count.peak());
  }
  return peaks;
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
