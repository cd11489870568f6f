// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What the host experts do with rows between the matrix products. All loops run over blocks of constant length in
/// local arrays: compilers vectorise them, and an element passes through the same instructions whatever row it is in.

#include <cstdint>
#include <type_traits>

#include <tessera/core/dtype.hpp>
#include <tessera/core/expert_rows.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/operands.hpp>

TESSERA_NAMESPACE_BEGIN
namespace detail {

/// Elements of a row that are worked on at a time.
inline constexpr int row_block = 64;

/// Rounds a sum to the element of activations.
template <class S, class A>
constexpr S to_storage(A value) {
  if constexpr (std::is_same_v<S, bfloat16>)
    return bfloat16(static_cast<float>(value));
  else
    return static_cast<S>(value);
}

/// Calls `body(first, count)` for the blocks of a row of `n` elements; `count` is a constant but for the last.
template <class Body>
inline void for_each_block(std::int64_t n, Body&& body) {
  std::int64_t first = 0;
  for (; first + row_block <= n; first += row_block) body(first, std::integral_constant<int, row_block>{});
  if (first < n) body(first, static_cast<int>(n - first));
}

/// A sum of products in `lanes` interleaved partial sums, which vectorises without reordering anything.
template <class A>
struct lane_sum {
  static constexpr int lanes = 16;
  A partial[lanes] = {};

  /// Adds a block's products.
  void add(const A (&a)[row_block], const A (&b)[row_block]) {
    for (int q = 0; q < row_block; q += lanes)
      for (int l = 0; l < lanes; ++l) partial[l] += a[q + l] * b[q + l];
  }
  /// The sum, halves added pairwise.
  A total() const {
    A sums[lanes];
    for (int l = 0; l < lanes; ++l) sums[l] = partial[l];
    for (int width = lanes / 2; width > 0; width /= 2)
      for (int l = 0; l < width; ++l) sums[l] += sums[l + width];
    return sums[0];
  }
};

/// `out[j] = source[first + j]`, zero from `count` on.
template <class A, class S, class Count>
inline void load_block(const S* source, std::int64_t first, Count count, A (&out)[row_block]) {
  if constexpr (!std::is_same_v<Count, int>) {
    for (int j = 0; j < row_block; ++j) out[j] = static_cast<A>(source[first + j]);
  } else {
    for (int j = 0; j < row_block; ++j) out[j] = A(0);
    for (int j = 0; j < count; ++j) out[j] = static_cast<A>(source[first + j]);
  }
}

/// `<a, b>` of `n` elements.
template <class A, class TA, class TB>
A dot(const TA* a, const TB* b, std::int64_t n) {
  lane_sum<A> sum;
  for_each_block(n, [&](std::int64_t first, auto count) {
    A a_block[row_block], b_block[row_block];
    load_block(a, first, count, a_block);
    load_block(b, first, count, b_block);
    sum.add(a_block, b_block);
  });
  return sum.total();
}

/// Gate and up values of a block, or the values of a plain activation in `gate`.
template <class Activation, class WeightLayout, class A, class S, class Count>
inline void load_h(const S* h, std::int64_t n, std::int64_t first, Count count, A (&gate)[row_block],
                   A (&up)[row_block]) {
  if constexpr (std::is_same_v<Count, int>)
    for (int j = 0; j < row_block; ++j) gate[j] = up[j] = A(0);
  for (int j = 0; j < count; ++j) {
    if constexpr (Activation::gated) {
      gate[j] = static_cast<A>(h[WeightLayout::gate_column(first + j, n)]);
      up[j] = static_cast<A>(h[WeightLayout::up_column(first + j, n)]);
    } else {
      gate[j] = static_cast<A>(h[first + j]);
    }
  }
}

/// `result = act(h)` of a block.
template <class Activation, class A>
inline void activate_block(const A (&gate)[row_block], const A (&up)[row_block],
                           const typename Activation::options& options, A (&result)[row_block]) {
  for (int j = 0; j < row_block; ++j) {
    if constexpr (Activation::gated)
      result[j] = Activation::forward(gate[j], up[j], options);
    else
      result[j] = Activation::forward(gate[j], options);
  }
}

/// `activation[i] = act(h[i])` of `num_rows` rows of `n` outputs.
template <class Activation, class WeightLayout, class A, class S>
void activate_rows(std::int64_t num_rows, std::int64_t n, matrix_view<S> h, const typename Activation::options& options,
                   matrix_view<S> activation) {
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const S* h_row = h.row(i);
    S* out = activation.row(i);
    for_each_block(n, [&](std::int64_t first, auto count) {
      A gate[row_block], up[row_block], result[row_block];
      load_h<Activation, WeightLayout>(h_row, n, first, count, gate, up);
      activate_block<Activation>(gate, up, options, result);
      for (int j = 0; j < count; ++j) out[first + j] = to_storage<S>(result[j]);
    });
  }
}

/// Backward through the activation, with `w = weights ? weights[i] : 1`:
/// `activation[i] = w * act(h[i])`, `dweights[i] = <dactivation[i], act(h[i])>` with the activation as forward rounded
/// it, and `h[i]` becomes `w * act'(h[i]) dactivation[i]`. `dweights` may be null.
template <class Activation, class WeightLayout, class S, class A>
void activation_backward_rows(std::int64_t num_rows, std::int64_t n, const A* weights, matrix_view<const A> dactivation,
                              matrix_view<S> h, const typename Activation::options& options, matrix_view<S> activation,
                              A* dweights) {
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const A weight = weights == nullptr ? A(1) : weights[i];
    const A* d_row = dactivation.row(i);
    S* h_row = h.row(i);
    S* out = activation.row(i);
    lane_sum<A> dweight;
    for_each_block(n, [&](std::int64_t first, auto count) {
      A gate[row_block], up[row_block], d[row_block], act[row_block];
      load_h<Activation, WeightLayout>(h_row, n, first, count, gate, up);
      load_block(d_row, first, count, d);
      activate_block<Activation>(gate, up, options, act);
      for (int j = 0; j < count; ++j) out[first + j] = to_storage<S>(weight * act[j]);
      if (dweights != nullptr) {
        A rounded[row_block];
        for (int j = 0; j < row_block; ++j) rounded[j] = static_cast<A>(to_storage<S>(act[j]));
        for (int j = count; j < row_block; ++j) rounded[j] = A(0);  // an activation of 0 need not be finite
        dweight.add(d, rounded);
      }
      [[maybe_unused]] A dgate[row_block], dup[row_block];
      for (int j = 0; j < row_block; ++j) {
        if constexpr (Activation::gated)
          Activation::backward(gate[j], up[j], weight * d[j], dgate[j], dup[j], options);
        else
          dgate[j] = Activation::backward(gate[j], weight * d[j], options);
      }
      for (int j = 0; j < count; ++j) {
        if constexpr (Activation::gated) {
          h_row[WeightLayout::gate_column(first + j, n)] = to_storage<S>(dgate[j]);
          h_row[WeightLayout::up_column(first + j, n)] = to_storage<S>(dup[j]);
        } else {
          h_row[first + j] = to_storage<S>(dgate[j]);
        }
      }
    });
    if (dweights != nullptr) dweights[i] = dweight.total();
  }
}

/// `out[i] = weights[i] * x[i]` of `num_rows` rows.
template <class S, class A>
void weight_rows(std::int64_t num_rows, gemm::row_operand<S> x, const A* weights, matrix_view<S> out) {
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const S* source = x.row(i);
    S* target = out.row(i);
    for (std::int64_t j = 0; j < out.cols; ++j) target[j] = to_storage<S>(weights[i] * static_cast<A>(source[j]));
  }
}

/// Backward of `weight_rows`: `dweights[i] = <dinput[i], x[i]>` and `dx[i] = w * dinput[i]`, with
/// `w = weights ? weights[i] : 1`. `dweights` may be null.
template <class S, class A>
void weighted_input_backward_rows(std::int64_t num_rows, gemm::row_operand<S> x, const A* weights,
                                  matrix_view<const A> dinput, matrix_view<S> dx, A* dweights) {
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const A weight = weights == nullptr ? A(1) : weights[i];
    const A* source = dinput.row(i);
    S* target = dx.row(i);
    if (dweights != nullptr) dweights[i] = dot<A>(source, x.row(i), dx.cols);
    for (std::int64_t j = 0; j < dx.cols; ++j) target[j] = to_storage<S>(weight * source[j]);
  }
}

/// `out[g] (=|+=) sum_i w_i * rows[i]` over the rows of group `g` in their order, with `w_i = weights ? weights[i] :
/// 1`; rows of `n` elements, `out` is `[groups, n]` packed.
template <class A, class S, class G>
void sum_rows(const expert_rows& groups, std::int64_t n, gemm::row_operand<S> rows, const A* weights, G* out,
              write mode) {
  for (std::int32_t g = 0; g < groups.num_local_experts; ++g)
    for_each_block(n, [&](std::int64_t first, auto count) {
      A sum[row_block] = {};
      for (std::int64_t i = groups.row_offsets[g]; i < groups.row_offsets[g + 1]; ++i) {
        const A weight = weights == nullptr ? A(1) : weights[i];
        A values[row_block];
        load_block(rows.row(i), first, count, values);
        for (int j = 0; j < row_block; ++j) sum[j] += weight * values[j];
      }
      G* target = out + g * n + first;
      for (int j = 0; j < count; ++j)
        target[j] = to_storage<G>(mode == write::accumulate ? static_cast<A>(target[j]) + sum[j] : sum[j]);
    });
}

}  // namespace detail
TESSERA_NAMESPACE_END
