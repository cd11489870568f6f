// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A mixture of experts as the block of a depth.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <tessera/core/chunks.hpp>
#include <tessera/core/precision.hpp>
#include <tessera/moe/moe_layer.hpp>
#include <tessera/mtp/detail/row_math.hpp>
#include <tessera/mtp/norm.hpp>
#include <tessera/mtp/parts.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// `y = x + moe(norm(x))`: the second half of a transformer layer, or all of a small block.
///
/// The `moe_layer` is the depth's own: it has its own state, so its bias, counters and losses are apart from the main
/// model's, and the engine ends its steps (`end_step`) as it does for the other layers. It may have its own router: one
/// with `select::hash` goes by the ids of the tokens that the depth embeds, `t_{i+k}`, and so needs
/// `row_policy::valid`, where every row has one. Calls are collectives of the layer's communicator.
///
/// The layer's chunks have a fixed number of tokens. Contributions fit a chain's chunks if `chunk_tokens` is the number
/// of rows of a chunk at this depth: with chunks of s sequences of T tokens that is `s * T` under `row_policy::all`,
/// and `s * (T - k)` under `row_policy::valid`; or 0 with one chunk.
///
/// @tparam Layer A `moe_layer` in host memory. @tparam Norm A `row_layer` of the same width.
template <class Layer, class Norm = rms_norm<typename Layer::experts_type::precision_type>>
class residual_moe {
  static_assert(std::is_same_v<typename Layer::space, space::host>,
                "residual_moe: the first argument must be a moe_layer over a communicator of host memory");
  static_assert(!Layer::router_type::needs_expert_ids,
                "residual_moe: a chain has no expert ids to give to select::external. Use another selection");
  static_assert(row_layer<Norm, typename Layer::storage>,
                "residual_moe: the second argument, the norm, must be a row layer. Model: rms_norm");

 public:
  using storage = typename Layer::storage;        ///< Element of rows.
  using accumulate = typename Layer::accumulate;  ///< Element of sums.

  /// @param layer   The layer; outlives this object. Its `max_tokens` bounds R.
  /// @param norm    The norm before it; outlives this object.
  /// @param params  The layer's parameters.
  /// @param grads   Where the gradients of the layer's parameters go; empty without training.
  residual_moe(Layer& layer, Norm& norm, const typename Layer::weights& params,
               const typename Layer::gradients& grads = {})
      : layer_(&layer),
        norm_(&norm),
        params_(params),
        grads_(grads),
        sizes_(Layer::sizes(layer.dims(), layer.placement(), layer.comm().rank(), layer.get_options())) {}

  /// The layer, for `end_step` and its state.
  Layer& layer() const noexcept { return *layer_; }

  /// Bytes from forward to `backward_weights`. @param max_rows Bound of R, at most the layer's `max_tokens`.
  /// @throws invalid_argument if it is more.
  std::size_t saved_bytes(std::int64_t max_rows) const {
    TESSERA_EXPECTS(
        max_rows <= layer_->dims().max_tokens,
        "residual_moe: " << max_rows << " rows, the layer has room for max_tokens = " << layer_->dims().max_tokens);
    memory_builder memory;
    carve_saved(memory, max_rows);
    return memory.bytes();
  }
  /// Bytes from `backward_input` to `backward_weights`. @param max_rows Bound of R.
  std::size_t deferred_bytes(std::int64_t max_rows) const {
    memory_builder memory;
    carve_deferred(memory, max_rows);
    return memory.bytes();
  }
  /// Bytes during one call. @param max_rows Bound of R.
  std::size_t workspace_bytes(std::int64_t max_rows) const {
    return std::max({sizes_.workspace_bytes, sizes_.eval_workspace_bytes,
                     static_cast<std::size_t>(norm_->workspace_bytes(max_rows))});
  }

  /// Computes y. Collective; host: returns when done.
  /// @param stream Host stream. @param mode Given on to the layer. @param rows Documents, ids and chunks.
  /// @param x `[R, d]`. @param y `[R, d]`, overwritten; does not overlap x. @param saved `saved_bytes`.
  /// @param workspace `workspace_bytes`.
  /// @throws invalid_argument if chunks are not `chunk_tokens` rows each, or a row has no token that `select::hash`
  /// needs; and what the layer throws.
  void forward(host_stream stream, pass mode, const depth_rows& rows, matrix_view<const storage> x,
               matrix_view<storage> y, saved_memory saved, workspace_memory workspace) const {
    if (mode != pass::eval) expect_fitting_chunks(rows, x.rows);
    if constexpr (Layer::router_type::needs_token_ids) expect_tokens(rows);
    const saved_view kept = saved_of(saved, x);
    norm_->forward(stream, mode, rows, x, kept.normed, kept.norm, workspace);
    typename Layer::inputs in = inputs(rows, kept.normed);
    in.residual = x;
    layer_->forward(stream, mode, in, params_, y, kept.layer, workspace);
  }

  /// Computes dx. Collective; host: returns when done.
  /// @param stream Host stream. @param rows As in forward. @param x As in forward. @param dy `[R, d]`, unchanged until
  /// `backward_weights`. @param dx `[R, d]`, overwritten. @param saved From forward. @param deferred `deferred_bytes`.
  /// @param workspace `workspace_bytes`. @throws what the layer throws.
  void backward_input(host_stream stream, const depth_rows& rows, matrix_view<const storage> x,
                      matrix_view<const storage> dy, matrix_view<storage> dx, saved_memory saved,
                      deferred_memory deferred, workspace_memory workspace) const {
    const saved_view kept = saved_of(saved, x);
    const deferred_view later = deferred_of(deferred, x);
    layer_->backward_input(stream, inputs(rows, kept.normed), dy, params_, kept.layer, later.dnormed, later.layer,
                           workspace);
    norm_->backward_input(stream, rows, x, matrix_view<const storage>(later.dnormed), dx, kept.norm, later.norm,
                          workspace);
    for (std::int64_t i = 0; i < x.rows; ++i) detail::add_row<accumulate>(dy.row(i), x.cols, dx.row(i));
  }

  /// Computes the gradients of the layer's parameters and the norm's. Host: returns when done.
  /// @param stream Host stream. @param rows As in forward. @param x As in forward. @param dy As in `backward_input`.
  /// @param saved As `backward_input` left it. @param deferred From `backward_input`. @param mode Overwrite, or add.
  /// @param workspace `workspace_bytes`. @throws what the layer throws.
  void backward_weights(host_stream stream, const depth_rows& rows, matrix_view<const storage> x,
                        matrix_view<const storage> dy, saved_memory saved, deferred_memory deferred, write mode,
                        workspace_memory workspace) const {
    const saved_view kept = saved_of(saved, x);
    const deferred_view later = deferred_of(deferred, x);
    layer_->backward_weights(stream, inputs(rows, kept.normed), dy, kept.layer, later.layer, grads_, mode);
    norm_->backward_weights(stream, rows, x, matrix_view<const storage>(later.dnormed), kept.norm, later.norm, mode,
                            workspace);
  }

 private:
  struct saved_view {
    matrix_view<storage> normed{};
    saved_memory norm{}, layer{};
  };
  struct deferred_view {
    matrix_view<storage> dnormed{};
    deferred_memory norm{}, layer{};
  };

  saved_view carve_saved(memory_builder& memory, std::int64_t rows) const {
    const std::int64_t d = layer_->dims().hidden;
    saved_view view;
    view.layer = detail::take_memory<lifetime::saved>(memory, "residual_moe.layer", sizes_.saved_bytes);
    view.norm = detail::take_memory<lifetime::saved>(memory, "residual_moe.norm", norm_->saved_bytes(rows));
    view.normed = {memory.take<storage>("residual_moe.normed", rows * d), rows, d};
    return view;
  }
  deferred_view carve_deferred(memory_builder& memory, std::int64_t rows) const {
    const std::int64_t d = layer_->dims().hidden;
    deferred_view view;
    view.layer = detail::take_memory<lifetime::deferred>(memory, "residual_moe.layer", sizes_.deferred_bytes);
    view.norm = detail::take_memory<lifetime::deferred>(memory, "residual_moe.norm", norm_->deferred_bytes(rows));
    view.dnormed = {memory.take<storage>("residual_moe.dnormed", rows * d), rows, d};
    return view;
  }
  saved_view saved_of(saved_memory saved, const matrix_view<const storage>& x) const {
    memory_builder memory(saved, "residual_moe saved memory");
    return carve_saved(memory, x.rows);
  }
  deferred_view deferred_of(deferred_memory deferred, const matrix_view<const storage>& x) const {
    memory_builder memory(deferred, "residual_moe deferred memory");
    return carve_deferred(memory, x.rows);
  }

  typename Layer::inputs inputs(const depth_rows& rows, const matrix_view<storage>& normed) const {
    return {.x = normed, .token_ids = rows.token_ids, .sequence_offsets = rows.sequence_offsets};
  }

  static void expect_tokens(const depth_rows& rows) {
    for (std::size_t i = 0; i < rows.token_ids.size(); ++i)
      TESSERA_EXPECTS(rows.token_ids[i] >= 0, "residual_moe: row " << i << " of depth " << rows.depth
                                                                   << " has no token (id " << rows.token_ids[i]
                                                                   << "), which select::hash needs: use "
                                                                      "row_policy::valid");
  }

  void expect_fitting_chunks(const depth_rows& rows, std::int64_t count) const {
    const std::int64_t tokens = layer_->get_options().chunk_tokens;
    const std::int64_t chunks = num_chunks(count, tokens);
    TESSERA_EXPECTS(rows.num_chunks() == chunks, "residual_moe: the batch has "
                                                     << rows.num_chunks() << " chunks at depth " << rows.depth
                                                     << ", the layer makes " << chunks << " of " << count
                                                     << " rows with chunk_tokens = " << tokens);
    for (std::int64_t c = 0; c < chunks && tokens > 0; ++c)
      TESSERA_EXPECTS(rows.chunk_offsets[static_cast<std::size_t>(c)] == c * tokens,
                      "residual_moe: chunk " << c << " starts at row "
                                             << rows.chunk_offsets[static_cast<std::size_t>(c)] << " of depth "
                                             << rows.depth << ", the layer's at " << c * tokens
                                             << "; make chunks of equally many rows, or use row_policy::all");
  }

  Layer* layer_;
  Norm* norm_;
  typename Layer::weights params_;
  typename Layer::gradients grads_;
  layer_sizes sizes_;
};

}  // namespace mtp

TESSERA_NAMESPACE_END
