// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a training run must remember besides its tensors.

#include <cstdint>
#include <map>
#include <string>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// Everything that a resumed run needs besides tensors, the same on all ranks (that of rank 0 is saved). Texts are
/// UTF-8 and come back as they were.
struct train_state {
  std::int64_t step = 0;         ///< Optimizer steps done, at least 0: names the checkpoint.
  double learning_rate = 0;      ///< Finite; comes back with the same bits.
  std::string rng = {};          ///< State of the random numbers, for example what `std::mt19937_64` prints.
  std::string data_cursor = {};  ///< Where the data stream stands, in the words of the data loader.
  std::map<std::string, std::string> values = {};  ///< Anything else.

  /// Equality.
  bool operator==(const train_state&) const = default;
};

}  // namespace checkpoint

TESSERA_NAMESPACE_END
