// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Definitions of mtp/chain.hpp.

#include <algorithm>

#include <tessera/mtp/chain.hpp>
#include <tessera/mtp/detail/row_math.hpp>

// The head of a member of `chain`, which nine lines would say otherwise.
#define TESSERA_MTP_CHAIN_TEMPLATE                                                                                 \
  template <class Block, class Precision, class Concat, class Embedding, class Head, class Norm, class Projection, \
            int Depth>
#define TESSERA_MTP_CHAIN chain<Block, Precision, Concat, Embedding, Head, Norm, Projection, Depth>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

TESSERA_MTP_CHAIN_TEMPLATE
TESSERA_MTP_CHAIN::chain(const chain_shape& shape, std::span<const parts> depths, Embedding& embedding, Head& head)
    : shape_(shape), embedding_(&embedding), head_(&head) {
  TESSERA_EXPECTS(shape.hidden >= 1 && shape.max_rows >= 0 && shape.max_rows <= INT32_MAX && shape.max_chunks >= 0,
                  "mtp::chain needs hidden >= 1, 0 <= max_rows < 2^31 and max_chunks >= 0, got "
                      << shape.hidden << ", " << shape.max_rows << " and " << shape.max_chunks);
  TESSERA_EXPECTS(!depths.empty() && (Depth == 0 || depths.size() == static_cast<std::size_t>(Depth)),
                  "mtp::chain is given the parts of " << depths.size() << " depths, it needs "
                                                      << (Depth == 0 ? 1 : Depth) << (Depth == 0 ? " or more" : ""));
  for (std::size_t k = 0; k < depths.size(); ++k)
    TESSERA_EXPECTS(depths[k].hidden_norm != nullptr && depths[k].embedding_norm != nullptr &&
                        depths[k].projection != nullptr && depths[k].block != nullptr,
                    "mtp::chain: depth " << k + 1 << " lacks a norm, the projection or the block");
  if constexpr (Depth == 0) depths_.resize(depths.size());
  std::copy(depths.begin(), depths.end(), depths_.begin());

  memory_builder saved, deferred, workspace, eval;
  carve_saved(saved, depth());
  carve_deferred(deferred, depth());
  carve_scratch(workspace);
  carve_saved(eval, depth());
  carve_scratch(eval);
  sizes_ = {saved.bytes(), deferred.bytes(), workspace.bytes(), eval.bytes()};
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// The slices of depths 1 to `last`; answers those of `last`. Depths lie one after another, so a prefix is a prefix.
TESSERA_MTP_CHAIN_TEMPLATE
auto TESSERA_MTP_CHAIN::carve_saved(memory_builder& memory, int last) const -> saved_view {
  const std::int64_t rows = shape_.max_rows, d = shape_.hidden;
  saved_view view;
  view.counts = memory.take<std::int64_t>("mtp.counts", 3 + depth());
  view.documents = memory.take<std::int32_t>("mtp.documents", rows + 1);
  for (int k = 1; k <= last; ++k) {
    const parts& own = depths_[index(k)];
    const auto part = [&](const char* name, const auto* layer) {
      return detail::take_memory<lifetime::saved>(memory, name, layer == nullptr ? 0 : layer->saved_bytes(rows));
    };
    view.lists = detail::row_lists::layout(memory, rows, shape_.max_chunks);
    view.joined = memory.take<storage>("mtp.joined", rows * 2 * d);
    view.mixed = memory.take<storage>("mtp.mixed", rows * d);
    view.hidden = memory.take<storage>("mtp.hidden", rows * d);
    view.normed = memory.take<storage>("mtp.normed", own.output_norm == nullptr ? 0 : rows * d);
    view.hidden_norm = part("mtp.hidden_norm", own.hidden_norm);
    view.embedding_norm = part("mtp.embedding_norm", own.embedding_norm);
    view.projection = part("mtp.projection", own.projection);
    view.block = part("mtp.block", own.block);
    view.output_norm = part("mtp.output_norm", own.output_norm);
    view.head = part("mtp.head", head_);
  }
  return view;
}

TESSERA_MTP_CHAIN_TEMPLATE
auto TESSERA_MTP_CHAIN::carve_deferred(memory_builder& memory, int last) const -> deferred_view {
  const std::int64_t rows = shape_.max_rows, d = shape_.hidden;
  deferred_view view;
  for (int k = 1; k <= last; ++k) {
    const parts& own = depths_[index(k)];
    const auto part = [&](const char* name, const auto* layer) {
      return detail::take_memory<lifetime::deferred>(memory, name, layer == nullptr ? 0 : layer->deferred_bytes(rows));
    };
    view.dnormed = memory.take<storage>("mtp.dnormed", own.output_norm == nullptr ? 0 : rows * d);
    view.dhidden = memory.take<storage>("mtp.dhidden", rows * d);
    view.dmixed = memory.take<storage>("mtp.dmixed", rows * d);
    view.djoined = memory.take<storage>("mtp.djoined", rows * 2 * d);
    view.dembedded = memory.take<storage>("mtp.dembedded", rows * d);
    view.hidden_norm = part("mtp.hidden_norm", own.hidden_norm);
    view.embedding_norm = part("mtp.embedding_norm", own.embedding_norm);
    view.projection = part("mtp.projection", own.projection);
    view.block = part("mtp.block", own.block);
    view.output_norm = part("mtp.output_norm", own.output_norm);
    view.head = part("mtp.head", head_);
  }
  return view;
}

TESSERA_MTP_CHAIN_TEMPLATE
auto TESSERA_MTP_CHAIN::carve_scratch(memory_builder& memory) const -> scratch_view {
  const std::int64_t rows = shape_.max_rows, d = shape_.hidden;
  scratch_view view;
  view.gathered = memory.take<storage>("mtp.gathered", rows * d);
  view.embedded = memory.take<storage>("mtp.embedded", rows * d);
  view.dhead = memory.take<storage>("mtp.dhead", rows * d);
  view.dinput = memory.take<storage>("mtp.dinput", rows * d);
  std::size_t most = head_->workspace_bytes(rows);
  for (const parts& own : depths_) {
    most = std::max<std::size_t>(most, own.hidden_norm->workspace_bytes(rows));
    most = std::max<std::size_t>(most, own.embedding_norm->workspace_bytes(rows));
    most = std::max<std::size_t>(most, own.projection->workspace_bytes(rows));
    most = std::max<std::size_t>(most, own.block->workspace_bytes(rows));
    if (own.output_norm != nullptr) most = std::max<std::size_t>(most, own.output_norm->workspace_bytes(rows));
  }
  view.part = detail::take_memory<lifetime::workspace>(memory, "mtp.part", most);
  return view;
}

TESSERA_MTP_CHAIN_TEMPLATE
auto TESSERA_MTP_CHAIN::saved_of(saved_memory saved, int k) const -> saved_view {
  memory_builder memory(saved, "mtp saved memory");
  return carve_saved(memory, k);
}

TESSERA_MTP_CHAIN_TEMPLATE
auto TESSERA_MTP_CHAIN::deferred_of(deferred_memory deferred, int k) const -> deferred_view {
  memory_builder memory(deferred, "mtp deferred memory");
  return carve_deferred(memory, k);
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks and rows

TESSERA_MTP_CHAIN_TEMPLATE
std::int64_t TESSERA_MTP_CHAIN::expect_call(const batch& in, const matrix_view<const storage>& hidden) const {
  const std::int64_t rows = detail::expect_batch(in);
  TESSERA_EXPECTS(rows <= shape_.max_rows,
                  "mtp::chain: a batch of " << rows << " rows, the chain has room for " << shape_.max_rows);
  TESSERA_EXPECTS(
      detail::count_chunks(in) <= shape_.max_chunks,
      "mtp::chain: a batch of " << detail::count_chunks(in) << " chunks, the chain has room for " << shape_.max_chunks);
  expect_matrix(hidden, rows, shape_.hidden, "mtp::chain: hidden");
  return rows;
}

TESSERA_MTP_CHAIN_TEMPLATE
void TESSERA_MTP_CHAIN::expect_saved(const batch& in, const saved_view& saved) const {
  const auto rows = static_cast<std::int64_t>(in.token_ids.size());
  TESSERA_EXPECTS(saved.counts[0] == rows && saved.counts[1] == detail::count_chunks(in),
                  "mtp::chain: forward has saved " << saved.counts[0] << " rows in " << saved.counts[1]
                                                   << " chunks, backward is given " << rows << " in "
                                                   << detail::count_chunks(in));
}

TESSERA_MTP_CHAIN_TEMPLATE
depth_rows TESSERA_MTP_CHAIN::rows_of(const saved_view& saved, int k) const {
  return saved.lists.view(k, saved.counts[2 + k], saved.counts[2], saved.counts[1]);
}

// The hidden states that depth k starts from: rows of the depth before, or of the main model.
TESSERA_MTP_CHAIN_TEMPLATE
auto TESSERA_MTP_CHAIN::input_of(const saved_view& before, const saved_view& own, matrix_view<const storage> hidden,
                                 int k, storage* gathered) const -> matrix_view<const storage> {
  const std::int64_t d = shape_.hidden, count = own.counts[2 + k], documents = own.counts[2];
  const matrix_view<const storage> from =
      k == 1 ? hidden : matrix_view<const storage>(before.hidden, own.counts[1 + k], d);
  // One document loses rows at its end only.
  if (shape_.rows == row_policy::all || documents <= 1) return from.subrows(0, count);
  const std::int32_t* from_offsets = k == 1 ? own.documents : before.lists.sequence_offsets;
  for (std::int64_t n = 0; n < documents; ++n)
    for (std::int64_t row = own.lists.sequence_offsets[n]; row < own.lists.sequence_offsets[n + 1]; ++row)
      detail::copy_row(from.row(from_offsets[n] + row - own.lists.sequence_offsets[n]), d, gathered + row * d);
  return {gathered, count, d};
}

// A part that several depths share writes its gradient the first time and adds to it afterwards.
TESSERA_MTP_CHAIN_TEMPLATE
write TESSERA_MTP_CHAIN::mode_of(write mode, int k, const void* part) const {
  for (int before = 1; before < k; ++before) {
    const parts& other = depths_[index(before)];
    if (part == other.hidden_norm || part == other.embedding_norm || part == other.projection || part == other.block ||
        part == other.output_norm)
      return write::accumulate;
  }
  return mode;
}

// ---------------------------------------------------------------------------------------------------------------------
// Passes

// One depth up to the head's input.
TESSERA_MTP_CHAIN_TEMPLATE
void TESSERA_MTP_CHAIN::forward_depth(host_stream stream, pass mode, const depth_rows& rows,
                                      matrix_view<const storage> before, int k, const saved_view& own,
                                      const scratch_view& scratch) const {
  const parts& layers = depths_[index(k)];
  const std::int64_t d = shape_.hidden, count = before.rows;
  const matrix_view<storage> embedded(scratch.embedded, count, d), joined(own.joined, count, 2 * d),
      mixed(own.mixed, count, d), hidden(own.hidden, count, d);
  layers.hidden_norm->forward(stream, mode, rows, before,
                              matrix_view<storage>(own.joined + Concat::hidden_column(d), count, d, 2 * d),
                              own.hidden_norm, scratch.part);
  embedding_->forward(stream, rows, embedded);
  layers.embedding_norm->forward(stream, mode, rows, matrix_view<const storage>(embedded),
                                 matrix_view<storage>(own.joined + Concat::embedding_column(d), count, d, 2 * d),
                                 own.embedding_norm, scratch.part);
  layers.projection->forward(stream, mode, rows, matrix_view<const storage>(joined), mixed, own.projection,
                             scratch.part);
  layers.block->forward(stream, mode, rows, matrix_view<const storage>(mixed), hidden, own.block, scratch.part);
  if (layers.output_norm != nullptr)
    layers.output_norm->forward(stream, mode, rows, matrix_view<const storage>(hidden),
                                matrix_view<storage>(own.normed, count, d), own.output_norm, scratch.part);
}

TESSERA_MTP_CHAIN_TEMPLATE
void TESSERA_MTP_CHAIN::forward(host_stream stream, pass mode, const batch& in, matrix_view<const storage> hidden,
                                std::span<double> losses, saved_memory saved, workspace_memory workspace) const {
  const std::int64_t total = expect_call(in, hidden);
  const auto chunks = static_cast<std::size_t>(detail::count_chunks(in));
  TESSERA_EXPECTS(losses.size() == chunks * static_cast<std::size_t>(depth()),
                  "mtp::chain: room for " << losses.size() << " losses, " << depth() << " depths of " << chunks
                                          << " chunks have " << chunks * static_cast<std::size_t>(depth()));
  memory_builder memory(workspace, "mtp workspace");
  if (mode == pass::eval) {
    const auto bytes = static_cast<std::int64_t>(sizes_.saved_bytes);
    saved = {memory.take<std::byte>("mtp.saved_for_eval", bytes), sizes_.saved_bytes};
  }
  const scratch_view scratch = carve_scratch(memory);
  saved_of(saved, depth());  // before anything is written: that the memory is there

  saved_view before;
  for (int k = 1; k <= depth(); ++k) {
    const saved_view own = saved_of(saved, k);
    if (k == 1) {
      own.counts[0] = total;
      own.counts[1] = static_cast<std::int64_t>(chunks);
      own.counts[2] = detail::list_documents(in, own.documents);
    }
    own.counts[2 + k] = detail::list_rows(in, own.documents, own.counts[2], k, shape_.rows, own.lists);
    const depth_rows rows = rows_of(own, k);
    forward_depth(stream, mode, rows, input_of(before, own, hidden, k, scratch.gathered), k, own, scratch);
    const storage* out = own.normed == nullptr ? own.hidden : own.normed;
    head_->forward(stream, mode, rows, matrix_view<const storage>(out, own.counts[2 + k], shape_.hidden),
                   losses.subspan(index(k) * chunks, chunks), own.head, scratch.part);
    before = own;
  }
}

TESSERA_MTP_CHAIN_TEMPLATE
void TESSERA_MTP_CHAIN::backward_input(host_stream stream, const batch& in, matrix_view<const storage> hidden,
                                       std::span<const double> factors, matrix_view<storage> hidden_gradient,
                                       write mode, saved_memory saved, deferred_memory deferred,
                                       workspace_memory workspace) const {
  const std::int64_t total = expect_call(in, hidden), d = shape_.hidden;
  TESSERA_EXPECTS(factors.size() == depths_.size(),
                  "mtp::chain: " << factors.size() << " factors for " << depth() << " depths");
  expect_matrix(hidden_gradient, total, d, "mtp::chain: hidden_gradient");
  expect_disjoint(hidden, "hidden", hidden_gradient, "hidden_gradient");
  memory_builder memory(workspace, "mtp workspace");
  const scratch_view scratch = carve_scratch(memory);
  expect_saved(in, saved_of(saved, depth()));
  deferred_of(deferred, depth());

  for (int k = depth(); k >= 1; --k) {
    const parts& layers = depths_[index(k)];
    const saved_view own = saved_of(saved, k), before = k == 1 ? saved_view{} : saved_of(saved, k - 1);
    const deferred_view grads = deferred_of(deferred, k);
    const depth_rows rows = rows_of(own, k);
    const std::int64_t count = own.counts[2 + k];
    const auto read = [&](storage* data) { return matrix_view<const storage>(data, count, d); };
    const auto written = [&](storage* data) { return matrix_view<storage>(data, count, d); };

    // What the head wants of the block's output, and then what the next depth wants of it.
    if (layers.output_norm != nullptr) {
      head_->backward_input(stream, rows, read(own.normed), factors[index(k)], written(grads.dnormed), own.head,
                            grads.head, scratch.part);
      layers.output_norm->backward_input(stream, rows, read(own.hidden), read(grads.dnormed), written(scratch.dhead),
                                         own.output_norm, grads.output_norm, scratch.part);
    } else {
      head_->backward_input(stream, rows, read(own.hidden), factors[index(k)], written(scratch.dhead), own.head,
                            grads.head, scratch.part);
    }
    for (std::int64_t row = 0; row < count; ++row)
      detail::copy_row(scratch.dhead + row * d, d, grads.dhidden + row * d);
    if (k < depth()) {
      const detail::row_lists next = saved_of(saved, k + 1).lists;
      for (std::int64_t n = 0; n < own.counts[2]; ++n)
        for (std::int64_t row = next.sequence_offsets[n]; row < next.sequence_offsets[n + 1]; ++row)
          detail::add_row<accumulate>(
              scratch.dinput + row * d, d,
              grads.dhidden + (own.lists.sequence_offsets[n] + row - next.sequence_offsets[n]) * d);
    }

    layers.block->backward_input(stream, rows, read(own.mixed), read(grads.dhidden), written(grads.dmixed), own.block,
                                 grads.block, scratch.part);
    // Rows without a token have no part in anything before the block, whatever its balance losses say.
    for (std::int64_t row = 0; row < count; ++row)
      if (own.lists.token_ids[row] < 0) detail::zero_row(d, grads.dmixed + row * d);

    layers.projection->backward_input(stream, rows, matrix_view<const storage>(own.joined, count, 2 * d),
                                      read(grads.dmixed), matrix_view<storage>(grads.djoined, count, 2 * d),
                                      own.projection, grads.projection, scratch.part);
    const matrix_view<const storage> dhidden_half(grads.djoined + Concat::hidden_column(d), count, d, 2 * d),
        dembedding_half(grads.djoined + Concat::embedding_column(d), count, d, 2 * d);
    layers.hidden_norm->backward_input(stream, rows, input_of(before, own, hidden, k, scratch.gathered), dhidden_half,
                                       written(scratch.dinput), own.hidden_norm, grads.hidden_norm, scratch.part);
    embedding_->forward(stream, rows, written(scratch.embedded));
    layers.embedding_norm->backward_input(stream, rows, read(scratch.embedded), dembedding_half,
                                          written(grads.dembedded), own.embedding_norm, grads.embedding_norm,
                                          scratch.part);
  }

  const saved_view first = saved_of(saved, 1);
  if (mode == write::overwrite)
    for (std::int64_t row = 0; row < total; ++row) detail::zero_row(d, hidden_gradient.row(row));
  for (std::int64_t i = 0; i < first.counts[3]; ++i) {
    storage* to = hidden_gradient.row(first.lists.rows[i]);
    if (mode == write::overwrite)
      detail::copy_row(scratch.dinput + i * d, d, to);
    else
      detail::add_row<accumulate>(scratch.dinput + i * d, d, to);
  }
}

TESSERA_MTP_CHAIN_TEMPLATE
void TESSERA_MTP_CHAIN::backward_weights(host_stream stream, const batch& in, matrix_view<const storage> hidden,
                                         std::span<const double> factors, write mode, saved_memory saved,
                                         deferred_memory deferred, workspace_memory workspace) const {
  expect_call(in, hidden);
  const std::int64_t d = shape_.hidden;
  TESSERA_EXPECTS(factors.size() == depths_.size(),
                  "mtp::chain: " << factors.size() << " factors for " << depth() << " depths");
  memory_builder memory(workspace, "mtp workspace");
  const scratch_view scratch = carve_scratch(memory);
  expect_saved(in, saved_of(saved, depth()));
  deferred_of(deferred, depth());

  for (int k = 1; k <= depth(); ++k) {
    const parts& layers = depths_[index(k)];
    const saved_view own = saved_of(saved, k), before = k == 1 ? saved_view{} : saved_of(saved, k - 1);
    const deferred_view grads = deferred_of(deferred, k);
    const depth_rows rows = rows_of(own, k);
    const std::int64_t count = own.counts[2 + k];
    const auto read = [&](storage* data) { return matrix_view<const storage>(data, count, d); };

    head_->backward_weights(stream, rows, read(own.normed == nullptr ? own.hidden : own.normed), factors[index(k)],
                            own.head, grads.head, scratch.part);
    if (layers.output_norm != nullptr)
      layers.output_norm->backward_weights(stream, rows, read(own.hidden), read(grads.dnormed), own.output_norm,
                                           grads.output_norm, mode_of(mode, k, layers.output_norm), scratch.part);
    layers.block->backward_weights(stream, rows, read(own.mixed), read(grads.dhidden), own.block, grads.block,
                                   mode_of(mode, k, layers.block), scratch.part);
    layers.projection->backward_weights(stream, rows, matrix_view<const storage>(own.joined, count, 2 * d),
                                        read(grads.dmixed), own.projection, grads.projection,
                                        mode_of(mode, k, layers.projection), scratch.part);
    const matrix_view<const storage> dhidden_half(grads.djoined + Concat::hidden_column(d), count, d, 2 * d),
        dembedding_half(grads.djoined + Concat::embedding_column(d), count, d, 2 * d);
    layers.hidden_norm->backward_weights(stream, rows, input_of(before, own, hidden, k, scratch.gathered), dhidden_half,
                                         own.hidden_norm, grads.hidden_norm, mode_of(mode, k, layers.hidden_norm),
                                         scratch.part);
    embedding_->forward(stream, rows, matrix_view<storage>(scratch.embedded, count, d));
    layers.embedding_norm->backward_weights(stream, rows, read(scratch.embedded), dembedding_half, own.embedding_norm,
                                            grads.embedding_norm, mode_of(mode, k, layers.embedding_norm),
                                            scratch.part);
    embedding_->backward_weights(stream, rows, read(grads.dembedded));
  }
}

TESSERA_MTP_CHAIN_TEMPLATE
void TESSERA_MTP_CHAIN::draft(host_stream stream, matrix_view<const storage> hidden,
                              std::span<const std::int32_t> token_ids, std::span<const std::int32_t> positions,
                              std::span<std::int32_t> drafts, workspace_memory workspace) const requires
    head_has_greedy<Head, typename Precision::storage> {
  const std::int64_t count = hidden.rows, d = shape_.hidden;
  expect_matrix(hidden, -1, d, "mtp::chain: hidden");
  TESSERA_EXPECTS(count <= shape_.max_rows && shape_.max_chunks >= 1,
                  "mtp::chain: drafting after " << count << " rows, the chain has room for " << shape_.max_rows
                                                << " in " << shape_.max_chunks << " chunks");
  TESSERA_EXPECTS(static_cast<std::int64_t>(token_ids.size()) == (count == 0 ? 0 : count + 1),
                  "mtp::chain: drafting after " << count << " rows takes " << (count == 0 ? 0 : count + 1)
                                                << " token ids, there are " << token_ids.size());
  TESSERA_EXPECTS(positions.empty() || static_cast<std::int64_t>(positions.size()) == count,
                  "mtp::chain: " << positions.size() << " positions of " << count << " rows");
  TESSERA_EXPECTS(drafts.size() <= depths_.size(),
                  "mtp::chain: " << drafts.size() << " drafts from " << depth() << " depths");
  memory_builder memory(workspace, "mtp workspace");
  const auto bytes = static_cast<std::int64_t>(sizes_.saved_bytes);
  const saved_memory saved{memory.take<std::byte>("mtp.saved_for_eval", bytes), sizes_.saved_bytes};
  const scratch_view scratch = carve_scratch(memory);

  matrix_view<const storage> before = hidden;
  for (std::size_t n = 0; n < drafts.size(); ++n) {
    const int k = static_cast<int>(n) + 1;
    const saved_view own = saved_of(saved, k);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto shifted = static_cast<std::size_t>(i + k);
      own.lists.rows[i] = static_cast<std::int32_t>(i);
      own.lists.token_ids[i] = shifted < token_ids.size() ? token_ids[shifted] : drafts[shifted - token_ids.size()];
      own.lists.targets[i] = -1;
      own.lists.positions[i] =
          positions.empty() ? static_cast<std::int32_t>(i) : positions[static_cast<std::size_t>(i)];
    }
    own.lists.sequence_offsets[0] = own.lists.chunk_offsets[0] = 0;
    if (count > 0) own.lists.sequence_offsets[1] = static_cast<std::int32_t>(count);
    own.lists.chunk_offsets[1] = static_cast<std::int32_t>(count);
    forward_depth(stream, pass::eval, own.lists.view(k, count, count == 0 ? 0 : 1, 1), before, k, own, scratch);
    if (count > 0)
      head_->greedy(
          stream, matrix_view<const storage>((own.normed == nullptr ? own.hidden : own.normed) + (count - 1) * d, 1, d),
          drafts.subspan(n, 1), scratch.part);
    before = {own.hidden, count, d};
  }
}

}  // namespace mtp

TESSERA_NAMESPACE_END

#undef TESSERA_MTP_CHAIN_TEMPLATE
#undef TESSERA_MTP_CHAIN
