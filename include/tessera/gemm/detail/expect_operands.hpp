// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The checks that host backends share. They look at shapes and pointers, never at elements.

#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/core/error.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/operands.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm::detail {

inline void expect_row_offsets(std::span<const std::int32_t> row_offsets) {
  TESSERA_EXPECTS(!row_offsets.empty(), "row_offsets is empty, it needs one more element than there are groups");
  TESSERA_EXPECTS(row_offsets.front() >= 0, "row_offsets[0] is " << row_offsets.front() << ", it must not be negative");
  for (std::size_t g = 1; g < row_offsets.size(); ++g)
    TESSERA_EXPECTS(row_offsets[g] >= row_offsets[g - 1],
                    "row_offsets[" << g << "] = " << row_offsets[g] << " is below row_offsets[" << g - 1
                                   << "] = " << row_offsets[g - 1] << "; it must ascend");
}

template <class T>
void expect_aligned(const T* data, const char* name) {
  TESSERA_EXPECTS(reinterpret_cast<std::uintptr_t>(data) % alignof(T) == 0,
                  name << " starts at " << static_cast<const void*>(data) << ", which is not aligned to " << alignof(T)
                       << " bytes");
}

template <class T>
void expect_rows(const row_operand<T>& rows, bool read, const char* name) {
  TESSERA_EXPECTS(!read || rows.data != nullptr, name << " has no data");
  TESSERA_EXPECTS(rows.stride >= 0, name << " has row stride " << rows.stride << ", it must not be negative");
  expect_aligned(rows.data, name);
}

inline void expect_extents(std::int64_t first, const char* first_name, std::int64_t second, const char* second_name) {
  TESSERA_EXPECTS(first >= 0 && second >= 0,
                  first_name << " = " << first << " and " << second_name << " = " << second << " must not be negative");
}

template <class TA, class TB, class TC>
void expect_variable_m(std::span<const std::int32_t> row_offsets, std::int64_t N, std::int64_t K,
                       const row_operand<TA>& a, const group_operand<const TB>& b, const matrix_view<TC>& c) {
  expect_row_offsets(row_offsets);
  expect_extents(N, "N", K, "K");
  const bool any_rows = row_offsets.back() > row_offsets.front();
  expect_rows(a, any_rows && N > 0 && K > 0, "a");
  TESSERA_EXPECTS(!any_rows || N == 0 || K == 0 || b.data != nullptr, "b has no data");
  expect_aligned(b.data, "b");
  expect_matrix(c, -1, N, "c");
  TESSERA_EXPECTS(c.rows >= row_offsets.back(),
                  "c has " << c.rows << " rows, row_offsets end at " << row_offsets.back() << "; c needs as many");
}

template <class TA, class TB, class TC>
void expect_variable_k(std::span<const std::int32_t> row_offsets, std::int64_t M, std::int64_t N,
                       const row_operand<TA>& a, const row_operand<TB>& b, const group_operand<TC>& c) {
  expect_row_offsets(row_offsets);
  expect_extents(M, "M", N, "N");
  const bool any_rows = row_offsets.back() > row_offsets.front();
  expect_rows(a, any_rows && M > 0 && N > 0, "a");
  expect_rows(b, any_rows && M > 0 && N > 0, "b");
  TESSERA_EXPECTS(row_offsets.size() == 1 || M == 0 || N == 0 || c.data != nullptr, "c has no data");
  expect_aligned(c.data, "c");
}

}  // namespace gemm::detail

TESSERA_NAMESPACE_END
