// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// How much a rank must keep at once to run a schedule: counts of micro-batches, known before anything runs.

#include <vector>

#include <tessera/core/config.hpp>
#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// The most that a rank keeps at any time, each line counted on its own. The counts follow from the order of the rank's
/// list alone, not from times.
struct memory_peak {
  int activations = 0;  ///< (chunk, micro-batch) whose forward has begun and whose last backward part has not ended.
  int undifferentiated = 0;  ///< Of these, those whose input gradient has not been made.
  int deferred = 0;          ///< Those with an input gradient whose weight part has not ended: backward done in parts.
  int inputs = 0;            ///< Inputs received, or handed over on the rank, whose forward has not begun.
  int outputs = 0;           ///< Outputs made and not yet sent.
  int gradients = 0;         ///< Output gradients received, or handed over, whose backward has not begun.
  int input_gradients = 0;   ///< Input gradients made and not yet sent.

  /// The same counts.
  constexpr bool operator==(const memory_peak&) const = default;
};

/// The peaks of each rank: bounds for the memory of an executor. In an overlapped pair both halves are alive. Host:
/// returns when done.
/// @param s The schedule.
/// @throws invalid_argument if the schedule names what does not exist.
std::vector<memory_peak> peak_memory(const schedule& s);

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/memory.hpp>
