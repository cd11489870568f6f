// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Who reads what: a pure function of a manifest and of what all ranks want.

#include <cstdint>
#include <string>
#include <vector>

#include <tessera/checkpoint/manifest.hpp>
#include <tessera/checkpoint/piece.hpp>
#include <tessera/core/box.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// A piece of a rank.
struct read_holder {
  std::int32_t rank = 0;   ///< The rank.
  std::int32_t piece = 0;  ///< Index into its pieces.
};

/// A part of a tensor that is wanted, by one rank or by a group of replicas.
struct read_target {
  std::int32_t tensor = 0;           ///< Index into `manifest::tensors`.
  box part;                          ///< What is wanted, not empty.
  std::vector<read_holder> holders;  ///< By whom, in ascending order of ranks.
};

/// A block of a chunk: read by one rank, as a whole, so that its checksum can be compared.
struct read_unit {
  std::int32_t tensor = 0;      ///< Index into `manifest::tensors`.
  std::int32_t chunk = 0;       ///< Index into its chunks.
  std::int64_t block = 0;       ///< Number of the block in the chunk.
  box part;                     ///< What it is, in the whole tensor.
  std::int64_t begin = 0;       ///< First byte in the file.
  std::int64_t bytes = 0;       ///< Size in the file.
  std::int32_t reader = 0;      ///< The rank; one of those that want some of it.
  std::int64_t first_need = 0;  ///< Index into `read_plan::needs`.
  std::int64_t num_needs = 0;   ///< How many targets overlap with it, at least 1.
};

/// Who reads what and who gets it.
struct read_plan {
  std::vector<read_target> targets;  ///< By tensor, then by place in it.
  std::vector<read_unit> units;      ///< By tensor, chunk and block; each block that is wanted stands here once.
  std::vector<std::int32_t> needs;   ///< Indices into `targets`.
  std::vector<std::int64_t> bytes;   ///< `[R]`: bytes that each rank reads.
};

/// The plan of a load. Every block that any rank wants is read by exactly one of the ranks that want some of it, so
/// each byte is read once however many replicas there are, and ranks that want the same read about as much. Blocks that
/// nobody wants are not read. Host, no message.
/// @param content A manifest that passes `expect_manifest`.
/// @param pieces  `[R]`: what each rank wants.
/// @param source  How errors call the manifest.
/// @throws checkpoint_error naming the tensor if the manifest does not have it, or has it with other extents or another
/// element type; invalid_argument for a piece that makes no sense.
read_plan plan_reads(const manifest& content, const std::vector<std::vector<piece_info>>& pieces,
                     const std::string& source);

}  // namespace checkpoint

TESSERA_NAMESPACE_END

#include <tessera/checkpoint/detail/read_plan.hpp>
