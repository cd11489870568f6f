// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// How the tokens of the gate's weight gradient are split on a device: a pure function of bounds.

#include <doctest/doctest.h>

#include <cstdint>
#include <random>

#include <tessera/moe/detail/gate_splits.hpp>

namespace {

using tessera::detail::gate_splits;

void equals(const gate_splits& s, std::int64_t rows, std::int64_t per_chunk) {
  CHECK(s.rows == rows);
  CHECK(s.per_chunk == per_chunk);
}

// Tiles of 128 x 256 of all chunks' gradients, counted one by one: two parts of the logits' gradient for each expert.
std::int64_t count_tiles(std::int64_t num_chunks, int num_experts, std::int64_t hidden) {
  std::int64_t tiles = 0;
  for (std::int64_t row = 0; row < 2 * num_experts; row += 128)
    for (std::int64_t column = 0; column < hidden; column += 256) ++tiles;
  return tiles * num_chunks;
}

}  // namespace

TEST_CASE("the gate's gradient is split until the multiprocessors of an H100 have a tile each") {
  equals(gate_splits::make(32768, 0, 128, 2048), 4096, 8);   // 16 tiles, 8 of each fit into 132
  equals(gate_splits::make(8192, 0, 8, 4096), 1024, 8);      // 16 tiles, few experts
  equals(gate_splits::make(24576, 0, 128, 1536), 2240, 11);  // 12 tiles; 2234.2 tokens, whole steps of 64
  equals(gate_splits::make(8192, 0, 256, 7168), 8192, 1);    // 112 tiles: a second split would not fit
}

TEST_CASE("chunks count as splits") {
  equals(gate_splits::make(32768, 4096, 128, 2048), 4096, 1);  // 8 chunks of 16 tiles
  equals(gate_splits::make(32768, 16384, 128, 2048), 4096, 4);
  equals(gate_splits::make(4000, 1000, 8, 256), 64, 16);  // 4 tiles, 33 splits would be of 31 tokens
}

TEST_CASE("no split is shorter than a step of the product, but for the last") {
  equals(gate_splits::make(1, 0, 8, 64), 64, 1);
  equals(gate_splits::make(64, 0, 8, 64), 64, 1);
  equals(gate_splits::make(65, 0, 8, 64), 64, 2);
  equals(gate_splits::make(8, 1, 8, 64), 64, 1);
}

TEST_CASE("splits cover a chunk without an empty one, and do not outnumber the multiprocessors") {
  std::mt19937 random(5);
  for (int repeat = 0; repeat < 5000; ++repeat) {
    const std::int64_t max_tokens = 1 + random() % 70000;
    const std::int64_t chunk_tokens = random() % 2 == 0 ? 0 : 1 + random() % max_tokens;
    const int num_experts = 1 + static_cast<int>(random() % 900);
    const std::int64_t hidden = 8 + random() % 8192 / 8 * 8;
    CAPTURE(max_tokens);
    CAPTURE(chunk_tokens);
    CAPTURE(num_experts);
    CAPTURE(hidden);
    const gate_splits s = gate_splits::make(max_tokens, chunk_tokens, num_experts, hidden);
    const std::int64_t tokens = chunk_tokens == 0 ? max_tokens : chunk_tokens;
    CHECK(s.rows % 64 == 0);
    CHECK(s.per_chunk >= 1);
    CHECK(s.per_chunk * s.rows >= tokens);
    CHECK((s.per_chunk - 1) * s.rows < tokens);
    const std::int64_t chunks = (max_tokens + tokens - 1) / tokens;
    const std::int64_t tiles = count_tiles(chunks, num_experts, hidden);
    CHECK((s.per_chunk == 1 || s.per_chunk * tiles <= 132));
    // Not fewer than can be: one more of each chunk would need shorter steps, or blocks that are not there.
    const std::int64_t shorter = s.rows - 64;
    if (shorter >= 64) CHECK((tokens + shorter - 1) / shorter * tiles > 132);
  }
}
