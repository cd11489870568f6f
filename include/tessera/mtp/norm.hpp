// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Root-mean-square norm of rows (Zhang and Sennrich, arXiv 1910.07467), forward and backward.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include <tessera/core/precision.hpp>
#include <tessera/mtp/detail/row_math.hpp>
#include <tessera/mtp/parts.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// `y = gain * x / sqrt(mean(x^2) + epsilon)` of each row. Sums and the gain are in `Precision::accumulate`; y and dx
/// are rounded once. A row's bits depend on that row alone.
/// @tparam Precision Element types; models `precision_policy`.
template <precision_policy Precision>
class rms_norm {
 public:
  using storage = typename Precision::storage;        ///< Element of rows.
  using accumulate = typename Precision::accumulate;  ///< Element of sums, gain and gradient.

  /// @param hidden d, at least 1. @param gain `[d]`, gradient `[chunks, d]`. @param epsilon Added to the mean square.
  /// @throws invalid_argument if there are no columns or no gain.
  rms_norm(std::int64_t hidden, parameter<accumulate, accumulate> gain, double epsilon = 1e-6)
      : hidden_(hidden), gain_(gain), epsilon_(static_cast<accumulate>(epsilon)) {
    TESSERA_EXPECTS(hidden >= 1 && gain.values != nullptr,
                    "rms_norm needs at least 1 column and a gain, hidden = " << hidden);
  }

  /// Bytes from forward to `backward_weights`. @param max_rows Bound of R.
  std::size_t saved_bytes(std::int64_t max_rows) const {
    memory_builder memory;
    memory.take<accumulate>("rms_norm.inverse", max_rows);
    return memory.bytes();
  }
  /// None. @param max_rows Bound of R.
  std::size_t deferred_bytes([[maybe_unused]] std::int64_t max_rows) const { return 0; }
  /// Bytes of a chunk's sums. @param max_rows Bound of R.
  std::size_t workspace_bytes([[maybe_unused]] std::int64_t max_rows) const {
    memory_builder memory;
    memory.take<accumulate>("rms_norm.sums", hidden_);
    return memory.bytes();
  }

  /// Computes y and keeps `1 / rms` of each row. Host: returns when done.
  /// @param stream Host stream. @param mode Not looked at. @param rows Not looked at. @param x `[R, d]`.
  /// @param y `[R, d]`, overwritten; may be x. @param saved `saved_bytes(R)`. @param workspace Not used.
  /// @throws invalid_argument if shapes or sizes are wrong.
  void forward([[maybe_unused]] host_stream stream, [[maybe_unused]] pass mode, [[maybe_unused]] const depth_rows& rows,
               matrix_view<const storage> x, matrix_view<storage> y, saved_memory saved,
               [[maybe_unused]] workspace_memory workspace) const {
    expect_matrix(x, -1, hidden_, "rms_norm: x");
    expect_matrix(y, x.rows, hidden_, "rms_norm: y");
    accumulate* inverse = inverse_of(saved, x.rows);
    for (std::int64_t i = 0; i < x.rows; ++i) {
      const storage* from = x.row(i);
      storage* to = y.row(i);
      const accumulate squares = detail::sum_in_lanes<accumulate>(
          hidden_, [&](std::int64_t j) { return static_cast<accumulate>(from[j]) * static_cast<accumulate>(from[j]); });
      inverse[i] = accumulate(1) / std::sqrt(squares / static_cast<accumulate>(hidden_) + epsilon_);
      for (std::int64_t j = 0; j < hidden_; ++j)
        to[j] = detail::narrow<storage>(gain_.values[j] * (static_cast<accumulate>(from[j]) * inverse[i]));
    }
  }

  /// Computes `dx = inverse * (dy * gain - x * inverse^2 * mean(dy * gain * x))`. Host: returns when done.
  /// @param stream Host stream. @param rows Not looked at. @param x As in forward. @param dy `[R, d]`.
  /// @param dx `[R, d]`, overwritten; may be dy. @param saved From forward. @param deferred Not used.
  /// @param workspace Not used. @throws invalid_argument if shapes or sizes are wrong.
  void backward_input([[maybe_unused]] host_stream stream, [[maybe_unused]] const depth_rows& rows,
                      matrix_view<const storage> x, matrix_view<const storage> dy, matrix_view<storage> dx,
                      saved_memory saved, [[maybe_unused]] deferred_memory deferred,
                      [[maybe_unused]] workspace_memory workspace) const {
    expect_matrix(x, -1, hidden_, "rms_norm: x");
    expect_matrix(dy, x.rows, hidden_, "rms_norm: dy");
    expect_matrix(dx, x.rows, hidden_, "rms_norm: dx");
    const accumulate* inverse = inverse_of(saved, x.rows);
    for (std::int64_t i = 0; i < x.rows; ++i) {
      const storage* xi = x.row(i);
      const storage* dyi = dy.row(i);
      storage* to = dx.row(i);
      const auto scaled = [&](std::int64_t j) { return static_cast<accumulate>(dyi[j]) * gain_.values[j]; };
      const accumulate along = detail::sum_in_lanes<accumulate>(
          hidden_, [&](std::int64_t j) { return scaled(j) * static_cast<accumulate>(xi[j]); });
      const accumulate pull = along * inverse[i] * inverse[i] / static_cast<accumulate>(hidden_);
      for (std::int64_t j = 0; j < hidden_; ++j)
        to[j] = detail::narrow<storage>(inverse[i] * (scaled(j) - static_cast<accumulate>(xi[j]) * pull));
    }
  }

  /// Computes the gain's gradient, `sum dy * x * inverse` over each chunk's rows, ascending. Host: returns when done.
  /// @param stream Host stream. @param rows Its chunks. @param x As in forward. @param dy As in `backward_input`.
  /// @param saved From forward. @param deferred Not used. @param mode Overwrite, or add the finished sum.
  /// @param workspace `workspace_bytes(R)`.
  /// @throws invalid_argument if shapes or sizes are wrong or there is no place for the gradient.
  void backward_weights([[maybe_unused]] host_stream stream, const depth_rows& rows, matrix_view<const storage> x,
                        matrix_view<const storage> dy, saved_memory saved, [[maybe_unused]] deferred_memory deferred,
                        write mode, workspace_memory workspace) const {
    expect_matrix(x, -1, hidden_, "rms_norm: x");
    expect_matrix(dy, x.rows, hidden_, "rms_norm: dy");
    detail::expect_chunks(rows, x.rows, "rms_norm");
    if (rows.num_chunks() == 0) return;
    detail::expect_gradient(rows, gain_.gradient, gain_.gradient_stride, hidden_, "rms_norm");
    const accumulate* inverse = inverse_of(saved, x.rows);
    memory_builder memory(workspace, "rms_norm workspace");
    auto* sums = memory.take<accumulate>("rms_norm.sums", hidden_);
    for (std::size_t c = 0; c + 1 < rows.chunk_offsets.size(); ++c) {
      detail::zero_row(hidden_, sums);
      for (std::int64_t i = rows.chunk_offsets[c]; i < rows.chunk_offsets[c + 1]; ++i)
        for (std::int64_t j = 0; j < hidden_; ++j)
          sums[j] += static_cast<accumulate>(dy(i, j)) * (static_cast<accumulate>(x(i, j)) * inverse[i]);
      accumulate* gradient = gain_.gradient + static_cast<std::int64_t>(c) * gain_.gradient_stride;
      for (std::int64_t j = 0; j < hidden_; ++j)
        gradient[j] = mode == write::overwrite ? sums[j] : gradient[j] + sums[j];
    }
  }

 private:
  static accumulate* inverse_of(saved_memory saved, std::int64_t rows) {
    memory_builder memory(saved, "rms_norm saved memory");
    return memory.take<accumulate>("rms_norm.inverse", rows);
  }

  std::int64_t hidden_;
  parameter<accumulate, accumulate> gain_;
  accumulate epsilon_;
};

}  // namespace mtp

TESSERA_NAMESPACE_END
