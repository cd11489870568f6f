// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/detail/launch.cuh>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/piece_ring.cuh>
#include <tessera/dispatch/detail/symmetric/send_parts.cuh>
#include <tessera/router/detail/device/warp.cuh>

// Rows that arrive, put in the order of experts while others are under way: a row is read once, as soon as its part has
// come, and stored to each of its pairs' places. A rank's own rows are read where they are, which fills the time in
// which others arrive.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

struct expand_task {
  comm::symmetric_view view;
  const std::byte* received;  // [R * max_tokens] rows, packed; those of this rank are not read
  std::int64_t max_tokens;
  const std::byte* own;  // rows of this rank
  std::int64_t own_stride;
  const std::int32_t* expert_row_of;  // [R * max_tokens, K]; negative: not this rank's, or dropped
  int top_k;
  std::byte* expanded;  // rows of experts
  std::int64_t expanded_stride;
  int part_tokens;
  send_plan plan;
};

// A piece of a row, and where it goes.
struct arrived_piece {
  const std::byte* from;
  std::int64_t begin;  // of the piece in its row
  int bytes;
  std::int32_t place;  // of this lane's pair; negative: none
};

// A warp's way through the tokens of all ranks, in the order in which they come. Tokens without a pair of this rank are
// not waited for.
class arrival_walk {
 public:
  __device__ arrival_walk(const expand_task& task, std::uint32_t generation, int lane)
      : task_(task),
        generation_(generation),
        lane_(lane),
        tokens_(static_cast<std::uint32_t>(task.max_tokens * task.view.size)),
        piece_(task.plan.pieces) {
    ask();
  }

  // The next piece; false when all have been given out, or after a failure: then nobody asks again. All lanes call and
  // get the same but for the place.
  __device__ bool next(arrived_piece& piece) {
    while (piece_ == task_.plan.pieces) {
      if (!enter()) return false;
    }
    piece.begin = static_cast<std::int64_t>(piece_) * task_.plan.piece_bytes;
    piece.from = row_ + piece.begin;
    piece.bytes = task_.plan.bytes_of(piece_);
    piece.place = place_;
    ++piece_;
    return true;
  }

 private:
  // Asks a token ahead, so that nobody waits for the answer.
  __device__ void ask() {
    if (lane_ == 0) asked_ = atomicAdd(task_.view.tickets + 1, 1u);
  }
  // False when there is no other, or it does not come.
  __device__ bool enter() {
    const std::uint32_t asked = __shfl_sync(full_warp, asked_, 0);
    if (asked >= tokens_) return false;
    ask();
    const auto size = static_cast<std::uint32_t>(task_.view.size);
    const auto source = static_cast<int>((static_cast<std::uint32_t>(task_.view.rank) + asked) % size);
    const std::int64_t token = asked / size;
    const std::int64_t arrived = source * task_.max_tokens + token;
    place_ = lane_ < task_.top_k ? __ldg(task_.expert_row_of + arrived * task_.top_k + lane_) : -1;
    if (__all_sync(full_warp, place_ < 0)) return true;
    const bool is_own = source == task_.view.rank;
    row_ = is_own ? task_.own + token * task_.own_stride : task_.received + arrived * task_.plan.row_bytes;
    piece_ = 0;
    return is_own || await_part(source, static_cast<int>(token / task_.part_tokens));
  }
  __device__ bool await_part(int source, int part) const {
    bool here = true;
    if (lane_ == 0) {
      here = await(task_.view, task_.view.chunks + source * comm::max_symmetric_chunks + part, generation_, source,
                   symmetric_step::chunk);
      bulk::fence_global();  // what the peer wrote is read by the TMA, which this lane asks
    }
    return __shfl_sync(full_warp, here ? 1 : 0, 0) != 0;
  }

  const expand_task& task_;
  std::uint32_t generation_;
  int lane_;
  std::uint32_t tokens_;            // of all ranks
  int piece_;                       // of the row: the next
  std::uint32_t asked_ = 0;         // in lane 0
  const std::byte* row_ = nullptr;  // of the token
  std::int32_t place_ = -1;         // of this lane's pair of it
};

static __launch_bounds__(max_send_warps* warp_size, 1) TESSERA_KERNEL
    expand_parts_kernel(const __grid_constant__ expand_task task) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const comm::symmetric_view& view = task.view;
  if (block_failed(view)) return;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const std::uint32_t generation = next_generation(view);

  const piece_ring ring(shared_bytes, task.plan, warp, lane == 0);
  __syncwarp();

  arrival_walk walk(task, generation, lane);
  int loaded = 0;
  // Lanes store what goes to their pairs, each in groups of its own.
  const auto fetch = [&](arrived_piece& piece) {
    if (!walk.next(piece)) return false;
    bulk::wait_read<send_stages - 2>();  // two pieces are stored between one in this stage and this
    __syncwarp();
    if (lane == 0) ring.load(loaded, piece.from, piece.bytes);
    ++loaded;
    return true;
  };
  arrived_piece piece{}, next{};
  bool has_piece = fetch(piece);
  bool has_next = has_piece && fetch(next);
  for (int stored = 0; has_piece; ++stored) {
    ring.wait(stored);
    if (piece.place >= 0)
      bulk::store(task.expanded + piece.place * task.expanded_stride + piece.begin, ring.piece(stored), piece.bytes);
    bulk::commit();
    piece = next;
    has_piece = has_next;
    has_next = has_next && fetch(next);
  }
  bulk::wait_written<0>();
  __syncthreads();
  if (threadIdx.x == 0 && last_block(view)) finish_half(view, generation);
#else
  static_cast<void>(task);
#endif
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
