// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A second stream that an engine lends to calls.

#include <tessera/core/config.hpp>
#include <tessera/core/stream.hpp>

struct CUevent_st;  // what cudaEvent_t points to

TESSERA_NAMESPACE_BEGIN

/// A stream for work beside the caller's, and the events that order the two: what a call puts there begins after what
/// the caller's stream held before it, and ends before what the call leaves there. They belong to the device of the
/// calls and outlive what uses them; calls that may run at the same time have one each. Without a stream everything is
/// on the caller's.
struct side_stream {
  CUstream_st* stream = nullptr;  ///< A `cudaStream_t` other than the callers'.
  CUevent_st* fork = nullptr;     ///< A `cudaEvent_t` without timing.
  CUevent_st* join = nullptr;     ///< Another.
};

TESSERA_NAMESPACE_END
