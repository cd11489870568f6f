// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Small words that several rooms use in their signatures.

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// What a forward pass is for.
enum class pass {
  train,      ///< Saves for backward and counts the load of each expert.
  recompute,  ///< Saves for backward; does not count, because `train` has counted these tokens.
  eval,       ///< Saves nothing and counts nothing.
};

/// How a gradient is written.
enum class write {
  overwrite,   ///< The old content is not read.
  accumulate,  ///< Added to the old content.
};

TESSERA_NAMESPACE_END
