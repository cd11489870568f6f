// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The eight steps that DualPipe and DualPipeV share.

#include <cstddef>
#include <utility>
#include <vector>

#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline::detail {

/// One of a rank's two chunks as the steps see it. The first is the one whose micro-batches reach the rank earlier.
struct dualpipe_lane {
  int chunk = 0;              ///< The chunk.
  int first_micro_batch = 0;  ///< Number of the first micro-batch that passes it; the others follow.
  int forwards = 0;           ///< Forwards that are in the list.
  int backwards = 0;          ///< Backwards that are in the list.
};

/// Writes the list of one rank. Ranks are counted from the outside: an `outermost` rank has `position` 0, an innermost
/// one `depth - 1`.
class dualpipe_writer {
 public:
  dualpipe_writer(dualpipe_lane first, dualpipe_lane second) : lanes_{first, second} {}

  /// All eight steps. @param position Distance from the end of the pipeline. @param depth Number of positions.
  /// @param lane_length Micro-batches that pass each lane.
  std::vector<action> write(int position, int depth, int lane_length) {
    const bool innermost = position == depth - 1;
    const int inwards = depth - position - 1;
    for (int i = 0; i < 2 * inwards; ++i) forward(early);
    for (int i = 0; i < position + 1; ++i) {
      forward(early);
      forward(late);
    }
    for (int i = 0; i < inwards; ++i) {
      backward_input(late);
      weights();
      forward(late);
    }
    for (int i = 0; i < lane_length - 2 * depth + position + 1; ++i) {
      if (i == 0 && innermost) {  // in a row, so that the gradient leaves earlier: a smaller bubble
        forward(early);
        backward(late);
      } else {
        overlapped(early, late);
      }
      overlapped(late, early);
    }
    for (int i = 0; i < inwards; ++i) {
      backward(late);
      overlapped(late, early);
    }
    // The second half of these is split: its weight parts fill the gaps of the two steps that follow.
    const int pairs = position + 1, odd = position % 2;
    for (int i = 0; i < pairs; ++i) {
      const bool late_split = i > pairs / 2 || (i == pairs / 2 && odd == 1);
      late_split ? backward_input(late) : backward(late);
      i >= pairs / 2 ? backward_input(early) : backward(early);
    }
    for (int i = 0; i < inwards; ++i) {
      weights();
      backward_input(early);
    }
    for (int i = 0; i < position + 1; ++i) weights();
    return std::move(list_);
  }

 private:
  static constexpr std::size_t early = 0, late = 1;

  int next_forward(std::size_t lane) { return lanes_[lane].first_micro_batch + lanes_[lane].forwards++; }
  int next_backward(std::size_t lane) { return lanes_[lane].first_micro_batch + lanes_[lane].backwards++; }

  void forward(std::size_t lane) { list_.push_back({action_kind::forward, lanes_[lane].chunk, next_forward(lane)}); }
  void backward(std::size_t lane) { list_.push_back({action_kind::backward, lanes_[lane].chunk, next_backward(lane)}); }
  void backward_input(std::size_t lane) {
    list_.push_back({action_kind::backward_input, lanes_[lane].chunk, next_backward(lane)});
    deferred_.push_back({action_kind::backward_weights, list_.back().chunk, list_.back().micro_batch});
  }
  /// The weight part that has waited longest.
  void weights() { list_.push_back(deferred_[done_++]); }
  void overlapped(std::size_t f, std::size_t b) {
    const int ahead = next_forward(f);
    list_.push_back({action_kind::overlapped, lanes_[f].chunk, ahead, lanes_[b].chunk, next_backward(b)});
  }

  dualpipe_lane lanes_[2];
  std::vector<action> list_, deferred_;
  std::size_t done_ = 0;
};

}  // namespace pipeline::detail

TESSERA_NAMESPACE_END
