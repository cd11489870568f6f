// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Host half of `experts`.

#include <cstddef>
#include <span>

#include <tessera/experts/detail/row_loops.hpp>
#include <tessera/experts/expert_mlp.hpp>

TESSERA_NAMESPACE_BEGIN
namespace detail {

/// Checks a host list of rows. @param bound Rows that the buffers hold. @param sources Rows that may be gathered.
/// @return P, the number of rows.
inline std::int64_t expect_rows(const expert_rows& rows, std::int64_t bound, std::int64_t sources, const char* source) {
  TESSERA_EXPECTS(rows.num_local_experts >= 0,
                  "the expert rows have " << rows.num_local_experts << " groups, at least 0 are needed");
  TESSERA_EXPECTS(rows.row_offsets != nullptr, "the expert rows have no row_offsets");
  TESSERA_EXPECTS(rows.row_offsets[0] == 0, "row_offsets[0] is " << rows.row_offsets[0] << ", it must be 0");
  for (std::int32_t e = 0; e < rows.num_local_experts; ++e)
    TESSERA_EXPECTS(rows.row_offsets[e] <= rows.row_offsets[e + 1],
                    "row_offsets[" << e + 1 << "] is " << rows.row_offsets[e + 1] << ", less than row_offsets[" << e
                                   << "] = " << rows.row_offsets[e]);
  const std::int64_t num_rows = rows.row_offsets[rows.num_local_experts];
  TESSERA_EXPECTS(num_rows <= bound,
                  "there are " << num_rows << " expert rows, but the saved activations hold " << bound);
  if (rows.gather == nullptr) {
    TESSERA_EXPECTS(num_rows <= sources, "there are " << num_rows << " expert rows and no gather list, but " << source
                                                      << " has " << sources << " rows");
  } else {
    for (std::int64_t i = 0; i < num_rows; ++i)
      TESSERA_EXPECTS(rows.gather[i] >= 0 && rows.gather[i] < sources, "gather[" << i << "] is " << rows.gather[i]
                                                                                 << ", but " << source << " has "
                                                                                 << sources << " rows");
  }
  return num_rows;
}

/// Checks that the rows are of as many experts as there are weights.
inline void expect_experts(const expert_rows& rows, int num_local_experts) {
  TESSERA_EXPECTS(rows.num_local_experts == num_local_experts, "the expert rows are of " << rows.num_local_experts
                                                                                         << " experts, this object has "
                                                                                         << num_local_experts);
}

/// A matrix of any element type: the checks are compiled once, not for each instantiation of the experts.
struct any_matrix {
  const void* data;
  std::int64_t rows, cols, stride;
  std::size_t alignment;

  template <class T>
  any_matrix(const matrix_view<T>& m)  // NOLINT: meant to be implicit
      : data(m.data), rows(m.rows), cols(m.cols), stride(m.stride), alignment(alignof(T)) {}
};

/// Checks that `m` is `[>= num_rows, cols]`, there, and aligned; nothing where no row is needed.
inline void expect_capacity(const any_matrix& m, std::int64_t num_rows, std::int64_t cols, const char* name) {
  if (num_rows == 0) return;
  TESSERA_EXPECTS(m.rows >= num_rows && m.cols == cols, name << " is [" << m.rows << ", " << m.cols << "], at least ["
                                                             << num_rows << ", " << cols << "] is needed");
  TESSERA_EXPECTS(m.rows == 1 || m.stride >= m.cols,
                  name << " has row stride " << m.stride << ", at least " << m.cols << " is needed");
  TESSERA_EXPECTS(m.data != nullptr && reinterpret_cast<std::uintptr_t>(m.data) % m.alignment == 0,
                  name << " starts at " << m.data << ", an address aligned to " << m.alignment << " bytes is needed");
}

/// Checks that weights or gradients are those of `sizes`: there, no expert in another one's matrix, and no biases that
/// nobody would read or write. @param width Outputs U of the up-projection. @param what How the message calls them.
inline void expect_weights(const expert_weights<const void>& w, std::int32_t num_groups, const expert_dims& sizes,
                           std::int64_t width, const char* what) {
  if (num_groups == 0) return;
  TESSERA_EXPECTS(w.up != nullptr && w.down != nullptr,
                  what << " are missing: up is " << w.up << ", down is " << w.down);
  TESSERA_EXPECTS(
      !sizes.bias || (w.up_bias != nullptr && w.down_bias != nullptr),
      what << " have biases by their dims, but up_bias is " << w.up_bias << " and down_bias is " << w.down_bias);
  TESSERA_EXPECTS(
      sizes.bias || (w.up_bias == nullptr && w.down_bias == nullptr),
      what << " have no biases by their dims, but up_bias is " << w.up_bias << " and down_bias is " << w.down_bias);
  const auto expect_stride = [&](std::int64_t stride, std::int64_t packed, const char* name) {
    TESSERA_EXPECTS(num_groups == 1 || stride == 0 || stride >= packed,
                    what << " have " << name << " = " << stride << ", it must be 0 or at least " << packed);
  };
  expect_stride(w.up_stride, width * sizes.hidden, "up_stride");
  expect_stride(w.down_stride, std::int64_t{sizes.hidden} * sizes.intermediate, "down_stride");
}
template <class S>
expert_weights<const void> untyped(const expert_weights<S>& w) {
  return {w.up, w.down, w.up_bias, w.down_bias, w.up_stride, w.down_stride};
}

/// The same matrices, with rows and columns exchanged.
template <class T>
gemm::group_operand<T> transposed(const gemm::group_operand<T>& m) {
  return {m.data, m.group_stride, m.col_stride, m.row_stride};
}

inline std::span<const std::int32_t> offsets_of(const expert_rows& rows) {
  return {rows.row_offsets, static_cast<std::size_t>(rows.num_local_experts) + 1};
}

/// `c(g, m, n) (=|+=) sum_i a[i][m] b[i][n]`, with the operands in the order that lets `c` be written contiguously.
/// The bits are the same in both orders.
template <class Gemm, class A, class TA, class TB, class TC>
void grouped_outer(const expert_rows& groups, std::int64_t M, std::int64_t N, gemm::row_operand<TA> a,
                   gemm::row_operand<TB> b, gemm::group_operand<TC> c, write mode) {
  if (c.col_stride == 1)
    Gemm::template variable_k<A>(offsets_of(groups), M, N, a, b, c, mode);
  else
    Gemm::template variable_k<A>(offsets_of(groups), N, M, b, a, transposed(c), mode);
}

}  // namespace detail

template <class Activation, class Precision, class WeightLayout, class Gemm>
experts<Activation, Precision, WeightLayout, Gemm>::experts(const expert_dims& sizes, const options& activation_options)
    : dims_(sizes), options_(activation_options) {
  TESSERA_EXPECTS(sizes.num_local_experts >= 0 && sizes.hidden > 0 && sizes.intermediate > 0,
                  "experts need num_local_experts >= 0, hidden > 0 and intermediate > 0; got "
                      << sizes.num_local_experts << ", " << sizes.hidden << " and " << sizes.intermediate);
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
auto experts<Activation, Precision, WeightLayout, Gemm>::carve_saved(memory_builder& memory,
                                                                     std::int64_t max_pairs) const -> saved_view {
  return {{memory.take<storage>("experts.h", max_pairs * up_width()), max_pairs, up_width()}};
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
auto experts<Activation, Precision, WeightLayout, Gemm>::carve_deferred(memory_builder& memory,
                                                                        std::int64_t max_pairs) const -> deferred_view {
  const std::int64_t n = dims_.intermediate;
  return {{memory.take<storage>("experts.activation", max_pairs * n), max_pairs, n}};
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
auto experts<Activation, Precision, WeightLayout, Gemm>::carve_forward(memory_builder& memory, std::int64_t max_pairs,
                                                                       weight_on applied) const -> forward_scratch {
  const std::int64_t n = dims_.intermediate, d = dims_.hidden;
  const std::int64_t inputs = applied == weight_on::input ? max_pairs : 0;
  forward_scratch scratch;
  scratch.activation = {memory.take<storage>("experts.activation", max_pairs * n), max_pairs, n};
  scratch.input = {memory.take<storage>("experts.weighted_input", inputs * d), inputs, d};
  return scratch;
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
template <class Space>
auto experts<Activation, Precision, WeightLayout, Gemm>::carve_backward_input(memory_builder& memory,
                                                                              std::int64_t max_pairs,
                                                                              weight_on applied) const
    -> backward_input_scratch {
  const std::int64_t n = dims_.intermediate, d = dims_.hidden;
  const std::int64_t inputs = applied == weight_on::input ? max_pairs : 0;
  backward_input_scratch scratch;
  // The device half keeps dY W2 in registers and stores parts of its products with the activation.
  const std::int64_t parts = (n + 127) / 128;
  const std::int64_t rows = std::is_same_v<Space, space::device> ? parts : max_pairs;
  const std::int64_t columns = std::is_same_v<Space, space::device> ? max_pairs : n;
  scratch.dactivation = {memory.take<accumulate>("experts.dactivation", rows * columns), rows, columns};
  scratch.dinput = {memory.take<accumulate>("experts.dinput", inputs * d), inputs, d};
  return scratch;
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
auto experts<Activation, Precision, WeightLayout, Gemm>::carve_backward_weights(memory_builder& memory,
                                                                                std::int64_t max_pairs,
                                                                                weight_on applied) const
    -> backward_weights_scratch {
  const std::int64_t inputs = applied == weight_on::input ? max_pairs : 0;
  return {{memory.take<storage>("experts.weighted_input", inputs * dims_.hidden), inputs, dims_.hidden}};
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
void experts<Activation, Precision, WeightLayout, Gemm>::forward(host_stream, const expert_rows& rows,
                                                                 matrix_view<const storage> x,
                                                                 pair_weights<accumulate> weighting, const weights& w,
                                                                 const saved_view& saved, matrix_view<storage> y,
                                                                 const forward_scratch& scratch) const {
  using backend = gemm::host_backend<Gemm>;
  const std::int64_t d = dims_.hidden, n = dims_.intermediate, U = up_width();
  const bool weighted_input = weighting.applied == weight_on::input && weighting.values != nullptr;
  TESSERA_EXPECTS(
      rows.num_local_experts == dims_.num_local_experts,
      "the expert rows are of " << rows.num_local_experts << " experts, this object has " << dims_.num_local_experts);
  const std::int64_t P = detail::expect_rows(rows, saved.h.rows, x.rows, "x");
  detail::expect_capacity(x, P == 0 ? 0 : 1, d, "x");
  detail::expect_capacity(saved.h, P, U, "the saved h");
  detail::expect_capacity(y, P, d, "y");
  detail::expect_capacity(scratch.activation, P, n, "the activation scratch");
  if (weighted_input) detail::expect_capacity(scratch.input, P, d, "the weighted input scratch");
  detail::expect_weights(detail::untyped(w), rows.num_local_experts, dims_, U, "the experts' weights");
  if (P == 0) return;
  expect_disjoint(x, "x", y, "y");
  expect_disjoint(x, "x", saved.h, "the saved h");

  gemm::row_operand<storage> input{x.data, x.stride, rows.gather};
  if (weighted_input) {
    detail::weight_rows(P, input, weighting.values, scratch.input);
    input = {scratch.input.data, scratch.input.stride, nullptr};
  }
  backend::template variable_m<accumulate>(detail::offsets_of(rows), U, d, input,
                                           WeightLayout::up(w.up, U, d, w.up_stride), dims_.bias ? w.up_bias : nullptr,
                                           saved.h);
  detail::activate_rows<Activation, WeightLayout, accumulate>(P, n, saved.h, options_, scratch.activation);
  backend::template variable_m<accumulate>(
      detail::offsets_of(rows), d, n,
      gemm::row_operand<storage>{scratch.activation.data, scratch.activation.stride, nullptr},
      WeightLayout::down(w.down, d, n, w.down_stride), dims_.bias ? w.down_bias : nullptr, y);
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
void experts<Activation, Precision, WeightLayout, Gemm>::backward_input(
    host_stream, const expert_rows& rows, matrix_view<const storage> x, matrix_view<const storage> dy,
    pair_weights<accumulate> weighting, const weights& w, const saved_view& saved, const deferred_view& deferred,
    matrix_view<storage> dx, accumulate* dpair_weights, const backward_input_scratch& scratch) const {
  using backend = gemm::host_backend<Gemm>;
  const std::int64_t d = dims_.hidden, n = dims_.intermediate, U = up_width();
  const bool on_input = weighting.applied == weight_on::input;
  TESSERA_EXPECTS(
      rows.num_local_experts == dims_.num_local_experts,
      "the expert rows are of " << rows.num_local_experts << " experts, this object has " << dims_.num_local_experts);
  const std::int64_t P = detail::expect_rows(rows, saved.h.rows, dy.rows, "dy");
  detail::expect_capacity(dy, P == 0 ? 0 : 1, d, "dy");
  detail::expect_capacity(saved.h, P, U, "the saved h");
  detail::expect_capacity(deferred.activation, P, n, "the deferred activation");
  detail::expect_capacity(dx, P, d, "dx");
  detail::expect_capacity(scratch.dactivation, P, n, "the dactivation scratch");
  if (on_input) {
    detail::expect_rows(rows, saved.h.rows, x.rows, "x");
    detail::expect_capacity(x, P == 0 ? 0 : 1, d, "x");
    detail::expect_capacity(scratch.dinput, P, d, "the dinput scratch");
  }
  detail::expect_weights(detail::untyped(w), rows.num_local_experts, dims_, U, "the experts' weights");
  if (P == 0) return;
  expect_disjoint(dy, "dy", dx, "dx");
  expect_disjoint(dy, "dy", saved.h, "the saved h");
  if (on_input) expect_disjoint(x, "x", dx, "dx");

  const gemm::row_operand<storage> dy_rows{dy.data, dy.stride, rows.gather};
  backend::template variable_m<accumulate>(detail::offsets_of(rows), n, d, dy_rows,
                                           detail::transposed(WeightLayout::down(w.down, d, n, w.down_stride)), nullptr,
                                           scratch.dactivation);
  detail::activation_backward_rows<Activation, WeightLayout>(
      P, n, on_input ? nullptr : weighting.values, matrix_view<const accumulate>(scratch.dactivation), saved.h,
      options_, deferred.activation, on_input ? nullptr : dpair_weights);
  if (!on_input && dpair_weights != nullptr && dims_.bias)
    for (std::int32_t e = 0; e < rows.num_local_experts; ++e)
      for (std::int64_t i = rows.row_offsets[e]; i < rows.row_offsets[e + 1]; ++i)
        dpair_weights[i] += detail::dot<accumulate>(dy_rows.row(i), w.down_bias + e * d, d);

  const gemm::row_operand<storage> dh{saved.h.data, saved.h.stride, nullptr};
  const auto up_t = detail::transposed(WeightLayout::up(w.up, U, d, w.up_stride));
  if (on_input) {
    backend::template variable_m<accumulate>(detail::offsets_of(rows), d, U, dh, up_t, nullptr, scratch.dinput);
    detail::weighted_input_backward_rows(P, gemm::row_operand<storage>{x.data, x.stride, rows.gather}, weighting.values,
                                         matrix_view<const accumulate>(scratch.dinput), dx, dpair_weights);
  } else {
    backend::template variable_m<accumulate>(detail::offsets_of(rows), d, U, dh, up_t, nullptr, dx);
  }
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
void experts<Activation, Precision, WeightLayout, Gemm>::backward_weights(
    host_stream, const expert_rows& groups, matrix_view<const storage> x, matrix_view<const storage> dy,
    pair_weights<accumulate> weighting, const saved_view& saved, const deferred_view& deferred, const gradients& g,
    write mode, const backward_weights_scratch& scratch) const {
  using backend = gemm::host_backend<Gemm>;
  const std::int64_t d = dims_.hidden, n = dims_.intermediate, U = up_width();
  const bool weighted_input = weighting.applied == weight_on::input && weighting.values != nullptr;
  const std::int64_t P = detail::expect_rows(groups, saved.h.rows, x.rows, "x");
  detail::expect_rows(groups, saved.h.rows, dy.rows, "dy");
  detail::expect_capacity(x, P == 0 ? 0 : 1, d, "x");
  detail::expect_capacity(dy, P == 0 ? 0 : 1, d, "dy");
  detail::expect_capacity(saved.h, P, U, "the saved h");
  detail::expect_capacity(deferred.activation, P, n, "the deferred activation");
  if (weighted_input) detail::expect_capacity(scratch.input, P, d, "the weighted input scratch");
  detail::expect_weights(detail::untyped(g), groups.num_local_experts, dims_, U, "the experts' gradients");

  gemm::row_operand<storage> input{x.data, x.stride, groups.gather};
  if (weighted_input) {
    detail::weight_rows(P, input, weighting.values, scratch.input);
    input = {scratch.input.data, scratch.input.stride, nullptr};
  }
  const gemm::row_operand<storage> dy_rows{dy.data, dy.stride, groups.gather};
  const gemm::row_operand<storage> dh{saved.h.data, saved.h.stride, nullptr};
  const gemm::row_operand<storage> act{deferred.activation.data, deferred.activation.stride, nullptr};
  detail::grouped_outer<backend, accumulate>(groups, U, d, dh, input, WeightLayout::up(g.up, U, d, g.up_stride), mode);
  detail::grouped_outer<backend, accumulate>(groups, d, n, dy_rows, act,
                                             WeightLayout::down(g.down, d, n, g.down_stride), mode);
  if (!dims_.bias) return;
  const accumulate* output_weights = weighting.applied == weight_on::output ? weighting.values : nullptr;
  detail::sum_rows<accumulate>(groups, U, dh, static_cast<const accumulate*>(nullptr), g.up_bias, mode);
  detail::sum_rows<accumulate>(groups, d, dy_rows, output_weights, g.down_bias, mode);
}

TESSERA_NAMESPACE_END
