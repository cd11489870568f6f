// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Who writes what: a pure function of what all ranks hold, the same on every rank without a message.

#include <concepts>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <tessera/checkpoint/detail/pieces.hpp>
#include <tessera/checkpoint/manifest.hpp>
#include <tessera/checkpoint/piece.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// Sizes of a save.
struct plan_options {
  /// A part that several ranks hold is divided among them where it is larger than this.
  std::int64_t split_bytes = std::int64_t{64} << 20;
  /// Bytes with a checksum of their own, in `[min_block_bytes, max_block_bytes]`: the least that a load reads.
  std::int64_t block_bytes = std::int64_t{4} << 20;
};

/// A part of a tensor that one rank writes.
struct planned_chunk {
  box part;                 ///< What it is, in the whole tensor.
  std::int32_t tensor = 0;  ///< Index into `save_plan::tensors`.
  std::int32_t writer = 0;  ///< The rank.
  std::int64_t begin = 0;   ///< First byte in the writer's file, counted from the end of the header.
  std::string entry;  ///< Name in that file: that of the tensor, with the number of the chunk if there are several.
};

/// A tensor of a plan.
struct planned_tensor {
  std::string name;                       ///< Unique.
  element_type type = element_type::f32;  ///< Type of its elements.
  box whole;                              ///< Its extents.
  std::string placement;                  ///< Of the lowest rank that holds a part.
  std::int64_t first_chunk = 0;           ///< Index into `save_plan::chunks`.
  std::int64_t num_chunks = 0;            ///< How many there are: they cover it exactly once.
};

/// Who writes what, for all ranks.
struct save_plan {
  int num_ranks = 0;                              ///< R.
  std::int64_t block_bytes = 0;                   ///< As in `plan_options`.
  std::vector<planned_tensor> tensors;            ///< In ascending order of their names.
  std::vector<planned_chunk> chunks;              ///< By tensor, then by place in it.
  std::vector<std::vector<std::int64_t>> writes;  ///< `[R]`: the chunks of each rank in the order of its file.
  std::vector<std::int64_t> bytes;                ///< `[R]`: bytes of elements that each rank writes.
  std::uint64_t digest = 0;                       ///< Equal plans have equal digests.
};

/// The plan from what each rank holds. Each element of each tensor is written once. Parts that several ranks hold are
/// shared among them so that all write about as many bytes; parts that overlap without being equal are cut along
/// dimension 0 first. Host: O(n log n) in the number of pieces.
/// @param pieces  `[R]`: the pieces of each rank, in any order.
/// @param options Sizes.
/// @throws invalid_argument naming the tensor if ranks disagree about its type or its extents, if parts leave an
/// element out, overlap in a way that cutting does not mend, or a rank holds the same part twice.
save_plan make_plan(const std::vector<std::vector<piece_info>>& pieces, const plan_options& options = {});

/// The plan from a function that says what a rank holds, which every rank can evaluate for all of them: no message is
/// sent.
/// @param num_ranks R, at least 1.
/// @param pieces_of `pieces_of(rank)` is a container of `piece_info`, or of pieces.
/// @param options   Sizes.
template <class PiecesOf>
requires std::invocable<PiecesOf&, int> save_plan make_plan(int num_ranks, PiecesOf&& pieces_of,
                                                            const plan_options& options = {}) {
  return make_plan(detail::collect_pieces(num_ranks, pieces_of), options);
}

/// The plan where no rank knows what the others hold: collective, sends the descriptions of all pieces to all ranks.
/// Make it once; it stays valid as long as everyone holds the same parts.
/// @param comm    All ranks that save.
/// @param pieces  What this rank holds: a container of `piece_info`, or of pieces.
/// @param options Sizes, the same on all ranks.
/// @throws invalid_argument on all ranks as above; comm_error if a rank does not come.
template <host_communicator Comm, class Pieces>
save_plan make_plan(Comm& comm, const Pieces& pieces, const plan_options& options = {}) {
  return make_plan(detail::gather_pieces(comm, pieces), options);
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END

#include <tessera/checkpoint/detail/plan.hpp>
