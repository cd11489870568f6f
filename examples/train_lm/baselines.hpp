// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What the language model is measured against, on the same split: an order-2 model and a general compressor.

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace train_lm {

/// Interpolated Witten-Bell model of bytes: with `c(h)` occurrences of a context `h`, `t(h)` kinds of bytes seen after
/// it, `p(w | h) = (c(hw) + t(h) p(w | shorter h)) / (c(h) + t(h))`, down to the uniform 1/256 below the empty
/// context (Witten and Bell 1991, method C, in the interpolated form of Chen and Goodman 1998).
class witten_bell {
 public:
  /// Counts `training`. @param order Longest context in bytes, 0 to 2.
  witten_bell(std::string_view training, int order);

  /// `p(byte | context)`; of the context only the last `order` bytes count.
  double probability(std::string_view context, unsigned char byte) const;

  /// Mean of `-log2 p` over the bytes of `text`, each given the ones before it.
  double bits_per_byte(std::string_view text) const;

 private:
  struct context_counts {
    std::int64_t total = 0;
    std::int64_t kinds = 0;
  };
  int order_;
  std::array<std::vector<std::int32_t>, 3> counts_;      // by order: [256^order contexts, 256]
  std::array<std::vector<context_counts>, 3> contexts_;  // by order: [256^order]
};

/// Bits that `xz -9e` needs for a byte of the validation text when it has the training text already: the compressed
/// size of both parts minus that of the training part.
struct compressor_result {
  std::string command;       ///< The compressor.
  double bits_per_byte = 0;  ///< On the validation part.
};

/// Runs the compressor over files it writes to `folder` and removes again; empty if the machine has no `xz`.
std::optional<compressor_result> compress_validation(std::string_view training, std::string_view validation,
                                                     const std::string& folder);

/// Both baselines.
struct baselines {
  double order2 = 0;                            ///< Bits per byte of the order-2 Witten-Bell model.
  std::optional<compressor_result> compressor;  ///< Empty without a compressor.
};

}  // namespace train_lm
