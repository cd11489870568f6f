// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The embedding table, shared with the main model.

#include <cstdint>

#include <tessera/core/precision.hpp>
#include <tessera/mtp/detail/row_math.hpp>
#include <tessera/mtp/parts.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// `y_i = table[token_ids[i]]`. The table is the main model's own, and so is the gradient: this part adds to it.
/// @tparam Precision Element types; models `precision_policy`.
template <precision_policy Precision>
class token_embedding {
 public:
  using storage = typename Precision::storage;        ///< Element of rows and table.
  using accumulate = typename Precision::accumulate;  ///< Element of the gradient.

  /// @param vocabulary V. @param hidden d. @param table `[V, d]`, gradient `[chunks, V, d]`.
  /// @throws invalid_argument if a size is not positive or there is no table.
  token_embedding(std::int64_t vocabulary, std::int64_t hidden, parameter<storage, accumulate> table)
      : vocabulary_(vocabulary), hidden_(hidden), table_(table) {
    TESSERA_EXPECTS(
        vocabulary >= 1 && hidden >= 1 && table.values != nullptr,
        "token_embedding needs positive sizes and a table, vocabulary = " << vocabulary << ", hidden = " << hidden);
  }

  /// Looks rows up. Host: returns when done.
  /// @param stream Host stream. @param rows Its `token_ids`, in `[-1, V)`; -1 gives zeros. @param y `[R, d]`,
  /// overwritten.
  /// @throws invalid_argument if the shape is wrong or an id is out of range; then nothing is written.
  void forward([[maybe_unused]] host_stream stream, const depth_rows& rows, matrix_view<storage> y) const {
    expect_matrix(y, static_cast<std::int64_t>(rows.token_ids.size()), hidden_, "token_embedding: y");
    for (std::size_t i = 0; i < rows.token_ids.size(); ++i)
      TESSERA_EXPECTS(rows.token_ids[i] >= -1 && rows.token_ids[i] < vocabulary_,
                      "token_embedding: the id of row " << i << " at depth " << rows.depth << " is "
                                                        << rows.token_ids[i] << ", ids are below " << vocabulary_);
    for (std::size_t i = 0; i < rows.token_ids.size(); ++i) {
      storage* to = y.row(static_cast<std::int64_t>(i));
      if (rows.token_ids[i] < 0)
        detail::zero_row(hidden_, to);
      else
        detail::copy_row(table_.values + rows.token_ids[i] * hidden_, hidden_, to);
    }
  }

  /// Adds the table's gradient, row by row, ascending. Host: returns when done.
  /// @param stream Host stream. @param rows As in forward, and its chunks. @param dy `[R, d]`.
  /// @throws invalid_argument if the shape is wrong or there is no place for the gradient.
  void backward_weights([[maybe_unused]] host_stream stream, const depth_rows& rows,
                        matrix_view<const storage> dy) const {
    expect_matrix(dy, static_cast<std::int64_t>(rows.token_ids.size()), hidden_, "token_embedding: dy");
    detail::expect_chunks(rows, dy.rows, "token_embedding");
    if (rows.num_chunks() == 0) return;
    detail::expect_gradient(rows, table_.gradient, table_.gradient_stride, vocabulary_ * hidden_, "token_embedding");
    for (std::size_t c = 0; c + 1 < rows.chunk_offsets.size(); ++c) {
      accumulate* gradient = table_.gradient + static_cast<std::int64_t>(c) * table_.gradient_stride;
      for (std::int64_t i = rows.chunk_offsets[c]; i < rows.chunk_offsets[c + 1]; ++i) {
        const std::int32_t id = rows.token_ids[static_cast<std::size_t>(i)];
        if (id < 0) continue;
        for (std::int64_t j = 0; j < hidden_; ++j) gradient[id * hidden_ + j] += static_cast<accumulate>(dy(i, j));
      }
    }
  }

 private:
  std::int64_t vocabulary_, hidden_;
  parameter<storage, accumulate> table_;
};

}  // namespace mtp

TESSERA_NAMESPACE_END
