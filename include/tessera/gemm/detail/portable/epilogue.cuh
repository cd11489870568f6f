// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What becomes of the sums: stored, or fed to the activation or its gradient.
///
/// An epilogue is a struct with `params`; `split` (whether a warp's columns are 32 gates and the 32 ups that belong to
/// them); and `write(params, group, row, column, v)` for a lane's share of a row: `v[2 j]` and `v[2 j + 1]` are the
/// sums of columns `8 j + lane % 4 * 2 + {0, 1}` of the warp's 64, of which `column` is the first, with `split` the
/// first of the gates. Where `row_sums` is true it returns the share's part of a sum over the row, and
/// `write_row_sum(params, row, column, sum)` gets it for the tile's columns, of which `column` is the first.

#include <cstdint>
#include <type_traits>

#include <tessera/core/dtype.hpp>
#include <tessera/gemm/detail/hopper/ptx.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::portable {

using hopper::high_bf16;
using hopper::low_bf16;
using hopper::pack_bf16;

inline constexpr int row_values = 16;  ///< Of a row, in one lane.

/// Column of a lane's first value.
__device__ __forceinline__ int lane_column(int column) { return column + static_cast<int>(threadIdx.x % 4) * 2; }

/// Two neighbouring bf16, 4-byte aligned.
__device__ __forceinline__ std::uint32_t load_pair(const bfloat16* from) {
  return *reinterpret_cast<const std::uint32_t*>(from);
}
/// Stores two neighbouring bf16.
__device__ __forceinline__ void store_pair(bfloat16* to, std::uint32_t pair) {
  *reinterpret_cast<std::uint32_t*>(to) = pair;
}

/// Adds `bias[column]` and its neighbour, if there is a bias.
__device__ __forceinline__ void add_bias(float& low, float& high, const bfloat16* bias, int column) {
  if (bias == nullptr) return;
  const std::uint32_t pair = __ldg(reinterpret_cast<const std::uint32_t*>(bias + column));
  low += low_bf16(pair), high += high_bf16(pair);
}

/// Stores the result, rounded once. `TC` is bfloat16 or float.
template <class TC>
struct store_epilogue {
  static constexpr bool split = false, row_sums = false;

  struct params {
    TC* c;                      ///< Row 0 of group 0.
    std::int64_t group_stride;  ///< Elements between groups; 0 where rows are packed.
    std::int64_t row_stride;    ///< Elements between rows.
    int columns;                ///< Columns of the result.
    bool accumulate;            ///< Whether the old content is added.
    const bfloat16* bias;       ///< `[G, columns]`, or null.
  };

  static __device__ __forceinline__ void write(const params& p, int group, int row, int column,
                                               const float (&v)[row_values]) {
    TC* const line = p.c + group * p.group_stride + row * p.row_stride;
    const bfloat16* const bias = p.bias == nullptr ? nullptr : p.bias + static_cast<std::int64_t>(group) * p.columns;
#pragma unroll
    for (int j = 0; j < row_values / 2; ++j) {
      const int at = lane_column(column) + 8 * j;
      if (at >= p.columns) continue;
      float low = v[2 * j], high = v[2 * j + 1];
      add_bias(low, high, bias, at);
      if constexpr (std::is_same_v<TC, float>) {
        float2* const to = reinterpret_cast<float2*>(line + at);
        if (p.accumulate) low += to->x, high += to->y;
        *to = {low, high};
      } else {
        if (p.accumulate) {
          const std::uint32_t old = load_pair(line + at);
          low += low_bf16(old), high += high_bf16(old);
        }
        store_pair(line + at, pack_bf16(low, high));
      }
    }
  }
};

/// H, rounded, and the activation of the rounded H, so that backward recomputes the same.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gates and ups are in turn.
template <class Activation, bool Interleaved>
struct activation_epilogue {
  static constexpr bool split = Activation::gated && !Interleaved, row_sums = false;

  struct params {
    bfloat16* h;              ///< `[rows, U]`.
    std::int64_t h_stride;    ///< Elements between its rows.
    bfloat16* out;            ///< `[rows, n]`: the activation.
    std::int64_t out_stride;  ///< Elements between its rows.
    int intermediate;         ///< n.
    const bfloat16* bias;     ///< `[G, U]`, or null.
    typename Activation::options options;
  };

  static __device__ __forceinline__ void write(const params& p, int group, int row, int column,
                                               const float (&v)[row_values]) {
    const int n = p.intermediate, width = (Activation::gated ? 2 : 1) * n;
    bfloat16* const h = p.h + row * p.h_stride;
    bfloat16* const out = p.out + row * p.out_stride;
    const bfloat16* const bias = p.bias == nullptr ? nullptr : p.bias + static_cast<std::int64_t>(group) * width;
    // H of columns `at` and `at + 1`, rounded and stored.
    const auto save = [&](float low, float high, int at) {
      add_bias(low, high, bias, at);
      const std::uint32_t pair = pack_bf16(low, high);
      store_pair(h + at, pair);
      return pair;
    };
    if constexpr (split) {
#pragma unroll
      for (int j = 0; j < row_values / 4; ++j) {
        const int at = lane_column(column) + 8 * j, up_value = 2 * j + row_values / 2;
        if (at >= n) continue;
        const std::uint32_t gate = save(v[2 * j], v[2 * j + 1], at);
        const std::uint32_t up = save(v[up_value], v[up_value + 1], n + at);
        store_pair(out + at, pack_bf16(Activation::forward(low_bf16(gate), low_bf16(up), p.options),
                                       Activation::forward(high_bf16(gate), high_bf16(up), p.options)));
      }
    } else {
#pragma unroll
      for (int j = 0; j < row_values / 2; ++j) {
        const int at = lane_column(column) + 8 * j;  // of H
        if (at >= width) continue;
        const std::uint32_t pair = save(v[2 * j], v[2 * j + 1], at);
        if constexpr (Activation::gated)
          out[at / 2] = bfloat16(Activation::forward(low_bf16(pair), high_bf16(pair), p.options));
        else
          store_pair(out + at, pack_bf16(Activation::forward(low_bf16(pair), p.options),
                                         Activation::forward(high_bf16(pair), p.options)));
      }
    }
  }
};

/// The sums are `dA = dY W2`, unweighted. With the row's weight `w`: writes dH of `w dA` over H, `w A`, and sums of
/// `dA A` over 128 columns each, parts of `dL/dw`.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gates and ups are in turn.
template <class Activation, bool Interleaved>
struct activation_backward_epilogue {
  static constexpr bool split = false, row_sums = true;

  struct params {
    bfloat16* h;                  ///< `[rows, U]`: H, then dH.
    std::int64_t h_stride;        ///< Elements between its rows.
    bfloat16* out;                ///< `[rows, n]`: the weighted activation.
    std::int64_t out_stride;      ///< Elements between its rows.
    int intermediate;             ///< n.
    const float* weights;         ///< `[rows]`, or null for ones.
    float* partial;               ///< `[n / 128, rows]`, rounded up: parts of dL/dw, or null.
    std::int64_t partial_stride;  ///< Elements from one part of all rows to the next.
    typename Activation::options options;
  };

  static __device__ __forceinline__ float write(const params& p, int, int row, int column,
                                                const float (&v)[row_values]) {
    const int n = p.intermediate;
    const float weight = p.weights == nullptr ? 1.0f : __ldg(p.weights + row);
    bfloat16* const h = p.h + row * p.h_stride;
    bfloat16* const out = p.out + row * p.out_stride;
    float dweight = 0.0f;
#pragma unroll
    for (int j = 0; j < row_values / 2; ++j) {
      const int at = lane_column(column) + 8 * j;
      if (at >= n) continue;
      const float da[2] = {v[2 * j], v[2 * j + 1]};
      float a[2];
      if constexpr (Activation::gated) {
        gated_pair(p, h, at, da, weight, a);
      } else {
        const std::uint32_t pair = load_pair(h + at);
        const float x[2] = {low_bf16(pair), high_bf16(pair)};
        a[0] = Activation::forward(x[0], p.options), a[1] = Activation::forward(x[1], p.options);
        store_pair(h + at, pack_bf16(Activation::backward(x[0], weight * da[0], p.options),
                                     Activation::backward(x[1], weight * da[1], p.options)));
      }
      store_pair(out + at, pack_bf16(weight * a[0], weight * a[1]));
      dweight += da[0] * a[0];
      dweight += da[1] * a[1];
    }
    return dweight;
  }

  static __device__ __forceinline__ void write_row_sum(const params& p, int row, int column, float sum) {
    if (p.partial != nullptr) p.partial[column / 128 * p.partial_stride + row] = sum;
  }

 private:
  // Two columns of the activation: `a`, and dH over H.
  static __device__ __forceinline__ void gated_pair(const params& p, bfloat16* h, int at, const float (&da)[2],
                                                    float weight, float (&a)[2]) {
    const int n = p.intermediate;
    std::uint32_t gate, up;
    [[maybe_unused]] uint2* const both = reinterpret_cast<uint2*>(h + 2 * at);  // gate, up, gate, up
    if constexpr (Interleaved) {
      const uint2 words = *both;
      gate = __byte_perm(words.x, words.y, 0x5410);
      up = __byte_perm(words.x, words.y, 0x7632);
    } else {
      gate = load_pair(h + at);
      up = load_pair(h + n + at);
    }
    const float g[2] = {low_bf16(gate), high_bf16(gate)}, u[2] = {low_bf16(up), high_bf16(up)};
    float dg[2], du[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      a[e] = Activation::forward(g[e], u[e], p.options);
      Activation::backward(g[e], u[e], weight * da[e], dg[e], du[e], p.options);
    }
    if constexpr (Interleaved) {
      *both = {pack_bf16(dg[0], du[0]), pack_bf16(dg[1], du[1])};
    } else {
      store_pair(h + at, pack_bf16(dg[0], dg[1]));
      store_pair(h + n + at, pack_bf16(du[0], du[1]));
    }
  }
};

}  // namespace detail::portable
TESSERA_NAMESPACE_END
