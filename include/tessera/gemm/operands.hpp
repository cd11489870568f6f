// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What grouped matrix products read and write: rows that may be gathered, and one matrix per group.

#include <cstdint>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// Grouped matrix products: one product per local expert, over that expert's rows.
namespace gemm {

/// Rows of a matrix, in place or through a gather list. Row `i` starts at `data + stride * (gather ? gather[i] : i)`;
/// its elements are contiguous. Trivially copyable; nothing is owned.
template <class T>
struct row_operand {
  const T* data = nullptr;               ///< First element of row 0; may be null when no row is read.
  std::int64_t stride = 0;               ///< Elements between the starts of two rows; 0 repeats one row.
  const std::int32_t* gather = nullptr;  ///< Row `i` reads row `gather[i]`; null means row `i` reads row `i`.

  /// Start of row `i`.
  TESSERA_HD constexpr const T* row(std::int64_t i) const {
    return data + stride * (gather == nullptr ? i : static_cast<std::int64_t>(gather[i]));
  }
};

/// One matrix per group, in one allocation, with any strides: element `(g, i, j)` is
/// `data[g * group_stride + i * row_stride + j * col_stride]`. Trivially copyable; nothing is owned.
template <class T>
struct group_operand {
  T* data = nullptr;              ///< Element `(0, 0, 0)`; may be null when no element is touched.
  std::int64_t group_stride = 0;  ///< Elements from one group's matrix to the next; 0 shares one matrix.
  std::int64_t row_stride = 0;    ///< Elements from `(g, i, j)` to `(g, i + 1, j)`.
  std::int64_t col_stride = 1;    ///< Elements from `(g, i, j)` to `(g, i, j + 1)`.

  /// Element `(g, i, j)`.
  TESSERA_HD constexpr T& operator()(std::int64_t g, std::int64_t i, std::int64_t j) const {
    return data[g * group_stride + i * row_stride + j * col_stride];
  }
};

}  // namespace gemm

TESSERA_NAMESPACE_END
