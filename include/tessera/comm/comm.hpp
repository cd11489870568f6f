// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The comm room without `comm/mpi.hpp`, which needs an MPI installation and is included by its users.

#include <tessera/comm/collectives.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/comm/ordered_reduce.hpp>
#include <tessera/comm/self.hpp>
#include <tessera/comm/threads.hpp>
