// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Proof that a schedule trains: whoever writes one of their own asks here.

#include <tessera/core/config.hpp>
#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// Throws unless the schedule can be run, and does all that a step is:
/// - routes and actions name ranks, chunks and micro-batches that exist, and every chunk holds one stage;
/// - every micro-batch has, at every stage, one forward and one backward, whole or in its two parts;
/// - on its rank, a forward follows its input, a backward its forward and its gradient, a weight part its input part,
/// and
///   a send what it sends;
/// - between neighbouring stages on different ranks each output and each gradient is sent and received once, and the
///   k-th send from one rank to another meets the k-th receive;
/// - no rank waits forever, even if a message is only handed over when both sides have come to it (rendezvous);
/// - no rank keeps more activations than the schedule's `max_live_activations`, if it states that.
///
/// Host: returns when done; time proportional to the number of actions.
/// @param s The schedule.
/// @throws invalid_argument naming the rank, the action, and what is wrong.
void validate(const schedule& s);

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/validate.hpp>
