// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Definitions of gemm/reference.hpp: the loops around multiply_tile.

#include <algorithm>
#include <type_traits>

#include <tessera/gemm/detail/expect_operands.hpp>
#include <tessera/gemm/detail/pack.hpp>
#include <tessera/gemm/detail/tile.hpp>
#include <tessera/gemm/reference.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm::detail {

// One product [M, K] x [K, N]. pack_a(i, rows, k, depth, panel) fills a panel whose element (r, d) is
// panel[r * RowStep + d * DepthStep]; pack_b(j, cols, k, depth, panel) fills a panel, or answers where one lies
// already; place(i, j, cols) answers where a tile of sums may be kept, so that nothing is left to do when they are
// finished, or null: then put(i, j, cols, sums) takes the finished sums of row i. Sums stay in the accumulation type
// until all of the depth has gone by, the blocks of the depth in ascending order.
template <class Tiling, int RowStep, int DepthStep, class PackA, class PackB, class Place, class Put>
void multiply(std::int64_t M, std::int64_t N, std::int64_t K, const PackA& pack_a, const PackB& pack_b,
              const Place& place, const Put& put) {
  using A = typename Tiling::value;
  using std::int64_t;
  if (M == 0 || N == 0) return;
  constexpr int tile_size = Tiling::rows * Tiling::cols;
  alignas(64) A a_panel[RowStep == 1 ? Tiling::depth * DepthStep : Tiling::block_rows * RowStep];
  alignas(64) A b_panels[Tiling::block_cols * Tiling::depth];
  alignas(64) A sums[Tiling::block_tiles * tile_size];
  block_ref<const A> b[Tiling::block_cols / Tiling::cols] = {};

  // A panel of b serves all rows where no sums of one block of depth have to wait in `sums` for the next: with a single
  // block, and with all sums kept in the result.
  const bool one_depth = K <= Tiling::depth;
  const bool all_in_place = N % Tiling::cols == 0 && place(0, 0, Tiling::cols).data != nullptr;
  const int64_t stripe = one_depth || all_in_place ? M : Tiling::block_rows;
  for (int64_t j0 = 0; j0 < N; j0 += Tiling::block_cols) {
    const int64_t j_end = std::min<int64_t>(N, j0 + Tiling::block_cols);
    for (int64_t i0 = 0; i0 < M; i0 += stripe) {
      int64_t k0 = 0;
      do {
        const int64_t depth = std::min<int64_t>(Tiling::depth, K - k0);
        const bool last = k0 + depth == K;
        for (int64_t j = j0; j < j_end && depth > 0; j += Tiling::cols) {
          const int64_t p = (j - j0) / Tiling::cols;
          b[p] = pack_b(j, static_cast<int>(std::min<int64_t>(Tiling::cols, N - j)), k0, depth,
                        b_panels + p * Tiling::cols * Tiling::depth);
        }
        for (int64_t i1 = i0; i1 < std::min(M, i0 + stripe); i1 += Tiling::block_rows) {
          const int64_t rows = std::min<int64_t>(Tiling::block_rows, M - i1);
          if (depth > 0) pack_a(i1, rows, k0, depth, a_panel);
          const int64_t tiles = (rows + Tiling::rows - 1) / Tiling::rows;
          for (int64_t j = j0; j < j_end; j += Tiling::cols) {
            const int64_t p = (j - j0) / Tiling::cols;
            for (int64_t t = 0; t < tiles; ++t) {
              const int64_t begin = rows * t / tiles;  // tiles of nearly the same height, none of them low
              const int64_t end = rows * (t + 1) / tiles;
              const auto cols = static_cast<int>(std::min<int64_t>(Tiling::cols, N - j));
              block_ref<A> tile = place(i1 + begin, j, cols);
              const bool in_place = tile.data != nullptr;
              if (!in_place) tile = {one_depth ? sums : sums + (p * tiles + t) * tile_size, Tiling::cols};
              multiply_tile<Tiling, RowStep, DepthStep>(static_cast<int>(end - begin), depth, a_panel + begin * RowStep,
                                                        b[p], k0 == 0, tile);
              if (in_place || !last) continue;
              for (int64_t r = begin; r < end; ++r) put(i1 + r, j, cols, tile.data + (r - begin) * Tiling::cols);
            }
          }
        }
        k0 += depth;
      } while (k0 < K);
    }
  }
}

// A tile of sums in the result itself, where a sum is stored as it is.
template <class Tiling, class TC>
block_ref<typename Tiling::value> place_tile(bool as_it_is, TC* out, std::int64_t step) {
  if constexpr (std::is_same_v<typename Tiling::value, TC>) {
    if (as_it_is) return {out, step};
  }
  return {nullptr, 0};
}

// A sum as it is stored.
template <class TC, class A>
TC narrow(A sum) {
  if constexpr (std::is_same_v<TC, bfloat16>) {
    return bfloat16(static_cast<float>(sum));
  } else {
    return static_cast<TC>(sum);
  }
}

// out[j] = sums[j] + bias[j] + (accumulate: out[j]), rounded once; a null bias is none. `sums` is used up.
template <class Count, class A, class TBias, class TC>
void put_row(Count cols, A* TESSERA_RESTRICT sums, const TBias* TESSERA_RESTRICT bias, TC* TESSERA_RESTRICT out,
             write mode) {
  if (bias != nullptr)
    for (int j = 0; j < cols; ++j) sums[j] += static_cast<A>(bias[j]);
  if (mode == write::accumulate)
    for (int j = 0; j < cols; ++j) sums[j] += static_cast<A>(out[j]);
  for (int j = 0; j < cols; ++j) out[j] = narrow<TC>(sums[j]);
}

// The same, with a constant number of columns where it is that of a tile: such loops are vectorised at -O2 too.
template <class Tiling, class TBias, class TC>
void put_tile_row(int cols, typename Tiling::value* sums, const TBias* bias, TC* out, write mode) {
  if (cols == Tiling::cols) {
    put_row(std::integral_constant<int, Tiling::cols>{}, sums, bias, out, mode);
  } else {
    put_row(cols, sums, bias, out, mode);
  }
}

}  // namespace gemm::detail

namespace gemm {

template <accumulate_type A, class TA, class TB, class TBias, class TC>
void reference::variable_m(std::span<const std::int32_t> row_offsets, std::int64_t N, std::int64_t K, row_operand<TA> a,
                           group_operand<const TB> b, const TBias* bias, matrix_view<TC> c, write mode) {
  using tiling = detail::tiling<A, detail::native_vector_bytes>;
  detail::expect_variable_m(row_offsets, N, K, a, b, c);
  for (std::size_t g = 0; g + 1 < row_offsets.size(); ++g) {
    const std::int64_t first = row_offsets[g];
    const std::int64_t rows = row_offsets[g + 1] - first;
    const TBias* const group_bias = bias == nullptr ? nullptr : bias + static_cast<std::int64_t>(g) * N;
    const auto pack_a = [&](std::int64_t i, std::int64_t count, std::int64_t k, std::int64_t depth, A* panel) {
      for (std::int64_t r = 0; r < count; ++r)
        detail::widen(a.row(first + i + r) + k, depth, panel + r * tiling::depth_step);
    };
    const auto pack_b = [&](std::int64_t j, int cols, std::int64_t k, std::int64_t depth, A* panel) {
      const TB* const from = &b(static_cast<std::int64_t>(g), j, k);
      if (b.row_stride == 1) {
        if constexpr (std::is_same_v<A, TB>) {  // few rows do not pay for a copy
          if (cols == tiling::cols && rows <= tiling::rows) return detail::block_ref<const A>{from, b.col_stride};
        }
        detail::pack_rows<tiling>(from, b.col_stride, cols, depth, panel);
      } else {
        detail::pack_columns<tiling>(from, b.row_stride, b.col_stride, cols, depth, panel);
      }
      return detail::block_ref<const A>{panel, tiling::cols};
    };
    const auto place = [&](std::int64_t i, std::int64_t j, int cols) {
      return detail::place_tile<tiling>(bias == nullptr && mode == write::overwrite && cols == tiling::cols,
                                        c.row(first + i) + j, c.stride);
    };
    const auto put = [&](std::int64_t i, std::int64_t j, int cols, A* sums) {
      detail::put_tile_row<tiling>(cols, sums, group_bias == nullptr ? nullptr : group_bias + j, c.row(first + i) + j,
                                   mode);
    };
    detail::multiply<tiling, tiling::depth_step, 1>(rows, N, K, pack_a, pack_b, place, put);
  }
}

template <accumulate_type A, class TA, class TB, class TC>
void reference::variable_k(std::span<const std::int32_t> row_offsets, std::int64_t M, std::int64_t N, row_operand<TA> a,
                           row_operand<TB> b, group_operand<TC> c, write mode) {
  using tiling = detail::tiling<A, detail::native_vector_bytes>;
  if (c.col_stride != 1 && c.row_stride == 1) {  // products commute, so the transposed result has the same bits
    variable_k<A>(row_offsets, N, M, b, a, group_operand<TC>{c.data, c.group_stride, c.col_stride, 1}, mode);
    return;
  }
  detail::expect_variable_k(row_offsets, M, N, a, b, c);
  for (std::size_t g = 0; g + 1 < row_offsets.size(); ++g) {
    const std::int64_t first = row_offsets[g];
    const std::int64_t rows = row_offsets[g + 1] - first;
    const auto pack_a = [&](std::int64_t m, std::int64_t count, std::int64_t i, std::int64_t depth, A* panel) {
      for (std::int64_t d = 0; d < depth; ++d)
        detail::widen(a.row(first + i + d) + m, count, panel + d * tiling::block_rows_step);
    };
    const auto pack_b = [&](std::int64_t n, int cols, std::int64_t i, std::int64_t depth, A* panel) {
      for (std::int64_t d = 0; d < depth; ++d)
        detail::pack_rows<tiling>(b.row(first + i + d) + n, 0, cols, 1, panel + d * tiling::cols);
      return detail::block_ref<const A>{panel, tiling::cols};
    };
    const auto place = [&](std::int64_t m, std::int64_t n, int cols) {
      return detail::place_tile<tiling>(c.col_stride == 1 && mode == write::overwrite && cols == tiling::cols,
                                        &c(static_cast<std::int64_t>(g), m, n), c.row_stride);
    };
    const auto put = [&](std::int64_t m, std::int64_t n, int cols, A* sums) {
      constexpr const A* no_bias = nullptr;
      TC* const out = &c(static_cast<std::int64_t>(g), m, n);
      if (c.col_stride == 1) {
        detail::put_tile_row<tiling>(cols, sums, no_bias, out, mode);
      } else {
        for (int j = 0; j < cols; ++j) detail::put_row(1, sums + j, no_bias, out + j * c.col_stride, mode);
      }
    };
    detail::multiply<tiling, 1, tiling::block_rows_step>(M, N, rows, pack_a, pack_b, place, put);
  }
}

}  // namespace gemm

TESSERA_NAMESPACE_END
