// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// From device memory to a stage: who copies what. What lies outside of the operand becomes zeros, which adds nothing
/// to a sum as long as it is zero in both operands; nothing there is read.

#include <cstdint>

#include <tessera/core/dtype.hpp>
#include <tessera/gemm/detail/portable/mma.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::portable {

inline constexpr int threads = 256;                     ///< Of a block: 4 x 2 warps of 32 x 64 results each.
inline constexpr int copies = tile_rows * 8 / threads;  ///< 16-byte units of an operand's stage for each thread.
inline constexpr int copy_lines = threads / 8;          ///< Lines that are copied side by side.
static_assert(copies == 4 && copy_lines * 2 == chunk_lines, "the mappings below are for these numbers");

/// Lines of elements in device memory, one set for each group.
struct line_operand {
  const bfloat16* data;        ///< Line 0 of group 0.
  std::int64_t group_stride;   ///< Elements from a group's lines to the next group's.
  std::int64_t line_stride;    ///< Elements from a line to the next.
  const std::int32_t* gather;  ///< Line `i` is line `gather[i]`; null: line `i`.
};

/// Rows or columns of the result that an operand's tile is for.
struct tile_range {
  int first;  ///< Where they start.
  int end;    ///< Where the operand ends.
  int split;  ///< Distance to the second part; 0 where there is one. With two parts, 32 of the first and the 32 that
              ///< correspond to them in the second alternate: gates and ups.

  /// Row of the operand for row `block * 32 + offset` of the tile, negative if there is none. @param block In [0, 4).
  __device__ __forceinline__ int row(int block, int offset) const {
    const int at = first + (split == 0 ? block * 32 : block / 2 * 32) + offset;
    return at < end ? at + (block % 2) * split : -1;
  }
};

/// One thread's copies of an operand, stage after stage: unit `threadIdx.x % 8` of lines `threadIdx.x / 8 + 32 i`.
/// `begin` names the tile and where its sum begins; each `copy` brings the next stage.
template <contiguous Order>
class stage_copier;

/// Lines are the operand's rows.
template <>
class stage_copier<contiguous::k> {
 public:
  __device__ __forceinline__ void begin(const line_operand& operand, int group, const tile_range& range, int k_begin,
                                        int k_end) {
    const bfloat16* const lines = operand.data + group * operand.group_stride;
    k_ = k_begin + unit() * 8;
    k_end_ = k_end;
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      const int row = range.row(i, line());
      const int source = row < 0 || operand.gather == nullptr ? row : __ldg(operand.gather + row);
      inside_[i] = row >= 0;
      from_[i] = lines + (row < 0 ? 0 : source * operand.line_stride);
    }
  }
  __device__ __forceinline__ void copy(std::uint32_t target) {
    const bool inside = k_ < k_end_;
#pragma unroll
    for (int i = 0; i < copies; ++i)
      hopper::copy_async(unit_address(target, line() + copy_lines * i, unit()), from_[i] + (inside ? k_ : 0),
                         inside && inside_[i] ? 16 : 0);
    k_ += tile_k;
  }

 private:
  static __device__ __forceinline__ int unit() { return static_cast<int>(threadIdx.x % 8); }
  static __device__ __forceinline__ int line() { return static_cast<int>(threadIdx.x / 8); }

  const bfloat16* from_[copies];
  bool inside_[copies];
  int k_, k_end_;
};

/// Lines are indices of the sum.
template <>
class stage_copier<contiguous::mn> {
 public:
  __device__ __forceinline__ void begin(const line_operand& operand, int group, const tile_range& range, int k_begin,
                                        int k_end) {
    lines_ = operand.data + group * operand.group_stride;
    line_stride_ = operand.line_stride;
    gather_ = operand.gather;
    k_ = k_begin + line();
    k_end_ = k_end;
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) column_[chunk] = range.row(2 * chunk + unit() / 4, unit() % 4 * 8);
    look_up();
  }
  __device__ __forceinline__ void copy(std::uint32_t target) {
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      const int column = column_[i / 2];
      const bool inside = column >= 0 && k_ + copy_lines * (i % 2) < k_end_;
      hopper::copy_async(unit_address(target, line() + copy_lines * i, unit()),
                         inside ? lines_ + source_[i % 2] * line_stride_ + column : lines_, inside ? 16 : 0);
    }
    k_ += tile_k;
    look_up();
  }

 private:
  static __device__ __forceinline__ int unit() { return static_cast<int>(threadIdx.x % 8); }
  static __device__ __forceinline__ int line() { return static_cast<int>(threadIdx.x / 8); }

  // The next stage's lines, a stage ahead of their use.
  __device__ __forceinline__ void look_up() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = k_ + copy_lines * i;
      source_[i] = gather_ == nullptr || k >= k_end_ ? k : __ldg(gather_ + k);
    }
  }

  const bfloat16* lines_;
  std::int64_t line_stride_;
  const std::int32_t* gather_;
  int source_[2];  // lines of the next stage
  int column_[2];  // negative: outside
  int k_, k_end_;
};

}  // namespace detail::portable
TESSERA_NAMESPACE_END
