// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Chunks of tokens: the fixed pieces of a global batch that make a sum over it independent of the number of ranks.

#include <cstdint>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// Chunks of `chunk_tokens` tokens, the last one possibly shorter; one chunk of all tokens where `chunk_tokens` is 0.
/// @param num_tokens T. @param chunk_tokens Tokens of a chunk, not negative.
TESSERA_HD constexpr std::int64_t num_chunks(std::int64_t num_tokens, std::int64_t chunk_tokens) {
  return chunk_tokens == 0 ? 1 : num_tokens / chunk_tokens + (num_tokens % chunk_tokens != 0 ? 1 : 0);
}

TESSERA_NAMESPACE_END
