// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Shared experts: those that every token passes.
///
/// They need no code of their own. An expert's output is a sum over its intermediate units, so `num_shared` experts of
/// width n whose outputs are added are one expert of width `num_shared * n` (DeepSeek's checkpoints store them so): the
/// gates of all of them stand before the ups of all of them (or alternate with them, where the layout interleaves), the
/// down-projections stand side by side, up biases follow the up outputs and down biases are added. That one expert is
/// `experts::shared` with one local expert, every row in its place and no pair weights.
///
/// They are replicated on all ranks. To make the sum of their gradients independent of the number of ranks,
/// `backward_weights` is given chunks of tokens in place of experts; it writes one contribution per chunk, and
/// `comm`'s ordered reduction adds these in the order of chunks.

#include <cstdint>

#include <tessera/core/chunks.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/expert_rows.hpp>
#include <tessera/experts/expert_weights.hpp>

TESSERA_NAMESPACE_BEGIN

/// Sizes of `num_shared` shared experts of width `intermediate`, fused to one.
/// @param hidden d. @param intermediate n of one of them. @param num_shared How many. @param bias Projections have
/// biases.
constexpr expert_dims shared_expert_dims(int hidden, int intermediate, int num_shared, bool bias) {
  return {.num_local_experts = 1, .hidden = hidden, .intermediate = num_shared * intermediate, .bias = bias};
}

/// The rows of `num_tokens` tokens in their places, one group per chunk of `chunk_tokens` tokens, the last possibly
/// shorter. With `chunk_tokens` 0 there is one group of all, which is also what forward and `backward_input` of a
/// shared expert take.
/// @param row_offsets  Host memory `[ceil(T / c) + 1]`, or `[2]` with `chunk_tokens` 0; written, and must outlive the
///                     result.
/// @param num_tokens   T, at most 2^31 - 1.
/// @param chunk_tokens c, not negative.
/// @throws invalid_argument if a number is out of range.
inline expert_rows chunked_rows(std::int32_t* row_offsets, std::int64_t num_tokens, std::int64_t chunk_tokens) {
  TESSERA_EXPECTS(
      num_tokens >= 0 && num_tokens <= INT32_MAX && chunk_tokens >= 0,
      "chunks need 0 <= num_tokens < 2^31 and chunk_tokens >= 0, got " << num_tokens << " and " << chunk_tokens);
  const std::int64_t chunks = num_chunks(num_tokens, chunk_tokens);
  row_offsets[0] = 0;
  for (std::int64_t i = 1; i <= chunks; ++i)
    row_offsets[i] = static_cast<std::int32_t>(i == chunks ? num_tokens : i * chunk_tokens);
  return {.num_local_experts = static_cast<std::int32_t>(chunks), .row_offsets = row_offsets, .gather = nullptr};
}

TESSERA_NAMESPACE_END
