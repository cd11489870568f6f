// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The producer warpgroup: it decides on tiles, tells the consumers, and fills the operand ring.

#include <cstdint>

#include <tessera/gemm/detail/hopper/kernel_shape.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// Shared-window addresses of a block's rings.
template <class Shape>
struct rings {
  std::uint32_t operands;    ///< Operand ring.
  std::uint32_t full;        ///< Barriers of its filled slots.
  std::uint32_t empty;       ///< Barriers of its free slots.
  std::uint32_t tiles;       ///< Tile ring, 32 bytes a slot.
  std::uint32_t tile_full;   ///< Barriers of its filled slots.
  std::uint32_t tile_empty;  ///< Barriers of its free slots.
  std::uint32_t turns;       ///< Barriers of whose turn it is to multiply.
  std::uint32_t orders;      ///< In clusters: barriers of tile indices from the first block, then these.

  /// Operands of a slot: chunks of A, then chunks of B.
  __device__ std::uint32_t stage(int slot) const {
    return operands + static_cast<std::uint32_t>(slot) * Shape::stage_bytes;
  }
  /// What a slot holds in a step of an epilogue: in B's place, where the TMA alone writes.
  __device__ std::uint32_t step(int slot) const { return stage(slot) + Shape::chunks_a * chunk_bytes; }
};

/// Reads a slot of the tile ring and gives it back; every thread for itself.
template <class Shape>
__device__ __forceinline__ tile read_tile(const rings<Shape>& r, ring_position<Shape::tile_slots>& position) {
  const auto offset = static_cast<std::uint32_t>(position.slot);
  barrier_wait(r.tile_full + 8 * offset, position.parity);
  const uint4 low = load_shared(r.tiles + 32 * offset);
  const uint2 high = load_shared_8(r.tiles + 32 * offset + 16);
  barrier_arrive(r.tile_empty + 8 * offset);
  position.advance();
  return {static_cast<int>(low.x), static_cast<int>(low.y),  static_cast<int>(low.z),
          static_cast<int>(low.w), static_cast<int>(high.x), static_cast<int>(high.y)};
}

/// Writes a slot of the tile ring; one thread.
template <class Shape>
__device__ __forceinline__ void publish_tile(const rings<Shape>& r, ring_position<Shape::tile_slots>& position,
                                             const tile& t) {
  const auto offset = static_cast<std::uint32_t>(position.slot);
  barrier_wait(r.tile_empty + 8 * offset, position.parity ^ 1);
  store_shared(r.tiles + 32 * offset, {static_cast<unsigned>(t.group), static_cast<unsigned>(t.m),
                                       static_cast<unsigned>(t.m_end), static_cast<unsigned>(t.n)});
  store_shared_8(r.tiles + 32 * offset + 16, {static_cast<unsigned>(t.k_begin), static_cast<unsigned>(t.k_end)});
  barrier_arrive(r.tile_full + 8 * offset);
  position.advance();
}

/// Indices of the tiles of this cluster, ascending: with a counter, as clusters ask for them; without, in turn. The
/// first block asks for both.
///
/// Where rows of A are gathered, clusters ask when they are ready for a tile: those that begin at a time have
/// neighbours, which share rows in the second-level cache. Elsewhere they ask a tile ahead, which hides the answer's
/// latency. Beside kernels of other streams they ask for their first tile too, so that those that begin late take what
/// is left.
template <class Shape>
class tile_order {
 public:
  /// @param p Of the launch. @param r Of the block. @param rank In its cluster.
  template <class P>
  __device__ tile_order(const P& p, const rings<Shape>& r, int rank)
      : counter_(p.tile_counter),
        shared_(p.shared),
        orders_(r.orders),
        rank_(rank),
        next_(static_cast<int>(blockIdx.x) / Shape::cluster) {}

  /// The next index; all lanes of the scheduling warp.
  __device__ int next() {
    const bool asks = counter_ != nullptr && threadIdx.x % 32 == 0;
    if (asks && (shared_ || !first_)) {
      if (first_ || !asks_ahead) ask();
      if constexpr (Shape::cluster > 1) tell();
    }
    first_ = false;
    const int index = __shfl_sync(0xffffffffu, next_, 0);
    if (counter_ == nullptr)
      next_ = index + clusters();
    else if (asks_ahead && asks)
      ask();  // the answer is awaited by the next call
    return index;
  }

  /// Puts the counter back to zero once every cluster is done asking; one thread.
  __device__ void finish() const {
    if (counter_ == nullptr || rank_ != 0) return;
    __threadfence();
    if (atomicAdd(counter_ + 1, 1) == clusters() - 1) {
      counter_[0] = 0;
      counter_[1] = 0;
    }
  }

 private:
  static constexpr bool asks_ahead = Shape::kind == product::variable_k || Shape::gather == gathered::none;

  static __device__ int clusters() { return static_cast<int>(gridDim.x) / Shape::cluster; }

  __device__ void ask() {
    if (rank_ == 0) next_ = (shared_ ? 0 : clusters()) + atomicAdd(counter_, 1);
  }
  // From the first block to the second: the index that the first was given.
  __device__ void tell() {
    const std::uint32_t slot = static_cast<std::uint32_t>(order_.slot);
    const std::uint32_t barrier = orders_ + 8 * slot, word = orders_ + 8 * order_slots + 4 * slot;
    if (rank_ == 0) {
      store_remote(word, static_cast<std::uint32_t>(next_), barrier, 1);
    } else {
      barrier_arrive_expect(barrier, 4);
      barrier_wait(barrier, order_.parity);
      next_ = static_cast<int>(load_shared_4(word));
    }
    order_.advance();
  }

  std::int32_t* counter_;
  bool shared_;
  std::uint32_t orders_;
  int rank_;
  int next_;
  bool first_ = true;
  ring_position<order_slots> order_;
};

/// Stages of a tile's sum. A group without rows takes one, all of whose lines are zeroed, so that its zeros come out of
/// the same instructions as everything else.
template <class Shape>
__device__ __forceinline__ int sum_stages(const tile& t) {
  const int stages = (t.k_end - t.k_begin + Shape::tile_k - 1) / Shape::tile_k;
  return Shape::kind == product::variable_k && stages == 0 ? 1 : stages;
}

/// Chunks of A that hold rows of the result.
__device__ __forceinline__ int used_chunks_a(const tile& t) {
  return t.m >= t.m_end ? 0 : t.m_end - t.m > chunk_rows ? 2 : 1;
}

/// Chunks of B that hold columns of the result.
template <class Shape, class Epilogue>
__device__ __forceinline__ int used_chunks_b(const tile& t, int n) {
  const int chunks = (n - t.n + chunk_rows - 1) / chunk_rows * (Epilogue::split ? 2 : Shape::parts);
  return chunks < Shape::chunks_b ? chunks : Shape::chunks_b;
}

/// Whether an epilogue may take steps. They need all warps of one block at the same tile.
template <class Shape, class Epilogue>
inline constexpr bool may_step = Epilogue::steps != takes_steps::never&& Shape::cluster == 1 && !Shape::ping_pong;

/// Whether it does in this launch.
template <class Shape, class Epilogue, class P>
__device__ __forceinline__ bool steps_now(const P& p) {
  if constexpr (!may_step<Shape, Epilogue>)
    return false;
  else if constexpr (Epilogue::steps == takes_steps::always)
    return true;
  else
    return p.epilogue.reads_old;
}

/// Steps of the operand ring, after those of a tile's sum, that bring what its epilogue reads: one for 64 columns.
template <class Shape, class Epilogue, class P>
__device__ __forceinline__ int epilogue_steps(const P& p, const tile& t) {
  return steps_now<Shape, Epilogue>(p) ? used_chunks_b<Shape, Epilogue>(t, p.sizes.n) : 0;
}

/// Bytes that a step of the epilogue brings for 16 rows, which are one warp's.
template <class Epilogue>
inline constexpr int step_bytes = Epilogue::step_blocks* staging_bytes;

/// Enqueues this block's share of the chunks of B for the sum from `k` on. Where B has parts, its chunks are the same
/// columns of one part after the other.
template <class Shape, class Epilogue, class P>
__device__ __forceinline__ void load_b(const CUtensorMap& map, std::uint32_t target, std::uint32_t barrier,
                                       const tile& t, int chunks, int k, const P& p, int rank) {
#pragma unroll
  for (int i = 0; i < Shape::chunks_b / Shape::cluster; ++i) {
    const int c = i * Shape::cluster + (Shape::cluster > 1 ? rank : 0);
    if (c >= chunks) break;
    const int group = Shape::parts > 1 ? c : t.group * p.b_group_step;
    const int column = Shape::parts > 1  ? t.n
                       : Epilogue::split ? t.n + c / 2 * chunk_rows + c % 2 * p.split
                                         : t.n + c * chunk_rows;
    const std::uint32_t chunk = target + static_cast<std::uint32_t>(c) * chunk_bytes;
    constexpr auto everyone = static_cast<std::uint16_t>((1 << Shape::cluster) - 1);
    if constexpr (Shape::kind == product::variable_k) {
      if constexpr (Shape::cluster > 1)
        tma_load_multicast(chunk, map, barrier, everyone, column, k);
      else
        tma_load(chunk, map, barrier, column, k);
    } else {
      const int x = Shape::order_b == contiguous::k ? k : column, y = Shape::order_b == contiguous::k ? column : k;
      if constexpr (Shape::cluster > 1)
        tma_load_multicast(chunk, map, barrier, everyone, x, y, group);
      else
        tma_load(chunk, map, barrier, x, y, group);
    }
  }
}

/// Enqueues the chunks of A for the sum from `k` on.
template <class Shape>
__device__ __forceinline__ void load_a(const CUtensorMap& map, std::uint32_t target, std::uint32_t barrier,
                                       const tile& t, int chunks, int k) {
#pragma unroll
  for (int c = 0; c < Shape::chunks_a; ++c) {
    if (c >= chunks) continue;
    const std::uint32_t chunk = target + static_cast<std::uint32_t>(c) * chunk_bytes;
    const int row = t.m + c * chunk_rows;
    if constexpr (Shape::kind == product::variable_k)
      tma_load(chunk, map, barrier, row, k);
    else
      tma_load(chunk, map, barrier, k, row);
  }
}

/// Row `index` of a matrix whose row 0 is at `base`: one instruction.
__device__ __forceinline__ const bfloat16* offset_row(const bfloat16* base, std::int32_t index,
                                                      std::int32_t row_bytes) {
  return reinterpret_cast<const bfloat16*>(reinterpret_cast<const char*>(base) +
                                           static_cast<std::int64_t>(index) * row_bytes);
}

/// Waits until a slot of the operand ring is empty, in all blocks of the cluster.
template <class Shape>
__device__ __forceinline__ void wait_empty(const rings<Shape>& r, const ring_position<Shape::stages>& at) {
  barrier_wait(r.empty + 8 * static_cast<std::uint32_t>(at.slot), at.parity ^ 1);
}

/// Fills the steps of a tile's epilogue, 16 rows behind one another, only those blocks of them that have rows. Where
/// one operand is gathered, a slot is full when all threads have arrived, though the TMA alone brings these.
/// @param leader Whether this thread feeds it.
template <class Shape, class Epilogue, class P>
__device__ __forceinline__ void produce_epilogue(const P& p, const rings<Shape>& r, ring_position<Shape::stages>& at,
                                                 const tile& t, bool leader) {
  static constexpr int bytes = step_bytes<Epilogue>;
  static_assert(bytes * Shape::consumer_warps <= Shape::chunks_b * chunk_bytes,
                "a step is larger than B's part of a slot");
  const int rows = t.m_end - t.m < Shape::tile_m ? t.m_end - t.m : Shape::tile_m;
  const int steps = epilogue_steps<Shape, Epilogue>(p, t);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_empty(r, at);
    const std::uint32_t full = r.full + 8 * static_cast<std::uint32_t>(at.slot);
    if (leader) {
      barrier_arrive_expect(full, static_cast<std::uint32_t>((rows + 15) / 16 * bytes));
      std::uint32_t target = r.step(at.slot);
#pragma unroll 1
      for (int row = 0; row < rows; row += 16, target += bytes)
        Epilogue::load(p.epilogue, t, target, full, t.m + row, t.n + step * chunk_rows);
    }
    __syncwarp();
    if constexpr (Shape::gather != gathered::none) barrier_arrive(full);
    at.advance();
  }
}

/// One warp, in which one thread feeds the TMA with both operands.
template <class Shape, class Epilogue, int StepN, class P>
__device__ void produce(const CUtensorMap& map_a, const CUtensorMap& map_b, const P& p, const rings<Shape>& r,
                        int rank) {
  tile_walk<Shape::kind, Shape::tile_m, StepN, Shape::cluster> walk(p.sizes);
  tile_order<Shape> order(p, r, rank);
  ring_position<Shape::tile_slots> slot;
  ring_position<Shape::stages> at;
  const bool leader = threadIdx.x % 32 == 0;
  for (;;) {
    const tile t = walk.find(order.next(), rank);
    if (leader) publish_tile(r, slot, t);
    __syncwarp();
    if (t.group < 0) break;
    const int chunks_a = used_chunks_a(t), chunks_b = used_chunks_b<Shape, Epilogue>(t, p.sizes.n);
    const auto bytes = static_cast<std::uint32_t>((chunks_a + chunks_b) * chunk_bytes);
    int k = t.k_begin;
#pragma unroll 1
    for (int left = sum_stages<Shape>(t); left > 0; --left, k += Shape::tile_k) {
      wait_empty(r, at);  // the whole warp, so that it stays converged around the one thread that enqueues
      if (leader) {
        const std::uint32_t full = r.full + 8 * static_cast<std::uint32_t>(at.slot);
        const std::uint32_t stage = r.stage(at.slot);
        barrier_arrive_expect(full, bytes);
        load_a<Shape>(map_a, stage, full, t, chunks_a, k);
        load_b<Shape, Epilogue>(map_b, stage + Shape::chunks_a * chunk_bytes, full, t, chunks_b, k, p, rank);
      }
      __syncwarp();
      at.advance();
    }
    if constexpr (may_step<Shape, Epilogue>) produce_epilogue<Shape, Epilogue>(p, r, at, t, leader);
  }
  if (leader) order.finish();
}

/// Four warps, of which one thread feeds the TMA with B, and all copy rows of A, 16 bytes a time, placed as the
/// TMA would with its 128-byte swizzle.
///
/// Copies announce themselves on the stage's barrier when they are complete, so that nobody here waits for memory and
/// the whole ring is under way. They are ordinary writes to the matrix units, which is why consumers fence after the
/// wait.
template <class Shape, class Epilogue, int StepN, class P>
__device__ void produce_gathered(const CUtensorMap& map_b, const P& p, const rings<Shape>& r, int rank) {
  static constexpr bool rows_are_k = Shape::kind == product::variable_k;
  // Lines of 128 bytes: 8 threads copy one; 128 threads, 16 at a time.
  static constexpr int lines = rows_are_k ? Shape::tile_k : Shape::tile_m;
  static constexpr int lines_each = lines / 16;
  static constexpr int chunks_of_line = rows_are_k ? Shape::chunks_a : 1;

  tile_walk<Shape::kind, Shape::tile_m, StepN, Shape::cluster> walk(p.sizes);
  tile_order<Shape> order(p, r, rank);
  ring_position<Shape::tile_slots> slot;
  ring_position<Shape::stages> at;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int unit = thread % 8, first_line = thread / 8;
  const bool leader = thread == 0;
  const auto row_bytes = static_cast<std::int32_t>(p.gather_stride * 2);
  // the same for all lines of a thread, because they are 16 apart
  const auto swizzled = static_cast<std::uint32_t>(first_line * 128 + (unit ^ (first_line % 8)) * 16);

  for (;;) {
    tile t;
    if (warp == 0) {
      t = walk.find(order.next(), rank);
      if (leader) publish_tile(r, slot, t);
      __syncwarp();
    } else {
      t = read_tile(r, slot);
    }
    if (t.group < 0) break;
    const int chunks_a = used_chunks_a(t), chunks_b = used_chunks_b<Shape, Epilogue>(t, p.sizes.n);
    const auto bytes = static_cast<std::uint32_t>(chunks_b * chunk_bytes);

    const bfloat16* rows[lines_each];  // `variable_m`: null beyond the group
    std::int32_t upcoming[lines_each];
    if constexpr (rows_are_k) {
#pragma unroll
      for (int i = 0; i < lines_each; ++i) {
        const int row = t.k_begin + first_line + 16 * i;
        upcoming[i] = row < t.k_end ? __ldg(p.gather + row) : 0;
      }
    } else {
#pragma unroll
      for (int i = 0; i < lines_each; ++i) {
        const int row = t.m + first_line + 16 * i;
        rows[i] = row < t.m_end ? p.gather_data + p.gather_stride * __ldg(p.gather + row) + unit * 8 : nullptr;
      }
    }
    const bool whole_rows = rows_are_k || t.m + chunks_a * chunk_rows <= t.m_end;

    int k = t.k_begin;
#pragma unroll 1
    for (int left = sum_stages<Shape>(t); left > 0; --left, k += Shape::tile_k) {
      bool whole = whole_rows && k + Shape::tile_k <= t.k_end;  // as nearly always
      if constexpr (rows_are_k) {
        // What follows runs for every stage on few warps: addresses take one instruction, indices come a stage early.
        const bfloat16* const columns_begin = p.gather_data + t.m + unit * 8;
        whole = whole && t.m_end - t.m >= chunks_of_line * chunk_rows;
#pragma unroll
        for (int i = 0; i < lines_each; ++i) rows[i] = offset_row(columns_begin, upcoming[i], row_bytes);
        const std::int32_t* const next = p.gather + k + Shape::tile_k + first_line;
        if (k + 2 * Shape::tile_k <= t.k_end) {
#pragma unroll
          for (int i = 0; i < lines_each; ++i) upcoming[i] = __ldg(next + 16 * i);
        } else {
#pragma unroll
          for (int i = 0; i < lines_each; ++i)
            upcoming[i] = k + Shape::tile_k + first_line + 16 * i < t.k_end ? __ldg(next + 16 * i) : 0;
        }
      }
      wait_empty(r, at);
      const std::uint32_t stage = r.stage(at.slot);
      if (leader) {
        const std::uint32_t full = r.full + 8 * static_cast<std::uint32_t>(at.slot);
        barrier_arrive_expect(full, bytes);
        load_b<Shape, Epilogue>(map_b, stage + Shape::chunks_a * chunk_bytes, full, t, chunks_b, k, p, rank);
      }
      __syncwarp();
      const std::uint32_t target = stage + swizzled;
      if constexpr (rows_are_k) {
        if (whole) {
#pragma unroll
          for (int i = 0; i < lines_each; ++i)
#pragma unroll
            for (int c = 0; c < chunks_of_line; ++c)
              copy_async(target + static_cast<std::uint32_t>(c * chunk_bytes + i * 16 * 128), rows[i] + c * chunk_rows);
        }
#pragma unroll
        for (int c = 0; c < chunks_of_line; ++c) {
          if (whole || c >= chunks_a) continue;
          const bool inside = t.m + c * chunk_rows + unit * 8 < t.m_end;
#pragma unroll
          for (int i = 0; i < lines_each; ++i) {
            const bool valid = inside && k + first_line + 16 * i < t.k_end;
            copy_async(target + static_cast<std::uint32_t>(c * chunk_bytes + i * 16 * 128),
                       valid ? rows[i] + c * chunk_rows : p.gather_data, valid ? 16 : 0);
          }
        }
      } else {
        const bool inside = k + unit * 8 < t.k_end;
        if (whole) {
#pragma unroll
          for (int i = 0; i < lines_each; ++i)
            if (i * 16 < chunks_a * chunk_rows)
              copy_async(target + static_cast<std::uint32_t>(i * 16 * 128), rows[i] + k);
        }
#pragma unroll
        for (int i = 0; i < lines_each; ++i) {
          if (whole || i * 16 >= chunks_a * chunk_rows) continue;
          const bool valid = inside && rows[i] != nullptr;
          copy_async(target + static_cast<std::uint32_t>(i * 16 * 128), valid ? rows[i] + k : p.gather_data,
                     valid ? 16 : 0);
        }
      }
      copy_async_arrive(r.full + 8 * static_cast<std::uint32_t>(at.slot));
      at.advance();
    }
    if constexpr (may_step<Shape, Epilogue>) produce_epilogue<Shape, Epilogue>(p, r, at, t, leader);
  }
  copy_async_wait_all();
  if (leader) order.finish();
}

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
