// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The epilogue that stores a tile's columns as rows, for products of which the rows of the result belong to the
/// operand that is not gathered: rows are cheap to gather as A, whose tile is half as large as B's.

#include <cstdint>
#include <type_traits>

#include <tessera/gemm/detail/hopper/epilogue.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// Stores the transposed result, rounded once, in `variable_k`; or adds it to what is there, as `store_epilogue` does.
/// `TC` is bfloat16 or float.
///
/// The four warps of a warpgroup hold the same columns of 16 rows each, which are 16 columns each of the same rows of
/// the result. They write together into one buffer of every warp, which then sends its own: a box of 16 rows x 128
/// bytes. What is added to comes and goes in boxes of 64 rows x 16 columns, each of which is one warp's.
template <class TC>
struct transposed_epilogue {
  static constexpr bool split = false, by_warpgroup = true;
  static constexpr takes_steps steps = takes_steps::to_read_old;
  static constexpr int box_bytes =
      16 * static_cast<int>(sizeof(TC));  ///< A row of a box; boxes are swizzled by as many.
  static constexpr int step_blocks = chunk_rows * box_bytes / staging_bytes;

  struct params {
    output_matrix<TC> c;
    int rows;           ///< Of the result: columns of the tiles.
    bool accumulate;    ///< Whether the old content is added.
    bool reads_old;     ///< Whether it comes through the ring for that, in boxes.
    CUtensorMap boxes;  ///< Of 64 rows x 16 columns; if `reads_old`.
  };

  /// All warps of a warpgroup call together. @param first_row Of this warp's 16 rows, columns of the result; those from
  /// the tile's end on are not stored.
  template <int TileN>
  static __device__ __forceinline__ void write(const params& p, float (&sums)[TileN / 2], const tile& t, int first_row,
                                               warp_output& output) {
    const int warp = static_cast<int>(threadIdx.x / 32 % 4), first_column = first_row - warp * 16;
    for_each_chunk<TileN / chunk_rows>([&]<int Chunk>() {
      const int row = t.n + Chunk * chunk_rows;
      if (row >= p.rows) return;
      if constexpr (std::is_same_v<TC, float>) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int first = row + 32 * half;
          if (first >= p.rows) continue;
          const std::uint32_t mine = acquire(output);
          put(mine - static_cast<std::uint32_t>(warp) * all_buffers, sums + Chunk * 32 + 16 * half);
          send(p, mine, t, first + warp % 2 * 16, first_column + warp / 2 * 32, output);
        }
      } else {
        fragment f;
        round_chunk<Chunk>(sums, f);
        const std::uint32_t mine = acquire(output);
        put(mine - static_cast<std::uint32_t>(warp) * all_buffers, f);
        send(p, mine, t, row + warp * 16, first_column, output);
      }
    });
  }

  /// Enqueues the old content that 16 rows x 64 columns of the sums are added to.
  static __device__ __forceinline__ void load(const params& p, const tile& t, std::uint32_t target,
                                              std::uint32_t barrier, int first_row, int column) {
    tma_load(target, p.boxes, barrier, first_row, column, t.group);
  }

  struct row_values {};
  static __device__ __forceinline__ row_values begin(const params&, int, int) { return {}; }

  template <int Chunk, int Count>
  static __device__ __forceinline__ void step(const params&, const float (&sums)[Count], row_values&, const tile&,
                                              const warp_output&, std::uint32_t box) {
    if constexpr (std::is_same_v<TC, float>) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int row = i / 4 * 8 + lane() % 4 * 2 + i % 2, column = lane() / 4 + i % 4 / 2 * 8;
        const std::uint32_t at =
            box + static_cast<std::uint32_t>(row * box_bytes + ((column / 4) ^ (row / 2 % 4)) * 16 + column % 4 * 4);
        store_shared_4(at, __float_as_uint(__uint_as_float(load_shared_4(at)) + sums[Chunk * 32 + i]));
      }
    } else {
      fragment f;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        std::uint32_t m[4];
        load_matrices_transposed(matrix_address(box, j), m);
        f[2 * j] = m[0], f[2 * j + 1] = m[1], f[2 * j + 2] = m[2], f[2 * j + 3] = m[3];
      }
      add_chunk<Chunk>(sums, f);
#pragma unroll
      for (int j = 0; j < 8; j += 2)
        store_matrices_transposed(matrix_address(box, j), f[2 * j], f[2 * j + 1], f[2 * j + 2], f[2 * j + 3]);
    }
  }
  template <int Chunk>
  static __device__ __forceinline__ void send_step(const params& p, const row_values&, const tile& t, int first_row,
                                                   const warp_output&, std::uint32_t box) {
    warp_output::show();
    if (lane() == 0) tma_store(p.boxes, box, first_row, t.n + Chunk * chunk_rows, t.group);
    warp_output::commit();
  }

 private:
  static constexpr std::uint32_t all_buffers = 2 * staging_bytes;  // of a warp

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ void meet() { named_barrier(1 + static_cast<int>(threadIdx.x / 128), 128); }

  /// Of a row of the box's 16 from row `8 j` on: lane `l` names row `l % 8` of matrix `l / 8`, in the order of `put`.
  static __device__ __forceinline__ std::uint32_t matrix_address(std::uint32_t box, int j) {
    const int row = 8 * j + lane() / 16 * 8 + lane() % 8;
    return box + static_cast<std::uint32_t>(row * box_bytes + ((lane() / 8 % 2) ^ (row / 4 % 2)) * 16);
  }

  /// This warp's buffer, once no store reads the same one of any warp.
  static __device__ __forceinline__ std::uint32_t acquire(warp_output& output) {
    const std::uint32_t mine = output.acquire();
    meet();
    return mine;
  }
  /// Sends this warp's buffer once all warps have written into it.
  static __device__ __forceinline__ void send(const params& p, std::uint32_t mine, const tile& t, int row, int column,
                                              warp_output& output) {
    async_proxy_fence();
    meet();
    if constexpr (std::is_same_v<TC, float>)
      send_fp32(p, mine, t.group, row, p.rows, column);
    else
      warp_output::send(mine, p.c, t.group, row, p.rows, column);
  }

  /// Puts 64 columns of 16 rows as 64 rows of 32 bytes: 16 of them into each warp's buffer. @param first The first
  /// warp's.
  static __device__ __forceinline__ void put(std::uint32_t first, const fragment& f) {
    const int warp = static_cast<int>(threadIdx.x / 32 % 4);
    // lane l names row l % 8 of matrix l / 8: (columns 0-7, rows 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
    const int row = lane() / 16 * 8 + lane() % 8, unit = 2 * warp + lane() / 8 % 2;
    const std::uint32_t place = first + static_cast<std::uint32_t>(row * 128 + (unit ^ (row % 8)) * 16);
#pragma unroll
    for (int j = 0; j < 8; j += 2)
      store_matrices_transposed(place + static_cast<std::uint32_t>(j / 2) * all_buffers, f[2 * j], f[2 * j + 1],
                                f[2 * j + 2], f[2 * j + 3]);
  }
  /// Puts 32 columns of 16 rows of fp32 as 32 rows of 64 bytes: of buffers `2 h` and `2 h + 1`, which hold columns
  /// `32 h` to `32 h + 31` of the result, `h` is this warp's half.
  static __device__ __forceinline__ void put(std::uint32_t first, const float* sums) {
    const int warp = static_cast<int>(threadIdx.x / 32 % 4);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int column = warp % 2 * 16 + lane() / 4 + i % 4 / 2 * 8;  // of the half
      const int row = i / 4 * 8 + lane() % 4 * 2 + i % 2;             // of both buffers
      const std::uint32_t buffer = first + static_cast<std::uint32_t>(warp / 2 * 2 + row / 16) * all_buffers;
      store_shared_4(
          buffer + static_cast<std::uint32_t>(row % 16 * 128 + ((column / 4) ^ (row % 8)) * 16 + column % 4 * 4),
          __float_as_uint(sums[i]));
    }
  }
};

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
