// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a chain keeps, by lifetime.

#include <cstdint>

#include <tessera/core/memory.hpp>
#include <tessera/core/views.hpp>
#include <tessera/mtp/detail/rows.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp::detail {

// From forward to backward_weights: of all depths, and of one.
template <class S>
struct chain_saved {
  std::int64_t* counts = nullptr;     // [3 + D]: T, chunks, documents, rows of each depth
  std::int32_t* documents = nullptr;  // offsets of the documents in the batch
  row_lists lists{};
  S* joined = nullptr;  // [R, 2 d]: both norms' outputs
  S* mixed = nullptr;   // [R, d]: the projection's output
  S* hidden = nullptr;  // [R, d]: the block's output
  S* normed = nullptr;  // [R, d]: the output norm's output; null without one
  saved_memory hidden_norm{}, embedding_norm{}, projection{}, block{}, output_norm{}, head{};
};

// From backward_input to backward_weights, of one depth: the gradients of what each part has put out.
template <class S>
struct chain_deferred {
  S* dnormed = nullptr;    // [R, d]: null without an output norm
  S* dhidden = nullptr;    // [R, d]
  S* dmixed = nullptr;     // [R, d]
  S* djoined = nullptr;    // [R, 2 d]
  S* dembedded = nullptr;  // [R, d]: of the embedding's output
  deferred_memory hidden_norm{}, embedding_norm{}, projection{}, block{}, output_norm{}, head{};
};

// During one call.
template <class S>
struct chain_scratch {
  S* gathered = nullptr;  // [R, d]: hidden states of the depth before, where they have to be gathered
  S* embedded = nullptr;  // [R, d]
  S* dhead = nullptr;     // [R, d]: gradient of the block's output that comes from the head
  S* dinput = nullptr;    // [R, d]: gradient of the hidden states of the depth before
  workspace_memory part{};
};

}  // namespace mtp::detail

TESSERA_NAMESPACE_END
