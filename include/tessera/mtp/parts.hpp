// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a chain asks of its parts, which are the engine's own functors or the ready ones of this room.
///
/// A part knows its parameters and where their gradients go; the chain knows activations and memory. **Gradients of
/// parameters come as one contribution per chunk** (`depth_rows::chunk_offsets`), to be added in the order of chunks
/// with `ordered_all_reduce` where the result must not depend on the number of ranks.
///
/// Views that a part is given may have a stride larger than their number of columns. All parts run on the host and
/// return when they are done. Memory is `*_bytes(max_rows)` of the part itself, aligned to `memory_alignment`.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/core/memory.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/mtp/rows.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// A replicated parameter: its values, and where the contributions to its gradient go. Nothing is owned.
/// @tparam T Element of the values. @tparam A Element of the contributions.
template <class T, class A>
struct parameter {
  const T* values = nullptr;  ///< Packed; the part that holds it says in which shape.
  A* gradient = nullptr;      ///< Contribution of chunk c at `gradient + c * gradient_stride`; null without training.
  std::int64_t gradient_stride =
      0;  ///< Elements from one chunk's contribution to the next; not looked at with one chunk.
};

/// `saved_bytes(max_rows)`, `deferred_bytes(max_rows)` and `workspace_bytes(max_rows)` are sizes.
template <class P>
concept part_has_sizes = requires(const P& part, std::int64_t max_rows) {
  { part.saved_bytes(max_rows) } -> std::convertible_to<std::size_t>;
  { part.deferred_bytes(max_rows) } -> std::convertible_to<std::size_t>;
  { part.workspace_bytes(max_rows) } -> std::convertible_to<std::size_t>;
};

/// `forward(stream, pass, rows, x, y, saved, workspace)`: y `[R, out]` from x `[R, in]`.
template <class P, class S>
concept layer_has_forward = requires(P& part, host_stream stream, pass mode, const depth_rows& rows,
                                     matrix_view<const S> x, matrix_view<S> y, saved_memory saved,
                                     workspace_memory workspace) {
  part.forward(stream, mode, rows, x, y, saved, workspace);
};

/// `backward_input(stream, rows, x, dy, dx, saved, deferred, workspace)`: dx is overwritten.
template <class P, class S>
concept layer_has_backward_input = requires(P& part, host_stream stream, const depth_rows& rows, matrix_view<const S> x,
                                            matrix_view<const S> dy, matrix_view<S> dx, saved_memory saved,
                                            deferred_memory deferred, workspace_memory workspace) {
  part.backward_input(stream, rows, x, dy, dx, saved, deferred, workspace);
};

/// `backward_weights(stream, rows, x, dy, saved, deferred, write, workspace)`: any time after `backward_input`, with
/// the same x, dy, saved and deferred.
template <class P, class S>
concept layer_has_backward_weights = requires(P& part, host_stream stream, const depth_rows& rows,
                                              matrix_view<const S> x, matrix_view<const S> dy, saved_memory saved,
                                              deferred_memory deferred, write mode, workspace_memory workspace) {
  part.backward_weights(stream, rows, x, dy, saved, deferred, mode, workspace);
};

/// Rows to rows: a norm, a projection, a block. A block may mix rows of one document (`rows.sequence_offsets`),
/// causally; it is called on every rank, with no rows too, so it may communicate. Models: `rms_norm`, `linear`,
/// `residual_moe`.
template <class P, class S>
concept row_layer =
    part_has_sizes<P> && layer_has_forward<P, S> && layer_has_backward_input<P, S> && layer_has_backward_weights<P, S>;

/// `forward(stream, rows, y)`: row i of y is the embedding of `rows.token_ids[i]`, zero for -1.
template <class P, class S>
concept embedding_has_forward = requires(P& part, host_stream stream, const depth_rows& rows, matrix_view<S> y) {
  part.forward(stream, rows, y);
};

/// `backward_weights(stream, rows, dy)` adds to the gradient, which the main model shares.
template <class P, class S>
concept embedding_has_backward_weights = requires(P& part, host_stream stream, const depth_rows& rows,
                                                  matrix_view<const S> dy) {
  part.backward_weights(stream, rows, dy);
};

/// Token ids to rows, shared with the main model. Model: `token_embedding`.
template <class P, class S>
concept embedding_part = embedding_has_forward<P, S> && embedding_has_backward_weights<P, S>;

/// `forward(stream, pass, rows, x, losses, saved, workspace)`: `losses[c]` becomes the sum of `-log p(target)` over the
/// rows of chunk c that have a target.
template <class P, class S>
concept head_has_forward = requires(P& part, host_stream stream, pass mode, const depth_rows& rows,
                                    matrix_view<const S> x, std::span<double> losses, saved_memory saved,
                                    workspace_memory workspace) {
  part.forward(stream, mode, rows, x, losses, saved, workspace);
};

/// `backward_input(stream, rows, x, factor, dx, saved, deferred, workspace)`: dx becomes the gradient of `factor` times
/// the sum of all losses; zero for rows without a target.
template <class P, class S>
concept head_has_backward_input = requires(P& part, host_stream stream, const depth_rows& rows, matrix_view<const S> x,
                                           double factor, matrix_view<S> dx, saved_memory saved,
                                           deferred_memory deferred, workspace_memory workspace) {
  part.backward_input(stream, rows, x, factor, dx, saved, deferred, workspace);
};

/// `backward_weights(stream, rows, x, factor, saved, deferred, workspace)` adds to the gradient, which the main model
/// shares.
template <class P, class S>
concept head_has_backward_weights = requires(P& part, host_stream stream, const depth_rows& rows,
                                             matrix_view<const S> x, double factor, saved_memory saved,
                                             deferred_memory deferred, workspace_memory workspace) {
  part.backward_weights(stream, rows, x, factor, saved, deferred, workspace);
};

/// Rows to losses of the next token, shared with the main model. Model: `softmax_head`.
template <class P, class S>
concept head_part =
    part_has_sizes<P> && head_has_forward<P, S> && head_has_backward_input<P, S> && head_has_backward_weights<P, S>;

/// `greedy(stream, x, tokens, workspace)`: `tokens[i]` becomes the most probable id of row i, the lowest of equal ones.
/// Only drafting needs it.
template <class P, class S>
concept head_has_greedy = requires(P& part, host_stream stream, matrix_view<const S> x, std::span<std::int32_t> tokens,
                                   workspace_memory workspace) {
  part.greedy(stream, x, tokens, workspace);
};

}  // namespace mtp

TESSERA_NAMESPACE_END
