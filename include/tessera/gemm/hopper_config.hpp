// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Which kernel of `gemm/hopper.cuh` a product gets: a pure function of bounds, so that a captured graph stays right
/// when counts change. It needs no CUDA header and no GPU.

#include <cstdint>
#include <string>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm {

/// Grouped products on sm_90a.
namespace hopper {

/// Who computes a tile.
enum class schedule {
  cooperative,  ///< Both consumer warpgroups, half a tile each: the fewest operand bytes per product.
  ping_pong,    ///< One of them, while the other stores its last tile: for short sums and long epilogues.
};

/// What is done with the sums, by its cost.
enum class epilogue_kind {
  store,                ///< Rounded and stored.
  activation,           ///< H and the activation are stored.
  activation_backward,  ///< H is read, dH and the activation are stored.
  read_old,             ///< The old result is read, and stored with the sums added.
};

/// What a choice depends on.
struct problem {
  bool variable_k = false;                        ///< The length of the sum is variable, not the rows of the result.
  std::int64_t max_rows = 0;                      ///< Bound of the number of rows, all groups together.
  std::int64_t num_groups = 0;                    ///< G.
  std::int64_t m = 0;                             ///< Rows of each result; `variable_k` only.
  std::int64_t n = 0;                             ///< Columns of the result; with a gate, gates and ups together.
  std::int64_t k = 0;                             ///< Length of the sum; `variable_m` only.
  epilogue_kind epilogue = epilogue_kind::store;  ///< What is done with the sums.
  bool gathered = false;                          ///< Whether one operand's rows are gathered.
  bool b_along_k = false;                         ///< Whether B is contiguous along the sum.
  int num_multiprocessors = 132;                  ///< Multiprocessors that may be used.
  bool ping_pong = true;                          ///< Whether the program has the ping-pong kernels.
};

/// A kernel and its grid.
struct config {
  schedule order = schedule::cooperative;  ///< Who computes a tile.
  int tile_m = 128;                        ///< Rows of a tile.
  int tile_n = 256;                        ///< Columns of a tile.
  int cluster = 1;                         ///< Blocks that share one operand.
  int grid = 0;                            ///< Blocks; 0: there is nothing to do.

  /// Same kernel, same grid.
  friend constexpr bool operator==(const config&, const config&) = default;
};

/// An upper bound of the number of tiles, whatever the counts are. @param p The problem. @param c Tile and cluster.
constexpr std::int64_t max_tiles(const problem& p, const config& c) {
  const auto tiles = [](std::int64_t extent, std::int64_t tile) { return (extent + tile - 1) / tile; };
  const std::int64_t step_m = static_cast<std::int64_t>(c.tile_m) * c.cluster;
  if (p.variable_k) return p.num_groups * tiles(p.m, step_m) * tiles(p.n, c.tile_n);
  // every group that has rows may end in a tile of one row
  const std::int64_t with_rows = p.num_groups < p.max_rows ? p.num_groups : p.max_rows;
  const std::int64_t whole = p.max_rows <= with_rows ? 0 : (p.max_rows - with_rows) / step_m;
  return (whole + with_rows) * tiles(p.n, c.tile_n);
}

/// The kernel for a problem.
/// @param p Bounds; counts do not enter.
constexpr config choose(const problem& p) {
  config c;
  const std::int64_t mean_rows = p.num_groups == 0 ? 0 : p.max_rows / p.num_groups;
  // Shared memory feeds the matrix unit just fast enough for 128 x 256. Smaller tiles read more for each product, which
  // costs more than what they hide, unless half of the columns would be empty. What an epilogue reads comes through the
  // ring that feeds it, to both warpgroups together, in tiles of 256 columns alone.
  const bool reads = p.epilogue == epilogue_kind::activation_backward || p.epilogue == epilogue_kind::read_old;
  if (p.n <= 128 && p.ping_pong && !reads) {
    c.order = schedule::ping_pong;
    c.tile_n = 128;
  }
  // Neighbours along M share B where there are nearly always two and their products last long enough to wait for each
  // other; epilogues do not read in clusters, where that leaves no time for it. Measured with tiles handed out by a
  // counter: bench/README.md.
  const bool shares_rows = p.b_along_k ? mean_rows >= (p.gathered ? 512 : 1536) : mean_rows >= 2048 && p.k >= 8192;
  const bool shares = p.variable_k ? p.m >= 512 && p.m * p.n >= std::int64_t{1} << 18 : shares_rows;
  // A budget of one multiprocessor has no room for two blocks.
  const bool may_share = c.order == schedule::cooperative && !reads && p.num_multiprocessors >= 2;
  if (may_share && shares) c.cluster = 2;
  const std::int64_t blocks = max_tiles(p, c) * c.cluster;
  const std::int64_t most = p.num_multiprocessors / c.cluster * c.cluster;
  c.grid = static_cast<int>(blocks < most ? blocks : most);
  return c;
}

/// Whether an fp32 result that is added to is read through the operand ring, instead of being added to by the TMA:
/// where sums are short, additions take longer than the products that they could lie under. Measured:
/// bench/README.md. @param p Bounds.
constexpr bool reads_old_fp32(const problem& p) {
  const std::int64_t length = !p.variable_k ? p.k : p.num_groups == 0 ? 0 : p.max_rows / p.num_groups;
  return length <= 1024;
}

/// One line for logs, for example `cooperative 128x256 cluster 2 grid 132`.
inline std::string to_string(const config& c) {
  return (tessera::detail::message() << (c.order == schedule::cooperative ? "cooperative " : "ping-pong ") << c.tile_m
                                     << 'x' << c.tile_n << " cluster " << c.cluster << " grid " << c.grid)
      .text();
}

}  // namespace hopper
}  // namespace gemm

TESSERA_NAMESPACE_END
