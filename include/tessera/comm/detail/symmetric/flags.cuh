// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <tessera/comm/detail/symmetric/words.cuh>
#include <tessera/comm/symmetric_view.hpp>

// Flags between GPUs. An operation of a channel has a number, its generation; numbers only grow, so a flag is never
// cleared and a late one of an earlier operation does no harm. An operation goes so:
//
//   announce    every rank tells every rank that its stream has come here: what peers write from now on may be
//               overwritten, because everything that read it was enqueued before
//   await       a sender waits for the announcement of a peer before it writes there
//   leave       when all of its writes are there, a rank says so to each peer
//   await       a reader waits for that
//
// Waits end after the timeout; the first failure is written down and turns what follows on this rank into no-ops.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

using comm::symmetric_step;
using comm::symmetric_view;

/// Where a peer has what stands at `own` here.
template <class T>
__device__ __forceinline__ T* at_peer(const symmetric_view& view, T* own, int peer) {
  const std::ptrdiff_t offset = reinterpret_cast<const std::byte*>(own) - view.peer[view.rank];
  return reinterpret_cast<T*>(view.peer[peer] + offset);
}

/// Whether a flag stands at `generation` or later. Numbers wrap around.
__device__ __forceinline__ bool reached(std::uint32_t value, std::uint32_t generation) {
  return static_cast<std::int32_t>(value - generation) >= 0;
}

/// Whether a kernel of this rank has seen a failure.
__device__ __forceinline__ bool failed(const symmetric_view& view) {
  return *static_cast<volatile std::uint32_t*>(&view.failure->state) != 0;
}

/// The same, and one answer for all threads of the block: another kernel of this rank may see a failure meanwhile, and
/// a block whose first warp had left would not wait for anybody.
__device__ __forceinline__ bool block_failed(const symmetric_view& view) {
  return __syncthreads_or(failed(view) ? 1 : 0) != 0;
}

/// Writes the first failure down, at `here` and where the host sees it. Arguments are values: a reference to a view
/// that is a kernel's parameter would be an address of the driver's copy of the parameters, which no other flag needs.
static __device__ __noinline__ void write_down(comm::symmetric_failure* here, comm::symmetric_failure* host, int rank,
                                               int peer, comm::symmetric_channel channel, symmetric_step step,
                                               std::uint32_t generation) {
  if (atomicCAS(&here->state, 0u, 1u) != 0u) return;
  for (int i = 0; i < 2; ++i) {
    comm::symmetric_failure* const copy = i == 0 ? here : host;
    if (copy == nullptr) continue;
    copy->rank = rank;
    copy->peer = peer;
    copy->channel = channel;
    copy->step = step;
    copy->generation = generation;
    post(&copy->state, 2);
  }
}
__device__ __forceinline__ void record(const symmetric_view& view, int peer, symmetric_step step,
                                       std::uint32_t generation) {
  write_down(view.failure, view.host_failure, view.rank, peer, view.channel, step, generation);
}

/// Waits until a flag of this rank's has come to `generation`. @param peer Who posts it. @return false after the
/// timeout, which is a failure, or when another thread has seen one.
__device__ __forceinline__ bool await(const symmetric_view& view, const std::uint32_t* flag, std::uint32_t generation,
                                      int peer, symmetric_step step) {
  constexpr unsigned polls_between_looks = 64;
  std::uint64_t deadline = 0;
  for (unsigned poll = 1;; ++poll) {
    if (reached(peek(flag), generation)) return true;
    if (poll % polls_between_looks != 0) continue;
    if (failed(view)) return false;
    const std::uint64_t now = nanoseconds();
    if (deadline == 0) deadline = now + view.timeout_ns;
    if (now < deadline) continue;
    record(view, peer, step, generation);
    return false;
  }
}

/// The last operation of this channel that has finished here, for kernels that follow it; and the one that a kernel is
/// about to do, the same for all of its blocks, because only the last of them ends it.
__device__ __forceinline__ std::uint32_t current_generation(const symmetric_view& view) {
  return *static_cast<volatile std::uint32_t*>(view.generation);
}
__device__ __forceinline__ std::uint32_t next_generation(const symmetric_view& view) {
  return current_generation(view) + 1;
}

/// Tells every rank, itself too, that this rank's stream has come here. One warp of the grid calls.
__device__ __forceinline__ void announce(const symmetric_view& view, std::uint32_t generation) {
  const int r = static_cast<int>(threadIdx.x) % 32;
  if (r < view.size) post(at_peer(view, view.entered + view.rank, r), generation);
}

/// True in all threads of the block when every peer has come to this operation. At least `size` threads.
__device__ __forceinline__ bool all_entered(const symmetric_view& view, std::uint32_t generation) {
  bool come = true;
  const int r = static_cast<int>(threadIdx.x);
  if (r < view.size && r != view.rank) come = await(view, view.entered + r, generation, r, symmetric_step::entry);
  return __syncthreads_and(come) != 0;
}

/// Counts the blocks that are done; one thread of each calls, behind a barrier of its block. What all blocks wrote is
/// known to the last. @return true in the last one, where the count is 0 again.
__device__ __forceinline__ bool last_block(const symmetric_view& view) {
  if (count_up(view.tickets) + 1 != gridDim.x) return false;
  *view.tickets = 0;
  return true;
}

/// Ends the operation on this rank: counters that blocks shared work by are 0 again. One thread of the last block
/// calls.
__device__ __forceinline__ void finish(const symmetric_view& view, std::uint32_t generation) {
  for (int i = 1; i < 4; ++i) view.tickets[i] = 0;
  *view.generation = generation;
}

/// Tells every rank, from the last block, that what all blocks wrote is there, and ends the operation. All threads call
/// when their writes are complete. @return true in the last block.
__device__ __forceinline__ bool leave(const symmetric_view& view, std::uint32_t generation) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = last_block(view);
  __syncthreads();
  if (!last) return false;
  const int r = static_cast<int>(threadIdx.x);
  if (r < view.size) post(at_peer(view, view.arrived + view.rank, r), generation);
  if (r == 0) finish(view, generation);
  return true;
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
