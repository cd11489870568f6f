// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Tensor views: pointers with extents and strides. The library owns no tensor.
///
/// Why not an alias of `cuda::std::mdspan`: the host half compiles without a CUDA toolkit, and that header alone
/// costs 3.5 s in each nvcc translation unit. Any mdspan converts to a view instead, `std::` or `cuda::std::`.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

/// Anything that answers as a rank-2 mdspan does.
template <class M>
concept mdspan_like = requires(const M& m) {
  { m.rank() } -> std::convertible_to<std::size_t>;
  m.data_handle();
  { m.extent(0) } -> std::convertible_to<std::int64_t>;
  { m.stride(0) } -> std::convertible_to<std::int64_t>;
};

/// `[rows, cols]`, rows contiguous, `stride` elements from one row to the next. Trivially copyable; passes to kernels
/// by value.
template <class T>
struct matrix_view {
  T* data = nullptr;        ///< First element; may be null when `rows` is 0.
  std::int64_t rows = 0;    ///< Number of rows.
  std::int64_t cols = 0;    ///< Number of columns.
  std::int64_t stride = 0;  ///< Elements between the starts of two rows, at least `cols`.

  constexpr matrix_view() = default;

  /// Packed rows.
  TESSERA_HD constexpr matrix_view(T* data_, std::int64_t rows_, std::int64_t cols_)
      : data(data_), rows(rows_), cols(cols_), stride(cols_) {}

  /// Rows `stride_` elements apart.
  TESSERA_HD constexpr matrix_view(T* data_, std::int64_t rows_, std::int64_t cols_, std::int64_t stride_)
      : data(data_), rows(rows_), cols(cols_), stride(stride_) {}

  /// A view of mutable elements is a view of constant ones.
  template <class U>
  requires(std::is_same_v<T, const U>) TESSERA_HD
      constexpr matrix_view(const matrix_view<U>& other)  // NOLINT: qualification conversion
      : data(other.data), rows(other.rows), cols(other.cols), stride(other.stride) {}

  /// From an mdspan. @throws invalid_argument if its rank is not 2 or its rows are not contiguous.
  template <mdspan_like M>
  requires std::convertible_to<decltype(std::declval<const M&>().data_handle()), T*> matrix_view(const M& m)
      : data(m.data_handle()) {  // NOLINT: meant to be implicit
    TESSERA_EXPECTS(m.rank() == 2, "a matrix_view needs an mdspan of rank 2, this one has rank " << m.rank());
    rows = static_cast<std::int64_t>(m.extent(0));
    cols = static_cast<std::int64_t>(m.extent(1));
    stride = static_cast<std::int64_t>(m.stride(0));
    TESSERA_EXPECTS(cols <= 1 || m.stride(1) == 1,
                    "rows must be contiguous: stride(1) is " << m.stride(1) << ", it must be 1");
  }

  /// Start of row `i`.
  TESSERA_HD constexpr T* row(std::int64_t i) const { return data + i * stride; }
  /// Element `(i, j)`.
  TESSERA_HD constexpr T& operator()(std::int64_t i, std::int64_t j) const { return data[i * stride + j]; }
  /// Rows `[first, first + count)`.
  TESSERA_HD constexpr matrix_view subrows(std::int64_t first, std::int64_t count) const {
    return {data + first * stride, count, cols, stride};
  }
  /// Elements from the first to one past the last, gaps between rows included.
  TESSERA_HD constexpr std::int64_t span_elements() const { return rows == 0 ? 0 : (rows - 1) * stride + cols; }
};

namespace detail {

// `expect_matrix` of rows of whatever type.
inline void expect_matrix_at(const void* data, std::int64_t has_rows, std::int64_t has_cols, std::int64_t stride,
                             std::size_t alignment, std::int64_t rows, std::int64_t cols, const char* name) {
  TESSERA_EXPECTS((rows < 0 || has_rows == rows) && (cols < 0 || has_cols == cols),
                  name << " is [" << has_rows << ", " << has_cols << "], expected [" << (rows < 0 ? has_rows : rows)
                       << ", " << (cols < 0 ? has_cols : cols) << "]");
  TESSERA_EXPECTS(has_rows <= 1 || stride >= has_cols,
                  name << " has row stride " << stride << ", at least " << has_cols << " is needed");
  TESSERA_EXPECTS(has_rows == 0 || has_cols == 0 || data != nullptr, name << " has no data");
  TESSERA_EXPECTS(reinterpret_cast<std::uintptr_t>(data) % alignment == 0,
                  name << " starts at " << data << ", which is not aligned to " << alignment << " bytes");
}

}  // namespace detail

/// Checks the shape of a view, that its data are there and aligned for `T`, and that its stride is at least its number
/// of columns.
/// @param view What is checked.
/// @param rows Expected number of rows; negative: any.
/// @param cols Expected number of columns; negative: any.
/// @param name How the message calls the view.
/// @throws invalid_argument with the numbers.
template <class T>
void expect_matrix(const matrix_view<T>& view, std::int64_t rows, std::int64_t cols, const char* name) {
  detail::expect_matrix_at(view.data, view.rows, view.cols, view.stride, alignof(T), rows, cols, name);
}

/// Checks that two byte ranges do not overlap.
/// @param a       Start of the first range.
/// @param a_bytes Its size.
/// @param a_name  How the message calls it.
/// @param b       Start of the second range.
/// @param b_bytes Its size.
/// @param b_name  How the message calls it.
/// @throws invalid_argument with both ranges.
inline void expect_disjoint(const void* a, std::int64_t a_bytes, const char* a_name, const void* b,
                            std::int64_t b_bytes, const char* b_name) {
  const auto a_begin = reinterpret_cast<std::uintptr_t>(a);
  const auto b_begin = reinterpret_cast<std::uintptr_t>(b);
  const bool disjoint = a_bytes == 0 || b_bytes == 0 || a_begin + static_cast<std::uintptr_t>(a_bytes) <= b_begin ||
                        b_begin + static_cast<std::uintptr_t>(b_bytes) <= a_begin;
  TESSERA_EXPECTS(disjoint, a_name << " (" << a << ", " << a_bytes << " bytes) overlaps " << b_name << " (" << b << ", "
                                   << b_bytes << " bytes)");
}

namespace detail {

/// Whether rows `[a, a + a_bytes)` and `[b, b + b_bytes)` are different columns of one matrix, whatever rows they have:
/// both are repeated every `stride` bytes.
inline bool are_apart(std::uintptr_t a, std::uintptr_t a_bytes, std::uintptr_t b, std::uintptr_t b_bytes,
                      std::uintptr_t stride) {
  const std::uintptr_t b_column = b >= a ? (b - a) % stride : (stride - (a - b) % stride) % stride;
  return b_column >= a_bytes && b_column + b_bytes <= stride;
}

}  // namespace detail

/// `expect_disjoint` of two matrices: their spans, gaps between rows included, unless the strides are the same and the
/// columns are different ones, as the halves of one matrix are.
template <class T, class U>
void expect_disjoint(const matrix_view<T>& a, const char* a_name, const matrix_view<U>& b, const char* b_name) {
  constexpr auto a_size = static_cast<std::int64_t>(sizeof(T)), b_size = static_cast<std::int64_t>(sizeof(U));
  const std::int64_t stride = a.stride * a_size;
  if (stride > 0 && stride == b.stride * b_size &&
      detail::are_apart(reinterpret_cast<std::uintptr_t>(a.data), static_cast<std::uintptr_t>(a.cols * a_size),
                        reinterpret_cast<std::uintptr_t>(b.data), static_cast<std::uintptr_t>(b.cols * b_size),
                        static_cast<std::uintptr_t>(stride)))
    return;
  expect_disjoint(a.data, a.span_elements() * a_size, a_name, b.data, b.span_elements() * b_size, b_name);
}

TESSERA_NAMESPACE_END
