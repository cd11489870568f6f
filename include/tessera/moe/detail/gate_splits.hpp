// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/core/chunks.hpp>
#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// The gate's weight gradient is one small matrix with a long sum: on a device the tokens of a chunk are split, so that
// all multiprocessors have work, and the splits' sums are added in order. A pure function of bounds: the bits of a
// chunk's gradient do not depend on how many tokens or chunks a call has.
struct gate_splits {
  std::int64_t rows;       // tokens of a split, the last of a chunk may have fewer
  std::int64_t per_chunk;  // splits of each chunk

  // max_tokens: of a call; chunk_tokens: of a chunk, 0 for one chunk.
  static constexpr gate_splits make(std::int64_t max_tokens, std::int64_t chunk_tokens, int num_experts,
                                    std::int64_t hidden) {
    constexpr std::int64_t blocks = 132, tile_m = 128, tile_n = 256, depth = 64;
    const std::int64_t tokens = chunk_tokens == 0 ? max_tokens : chunk_tokens;
    const std::int64_t chunks = num_chunks(max_tokens, chunk_tokens);
    const std::int64_t tiles =
        (2 * num_experts + tile_m - 1) / tile_m * ((hidden + tile_n - 1) / tile_n) * (chunks < 1 ? 1 : chunks);
    const std::int64_t wanted = tiles < blocks ? blocks / tiles : 1;
    const std::int64_t share = (tokens + wanted - 1) / wanted;
    const std::int64_t rows = share < depth ? depth : (share + depth - 1) / depth * depth;
    const std::int64_t per_chunk = (tokens + rows - 1) / rows;
    return {rows, per_chunk < 1 ? 1 : per_chunk};
  }
};

}  // namespace detail

TESSERA_NAMESPACE_END
