// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The replicated layers: linear, root-mean-square norm, embedding and the cross entropy of the next byte.
///
/// Gradients of parameters come as one contribution per chunk: chunk `c` holds rows `[offsets[c], offsets[c + 1])` and
/// writes to `gradient + c * stride`. A chunk's contribution is the same whichever rank computes it, and
/// `tessera::ordered_all_reduce` adds them in the order of chunks: that makes training independent of the rank count.

#include <cmath>
#include <cstdint>
#include <span>

#include <tessera/gemm/gemm.hpp>

#include "math.hpp"

namespace train_lm {

namespace ts = tessera;

/// First row of each chunk, and the end of the last.
using chunk_offsets = std::span<const std::int32_t>;

/// Products of the replicated layers: a row's bits do not depend on the other rows.
using dense_gemm = ts::gemm::reference;

/// `y [rows, out] = x [rows, in] w^T`, `w [out, in]`.
template <class A>
void linear_forward(std::int64_t rows, std::int64_t in, std::int64_t out, const A* x, const A* w, A* y) {
  const std::int32_t offsets[] = {0, static_cast<std::int32_t>(rows)};
  dense_gemm::variable_m<A>(offsets, out, in, ts::gemm::row_operand<A>{x, in},
                            ts::gemm::group_operand<const A>{w, 0, in, 1}, static_cast<const A*>(nullptr),
                            ts::matrix_view<A>(y, rows, out));
}

/// `dx [rows, in] = dy [rows, out] w`.
template <class A>
void linear_backward_input(std::int64_t rows, std::int64_t in, std::int64_t out, const A* dy, const A* w, A* dx) {
  const std::int32_t offsets[] = {0, static_cast<std::int32_t>(rows)};
  dense_gemm::variable_m<A>(offsets, in, out, ts::gemm::row_operand<A>{dy, out},
                            ts::gemm::group_operand<const A>{w, 0, 1, in}, static_cast<const A*>(nullptr),
                            ts::matrix_view<A>(dx, rows, in));
}

/// Per chunk `dw [out, in] = dy^T x`.
template <class A>
void linear_backward_weights(chunk_offsets chunks, std::int64_t in, std::int64_t out, const A* x, const A* dy, A* dw,
                             std::int64_t stride) {
  dense_gemm::variable_k<A>(chunks, out, in, ts::gemm::row_operand<A>{dy, out}, ts::gemm::row_operand<A>{x, in},
                            ts::gemm::group_operand<A>{dw, stride, in, 1}, ts::write::overwrite);
}

/// `y = gain * x / rms(x)` of each row; `inverse_rms [rows]` is kept for backward (Zhang and Sennrich 2019).
template <class A>
void norm_forward(std::int64_t rows, std::int64_t d, const A* x, const A* gain, A* y, A* inverse_rms) {
  for (std::int64_t t = 0; t < rows; ++t, x += d, y += d) {
    const A inverse = A(1) / std::sqrt(dot(x, x, d) / static_cast<A>(d) + A(1e-6));
    inverse_rms[t] = inverse;
    for (std::int64_t i = 0; i < d; ++i) y[i] = gain[i] * (x[i] * inverse);
  }
}

/// Adds the input's gradient to `dx`, and overwrites the gain's per chunk.
template <class A>
void norm_backward(chunk_offsets chunks, std::int64_t d, const A* x, const A* gain, const A* inverse_rms, const A* dy,
                   A* dx, A* dgain, std::int64_t stride) {
  for (std::size_t c = 0; c + 1 < chunks.size(); ++c, dgain += stride) {
    for (std::int64_t i = 0; i < d; ++i) dgain[i] = 0;
    for (std::int64_t t = chunks[c]; t < chunks[c + 1]; ++t) {
      const A* xt = x + t * d;
      const A* dyt = dy + t * d;
      A* dxt = dx + t * d;
      const A inverse = inverse_rms[t];
      for (std::int64_t i = 0; i < d; ++i) dgain[i] += dyt[i] * (xt[i] * inverse);
      A sums[16] = {};
      std::int64_t i = 0;
      for (; i + 16 <= d; i += 16)
        for (int j = 0; j < 16; ++j) sums[j] += dyt[i + j] * gain[i + j] * xt[i + j];
      for (int j = 0; i + j < d; ++j) sums[j] += dyt[i + j] * gain[i + j] * xt[i + j];
      A sum = 0;
      for (const A s : sums) sum += s;
      const A along = sum * inverse * inverse / static_cast<A>(d);
      for (i = 0; i < d; ++i) dxt[i] += inverse * (dyt[i] * gain[i] - xt[i] * along);
    }
  }
}

/// `y [rows, d] = table[tokens]`.
template <class A>
void embedding_forward(std::span<const std::uint8_t> tokens, std::int64_t d, const A* table, A* y) {
  for (const std::uint8_t token : tokens) {
    const A* row = table + token * d;
    for (std::int64_t i = 0; i < d; ++i) y[i] = row[i];
    y += d;
  }
}

/// Adds the table's gradient per chunk; the contributions must have been zeroed.
template <class A>
void embedding_backward(chunk_offsets chunks, std::span<const std::uint8_t> tokens, std::int64_t d, const A* dy,
                        A* dtable, std::int64_t stride) {
  for (std::size_t c = 0; c + 1 < chunks.size(); ++c, dtable += stride) {
    for (std::int64_t t = chunks[c]; t < chunks[c + 1]; ++t) {
      A* row = dtable + tokens[static_cast<std::size_t>(t)] * d;
      for (std::int64_t i = 0; i < d; ++i) row[i] += dy[t * d + i];
    }
  }
}

/// A position without a loss.
inline constexpr std::int16_t no_target = -1;

/// Cross entropy in nats. `logits [rows, vocabulary]` are overwritten with `gradient_scale * (softmax - onehot)`;
/// `losses[c]` is the sum over the rows of chunk `c`.
template <class A>
void cross_entropy(chunk_offsets chunks, std::int64_t vocabulary, A* logits, std::span<const std::int16_t> targets,
                   A gradient_scale, double* losses) {
  for (std::size_t c = 0; c + 1 < chunks.size(); ++c) {
    double loss = 0;
    for (std::int64_t t = chunks[c]; t < chunks[c + 1]; ++t) {
      A* row = logits + t * vocabulary;
      const std::int16_t target = targets[static_cast<std::size_t>(t)];
      if (target == no_target) {
        for (std::int64_t v = 0; v < vocabulary; ++v) row[v] = 0;
        continue;
      }
      A largest = row[0];
      for (std::int64_t v = 1; v < vocabulary; ++v) largest = row[v] > largest ? row[v] : largest;
      const A target_logit = row[target] - largest;
      A sums[16] = {};
      for (std::int64_t v = 0; v < vocabulary; v += 16)
        for (int j = 0; j < 16; ++j) {
          row[v + j] = exponential(row[v + j] - largest);
          sums[j] += row[v + j];
        }
      A sum = 0;
      for (const A s : sums) sum += s;
      loss += static_cast<double>(std::log(sum) - target_logit);
      const A scale = gradient_scale / sum;
      for (std::int64_t v = 0; v < vocabulary; ++v) row[v] *= scale;
      row[target] -= gradient_scale;
    }
    losses[c] = loss;
  }
}

}  // namespace train_lm
