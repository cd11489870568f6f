// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Grouped matrix products in bf16 on one sm_90a GPU (H100, H200), with the expert's activation and its gradient fused
/// into the stores.
///
/// All calls enqueue one kernel and return; they neither allocate nor synchronise, read row offsets on the device, and
/// may be captured: grid and tensor maps depend on bounds alone, so a replay is right when offsets and gather lists
/// have changed. Results are the same bits in every run, and those of a row depend on that row and its group's matrix
/// only: sums are in fp32, in ascending order of k, whatever the tile, and nothing is summed by atomics.
///
/// Columns and lengths of sums are multiples of 8, rows start at multiples of 16 bytes; row counts are arbitrary,
/// groups may be empty, and what lies beyond the last row is neither used nor written.

#include <cstdint>

#include <tessera/core/dtype.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/detail/hopper/activation_epilogue.cuh>
#include <tessera/gemm/detail/hopper/launch.cuh>
#include <tessera/gemm/hopper_config.hpp>
#include <tessera/gemm/operands.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm::hopper {

/// Which index of B's matrices, logically `[N, K]`, is contiguous: `k` (`col_stride == 1`) or `mn` (`row_stride == 1`).
using contiguous = tessera::detail::hopper::contiguous;
/// Which operand's rows are read through a gather list.
using gathered = tessera::detail::hopper::gathered;

/// What launches need to know of the device: made once, valid while the process lives.
struct device {
  int num_multiprocessors = 0;                                   ///< Blocks that run at once.
  tessera::detail::hopper::tensor_map_encoder encode = nullptr;  ///< The driver's function for tensor maps.
  std::int32_t* tile_counter = nullptr;                          ///< For launches whose options have none.
  bool shared = false;  ///< Whether kernels of other streams run beside launches, whose blocks may begin late then:
                        ///< with a counter they ask for their first tile, too.
  bool leaves_room = false;  ///< Whether multiprocessors that launches leave are for other streams: no kernel of this
                             ///< stream starts there before a launch has ended.

  /// Of the calling thread's current device.
  /// @throws invalid_argument if it is not of compute capability 9.0. @throws cuda_error if the runtime fails.
  static device current();
};

/// Rows sorted by group, in device memory.
struct row_groups {
  const std::int32_t* row_offsets = nullptr;  ///< `[num_groups + 1]`, ascending; need not start at 0.
  std::int64_t num_groups = 0;                ///< G.
  std::int64_t max_rows = 0;  ///< Bound of the last offset: the rows that packed operands and results have memory for.
};

/// How a launch is made, with the cooperative kernels alone, which are the ones for results of more than 128 columns:
/// a third less to compile.
struct launch_options {
  static constexpr bool ping_pong = false;  ///< Whether ping-pong kernels are compiled.

  int sm_budget = 0;                     ///< Most multiprocessors to use; 0: all. Fewer: as `device::leaves_room`.
  std::int32_t* tile_counter = nullptr;  ///< Two words of device memory, zero before the first launch and left zero by
                                         ///< each, no two launches at a time: tiles are handed out as blocks ask for
                                         ///< them. Null: in turn. The results are the same bits.
};

/// The same with all kernels: for narrow results, and to measure. `variable_m_activation_backward` has one alone.
struct all_kernels_options : launch_options {
  static constexpr bool ping_pong = true;  ///< See `launch_options`.

  const config* forced = nullptr;  ///< The kernel to use instead of `choose`'s.
};

/// For each group `g` and row `i` of it: `c(i, j) (=|+=) sum_k a.row(i)[k] * b(g, j, k) + bias[g * N + j]`.
/// @tparam Order Order of `b`. @tparam Rows `gathered::a` if `a` has a gather list, else `gathered::none`.
/// @tparam TC bfloat16 or float. @tparam Options `launch_options` or `all_kernels_options`.
/// @param stream Where. @param d The device. @param groups The rows. @param N Columns of `c`. @param K Length of sums.
/// @param a Rows of `[K]`; packed rows have memory for `groups.max_rows`. @param b `[G]` matrices.
/// @param bias `[G, N]` or null. @param c `[max_rows, N]`. @param mode Whether the old content is added.
/// @param options How the launch is made.
/// @throws invalid_argument if an extent, a stride or an address does not fit; nothing is enqueued then.
template <contiguous Order, gathered Rows, class TC, class Options = launch_options>
void variable_m(device_stream stream, const device& d, const row_groups& groups, std::int64_t N, std::int64_t K,
                row_operand<bfloat16> a, group_operand<const bfloat16> b, const bfloat16* bias, matrix_view<TC> c,
                write mode = write::overwrite, const Options& options = {});

/// `c(i, j) = sum over the parts p of B, in their order, of sum_k a.row(i)[k] * b_p(j, k)`: a product with a matrix
/// that bf16 does not hold, given as a sum of matrices that it does. All rows are one group.
/// @tparam Parts How many.
/// @param stream Where. @param d The device. @param rows One group. @param N Columns of `c`. @param K Length of sums.
/// @param a Rows of `[K]`, not gathered. @param b `[Parts, N, K]`, packed; the least significant part first loses
/// least.
/// @param c `[max_rows, N]`. @param options How the launch is made.
/// @throws invalid_argument if an extent, a stride or an address does not fit; nothing is enqueued then.
template <int Parts>
void product_with_parts(device_stream stream, const device& d, const row_groups& rows, std::int64_t N, std::int64_t K,
                        row_operand<bfloat16> a, const bfloat16* b, matrix_view<float> c,
                        const launch_options& options = {});

/// The up-projection: `h(i, j)` as `variable_m` computes it, rounded, and `out(i, j) = Activation(h)`.
/// @tparam Order Order of `b`. @tparam Rows `gathered::a` if `a` has a gather list, else `gathered::none`.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gate and up columns are in turn; otherwise all
/// gates come first. @tparam Options `launch_options` or `all_kernels_options`.
/// @param stream Where. @param d The device. @param groups The rows. @param n Columns of `out`; `h` has as many, twice
/// as many for a gated activation. @param K Length of sums. @param a Rows of `[K]`. @param b `[G]` matrices, `[U, K]`.
/// @param bias `[G, U]` or null. @param h `[max_rows, U]`. @param out `[max_rows, n]`. @param activation Its options.
/// @param options How the launch is made.
/// @throws invalid_argument if an extent, a stride or an address does not fit; nothing is enqueued then.
template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class Options = launch_options>
void variable_m_activation(device_stream stream, const device& d, const row_groups& groups, std::int64_t n,
                           std::int64_t K, row_operand<bfloat16> a, group_operand<const bfloat16> b,
                           const bfloat16* bias, matrix_view<bfloat16> h, matrix_view<bfloat16> out,
                           const typename Activation::options& activation, const Options& options = {});

/// Parts of a pair weight's gradient that `variable_m_activation_backward` writes for a row. @param n Columns of `out`.
constexpr std::int64_t num_weight_parts(std::int64_t n) { return (n + 127) / 128; }

/// The gradient through the down-projection and the activation: with `dA(i, j) = sum_k a.row(i)[k] * b(g, j, k)` and
/// the row's weight `w`, writes the gradient of `w * dA` with respect to H over `h`, `w * Activation(h)` to `out`, and
/// sums of `dA(i, j) * Activation(h)(i, j)` over 128 columns each to `parts`, which `sum_weight_parts` adds up.
/// @tparam Order Order of `b`. @tparam Rows `gathered::a` if `a` has a gather list, else `gathered::none`.
/// @tparam Activation An activation policy. @tparam Interleaved Whether gate and up columns of `h` are in turn.
/// @tparam Options `launch_options` or `all_kernels_options`.
/// @param stream Where. @param d The device. @param groups The rows. @param n Columns of `out`. @param K Length of
/// sums.
/// @param a Rows of `[K]`: gradients of the expert's output. @param b `[G]` matrices `[n, K]`: the down-projection.
/// @param weights `[max_rows]`, or null for ones. @param h `[max_rows, U]`. @param out `[max_rows, n]`.
/// @param parts `[num_weight_parts(n), max_rows]`, or null. @param activation Its options.
/// @param options How the launch is made.
/// @throws invalid_argument if an extent, a stride or an address does not fit; nothing is enqueued then.
template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class Options = launch_options>
void variable_m_activation_backward(device_stream stream, const device& d, const row_groups& groups, std::int64_t n,
                                    std::int64_t K, row_operand<bfloat16> a, group_operand<const bfloat16> b,
                                    const float* weights, matrix_view<bfloat16> h, matrix_view<bfloat16> out,
                                    float* parts, const typename Activation::options& activation,
                                    const Options& options = {});

/// `out[i] = sum of the parts of row i`, ascending. @param stream Where. @param groups The rows. @param num_parts Parts
/// of each row. @param parts `[num_parts, max_rows]`. @param out `[max_rows]`.
inline void sum_weight_parts(device_stream stream, const row_groups& groups, std::int64_t num_parts, const float* parts,
                             float* out);

/// For each group `g`: `c(g, m, n) (=|+=) sum_i a.row(i)[m] * b.row(i)[n]` over its rows, ascending. An empty group
/// writes zeros when overwriting.
/// @tparam Rows The operand with a gather list, if any. @tparam TC bfloat16 or float. @tparam Options `launch_options`
/// or `all_kernels_options`.
/// @param stream Where. @param d The device. @param groups The rows. @param M Rows of each matrix of `c`. @param N
/// Columns of each matrix of `c`. @param a Rows of `[M]`. @param b Rows of `[N]`. @param c `[G]` matrices with
/// `col_stride == 1`. @param mode Whether the old content is added. @param options How the launch is made.
/// @throws invalid_argument if an extent, a stride or an address does not fit; nothing is enqueued then.
template <gathered Rows, class TC, class Options = launch_options>
void variable_k(device_stream stream, const device& d, const row_groups& groups, std::int64_t M, std::int64_t N,
                row_operand<bfloat16> a, row_operand<bfloat16> b, group_operand<TC> c, write mode = write::overwrite,
                const Options& options = {});

}  // namespace gemm::hopper

TESSERA_NAMESPACE_END

#include <tessera/gemm/detail/hopper/hopper.cuh>
