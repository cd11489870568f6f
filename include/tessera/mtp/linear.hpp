// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A linear map of rows: the projection `M_k` of a depth, `[d, 2 d]`.

#include <cstddef>
#include <cstdint>

#include <tessera/core/precision.hpp>
#include <tessera/gemm/automatic.hpp>
#include <tessera/mtp/detail/row_math.hpp>
#include <tessera/mtp/parts.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// `y = x W^T`. Sums are in `Precision::accumulate`; y and dx are rounded once, gradients are not. With
/// `gemm::reference` a row's bits depend on that row alone, and a chunk's gradient on its rows alone.
/// @tparam Precision Element types; models `precision_policy`. @tparam Gemm Backend of the products.
template <precision_policy Precision, class Gemm = gemm::automatic>
class linear {
  using backend = gemm::host_backend<Gemm>;
  static_assert(gemm::host_gemm<backend>,
                "linear: the second argument must be a backend of products in host memory. Models: gemm::automatic, "
                "gemm::reference, gemm::blas");

 public:
  using storage = typename Precision::storage;        ///< Element of rows and weights.
  using accumulate = typename Precision::accumulate;  ///< Element of sums and gradient.

  /// @param in Columns of x. @param out Columns of y. @param weight W `[out, in]`, gradient `[chunks, out, in]`.
  /// @throws invalid_argument if a size is not positive or there are no weights.
  linear(std::int64_t in, std::int64_t out, parameter<storage, accumulate> weight)
      : in_(in), out_(out), weight_(weight) {
    TESSERA_EXPECTS(in >= 1 && out >= 1 && weight.values != nullptr,
                    "linear needs positive sizes and weights, in = " << in << ", out = " << out);
  }

  /// None. @param max_rows Bound of R.
  std::size_t saved_bytes([[maybe_unused]] std::int64_t max_rows) const { return 0; }
  /// None. @param max_rows Bound of R.
  std::size_t deferred_bytes([[maybe_unused]] std::int64_t max_rows) const { return 0; }
  /// None. @param max_rows Bound of R.
  std::size_t workspace_bytes([[maybe_unused]] std::int64_t max_rows) const { return 0; }

  /// Computes y. Host: returns when done.
  /// @param stream Host stream. @param mode Not looked at. @param rows Not looked at. @param x `[R, in]`.
  /// @param y `[R, out]`, overwritten. @param saved Not used. @param workspace Not used.
  /// @throws invalid_argument if shapes are wrong.
  void forward([[maybe_unused]] host_stream stream, [[maybe_unused]] pass mode, [[maybe_unused]] const depth_rows& rows,
               matrix_view<const storage> x, matrix_view<storage> y, [[maybe_unused]] saved_memory saved,
               [[maybe_unused]] workspace_memory workspace) const {
    expect_matrix(x, -1, in_, "linear: x");
    expect_matrix(y, x.rows, out_, "linear: y");
    const std::int32_t all[] = {0, static_cast<std::int32_t>(x.rows)};
    backend::template variable_m<accumulate>(all, out_, in_, gemm::row_operand<storage>{x.data, x.stride},
                                             gemm::group_operand<const storage>{weight_.values, 0, in_, 1},
                                             static_cast<const accumulate*>(nullptr), y);
  }

  /// Computes `dx = dy W`. Host: returns when done.
  /// @param stream Host stream. @param rows Not looked at. @param x Not read. @param dy `[R, out]`.
  /// @param dx `[R, in]`, overwritten. @param saved Not used. @param deferred Not used. @param workspace Not used.
  /// @throws invalid_argument if shapes are wrong.
  void backward_input([[maybe_unused]] host_stream stream, [[maybe_unused]] const depth_rows& rows,
                      [[maybe_unused]] matrix_view<const storage> x, matrix_view<const storage> dy,
                      matrix_view<storage> dx, [[maybe_unused]] saved_memory saved,
                      [[maybe_unused]] deferred_memory deferred, [[maybe_unused]] workspace_memory workspace) const {
    expect_matrix(dy, -1, out_, "linear: dy");
    expect_matrix(dx, dy.rows, in_, "linear: dx");
    const std::int32_t all[] = {0, static_cast<std::int32_t>(dy.rows)};
    backend::template variable_m<accumulate>(all, in_, out_, gemm::row_operand<storage>{dy.data, dy.stride},
                                             gemm::group_operand<const storage>{weight_.values, 0, 1, in_},
                                             static_cast<const accumulate*>(nullptr), dx);
  }

  /// Computes `dW = dy^T x` of each chunk. Host: returns when done.
  /// @param stream Host stream. @param rows Its chunks. @param x `[R, in]`. @param dy `[R, out]`. @param saved Not
  /// used.
  /// @param deferred Not used. @param mode Overwrite, or add. @param workspace Not used.
  /// @throws invalid_argument if shapes are wrong or there is no place for the gradient.
  void backward_weights([[maybe_unused]] host_stream stream, const depth_rows& rows, matrix_view<const storage> x,
                        matrix_view<const storage> dy, [[maybe_unused]] saved_memory saved,
                        [[maybe_unused]] deferred_memory deferred, write mode,
                        [[maybe_unused]] workspace_memory workspace) const {
    expect_matrix(x, -1, in_, "linear: x");
    expect_matrix(dy, x.rows, out_, "linear: dy");
    detail::expect_chunks(rows, x.rows, "linear");
    if (rows.num_chunks() == 0) return;
    detail::expect_gradient(rows, weight_.gradient, weight_.gradient_stride, in_ * out_, "linear");
    backend::template variable_k<accumulate>(
        rows.chunk_offsets, out_, in_, gemm::row_operand<storage>{dy.data, dy.stride},
        gemm::row_operand<storage>{x.data, x.stride},
        gemm::group_operand<accumulate>{weight_.gradient, weight_.gradient_stride, in_, 1}, mode);
  }

 private:
  std::int64_t in_, out_;
  parameter<storage, accumulate> weight_;
};

}  // namespace mtp

TESSERA_NAMESPACE_END
