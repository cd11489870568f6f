// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Which rows belong to which local expert: the word that dispatch, grouped products and experts share.

#include <cstdint>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// Rows sorted by local expert. Expert `e` owns rows `[row_offsets[e], row_offsets[e + 1])`; row `i` reads source row
/// `gather[i]` of the received tokens. Arrays are in the memory space of the work; nothing is owned.
struct expert_rows {
  std::int32_t num_local_experts = 0;         ///< Number of groups; groups may be empty.
  const std::int32_t* row_offsets = nullptr;  ///< `[num_local_experts + 1]`, ascending from 0.
  const std::int32_t* gather = nullptr;       ///< `[row_offsets[num_local_experts]]`; null means row `i` reads row `i`.
};

/// Expert rows whose type says that there is a list, unless there are no rows: device code for rows without one need
/// not be compiled.
struct listed_rows : expert_rows {};

/// Expert rows whose type says that there is no list, in the same sense.
struct rows_in_place : expert_rows {};

TESSERA_NAMESPACE_END
