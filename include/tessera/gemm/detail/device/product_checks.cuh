// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What both backends for device memory ask of their operands: extents, strides and addresses. Nothing is read from the
/// device, so nothing can be said of offsets and gather lists.

#include <cstddef>
#include <cstdint>

#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/detail/hopper/kernel_shape.cuh>
#include <tessera/gemm/operands.hpp>

TESSERA_NAMESPACE_BEGIN
namespace detail::product_checks {

using gemm::group_operand;
using gemm::row_operand;
using hopper::contiguous;
using hopper::gathered;

/// Checks what 16-byte accesses to rows need. @param data First row. @param stride Elements between rows.
/// @param element_bytes Size of an element. @param name For messages.
inline void expect_vector_rows(const void* data, std::int64_t stride, std::size_t element_bytes, const char* name) {
  TESSERA_EXPECTS(reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && data != nullptr,
                  name << " starts at " << data << ", an address aligned to 16 bytes is needed");
  TESSERA_EXPECTS(stride >= 0 && static_cast<std::size_t>(stride) * element_bytes % 16 == 0,
                  name << " has row stride " << stride << ", a multiple of " << 16 / element_bytes << " is needed");
}

/// Checks an extent that 16-byte units must divide. @param extent The extent. @param name For messages.
inline void expect_unit_extent(std::int64_t extent, const char* name) {
  TESSERA_EXPECTS(extent > 0 && extent % 8 == 0 && extent < (std::int64_t{1} << 30),
                  name << " is " << extent << ", a positive multiple of 8 is needed");
}

/// Checks the rows. @tparam Groups `gemm::hopper::row_groups`. @param groups The rows.
template <class Groups>
void expect_groups(const Groups& groups) {
  TESSERA_EXPECTS(groups.num_groups >= 0 && groups.num_groups < (1 << 20) && groups.max_rows >= 0 &&
                      groups.max_rows < (std::int64_t{1} << 31) - 512,
                  "the rows are of " << groups.num_groups << " groups, at most " << groups.max_rows
                                     << "; at least 0 and at most 2^20 groups and 2^31 - 512 rows are possible");
  TESSERA_EXPECTS(groups.num_groups == 0 || groups.row_offsets != nullptr, "the row groups have no row_offsets");
}

/// Checks that a gather list is there exactly where it was said to be. @param gathers Whether the operand was said to
/// have one. @param operand Its rows. @param name For messages.
inline void expect_source(bool gathers, const row_operand<bfloat16>& operand, const char* name) {
  TESSERA_EXPECTS((operand.gather != nullptr) == gathers,
                  name << (gathers ? " needs a gather list" : " has a gather list that would be ignored"));
  TESSERA_EXPECTS(operand.stride < (std::int64_t{1} << 30),
                  name << " has row stride " << operand.stride << ", at most 2^30 - 1 elements are possible");
}

/// The rows and the result of `variable_m`. @param groups The rows. @param N Columns. @param c The result.
/// @returns Whether there are rows; without any, `c` is not looked at.
template <class Groups, class TC>
[[nodiscard]] bool expect_result(const Groups& groups, std::int64_t N, const matrix_view<TC>& c) {
  expect_groups(groups);
  expect_unit_extent(N, "the number of columns");
  if (groups.num_groups == 0 || groups.max_rows == 0) return false;
  expect_matrix(c, -1, N, "c");
  TESSERA_EXPECTS(c.rows >= groups.max_rows, "c has " << c.rows << " rows, max_rows = " << groups.max_rows);
  expect_vector_rows(c.data, c.stride, sizeof(TC), "c");
  return true;
}

/// The rows, H and the activation of a product with one. @param groups The rows. @param n Columns of the activation.
/// @param U Columns of H. @param h,out The matrices.
/// @returns Whether there are rows; without any, the matrices are not looked at.
template <class Groups>
[[nodiscard]] bool expect_activations(const Groups& groups, std::int64_t n, std::int64_t U,
                                      const matrix_view<bfloat16>& h, const matrix_view<bfloat16>& out) {
  expect_groups(groups);
  expect_unit_extent(n, "the number of columns of the activation");
  if (groups.num_groups == 0 || groups.max_rows == 0) return false;
  expect_matrix(h, -1, U, "h");
  expect_matrix(out, -1, n, "the activation");
  TESSERA_EXPECTS(h.rows >= groups.max_rows && out.rows >= groups.max_rows,
                  "h has " << h.rows << " rows and the activation " << out.rows << ", max_rows = " << groups.max_rows);
  expect_vector_rows(h.data, h.stride, sizeof(bfloat16), "h");
  expect_vector_rows(out.data, out.stride, sizeof(bfloat16), "the activation");
  return true;
}

/// The sums of a product with variable M, whether or not it has rows. @tparam Rows As its. @param K Length of the sums.
/// @param a Its left operand.
template <gathered Rows>
void expect_sums(std::int64_t K, const row_operand<bfloat16>& a) {
  static_assert(Rows != gathered::b, "rows of b are not gathered in variable_m");
  expect_unit_extent(K, "the length of the sums");
  expect_source(Rows == gathered::a, a, "a");
}

/// The operands of a product with variable M that has rows. @param order Of `b`. @param a,b The operands.
/// @returns Elements between the lines of `b` along the index that is not contiguous.
inline std::int64_t expect_operands(contiguous order, const row_operand<bfloat16>& a,
                                    const group_operand<const bfloat16>& b) {
  expect_vector_rows(a.data, a.stride, sizeof(bfloat16), "a");
  const std::int64_t contiguous_stride = order == contiguous::k ? b.col_stride : b.row_stride;
  const std::int64_t line_stride = order == contiguous::k ? b.row_stride : b.col_stride;
  TESSERA_EXPECTS(contiguous_stride == 1, "b has strides [" << b.group_stride << ", " << b.row_stride << ", "
                                                            << b.col_stride << "], but its "
                                                            << (order == contiguous::k ? "last" : "middle")
                                                            << " one must be 1 for this kernel");
  expect_vector_rows(b.data, line_stride, sizeof(bfloat16), "b");
  expect_vector_rows(b.data, b.group_stride, sizeof(bfloat16), "b, from group to group,");
  return line_stride;
}

/// The operands of `variable_k`, and where its results are. @param which The operand with a gather list.
inline void expect_variable_k_operands(gathered which, std::int64_t max_rows, const row_operand<bfloat16>& a,
                                       const row_operand<bfloat16>& b, const group_operand<const std::byte>& c,
                                       std::size_t element_bytes) {
  expect_source(which == gathered::a, a, "a");
  expect_source(which == gathered::b, b, "b");
  TESSERA_EXPECTS(c.col_stride == 1, "c has column stride " << c.col_stride << ", it must be 1: exchange the operands");
  expect_vector_rows(c.data, c.row_stride, element_bytes, "c");
  expect_vector_rows(c.data, c.group_stride, element_bytes, "c, from group to group,");
  if (max_rows > 0) {
    expect_vector_rows(a.data, a.stride, sizeof(bfloat16), "a");
    expect_vector_rows(b.data, b.stride, sizeof(bfloat16), "b");
  }
}

/// Everything of `variable_k`. @tparam Rows As its. @param groups The rows. @param M,N Extents of each result. @param
/// a,b The operands. @param c The results.
/// @returns Whether there are results; without any, the matrices are not looked at.
template <gathered Rows, class Groups, class TC>
[[nodiscard]] bool expect_variable_k(const Groups& groups, std::int64_t M, std::int64_t N,
                                     const row_operand<bfloat16>& a, const row_operand<bfloat16>& b,
                                     const group_operand<TC>& c) {
  expect_groups(groups);
  expect_unit_extent(M, "the number of rows of a result");
  expect_unit_extent(N, "the number of columns of a result");
  if (groups.num_groups == 0) return false;
  expect_variable_k_operands(Rows, groups.max_rows, a, b,
                             {reinterpret_cast<const std::byte*>(c.data), c.group_stride, c.row_stride, c.col_stride},
                             sizeof(TC));
  return true;
}

}  // namespace detail::product_checks
TESSERA_NAMESPACE_END
