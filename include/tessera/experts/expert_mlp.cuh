// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of the experts: two grouped products forward (up, with the activation, and down), four backward (dH,
/// with the activation's gradient, dX, dW2 and dW1), in bf16, on the backend that the policy `Gemm` stands for
/// (`gemm/automatic.hpp`): compute capability 8.0 or later.
///
/// Sizes d and n are multiples of 8; weights and rows start at multiples of 16 bytes. `P` is the last row offset, read
/// on the device; buffers of `max_pairs` rows bound it.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <tessera/experts/detail/device/row_kernels.cuh>
#include <tessera/experts/expert_mlp.hpp>
#include <tessera/gemm/automatic.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// What a weight layout means for the kernels: which index is contiguous, and where gates stand.
template <class WeightLayout>
struct device_layout {
  static constexpr bool out_in = WeightLayout::template up<const bfloat16>(nullptr, 2, 3, 0).col_stride == 1;
  static constexpr bool interleaved = WeightLayout::gate_column(1, 3) == 2;
  // As weights are used, and with inputs and outputs exchanged.
  static constexpr auto forward = out_in ? gemm::hopper::contiguous::k : gemm::hopper::contiguous::mn;
  static constexpr auto backward = out_in ? gemm::hopper::contiguous::mn : gemm::hopper::contiguous::k;
};

template <class Precision>
constexpr bool device_precision() {
  return std::is_same_v<typename Precision::storage, bfloat16> &&
         std::is_same_v<typename Precision::accumulate, float> && !std::is_same_v<typename Precision::gradient, double>;
}

// What the type of rows and weights says of a call. A type that says nothing allows everything.
template <class Rows>
inline constexpr bool may_be_listed = !std::is_same_v<Rows, rows_in_place>;
template <class Rows>
inline constexpr bool may_be_in_place = !std::is_same_v<Rows, listed_rows>;
template <class Weighting, class A>
inline constexpr bool may_weigh_inputs = !std::is_same_v<Weighting, output_weights<A>>;

// Where products with the inputs find them: weighted inputs are packed.
template <class Rows, class Weighting, class A>
using input_rows = std::conditional_t<may_weigh_inputs<Weighting, A>, expert_rows, Rows>;

template <class A, class Weighting>
bool on_input(const Weighting& weighting) {
  return may_weigh_inputs<Weighting, A> && weighting.values != nullptr && weighting.applied == weight_on::input;
}

// The list of rows. Those of `listed_rows` have one even where there are no rows: an address that nobody reads.
template <class Rows>
const std::int32_t* list_of(const Rows& rows) {
  if constexpr (!may_be_in_place<Rows>) return rows.gather != nullptr ? rows.gather : rows.row_offsets;
  return may_be_listed<Rows> ? rows.gather : nullptr;
}

// Calls `f` with gathered::a or gathered::none, as there is a list or not, of these what `Rows` allows.
template <class Rows, class F>
void with_source([[maybe_unused]] const std::int32_t* list, F&& f) {
  using gemm::hopper::gathered;
  if constexpr (may_be_listed<Rows>) {
    if (!may_be_in_place<Rows> || list != nullptr) return f(std::integral_constant<gathered, gathered::a>{});
  }
  if constexpr (may_be_in_place<Rows>) f(std::integral_constant<gathered, gathered::none>{});
}

// Rows that products may touch. Tiles reach past the last row of a group; where rows are read in place, in an array
// that has fewer rows than there is room for, they must not reach past its end.
inline std::int64_t rows_in_reach(const expert_rows& rows, std::int64_t source_rows, std::int64_t max_rows) {
  return rows.gather == nullptr && source_rows > 0 ? std::min(source_rows, max_rows) : max_rows;
}

// `c(g, m, n) (=|+=) sum_i rows[source of i][m] * packed[i][n]`, where the gathered operand may have to be the second
// one, because the kernel writes rows of c.
template <class Rows, class TC, class Products>
void grouped_outer_product(device_stream stream, const Products& products, const expert_rows& groups,
                           std::int64_t max_rows, std::int64_t M, std::int64_t N, gemm::row_operand<bfloat16> source,
                           gemm::row_operand<bfloat16> packed, gemm::group_operand<TC> c, write mode) {
  using gemm::hopper::gathered;
  const gemm::hopper::row_groups rows{groups.row_offsets, groups.num_local_experts, max_rows};
  with_source<Rows>(source.gather, [&](auto which) {
    static constexpr gathered first = decltype(which)::value;
    static constexpr gathered second = first == gathered::a ? gathered::b : gathered::none;
    if (c.col_stride == 1)
      products.template variable_k<first, TC>(stream, rows, M, N, source, packed, c, mode);
    else
      products.template variable_k<second, TC>(stream, rows, N, M, packed, source, transposed(c), mode);
  });
}

}  // namespace detail

template <class Activation, class Precision, class WeightLayout, class Gemm>
template <class Rows, class Weighting>
requires std::derived_from<Rows, expert_rows> &&
    std::derived_from<Weighting, pair_weights<typename Precision::accumulate>>
void experts<Activation, Precision, WeightLayout, Gemm>::forward(device_stream stream, const Rows& rows,
                                                                 matrix_view<const storage> x,
                                                                 const Weighting& weighting, const weights& w,
                                                                 const saved_view& saved, matrix_view<storage> y,
                                                                 const forward_scratch& scratch) const {
  static_assert(detail::device_precision<Precision>(),
                "experts: the device half computes in bf16 with fp32 sums: use precision::bf16 or "
                "precision::bf16_gradients, or the host half");
  detail::expect_weights(detail::untyped(w), rows.num_local_experts, dims_, up_width(), "the experts' weights");
  using layout = detail::device_layout<WeightLayout>;
  using gemm::hopper::gathered;
  const auto products = detail::device_products<Gemm>(scratch.tile_counter).beside(scratch.share.shares);
  const auto first = products.limited(scratch.share.first_sms);
  const std::int64_t d = dims_.hidden, n = dims_.intermediate;
  const gemm::hopper::row_groups groups{rows.row_offsets, rows.num_local_experts,
                                        detail::rows_in_reach(rows, x.rows, saved.h.rows)};
  const auto up = WeightLayout::up(w.up, up_width(), d, w.up_stride);
  const auto down = WeightLayout::down(w.down, d, n, w.down_stride);
  gemm::row_operand<bfloat16> a{x.data, x.stride, detail::list_of(rows)};
  if constexpr (detail::may_weigh_inputs<Weighting, accumulate>) {
    if (detail::on_input<accumulate>(weighting)) {
      detail::weigh_rows<storage>(stream, rows, weighting.values, x, saved.h.rows, scratch.input);
      a = {scratch.input.data, scratch.input.stride, nullptr};
    }
  }
  const gemm::row_operand<bfloat16> act{scratch.activation.data, scratch.activation.stride, nullptr};
  detail::with_source<detail::input_rows<Rows, Weighting, accumulate>>(a.gather, [&](auto which) {
    first.template variable_m_activation<layout::forward, decltype(which)::value, Activation, layout::interleaved>(
        stream, groups, n, d, a, up, w.up_bias, saved.h, scratch.activation, options_);
  });
  products.template variable_m<layout::forward, gathered::none, storage>(stream, groups, d, n, act, down, w.down_bias,
                                                                         y);
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
template <class Rows, class Weighting>
requires std::derived_from<Rows, expert_rows> &&
    std::derived_from<Weighting, pair_weights<typename Precision::accumulate>>
void experts<Activation, Precision, WeightLayout, Gemm>::backward_input(
    device_stream stream, const Rows& rows, matrix_view<const storage> x, matrix_view<const storage> dy,
    const Weighting& weighting, const weights& w, const saved_view& saved, const deferred_view& deferred,
    matrix_view<storage> dx, accumulate* dpair_weights, const backward_input_scratch& scratch) const {
  static_assert(detail::device_precision<Precision>(), "experts: the device half computes in bf16 with fp32 sums");
  detail::expect_weights(detail::untyped(w), rows.num_local_experts, dims_, up_width(), "the experts' weights");
  using layout = detail::device_layout<WeightLayout>;
  using gemm::hopper::gathered;
  const auto products = detail::device_products<Gemm>(scratch.tile_counter).beside(scratch.share.shares);
  const auto first = products.limited(scratch.share.first_sms);
  const std::int64_t d = dims_.hidden, n = dims_.intermediate;
  const std::int64_t max_rows = detail::rows_in_reach(rows, dy.rows, saved.h.rows);
  const gemm::hopper::row_groups groups{rows.row_offsets, rows.num_local_experts, max_rows};
  const auto up = detail::transposed(WeightLayout::up(w.up, up_width(), d, w.up_stride));
  const auto down = detail::transposed(WeightLayout::down(w.down, d, n, w.down_stride));
  const bool on_input = detail::on_input<accumulate>(weighting);
  const bool wants_weights = dpair_weights != nullptr && !on_input;
  // dY W2 stays in registers here, so its scratch is free for the parts of the weights' gradients.
  accumulate* parts = wants_weights ? scratch.dactivation.data : nullptr;
  const gemm::row_operand<bfloat16> doutput{dy.data, dy.stride, detail::list_of(rows)};
  const accumulate* output_weights = on_input ? nullptr : weighting.values;
  detail::with_source<Rows>(doutput.gather, [&](auto which) {
    first.template variable_m_activation_backward<layout::backward, decltype(which)::value, Activation,
                                                  layout::interleaved>(
        stream, groups, n, d, doutput, down, output_weights, saved.h, deferred.activation, parts, options_);
  });
  const unsigned blocks = detail::row_blocks(max_rows);
  if (wants_weights) {
    gemm::hopper::sum_weight_parts(stream, groups, gemm::hopper::num_weight_parts(n), parts, dpair_weights);
    if (w.down_bias != nullptr) {
      detail::add_bias_products_kernel<storage>
          <<<blocks, detail::row_kernel_threads, 0, stream.get()>>>(rows, dy, w.down_bias, dpair_weights);
      detail::expect_launched("add_bias_products_kernel");
    }
  }
  const gemm::row_operand<bfloat16> dh{saved.h.data, saved.h.stride, nullptr};
  if (!on_input) {
    products.template variable_m<layout::backward, gathered::none, storage>(stream, groups, d, up_width(), dh, up,
                                                                            nullptr, dx);
    return;
  }
  if constexpr (detail::may_weigh_inputs<Weighting, accumulate>) {
    products.template variable_m<layout::backward, gathered::none, accumulate>(stream, groups, d, up_width(), dh, up,
                                                                               nullptr, scratch.dinput);
    detail::unweigh_rows_kernel<storage><<<blocks, detail::row_kernel_threads, 0, stream.get()>>>(
        rows, weighting.values, x, matrix_view<const accumulate>(scratch.dinput), dx, dpair_weights);
    detail::expect_launched("unweigh_rows_kernel");
  }
}

template <class Activation, class Precision, class WeightLayout, class Gemm>
template <class Rows, class Weighting>
requires std::derived_from<Rows, expert_rows> &&
    std::derived_from<Weighting, pair_weights<typename Precision::accumulate>>
void experts<Activation, Precision, WeightLayout, Gemm>::backward_weights(
    device_stream stream, const Rows& groups, matrix_view<const storage> x, matrix_view<const storage> dy,
    const Weighting& weighting, const saved_view& saved, const deferred_view& deferred, const gradients& g, write mode,
    const backward_weights_scratch& scratch) const {
  static_assert(detail::device_precision<Precision>(), "experts: the device half computes in bf16 with fp32 sums");
  detail::expect_weights(detail::untyped(g), groups.num_local_experts, dims_, up_width(), "the experts' gradients");
  const auto products = detail::device_products<Gemm>(scratch.tile_counter).beside(scratch.share.shares);
  const auto first = products.limited(scratch.share.first_sms);
  const std::int64_t d = dims_.hidden, n = dims_.intermediate;
  const std::int64_t max_rows = detail::rows_in_reach(groups, dy.rows, saved.h.rows);
  const bool on_input = detail::on_input<accumulate>(weighting);
  const bool accumulates = mode == write::accumulate;
  const gemm::row_operand<bfloat16> act{deferred.activation.data, deferred.activation.stride, nullptr};
  const gemm::row_operand<bfloat16> dh{saved.h.data, saved.h.stride, nullptr};
  const gemm::row_operand<bfloat16> doutput{dy.data, dy.stride, detail::list_of(groups)};
  detail::grouped_outer_product<Rows, gradient>(stream, first, groups, max_rows, d, n, doutput, act,
                                                WeightLayout::down(g.down, d, n, g.down_stride), mode);
  gemm::row_operand<bfloat16> inputs{x.data, x.stride, detail::list_of(groups)};
  if constexpr (detail::may_weigh_inputs<Weighting, accumulate>) {
    if (on_input) {
      detail::weigh_rows<storage>(stream, groups, weighting.values, x, max_rows, scratch.input);
      inputs = {scratch.input.data, scratch.input.stride, nullptr};
    }
  }
  // The inputs are the operand that may be gathered, so the product is formed as [d, U] and written as [U, d].
  detail::grouped_outer_product<detail::input_rows<Rows, Weighting, accumulate>, gradient>(
      stream, products, groups, max_rows, d, up_width(), inputs, dh,
      detail::transposed(WeightLayout::up(g.up, up_width(), d, g.up_stride)), mode);
  if (g.down_bias == nullptr) return;
  detail::sum_columns<storage, gradient>(stream, groups, on_input ? nullptr : weighting.values, dy, g.down_bias,
                                         accumulates);
  expert_rows packed = groups;
  packed.gather = nullptr;
  detail::sum_columns<storage, gradient>(stream, packed, nullptr, matrix_view<const storage>(saved.h), g.up_bias,
                                         accumulates);
}

TESSERA_NAMESPACE_END
