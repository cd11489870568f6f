// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Epilogues with an activation: forward after the up-projection, backward after the gradient of the activation.
///
/// A gate and its up value meet in one thread's registers without any re-layout of weights. Where all gates come before
/// all ups, chunks of 64 gate columns and of the 64 up columns alternate in B's tile (`split`), so the pair is 32
/// accumulators apart; where they are interleaved, the pair is two neighbouring accumulators.

#include <cstdint>

#include <tessera/gemm/detail/hopper/epilogue.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// H, rounded, and the activation of the rounded H, so that backward recomputes the same.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gates and ups are in turn.
template <class Activation, bool Interleaved>
struct activation_epilogue {
  static constexpr bool split = Activation::gated && !Interleaved;
  static constexpr int staging_buffers = 1;

  struct params {
    bfloat16* h;              ///< `[rows, U]`.
    std::int64_t h_stride;    ///< Elements between its rows.
    bfloat16* out;            ///< `[rows, n]`: the activation.
    std::int64_t out_stride;  ///< Elements between its rows.
    int intermediate;         ///< n.
    const bfloat16* bias;     ///< `[G, U]`, or null.
    typename Activation::options options;
  };

  template <int TileN>
  static __device__ __forceinline__ void write(const params& p, float (&sums)[TileN / 2], const tile& t, int first_row,
                                               std::uint32_t staging) {
    const warp_staging buffer(staging);
    const int width = (Activation::gated ? 2 : 1) * p.intermediate;
    const bfloat16* const bias = p.bias == nullptr ? nullptr : p.bias + static_cast<std::int64_t>(t.group) * width;
    const auto emit = [&](const fragment& f, bfloat16* matrix, std::int64_t stride, int column, int columns) {
      __syncwarp();
      buffer.put(f);
      __syncwarp();
      buffer.store(matrix, stride, first_row, t.m_end, column, columns);
    };

    if constexpr (split) {
      for_each_chunk<TileN / chunk_rows / 2>([&]<int Pair>() {
        const int column = t.n + Pair * chunk_rows;
        if (column >= p.intermediate) return;
        if (bias != nullptr) {
          add_bias<2 * Pair>(sums, bias, column, p.intermediate);
          add_bias<2 * Pair + 1>(sums, bias + p.intermediate, column, p.intermediate);
        }
        fragment gate, up, out;
        round_chunk<2 * Pair>(sums, gate);
        round_chunk<2 * Pair + 1>(sums, up);
        emit(gate, p.h, p.h_stride, column, p.intermediate);
        emit(up, p.h + p.intermediate, p.h_stride, column, p.intermediate);
#pragma unroll
        for (int i = 0; i < 16; ++i)
          out[i] = pack_bf16(Activation::forward(low_bf16(gate[i]), low_bf16(up[i]), p.options),
                             Activation::forward(high_bf16(gate[i]), high_bf16(up[i]), p.options));
        emit(out, p.out, p.out_stride, column, p.intermediate);
      });
    } else if constexpr (Activation::gated) {
      const int lane = static_cast<int>(threadIdx.x % 32);
      for_each_chunk<TileN / chunk_rows / 2>([&]<int Pair>() {
        const int column = t.n + 2 * Pair * chunk_rows;  // of H
        if (column >= width) return;
        fragment h[2];
        const auto half = [&]<int Half>() {
          const int first = column + Half * chunk_rows;
          if (bias != nullptr && first < width) add_bias<2 * Pair + Half>(sums, bias, first, width);
          round_chunk<2 * Pair + Half>(sums, h[Half]);
          if (first < width) emit(h[Half], p.h, p.h_stride, first, width);
        };
        half.template operator()<0>();
        half.template operator()<1>();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 32; ++i) {  // pair i % 2 of 8 columns of H is 4 columns of the activation
          const std::uint32_t pair = h[i / 16][i % 16];
          const bfloat16 value(Activation::forward(low_bf16(pair), high_bf16(pair), p.options));
          store_shared_2(buffer.element_address(i % 2, i / 2 * 4 + lane % 4), value.bits);
        }
        __syncwarp();
        buffer.store(p.out, p.out_stride, first_row, t.m_end, column / 2, p.intermediate);
      });
    } else {
      for_each_chunk<TileN / chunk_rows>([&]<int Chunk>() {
        const int column = t.n + Chunk * chunk_rows;
        if (column >= p.intermediate) return;
        if (bias != nullptr) add_bias<Chunk>(sums, bias, column, p.intermediate);
        fragment h, out;
        round_chunk<Chunk>(sums, h);
        emit(h, p.h, p.h_stride, column, p.intermediate);
#pragma unroll
        for (int i = 0; i < 16; ++i)
          out[i] = pack_bf16(Activation::forward(low_bf16(h[i]), p.options),
                             Activation::forward(high_bf16(h[i]), p.options));
        emit(out, p.out, p.out_stride, column, p.intermediate);
      });
    }
  }
};

/// The sums are `dA = dY W2`, unweighted. With the row's weight `w`: writes dH of `w dA` over H, `w A`, and this tile's
/// part of `dL/dw = <dA, A>`.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gates and ups are in turn.
template <class Activation, bool Interleaved>
struct activation_backward_epilogue {
  static constexpr bool split = false;
  static constexpr int staging_buffers = Activation::gated ? 2 : 1;

  struct params {
    bfloat16* h;                  ///< `[rows, U]`: H, then dH.
    std::int64_t h_stride;        ///< Elements between its rows.
    bfloat16* out;                ///< `[rows, n]`: the weighted activation.
    std::int64_t out_stride;      ///< Elements between its rows.
    int intermediate;             ///< n.
    const float* weights;         ///< `[rows]`, or null for ones.
    float* partial;               ///< `[tiles along n, rows]`: parts of dL/dw, or null.
    std::int64_t partial_stride;  ///< Elements from one tile's parts to the next's.
    typename Activation::options options;
  };

  template <int TileN>
  static __device__ __forceinline__ void write(const params& p, float (&sums)[TileN / 2], const tile& t, int first_row,
                                               std::uint32_t staging) {
    static constexpr int chunks = TileN / chunk_rows;
    const warp_staging gates(staging), ups(staging + (Activation::gated ? staging_bytes : 0));
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int n = p.intermediate, rows = t.m_end;
    float weight[2] = {1.0f, 1.0f}, dweight[2] = {0.0f, 0.0f};
    if (p.weights != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + 8 * half;
        weight[half] = row < rows ? __ldg(p.weights + row) : 0.0f;
      }
    }
    // H of the first chunk; that of each next one is under way while one is computed.
    uint4 first[4], second[4];
    const auto request = [&](int column) {
      if constexpr (Activation::gated && Interleaved) {
        warp_staging::read(first, p.h, p.h_stride, first_row, rows, 2 * column, 2 * n);
        warp_staging::read(second, p.h, p.h_stride, first_row, rows, 2 * column + chunk_rows, 2 * n);
      } else {
        warp_staging::read(first, p.h, p.h_stride, first_row, rows, column, n);
        if constexpr (Activation::gated) warp_staging::read(second, p.h + n, p.h_stride, first_row, rows, column, n);
      }
    };
    request(t.n);

    for_each_chunk<chunks>([&]<int Chunk>() {
      const int column = t.n + Chunk * chunk_rows;
      if (column >= n) return;
      __syncwarp();
      gates.fill(first);
      if constexpr (Activation::gated) ups.fill(second);
      __syncwarp();
      if (Chunk + 1 < chunks && column + chunk_rows < n) request(column + chunk_rows);

      fragment out;
      if constexpr (!Activation::gated) {
        fragment h;
        gates.get(h);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const float x[2] = {low_bf16(h[i]), high_bf16(h[i])};
          float dx[2], a[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float da = sums[Chunk * 32 + 2 * i + e];
            a[e] = Activation::forward(x[e], p.options);
            dx[e] = Activation::backward(x[e], weight[i % 2] * da, p.options);
            dweight[i % 2] += da * a[e];
          }
          h[i] = pack_bf16(dx[0], dx[1]);
          out[i] = pack_bf16(weight[i % 2] * a[0], weight[i % 2] * a[1]);
        }
        __syncwarp();
        gates.put(h);
        __syncwarp();
        gates.store(p.h, p.h_stride, first_row, rows, column, n);
      } else {
        [[maybe_unused]] fragment gate, up;
        if constexpr (!Interleaved) {
          gates.get(gate);
          ups.get(up);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          // interleaved: columns 8 j + 2 q + {0, 1} of the activation, j = i / 2, are 16 j + 4 q + {0, 1, 2, 3} of H
          const std::uint32_t place = (i / 8 == 0 ? gates : ups).element_address(i % 2, i / 2 % 4 * 16 + lane % 4 * 4);
          float g[2], u[2], dg[2], du[2], a[2];
          if constexpr (Interleaved) {
            const uint2 h = load_shared_8(place);
            g[0] = low_bf16(h.x), u[0] = high_bf16(h.x), g[1] = low_bf16(h.y), u[1] = high_bf16(h.y);
          } else {
            g[0] = low_bf16(gate[i]), g[1] = high_bf16(gate[i]), u[0] = low_bf16(up[i]), u[1] = high_bf16(up[i]);
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float da = sums[Chunk * 32 + 2 * i + e];
            a[e] = Activation::forward(g[e], u[e], p.options);
            Activation::backward(g[e], u[e], weight[i % 2] * da, dg[e], du[e], p.options);
            dweight[i % 2] += da * a[e];
          }
          if constexpr (Interleaved) {
            store_shared_8(place, {pack_bf16(dg[0], du[0]), pack_bf16(dg[1], du[1])});
          } else {
            gate[i] = pack_bf16(dg[0], dg[1]);
            up[i] = pack_bf16(du[0], du[1]);
          }
          out[i] = pack_bf16(weight[i % 2] * a[0], weight[i % 2] * a[1]);
        }
        __syncwarp();
        if constexpr (Interleaved) {
          gates.store(p.h, p.h_stride, first_row, rows, 2 * column, 2 * n);
          ups.store(p.h, p.h_stride, first_row, rows, 2 * column + chunk_rows, 2 * n);
        } else {
          gates.put(gate);
          ups.put(up);
          __syncwarp();
          gates.store(p.h, p.h_stride, first_row, rows, column, n);
          ups.store(p.h + n, p.h_stride, first_row, rows, column, n);
        }
      }
      __syncwarp();
      gates.put(out);
      __syncwarp();
      gates.store(p.out, p.out_stride, first_row, rows, column, n);
    });

    if (p.partial == nullptr) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = dweight[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int row = first_row + lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < rows) p.partial[t.n / TileN * p.partial_stride + row] = sum;
    }
  }
};

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
