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
  static constexpr bool split = Activation::gated && !Interleaved, clusters = true, by_warpgroup = false;

  struct params {
    output_matrix<bfloat16> h;    ///< `[rows, U]`; where gates come first, layers of gates and ups.
    output_matrix<bfloat16> out;  ///< `[rows, n]`: the activation.
    int intermediate;             ///< n.
    const bfloat16* bias;         ///< `[G, U]`, or null.
    typename Activation::options options;
  };

  template <int Blocks>
  using held = nothing_held;

  template <int TileN>
  static __device__ __forceinline__ void prepare(const params&, const tile&, int, nothing_held&) {}

  template <int TileN>
  static __device__ __forceinline__ void write(const params& p, float (&sums)[TileN / 2], const tile& t, int first_row,
                                               warp_output& output, const nothing_held&) {
    const int width = (Activation::gated ? 2 : 1) * p.intermediate;
    const bfloat16* const bias = p.bias == nullptr ? nullptr : p.bias + static_cast<std::int64_t>(t.group) * width;
    const auto emit = [&](const fragment& f, const output_matrix<bfloat16>& matrix, int layer, int column) {
      const std::uint32_t buffer = output.acquire();
      warp_output::put(buffer, f);
      output.template send<false>(buffer, matrix, layer, first_row, t.m_end, column);
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
        emit(gate, p.h, 0, column);
        emit(up, p.h, 1, column);
#pragma unroll
        for (int i = 0; i < 16; ++i)
          out[i] = pack_bf16(Activation::forward(low_bf16(gate[i]), low_bf16(up[i]), p.options),
                             Activation::forward(high_bf16(gate[i]), high_bf16(up[i]), p.options));
        emit(out, p.out, 0, column);
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
          if (first < width) emit(h[Half], p.h, 0, first);
        };
        half.template operator()<0>();
        half.template operator()<1>();
        const std::uint32_t buffer = output.acquire();
#pragma unroll
        for (int i = 0; i < 32; ++i) {  // pair i % 2 of 8 columns of H is 4 columns of the activation
          const std::uint32_t pair = h[i / 16][i % 16];
          const bfloat16 value(Activation::forward(low_bf16(pair), high_bf16(pair), p.options));
          store_shared_2(warp_output::element_address(buffer, i % 2, (i / 2 * 4 + lane % 4) * 2), value.bits);
        }
        output.template send<false>(buffer, p.out, 0, first_row, t.m_end, column / 2);
      });
    } else {
      for_each_chunk<TileN / chunk_rows>([&]<int Chunk>() {
        const int column = t.n + Chunk * chunk_rows;
        if (column >= p.intermediate) return;
        if (bias != nullptr) add_bias<Chunk>(sums, bias, column, p.intermediate);
        fragment h, out;
        round_chunk<Chunk>(sums, h);
        emit(h, p.h, 0, column);
#pragma unroll
        for (int i = 0; i < 16; ++i)
          out[i] = pack_bf16(Activation::forward(low_bf16(h[i]), p.options),
                             Activation::forward(high_bf16(h[i]), p.options));
        emit(out, p.out, 0, column);
      });
    }
  }
};

/// The sums are `dA = dY W2`, unweighted. With the row's weight `w`: writes dH of `w dA` over H, `w A`, and sums of
/// `dA A` over 128 columns each, parts of `dL/dw` that do not depend on the tile.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gates and ups are in turn.
template <class Activation, bool Interleaved>
struct activation_backward_epilogue {
  static constexpr bool split = false, clusters = false, by_warpgroup = false;
  static constexpr bool two_parts = Activation::gated;  ///< Whether 64 columns of the activation have 128 of H.

  struct params {
    output_matrix<bfloat16> h;    ///< `[rows, U]`: H, then dH; where gates come first, layers of gates and ups.
    output_matrix<bfloat16> out;  ///< `[rows, n]`: the weighted activation.
    int intermediate;             ///< n.
    const float* weights;         ///< `[rows]`, or null for ones.
    float* partial;               ///< `[n / 128, rows]`, rounded up: parts of dL/dw, or null.
    std::int64_t partial_stride;  ///< Elements from one part of all rows to the next.
    typename Activation::options options;
  };

  /// H of 64 columns of the activation, as it was read. A warp that computes one block reads its first columns before
  /// the products, when registers are free and nobody waits.
  struct columns_of_h {
    uint4 part[two_parts ? 2 : 1][4];
  };
  template <int Blocks>
  using held = std::conditional_t<Blocks == 1, columns_of_h, nothing_held>;

  template <int TileN, class Held>
  static __device__ __forceinline__ void prepare(const params& p, const tile& t, int first_row, Held& first) {
    if constexpr (!std::is_same_v<Held, nothing_held>) read_h(p, first_row, t.m_end, t.n, first);
    // The rest is brought near.
    static constexpr int width = (Activation::gated && Interleaved ? 2 : 1) * TileN;  // of a run of H
    static constexpr int runs = Activation::gated && !Interleaved ? 2 : 1, lines = width / 64;
    const int start = t.n * (width / TileN), end = p.intermediate * (width / TileN);
    for (int i = static_cast<int>(threadIdx.x % 32); i < 16 * runs * lines; i += 32) {
      const int row = first_row + i / (runs * lines), column = start + i % lines * 64;
      const int run = i / lines % runs * p.intermediate;
      if (row < t.m_end && column < end) prefetch_line(p.h.data + row * p.h.row_stride + run + column);
    }
  }

  template <int TileN, class Held>
  static __device__ __forceinline__ void write(const params& p, float (&sums)[TileN / 2], const tile& t, int first_row,
                                               warp_output& output, const Held& first) {
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
    columns_of_h next;
    if constexpr (std::is_same_v<Held, nothing_held>)
      read_h(p, first_row, rows, t.n, next);
    else
      next = first;

    for_each_chunk<TileN / chunk_rows>([&]<int Chunk>() {
      const int column = t.n + Chunk * chunk_rows;
      if (column >= n) return;
      fragment gate, out;
      [[maybe_unused]] fragment up;
      take_h(output, next, gate, up);
      if (Chunk + 1 < TileN / chunk_rows && column + chunk_rows < n)
        read_h(p, first_row, rows, column + chunk_rows, next);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float x[2] = {low_bf16(gate[i]), high_bf16(gate[i])};
        float dx[2], a[2];
        if constexpr (Activation::gated) {
          const float u[2] = {low_bf16(up[i]), high_bf16(up[i])};
          float du[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float da = sums[Chunk * 32 + 2 * i + e];
            a[e] = Activation::forward(x[e], u[e], p.options);
            Activation::backward(x[e], u[e], weight[i % 2] * da, dx[e], du[e], p.options);
            dweight[i % 2] += da * a[e];
          }
          up[i] = pack_bf16(du[0], du[1]);
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float da = sums[Chunk * 32 + 2 * i + e];
            a[e] = Activation::forward(x[e], p.options);
            dx[e] = Activation::backward(x[e], weight[i % 2] * da, p.options);
            dweight[i % 2] += da * a[e];
          }
        }
        gate[i] = pack_bf16(dx[0], dx[1]);
        out[i] = pack_bf16(weight[i % 2] * a[0], weight[i % 2] * a[1]);
      }
      const auto emit = [&](const fragment& f, const output_matrix<bfloat16>& matrix, int layer, int first_column) {
        const std::uint32_t buffer = output.acquire();
        warp_output::put(buffer, f);
        output.template send<false>(buffer, matrix, layer, first_row, rows, first_column);
      };
      emit(out, p.out, 0, column);
      if constexpr (Activation::gated && Interleaved) {
        emit_interleaved<0>(p, output, gate, up, first_row, rows, 2 * column);
        if (2 * column + chunk_rows < 2 * n)
          emit_interleaved<1>(p, output, gate, up, first_row, rows, 2 * column + chunk_rows);
      } else {
        emit(gate, p.h, 0, column);
        if constexpr (Activation::gated) emit(up, p.h, 1, column);
      }

      if (p.partial != nullptr && (Chunk % 2 == 1 || column + chunk_rows >= n)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float sum = dweight[half];
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          const int row = first_row + lane / 4 + 8 * half;
          if (lane % 4 == 0 && row < rows) p.partial[column / 128 * p.partial_stride + row] = sum;
          dweight[half] = 0.0f;
        }
      }
    });
  }

 private:
  /// Reads H of the 64 columns of the activation from `column` on.
  static __device__ __forceinline__ void read_h(const params& p, int first_row, int rows, int column, columns_of_h& h) {
    const int n = p.intermediate;
    const std::int64_t stride = p.h.row_stride;
    if constexpr (Activation::gated && Interleaved) {
      warp_output::read(h.part[0], p.h.data, stride, first_row, rows, 2 * column, 2 * n);
      warp_output::read(h.part[1], p.h.data, stride, first_row, rows, 2 * column + chunk_rows, 2 * n);
    } else {
      warp_output::read(h.part[0], p.h.data, stride, first_row, rows, column, n);
      if constexpr (Activation::gated) warp_output::read(h.part[1], p.h.data + n, stride, first_row, rows, column, n);
    }
  }

  /// What was read, as fragments of gates and ups; `up` only where there is a gate.
  static __device__ __forceinline__ void take_h(const warp_output& output, const columns_of_h& h, fragment& gate,
                                                [[maybe_unused]] fragment& up) {
    const std::uint32_t low = output.buffer(0), high = output.buffer(1);
    output.acquire_both();
    warp_output::fill(low, h.part[0]);
    if constexpr (Activation::gated) warp_output::fill(high, h.part[1]);
    __syncwarp();
    if constexpr (Activation::gated && Interleaved) {
      take_interleaved<0>(low, gate, up);
      take_interleaved<1>(high, gate, up);
    } else {
      warp_output::get(low, gate);
      if constexpr (Activation::gated) warp_output::get(high, up);
    }
  }

  // Columns 8 j + 2 q + {0, 1} of the activation are 16 j + 4 q + {0, 1, 2, 3} of H, gates and ups in turn. Of the 64
  // columns, each half of H's 128 holds 32.
  template <int Half>
  static __device__ __forceinline__ void take_interleaved(std::uint32_t buffer, fragment& gate, fragment& up) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 h = load_shared_8(wide_address(buffer, i));
      gate[8 * Half + i] = __byte_perm(h.x, h.y, 0x5410);
      up[8 * Half + i] = __byte_perm(h.x, h.y, 0x7632);
    }
  }
  template <int Half>
  static __device__ __forceinline__ void emit_interleaved(const params& p, warp_output& output, const fragment& gate,
                                                          const fragment& up, int first_row, int rows, int column) {
    const std::uint32_t buffer = output.acquire();
#pragma unroll
    for (int i = 0; i < 8; ++i)
      store_shared_8(wide_address(buffer, i), {__byte_perm(gate[8 * Half + i], up[8 * Half + i], 0x5410),
                                               __byte_perm(gate[8 * Half + i], up[8 * Half + i], 0x7632)});
    output.template send<false>(buffer, p.h, 0, first_row, rows, column);
  }
  static __device__ __forceinline__ std::uint32_t wide_address(std::uint32_t buffer, int i) {
    return warp_output::element_address(buffer, i % 2, (i / 2 * 16 + static_cast<int>(threadIdx.x % 4) * 4) * 2);
  }
};

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
