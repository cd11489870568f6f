// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of `gemm/portable.cuh`.

#include <cstdint>
#include <type_traits>

#include <tessera/gemm/detail/device/product_checks.cuh>
#include <tessera/gemm/portable.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail::portable {

using gemm::group_operand;
using gemm::row_operand;
using gemm::hopper::problem;
using gemm::portable::device;
using gemm::portable::gathered;
using gemm::portable::launch_options;
using gemm::portable::row_groups;
using product_checks::expect_activations;
using product_checks::expect_operands;
using product_checks::expect_result;
using product_checks::expect_sums;
using product_checks::expect_variable_k;

/// Blocks for a problem; 0: there is nothing to do. @param d The device. @param p The problem. @param options What the
/// caller asks for.
inline int grid_for(const device& d, const problem& p, const launch_options& options) {
  TESSERA_EXPECTS(d.num_multiprocessors > 0, "the device is not filled in: use gemm::portable::device::current()");
  gemm::hopper::config tiles;
  tiles.tile_m = tiles.tile_n = tile_rows;
  const std::int64_t blocks = gemm::hopper::max_tiles(p, tiles);
  const bool limited = options.sm_budget > 0 && options.sm_budget < d.num_multiprocessors;
  // Blocks are spread before they are stacked, so under a budget there is one on each.
  const std::int64_t most = limited ? options.sm_budget : d.num_multiprocessors * d.blocks_per_multiprocessor;
  return static_cast<int>(blocks < most ? blocks : most);
}

/// Enqueues one kernel. @param stream Where. @param kernel The kernel. @param grid Its blocks. @param params Its
/// parameters.
inline void launch(device_stream stream, const void* kernel, int grid, const void* params) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
             "cudaFuncSetAttribute");
  void* arguments[] = {const_cast<void*>(params)};
  check_cuda(
      cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(grid)), dim3(threads), arguments, shared_bytes, stream.get()),
      "the launch of multiply_tiles_kernel");
}

/// Enqueues one kernel. @tparam Everywhere Whether it is compiled for sm_90a, too. @param stream Where. @param grid Its
/// blocks. @param p Its parameters.
template <product Product, contiguous OrderB, class Epilogue, bool Everywhere>
void launch(device_stream stream, int grid, const multiply_params<typename Epilogue::params>& p) {
  launch(stream, reinterpret_cast<const void*>(multiply_tiles_kernel<Product, OrderB, Epilogue, Everywhere>), grid, &p);
}

/// Everything that the products with variable M have in common. @param shape Bounds. @param split Distance from a gate
/// to its up value in the rows of b, or 0. Where rows are is a matter of checks alone: kernels ask for the list.
template <contiguous Order, class Epilogue, bool Everywhere>
void enqueue_variable_m(device_stream stream, const device& d, const problem& shape, const row_groups& groups,
                        std::int64_t split, const row_operand<bfloat16>& a, const group_operand<const bfloat16>& b,
                        const typename Epilogue::params& epilogue, const launch_options& options) {
  const int grid = grid_for(d, shape, options);
  if (grid == 0) return;
  const std::int64_t line_stride = expect_operands(Order, a, b);
  const std::int64_t columns = Epilogue::split ? shape.n / 2 : shape.n;
  multiply_params<typename Epilogue::params> p{};
  p.sizes = {groups.row_offsets, static_cast<int>(groups.num_groups), 0, static_cast<int>(columns),
             static_cast<int>(shape.k)};
  p.a = {a.data, 0, a.stride, a.gather};
  p.b = {b.data, b.group_stride, line_stride, nullptr};
  p.split = static_cast<int>(split);
  p.epilogue = epilogue;
  launch<product::variable_m, Order, Epilogue, Everywhere>(stream, grid, p);
}

}  // namespace detail::portable

namespace gemm::portable {

[[gnu::noinline]] inline device device::current() {
  using tessera::detail::device_attribute;
  const int major_version = device_attribute(cudaDevAttrComputeCapabilityMajor);
  const int minor_version = device_attribute(cudaDevAttrComputeCapabilityMinor);
  int ordinal = 0;
  tessera::detail::check_cuda(cudaGetDevice(&ordinal), "cudaGetDevice");
  TESSERA_EXPECTS(major_version >= 8, "gemm::portable needs a device of compute capability 8.0 or later, device "
                                          << ordinal << " has " << major_version << '.' << minor_version);
  device d;
  d.num_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  constexpr int reserved = 1024;  // that the driver takes of each block's shared memory
  const int shared = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  d.blocks_per_multiprocessor = shared >= 2 * (tessera::detail::portable::shared_bytes + reserved) ? 2 : 1;
  return d;
}

template <contiguous Order, gathered Rows, class TC, std::derived_from<device> Device>
void variable_m(device_stream stream, const Device& d, const row_groups& groups, std::int64_t N, std::int64_t K,
                row_operand<bfloat16> a, group_operand<const bfloat16> b, const bfloat16* bias, matrix_view<TC> c,
                write mode, const launch_options& options) {
  using namespace tessera::detail::portable;
  static_assert(std::is_same_v<TC, bfloat16> || std::is_same_v<TC, float>, "results are bfloat16 or float");
  if (!expect_result(groups, N, c)) return;
  problem shape;
  shape.max_rows = groups.max_rows;
  shape.num_groups = groups.num_groups;
  shape.n = N;
  shape.k = K;
  expect_sums<Rows>(K, a);
  enqueue_variable_m<Order, store_epilogue<TC>, Device::beside_hopper>(
      stream, d, shape, groups, 0, a, b, {c.data, 0, c.stride, static_cast<int>(N), mode == write::accumulate, bias},
      options);
}

template <contiguous Order, gathered Rows, class Activation, bool Interleaved, std::derived_from<device> Device>
void variable_m_activation(device_stream stream, const Device& d, const row_groups& groups, std::int64_t n,
                           std::int64_t K, row_operand<bfloat16> a, group_operand<const bfloat16> b,
                           const bfloat16* bias, matrix_view<bfloat16> h, matrix_view<bfloat16> out,
                           const typename Activation::options& activation, const launch_options& options) {
  using namespace tessera::detail::portable;
  using epilogue = activation_epilogue<Activation, Interleaved>;
  const std::int64_t U = Activation::gated ? 2 * n : n;
  if (!expect_activations(groups, n, U, h, out)) return;
  problem shape;
  shape.max_rows = groups.max_rows;
  shape.num_groups = groups.num_groups;
  shape.n = U;
  shape.k = K;
  expect_sums<Rows>(K, a);
  enqueue_variable_m<Order, epilogue, Device::beside_hopper>(
      stream, d, shape, groups, epilogue::split ? n : 0, a, b,
      {h.data, h.stride, out.data, out.stride, static_cast<int>(n), bias, activation}, options);
}

template <contiguous Order, gathered Rows, class Activation, bool Interleaved, std::derived_from<device> Device>
void variable_m_activation_backward(device_stream stream, const Device& d, const row_groups& groups, std::int64_t n,
                                    std::int64_t K, row_operand<bfloat16> a, group_operand<const bfloat16> b,
                                    const float* weights, matrix_view<bfloat16> h, matrix_view<bfloat16> out,
                                    float* parts, const typename Activation::options& activation,
                                    const launch_options& options) {
  using namespace tessera::detail::portable;
  if (!expect_activations(groups, n, Activation::gated ? 2 * n : n, h, out)) return;
  problem shape;
  shape.max_rows = groups.max_rows;
  shape.num_groups = groups.num_groups;
  shape.n = n;
  shape.k = K;
  expect_sums<Rows>(K, a);
  enqueue_variable_m<Order, activation_backward_epilogue<Activation, Interleaved>, Device::beside_hopper>(
      stream, d, shape, groups, 0, a, b,
      {h.data, h.stride, out.data, out.stride, static_cast<int>(n), weights, parts, groups.max_rows, activation},
      options);
}

template <gathered Rows, class TC, std::derived_from<device> Device>
void variable_k(device_stream stream, const Device& d, const row_groups& groups, std::int64_t M, std::int64_t N,
                row_operand<bfloat16> a, row_operand<bfloat16> b, group_operand<TC> c, write mode,
                const launch_options& options) {
  using namespace tessera::detail::portable;
  using epilogue = store_epilogue<TC>;
  static_assert(std::is_same_v<TC, bfloat16> || std::is_same_v<TC, float>, "results are bfloat16 or float");
  if (!expect_variable_k<Rows>(groups, M, N, a, b, c)) return;
  problem shape;
  shape.variable_k = true;
  shape.max_rows = groups.max_rows;
  shape.num_groups = groups.num_groups;
  shape.m = M;
  shape.n = N;
  multiply_params<typename epilogue::params> p{};
  p.sizes = {groups.row_offsets, static_cast<int>(groups.num_groups), static_cast<int>(M), static_cast<int>(N), 0};
  p.a = {a.data, 0, a.stride, a.gather};
  p.b = {b.data, 0, b.stride, b.gather};
  p.epilogue = {c.data, c.group_stride, c.row_stride, static_cast<int>(N), mode == write::accumulate, nullptr};
  launch<product::variable_k, contiguous::mn, epilogue, Device::beside_hopper>(stream, grid_for(d, shape, options), p);
}

}  // namespace gemm::portable

TESSERA_NAMESPACE_END
