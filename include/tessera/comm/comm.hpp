// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The comm room without `comm/mpi.hpp`, `comm/nccl.cuh` and `comm/symmetric.cuh`, which need an installation of MPI
/// and of NCCL and are included by their users.

#include <tessera/comm/collectives.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/comm/hosts.hpp>
#include <tessera/comm/nccl.hpp>
#include <tessera/comm/ordered_reduce.hpp>
#include <tessera/comm/self.hpp>
#include <tessera/comm/symmetric.hpp>
#include <tessera/comm/symmetric_view.hpp>
#include <tessera/comm/threads.hpp>
