// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The output head with the cross entropy of the next token, shared with the main model.

#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/core/precision.hpp>
#include <tessera/gemm/automatic.hpp>
#include <tessera/mtp/parts.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// `p = softmax(x W^T)` and the loss `-log p[target]`. The weights are the main model's own, and so is the gradient:
/// this part adds to it.
///
/// Logits of `tile_rows` rows exist at a time, so memory is `tile_rows * V` sums instead of `R * V`; backward computes
/// them again, in each of its two parts. What is kept is two numbers per row, the largest logit and the sum of
/// `exp(logit - largest)`. Logits and their gradients are in `Precision::accumulate` and never rounded to storage. With
/// `gemm::reference` a row's bits depend on that row alone, and a chunk's gradient on its rows and `tile_rows` alone.
/// @tparam Precision Element types; models `precision_policy`. @tparam Gemm Backend of the products.
template <precision_policy Precision, class Gemm = gemm::automatic>
class softmax_head {
  using backend = gemm::host_backend<Gemm>;
  static_assert(gemm::host_gemm<backend>,
                "softmax_head: the second argument must be a backend of products in host memory. Models: "
                "gemm::automatic, gemm::reference, gemm::blas");

 public:
  using storage = typename Precision::storage;        ///< Element of rows and weights.
  using accumulate = typename Precision::accumulate;  ///< Element of logits, sums and gradient.

  /// @param hidden d. @param vocabulary V. @param weight W `[V, d]`, gradient `[chunks, V, d]`.
  /// @param tile_rows Rows whose logits exist at a time.
  /// @throws invalid_argument if a size is not positive or there are no weights.
  softmax_head(std::int64_t hidden, std::int64_t vocabulary, parameter<storage, accumulate> weight,
               std::int64_t tile_rows = 64);

  /// Bytes from forward to `backward_weights`. @param max_rows Bound of R.
  std::size_t saved_bytes(std::int64_t max_rows) const;
  /// None. @param max_rows Bound of R.
  std::size_t deferred_bytes([[maybe_unused]] std::int64_t max_rows) const { return 0; }
  /// Bytes of the logits of a tile. @param max_rows Bound of R.
  std::size_t workspace_bytes(std::int64_t max_rows) const;

  /// Computes the losses. Host: returns when done.
  /// @param stream Host stream. @param mode Not looked at. @param rows Its targets (below V; negative: none) and
  /// chunks.
  /// @param x `[R, d]`. @param losses `[chunks]`, overwritten: sums of `-log p[target]` in nats, in the order of rows.
  /// @param saved `saved_bytes(R)`. @param workspace `workspace_bytes(R)`.
  /// @throws invalid_argument if shapes or sizes are wrong, a target is not below V, or a loss is not finite.
  void forward(host_stream stream, pass mode, const depth_rows& rows, matrix_view<const storage> x,
               std::span<double> losses, saved_memory saved, workspace_memory workspace) const;

  /// Computes `dx = factor * (p - onehot(target)) W`, zero for rows without a target. Host: returns when done.
  /// @param stream Host stream. @param rows As in forward. @param x As in forward. @param factor Of each row's loss in
  /// the total loss. @param dx `[R, d]`, overwritten. @param saved From forward. @param deferred Not used.
  /// @param workspace `workspace_bytes(R)`. @throws invalid_argument if shapes or sizes are wrong.
  void backward_input(host_stream stream, const depth_rows& rows, matrix_view<const storage> x, double factor,
                      matrix_view<storage> dx, saved_memory saved, deferred_memory deferred,
                      workspace_memory workspace) const;

  /// Adds `dW = factor * (p - onehot(target))^T x` of each chunk. Host: returns when done.
  /// @param stream Host stream. @param rows As in forward. @param x As in forward. @param factor As in
  /// `backward_input`.
  /// @param saved From forward. @param deferred Not used. @param workspace `workspace_bytes(R)`.
  /// @throws invalid_argument if shapes or sizes are wrong or there is no place for the gradient.
  void backward_weights(host_stream stream, const depth_rows& rows, matrix_view<const storage> x, double factor,
                        saved_memory saved, deferred_memory deferred, workspace_memory workspace) const;

  /// The most probable id of each row, the lowest of equal ones. Host: returns when done.
  /// @param stream Host stream. @param x `[R, d]`. @param tokens `[R]`, written. @param workspace `workspace_bytes(R)`.
  /// @throws invalid_argument if shapes or sizes are wrong, or a logit is not a number.
  void greedy(host_stream stream, matrix_view<const storage> x, std::span<std::int32_t> tokens,
              workspace_memory workspace) const;

 private:
  std::int64_t tile_of(std::int64_t rows) const { return rows < tile_rows_ ? rows : tile_rows_; }
  accumulate* logits_of(workspace_memory workspace, std::int64_t rows) const;
  static accumulate* sums_of(saved_memory saved, std::int64_t rows);
  void compute_logits(matrix_view<const storage> x, accumulate* logits) const;
  bool differentiate(std::span<const std::int32_t> targets, const accumulate* sums, double factor,
                     matrix_view<const storage> x, accumulate* logits) const;
  void expect(const depth_rows& rows, const matrix_view<const storage>& x) const;

  std::int64_t hidden_, vocabulary_;
  parameter<storage, accumulate> weight_;
  std::int64_t tile_rows_;
};

}  // namespace mtp

TESSERA_NAMESPACE_END

#include <tessera/mtp/detail/head.hpp>
