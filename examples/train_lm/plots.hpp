// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Pictures of the runs, drawn by gnuplot from the CSV files beside them.

#include <string>
#include <vector>

#include "baselines.hpp"
#include "metrics.hpp"

namespace train_lm {

/// Draws `loss.svg` and `load.svg` of one run in `folder`, which holds its CSV files; the scripts stay beside them.
/// @return an empty string, or why nothing was drawn.
std::string plot_run(const std::string& folder, const run_result& run, const baselines& references);

/// Draws `comparison.svg` in `folder`: loss and load of the runs, which lie in its subfolders `none`, `loss`, `bias`.
/// @return an empty string, or why nothing was drawn.
std::string plot_comparison(const std::string& folder, const std::vector<run_result>& runs,
                            const baselines& references);

}  // namespace train_lm
