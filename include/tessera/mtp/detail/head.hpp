// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Definitions of mtp/head.hpp.

#include <algorithm>
#include <cmath>

#include <tessera/mtp/detail/row_math.hpp>
#include <tessera/mtp/head.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

namespace detail {

inline bool has_target(std::span<const std::int32_t> targets) {
  return std::any_of(targets.begin(), targets.end(), [](std::int32_t target) { return target >= 0; });
}

// The index of the largest of `count` values, the lowest of equal ones.
template <class A>
std::int32_t index_of_largest(const A* values, std::int64_t count) {
  std::int64_t best = 0;
  for (std::int64_t v = 0; v < count; ++v) {
    TESSERA_EXPECTS(values[v] == values[v], "mtp: the logit of id " << v << " is not a number");
    if (values[v] > values[best]) best = v;
  }
  return static_cast<std::int32_t>(best);
}

}  // namespace detail

template <precision_policy Precision, class Gemm>
softmax_head<Precision, Gemm>::softmax_head(std::int64_t hidden, std::int64_t vocabulary,
                                            parameter<storage, accumulate> weight, std::int64_t tile_rows)
    : hidden_(hidden), vocabulary_(vocabulary), weight_(weight), tile_rows_(tile_rows) {
  TESSERA_EXPECTS(hidden >= 1 && vocabulary >= 1 && tile_rows >= 1 && weight.values != nullptr,
                  "softmax_head needs positive sizes and weights, hidden = "
                      << hidden << ", vocabulary = " << vocabulary << ", tile_rows = " << tile_rows);
}

template <precision_policy Precision, class Gemm>
std::size_t softmax_head<Precision, Gemm>::saved_bytes(std::int64_t max_rows) const {
  memory_builder memory;
  memory.take<accumulate>("softmax_head.sums", 2 * max_rows);
  return memory.bytes();
}

template <precision_policy Precision, class Gemm>
std::size_t softmax_head<Precision, Gemm>::workspace_bytes(std::int64_t max_rows) const {
  memory_builder memory;
  memory.take<accumulate>("softmax_head.logits", tile_of(max_rows) * vocabulary_);
  return memory.bytes();
}

template <precision_policy Precision, class Gemm>
auto softmax_head<Precision, Gemm>::logits_of(workspace_memory workspace, std::int64_t rows) const -> accumulate* {
  memory_builder memory(workspace, "softmax_head workspace");
  return memory.take<accumulate>("softmax_head.logits", tile_of(rows) * vocabulary_);
}

template <precision_policy Precision, class Gemm>
auto softmax_head<Precision, Gemm>::sums_of(saved_memory saved, std::int64_t rows) -> accumulate* {
  memory_builder memory(saved, "softmax_head saved memory");
  return memory.take<accumulate>("softmax_head.sums", 2 * rows);
}

template <precision_policy Precision, class Gemm>
void softmax_head<Precision, Gemm>::compute_logits(matrix_view<const storage> x, accumulate* logits) const {
  const std::int32_t all[] = {0, static_cast<std::int32_t>(x.rows)};
  backend::template variable_m<accumulate>(all, vocabulary_, hidden_, gemm::row_operand<storage>{x.data, x.stride},
                                           gemm::group_operand<const storage>{weight_.values, 0, hidden_, 1},
                                           static_cast<const accumulate*>(nullptr),
                                           matrix_view<accumulate>(logits, x.rows, vocabulary_));
}

template <precision_policy Precision, class Gemm>
void softmax_head<Precision, Gemm>::expect(const depth_rows& rows, const matrix_view<const storage>& x) const {
  expect_matrix(x, static_cast<std::int64_t>(rows.targets.size()), hidden_, "softmax_head: x");
  detail::expect_chunks(rows, x.rows, "softmax_head");
  for (std::size_t i = 0; i < rows.targets.size(); ++i)
    TESSERA_EXPECTS(rows.targets[i] < vocabulary_, "softmax_head: the target of row "
                                                       << i << " at depth " << rows.depth << " is " << rows.targets[i]
                                                       << ", ids are below " << vocabulary_);
}

// The logits' gradient of a tile, false (and nothing done) if no row of it has a target.
template <precision_policy Precision, class Gemm>
bool softmax_head<Precision, Gemm>::differentiate(std::span<const std::int32_t> targets, const accumulate* sums,
                                                  double factor, matrix_view<const storage> x,
                                                  accumulate* logits) const {
  if (!detail::has_target(targets)) return false;
  compute_logits(x, logits);
  const auto scale = static_cast<accumulate>(factor);
  for (std::size_t i = 0; i < targets.size(); ++i) {
    accumulate* row = logits + static_cast<std::int64_t>(i) * vocabulary_;
    if (targets[i] < 0) {
      detail::zero_row(vocabulary_, row);
      continue;
    }
    const accumulate factor_of_row = scale / sums[2 * i + 1];
    for (std::int64_t v = 0; v < vocabulary_; ++v) row[v] = factor_of_row * std::exp(row[v] - sums[2 * i]);
    row[targets[i]] -= scale;
  }
  return true;
}

template <precision_policy Precision, class Gemm>
void softmax_head<Precision, Gemm>::forward([[maybe_unused]] host_stream stream, [[maybe_unused]] pass mode,
                                            const depth_rows& rows, matrix_view<const storage> x,
                                            std::span<double> losses, saved_memory saved,
                                            workspace_memory workspace) const {
  expect(rows, x);
  TESSERA_EXPECTS(
      static_cast<std::int64_t>(losses.size()) == rows.num_chunks(),
      "softmax_head: room for " << losses.size() << " losses, there are " << rows.num_chunks() << " chunks");
  accumulate* sums = sums_of(saved, x.rows);
  accumulate* logits = logits_of(workspace, x.rows);
  std::fill(losses.begin(), losses.end(), 0.0);
  std::size_t chunk = 0;
  for (std::int64_t first = 0; first < x.rows; first += tile_rows_) {
    const std::int64_t count = std::min(tile_rows_, x.rows - first);
    const auto targets = rows.targets.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    const bool any = detail::has_target(targets);
    if (any) compute_logits(x.subrows(first, count), logits);
    for (std::int64_t i = 0; i < count; ++i) {
      while (first + i >= rows.chunk_offsets[chunk + 1]) ++chunk;
      const std::int32_t target = targets[static_cast<std::size_t>(i)];
      if (target < 0) continue;
      const accumulate* row = logits + i * vocabulary_;
      const accumulate largest = *std::max_element(row, row + vocabulary_);
      const accumulate sum =
          detail::sum_in_lanes<accumulate>(vocabulary_, [&](std::int64_t v) { return std::exp(row[v] - largest); });
      sums[2 * (first + i)] = largest;
      sums[2 * (first + i) + 1] = sum;
      const auto loss = static_cast<double>(std::log(sum) - (row[target] - largest));
      TESSERA_EXPECTS(std::isfinite(loss),
                      "softmax_head: the loss of row " << first + i << " at depth " << rows.depth << " is " << loss);
      losses[chunk] += loss;
    }
  }
}

template <precision_policy Precision, class Gemm>
void softmax_head<Precision, Gemm>::backward_input([[maybe_unused]] host_stream stream, const depth_rows& rows,
                                                   matrix_view<const storage> x, double factor, matrix_view<storage> dx,
                                                   saved_memory saved, [[maybe_unused]] deferred_memory deferred,
                                                   workspace_memory workspace) const {
  expect(rows, x);
  expect_matrix(dx, x.rows, hidden_, "softmax_head: dx");
  const accumulate* sums = sums_of(saved, x.rows);
  accumulate* logits = logits_of(workspace, x.rows);
  for (std::int64_t first = 0; first < x.rows; first += tile_rows_) {
    const std::int64_t count = std::min(tile_rows_, x.rows - first);
    const auto targets = rows.targets.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    if (!differentiate(targets, sums + 2 * first, factor, x.subrows(first, count), logits)) {
      for (std::int64_t i = first; i < first + count; ++i) detail::zero_row(hidden_, dx.row(i));
      continue;
    }
    const std::int32_t all[] = {0, static_cast<std::int32_t>(count)};
    backend::template variable_m<accumulate>(all, hidden_, vocabulary_,
                                             gemm::row_operand<accumulate>{logits, vocabulary_},
                                             gemm::group_operand<const storage>{weight_.values, 0, 1, hidden_},
                                             static_cast<const accumulate*>(nullptr), dx.subrows(first, count));
  }
}

template <precision_policy Precision, class Gemm>
void softmax_head<Precision, Gemm>::backward_weights([[maybe_unused]] host_stream stream, const depth_rows& rows,
                                                     matrix_view<const storage> x, double factor, saved_memory saved,
                                                     [[maybe_unused]] deferred_memory deferred,
                                                     workspace_memory workspace) const {
  expect(rows, x);
  if (rows.num_chunks() == 0) return;
  detail::expect_gradient(rows, weight_.gradient, weight_.gradient_stride, vocabulary_ * hidden_, "softmax_head");
  const accumulate* sums = sums_of(saved, x.rows);
  accumulate* logits = logits_of(workspace, x.rows);
  // Tiles start at chunks, so that their sums are the same wherever in the batch a chunk stands.
  for (std::size_t c = 0; c + 1 < rows.chunk_offsets.size(); ++c) {
    const std::int64_t end = rows.chunk_offsets[c + 1];
    for (std::int64_t first = rows.chunk_offsets[c]; first < end; first += tile_rows_) {
      const std::int64_t count = std::min(tile_rows_, end - first);
      const auto targets = rows.targets.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
      const matrix_view<const storage> part = x.subrows(first, count);
      if (!differentiate(targets, sums + 2 * first, factor, part, logits)) continue;
      const std::int32_t all[] = {0, static_cast<std::int32_t>(count)};
      accumulate* gradient = weight_.gradient + static_cast<std::int64_t>(c) * weight_.gradient_stride;
      backend::template variable_k<accumulate>(
          all, vocabulary_, hidden_, gemm::row_operand<accumulate>{logits, vocabulary_},
          gemm::row_operand<storage>{part.data, part.stride}, gemm::group_operand<accumulate>{gradient, 0, hidden_, 1},
          write::accumulate);
    }
  }
}

template <precision_policy Precision, class Gemm>
void softmax_head<Precision, Gemm>::greedy([[maybe_unused]] host_stream stream, matrix_view<const storage> x,
                                           std::span<std::int32_t> tokens, workspace_memory workspace) const {
  expect_matrix(x, static_cast<std::int64_t>(tokens.size()), hidden_, "softmax_head: x");
  accumulate* logits = logits_of(workspace, x.rows);
  for (std::int64_t first = 0; first < x.rows; first += tile_rows_) {
    const std::int64_t count = std::min(tile_rows_, x.rows - first);
    compute_logits(x.subrows(first, count), logits);
    for (std::int64_t i = 0; i < count; ++i)
      tokens[static_cast<std::size_t>(first + i)] = detail::index_of_largest(logits + i * vocabulary_, vocabulary_);
  }
}

}  // namespace mtp

TESSERA_NAMESPACE_END
