// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Grouped matrix products in bf16 on any GPU of compute capability 8.0 or later (A100, L40S, RTX 30 and later, H100,
/// B200): what `gemm/hopper.cuh` offers on one, with the same words, the same checks and the same statements, by
/// instructions that all of them have. It is there to be right everywhere; the fast one on 9.0 is `hopper`.
///
/// All calls enqueue one kernel and return; they neither allocate nor synchronise, read row offsets on the device, and
/// may be captured: the grid depends on bounds alone, so a replay is right when offsets and gather lists have changed.
/// Results are the same bits in every run, and those of a row depend on that row and its group's matrix only: sums are
/// in fp32, in ascending order of k, and nothing is summed by atomics. They are not the bits of `hopper`, whose
/// instructions add in another order.
///
/// Columns and lengths of sums are multiples of 8, rows start at multiples of 16 bytes; row counts are arbitrary,
/// groups may be empty, and what lies beyond the last row is neither used nor written.

#include <concepts>
#include <cstdint>

#include <tessera/core/dtype.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/detail/portable/kernel.cuh>
#include <tessera/gemm/hopper.cuh>
#include <tessera/gemm/operands.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm::portable {

using hopper::contiguous;        ///< Which index of B's matrices is contiguous.
using hopper::gathered;          ///< Which operand's rows are read through a gather list.
using hopper::num_weight_parts;  ///< Parts of a pair weight's gradient for a row.
using hopper::row_groups;        ///< Rows sorted by group, in device memory.
using hopper::sum_weight_parts;  ///< Adds up the parts of the pair weights' gradients.

/// What launches need to know of the device: made once, valid while the process lives.
struct device {
  int num_multiprocessors = 0;        ///< Multiprocessors.
  int blocks_per_multiprocessor = 1;  ///< Blocks of the kernel whose operands fit into one's shared memory, 1 or 2.

  /// Of the calling thread's current device.
  /// @throws invalid_argument if its compute capability is below 8.0. @throws cuda_error if the runtime fails.
  static device current();

  static constexpr bool beside_hopper = true;  ///< Whether code for sm_90a, too, has the kernels of its launches.
};

/// How a launch is made.
struct launch_options {
  int sm_budget = 0;  ///< Most multiprocessors to use; 0: all.
};

/// For each group `g` and row `i` of it: `c(i, j) (=|+=) sum_k a.row(i)[k] * b(g, j, k) + bias[g * N + j]`.
/// @tparam Order Order of `b`. @tparam Rows `gathered::a` if `a` has a gather list, else `gathered::none`.
/// @tparam TC bfloat16 or float.
/// @param stream Where. @param d The device. @param groups The rows. @param N Columns of `c`. @param K Length of sums.
/// @param a Rows of `[K]`. @param b `[G]` matrices. @param bias `[G, N]` or null. @param c `[max_rows, N]`.
/// @param mode Whether the old content is added. @param options How the launch is made.
/// @throws invalid_argument if an extent, a stride or an address does not fit; nothing is enqueued then.
template <contiguous Order, gathered Rows, class TC, std::derived_from<device> Device>
void variable_m(device_stream stream, const Device& d, const row_groups& groups, std::int64_t N, std::int64_t K,
                row_operand<bfloat16> a, group_operand<const bfloat16> b, const bfloat16* bias, matrix_view<TC> c,
                write mode = write::overwrite, const launch_options& options = {});

/// The up-projection: `h(i, j)` as `variable_m` computes it, rounded, and `out(i, j) = Activation(h)`.
/// @tparam Order Order of `b`. @tparam Rows `gathered::a` if `a` has a gather list, else `gathered::none`.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gate and up columns are in turn; otherwise all
/// gates come first.
/// @param stream Where. @param d The device. @param groups The rows. @param n Columns of `out`; `h` has as many, twice
/// as many for a gated activation. @param K Length of sums. @param a Rows of `[K]`. @param b `[G]` matrices, `[U, K]`.
/// @param bias `[G, U]` or null. @param h `[max_rows, U]`. @param out `[max_rows, n]`. @param activation Its options.
/// @param options How the launch is made.
/// @throws invalid_argument if an extent, a stride or an address does not fit; nothing is enqueued then.
template <contiguous Order, gathered Rows, class Activation, bool Interleaved, std::derived_from<device> Device>
void variable_m_activation(device_stream stream, const Device& d, const row_groups& groups, std::int64_t n,
                           std::int64_t K, row_operand<bfloat16> a, group_operand<const bfloat16> b,
                           const bfloat16* bias, matrix_view<bfloat16> h, matrix_view<bfloat16> out,
                           const typename Activation::options& activation, const launch_options& options = {});

/// The gradient through the down-projection and the activation: with `dA(i, j) = sum_k a.row(i)[k] * b(g, j, k)` and
/// the row's weight `w`, writes the gradient of `w * dA` with respect to H over `h`, `w * Activation(h)` to `out`, and
/// sums of `dA(i, j) * Activation(h)(i, j)` over 128 columns each to `parts`, which `sum_weight_parts` adds up.
/// @tparam Order Order of `b`. @tparam Rows `gathered::a` if `a` has a gather list, else `gathered::none`.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gate and up columns of `h` are in turn.
/// @param stream Where. @param d The device. @param groups The rows. @param n Columns of `out`. @param K Length of
/// sums.
/// @param a Rows of `[K]`: gradients of the expert's output. @param b `[G]` matrices `[n, K]`: the down-projection.
/// @param weights `[max_rows]`, or null for ones. @param h `[max_rows, U]`. @param out `[max_rows, n]`.
/// @param parts `[num_weight_parts(n), max_rows]`, or null. @param activation Its options.
/// @param options How the launch is made.
/// @throws invalid_argument if an extent, a stride or an address does not fit; nothing is enqueued then.
template <contiguous Order, gathered Rows, class Activation, bool Interleaved, std::derived_from<device> Device>
void variable_m_activation_backward(device_stream stream, const Device& d, const row_groups& groups, std::int64_t n,
                                    std::int64_t K, row_operand<bfloat16> a, group_operand<const bfloat16> b,
                                    const float* weights, matrix_view<bfloat16> h, matrix_view<bfloat16> out,
                                    float* parts, const typename Activation::options& activation,
                                    const launch_options& options = {});

/// For each group `g`: `c(g, m, n) (=|+=) sum_i a.row(i)[m] * b.row(i)[n]` over its rows, ascending. An empty group
/// writes zeros when overwriting.
/// @tparam Rows The operand with a gather list, if any. @tparam TC bfloat16 or float.
/// @param stream Where. @param d The device. @param groups The rows. @param M Rows of each matrix of `c`. @param N
/// Columns of each matrix of `c`. @param a Rows of `[M]`. @param b Rows of `[N]`. @param c `[G]` matrices with
/// `col_stride == 1`. @param mode Whether the old content is added. @param options How the launch is made.
/// @throws invalid_argument if an extent, a stride or an address does not fit; nothing is enqueued then.
template <gathered Rows, class TC, std::derived_from<device> Device>
void variable_k(device_stream stream, const Device& d, const row_groups& groups, std::int64_t M, std::int64_t N,
                row_operand<bfloat16> a, row_operand<bfloat16> b, group_operand<TC> c, write mode = write::overwrite,
                const launch_options& options = {});

}  // namespace gemm::portable

TESSERA_NAMESPACE_END

#include <tessera/gemm/detail/portable/portable.cuh>
