// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The consumer warpgroups: products of the ring's operands, summed in registers in ascending order of `k`.

#include <cstdint>

#include <tessera/gemm/detail/hopper/producer.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// How products are summed: in the matrix unit's accumulator alone. A narrower operand type adds a policy that moves
/// partial sums to registers of their own.
struct direct_accumulation {
  /// Adds one stage: `Blocks` blocks of 64 rows, `tile_k` products deep.
  template <class Shape, int Blocks>
  static __device__ __forceinline__ void multiply(float (&sums)[Shape::blocks][Shape::accumulators], std::uint32_t a,
                                                  std::uint32_t b, bool first) {
    using instruction = mma_bf16<Shape::tile_n, Shape::order_a, Shape::order_b>;
#pragma unroll
    for (int step = 0; step < Shape::tile_k / step_k; ++step) {
#pragma unroll
      for (int block = 0; block < Blocks; ++block)
        instruction::multiply(sums[block],
                              descriptor<Shape::order_a>(a + static_cast<std::uint32_t>(block) * chunk_bytes, step),
                              descriptor<Shape::order_b>(b, step), first && step == 0 ? 0 : 1);
    }
  }
};

/// Gives a slot of the operand ring back, to every block of the cluster that writes into it.
template <class Shape>
__device__ __forceinline__ void release_stage(const rings<Shape>& r, int slot) {
  const int thread = static_cast<int>(threadIdx.x % 128);
  const std::uint32_t barrier = r.empty + 8 * static_cast<std::uint32_t>(slot);
  if constexpr (Shape::cluster > 1) {
    if (thread < Shape::cluster) barrier_arrive_remote(barrier, static_cast<std::uint32_t>(thread));
  } else {
    if (thread == 0) barrier_arrive(barrier);
  }
}

/// Zeroes the lines from `valid` on that the copy engine brought into a stage of `variable_k`. They belong to the next
/// group or to nobody, and a zero in one operand alone does not silence a NaN in the other. Gathered lines are zero
/// already.
template <class Shape>
__device__ __forceinline__ void zero_tail(const rings<Shape>& r, int slot, int valid) {
  static constexpr int first = Shape::gather == gathered::a ? Shape::chunks_a : 0;
  static constexpr int last = Shape::gather == gathered::b ? Shape::chunks_a : Shape::chunks_a + Shape::chunks_b;
  static constexpr int threads = Shape::ping_pong ? 128 : 256;
  const int thread = (static_cast<int>(threadIdx.x) - 128) % threads;
  const int units = (chunk_rows - valid) * 8;
  for (int c = first; c < last; ++c)
    for (int u = thread; u < units; u += threads)
      store_shared(r.stage(slot) + static_cast<std::uint32_t>(c * chunk_bytes + valid * 128 + u * 16), {0, 0, 0, 0});
  async_proxy_fence();
  named_barrier(Shape::ping_pong ? static_cast<int>(threadIdx.x / 128) : 1, threads);
}

/// Sums a tile into `sums`. @tparam Blocks How many of this warpgroup's blocks have rows; with 0 it only passes the
/// stages on.
template <class Shape, class Accumulation, int Blocks>
__device__ __forceinline__ void sum_tile(float (&sums)[Shape::blocks][Shape::accumulators], const rings<Shape>& r,
                                         ring_position<Shape::stages>& at, const tile& t, std::uint32_t offset_a) {
  const int length = t.k_end - t.k_begin;
  const int stages = (length + Shape::tile_k - 1) / Shape::tile_k;
  if (stages == 0) {
#pragma unroll
    for (int block = 0; block < Blocks; ++block)
#pragma unroll
      for (int i = 0; i < Shape::accumulators; ++i) sums[block][i] = 0.0f;
    return;
  }
  int previous = 0;
  for (int s = 0; s < stages; ++s) {
    barrier_wait(r.full + 8 * static_cast<std::uint32_t>(at.slot), at.parity);
    if constexpr (Shape::kind == product::variable_k) {
      const int valid = length - s * Shape::tile_k;
      if (valid < Shape::tile_k) zero_tail(r, at.slot, valid);
    }
    if constexpr (Blocks > 0) {
      const std::uint32_t stage = r.stage(at.slot);
      mma_fence();
      Accumulation::template multiply<Shape, Blocks>(sums, stage + offset_a, stage + Shape::chunks_a * chunk_bytes,
                                                     s == 0);
      mma_commit();
      // One group stays under way, so that the matrix unit never waits for a release.
      mma_wait<1>();
      if (s > 0) release_stage(r, previous);
      previous = at.slot;
    } else {
      release_stage(r, at.slot);
    }
    at.advance();
  }
  if constexpr (Blocks > 0) {
    mma_wait<0>();
#pragma unroll
    for (int block = 0; block < Blocks; ++block) accumulator_fence(sums[block]);
    release_stage(r, previous);
  }
}

/// A consumer warpgroup's whole work. @param which 0 or 1. @param staging This warp's staging buffers.
template <class Shape, class Accumulation, class Epilogue, class P>
__device__ void consume(const P& p, const rings<Shape>& r, int which, std::uint32_t staging) {
  ring_position<Shape::tile_slots> slot;
  ring_position<Shape::stages> at;
  const int warp = static_cast<int>(threadIdx.x / 32 % 4);
  for (int turn = 0;; turn ^= 1) {
    const tile t = read_tile(r, slot);
    if (t.group < 0) break;
    float sums[Shape::blocks][Shape::accumulators];
    if constexpr (Shape::ping_pong) {
      if (turn != which) {
        at.advance((t.k_end - t.k_begin + Shape::tile_k - 1) / Shape::tile_k);
        continue;
      }
      if (t.m_end - t.m > chunk_rows)
        sum_tile<Shape, Accumulation, 2>(sums, r, at, t, 0);
      else
        sum_tile<Shape, Accumulation, 1>(sums, r, at, t, 0);
    } else {
      if (t.m + which * chunk_rows < t.m_end)
        sum_tile<Shape, Accumulation, 1>(sums, r, at, t, static_cast<std::uint32_t>(which) * chunk_bytes);
      else
        sum_tile<Shape, Accumulation, 0>(sums, r, at, t, 0);
    }
#pragma unroll
    for (int block = 0; block < Shape::blocks; ++block) {
      const int first_row = t.m + (Shape::ping_pong ? block : which) * chunk_rows + warp * 16;
      if (first_row < t.m_end) Epilogue::template write<Shape::tile_n>(p.epilogue, sums[block], t, first_row, staging);
    }
  }
}

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
