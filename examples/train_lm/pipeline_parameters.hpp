// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The parameters of one block of a pipelined model, and the rows in which their gradients are gathered.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <tessera/core/passes.hpp>

#include "optimizer.hpp"
#include "parameters.hpp"

namespace train_lm {

/// One block's parameters: embedding, a layer, the head, or a depth of multi-token prediction. All of them lie in one
/// array, what every rank of a stage holds first, the rank's own experts behind it.
template <class A>
struct parameter_block {
  int place = 0;                  ///< In the model: embedding 0, layers from 1, then the head, then the depths.
  parameter_table table;          ///< The tensors.
  std::int64_t replicated = 0;    ///< Elements before the experts.
  std::int64_t experts = 0;       ///< Experts of this rank, of
  std::int64_t expert_size = 0;   ///< so many elements each.
  std::vector<A> values;          ///< Of the tensors.
  std::vector<A> means, squares;  ///< Moments of AdamW.
  A* gradients = nullptr;         ///< `[rows of the stage]` of `table.size()` elements, `stride` apart.
  std::int64_t stride = 0;        ///< Elements from one row of the stage's gradients to the next.

  /// Makes room for the tensors that have been added.
  void allocate() { values.resize(static_cast<std::size_t>(table.size())); }
  /// A tensor's values.
  A* at(std::int64_t offset) { return values.data() + offset; }
  /// A tensor's values, as many as there are.
  std::span<A> tensor(std::int64_t offset) { return {at(offset), static_cast<std::size_t>(table.at(offset).count)}; }
  /// A row of the gradients.
  A* row(int index) { return gradients + index * stride; }
};

/// Puts the complete contribution of a micro-batch into its row.
template <class A>
void contribute(std::int64_t count, const A* contribution, ts::write mode, A* row) {
  if (mode == ts::write::overwrite) {
    for (std::int64_t i = 0; i < count; ++i) row[i] = contribution[i];
  } else {
    for (std::int64_t i = 0; i < count; ++i) row[i] += contribution[i];
  }
}

/// Text of a step on one rank: `[micro-batches, rows]`.
struct step_text {
  std::int64_t rows = 0;              ///< Of this rank in each micro-batch.
  std::vector<std::uint8_t> tokens;   ///< Bytes.
  std::vector<std::int16_t> targets;  ///< The byte after each, or `no_target`.

  /// Bytes of a micro-batch.
  std::span<const std::uint8_t> tokens_of(int micro_batch) const {
    return {tokens.data() + micro_batch * rows, static_cast<std::size_t>(rows)};
  }
  /// Targets of a micro-batch.
  std::span<const std::int16_t> targets_of(int micro_batch) const {
    return {targets.data() + micro_batch * rows, static_cast<std::size_t>(rows)};
  }
};

}  // namespace train_lm
