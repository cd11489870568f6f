// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Which block computes which tile of a grouped product. Row offsets are read here, on the device, so that the grid
/// depends on bounds alone.

#include <cstdint>

#include <tessera/gemm/detail/hopper/ptx.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// Which extent differs from group to group: the rows of the result, or the length of the sum.
enum class product { variable_m, variable_k };

/// A tile of the result and the sum that it takes.
struct tile {
  int group;    ///< Its group; negative: there are no more tiles.
  int m;        ///< First row: of the packed rows (`variable_m`), of the group's matrix (`variable_k`).
  int m_end;    ///< One past the last row of the group's result. At most `m` if this block of a cluster has no rows.
  int n;        ///< First column.
  int k_begin;  ///< Start of the sum; a row of the operands in `variable_k`.
  int k_end;    ///< One past its end.
};

/// Extents of a grouped product, as kernels see them.
struct extents {
  const std::int32_t* row_offsets;  ///< `[num_groups + 1]`, device memory.
  int num_groups;                   ///< G.
  int m;                            ///< Rows of each result; `variable_k` only.
  int n;                            ///< Columns of the result.
  int k;                            ///< Length of the sum; `variable_m` only.
};

/// Enumerates tiles: groups in order; in a group, bands of `band_rows` tiles, columns within a band, rows within a
/// column, so that blocks that run together share operands in the second-level cache.
///
/// All lanes of a warp call together; successive calls ask for ascending tiles.
/// @tparam Product Which extent is variable. @tparam TileM,TileN Extents of a tile of one block. @tparam Cluster Blocks
/// that compute neighbours along M together.
template <product Product, int TileM, int TileN, int Cluster>
class tile_walk {
 public:
  __device__ explicit tile_walk(const extents& e) : e_(e), tiles_n_((e.n + TileN - 1) / TileN) {}

  /// Tile `index` of block `rank` of a cluster.
  __device__ tile find(int index, int rank) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    while (base_group_ < e_.num_groups) {
      const int g = base_group_ + lane;
      int begin = 0, end = 0;
      if (g < e_.num_groups) {
        begin = __ldg(e_.row_offsets + g);
        end = __ldg(e_.row_offsets + g + 1);
      }
      const int rows = Product == product::variable_m ? end - begin : e_.m;
      const int tiles = g < e_.num_groups ? (rows + step_m - 1) / step_m * tiles_n_ : 0;
      int sum = tiles;  // of this lane's group and those before it
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += below;
      }
      const unsigned later = __ballot_sync(0xffffffffu, base_tile_ + sum > index);
      if (later != 0) {
        const int owner = __ffs(static_cast<int>(later)) - 1;
        const int local = index - base_tile_ - __shfl_sync(0xffffffffu, sum - tiles, owner);
        begin = __shfl_sync(0xffffffffu, begin, owner);
        end = __shfl_sync(0xffffffffu, end, owner);
        return place(base_group_ + owner, local, begin, end, rank);
      }
      base_tile_ += __shfl_sync(0xffffffffu, sum, 31);
      base_group_ += 32;
    }
    return {-1, 0, 0, 0, 0, 0};
  }

 private:
  static constexpr int step_m = TileM * Cluster;
  static constexpr int band_rows = 8 / Cluster;

  __device__ tile place(int group, int local, int begin, int end, int rank) const {
    const int rows = Product == product::variable_m ? end - begin : e_.m;
    const int tiles_m = (rows + step_m - 1) / step_m;
    const int band = local / (band_rows * tiles_n_);
    const int in_band = local - band * band_rows * tiles_n_;
    const int rest = tiles_m - band * band_rows;
    const int height = rest < band_rows ? rest : band_rows;
    const int column = in_band / height;
    const int m = (band * band_rows + in_band - column * height) * step_m + rank * TileM;
    if constexpr (Product == product::variable_m)
      return {group, begin + m, end, column * TileN, 0, e_.k};
    else
      return {group, m, e_.m, column * TileN, begin, end};
  }

  extents e_;
  int tiles_n_;
  int base_group_ = 0;
  int base_tile_ = 0;
};

/// A position in a ring of `Slots` slots with a pair of barriers each.
template <int Slots>
struct ring_position {
  int slot = 0;
  std::uint32_t parity = 0;  ///< Of the phase in which the slot is filled.

  __device__ __forceinline__ void advance() {
    if (++slot == Slots) {
      slot = 0;
      parity ^= 1;
    }
  }
  /// `count` times `advance`.
  __device__ __forceinline__ void advance(int count) {
    const int to = slot + count;
    const int laps = to / Slots;
    slot = to - laps * Slots;
    parity ^= static_cast<std::uint32_t>(laps & 1);
  }
};

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
