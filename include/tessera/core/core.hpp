// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The whole core room: the words that all other rooms are written in.

#include <tessera/core/box.hpp>
#include <tessera/core/chunks.hpp>
#include <tessera/core/config.hpp>
#include <tessera/core/device_status.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/expert_rows.hpp>
#include <tessera/core/log.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/nvtx.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/precision.hpp>
#include <tessera/core/sm_share.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/version.hpp>
#include <tessera/core/views.hpp>
