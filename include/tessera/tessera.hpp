// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// All rooms, for users: any C++20 compiler, the standard library and nothing else. Headers that need an optional
/// dependency stand aside and are included by name: `comm/mpi.hpp` (MPI), `gemm/blas.hpp` (CBLAS) and the room
/// `checkpoint/checkpoint.hpp` (nlohmann/json, xxHash).

#include <tessera/comm/comm.hpp>
#include <tessera/core/core.hpp>
#include <tessera/dispatch/dispatch.hpp>
#include <tessera/experts/experts.hpp>
#include <tessera/gemm/gemm.hpp>
#include <tessera/layout/layout.hpp>
#include <tessera/mesh/mesh.hpp>
#include <tessera/moe/moe.hpp>
#include <tessera/mtp/mtp.hpp>
#include <tessera/pipeline/pipeline.hpp>
#include <tessera/router/router.hpp>
#include <tessera/shard/shard.hpp>
