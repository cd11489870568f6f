// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Definitions of gemm/blas.hpp.

#include <cblas.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include <tessera/gemm/blas.hpp>
#include <tessera/gemm/detail/expect_operands.hpp>
#include <tessera/gemm/reference.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm::detail {

// A row-major matrix as CBLAS takes it: element (i, j) is data[i * step + j], or data[j * step + i] if transposed.
template <class A>
struct blas_matrix {
  const A* data;
  std::int64_t step;
  bool transposed;
};

// c[M, N] = a[M, K] b[K, N] + (keep: c).
template <class A>
void blas_multiply(std::int64_t M, std::int64_t N, std::int64_t K, const blas_matrix<A>& a, const blas_matrix<A>& b,
                   bool keep, A* c, std::int64_t c_step) {
  const auto size = [](std::int64_t n) { return static_cast<int>(n); };
  const auto order = [](bool transposed) { return transposed ? CblasTrans : CblasNoTrans; };
  const A beta = keep ? A{1} : A{0};
  if constexpr (std::is_same_v<A, float>) {
    cblas_sgemm(CblasRowMajor, order(a.transposed), order(b.transposed), size(M), size(N), size(K), 1.0f, a.data,
                size(a.step), b.data, size(b.step), beta, c, size(c_step));
  } else {
    cblas_dgemm(CblasRowMajor, order(a.transposed), order(b.transposed), size(M), size(N), size(K), 1.0, a.data,
                size(a.step), b.data, size(b.step), beta, c, size(c_step));
  }
}

// Sizes of the blocks through which gathered rows are copied: two of them are 512 KiB.
inline constexpr std::int64_t blas_block_rows = 128;
template <class A>
inline constexpr std::int64_t blas_block_cols = 2048 / sizeof(A);

// Rows that CBLAS cannot address are copied: gathered, repeated or overlapping ones.
template <class A>
bool blas_needs_copy(const row_operand<A>& rows, std::int64_t cols) {
  return rows.gather != nullptr || rows.stride < cols;
}

// Rows [i, i + count), columns [j, j + cols): in place if CBLAS can address them, otherwise a copy in `block`.
template <class A>
blas_matrix<A> blas_rows(const row_operand<A>& rows, bool copy, std::int64_t i, std::int64_t count, std::int64_t j,
                         std::int64_t cols, A* block, bool transposed) {
  if (!copy) return {rows.row(i) + j, rows.stride, transposed};
  for (std::int64_t r = 0; r < count; ++r) std::copy_n(rows.row(i + r) + j, cols, block + r * cols);
  return {block, cols, transposed};
}

template <class... Sizes>
bool blas_addresses(Sizes... sizes) {
  return ((sizes <= std::numeric_limits<int>::max()) && ...);
}

}  // namespace gemm::detail

namespace gemm {

template <accumulate_type A, class TA, class TB, class TBias, class TC>
void blas::variable_m(std::span<const std::int32_t> row_offsets, std::int64_t N, std::int64_t K, row_operand<TA> a,
                      group_operand<const TB> b, const TBias* bias, matrix_view<TC> c, write mode) {
  if constexpr (std::is_same_v<A, TA> && std::is_same_v<A, TB> && std::is_same_v<A, TC>) {
    using std::int64_t;
    const bool rows_contiguous = b.col_stride == 1 && b.row_stride >= K;  // [N, K] in memory, otherwise [K, N]
    const int64_t b_step = rows_contiguous ? b.row_stride : b.col_stride;
    const bool addressable = (rows_contiguous || (b.row_stride == 1 && b.col_stride >= N)) &&
                             detail::blas_addresses(N, K, a.stride, b_step, c.stride);
    if (addressable && N > 0 && K > 0) {
      detail::expect_variable_m(row_offsets, N, K, a, b, c);
      const bool copy = detail::blas_needs_copy(a, K);
      alignas(64) A block[detail::blas_block_rows * detail::blas_block_cols<A>];
      for (std::size_t g = 0; g + 1 < row_offsets.size(); ++g) {
        const auto group = static_cast<int64_t>(g);
        const int64_t end = row_offsets[g + 1];
        const int64_t row_step = copy ? detail::blas_block_rows : std::max<int64_t>(1, end - row_offsets[g]);
        const int64_t depth_step = copy ? detail::blas_block_cols<A> : K;
        for (int64_t i = row_offsets[g]; i < end; i += row_step) {
          const int64_t rows = std::min(row_step, end - i);
          for (int64_t k = 0; k < K; k += depth_step) {
            const int64_t depth = std::min(depth_step, K - k);
            const A* const matrix = b.data + group * b.group_stride + k * b.col_stride;
            detail::blas_multiply<A>(rows, N, depth, detail::blas_rows(a, copy, i, rows, k, depth, block, false),
                                     {matrix, b_step, rows_contiguous}, k > 0 || mode == write::accumulate, c.row(i),
                                     std::max(c.stride, N));
          }
          for (int64_t r = i; bias != nullptr && r < i + rows; ++r)
            for (int64_t j = 0; j < N; ++j) c(r, j) += static_cast<A>(bias[group * N + j]);
        }
      }
      return;
    }
  }
  reference::variable_m<A>(row_offsets, N, K, a, b, bias, c, mode);
}

template <accumulate_type A, class TA, class TB, class TC>
void blas::variable_k(std::span<const std::int32_t> row_offsets, std::int64_t M, std::int64_t N, row_operand<TA> a,
                      row_operand<TB> b, group_operand<TC> c, write mode) {
  if constexpr (std::is_same_v<A, TA> && std::is_same_v<A, TB> && std::is_same_v<A, TC>) {
    using std::int64_t;
    if (c.col_stride != 1 && c.row_stride == 1) {  // the transposed product
      variable_k<A>(row_offsets, N, M, b, a, group_operand<TC>{c.data, c.group_stride, c.col_stride, 1}, mode);
      return;
    }
    const bool addressable =
        c.col_stride == 1 && c.row_stride >= N && detail::blas_addresses(M, N, a.stride, b.stride, c.row_stride);
    if (addressable && M > 0 && N > 0) {
      detail::expect_variable_k(row_offsets, M, N, a, b, c);
      const bool copy_a = detail::blas_needs_copy(a, M);
      const bool copy_b = detail::blas_needs_copy(b, N);
      alignas(64) A a_block[detail::blas_block_rows * detail::blas_block_cols<A>];
      alignas(64) A b_block[detail::blas_block_rows * detail::blas_block_cols<A>];
      const int64_t m_step = copy_a ? detail::blas_block_cols<A> : M;
      const int64_t n_step = copy_b ? detail::blas_block_cols<A> : N;
      for (std::size_t g = 0; g + 1 < row_offsets.size(); ++g) {
        const int64_t first = row_offsets[g];
        const int64_t end = row_offsets[g + 1];
        A* const matrix = c.data + static_cast<int64_t>(g) * c.group_stride;
        if (first == end && mode == write::overwrite)
          for (int64_t m = 0; m < M; ++m) std::fill_n(matrix + m * c.row_stride, N, A{0});
        const int64_t row_step = copy_a || copy_b ? detail::blas_block_rows : std::max<int64_t>(1, end - first);
        for (int64_t i = first; i < end; i += row_step) {
          const int64_t rows = std::min(row_step, end - i);
          for (int64_t m = 0; m < M; m += m_step) {
            const int64_t m_count = std::min(m_step, M - m);
            const auto a_part = detail::blas_rows(a, copy_a, i, rows, m, m_count, a_block, true);
            for (int64_t n = 0; n < N; n += n_step) {
              const int64_t n_count = std::min(n_step, N - n);
              const auto b_part = detail::blas_rows(b, copy_b, i, rows, n, n_count, b_block, false);
              detail::blas_multiply<A>(m_count, n_count, rows, a_part, b_part, i > first || mode == write::accumulate,
                                       matrix + m * c.row_stride + n, c.row_stride);
            }
          }
        }
      }
      return;
    }
  }
  reference::variable_k<A>(row_offsets, M, N, a, b, c, mode);
}

}  // namespace gemm

TESSERA_NAMESPACE_END
