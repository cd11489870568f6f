// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <algorithm>
#include <cstdio>
#include <utility>

#include <unistd.h>

namespace train_lm {

progress::progress(std::string label, std::int64_t steps, bool quiet)
    : label_(std::move(label)),
      steps_(steps),
      quiet_(quiet),
      terminal_(::isatty(STDERR_FILENO) == 1),
      start_(std::chrono::steady_clock::now()),
      shown_(start_) {}

void progress::show(const step_metrics& step) {
  if (quiet_) return;
  // Smoothed, because one step's numbers jump.
  if (first_ == 0) first_ = step.step;  // a resumed run begins where the other has ended
  const double weight = step.step == first_ ? 1.0 : 0.1;
  loss_ += weight * (step.loss * bits_per_nat - loss_);
  speed_ += weight * (step.tokens_per_second - speed_);
  const auto now = std::chrono::steady_clock::now();
  const std::int64_t tick = 20 * step.step / steps_;
  const bool last = step.step == steps_;
  if (terminal_ ? (now - shown_ < std::chrono::milliseconds(100) && !last) : tick == last_tick_) return;
  shown_ = now;
  last_tick_ = tick;
  const double done = static_cast<double>(step.step) / static_cast<double>(steps_);
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  constexpr int width = 24;
  std::string bar(width, '.');
  std::fill_n(bar.begin(), static_cast<int>(done * width), '#');
  std::fprintf(stderr,
               "%s%s [%s] %3.0f%%  step %lld/%lld  %.3f bits/byte  %.1fk tokens/s  max/mean load %.2f  %.0f s left%s",
               terminal_ ? "\r\033[K" : "", label_.c_str(), bar.c_str(), 100 * done, static_cast<long long>(step.step),
               static_cast<long long>(steps_), loss_, speed_ / 1000, step.worst_imbalance(),
               elapsed * static_cast<double>(steps_ - step.step) / static_cast<double>(step.step - first_ + 1),
               terminal_ ? "" : "\n");
  std::fflush(stderr);
  open_ = terminal_;
}

void progress::finish() {
  if (open_) std::fputc('\n', stderr);
  open_ = false;
}

}  // namespace train_lm
