// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Rows from home to the owners of their experts: one row per (token, rank), and their expansion to one per pair.

#include <algorithm>
#include <cstdint>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/exchange_blocks.hpp>
#include <tessera/dispatch/handle.hpp>

TESSERA_NAMESPACE_BEGIN

/// Scratch of `dispatch_begin` and `dispatch_end`.
template <class S>
struct dispatch_workspace {
  S* sent = nullptr;             ///< `[sent rows, d]`, packed by rank.
  transfer* sends = nullptr;     ///< `[R]`.
  transfer* receives = nullptr;  ///< `[R]`.

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch. @param hidden
  /// d.
  static dispatch_workspace layout(memory_builder& builder, const dispatch_bounds& bounds, std::int64_t hidden) {
    dispatch_workspace w;
    w.sent = builder.take<S>("rows to send", bounds.num_ranks == 1 ? 0 : bounds.max_sent_rows() * hidden);
    w.sends = builder.take<transfer>("row sends", bounds.num_ranks);
    w.receives = builder.take<transfer>("row receives", bounds.num_ranks);
    return w;
  }
};

/// Starts sending each token once to every rank that owns one of its experts. A collective of `comm`.
/// The adjoint is `combine` without weights. One rank moves nothing: its experts read `x` in place.
/// @param stream    Host: everything happens here, `dispatch_end` only returns the rows.
/// @param comm      R ranks.
/// @param handle    From `exchange_routing`; forward and backward use the same.
/// @param x         `[T, d]`, rows contiguous; unchanged until `dispatch_end`.
/// @param received  `[max_received_rows, d]`, packed; not used at one rank.
/// @param workspace Scratch, kept until `dispatch_end`.
template <class Comm, class A, class S>
void dispatch_begin(host_stream stream, Comm& comm, const dispatch_handle<A>& handle, matrix_view<const S> x,
                    matrix_view<S> received, const dispatch_workspace<S>& workspace) {
  expect_matrix(x, handle.total->num_tokens, -1, "rows to dispatch");
  if (comm.size() == 1) return;
  const std::int64_t hidden = received.cols;
  expect_matrix(x, -1, hidden, "rows to dispatch");
  TESSERA_EXPECTS(handle.total->received_rows <= received.rows,
                  "room for " << received.rows << " received rows, " << handle.total->received_rows << " are needed");
  for (std::int64_t i = 0; i < handle.sent_row_offsets[comm.size()]; ++i)
    std::copy_n(x.row(handle.sent_tokens[i]), hidden, workspace.sent + i * hidden);
  detail::exchange_blocks(stream, comm, workspace.sent, handle.sent_row_offsets, received.data,
                          handle.received_row_offsets, hidden, workspace.sends, workspace.receives);
}

/// The rows that have arrived, in the order (source, token). Arguments as for `dispatch_begin`.
/// @return `[received_rows, d]`: a part of `received`, or `x` itself at one rank.
template <class Comm, class A, class S>
matrix_view<const S> dispatch_end(host_stream, Comm& comm, const dispatch_handle<A>& handle, matrix_view<const S> x,
                                  matrix_view<S> received, const dispatch_workspace<S>&) {
  if (comm.size() == 1) return x;
  return received.subrows(0, handle.total->received_rows);
}

/// Expands received rows to one row per pair, sorted by local expert: for engines with their own grouped product.
/// Tessera's experts gather while they load and do not need it.
/// @param received `[received_rows, d]`. @param rows Gather list and offsets. @param expanded `[pairs, d]`, written.
template <class S>
void permute(host_stream, matrix_view<const S> received, const expert_rows& rows, matrix_view<S> expanded) {
  const std::int32_t pairs = rows.row_offsets[rows.num_local_experts];
  expect_matrix(expanded, -1, received.cols, "expanded rows");
  TESSERA_EXPECTS(expanded.rows >= pairs, "room for " << expanded.rows << " expanded rows, " << pairs << " are needed");
  for (std::int32_t i = 0; i < pairs; ++i) {
    const std::int32_t row = rows.gather == nullptr ? i : rows.gather[i];
    std::copy_n(received.row(row), received.cols, expanded.row(i));
  }
}

TESSERA_NAMESPACE_END
