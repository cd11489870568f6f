// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The causal token mixer: a short convolution and a gated linear recurrence per channel.
///
///     [u z g] = x W_in^T                        d channels each
///     v_t = b + sum_j c_j * u_{t-j}             j < width: depthwise, causal
///     f_t = sigmoid(z_t + a)                    how much of the past stays
///     h_t = f_t h_{t-1} + (1 - f_t) v_t
///     y_t = (h_t * silu(g_t)) W_out^T
///
/// The recurrence is that of minGRU (Feng et al. 2024) behind the short convolution and the gate of Mamba-like blocks
/// (Gu and Dao 2023): 4 d^2 products a token whatever the length of the context, and a state that can be carried on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "dense.hpp"
#include "parameters.hpp"

namespace train_lm {

/// One mixer; owns its activations, not its parameters.
template <class A>
class token_mixer {
 public:
  /// Registers the parameters. @param hidden d. @param width Length of the convolution. @param max_rows Bound of rows.
  token_mixer(parameter_table& table, const std::string& name, std::int64_t hidden, std::int64_t width,
              std::int64_t max_rows)
      : d_(hidden), width_(width) {
    in_ = table.add(name + ".in", ts::box::whole({3 * d_, d_}), true);
    out_ = table.add(name + ".out", ts::box::whole({d_, d_}), true);
    taps_ = table.add(name + ".taps", ts::box::whole({width_, d_}), false);
    shift_ = table.add(name + ".shift", d_, false);
    keep_ = table.add(name + ".keep", d_, false);
    const auto n = static_cast<std::size_t>(max_rows * d_);
    projected_.resize(3 * n);
    for (auto* buffer : {&mixed_, &kept_, &hidden_, &gate_, &gated_, &dgated_, &dmixed_}) buffer->resize(n);
  }

  /// Elements of the state of one sequence: the last `width - 1` inputs of the convolution and the last `h`.
  std::int64_t state_size() const { return width_ * d_; }

  /// Initial values. @param depth_scale Deviation of the output projection relative to the input's.
  void initialize(const parameter_table& table, std::span<A> parameters, std::uint64_t seed, double depth_scale) const {
    const auto tensor = [&](std::int64_t offset) {
      return parameters.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(table.at(offset).count));
    };
    const double deviation = 1.0 / std::sqrt(static_cast<double>(d_));
    fill_normal(tensor(in_), seed, table.at(in_).name, deviation);
    fill_normal(tensor(out_), seed, table.at(out_).name, deviation * depth_scale);
    fill_normal(tensor(taps_), seed, table.at(taps_).name, 1.0 / std::sqrt(static_cast<double>(width_)));
    // Channels remember from 1 to about 100 positions: a mean life of 1 / (1 - f), evenly spread on a log scale.
    for (std::int64_t i = 0; i < d_; ++i) {
      const double life = std::pow(100.0, (static_cast<double>(i) + 0.5) / static_cast<double>(d_));
      parameters[static_cast<std::size_t>(keep_ + i)] = static_cast<A>(std::log(life));
    }
  }

  /// @param sequences,length `rows = sequences * length`, sequence by sequence.
  /// @param x  `[rows, d]`.
  /// @param y  `[rows, d]`, overwritten.
  /// @param state `[sequences, state_size()]`, read as what came before and replaced by what comes next.
  void forward(const A* parameters, std::int64_t sequences, std::int64_t length, const A* x, A* y, A* state) {
    const std::int64_t rows = sequences * length;
    linear_forward(rows, d_, 3 * d_, x, parameters + in_, projected_.data());
    before_.assign(state, state + sequences * state_size());
    const A* taps = parameters + taps_;
    const A* shift = parameters + shift_;
    for (std::int64_t s = 0; s < sequences; ++s) {
      const A* past = before_.data() + s * state_size();
      for (std::int64_t t = 0; t < length; ++t) {
        const std::int64_t r = s * length + t;
        A* v = mixed_.data() + r * d_;
        for (std::int64_t i = 0; i < d_; ++i) v[i] = shift[i];
        for (std::int64_t j = 0; j < width_; ++j) {
          const A* u = convolved(past, s * length, t - j);
          multiply_add(d_, taps + j * d_, u, v);
        }
        const A* previous = t == 0 ? past + (width_ - 1) * d_ : hidden_.data() + (r - 1) * d_;
        const A* z = projected_.data() + r * 3 * d_ + d_;
        recurrence_forward(d_, v, previous, z, parameters + keep_, z + d_, kept_.data() + r * d_,
                           hidden_.data() + r * d_, gate_.data() + r * d_, gated_.data() + r * d_);
      }
      A* next = state + s * state_size();
      for (std::int64_t j = 0; j + 1 < width_; ++j) {
        const A* u = convolved(past, s * length, length - (width_ - 1) + j);
        for (std::int64_t i = 0; i < d_; ++i) next[j * d_ + i] = u[i];
      }
      const A* last = hidden_.data() + (s * length + length - 1) * d_;
      for (std::int64_t i = 0; i < d_; ++i) next[(width_ - 1) * d_ + i] = last[i];
    }
    linear_forward(rows, d_, d_, gated_.data(), parameters + out_, y);
  }

  /// Gradients of the last forward; none flows into the state before it. @param dx `[rows, d]`, overwritten.
  /// @param gradients Contributions, `stride` elements a chunk; a chunk is a whole number of sequences.
  void backward(const A* parameters, chunk_offsets chunks, std::int64_t length, const A* x, const A* dy, A* dx,
                A* gradients, std::int64_t stride) {
    backward_input(parameters, chunks, length, dy, dx, gradients, stride);
    backward_weights(chunks, x, dy, gradients, stride);
  }

  /// The part of `backward` that the layer before waits for: `dx`, and the gradients of taps, shift and keep, which
  /// fall out of the recurrence.
  void backward_input(const A* parameters, chunk_offsets chunks, std::int64_t length, const A* dy, A* dx, A* gradients,
                      std::int64_t stride) {
    const std::int64_t rows = chunks.back();
    linear_backward_input(rows, d_, d_, dy, parameters + out_, dgated_.data());
    dprojected_.resize(static_cast<std::size_t>(rows * 3 * d_));
    dcarry_.resize(static_cast<std::size_t>(d_));
    for (std::size_t c = 0; c + 1 < chunks.size(); ++c) {
      A* own = gradients + static_cast<std::int64_t>(c) * stride;
      for (std::int64_t i = 0; i < width_ * d_; ++i) own[taps_ + i] = 0;
      for (std::int64_t i = 0; i < d_; ++i) own[shift_ + i] = own[keep_ + i] = 0;
      for (std::int64_t first = chunks[c]; first < chunks[c + 1]; first += length)
        backward_sequence(parameters, first, length, own);
    }
    linear_backward_input(rows, d_, 3 * d_, dprojected_.data(), parameters + in_, dx);
  }

  /// The part of `backward` that may come later, with the same `x` and `dy`: the gradients of the two matrices.
  void backward_weights(chunk_offsets chunks, const A* x, const A* dy, A* gradients, std::int64_t stride) const {
    linear_backward_weights(chunks, d_, d_, gated_.data(), dy, gradients + out_, stride);
    linear_backward_weights(chunks, d_, 3 * d_, x, dprojected_.data(), gradients + in_, stride);
  }

 private:
  /// The convolution's input at position `t` of the sequence that starts at row `first`; negative positions lie in the
  /// past.
  const A* convolved(const A* past, std::int64_t first, std::int64_t t) const {
    return t >= 0 ? projected_.data() + (first + t) * 3 * d_ : past + (width_ - 1 + t) * d_;
  }

  void backward_sequence(const A* parameters, std::int64_t first, std::int64_t length, A* own) {
    const A* past = before_.data() + first / length * state_size();
    const A* taps = parameters + taps_;
    std::fill(dcarry_.begin(), dcarry_.end(), A(0));
    for (std::int64_t t = length; t-- > 0;) {
      const std::int64_t r = first + t;
      const A* h = hidden_.data() + r * d_;
      const A* previous = t == 0 ? past + (width_ - 1) * d_ : h - d_;
      A* dv = dmixed_.data() + r * d_;
      A* dz = dprojected_.data() + r * 3 * d_ + d_;
      recurrence_backward(d_, mixed_.data() + r * d_, previous, kept_.data() + r * d_, h, gate_.data() + r * d_,
                          projected_.data() + r * 3 * d_ + 2 * d_, dgated_.data() + r * d_, dcarry_.data(), dv, dz,
                          dz + d_);
      add(d_, dz, own + keep_);
      add(d_, dv, own + shift_);
      A* du = dprojected_.data() + r * 3 * d_;
      for (std::int64_t i = 0; i < d_; ++i) du[i] = 0;
      for (std::int64_t j = 0; j < width_; ++j) {
        const A* u = convolved(past, first, t - j);
        multiply_add(d_, dv, u, own + taps_ + j * d_);
        if (t + j < length) multiply_add(d_, taps + j * d_, dmixed_.data() + (r + j) * d_, du);
      }
    }
  }

  // One row each. The arrays do not overlap: said so, because no compiler checks that at run time for ten pointers.

  static void multiply_add(std::int64_t d, const A* TESSERA_RESTRICT a, const A* TESSERA_RESTRICT b,
                           A* TESSERA_RESTRICT sum) {
    for (std::int64_t i = 0; i < d; ++i) sum[i] += a[i] * b[i];
  }

  static void add(std::int64_t d, const A* TESSERA_RESTRICT a, A* TESSERA_RESTRICT sum) {
    for (std::int64_t i = 0; i < d; ++i) sum[i] += a[i];
  }

  static void recurrence_forward(std::int64_t d, const A* TESSERA_RESTRICT v, const A* TESSERA_RESTRICT previous,
                                 const A* TESSERA_RESTRICT z, const A* TESSERA_RESTRICT keep,
                                 const A* TESSERA_RESTRICT g, A* TESSERA_RESTRICT f, A* TESSERA_RESTRICT h,
                                 A* TESSERA_RESTRICT open, A* TESSERA_RESTRICT out) {
    for (std::int64_t i = 0; i < d; ++i) {
      f[i] = sigmoid(z[i] + keep[i]);
      h[i] = v[i] + f[i] * (previous[i] - v[i]);
      open[i] = sigmoid(g[i]);
      out[i] = h[i] * g[i] * open[i];
    }
  }

  static void recurrence_backward(std::int64_t d, const A* TESSERA_RESTRICT v, const A* TESSERA_RESTRICT previous,
                                  const A* TESSERA_RESTRICT f, const A* TESSERA_RESTRICT h,
                                  const A* TESSERA_RESTRICT open, const A* TESSERA_RESTRICT g,
                                  const A* TESSERA_RESTRICT dout, A* TESSERA_RESTRICT dcarry, A* TESSERA_RESTRICT dv,
                                  A* TESSERA_RESTRICT dz, A* TESSERA_RESTRICT dg) {
    for (std::int64_t i = 0; i < d; ++i) {
      const A dh = dout[i] * g[i] * open[i] + dcarry[i];
      dg[i] = dout[i] * h[i] * open[i] * (A(1) + g[i] * (A(1) - open[i]));
      dz[i] = dh * (previous[i] - v[i]) * f[i] * (A(1) - f[i]);
      dv[i] = (A(1) - f[i]) * dh;
      dcarry[i] = f[i] * dh;
    }
  }

  std::int64_t d_, width_;
  std::int64_t in_, out_, taps_, shift_, keep_;  // offsets of the parameters
  std::vector<A> projected_, mixed_, kept_, hidden_, gate_, gated_, before_;
  std::vector<A> dgated_, dmixed_, dprojected_, dcarry_;
};

}  // namespace train_lm
