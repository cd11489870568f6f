// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The queue of weight gradients that have been put off.

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include <tessera/core/error.hpp>
#include <tessera/pipeline/gradient_order.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

namespace detail {

/// The put-off weight gradients of one stage on one rank. `push` when the input part of a backward is done, `request`
/// when the schedule says that the weight part is to be computed, then `pop` as long as it gives a micro-batch.
class weight_queue {
 public:
  /// @param micro_batches Those that pass the stage here. @param order When a request is granted.
  weight_queue(std::vector<int> micro_batches, gradient_order order) : turns_(std::move(micro_batches)), order_(order) {
    std::sort(turns_.begin(), turns_.end());
  }

  /// The input part of `micro_batch` is done.
  void push(int micro_batch) {
    waiting_.push_back(micro_batch);
    most_waiting_ = std::max(most_waiting_, waiting_.size());
  }

  /// The schedule says that the weight part of `micro_batch` is to be computed.
  /// @throws invalid_argument if its input part is not done, or its weight part was requested before.
  void request(int micro_batch) {
    const auto found = std::find(waiting_.begin(), waiting_.end(), micro_batch);
    TESSERA_EXPECTS(found != waiting_.end(), "the weight gradient of micro-batch "
                                                 << micro_batch << " is requested, but it is not in the queue: its "
                                                 << "input gradient must come before, and each is requested once");
    waiting_.erase(found);
    requested_.push_back(micro_batch);
  }

  /// The next micro-batch whose weight part may be computed now, -1 if there is none. It leaves the queue.
  int pop() {
    if (requested_.empty()) return -1;
    auto found = requested_.begin();
    if (order_ == gradient_order::micro_batch) {
      found = std::find(requested_.begin(), requested_.end(), turns_[done_]);
      if (found == requested_.end()) return -1;
    }
    const int micro_batch = *found;
    requested_.erase(found);
    ++done_;
    return micro_batch;
  }

  /// The most micro-batches whose weight part was not yet requested at one time.
  std::size_t most_waiting() const noexcept { return most_waiting_; }

 private:
  std::vector<int> turns_;      // micro-batches in ascending order
  std::vector<int> waiting_;    // input part done
  std::vector<int> requested_;  // to be computed as soon as the order allows
  std::size_t done_ = 0;
  std::size_t most_waiting_ = 0;
  gradient_order order_;
};

}  // namespace detail

}  // namespace pipeline

TESSERA_NAMESPACE_END
