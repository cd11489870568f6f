// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What an instance of the kernel is compiled for, and where its parts lie in shared memory.

#include <cstdint>

#include <tessera/core/dtype.hpp>
#include <tessera/gemm/detail/hopper/schedule.cuh>
#include <tessera/gemm/detail/hopper/wgmma.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// Which operand's rows are read through a gather list.
enum class gathered { none, a, b };

/// A kernel's compile-time choices.
/// @tparam Product Which extent is variable.
/// @tparam OrderB Order of B in `variable_m`; in `variable_k` both operands are `mn`.
/// @tparam Gathered The operand that is copied row by row instead of by the TMA.
/// @tparam TileN Columns of a tile: 128, 192 or 256. @tparam Stages Slots of the operand ring.
/// @tparam Cluster Blocks that share B. @tparam PingPong Whether each consumer warpgroup computes tiles of its own, one
/// in its epilogue while the other multiplies, instead of half a tile each. @tparam Parts Matrices whose sum is B, of
/// which a tile holds the same 64 columns; more than one: of a single group.
template <product Product, contiguous OrderB, gathered Gathered, int TileN, int Stages, int Cluster, bool PingPong,
          int Parts = 1>
struct kernel_shape {
  static constexpr product kind = Product;
  static constexpr contiguous order_a = Product == product::variable_k ? contiguous::mn : contiguous::k;
  static constexpr contiguous order_b = Product == product::variable_k ? contiguous::mn : OrderB;
  static constexpr gathered gather = Gathered;
  static constexpr int tile_m = 128, tile_n = TileN, tile_k = 64;
  static constexpr int stages = Stages, cluster = Cluster, parts = Parts;
  static constexpr bool ping_pong = PingPong;

  static constexpr int chunks_a = tile_m / chunk_rows, chunks_b = tile_n / chunk_rows;
  static constexpr int blocks = PingPong ? 2 : 1;  ///< 64-row blocks of a tile that a warpgroup computes.
  static constexpr int accumulators = TileN / 2;   ///< Per thread and block.
  static constexpr int threads = 384;              ///< One producer warpgroup, then two consumers.
  static constexpr int consumer_warps = 8;
  static constexpr int tile_slots = 4;  ///< Tiles between the scheduler and its readers.
  /// The gathering warpgroup keeps row addresses, the other producer is one thread.
  static constexpr int producer_registers = Gathered == gathered::none ? 40 : 56;
  static constexpr int consumer_registers = Gathered == gathered::none ? 232 : 224;
  static_assert(TileN == 128 || TileN == 192 || TileN == 256, "there are matrix instructions for these tiles");
  static_assert(Stages >= 3, "the ring needs three stages");
  static_assert(Gathered != gathered::b, "rows are gathered as A");
  static_assert(Parts == 1 || (Product == product::variable_m && Gathered == gathered::none && Cluster == 1 &&
                               TileN == 64 * Parts),
                "a tile holds 64 columns of each part of B");

  static constexpr int stage_bytes = (chunks_a + chunks_b) * chunk_bytes;
};

inline constexpr int staging_bytes = 16 * 128;  ///< One of a warp's two output buffers: 16 rows x 128 bytes.

/// Indices of tiles under way from a cluster's first block to its second. The first is ahead by no more tiles than
/// there are slots in the operand ring, whose filling waits for both, and the one that it is about to begin.
inline constexpr int order_slots = 8;

/// Places in shared memory, from its 1024-byte aligned start.
template <class Shape>
struct shared_layout {
  static constexpr int staging = Shape::stages * Shape::stage_bytes;
  static constexpr int warp_staging = 2 * staging_bytes;
  static constexpr int tiles = staging + Shape::consumer_warps * warp_staging;
  static constexpr int full = tiles + Shape::tile_slots * 32;
  static constexpr int empty = full + Shape::stages * 8;
  static constexpr int tile_full = empty + Shape::stages * 8;
  static constexpr int tile_empty = tile_full + Shape::tile_slots * 8;
  static constexpr int turns = tile_empty + Shape::tile_slots * 8;
  static constexpr int orders = turns + 2 * 8;
  static constexpr int bytes = orders + (Shape::cluster > 1 ? order_slots * 12 : 0);
  static_assert(Shape::stages + 1 < order_slots);
  static_assert(bytes <= 232448, "more than the 227 KiB that a block of sm_90 can have");
};

/// What a kernel is called with, beside its tensor maps.
template <class EpilogueParams>
struct multiply_params {
  extents sizes;
  int b_group_step;             ///< 1, or 0 where all groups share one matrix B.
  int split;                    ///< Columns from a gate to its up value; 0 where B has one part.
  const bfloat16* gather_data;  ///< The gathered operand's row 0.
  std::int64_t gather_stride;   ///< Elements between its rows.
  const std::int32_t* gather;   ///< Row `i` reads row `gather[i]`.
  std::int32_t* tile_counter;   ///< Two words that are zero between launches; null for the static schedule.
  bool shared;                  ///< Whether blocks may begin late, because other streams' kernels run beside.
  bool leaves_room;             ///< Whether those are to have the multiprocessors that it leaves, or that become free.
  EpilogueParams epilogue;
};

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
