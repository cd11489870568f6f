// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// From accumulators to memory: one warp's rows through shared memory to the TMA, and the epilogue that stores,
/// with a bias or added to what is there.
///
/// A warp puts 16 rows x 128 bytes into one of its two buffers and goes on while the TMA stores them: the next
/// tile's products start before this one's last store has left. Only where a group ends within the 16 rows does the
/// warp store them itself, because the rows below are its neighbour's.
///
/// An epilogue is a struct with `params`; `split` (whether B's chunks are gate and up columns in turn); `step_blocks`;
/// and `steps`, when it takes steps.
///
/// Without steps it needs the sums alone. A warp calls `write<TileN>(params, sums, tile, first_row, output)` for its 16
/// rows; with `by_warpgroup` all four warps of a warpgroup do if any of them has rows.
///
/// With steps it reads `step_blocks` blocks of 2 KB for each 16 rows x 64 columns of the sums. They come through the
/// ring of operands: each 64 columns of a tile are one more step after its sum's. The producer calls `load(params,
/// tile, target, barrier, first_row, column)` for 16 rows of a step. A consumer warp calls `begin(params, first_row,
/// row_end)` before the products, for what it keeps of its rows, and after them for each step `step<Chunk>(params,
/// sums, rows, tile, output, blocks)`, then `send_step<Chunk>(params, rows, tile, first_row, output, blocks)`, between
/// which all four warps wait until the TMA has read what the step before sent. The blocks are the warp's from
/// the first call on: it may write into them, and sends them as it does its buffers, which it uses in turn.

#include <cstdint>
#include <type_traits>

#include <tessera/core/dtype.hpp>
#include <tessera/gemm/detail/hopper/kernel_shape.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// When an epilogue takes steps: never, in launches whose `params::reads_old` is set, or in all.
enum class takes_steps { never, to_read_old, always };

/// 16 rows x 64 columns of bf16 as the accumulators hold them: `[2 j]` and `[2 j + 1]` are the pairs of columns
/// `8 j + lane % 4 * 2 + {0, 1}` in rows `lane / 4` and `lane / 4 + 8`.
using fragment = std::uint32_t[16];

/// A matrix that a kernel writes: as the TMA sees it, in boxes of 16 rows x 128 bytes, and as threads do.
template <class T>
struct output_matrix {
  CUtensorMap map;            ///< Rank 3: columns, rows, layers.
  T* data;                    ///< Row 0 of layer 0.
  std::int64_t layer_stride;  ///< Elements between layers: groups, or H's gates and ups where gates come first.
  std::int64_t row_stride;    ///< Elements between rows.
  int columns;                ///< Columns.
  bool layer_per_group;       ///< Whether groups are layers; then nothing else lies below a group's rows.
};

/// A warp's two buffers of 16 rows x 128 bytes. Rows are swizzled as the TMA expects: 16-byte unit `u` of row
/// `r` stands at unit `u ^ r % 8`. All lanes call together.
class warp_output {
 public:
  /// @param address Of both buffers, aligned to 1024 bytes.
  __device__ explicit warp_output(std::uint32_t address) : address_(address) {}

  /// The buffer that was written longer ago, once its store has read it.
  __device__ __forceinline__ std::uint32_t acquire() {
    which_ ^= 1;
    if (lane() == 0) tma_store_wait_read<1>();
    __syncwarp();
    return buffer(which_);
  }
  /// One of the buffers, for those who know that no store reads it. @param which 0 or 1.
  __device__ __forceinline__ std::uint32_t buffer(int which) const {
    return address_ + static_cast<std::uint32_t>(which) * staging_bytes;
  }

  /// Puts a fragment.
  static __device__ __forceinline__ void put(std::uint32_t buffer, const fragment& f) {
#pragma unroll
    for (int j = 0; j < 8; j += 2)
      store_matrices(matrix_address(buffer, j), f[2 * j], f[2 * j + 1], f[2 * j + 2], f[2 * j + 3]);
  }
  /// Puts 16 rows x 32 columns of fp32, as 16 accumulators of a lane hold them.
  static __device__ __forceinline__ void put(std::uint32_t buffer, const float* sums) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_shared_8(address(buffer, lane() / 4 + 8 * half, 32 * j + lane() % 4 * 8),
                       {__float_as_uint(sums[4 * j + 2 * half]), __float_as_uint(sums[4 * j + 2 * half + 1])});
  }
  /// Adds 16 rows x 32 columns of fp32 to what `put` would put there.
  static __device__ __forceinline__ void add(std::uint32_t buffer, const float* sums) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t at = address(buffer, lane() / 4 + 8 * (i % 2), 32 * (i / 2) + lane() % 4 * 8);
      const uint2 old = load_shared_8(at);
      store_shared_8(at, {__float_as_uint(__uint_as_float(old.x) + sums[2 * i]),
                          __float_as_uint(__uint_as_float(old.y) + sums[2 * i + 1])});
    }
  }
  /// Gets a fragment.
  static __device__ __forceinline__ void get(std::uint32_t buffer, fragment& f) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      std::uint32_t m[4];
      load_matrices(matrix_address(buffer, j), m);
      f[2 * j] = m[0], f[2 * j + 1] = m[1], f[2 * j + 2] = m[2], f[2 * j + 3] = m[3];
    }
  }

  /// Shows the TMA, and the other lanes, what this warp has put.
  static __device__ __forceinline__ void show() {
    async_proxy_fence();
    __syncwarp();
  }
  /// Sends a buffer to rows `[first_row, row_end)`, at most 16, from `column` on, of layer `layer`.
  /// @tparam Several Whether this is one of several between `show` and `commit`; otherwise it does both. @tparam Add
  /// Whether fp32 numbers are added to what is there.
  template <bool Several = false, bool Add = false, class T>
  static __device__ __forceinline__ void send(std::uint32_t buffer, const output_matrix<T>& to, int layer,
                                              int first_row, int row_end, int column) {
    if (to.layer_per_group || first_row + 16 <= row_end) {
      if constexpr (!Several) show();
      if (lane() == 0) {
        if constexpr (Add)
          tma_add(to.map, buffer, column, first_row, layer);
        else
          tma_store(to.map, buffer, column, first_row, layer);
      }
    } else {
      if constexpr (!Several) __syncwarp();
      store_rows<Add>(buffer, to, layer, first_row, row_end, column);
    }
    if constexpr (!Several) commit();
  }
  /// Closes a group of sends; an empty one too: `acquire` counts them.
  static __device__ __forceinline__ void commit() {
    if (lane() == 0) tma_store_commit();
  }

  /// Address of byte `byte` of row `lane / 4 + 8 * half`.
  static __device__ __forceinline__ std::uint32_t element_address(std::uint32_t buffer, int half, int byte) {
    return address(buffer, lane() / 4 + 8 * half, byte);
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ int line(int i) { return 4 * i + lane() / 8; }
  static __device__ __forceinline__ int unit() { return lane() % 8; }
  static __device__ __forceinline__ std::uint32_t address(std::uint32_t buffer, int row, int byte) {
    return buffer + static_cast<std::uint32_t>(row * 128 + ((byte / 16) ^ (row % 8)) * 16 + byte % 16);
  }
  // of the row that this lane names for the 16 x 16 block from column 8 j on
  static __device__ __forceinline__ std::uint32_t matrix_address(std::uint32_t buffer, int j) {
    return address(buffer, lane() % 16, (j + lane() / 16) * 16);
  }

  template <bool Add, class T>
  static __device__ __forceinline__ void store_rows(std::uint32_t buffer, const output_matrix<T>& to, int layer,
                                                    int first_row, int row_end, int column) {
    static constexpr int per_unit = 16 / static_cast<int>(sizeof(T));
    const int at = column + unit() * per_unit;
    T* const target = to.data + layer * to.layer_stride + (first_row + line(0)) * to.row_stride + at;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      if (first_row + line(i) >= row_end || at >= to.columns) continue;
      uint4 v = load_shared(address(buffer, line(i), unit() * 16));
      uint4* const place = reinterpret_cast<uint4*>(target + 4 * i * to.row_stride);
      if constexpr (Add) {
        const uint4 old = *place;
        v = {sum(old.x, v.x), sum(old.y, v.y), sum(old.z, v.z), sum(old.w, v.w)};
      }
      *place = v;
    }
  }
  static __device__ __forceinline__ unsigned sum(unsigned a, unsigned b) {
    return __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
  }

  std::uint32_t address_;
  int which_ = 0;
};

/// Rounds the 64 columns from `64 * Chunk` on.
template <int Chunk, int Count>
__device__ __forceinline__ void round_chunk(const float (&sums)[Count], fragment& f) {
#pragma unroll
  for (int i = 0; i < 16; ++i) f[i] = pack_bf16(sums[Chunk * 32 + 2 * i], sums[Chunk * 32 + 2 * i + 1]);
}

/// Sends a buffer of fp32 numbers, stored or added as `p` says. @tparam P Parameters of an epilogue with steps.
template <class P>
__device__ __forceinline__ void send_fp32(const P& p, std::uint32_t buffer, int layer, int first_row, int row_end,
                                          int column) {
  if (p.accumulate)
    warp_output::send<false, true>(buffer, p.c, layer, first_row, row_end, column);
  else
    warp_output::send(buffer, p.c, layer, first_row, row_end, column);
}

/// Adds a fragment to the 64 columns from `64 * Chunk` on, and rounds the sums into it.
template <int Chunk, int Count>
__device__ __forceinline__ void add_chunk(const float (&sums)[Count], fragment& f) {
#pragma unroll
  for (int i = 0; i < 16; ++i)
    f[i] = pack_bf16(low_bf16(f[i]) + sums[Chunk * 32 + 2 * i], high_bf16(f[i]) + sums[Chunk * 32 + 2 * i + 1]);
}

/// Adds `bias[first + j]` to the 64 columns from `64 * Chunk` on. Columns from `columns` on get nothing.
template <int Chunk, int Count>
__device__ __forceinline__ void add_bias(float (&sums)[Count], const bfloat16* bias, int first, int columns) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int column = first + 8 * j + lane % 4 * 2;
    if (column >= columns) continue;
    const std::uint32_t pair = __ldg(reinterpret_cast<const std::uint32_t*>(bias + column));
    float* const d = sums + Chunk * 32 + 4 * j;
    d[0] += low_bf16(pair), d[1] += high_bf16(pair), d[2] += low_bf16(pair), d[3] += high_bf16(pair);
  }
}

/// Calls `f.template operator()<0>()`, ..., `<Count - 1>()`: accumulators are registers, their indices constants.
template <int Count, class F>
__device__ __forceinline__ void for_each_chunk(F&& f) {
  f.template operator()<0>();
  if constexpr (Count > 1) f.template operator()<1>();
  if constexpr (Count > 2) f.template operator()<2>();
  if constexpr (Count > 3) f.template operator()<3>();
}

/// Stores the result, rounded once, or adds it to what is there. What is there comes through the ring, so that memory
/// is read under the products; or the TMA adds, fp32 alone, which leaves the ring to the next tile's operands
/// but is slow where tiles are many and their sums short. `TC` is bfloat16 or float.
template <class TC>
struct store_epilogue {
  static constexpr bool split = false, by_warpgroup = false;
  static constexpr takes_steps steps = takes_steps::to_read_old;
  static constexpr int width = 128 / static_cast<int>(sizeof(TC));  ///< Columns of a block.
  static constexpr int step_blocks = chunk_rows / width;

  struct params {
    output_matrix<TC> c;
    bool accumulate;       ///< Whether the old content is added.
    bool reads_old;        ///< Whether it comes through the ring for that.
    const bfloat16* bias;  ///< `[G, columns]`, or null.
  };

  template <int TileN>
  static __device__ __forceinline__ void write(const params& p, float (&sums)[TileN / 2], const tile& t, int first_row,
                                               warp_output& output) {
    for_each_chunk<TileN / chunk_rows>([&]<int Chunk>() {
      const int column = t.n + Chunk * chunk_rows;
      if (column >= p.c.columns) return;
      add_own_bias<Chunk>(p, sums, t, column);
#pragma unroll
      for (int part = 0; part < step_blocks; ++part) {
        if (column + part * width >= p.c.columns) continue;
        if constexpr (std::is_same_v<TC, float>) {
          const std::uint32_t buffer = output.acquire();
          warp_output::put(buffer, sums + Chunk * 32 + 16 * part);
          send_fp32(p, buffer, layer_of(p, t), first_row, t.m_end, column + part * width);
        } else {
          fragment f;
          round_chunk<Chunk>(sums, f);
          const std::uint32_t buffer = output.acquire();
          warp_output::put(buffer, f);
          output.send(buffer, p.c, layer_of(p, t), first_row, t.m_end, column);
        }
      }
    });
  }

  /// Enqueues the old content of 16 rows x 64 columns.
  static __device__ __forceinline__ void load(const params& p, const tile& t, std::uint32_t target,
                                              std::uint32_t barrier, int first_row, int column) {
#pragma unroll
    for (int part = 0; part < step_blocks; ++part)
      tma_load(target + static_cast<std::uint32_t>(part) * staging_bytes, p.c.map, barrier, column + part * width,
               first_row, layer_of(p, t));
  }

  struct row_values {};
  static __device__ __forceinline__ row_values begin(const params&, int, int) { return {}; }

  template <int Chunk, int Count>
  static __device__ __forceinline__ void step(const params& p, float (&sums)[Count], row_values&, const tile& t,
                                              const warp_output&, std::uint32_t blocks) {
    add_own_bias<Chunk>(p, sums, t, t.n + Chunk * chunk_rows);
    if constexpr (std::is_same_v<TC, float>) {
      warp_output::add(blocks, sums + Chunk * 32);
      warp_output::add(blocks + staging_bytes, sums + Chunk * 32 + 16);
    } else {
      fragment f;
      warp_output::get(blocks, f);
      add_chunk<Chunk>(sums, f);
      warp_output::put(blocks, f);
    }
  }
  template <int Chunk>
  static __device__ __forceinline__ void send_step(const params& p, const row_values&, const tile& t, int first_row,
                                                   const warp_output&, std::uint32_t blocks) {
    const int column = t.n + Chunk * chunk_rows;
    warp_output::show();
#pragma unroll
    for (int part = 0; part < step_blocks; ++part)
      if (column + part * width < p.c.columns)
        warp_output::send<true>(blocks + static_cast<std::uint32_t>(part) * staging_bytes, p.c, layer_of(p, t),
                                first_row, t.m_end, column + part * width);
    warp_output::commit();
  }

 private:
  static __device__ __forceinline__ int layer_of(const params& p, const tile& t) {
    return p.c.layer_per_group ? t.group : 0;
  }
  template <int Chunk, int Count>
  static __device__ __forceinline__ void add_own_bias(const params& p, float (&sums)[Count], const tile& t,
                                                      int column) {
    if (p.bias != nullptr)
      add_bias<Chunk>(sums, p.bias + static_cast<std::int64_t>(t.group) * p.c.columns, column, p.c.columns);
  }
};

/// The sum of `Parts` products with the same 64 columns each, in their order, in fp32.
template <int Parts>
struct parts_epilogue {
  static constexpr bool split = false, by_warpgroup = false;
  static constexpr takes_steps steps = takes_steps::never;

  struct params {
    output_matrix<float> c;
  };

  template <int TileN>
  static __device__ __forceinline__ void write(const params& p, float (&sums)[TileN / 2], const tile& t, int first_row,
                                               warp_output& output) {
    static_assert(TileN == Parts * chunk_rows);
#pragma unroll
    for (int i = 0; i < 32; ++i)
#pragma unroll
      for (int part = 1; part < Parts; ++part) sums[i] += sums[32 * part + i];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = t.n + 32 * half;
      if (column >= p.c.columns) continue;
      const std::uint32_t buffer = output.acquire();
      warp_output::put(buffer, sums + 16 * half);
      output.send(buffer, p.c, 0, first_row, t.m_end, column);
    }
  }
};

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
