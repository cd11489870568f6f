// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The blocks of a chunk that have a checksum of their own and are read as a whole: boxes, so that their overlap with
/// what a rank needs is a box too, and neighbours in the file.

#include <cstdint>

#include <tessera/core/box.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

/// How a chunk divides into slabs of at most `block_bytes` (one element at least). A pure function of its arguments,
/// so files need not list them.
class slab_division {
 public:
  slab_division(const box& part, std::int64_t element_bytes, std::int64_t block_bytes) : part_(part) {
    if (part.empty()) return;
    count_ = 1;
    if (part.rank == 0) return;
    // the outermost dimension of which one row fits into a block
    std::int64_t row = part.volume() * element_bytes;
    for (dimension_ = 0; dimension_ < part.rank; ++dimension_) {
      row /= part.size[dimension_];
      if (row <= block_bytes || dimension_ == part.rank - 1) break;
      count_ *= part.size[dimension_];
    }
    rows_ = block_bytes / row;
    if (rows_ < 1) rows_ = 1;
    if (rows_ > part.size[dimension_]) rows_ = part.size[dimension_];
    per_outer_ = (part.size[dimension_] + rows_ - 1) / rows_;
    count_ *= per_outer_;
  }

  /// Number of slabs, 0 for an empty chunk.
  std::int64_t count() const { return count_; }

  /// Slab `index`, in order of the file.
  box operator[](std::int64_t index) const {
    box slab = part_;
    if (part_.rank == 0) return slab;
    const std::int64_t begin = index % per_outer_ * rows_;
    const std::int64_t left = part_.size[dimension_] - begin;
    slab.offset[dimension_] += begin;
    slab.size[dimension_] = rows_ < left ? rows_ : left;
    std::int64_t outer = index / per_outer_;
    for (int d = dimension_ - 1; d >= 0; --d) {
      slab.offset[d] += outer % part_.size[d];
      slab.size[d] = 1;
      outer /= part_.size[d];
    }
    return slab;
  }

 private:
  box part_;
  int dimension_ = 0;
  std::int64_t rows_ = 1;
  std::int64_t per_outer_ = 1;
  std::int64_t count_ = 0;
};

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
