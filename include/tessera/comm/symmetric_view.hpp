// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What kernels see of memory that the GPUs of a host share: plain structures, passed by value.

#include <cstddef>
#include <cstdint>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace comm {

/// Most ranks of a communicator of shared memory: the GPUs of one host.
inline constexpr int max_symmetric_ranks = 8;
/// Most sets of flags of a communicator of shared memory: operations that overlap.
inline constexpr int max_symmetric_slots = 8;
/// Flags that an operation may post per peer while it goes on.
inline constexpr int max_symmetric_chunks = 4096;

/// Kinds of operations of a slot. Each has flags of its own, so that one may follow the other without a barrier.
enum class symmetric_channel : int {
  tables,  ///< Routings on their way to all ranks.
  rows,    ///< Rows on their way to the owners of experts.
  sums,    ///< Rows on their way home.
  values,  ///< Numbers on their way home, one per pair.
  parts,   ///< Parts of the rows on their way to owners, which are put in the order of experts as they come.
};
inline constexpr int num_symmetric_channels = 5;  ///< Of a slot.

/// What a kernel was doing when it found that it could not go on.
enum class symmetric_step : std::int32_t {
  entry,     ///< Waiting for a peer's stream to come to the operation.
  arrival,   ///< Waiting for what a peer sends.
  chunk,     ///< Waiting for a part of what a peer sends.
  overflow,  ///< The peer would receive `generation` pairs, which is more than its bound.
};

/// The first failure that a kernel of this rank saw. Zero-filled memory: none.
struct symmetric_failure {
  std::uint32_t state = 0;                                ///< 0: none. 1: being written. 2: the rest is there.
  std::int32_t rank = 0;                                  ///< Who saw it.
  std::int32_t peer = 0;                                  ///< Whom it was waiting for, or who has too little room.
  symmetric_channel channel = symmetric_channel::tables;  ///< Of which operation.
  symmetric_step step = symmetric_step::entry;            ///< Doing what.
  std::uint32_t generation = 0;  ///< Of the operation, counted from 1; for an overflow the pairs that are needed.
};

/// One channel of one slot. Windows have the same layout on all ranks: what stands at `p` in this rank's window stands
/// at `peer[r] + (p - peer[rank])` in that of rank r, as this device sees it.
struct symmetric_view {
  int rank = 0;                                           ///< This rank.
  int size = 1;                                           ///< Number of ranks.
  symmetric_channel channel = symmetric_channel::tables;  ///< Which channel.
  std::byte* peer[max_symmetric_ranks] = {};              ///< Start of each rank's window; `peer[rank]` is its own.
  std::uint32_t* entered = nullptr;  ///< `[size]` in the window: the operation that each rank's stream has come to.
  std::uint32_t* arrived = nullptr;  ///< `[size]` in the window: the operation whose data of each rank is all there.
  /// `[size, max_symmetric_chunks]` in the window: the same for parts of it; of `sums` and `parts`.
  std::uint32_t* chunks = nullptr;
  std::uint32_t* generation = nullptr;        ///< One, local: operations that this rank has finished.
  std::uint32_t* tickets = nullptr;           ///< Four, local: count blocks; 0 between operations.
  symmetric_failure* failure = nullptr;       ///< Local: of the whole communicator.
  symmetric_failure* host_failure = nullptr;  ///< A copy in host memory that the device sees; null: none.
  std::uint64_t timeout_ns = 0;               ///< How long a wait may take.
};

}  // namespace comm

TESSERA_NAMESPACE_END
