// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The order in which contributions to weight gradients are added up.

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// In which order the micro-batches' contributions to a weight gradient are added.
enum class gradient_order {
  /// In the order of micro-batches, whatever the schedule does: `((g0 + g1) + g2) + ...`, bitwise equal to a serial run
  /// for every schedule. A contribution whose turn has not come waits, and with it the micro-batch's activations; the
  /// library's schedules never make one wait. A stage in two places keeps contributions apart (`gradient_rows`).
  micro_batch,
  /// In the order in which the schedule computes them: nothing waits and every stage has one row of gradients.
  /// Run-to-run bitwise, but different schedules round differently.
  schedule,
};

}  // namespace pipeline

TESSERA_NAMESPACE_END
