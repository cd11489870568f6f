// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#include "stop.hpp"

#include <csignal>

namespace train_lm {
namespace {

volatile std::sig_atomic_t stop_flag = 0;

extern "C" void on_signal(int number) {
  stop_flag = 1;
  std::signal(number, SIG_DFL);  // the next one is not caught
}

}  // namespace

void watch_for_stop() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}

bool stop_requested() { return stop_flag != 0; }

void clear_stop() { stop_flag = 0; }

}  // namespace train_lm
