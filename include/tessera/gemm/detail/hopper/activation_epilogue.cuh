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
  static constexpr bool split = Activation::gated && !Interleaved, by_warpgroup = false;
  static constexpr takes_steps steps = takes_steps::never;

  struct params {
    output_matrix<bfloat16> h;    ///< `[rows, U]`; where gates come first, layers of gates and ups.
    output_matrix<bfloat16> out;  ///< `[rows, n]`: the activation.
    int intermediate;             ///< n.
    const bfloat16* bias;         ///< `[G, U]`, or null.
    typename Activation::options options;
  };

  template <int TileN>
  static __device__ __forceinline__ void write(const params& p, float (&sums)[TileN / 2], const tile& t, int first_row,
                                               warp_output& output) {
    const int width = (Activation::gated ? 2 : 1) * p.intermediate;
    const bfloat16* const bias = p.bias == nullptr ? nullptr : p.bias + static_cast<std::int64_t>(t.group) * width;
    const auto emit = [&](const fragment& f, const output_matrix<bfloat16>& matrix, int layer, int column) {
      const std::uint32_t buffer = output.acquire();
      warp_output::put(buffer, f);
      output.send(buffer, matrix, layer, first_row, t.m_end, column);
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
        output.send(buffer, p.out, 0, first_row, t.m_end, column / 2);
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
///
/// H comes through the ring and dH leaves from where H came to: its latency is hidden behind the last products, and it
/// takes neither registers nor the warp's buffers. Rows of other groups may come with a group's last ones, while their
/// own blocks write to them: nothing that comes of these is stored.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gates and ups are in turn.
template <class Activation, bool Interleaved>
struct activation_backward_epilogue {
  static constexpr bool split = false;
  static constexpr takes_steps steps = takes_steps::always;
  static constexpr int step_blocks = Activation::gated ? 2 : 1;  ///< 64 columns of the activation are 64 or 128 of H.

  struct params {
    output_matrix<bfloat16> h;    ///< `[rows, U]`: H, then dH; where gates come first, layers of gates and ups.
    output_matrix<bfloat16> out;  ///< `[rows, n]`: the weighted activation.
    int intermediate;             ///< n.
    const float* weights;         ///< `[rows]`, or null for ones.
    float* partial;               ///< `[n / 128, rows]`, rounded up: parts of dL/dw, or null.
    std::int64_t partial_stride;  ///< Elements from one part of all rows to the next.
    typename Activation::options options;
  };

  /// Enqueues H of 16 rows x 64 columns of the activation: gates and ups, or their two halves where they are in turn.
  static __device__ __forceinline__ void load(const params& p, const tile&, std::uint32_t target, std::uint32_t barrier,
                                              int first_row, int column) {
#pragma unroll
    for (int part = 0; part < step_blocks; ++part) {
      const place_in_h at = place(column, part);
      tma_load(target + static_cast<std::uint32_t>(part) * staging_bytes, p.h.map, barrier, at.column, first_row,
               at.layer);
    }
  }

  /// Of a lane's two rows: the weights, and the sums of the part of `dL/dw` under way.
  struct row_values {
    float weight[2] = {1.0f, 1.0f}, dweight[2] = {0.0f, 0.0f};
  };

  static __device__ __forceinline__ row_values begin(const params& p, int first_row, int row_end) {
    row_values rows;
    if (p.weights != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(first_row, half);
        rows.weight[half] = row < row_end ? __ldg(p.weights + row) : 0.0f;
      }
    }
    return rows;
  }

  template <int Chunk, int Count>
  static __device__ __forceinline__ void step(const params& p, const float (&sums)[Count], row_values& rows,
                                              const tile&, const warp_output& output, std::uint32_t blocks) {
    const std::uint32_t second = blocks + staging_bytes;
    fragment gate, out;
    [[maybe_unused]] fragment up;
    if constexpr (Activation::gated && Interleaved) {
      take_interleaved<0>(blocks, gate, up);
      take_interleaved<1>(second, gate, up);
    } else {
      warp_output::get(blocks, gate);
      if constexpr (Activation::gated) warp_output::get(second, up);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float weight = rows.weight[i % 2], x[2] = {low_bf16(gate[i]), high_bf16(gate[i])};
      float& dweight = rows.dweight[i % 2];
      float dx[2], a[2];
      if constexpr (Activation::gated) {
        const float u[2] = {low_bf16(up[i]), high_bf16(up[i])};
        float du[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float da = sums[Chunk * 32 + 2 * i + e];
          a[e] = Activation::forward(x[e], u[e], p.options);
          Activation::backward(x[e], u[e], weight * da, dx[e], du[e], p.options);
          dweight += da * a[e];
        }
        up[i] = pack_bf16(du[0], du[1]);
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float da = sums[Chunk * 32 + 2 * i + e];
          a[e] = Activation::forward(x[e], p.options);
          dx[e] = Activation::backward(x[e], weight * da, p.options);
          dweight += da * a[e];
        }
      }
      gate[i] = pack_bf16(dx[0], dx[1]);
      out[i] = pack_bf16(weight * a[0], weight * a[1]);
    }

    // Where matrices are loaded and stored, the whole warp has loaded one before any lane stores over it.
    warp_output::put(output.buffer(Chunk % 2), out);
    if constexpr (Activation::gated && Interleaved) {
      put_interleaved<0>(blocks, gate, up);
      put_interleaved<1>(second, gate, up);
    } else {
      warp_output::put(blocks, gate);
      if constexpr (Activation::gated) warp_output::put(second, up);
    }
  }

  template <int Chunk>
  static __device__ __forceinline__ void send_step(const params& p, row_values& rows, const tile& t, int first_row,
                                                   const warp_output& output, std::uint32_t blocks) {
    const int column = t.n + Chunk * chunk_rows;
    warp_output::show();
    warp_output::send<true>(output.buffer(Chunk % 2), p.out, 0, first_row, t.m_end, column);
#pragma unroll
    for (int part = 0; part < step_blocks; ++part) {
      const place_in_h at = place(column, part);
      if (at.column < p.h.columns)
        warp_output::send<true>(blocks + static_cast<std::uint32_t>(part) * staging_bytes, p.h, at.layer, first_row,
                                t.m_end, at.column);
    }
    warp_output::commit();

    if (p.partial != nullptr && (Chunk % 2 == 1 || column + chunk_rows >= p.intermediate)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = rows.dweight[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int row = row_of(first_row, half);
        if (threadIdx.x % 4 == 0 && row < t.m_end) p.partial[column / 128 * p.partial_stride + row] = sum;
        rows.dweight[half] = 0.0f;
      }
    }
  }

 private:
  /// Where a block of H begins.
  struct place_in_h {
    int column, layer;
  };
  /// Block `part` of the 64 columns of the activation from `column` on.
  static __device__ __forceinline__ place_in_h place(int column, int part) {
    if constexpr (Activation::gated && Interleaved)
      return {2 * column + part * chunk_rows, 0};
    else
      return {column, part};
  }
  static __device__ __forceinline__ int row_of(int first_row, int half) {
    return first_row + static_cast<int>(threadIdx.x % 32) / 4 + 8 * half;
  }

  // Columns 8 j + 2 q + {0, 1} of the activation are 16 j + 4 q + {0, 1, 2, 3} of H, gates and ups in turn. Of the 64
  // columns, each half of H's 128 holds 32.
  template <int Half>
  static __device__ __forceinline__ void take_interleaved(std::uint32_t block, fragment& gate, fragment& up) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 h = load_shared_8(wide_address(block, i));
      gate[8 * Half + i] = __byte_perm(h.x, h.y, 0x5410);
      up[8 * Half + i] = __byte_perm(h.x, h.y, 0x7632);
    }
  }
  template <int Half>
  static __device__ __forceinline__ void put_interleaved(std::uint32_t block, const fragment& gate,
                                                         const fragment& up) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      store_shared_8(wide_address(block, i), {__byte_perm(gate[8 * Half + i], up[8 * Half + i], 0x5410),
                                              __byte_perm(gate[8 * Half + i], up[8 * Half + i], 0x7632)});
  }
  static __device__ __forceinline__ std::uint32_t wide_address(std::uint32_t block, int i) {
    return warp_output::element_address(block, i % 2, (i / 2 * 16 + static_cast<int>(threadIdx.x % 4) * 4) * 2);
  }
};

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
