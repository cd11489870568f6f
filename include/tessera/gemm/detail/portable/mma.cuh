// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The warp's matrix instruction on bf16, and its operands in shared memory.
///
/// An operand's tile is two chunks of 64 lines of 64 elements, 8 KiB each, 16-byte unit `u` of line `l` at unit
/// `u ^ (l % 8)`, so that neither copies nor matrix loads meet in a bank. A line is either 64 consecutive `k` of one of
/// the operand's 128 rows (`contiguous::k`) or 64 consecutive rows at one of 64 `k` (`contiguous::mn`).

#include <cstdint>

#include <tessera/gemm/detail/hopper/ptx.cuh>
#include <tessera/gemm/detail/hopper/wgmma.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::portable {

using hopper::contiguous;

inline constexpr int tile_rows = 128;                      ///< Rows of an operand's tile.
inline constexpr int tile_k = 64;                          ///< Products in a stage.
inline constexpr int chunk_lines = 64;                     ///< Lines of a chunk, and elements of a line.
inline constexpr int chunk_bytes = 64 * 64 * 2;            ///< Size of a chunk.
inline constexpr int operand_bytes = 2 * chunk_bytes;      ///< Size of an operand's tile.
inline constexpr int stage_bytes = 2 * operand_bytes;      ///< Size of a stage: A, then B.
inline constexpr int stages = 2;                           ///< One is multiplied while the other is filled.
inline constexpr int shared_bytes = stages * stage_bytes;  ///< Of a block.

/// Address of a unit. @param operand Start of the operand's tile. @param line In [0, 128): chunk, then line.
/// @param unit In [0, 8).
__device__ __forceinline__ std::uint32_t unit_address(std::uint32_t operand, int line, int unit) {
  return operand + static_cast<std::uint32_t>(line * 128 + ((unit ^ (line % 8)) * 16));
}

/// Loads four 8x8 matrices of 16-bit elements, each transposed; lane `l` addresses line `l % 8` of matrix `l / 8`.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t address, std::uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

/// The 16 x 16 fragment of A from `row` and, in the stage, `16 * step` on. All lanes call together.
template <contiguous Order>
__device__ __forceinline__ void load_a(std::uint32_t operand, int row, int step, std::uint32_t (&a)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if constexpr (Order == contiguous::k) {
    hopper::load_matrices(unit_address(operand, row + lane % 16, step * 2 + lane / 16), a);
  } else {
    const int k = step * 16 + lane / 16 * 8 + lane % 8;
    const int unit = row % chunk_lines / 8 + lane / 8 % 2;
    load_matrices_transposed(unit_address(operand, row / chunk_lines * chunk_lines + k, unit), a);
  }
}

/// Two 8 x 16 fragments of B, for 16 columns of the result from `column` on: `b[0..1]` and `b[2..3]`.
template <contiguous Order>
__device__ __forceinline__ void load_b(std::uint32_t operand, int column, int step, std::uint32_t (&b)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if constexpr (Order == contiguous::k) {
    hopper::load_matrices(unit_address(operand, column + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2), b);
  } else {
    const int k = step * 16 + lane / 8 % 2 * 8 + lane % 8;
    const int unit = column % chunk_lines / 8 + lane / 16;
    load_matrices_transposed(unit_address(operand, column / chunk_lines * chunk_lines + k, unit), b);
  }
}

/// `d[16, 8] += a[16, 16] b[8, 16]^T`. A lane holds the elements `(lane / 4 + {0, 8}, lane % 4 * 2 + {0, 1})` at
/// `d[{0, 2} + {0, 1}]`.
__device__ __forceinline__ void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace detail::portable
TESSERA_NAMESPACE_END
