// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The room of meshes: named axes over the ranks, placements of tensors on them, and the ways between placements.

#include <tessera/mesh/axes.hpp>
#include <tessera/mesh/expert_placements.hpp>
#include <tessera/mesh/placement.hpp>
#include <tessera/mesh/redistribute.hpp>
#include <tessera/mesh/redistribution_plan.hpp>
#include <tessera/mesh/region.hpp>
#include <tessera/mesh/sub_communicator.hpp>
#include <tessera/mesh/training_mesh.hpp>
