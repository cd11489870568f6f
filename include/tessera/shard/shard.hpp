// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The room of sharded training state: parameters, gradients and optimizer state divided among data-parallel ranks.

#include <tessera/shard/adamw.hpp>
#include <tessera/shard/exact_sum.hpp>
#include <tessera/shard/fully_sharded.hpp>
#include <tessera/shard/fully_sharded_device.hpp>
#include <tessera/shard/group_layout.hpp>
#include <tessera/shard/memory.hpp>
#include <tessera/shard/mesh_groups.hpp>
#include <tessera/shard/parameter.hpp>
#include <tessera/shard/reduction.hpp>
#include <tessera/shard/sharded_groups.hpp>
