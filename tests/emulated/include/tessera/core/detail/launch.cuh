// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name.

#include <tessera/core/config.hpp>

#include "emulated/language.hpp"

TESSERA_NAMESPACE_BEGIN
namespace detail {
inline void await_stream() { emulated::block::own()->await_before(); }
inline void let_next_start() { emulated::block::own()->let_next_start(); }
}  // namespace detail
TESSERA_NAMESPACE_END
