// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/gemm/detail/hopper/ptx.cuh>
#include <tessera/router/detail/device/warp.cuh>

// Rows from home to the owners of their experts: a token's row is read once and stored to every rank that owns one of
// its experts. Each warp has a ring of pieces in shared memory; one lane loads a piece and stores it to all of its
// destinations, so that a few SMs fill the links. A rank says that everything has been written with one flag.

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
  int row_bytes;
  int piece_bytes;
  int pieces;       // of a row
  int stage_bytes;  // room of a piece in shared memory
  bool awaits;      // the rows of all ranks; else a kernel behind this one does
};

// Whether the kernel that sends rows waits for those of all ranks, too, of which there are `bytes` at most. So few take
// little longer than the step from one kernel to the next; with more, a stream may have work between begin and end.
constexpr bool awaits_in_sender(std::int64_t bytes) { return bytes <= std::int64_t{8} << 20; }

inline constexpr int send_stages = 4;  // pieces of a warp: one is being stored, the next one too, two are being read
inline constexpr int max_send_warps = 16;
inline constexpr int max_piece_bytes = 16 * 1024;
inline constexpr int send_shared_bytes = 224 * 1024;

// Pieces of a row, and warps of a block that have rings of them.
struct send_plan {
  int piece_bytes;
  int pieces;
  int warps;

  static send_plan make(int row_bytes) {
    send_plan plan;
    plan.pieces = (row_bytes + max_piece_bytes - 1) / max_piece_bytes;
    const int units = (row_bytes + bulk::alignment - 1) / bulk::alignment;
    plan.piece_bytes = (units + plan.pieces - 1) / plan.pieces * bulk::alignment;
    plan.warps = std::clamp(send_shared_bytes / (send_stages * plan.stage_bytes()), 1, max_send_warps);
    return plan;
  }
  int stage_bytes() const { return static_cast<int>(bulk::next_line(static_cast<std::uint32_t>(piece_bytes))); }
  int shared_bytes() const { return warps * send_stages * (stage_bytes() + 8) + bulk::line; }
};

static __launch_bounds__(max_send_warps* warp_size, 1) TESSERA_KERNEL
    send_rows_kernel(const __grid_constant__ send_task task) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const comm::symmetric_view& view = task.view;
  const int warps = static_cast<int>(blockDim.x) / warp_size;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;

  // Rings start at lines of 128 bytes: from other addresses stores take twice the time.
  const std::uint32_t start = bulk::next_line(hopper::shared_address(shared_bytes));
  const std::uint32_t ring = start + static_cast<std::uint32_t>(warp * send_stages * task.stage_bytes);
  const std::uint32_t barriers =
      start + static_cast<std::uint32_t>(warps * send_stages * task.stage_bytes + warp * send_stages * 8);
  if (lane == 0) {
    for (int i = 0; i < send_stages; ++i) hopper::barrier_init(barriers + static_cast<std::uint32_t>(8 * i), 1);
    hopper::barrier_init_fence();
  }
  __syncwarp();
  await_stream();  // what is read behind it, is read by plain loads, which the compiler leaves there
  const std::uint32_t generation = next_generation(view);
  if (block_failed(view)) return;
  if (blockIdx.x == 0 && warp == 0) announce(view, generation);

  // Items are pieces of rows. A warp begins with two of its own and then takes the next that nobody has: SMs do not
  // reach the links equally fast, and all would wait for the slowest.
  const std::int64_t items = task.num_rows * task.pieces;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * warps;
  const std::int64_t first = static_cast<std::int64_t>(warp) * gridDim.x + blockIdx.x;
  const auto bytes_of = [&](int piece) {
    const int left = task.row_bytes - piece * task.piece_bytes;
    return left < task.piece_bytes ? left : task.piece_bytes;
  };
  const auto load = [&](std::int64_t item, int stage) {
    const std::int64_t token = item / task.pieces;
    const int piece = static_cast<int>(item - token * task.pieces);
    const std::uint32_t barrier = barriers + static_cast<std::uint32_t>(8 * stage);
    const int bytes = bytes_of(piece);
    hopper::barrier_arrive_expect(barrier, static_cast<std::uint32_t>(bytes));
    bulk::load(ring + static_cast<std::uint32_t>(stage * task.stage_bytes),
               task.rows + token * task.row_stride + piece * task.piece_bytes, bytes, barrier);
  };

  constexpr int ahead = send_stages - 2;
  static_assert(ahead == 2, "two items are under way: the next and the one after");
  const auto ask = [&] { return ahead * step + atomicAdd(view.tickets + 1, 1u); };
  const auto destinations_of = [&](std::int64_t item) {
    std::uint32_t mask = (1u << view.size) - 1u;
    if (item >= items) return 0u;
    if (task.destinations != nullptr) mask = task.destinations[item / task.pieces];
    return task.sends_own ? mask : mask & ~(1u << view.rank);
  };
  std::int64_t item = first;
  std::int64_t next = first + step;
  std::int64_t after = 0;
  std::uint32_t mask = 0;
  std::uint32_t next_mask = 0;
  if (lane == 0 && first < items) {
    for (int i = 0; i < ahead; ++i) {
      if (first + i * step < items) load(first + i * step, i);
    }
    after = ask();  // asked for an item ahead, so that nobody waits for the answer
    mask = destinations_of(item);
    next_mask = destinations_of(next);
  }
  if (!all_entered(view, generation)) {
    // what was loaded must have landed before the block's shared memory is given away
    if (lane == 0) {
      for (int i = 0; i < ahead; ++i) {
        if (first + i * step < items) hopper::barrier_wait(barriers + static_cast<std::uint32_t>(8 * i), 0);
      }
    }
    return;
  }

  if (lane == 0 && first < items) {
    for (int round = 0; item < items; ++round) {
      const std::int64_t loaded = after;
      std::uint32_t loaded_mask = 0;
      if (loaded < items) {
        after = ask();
        bulk::wait_read<1>();  // the piece before last has left its place
        load(loaded, (round + ahead) % send_stages);
        loaded_mask = destinations_of(loaded);
      }
      const int stage = round % send_stages;
      hopper::barrier_wait(barriers + static_cast<std::uint32_t>(8 * stage),
                           static_cast<std::uint32_t>(round / send_stages) & 1u);
      const std::int64_t token = item / task.pieces;
      const int piece = static_cast<int>(item - token * task.pieces);
      std::byte* const own = task.received + (view.rank * task.max_tokens + token) * task.received_stride +
                             static_cast<std::int64_t>(piece) * task.piece_bytes;
      // every rank and token starts with another destination, so that no link is asked by all at once
      int r = static_cast<int>((token + view.rank) % view.size);
      for (int i = 0; i < view.size; ++i) {
        if (((mask >> r) & 1u) != 0) {
          bulk::store(at_peer(view, own, r), ring + static_cast<std::uint32_t>(stage * task.stage_bytes),
                      bytes_of(piece));
        }
        r = r + 1 == view.size ? 0 : r + 1;
      }
      bulk::commit();
      item = next;
      mask = next_mask;
      next = loaded;
      next_mask = loaded_mask;
    }
    bulk::wait_written<0>();
  }
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
