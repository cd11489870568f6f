// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/piece_ring.cuh>
#include <tessera/router/detail/device/warp.cuh>

// Expert rows on their way home, one for each pair, to be added up there. A pair's row has the place t * K + k at home,
// whatever the routing. Warps take pieces of rows through rings as send_rows_kernel does; which pairs a warp takes it
// asks a counter, because how many of a token's pairs belong to this rank differs from token to token.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

struct pairs_task {
  comm::symmetric_view view;
  const std::byte* rows;  // of experts, row_bytes each
  std::int64_t row_stride;
  const std::int32_t* expert_row_of;  // [R, pairs_per_rank]; negative: not this rank's, or dropped
  std::byte* returned;                // [pairs_per_rank] rows in the window, packed, as this rank addresses its own
  std::int32_t* places;               // [pairs_per_rank] in the window: the row of each pair that has come
  std::int64_t pairs_per_rank;        // max_tokens * K
  send_plan plan;
};

struct row_piece {
  const std::byte* from;
  std::byte* to;
  int bytes;
};

// A warp's way through the pairs: those of 32 neighbouring places of one rank at a time, each time of another rank.
class pair_walk {
 public:
  __device__ pair_walk(const pairs_task& task, int lane)
      : task_(task),
        lane_(lane),
        units_(static_cast<std::uint32_t>((task.pairs_per_rank + warp_size - 1) / warp_size * task.view.size)) {
    ask();
  }

  // The next piece of a row; false when all have been given out. All lanes call and get the same.
  __device__ bool next(row_piece& piece) {
    while (left_ == 0) {
      if (!enter()) return false;
    }
    const int source = __ffs(static_cast<int>(left_)) - 1;
    const std::int64_t row = __shfl_sync(full_warp, place_, source);
    const int begin = piece_ * task_.plan.piece_bytes;
    piece.from = task_.rows + row * task_.row_stride + begin;
    piece.to = at_peer(task_.view, task_.returned + (first_ + source) * task_.plan.row_bytes + begin, home_);
    piece.bytes = task_.plan.bytes_of(piece_);
    if (++piece_ == task_.plan.pieces) {
      piece_ = 0;
      left_ &= left_ - 1;
    }
    return true;
  }

 private:
  // Asks a unit ahead, so that nobody waits for the answer.
  __device__ void ask() {
    if (lane_ == 0) asked_ = atomicAdd(task_.view.tickets + 1, 1u);
  }
  // Ranks start with different homes, so that no link is asked by all at once.
  __device__ bool enter() {
    const std::uint32_t unit = __shfl_sync(full_warp, asked_, 0);
    if (unit >= units_) return false;
    ask();
    const auto size = static_cast<std::uint32_t>(task_.view.size);
    home_ = static_cast<int>((static_cast<std::uint32_t>(task_.view.rank) + 1 + unit) % size);
    first_ = static_cast<std::int64_t>(unit / size) * warp_size;
    const std::int64_t pair = first_ + lane_;
    place_ = pair < task_.pairs_per_rank ? __ldg(task_.expert_row_of + home_ * task_.pairs_per_rank + pair) : -1;
    if (place_ >= 0) *at_peer(task_.view, task_.places + pair, home_) = static_cast<std::int32_t>(pair);
    left_ = __ballot_sync(full_warp, place_ >= 0);
    return true;
  }

  const pairs_task& task_;
  int lane_;
  std::uint32_t units_;
  std::uint32_t asked_ = 0;  // in lane 0
  int home_ = 0;
  std::int64_t first_ = 0;
  std::int32_t place_ = -1;  // of this lane's pair
  unsigned left_ = 0;        // lanes whose pairs are still to be sent
  int piece_ = 0;
};

static __launch_bounds__(max_send_warps* warp_size, 1) TESSERA_KERNEL
    send_pairs_kernel(const __grid_constant__ pairs_task task) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const comm::symmetric_view& view = task.view;
  if (block_failed(view)) return;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const std::uint32_t generation = next_generation(view);
  if (blockIdx.x == 0 && warp == 0) announce(view, generation);
  if (!all_entered(view, generation)) return;

  const piece_ring ring(shared_bytes, task.plan, warp, lane == 0);
  __syncwarp();

  pair_walk walk(task, lane);
  row_piece held{};  // lane i: the piece in stage i
  int loaded = 0;
  int stored = 0;
  for (bool more = true;;) {
    while (more && loaded < stored + send_ahead) {
      row_piece piece;
      more = walk.next(piece);
      if (!more) break;
      if (lane == loaded % send_stages) held = piece;
      if (lane == 0) {
        bulk::wait_read<send_stages - send_ahead>();  // what was in this stage has left it
        ring.load(loaded, piece.from, piece.bytes);
      }
      ++loaded;
    }
    if (stored == loaded) break;
    const int stage = stored % send_stages;
    const auto to = __shfl_sync(full_warp, reinterpret_cast<unsigned long long>(held.to), stage);
    const int bytes = __shfl_sync(full_warp, held.bytes, stage);
    if (lane == 0) {
      ring.wait(stored);
      bulk::store(reinterpret_cast<void*>(to), ring.piece(stored), bytes);
      bulk::commit();
    }
    ++stored;
  }
  if (lane == 0) bulk::wait_written<0>();
  leave(view, generation);
#else
  static_cast<void>(task);
#endif
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
