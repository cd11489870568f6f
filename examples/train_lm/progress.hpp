// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The line that tells how training goes, on stderr.

#include <chrono>
#include <cstdint>
#include <string>

#include "metrics.hpp"

namespace train_lm {

/// On a terminal one line that is redrawn, otherwise a new line every few per cent.
class progress {
 public:
  /// @param label What is in progress. @param steps Number of steps in all. @param quiet Shows nothing.
  progress(std::string label, std::int64_t steps, bool quiet);
  /// After a step.
  void show(const step_metrics& step);
  /// Leaves the line.
  void finish();

 private:
  std::string label_;
  std::int64_t steps_;
  bool quiet_, terminal_;
  bool open_ = false;
  std::int64_t last_tick_ = -1, first_ = 0;
  double loss_ = 0, speed_ = 0;
  std::chrono::steady_clock::time_point start_, shown_;
};

}  // namespace train_lm
