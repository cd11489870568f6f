// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/piece_ring.cuh>
#include <tessera/router/detail/device/warp.cuh>

// Rows from home to the owners of their experts: a token's row is read once and stored to every rank that owns one of
// its experts. A rank says that everything has been written with one flag.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

struct send_task {
  comm::symmetric_view view;
  const std::byte* rows;  // [num_rows] of row_bytes
  std::int64_t row_stride;
  std::int64_t num_rows;
  const std::uint32_t* destinations;  // [num_rows] bit r: goes to rank r; null: goes to all
  bool sends_own;                     // rows of this rank's experts; else somebody else copies them
  std::byte* received;                // [R * max_tokens] rows in the window, as this rank addresses its own
  std::int64_t received_stride;
  std::int64_t max_tokens;
  send_plan plan;
  bool awaits;  // the rows of all ranks; else a kernel behind this one does
};

// Whether the kernel that sends rows waits for those of all ranks, too, of which there are `bytes` at most. So few take
// little longer than the step from one kernel to the next; with more, a stream may have work between begin and end.
constexpr bool awaits_in_sender(std::int64_t bytes) { return bytes <= std::int64_t{8} << 20; }

inline constexpr int send_ahead = send_stages - 2;  // pieces that are read while one is stored

// The pieces that a warp sends: some of its own first, then the next that nobody has, because SMs do not reach the
// links equally fast, and all would wait for the slowest. One thread's.
class piece_order {
 public:
  // @param first Number of this warp among `warps`.
  __device__ piece_order(const send_task& task, std::int64_t first, std::int64_t warps)
      : tickets_(task.view.tickets + 1), first_(first), warps_(warps) {}

  // The next piece, of all rows in turn; from the first on that is not below their number there are no others.
  __device__ std::int64_t next() {
    if (own_ < send_ahead) return first_ + own_++ * warps_;
    return send_ahead * warps_ + atomicAdd(tickets_, 1u);
  }

 private:
  std::uint32_t* tickets_;
  std::int64_t first_;
  std::int64_t warps_;
  int own_ = 0;
};

// A lane of a warp that brings pieces to its ring and stores each to all of its destinations.
template <class Order>
class piece_sender {
 public:
  // Begins to load. @param order Of this thread. @param sends Whether it is the one of its warp that does.
  __device__ piece_sender(const send_task& task, const piece_ring& ring, Order order, bool sends)
      : task_(task), ring_(ring), order_(order), pieces_(sends ? task.num_rows * task.plan.pieces : 0) {
    static_assert(send_ahead == 2, "two pieces are under way: the next and the one after");
    if (!sends) return;
    piece_ = order_.next();
    next_ = order_.next();
    if (piece_ < pieces_) load(piece_, 0);
    if (next_ < pieces_) load(next_, 1);
    after_ = piece_ < pieces_ ? order_.next() : piece_;  // asked for ahead, so that nobody waits for the answer
    mask_ = destinations_of(piece_);
    next_mask_ = destinations_of(next_);
  }

  // In place of `send`: what was loaded must have landed before the block's shared memory is given away.
  __device__ void abandon() const {
    if (piece_ < pieces_) ring_.wait(0);
    if (next_ < pieces_) ring_.wait(1);
  }

  // @param stored `stored(piece)` is called when a piece's stores have been committed.
  template <class Stored>
  __device__ void send(Stored stored) {
    for (int index = 0; piece_ < pieces_; ++index) {
      const std::int64_t loaded = after_;
      std::uint32_t loaded_mask = 0;
      if (loaded < pieces_) {
        after_ = order_.next();
        bulk::wait_read<1>();  // the piece before last has left its place
        load(loaded, index + send_ahead);
        loaded_mask = destinations_of(loaded);
      }
      ring_.wait(index);
      store(index);
      bulk::commit();
      stored(piece_);
      piece_ = next_;
      mask_ = next_mask_;
      next_ = loaded;
      next_mask_ = loaded_mask;
    }
  }

 private:
  __device__ void load(std::int64_t piece, int index) const {
    const std::int64_t token = piece / task_.plan.pieces;
    const int of_row = static_cast<int>(piece - token * task_.plan.pieces);
    ring_.load(index, task_.rows + token * task_.row_stride + of_row * task_.plan.piece_bytes,
               task_.plan.bytes_of(of_row));
  }
  __device__ std::uint32_t destinations_of(std::int64_t piece) const {
    if (piece >= pieces_) return 0;
    const comm::symmetric_view& view = task_.view;
    const std::uint32_t mask =
        task_.destinations != nullptr ? task_.destinations[piece / task_.plan.pieces] : (1u << view.size) - 1u;
    return task_.sends_own ? mask : mask & ~(1u << view.rank);
  }
  __device__ void store(int index) const {
    const comm::symmetric_view& view = task_.view;
    const std::int64_t token = piece_ / task_.plan.pieces;
    const int of_row = static_cast<int>(piece_ - token * task_.plan.pieces);
    std::byte* const own = task_.received + (view.rank * task_.max_tokens + token) * task_.received_stride +
                           static_cast<std::int64_t>(of_row) * task_.plan.piece_bytes;
    // every rank and token starts with another destination, so that no link is asked by all at once
    int r = static_cast<int>((token + view.rank) % view.size);
    for (int i = 0; i < view.size; ++i) {
      if (((mask_ >> r) & 1u) != 0) bulk::store(at_peer(view, own, r), ring_.piece(index), task_.plan.bytes_of(of_row));
      r = r + 1 == view.size ? 0 : r + 1;
    }
  }

  const send_task& task_;
  const piece_ring& ring_;
  Order order_;
  std::int64_t pieces_;  // of all rows
  std::int64_t piece_ = 0;
  std::int64_t next_ = 0;
  std::int64_t after_ = 0;
  std::uint32_t mask_ = 0;  // destinations of `piece_`
  std::uint32_t next_mask_ = 0;
};

static __launch_bounds__(max_send_warps* warp_size, 1) TESSERA_KERNEL
    send_rows_kernel(const __grid_constant__ send_task task) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const comm::symmetric_view& view = task.view;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const bool sends = threadIdx.x % warp_size == 0;

  const piece_ring ring(shared_bytes, task.plan, warp, sends);
  __syncwarp();
  await_stream();  // what is read behind it, is read by plain loads, which the compiler leaves there
  const std::uint32_t generation = next_generation(view);
  if (block_failed(view)) return;
  if (blockIdx.x == 0 && warp == 0) announce(view, generation);

  const piece_order order(task, static_cast<std::int64_t>(warp) * gridDim.x + blockIdx.x,
                          static_cast<std::int64_t>(gridDim.x) * task.plan.warps);
  piece_sender sender(task, ring, order, sends);
  if (!all_entered(view, generation)) return sender.abandon();
  sender.send([](std::int64_t) {});
  if (sends) bulk::wait_written<0>();
  // One block's wait is enough: what it has acquired kernels behind this one see, as they do behind one that waits.
  const int r = static_cast<int>(threadIdx.x);
  if (leave(view, generation) && task.awaits && r < view.size)
    await(view, view.arrived + r, generation, r, symmetric_step::arrival);
#else
  static_cast<void>(task);
#endif
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
