// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The command line.

#include <optional>

#include "settings.hpp"

namespace train_lm {

/// Reads the command line. @param processes Ranks that mpirun has started, 0 without it.
/// @param speaks Whether this process prints: with several only one does. @param exit_code Where nothing
/// is to be run (help, or a mistake that has been explained): what `main` returns.
std::optional<settings> read_command_line(int argc, char** argv, int processes, bool speaks, int& exit_code);

}  // namespace train_lm
