// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Grouped matrix products on the host, in plain C++: the oracle of all tests, and what machines without a GPU train
/// with.

#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/core/dtype.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/operands.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm {

/// Host backend in plain C++: blocked, packed, vectorised by the compiler for whatever machine it is told to compile
/// for.
///
/// **Bits.** An element of the result is `((0 + p_0) + p_1) + ...` in the accumulation type `A`, over products in
/// ascending order (with one rounding per step where the machine multiplies and adds in one operation and the compiler
/// may use it, with two elsewhere), then bias, then old content, then one rounding to the type of the result (from
/// double to bf16 two, by way of float). So its bits depend on the operands' rows and columns that it is made of, and
/// on nothing else: not on the number of rows, the other rows or groups, gather lists, the strides of any operand, or
/// where in a tile it falls. They do depend on how this header is compiled (instruction set, optimisation level): fused
/// and separate multiply-add differ.
///
/// **Memory.** Scratch is on the stack, less than 400 KiB; nothing is allocated.
///
/// **Threads.** Calls run on the calling thread and return when they are done. Distinct results may be computed at the
/// same time.
struct reference {
  /// For each group `g` and each of its rows `i` in `[row_offsets[g], row_offsets[g + 1])`:
  /// `c(i, j) = sum_k a.row(i)[k] * b(g, j, k) + bias[g * N + j]`.
  ///
  /// The result must not overlap an operand. Rows of `c` outside `[row_offsets.front(), row_offsets.back())` are not
  /// touched. Matrices of `b` are read fastest with `row_stride == 1` or `col_stride == 1`.
  ///
  /// @tparam A Type of the sums. @tparam TA,TB,TBias,TC Storage types; elements are widened to `A`.
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

  /// For each group `g`: `c(g, m, n) = sum_i a.row(i)[m] * b.row(i)[n]` over its rows `i`, ascending. An empty group
  /// writes zeros when overwriting.
  ///
  /// The result must not overlap an operand. It is written fastest with `col_stride == 1` or `row_stride == 1`.
  ///
  /// @tparam A Type of the sums. @tparam TA,TB,TC Storage types; elements are widened to `A`.
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

#include <tessera/gemm/detail/reference.hpp>
