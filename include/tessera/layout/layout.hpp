// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The room of layouts: which rank owns which expert, in which slot.

#include <tessera/layout/block.hpp>
#include <tessera/layout/boxes.hpp>
#include <tessera/layout/expert_layout.hpp>
#include <tessera/layout/round_robin.hpp>
#include <tessera/layout/table.hpp>
