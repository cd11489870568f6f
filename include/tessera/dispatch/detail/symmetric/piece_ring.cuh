// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/gemm/detail/hopper/ptx.cuh>

// A warp's ring of pieces of rows in shared memory, as `send_plan` divides it.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

class piece_ring {
 public:
  // @param shared Of the block. @param warps With rings. @param warp This one. @param fills Whether this thread loads.
  __device__ piece_ring(const unsigned char* shared, int warps, int warp, int stage_bytes, bool fills)
      : stage_bytes_(stage_bytes) {
    // Rings start at lines of 128 bytes: from other addresses stores take twice the time.
    const std::uint32_t start = bulk::next_line(hopper::shared_address(shared));
    const auto ring_bytes = static_cast<std::uint32_t>(send_stages * stage_bytes);
    const auto of_warp = static_cast<std::uint32_t>(warp), of_block = static_cast<std::uint32_t>(warps);
    pieces_ = start + of_warp * ring_bytes;
    barriers_ = start + of_block * ring_bytes + of_warp * send_stages * 8;
    end_ = start + of_block * (ring_bytes + send_stages * 8);
    if (!fills) return;
    for (int i = 0; i < send_stages; ++i) hopper::barrier_init(barriers_ + static_cast<std::uint32_t>(8 * i), 1);
    hopper::barrier_init_fence();
  }

  // Asks the copy engine for piece `index`, counted from 0, whose stage nobody reads any more.
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
