// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name.

#include <tessera/core/config.hpp>

#include "emulated/block.hpp"

#define TESSERA_KERNEL void

TESSERA_NAMESPACE_BEGIN
namespace detail {
inline constexpr int warp_size = emulated::warp_lanes;
inline constexpr unsigned full_warp = 0xffffffffu;
}  // namespace detail
TESSERA_NAMESPACE_END
