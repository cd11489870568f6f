// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Expert rows back home, added up per token: the adjoint of dispatch.

#include <algorithm>
#include <cstdint>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/exchange_blocks.hpp>
#include <tessera/dispatch/handle.hpp>

TESSERA_NAMESPACE_BEGIN

/// What multiplies an expert's row in `combine`.
enum class combine_weights {
  routing,  ///< The routing weight of its pair: forward.
  none,     ///< 1: backward of dispatch, or weights that were applied to the expert's input.
};

/// Scratch of `combine_begin` and `combine_end`.
/// @tparam S Type of rows in memory and on the wire. @tparam A Type of sums.
template <class S, class A>
struct combine_workspace {
  S* outgoing = nullptr;           ///< Rows to return: pairs (ordered) or received rows (reduced).
  S* returned = nullptr;           ///< Rows that came home: sent pairs (ordered) or sent rows (reduced).
  A* sum = nullptr;                ///< `[d]`.
  std::int32_t* cursor = nullptr;  ///< `[R]`.
  transfer* sends = nullptr;       ///< `[R]`.
  transfer* receives = nullptr;    ///< `[R]`.

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch. @param hidden
  /// d.
  template <combine_policy Combine>
  static combine_workspace layout(memory_builder& builder, const dispatch_bounds& bounds, std::int64_t hidden,
                                  Combine) {
    const bool ordered = std::is_same_v<Combine, combine::ordered>;
    const std::int64_t alone = bounds.num_ranks == 1 ? 0 : 1;
    combine_workspace w;
    w.outgoing =
        builder.take<S>("rows to return", alone * hidden * (ordered ? bounds.max_pairs : bounds.max_received_rows()));
    w.returned =
        builder.take<S>("returned rows", alone * hidden * (ordered ? bounds.max_sent_pairs() : bounds.max_sent_rows()));
    w.sum = builder.take<A>("row sum", hidden);
    w.cursor = builder.take<std::int32_t>("row cursors", bounds.num_ranks);
    w.sends = builder.take<transfer>("return sends", bounds.num_ranks);
    w.receives = builder.take<transfer>("return receives", bounds.num_ranks);
    return w;
  }
};

namespace detail {

template <class A, class S>
void add_row(A* TESSERA_RESTRICT sum, A weight, const S* TESSERA_RESTRICT row, std::int64_t hidden) {
  for (std::int64_t j = 0; j < hidden; ++j) sum[j] += weight * static_cast<A>(row[j]);
}

template <class A, class S>
void store_row(S* TESSERA_RESTRICT row, const A* TESSERA_RESTRICT sum, std::int64_t hidden) {
  for (std::int64_t j = 0; j < hidden; ++j) row[j] = static_cast<S>(sum[j]);
}

}  // namespace detail

/// Starts the way home of expert rows. A collective of `comm`.
/// @tparam Combine  Where rows are added: `combine::ordered` or `combine::reduced`.
/// @param stream    Host: the exchange happens here, the sum at home in `combine_end`.
/// @param comm      R ranks.
/// @param handle    From `exchange_routing`.
/// @param weights   Whether rows are multiplied by their routing weights.
/// @param pairs     `[received_pairs, d]` expert rows in the order of `handle.rows()`; unchanged until `combine_end`.
/// @param workspace Scratch, kept until `combine_end`.
template <combine_policy Combine, class Comm, class A, class S>
void combine_begin(host_stream stream, Comm& comm, const dispatch_handle<A>& handle, combine_weights weights,
                   matrix_view<const S> pairs, const combine_workspace<S, A>& workspace) {
  expect_matrix(pairs, handle.total->received_pairs, -1, "expert rows to combine");
  if (comm.size() == 1) return;  // summed where they stand
  const std::int64_t hidden = pairs.cols;
  if constexpr (std::is_same_v<Combine, combine::ordered>) {
    for (std::int64_t p = 0; p < handle.total->received_pairs; ++p)
      std::copy_n(pairs.row(handle.expert_row_of[p]), hidden, workspace.outgoing + p * hidden);
    detail::exchange_blocks(stream, comm, workspace.outgoing, handle.received_pair_offsets, workspace.returned,
                            handle.sent_pair_offsets, hidden, workspace.sends, workspace.receives);
  } else {
    for (std::int64_t row = 0; row < handle.total->received_rows; ++row) {
      std::fill_n(workspace.sum, hidden, A{0});
      for (std::int32_t p = handle.row_pair_offsets[row]; p < handle.row_pair_offsets[row + 1]; ++p) {
        const std::int32_t expert_row = handle.expert_row_of[p];
        const A weight = weights == combine_weights::routing ? handle.pair_weights[expert_row] : A{1};
        detail::add_row(workspace.sum, weight, pairs.row(expert_row), hidden);
      }
      detail::store_row(workspace.outgoing + row * hidden, workspace.sum, hidden);
    }
    detail::exchange_blocks(stream, comm, workspace.outgoing, handle.received_row_offsets, workspace.returned,
                            handle.sent_row_offsets, hidden, workspace.sends, workspace.receives);
  }
}

/// Adds up what came home. A token without pairs becomes a row of zeros. Sums in `A`, rounded once to `Out`.
/// @param stream          Host: returns when done.
/// @param comm            R ranks.
/// @param handle          From `exchange_routing`.
/// @param weights         As in `combine_begin`.
/// @param pairs           As in `combine_begin`; read here at one rank.
/// @param routing_weights `[T, K]`; read by `combine::ordered` with `combine_weights::routing`.
/// @param y               `[T, d]`, overwritten.
/// @param workspace       As in `combine_begin`.
template <combine_policy Combine, class Comm, class A, class S, class Out>
void combine_end(host_stream stream, Comm& comm, const dispatch_handle<A>& handle, combine_weights weights,
                 matrix_view<const S> pairs, matrix_view<const A> routing_weights, matrix_view<Out> y,
                 const combine_workspace<S, A>& workspace) {
  static_cast<void>(stream);
  const std::int64_t hidden = pairs.cols;
  const std::int64_t top_k = routing_weights.cols;
  expect_matrix(y, handle.total->num_tokens, hidden, "combined rows");
  expect_matrix(routing_weights, handle.total->num_tokens, -1, "routing weights");
  const bool alone = comm.size() == 1;
  const bool by_pair = alone || std::is_same_v<Combine, combine::ordered>;
  std::copy_n(handle.sent_row_offsets, comm.size(), workspace.cursor);
  for (std::int64_t t = 0; t < y.rows; ++t) {
    std::fill_n(workspace.sum, hidden, A{0});
    if (by_pair) {
      for (std::int64_t k = 0; k < top_k; ++k) {
        const std::int32_t p = handle.pair_slots[t * top_k + k];
        if (p < 0) continue;
        const S* row = alone ? pairs.row(handle.expert_row_of[p]) : workspace.returned + p * hidden;
        const A weight = weights == combine_weights::routing ? routing_weights(t, k) : A{1};
        detail::add_row(workspace.sum, weight, row, hidden);
      }
    } else {
      for (int r = 0; r < comm.size(); ++r) {
        const std::int32_t i = workspace.cursor[r];
        if (i == handle.sent_row_offsets[r + 1] || handle.sent_tokens[i] != t) continue;
        ++workspace.cursor[r];
        detail::add_row(workspace.sum, A{1}, workspace.returned + i * hidden, hidden);
      }
    }
    detail::store_row(y.row(t), workspace.sum, hidden);
  }
}

/// Scratch of `return_pair_values`.
template <class A>
struct pair_values_workspace {
  A* outgoing = nullptr;         ///< `[received pairs]`.
  A* returned = nullptr;         ///< `[sent pairs]`.
  transfer* sends = nullptr;     ///< `[R]`.
  transfer* receives = nullptr;  ///< `[R]`.

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  static pair_values_workspace layout(memory_builder& builder, const dispatch_bounds& bounds) {
    return {builder.take<A>("pair values to return", bounds.max_pairs),
            builder.take<A>("returned pair values", bounds.max_sent_pairs()),
            builder.take<transfer>("value sends", bounds.num_ranks),
            builder.take<transfer>("value receives", bounds.num_ranks)};
  }
};

/// Brings one number per expert row home to its pair: gradients of routing weights. A collective of `comm`.
/// @param stream    Host: returns when done.
/// @param comm      R ranks.
/// @param handle    From `exchange_routing`.
/// @param values    `[received_pairs]` in the order of `handle.rows()`.
/// @param home      `[T, K]`, overwritten; 0 where the pair was not sent.
/// @param workspace Scratch.
template <class Comm, class A>
void return_pair_values(host_stream stream, Comm& comm, const dispatch_handle<A>& handle, const A* values,
                        matrix_view<A> home, const pair_values_workspace<A>& workspace) {
  expect_matrix(home, handle.total->num_tokens, -1, "pair values");
  for (std::int64_t p = 0; p < handle.total->received_pairs; ++p)
    workspace.outgoing[p] = values[handle.expert_row_of[p]];
  detail::exchange_blocks(stream, comm, workspace.outgoing, handle.received_pair_offsets, workspace.returned,
                          handle.sent_pair_offsets, 1, workspace.sends, workspace.receives);
  for (std::int64_t t = 0; t < home.rows; ++t) {
    for (std::int64_t k = 0; k < home.cols; ++k) {
      const std::int32_t p = handle.pair_slots[t * home.cols + k];
      home(t, k) = p < 0 ? A{0} : workspace.returned[p];
    }
  }
}

TESSERA_NAMESPACE_END
