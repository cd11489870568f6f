// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/gemm/detail/hopper/ptx.cuh>

// Rows that pass through shared memory in pieces: each warp of a block has a ring of them, so that a few SMs fill the
// links.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

inline constexpr int send_stages = 4;  // pieces of a warp: one is being stored, the next one too, two are being read
inline constexpr int max_send_warps = 16;
inline constexpr int max_piece_bytes = 16 * 1024;
inline constexpr int send_shared_bytes = 224 * 1024;

// Pieces of a row, and warps of a block that have rings of them.
struct send_plan {
  int row_bytes;
  int piece_bytes;
  int pieces;       // of a row
  int stage_bytes;  // room of a piece in shared memory
  int warps;

  static send_plan make(int row_bytes) {
    return divide(row_bytes, (row_bytes + max_piece_bytes - 1) / max_piece_bytes);
  }
  static send_plan divide(int row_bytes, int pieces) {
    const int units = (row_bytes + bulk::alignment - 1) / bulk::alignment;
    const int piece_bytes = (units + pieces - 1) / pieces * bulk::alignment;
    const auto stage_bytes = static_cast<int>(bulk::next_line(static_cast<std::uint32_t>(piece_bytes)));
    return {row_bytes, piece_bytes, pieces, stage_bytes,
            std::clamp(send_shared_bytes / (send_stages * stage_bytes), 1, max_send_warps)};
  }
  int shared_bytes() const { return warps * send_stages * (stage_bytes + 8) + bulk::line; }
  // Of one piece: the last one may be shorter.
  __device__ int bytes_of(int piece) const { return min(row_bytes - piece * piece_bytes, piece_bytes); }
};

class piece_ring {
 public:
  // @param shared Of the block. @param warp Of those with rings. @param fills Whether this thread loads.
  __device__ piece_ring(const unsigned char* shared, const send_plan& plan, int warp, bool fills)
      : stage_bytes_(plan.stage_bytes) {
    // Rings start at lines of 128 bytes: from other addresses stores take twice the time.
    const std::uint32_t start = bulk::next_line(hopper::shared_address(shared));
    const auto ring_bytes = static_cast<std::uint32_t>(send_stages * plan.stage_bytes);
    const auto of_warp = static_cast<std::uint32_t>(warp), of_block = static_cast<std::uint32_t>(plan.warps);
    pieces_ = start + of_warp * ring_bytes;
    barriers_ = start + of_block * ring_bytes + of_warp * send_stages * 8;
    end_ = start + of_block * (ring_bytes + send_stages * 8);
    if (!fills) return;
    for (int i = 0; i < send_stages; ++i) hopper::barrier_init(barriers_ + static_cast<std::uint32_t>(8 * i), 1);
    hopper::barrier_init_fence();
  }

  // Asks the TMA for piece `index`, counted from 0, whose stage nobody reads any more.
  __device__ void load(int index, const std::byte* from, int bytes) const {
    hopper::barrier_arrive_expect(barrier(index), static_cast<std::uint32_t>(bytes));
    bulk::load(piece(index), from, bytes, barrier(index));
  }
  // Until it is there.
  __device__ void wait(int index) const {
    hopper::barrier_wait(barrier(index), static_cast<std::uint32_t>(index / send_stages) & 1u);
  }
  // Where it is.
  __device__ std::uint32_t piece(int index) const {
    return pieces_ + static_cast<std::uint32_t>(index % send_stages * stage_bytes_);
  }
  // What of the block's shared memory comes behind all rings and their barriers.
  __device__ std::uint32_t end() const { return end_; }

 private:
  __device__ std::uint32_t barrier(int index) const {
    return barriers_ + static_cast<std::uint32_t>(8 * (index % send_stages));
  }

  int stage_bytes_;
  std::uint32_t pieces_;
  std::uint32_t barriers_;
  std::uint32_t end_;
};

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
