// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Ctrl-C: the first one asks for a clean end, the second one ends the process at once.

namespace train_lm {

/// Catches SIGINT and SIGTERM from now on (mpirun turns Ctrl-C into SIGTERM).
void watch_for_stop();

/// Whether one of them has arrived. Ranks must agree on it before they act on it.
bool stop_requested();

/// Forgets the request: for tests that run the program more than once.
void clear_stop();

}  // namespace train_lm
