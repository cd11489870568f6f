// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Sends and receives for lists of computations: whoever writes a schedule writes what is computed, and this adds the
/// rest.

#include <tessera/core/config.hpp>
#include <tessera/pipeline/costs.hpp>
#include <tessera/pipeline/schedule.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// The schedule without its sends and receives. @param s The schedule.
schedule computation_only(schedule s);

/// The schedule with a send right behind every computation whose result another rank needs, and the receive where the
/// other rank has just finished what it was doing at that moment, if the parts take the times `c`. Sends and receives
/// that `s` had are dropped. Host: returns when done.
///
/// The result cannot deadlock, whatever the parts take in the end: there is one order of all messages and all
/// computations with which every rank's list agrees, so each message could even be waited for by both sides at once.
/// For the same reason the k-th send between two ranks meets the k-th receive. Times that are close to the real ones
/// make ranks wait less at batches; the default ones suit the usual transformer stages.
/// @param s The schedule; its computations must be possible in their order.
/// @param c Times of its parts, all positive, so that what comes later also stands later.
/// @throws invalid_argument if the schedule or the costs are not valid, if a time is 0, or if the computations wait for
/// each other.
schedule with_communication(schedule s, const costs& c = {});

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/communication.hpp>
