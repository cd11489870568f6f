// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Grouped matrix products on the host through CBLAS. Nothing else of the library includes this header: it needs a
/// `cblas.h`, and the program must link the library that goes with it.

#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/core/dtype.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/operands.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm {

/// Host backend that hands each group's product to `cblas_sgemm` or `cblas_dgemm`.
///
/// Products whose elements are not all of the accumulation type (bf16 storage, for example), or whose matrices have no
/// contiguous dimension, are computed by `reference`. Gathered rows are copied block by block through the stack, at
/// most 512 KiB; nothing is allocated by this backend, the CBLAS may allocate.
///
/// **Bits.** The CBLAS chooses the order of the sums. It may choose another one for another number of rows, so a row's
/// bits depend on the other rows of its group, and results differ between rank counts. Use `reference` where that
/// matters. How many threads the CBLAS uses is its own setting.
struct blas {
  /// As `reference::variable_m`, up to rounding.
  ///
  /// @tparam A Type of the sums. @tparam TA,TB,TBias,TC Storage types.
  /// @param row_offsets `[G + 1]`, ascending; need not start at 0. Groups may be empty.
  /// @param N Columns of `c`.
  /// @param K Length of the sums; with 0 they are zero.
  /// @param a Rows of `[K]`.
  /// @param b `[G]` matrices, logically `[N, K]`.
  /// @param bias `[G, N]`, packed, or null for none.
  /// @param c `[at least row_offsets.back(), N]`.
  /// @param mode Whether the old content of `c` is added.
  /// @throws invalid_argument if offsets descend, an extent is negative, or a view is too small, misaligned or null.
  template <accumulate_type A, class TA, class TB, class TBias, class TC>
  static void variable_m(std::span<const std::int32_t> row_offsets, std::int64_t N, std::int64_t K, row_operand<TA> a,
                         group_operand<const TB> b, const TBias* bias, matrix_view<TC> c,
                         write mode = write::overwrite);

  /// `variable_m` without a bias.
  template <accumulate_type A, class TA, class TB, class TC>
  static void variable_m(std::span<const std::int32_t> row_offsets, std::int64_t N, std::int64_t K, row_operand<TA> a,
                         group_operand<const TB> b, std::nullptr_t, matrix_view<TC> c, write mode = write::overwrite) {
    variable_m<A>(row_offsets, N, K, a, b, static_cast<const A*>(nullptr), c, mode);
  }

  /// As `reference::variable_k`, up to rounding.
  ///
  /// @tparam A Type of the sums. @tparam TA,TB,TC Storage types.
  /// @param row_offsets `[G + 1]`, ascending; need not start at 0. Groups may be empty.
  /// @param M Rows of each matrix of `c`.
  /// @param N Columns of each matrix of `c`.
  /// @param a Rows of `[M]`.
  /// @param b Rows of `[N]`.
  /// @param c `[G]` matrices `[M, N]`.
  /// @param mode Whether the old content of `c` is added.
  /// @throws invalid_argument if offsets descend, an extent is negative, or an operand is misaligned or null.
  template <accumulate_type A, class TA, class TB, class TC>
  static void variable_k(std::span<const std::int32_t> row_offsets, std::int64_t M, std::int64_t N, row_operand<TA> a,
                         row_operand<TB> b, group_operand<TC> c, write mode);
};

}  // namespace gemm

TESSERA_NAMESPACE_END

#include <tessera/gemm/detail/blas.hpp>
