// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The chain of multi-token prediction: forward, and a backward in two parts that may run at different times.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include <tessera/core/memory.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/precision.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/mtp/concat.hpp>
#include <tessera/mtp/detail/chain_memory.hpp>
#include <tessera/mtp/embedding.hpp>
#include <tessera/mtp/head.hpp>
#include <tessera/mtp/linear.hpp>
#include <tessera/mtp/norm.hpp>
#include <tessera/mtp/parts.hpp>
#include <tessera/mtp/rows.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// The parts of one depth that are its own. Pointers to the engine's objects, which outlive the chain. Depths may share
/// a part: its gradient is then the sum over them.
/// @tparam Block The block. @tparam Norm The norms. @tparam Projection The projection.
template <class Block, class Norm, class Projection>
struct depth_parts {
  Norm* hidden_norm = nullptr;       ///< Of the hidden state of the depth before.
  Norm* embedding_norm = nullptr;    ///< Of the embedding.
  Projection* projection = nullptr;  ///< `M_k`, `[d, 2 d]`, columns in the order of the concatenation.
  Block* block = nullptr;            ///< `TRM_k`, `[R, d]` to `[R, d]`.
  Norm* output_norm = nullptr;       ///< Before the head; null: the head takes the block's output as it is.
};

/// Sizes of a chain, and how it treats rows without a token.
struct chain_shape {
  std::int64_t hidden = 0;              ///< d.
  std::int64_t max_rows = 0;            ///< Bound of T, rows of one rank in a call.
  std::int64_t max_chunks = 1;          ///< Bound of C, chunks of one rank in a call.
  row_policy rows = row_policy::valid;  ///< Which rows a depth computes.
};

/// Bytes of each memory class on one rank: pure functions of bounds.
struct chain_sizes {
  std::size_t saved_bytes = 0;      ///< Per micro-batch, from forward to `backward_weights`.
  std::size_t deferred_bytes = 0;   ///< Per micro-batch, from `backward_input` to `backward_weights`.
  std::size_t workspace_bytes = 0;  ///< During one call, any pass but eval.
  std::size_t eval_workspace_bytes =
      0;  ///< During forward with `pass::eval`, which needs no saved memory, and `draft`.
};

/// Multi-token prediction of depth D behind a main model (DeepSeek-V3, arXiv 2412.19437, equations 21 to 25):
///
///     h'_i^k = M_k [norm(h_i^{k-1}); norm(Emb(t_{i+k}))]      h^k = TRM_k(h'^k)      P_i^k = Head(h_i^k)
///     L^k = -1/divisor sum_i log P_i^k[t_{i+k+1}]             L_MTP = lambda / D sum_k L^k
///
/// The chain is causal and complete: depth k takes depth k - 1's state of the same position; depth 1 takes the main
/// model's hidden state **before its final norm**. Embedding and head are the main model's.
///
/// Rows whose next k tokens are not all of their document do not take part at depth k (`batch`). Where a target is
/// negative there is no loss; the row still carries the chain on. Positions stay those of the batch at every depth.
///
/// **Rows over ranks.** Each rank has whole sequences; the chain communicates nothing of its own, so it works under any
/// data, expert (in its block) and pipeline parallelism. Under a pipeline it is part of the last stage: forward after
/// the stage's layers, `backward_input` before theirs, with `hidden_gradient` added to the main model's; embedding and
/// head must be there (a rank that has the first stage too shares the table itself; otherwise the table is a copy whose
/// gradient is added to the first stage's). Embedding and head add row by row; where the pipeline wants a micro-batch's
/// contribution complete before it is added (a stage in two places), let the parts write to a buffer that is zeroed for
/// each micro-batch, and add that.
///
/// **Chunks.** Parts contribute to gradients and losses chunk by chunk (`batch::chunk_offsets`, whole sequences). With
/// parts whose rows do not depend on other sequences, contributions have the same bits on any number of ranks, and
/// `ordered_all_reduce` keeps that.
///
/// The object holds sizes and pointers; the caller owns all memory, and calls do not allocate. Host: every call returns
/// when it is done. If a call throws, outputs and memory given to it are undefined. Different micro-batches may be
/// under way at once, each with its own saved and deferred memory.
///
/// @tparam Block      `row_layer` of width d, causal within a document. Model: `residual_moe`; usually the engine's
/// own.
/// @tparam Precision  Element types; models `precision_policy`.
/// @tparam Concat     `concat::hidden_first` or `concat::embedding_first`: a checkpoint has one of them.
/// @tparam Embedding  `embedding_part`. @tparam Head `head_part`. @tparam Norm `row_layer` of width d.
/// @tparam Projection `row_layer` from 2 d to d.
/// @tparam Depth      D at compile time (nothing is allocated at construction either); 0 leaves it to run time.
template <class Block, class Precision, class Concat, class Embedding = token_embedding<Precision>,
          class Head = softmax_head<Precision>, class Norm = rms_norm<Precision>, class Projection = linear<Precision>,
          int Depth = 0>
class chain {
  static_assert(precision_policy<Precision>,
                "mtp::chain: the second argument must be a precision policy: precision::bf16, precision::fp32, "
                "precision::fp64, or your own precision::policy<...>");
  static_assert(row_layer<Block, typename Precision::storage>,
                "mtp::chain: the first argument, the block, must be a row layer (saved_bytes, deferred_bytes, "
                "workspace_bytes, forward, backward_input, backward_weights as in mtp/parts.hpp). Model: residual_moe");
  static_assert(concat_policy<Concat>,
                "mtp::chain: the third argument must be concat::hidden_first (equation 21) or concat::embedding_first "
                "(published weights)");
  static_assert(embedding_part<Embedding, typename Precision::storage>,
                "mtp::chain: the fourth argument must be an embedding (forward, backward_weights as in mtp/parts.hpp). "
                "Model: token_embedding");
  static_assert(head_part<Head, typename Precision::storage>,
                "mtp::chain: the fifth argument must be a head (saved_bytes, deferred_bytes, workspace_bytes, forward, "
                "backward_input, backward_weights as in mtp/parts.hpp). Model: softmax_head");
  static_assert(row_layer<Norm, typename Precision::storage>,
                "mtp::chain: the sixth argument, the norm, must be a row layer. Model: rms_norm");
  static_assert(row_layer<Projection, typename Precision::storage>,
                "mtp::chain: the seventh argument, the projection, must be a row layer. Model: linear");
  static_assert(Depth >= 0, "mtp::chain: the depth is not negative; 0 leaves it to run time");

 public:
  using storage = typename Precision::storage;         ///< Element of activations.
  using accumulate = typename Precision::accumulate;   ///< Element of sums.
  using parts = depth_parts<Block, Norm, Projection>;  ///< What each depth has of its own.

  /// @param shape     Sizes.
  /// @param depths    `[D]` parts of depths 1 to D; all but `output_norm` are needed.
  /// @param embedding The main model's embedding; outlives the chain.
  /// @param head      The main model's head; outlives the chain.
  /// @throws invalid_argument if there is no depth, a part is missing or a size is not positive.
  chain(const chain_shape& shape, std::span<const parts> depths, Embedding& embedding, Head& head);

  /// D.
  int depth() const noexcept { return static_cast<int>(depths_.size()); }
  /// Sizes.
  const chain_shape& shape() const noexcept { return shape_; }
  /// Bytes of each memory class.
  const chain_sizes& sizes() const noexcept { return sizes_; }

  /// Computes the losses of all depths.
  /// @param stream    Host stream.
  /// @param mode      `train` and `recompute` fill `saved`; `eval` does not. Blocks are told.
  /// @param in        Tokens, T rows, at most `max_rows`; at most `max_chunks` chunks.
  /// @param hidden    `[T, d]`, the main model's hidden state before its final norm; unchanged until
  /// `backward_weights`.
  /// @param losses    `[D, C]`, overwritten: sums of `-log P`, not weighted; `total_loss` makes one number of them.
  /// @param saved     `saved_bytes`; may be empty for `eval`.
  /// @param workspace `workspace_bytes`, or `eval_workspace_bytes` for `eval`.
  /// @throws invalid_argument if a shape, a length or a memory size is wrong; and what the parts throw.
  void forward(host_stream stream, pass mode, const batch& in, matrix_view<const storage> hidden,
               std::span<double> losses, saved_memory saved, workspace_memory workspace) const;

  /// Computes the gradient of the main model's hidden state.
  /// @param stream    Host stream.
  /// @param in        As in forward.
  /// @param hidden    As in forward.
  /// @param factors   `[D]` factor of each depth's terms in the total loss (`loss_factors`).
  /// @param hidden_gradient `[T, d]`; does not overlap `hidden`. Rows that take part at no depth get zero, or nothing
  ///                  added.
  /// @param mode      Overwrite, or add to what the main model has put there.
  /// @param saved     From forward; parts may consume theirs.
  /// @param deferred  `deferred_bytes`, written for `backward_weights`.
  /// @param workspace `workspace_bytes`.
  /// @throws invalid_argument if a shape, a length or a memory size is wrong; and what the parts throw.
  void backward_input(host_stream stream, const batch& in, matrix_view<const storage> hidden,
                      std::span<const double> factors, matrix_view<storage> hidden_gradient, write mode,
                      saved_memory saved, deferred_memory deferred, workspace_memory workspace) const;

  /// Computes the gradients of the parameters, which go where the parts say; any time after `backward_input`. Embedding
  /// and head always **add** to the gradients that they share with the main model, depth 1 first.
  /// @param stream    Host stream.
  /// @param in        As in forward.
  /// @param hidden    As in forward.
  /// @param factors   As in `backward_input`.
  /// @param mode      Of the depths' own parts: overwrite, or add.
  /// @param saved     As `backward_input` left it.
  /// @param deferred  From `backward_input`.
  /// @param workspace `workspace_bytes`.
  /// @throws invalid_argument if a shape, a length or a memory size is wrong; and what the parts throw.
  void backward_weights(host_stream stream, const batch& in, matrix_view<const storage> hidden,
                        std::span<const double> factors, write mode, saved_memory saved, deferred_memory deferred,
                        workspace_memory workspace) const;

  /// Proposes tokens after one document, greedily: `drafts[0]` is depth 1's prediction, computed from the last hidden
  /// state and the token that the main model chose after it; `drafts[1]` depth 2's from that, and so on. Every depth
  /// computes all n rows, so a call costs `n * drafts.size()` rows; an engine with caches in its blocks drafts by
  /// itself.
  ///
  /// Blocks are called with `pass::eval` on every depth. Where they communicate, all ranks call, with equally many
  /// drafts; a rank without a document gives none of its rows and gets no tokens.
  /// @param stream    Host stream.
  /// @param hidden    `[n, d]`, the main model's hidden state before its final norm.
  /// @param token_ids `[n + 1]`: the n tokens and the main model's choice after them; empty where n is 0.
  /// @param positions `[n]`, or empty: 0 to n - 1.
  /// @param drafts    At most D; written if n is not 0.
  /// @param workspace `eval_workspace_bytes`.
  /// @throws invalid_argument if a shape, a length or a memory size is wrong; and what the parts throw.
  void draft(host_stream stream, matrix_view<const storage> hidden, std::span<const std::int32_t> token_ids,
             std::span<const std::int32_t> positions, std::span<std::int32_t> drafts,
             workspace_memory workspace) const requires head_has_greedy<Head, typename Precision::storage>;

 private:
  using depth_list = std::conditional_t<Depth == 0, std::vector<parts>, std::array<parts, std::size_t(Depth)>>;
  using saved_view = detail::chain_saved<storage>;
  using deferred_view = detail::chain_deferred<storage>;
  using scratch_view = detail::chain_scratch<storage>;

  std::size_t index(int k) const { return static_cast<std::size_t>(k - 1); }
  saved_view carve_saved(memory_builder& memory, int last) const;
  deferred_view carve_deferred(memory_builder& memory, int last) const;
  scratch_view carve_scratch(memory_builder& memory) const;
  saved_view saved_of(saved_memory saved, int k) const;
  deferred_view deferred_of(deferred_memory deferred, int k) const;
  std::int64_t expect_call(const batch& in, const matrix_view<const storage>& hidden) const;
  void expect_saved(const batch& in, const saved_view& saved) const;
  depth_rows rows_of(const saved_view& saved, int k) const;
  matrix_view<const storage> input_of(const saved_view& before, const saved_view& own,
                                      matrix_view<const storage> hidden, int k, storage* gathered) const;
  void forward_depth(host_stream stream, pass mode, const depth_rows& rows, matrix_view<const storage> before, int k,
                     const saved_view& own, const scratch_view& scratch) const;
  write mode_of(write mode, int k, const void* part) const;

  chain_shape shape_;
  depth_list depths_{};
  Embedding* embedding_;
  Head* head_;
  chain_sizes sizes_;
};

}  // namespace mtp

TESSERA_NAMESPACE_END

#include <tessera/mtp/detail/chain.hpp>
