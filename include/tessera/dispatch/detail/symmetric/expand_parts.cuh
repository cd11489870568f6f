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
// come, and stored to each of its pairs' places.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

struct expand_task {
  comm::symmetric_view view;
  const std::byte* received;  // [R * max_tokens] rows of row_bytes, packed
  std::int64_t max_tokens;
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

// A warp's way through the parts of all ranks, in the order in which they come: as many tokens at a time as have a lane
// for each pair. Parts without a pair of this rank are not waited for.
class arrival_walk {
 public:
  __device__ arrival_walk(const expand_task& task, std::uint32_t generation, int lane)
      : task_(task),
        generation_(generation),
        lane_(lane),
        tokens_at_once_(warp_size / task.top_k),
        units_(
            static_cast<std::uint32_t>((task.max_tokens + task.part_tokens - 1) / task.part_tokens * task.view.size)) {
    ask();
  }

  // The next piece; false when all have been given out, or after a failure. All lanes call and get the same but for the
  // place.
  __device__ bool next(arrived_piece& piece) {
    while (left_ == 0) {
      if (!look_up()) return false;
    }
    const int token = (__ffs(static_cast<int>(left_)) - 1) / task_.top_k;  // of those that were looked up
    piece.begin = static_cast<std::int64_t>(piece_) * task_.plan.piece_bytes;
    piece.from = task_.received + (row_ + token) * task_.plan.row_bytes + piece.begin;
    piece.bytes = task_.plan.bytes_of(piece_);
    piece.place = lane_ / task_.top_k == token ? place_ : -1;
    if (++piece_ == task_.plan.pieces) {
      piece_ = 0;
      const int done = (token + 1) * task_.top_k;  // lanes
      left_ = done < warp_size ? left_ & (full_warp << done) : 0;
    }
    return true;
  }

 private:
  // Asks a part ahead, so that nobody waits for the answer.
  __device__ void ask() {
    if (lane_ == 0) asked_ = atomicAdd(task_.view.tickets + 1, 1u);
  }
  __device__ bool enter() {
    const std::uint32_t unit = __shfl_sync(full_warp, asked_, 0);
    if (unit >= units_) return false;
    ask();
    const auto size = static_cast<std::uint32_t>(task_.view.size);
    source_ = static_cast<int>((static_cast<std::uint32_t>(task_.view.rank) + unit) % size);  // one's own rows first
    part_ = static_cast<int>(unit / size);
    token_ = static_cast<std::int64_t>(part_) * task_.part_tokens;
    token_end_ = min(token_ + task_.part_tokens, task_.max_tokens);
    is_here_ = false;
    return true;
  }
  __device__ bool look_up() {
    if (failed_ || (token_ >= token_end_ && !enter())) return false;
    const int tokens = static_cast<int>(min(token_end_ - token_, static_cast<std::int64_t>(tokens_at_once_)));
    row_ = source_ * task_.max_tokens + token_;
    place_ = lane_ < tokens * task_.top_k ? __ldg(task_.expert_row_of + row_ * task_.top_k + lane_) : -1;
    left_ = __ballot_sync(full_warp, place_ >= 0);
    token_ += tokens;
    if (left_ == 0 || is_here_) return true;
    is_here_ = await_part();
    failed_ = !is_here_;
    return is_here_;
  }
  __device__ bool await_part() const {
    bool here = true;
    if (lane_ == 0) {
      here = await(task_.view, task_.view.chunks + source_ * comm::max_symmetric_chunks + part_, generation_, source_,
                   symmetric_step::chunk);
      bulk::fence_global();  // what the peer wrote is read by the copy engine, which this lane asks
    }
    return __shfl_sync(full_warp, here ? 1 : 0, 0) != 0;
  }

  const expand_task& task_;
  std::uint32_t generation_;
  int lane_;
  int tokens_at_once_;
  std::uint32_t units_;
  std::uint32_t asked_ = 0;  // in lane 0
  int source_ = 0;
  int part_ = 0;
  std::int64_t token_ = 0;  // of the source: the first that has not been looked up
  std::int64_t token_end_ = 0;
  std::int64_t row_ = 0;     // received, of the tokens that have been looked up
  std::int32_t place_ = -1;  // of this lane's pair of them
  unsigned left_ = 0;        // lanes whose pairs are still to be stored
  int piece_ = 0;
  bool is_here_ = false;  // the part
  bool failed_ = false;
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
