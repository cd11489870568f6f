// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Which rows take part at which depth of multi-token prediction, and what a depth is told about them.
///
/// Row `i` at depth k pairs the hidden state of position i with token `t_{i+k}` and predicts `t_{i+k+1}`. Tokens are
/// shifted by reading another id, never by moving embeddings, so the embedding may lie anywhere.

#include <cstdint>
#include <span>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// Multi-token prediction: a chain of small models behind the main one, each of which predicts one token further
/// (DeepSeek-V3, arXiv 2412.19437, section 2.2).
namespace mtp {

/// What happens at depth k to rows that have no token k positions on: the last k rows of every document.
enum class row_policy {
  valid,  ///< They are left out: `T - k` rows of a document of T, as equation 22 has it. A block sees no others.
  all,    ///< They stay in their places without loss and gradient: a block sees the same shapes at every depth, and a
          ///< mixture of experts in it computes and counts them.
};

/// Tokens of one rank. Sequences are whole: none is split between ranks. Views of caller-owned host memory.
///
/// A **document** is a run of rows inside one sequence whose positions ascend by one. A row at depth k needs all of the
/// next k rows to be of its document; so `positions[i + k] == positions[i] + k` for every row that takes part.
struct batch {
  std::span<const std::int32_t> token_ids;  ///< `[T]` ids of the input tokens `t_i`.
  std::span<const std::int32_t> targets;    ///< `[T]` ids of the next tokens `t_{i+1}`, as for the main model's loss;
                                            ///< negative: no loss there, at any depth.
  std::span<const std::int32_t> positions = {};         ///< `[T]`; empty: rows count from 0 in each sequence.
  std::span<const std::int32_t> sequence_offsets = {};  ///< `[S + 1]` from 0 to T, ascending; empty: one sequence.
  std::span<const std::int32_t> chunk_offsets =
      {};  ///< `[C + 1]` from 0 to T, ascending; empty: one chunk. See `chain`.
};

/// The R rows of one depth, as its parts see them. Views of host memory, valid during the call they are given to.
struct depth_rows {
  int depth = 0;                            ///< k, from 1.
  std::span<const std::int32_t> rows = {};  ///< `[R]` rows of the batch, ascending.
  std::span<const std::int32_t> token_ids =
      {};                                      ///< `[R]` ids of `t_{i+k}`; -1 where there is none (`row_policy::all`).
  std::span<const std::int32_t> targets = {};  ///< `[R]` ids of `t_{i+k+1}`; negative: no loss.
  std::span<const std::int32_t> positions = {};         ///< `[R]` positions of i, as the batch has them.
  std::span<const std::int32_t> sequence_offsets = {};  ///< `[N + 1]` rows of each document, maybe none; N is the same
                                                        ///< at every depth.
  std::span<const std::int32_t> chunk_offsets = {};     ///< `[C + 1]` rows of each chunk, maybe none.

  /// C.
  std::int64_t num_chunks() const { return static_cast<std::int64_t>(chunk_offsets.size()) - 1; }
};

/// Counts the terms of each depth's loss on this rank: rows that take part and have a target. A sequence of T tokens
/// with all targets has `T - k` at depth k (equation 24). Host: returns when done, allocates nothing.
/// @param in     The tokens.
/// @param counts `[D]`, written: terms of depths 1, 2, ..., D.
/// @throws invalid_argument if lengths or offsets do not fit each other.
inline void count_terms(const batch& in, std::span<std::int64_t> counts);

}  // namespace mtp

TESSERA_NAMESPACE_END

#include <tessera/mtp/detail/rows.hpp>
