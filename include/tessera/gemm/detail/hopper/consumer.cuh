// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The consumer warpgroups: products of the ring's operands, summed in registers in ascending order of `k`.

#include <cstdint>

#include <tessera/gemm/detail/hopper/epilogue.cuh>
#include <tessera/gemm/detail/hopper/producer.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// How products are summed: in the matrix unit's accumulator alone. A narrower operand type adds a policy that moves
/// partial sums to registers of their own.
struct direct_accumulation {
  /// Adds one stage: `Blocks` blocks of 64 rows, `tile_k` products deep. @tparam First Whether the sums begin here.
  template <class Shape, int Blocks, bool First>
  static __device__ __forceinline__ void multiply(float (&sums)[Shape::blocks][Shape::accumulators], std::uint32_t a,
                                                  std::uint32_t b) {
    using instruction = mma_bf16<Shape::tile_n, Shape::order_a, Shape::order_b>;
#pragma unroll
    for (int step = 0; step < Shape::tile_k / step_k; ++step) {
#pragma unroll
      for (int block = 0; block < Blocks; ++block) {
        const std::uint64_t rows =
            descriptor<Shape::order_a>(a + static_cast<std::uint32_t>(block) * chunk_bytes, step);
        const std::uint64_t columns = descriptor<Shape::order_b>(b, step);
        if (First && step == 0)
          instruction::start(sums[block], rows, columns);
        else
          instruction::add(sums[block], rows, columns);
      }
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

/// Waits until the TMA has read what this warpgroup sent in the last step of an epilogue, and gives the step's
/// slot back. @param late That slot, then -1; if it is -1 already, there are no stores that anything waits for.
template <class Shape, class Epilogue>
__device__ __forceinline__ void release_late(const rings<Shape>& r, int& late) {
  if constexpr (may_step<Shape, Epilogue>) {
    if (late >= 0) {
      if (threadIdx.x % 32 == 0) tma_store_wait_read<0>();
      __syncwarp();
      named_barrier(1 + static_cast<int>(threadIdx.x / 128), 128);
      release_stage(r, late);
    }
    late = -1;
  }
}

/// Zeroes the lines from `valid` on that the TMA brought into a stage of `variable_k`. They belong to the next
/// group or to nobody, and a zero in one operand alone does not silence a NaN in the other. Gathered lines are zero
/// already. Warpgroups that both have rows of the tile share the work. @param steps Whether epilogues take steps: their
/// stores into the slot are ordered before by barriers that tools do not follow, so warps meet once more then.
template <class Shape>
__device__ __forceinline__ void zero_tail(const rings<Shape>& r, int slot, const tile& t, int valid, bool steps) {
  static constexpr int first = Shape::gather == gathered::a ? Shape::chunks_a : 0;
  static constexpr int last = Shape::chunks_a + Shape::chunks_b;
  const bool shares = !Shape::ping_pong && t.m_end - t.m > chunk_rows;
  const int threads = shares ? 256 : 128;
  const int barrier = shares ? 1 : 1 + static_cast<int>(threadIdx.x / 128);
  const int thread = static_cast<int>(threadIdx.x - 128) & (threads - 1);
  const int units = (chunk_rows - valid) * 8;
  if (steps) named_barrier(barrier, threads);
  for (int c = first; c < last; ++c)
    for (int u = thread; u < units; u += threads)
      store_shared(r.stage(slot) + static_cast<std::uint32_t>(c * chunk_bytes + valid * 128 + u * 16), {0, 0, 0, 0});
  async_proxy_fence();
  named_barrier(barrier, threads);
}

/// Waits for the operands of stage `index` of a tile's sum. @param steps As in `zero_tail`.
template <class Shape>
__device__ __forceinline__ void await_stage(const rings<Shape>& r, const ring_position<Shape::stages>& at,
                                            const tile& t, int index, bool steps) {
  barrier_wait(r.full + 8 * static_cast<std::uint32_t>(at.slot), at.parity);
  if constexpr (Shape::gather != gathered::none) async_proxy_fence();
  if constexpr (Shape::kind == product::variable_k) {
    const int valid = t.k_end - t.k_begin - index * Shape::tile_k;
    if (valid < Shape::tile_k) zero_tail(r, at.slot, t, valid, steps);
  }
}

/// Sums a tile into `sums`. @tparam Blocks How many of this warpgroup's blocks have rows. @param next_turn Barrier to
/// arrive on when all operands have come, or 0. @param steps As in `zero_tail`. @param late The slot of the last tile's
/// last step, which is given back once the matrix unit has work.
template <class Shape, class Accumulation, class Epilogue, int Blocks>
__device__ __forceinline__ void sum_tile(float (&sums)[Shape::blocks][Shape::accumulators], const rings<Shape>& r,
                                         ring_position<Shape::stages>& at, const tile& t, std::uint32_t offset_a,
                                         std::uint32_t next_turn, bool steps, int& late) {
  static constexpr std::uint32_t offset_b = Shape::chunks_a * chunk_bytes;
  const int stages = sum_stages<Shape>(t);
  await_stage(r, at, t, 0, steps);
  mma_fence();
  Accumulation::template multiply<Shape, Blocks, true>(sums, r.stage(at.slot) + offset_a, r.stage(at.slot) + offset_b);
  mma_commit();
  release_late<Shape, Epilogue>(r, late);
  int previous = at.slot;
  at.advance();
#pragma unroll 1
  for (int s = 1; s < stages; ++s) {
    await_stage(r, at, t, s, steps);
    mma_fence();
    Accumulation::template multiply<Shape, Blocks, false>(sums, r.stage(at.slot) + offset_a,
                                                          r.stage(at.slot) + offset_b);
    mma_commit();
    // One group stays under way, so that the matrix unit never waits for a release.
    mma_wait<1>();
    release_stage(r, previous);
    previous = at.slot;
    at.advance();
  }
  // The other warpgroup may go on from here.
  if (next_turn != 0 && threadIdx.x % 128 == 0) barrier_arrive(next_turn);
  mma_wait<0>();
#pragma unroll
  for (int block = 0; block < Blocks; ++block) accumulator_fence(sums[block]);
  release_stage(r, previous);
}

/// Keeps the warpgroups together before and after a tile of `variable_k` of which one has all rows. That one zeroes
/// what both read in other tiles, which barriers in shared memory order already, but tools do not follow these.
/// @param steps As in `zero_tail`.
template <class Shape>
__device__ __forceinline__ void meet_at_half(const tile& t, bool steps) {
  if constexpr (Shape::kind == product::variable_k) {
    if (steps && t.m_end - t.m <= chunk_rows) named_barrier(1, 256);
  }
}

/// Passes a tile's stages and `steps` steps of its epilogue on: they hold nothing for this warpgroup. Its warps stay
/// together, as matrix instructions would keep them: a warp that fell two rounds of the ring behind could not tell the
/// rounds apart.
template <class Shape>
__device__ __forceinline__ void pass_on(const rings<Shape>& r, ring_position<Shape::stages>& at, const tile& t,
                                        int steps) {
  const int count = sum_stages<Shape>(t) + steps;
  for (int s = 0; s < count; ++s) {
    barrier_wait(r.full + 8 * static_cast<std::uint32_t>(at.slot), at.parity);
    named_barrier(1 + static_cast<int>(threadIdx.x / 128), 128);
    release_stage(r, at.slot);
    at.advance();
  }
}

/// The first of a warp's rows in a block of 64.
__device__ __forceinline__ int warp_row(int first_row) {
  return first_row + static_cast<int>(threadIdx.x / 32 % 4) * 16;
}

/// Hands a warpgroup's blocks to the epilogue.
template <class Shape, class Epilogue, int Blocks, class P>
__device__ __forceinline__ void write_tile(const P& p, float (&sums)[Shape::blocks][Shape::accumulators], const tile& t,
                                           int first_row, warp_output& output) {
#pragma unroll
  for (int block = 0; block < Blocks; ++block) {
    const int row = warp_row(first_row + block * chunk_rows);
    if (Epilogue::by_warpgroup || row < t.m_end)
      Epilogue::template write<Shape::tile_n>(p.epilogue, sums[block], t, row, output);
  }
}

/// Takes a tile's sums and the steps that follow them through the epilogue; all warps of a warpgroup of which one has
/// rows. @param late Receives the last step's slot.
template <class Shape, class Epilogue, class P>
__device__ __forceinline__ void write_steps(const P& p, float (&sums)[Shape::accumulators],
                                            typename Epilogue::row_values& rows, const tile& t, int first_row,
                                            const warp_output& output, const rings<Shape>& r,
                                            ring_position<Shape::stages>& at, int& late) {
  const int steps = epilogue_steps<Shape, Epilogue>(p, t);
  const std::uint32_t of_warp = (threadIdx.x / 32 - 4) * step_bytes<Epilogue>;
  for_each_chunk<Shape::tile_n / chunk_rows>([&]<int Chunk>() {
    if (Chunk >= steps) return;
    barrier_wait(r.full + 8 * static_cast<std::uint32_t>(at.slot), at.parity);
    const bool has_rows = first_row < t.m_end;
    const std::uint32_t blocks = r.step(at.slot) + of_warp;
    if (has_rows) Epilogue::template step<Chunk>(p.epilogue, sums, rows, t, output, blocks);
    release_late<Shape, Epilogue>(r, late);  // all warps together
    if (has_rows) Epilogue::template send_step<Chunk>(p.epilogue, rows, t, first_row, output, blocks);
    late = at.slot;
    at.advance();
  });
}

/// A consumer warpgroup's whole work. @param which 0 or 1. @param staging This warp's two buffers.
template <class Shape, class Accumulation, class Epilogue, class P>
__device__ void consume(const P& p, const rings<Shape>& r, int which, std::uint32_t staging) {
  ring_position<Shape::tile_slots> slot;
  ring_position<Shape::stages> at;
  warp_output output(staging);
  int late = -1;
  for (int turn = 0;; ++turn) {
    const tile t = read_tile(r, slot);
    if (t.group < 0) break;
    float sums[Shape::blocks][Shape::accumulators];
    if constexpr (Shape::ping_pong) {
      if (turn % 2 != which) {
        at.advance(sum_stages<Shape>(t));
        continue;
      }
      // Tiles are summed in order. Without waiting for its turn a warpgroup could look for operands of a later round of
      // the ring and find those of an earlier one.
      const std::uint32_t mine = r.turns + 8 * static_cast<std::uint32_t>(which);
      const std::uint32_t other = r.turns + 8 * static_cast<std::uint32_t>(which ^ 1);
      const int parity = (turn / 2 + which + 1) % 2;  // the first turn of the first warpgroup is given
      if (t.m_end - t.m > chunk_rows) {
        barrier_wait(mine, static_cast<std::uint32_t>(parity));
        sum_tile<Shape, Accumulation, Epilogue, 2>(sums, r, at, t, 0, other, false, late);
        write_tile<Shape, Epilogue, 2>(p, sums, t, t.m, output);
      } else {
        barrier_wait(mine, static_cast<std::uint32_t>(parity));
        sum_tile<Shape, Accumulation, Epilogue, 1>(sums, r, at, t, 0, other, false, late);
        write_tile<Shape, Epilogue, 1>(p, sums, t, t.m, output);
      }
    } else {
      const int first_row = t.m + which * chunk_rows;
      const auto offset_a = static_cast<std::uint32_t>(which) * chunk_bytes;
      const bool steps = steps_now<Shape, Epilogue>(p);
      meet_at_half<Shape>(t, steps);
      if (first_row < t.m_end) {
        if constexpr (may_step<Shape, Epilogue>) {
          const int row = warp_row(first_row);
          auto rows = Epilogue::begin(p.epilogue, row, t.m_end);
          sum_tile<Shape, Accumulation, Epilogue, 1>(sums, r, at, t, offset_a, 0, steps, late);
          if (steps) write_steps<Shape, Epilogue>(p, sums[0], rows, t, row, output, r, at, late);
        } else {
          sum_tile<Shape, Accumulation, Epilogue, 1>(sums, r, at, t, offset_a, 0, false, late);
        }
        if constexpr (Epilogue::steps != takes_steps::always) {
          if (!steps) write_tile<Shape, Epilogue, 1>(p, sums, t, first_row, output);
        }
      } else {
        release_late<Shape, Epilogue>(r, late);
        pass_on(r, at, t, epilogue_steps<Shape, Epilogue>(p, t));
      }
      meet_at_half<Shape>(t, steps);
    }
  }
  tma_store_wait();  // shared memory ends with the block
}

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
