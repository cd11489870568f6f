// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of `gemm/hopper.cuh`.

#include <cstdint>
#include <type_traits>

#include <tessera/gemm/detail/device/product_checks.cuh>
#include <tessera/gemm/detail/hopper/transposed_epilogue.cuh>
#include <tessera/gemm/hopper.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail::hopper {

using gemm::group_operand;
using gemm::row_operand;
using gemm::hopper::all_kernels_options;
using gemm::hopper::config;
using gemm::hopper::device;
using gemm::hopper::launch_options;
using gemm::hopper::problem;
using gemm::hopper::row_groups;
using product_checks::expect_activations;
using product_checks::expect_operands;
using product_checks::expect_result;
using product_checks::expect_sums;
using product_checks::expect_variable_k;

/// The configuration of a launch. @param d The device. @param p The problem. @param options What the caller asks for.
template <class Options>
config configure(const device& d, problem p, const Options& options) {
  TESSERA_EXPECTS(d.encode != nullptr, "the device is not filled in: use gemm::hopper::device::current()");
  p.num_multiprocessors = d.num_multiprocessors;
  if (options.sm_budget > 0 && options.sm_budget < d.num_multiprocessors) p.num_multiprocessors = options.sm_budget;
  p.ping_pong = Options::ping_pong;
  if constexpr (requires { options.forced; }) {
    if (options.forced != nullptr) return *options.forced;
  }
  return gemm::hopper::choose(p);
}

/// Whether what a result is added to comes through the operand ring. @param p The problem. @param mode Whether it is
/// added to anything. @param options What the caller asks for: a forced kernel may not be able to.
template <class TC, class Options>
bool reads_old(const problem& p, write mode, const Options& options) {
  if (mode != write::accumulate) return false;
  if constexpr (std::is_same_v<TC, bfloat16>) return true;
  if constexpr (requires { options.forced; }) {
    if (options.forced != nullptr)
      return options.forced->cluster == 1 && options.forced->order == gemm::hopper::schedule::cooperative;
  }
  return gemm::hopper::reads_old_fp32(p);
}

/// How a launch hands out its tiles. @param d The device. @param options What the caller asks for. @param p Filled in.
template <class Options, class P>
void hand_out(const device& d, const Options& options, P& p) {
  p.tile_counter = options.tile_counter != nullptr ? options.tile_counter : d.tile_counter;
  p.shared = d.shared && p.tile_counter != nullptr;
  p.leaves_room = d.leaves_room || (options.sm_budget > 0 && options.sm_budget < d.num_multiprocessors);
}

/// A map of packed rows. @param d The device. @param operand The rows. @param rows How many there may be. @param
/// columns Their length. @param fallback Any mapped address, for no rows. @param name For messages.
[[gnu::noinline]] inline CUtensorMap row_map(const device& d, const row_operand<bfloat16>& operand, std::int64_t rows,
                                             std::int64_t columns, const void* fallback, const char* name) {
  const bool empty = rows == 0;
  const std::int64_t stride = empty || operand.stride == 0 ? columns : operand.stride;
  return chunk_map(d.encode, empty ? static_cast<const bfloat16*>(fallback) : operand.data, 2, {columns, rows, 1},
                   {stride, 0}, name);
}

/// A map of the matrices of `variable_m`. @param d The device. @param order Which of their indices is contiguous.
/// @param b The first. @param matrices How many, 1 for one that all groups share. @param N,K Their extents. @param
/// line_stride Elements between their lines.
[[gnu::noinline]] inline CUtensorMap matrix_map(const device& d, contiguous order,
                                                const group_operand<const bfloat16>& b, std::int64_t matrices,
                                                std::int64_t N, std::int64_t K, std::int64_t line_stride) {
  const std::int64_t inner = order == contiguous::k ? K : N, outer = order == contiguous::k ? N : K;
  return chunk_map(d.encode, b.data, 3, {inner, outer, matrices},
                   {line_stride, b.group_stride == 0 ? line_stride * outer : b.group_stride}, "b");
}

/// H as kernels write it: where gates come first, a layer of gates and one of ups, so that a chunk that ends with the
/// gates leaves the ups alone. @param d The device. @param h `[rows, U]`. @param n Columns of the activation. @param
/// rows How many.
template <class Activation, bool Interleaved>
output_matrix<bfloat16> output_of_h(const device& d, const matrix_view<bfloat16>& h, std::int64_t n,
                                    std::int64_t rows) {
  if constexpr (Activation::gated && !Interleaved)
    return make_output(d.encode, h.data, n, rows, h.stride, 2, n, false, "h");
  else
    return make_output(d.encode, h.data, Activation::gated ? 2 * n : n, rows, h.stride, 1, 0, false, "h");
}

/// Everything that the products with variable M have in common. @param fill Sets the epilogue's parameters.
template <contiguous Order, gathered Rows, class Epilogue, int Parts = 1, class Options>
void enqueue_variable_m(device_stream stream, const device& d, const problem& shape, const row_groups& groups,
                        std::int64_t split, const row_operand<bfloat16>& a, const group_operand<const bfloat16>& b,
                        const typename Epilogue::params& epilogue, const Options& options) {
  const std::int64_t K = shape.k;
  expect_sums<Rows>(K, a);
  problem complete = shape;
  complete.b_along_k = Order == contiguous::k;
  const config c = configure(d, complete, options);
  if (c.grid == 0) return;
  const std::int64_t line_stride = expect_operands(Order, a, b);

  const bool shared = b.group_stride == 0;
  const std::int64_t matrices = Parts > 1 ? Parts : shared ? 1 : groups.num_groups, N = shape.n;
  const CUtensorMap map_b = matrix_map(d, Order, b, matrices, N, K, line_stride);
  const CUtensorMap map_a =
      Rows == gathered::a ? map_b : row_map(d, a, groups.max_rows, K, b.data, "a");  // the kernel wants two

  multiply_params<typename Epilogue::params> p{};
  p.sizes = {groups.row_offsets, static_cast<int>(groups.num_groups), 0, static_cast<int>(Epilogue::split ? N / 2 : N),
             static_cast<int>(K)};
  p.b_group_step = shared || Parts > 1 ? 0 : 1;
  p.split = static_cast<int>(split);
  p.gather_data = a.data;
  p.gather_stride = a.stride;
  p.gather = a.gather;
  hand_out(d, options, p);
  p.epilogue = epilogue;
  if constexpr (Parts > 1)
    launch<kernel_shape<product::variable_m, Order, Rows, 64 * Parts, 4, 1, false, Parts>, Epilogue>(stream, c, map_a,
                                                                                                     map_b, p);
  else
    launch_configured<product::variable_m, Order, Rows, Epilogue, Options::ping_pong>(stream, c, map_a, map_b, p);
}

/// Everything that the products with variable K have in common: `[M, N]` of each group. @param fallback Any mapped
/// address, for no rows.
template <gathered Rows, class Epilogue, class Options>
void enqueue_variable_k(device_stream stream, const device& d, problem shape, const row_groups& groups, std::int64_t M,
                        std::int64_t N, const row_operand<bfloat16>& a, const row_operand<bfloat16>& b,
                        const void* fallback, const typename Epilogue::params& epilogue, const Options& options) {
  shape.m = M;
  shape.n = N;
  if (epilogue.reads_old) shape.epilogue = gemm::hopper::epilogue_kind::read_old;
  const config chosen = configure(d, shape, options);

  const CUtensorMap map_b = row_map(d, b, groups.max_rows, N, fallback, "b");
  const CUtensorMap map_a =
      Rows == gathered::a ? map_b : row_map(d, a, groups.max_rows, M, fallback, "a");  // the kernel wants two

  multiply_params<typename Epilogue::params> p{};
  p.sizes = {groups.row_offsets, static_cast<int>(groups.num_groups), static_cast<int>(M), static_cast<int>(N), 0};
  p.gather_data = a.data;
  p.gather_stride = a.stride;
  p.gather = a.gather;
  hand_out(d, options, p);
  p.epilogue = epilogue;
  launch_configured<product::variable_k, contiguous::mn, Rows, Epilogue, Options::ping_pong>(stream, chosen, map_a,
                                                                                             map_b, p);
}

}  // namespace detail::hopper

namespace gemm::hopper {

inline device device::current() {
  using tessera::detail::check_cuda;
  int ordinal = 0, major_version = 0, minor_version = 0;
  device d;
  check_cuda(cudaGetDevice(&ordinal), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major_version, cudaDevAttrComputeCapabilityMajor, ordinal),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor_version, cudaDevAttrComputeCapabilityMinor, ordinal),
             "cudaDeviceGetAttribute");
  TESSERA_EXPECTS(major_version == 9 && minor_version == 0,
                  "gemm::hopper needs a device of compute capability 9.0, device "
                      << ordinal << " has " << major_version << '.' << minor_version);
  check_cuda(cudaDeviceGetAttribute(&d.num_multiprocessors, cudaDevAttrMultiProcessorCount, ordinal),
             "cudaDeviceGetAttribute");
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
             "cudaGetDriverEntryPointByVersion");
  TESSERA_EXPECTS_AS(cuda_error, found == cudaDriverEntryPointSuccess && function != nullptr,
                     "the driver has no cuTensorMapEncodeTiled: one of CUDA 12.0 or later is needed");
  d.encode = reinterpret_cast<tessera::detail::hopper::tensor_map_encoder>(function);
  return d;
}

template <contiguous Order, gathered Rows, class TC, class Options>
void variable_m(device_stream stream, const device& d, const row_groups& groups, std::int64_t N, std::int64_t K,
                row_operand<bfloat16> a, group_operand<const bfloat16> b, const bfloat16* bias, matrix_view<TC> c,
                write mode, const Options& options) {
  using namespace tessera::detail::hopper;
  static_assert(std::is_same_v<TC, bfloat16> || std::is_same_v<TC, float>, "results are bfloat16 or float");
  if (!expect_result(groups, N, c)) return;
  problem shape;
  shape.max_rows = groups.max_rows;
  shape.num_groups = groups.num_groups;
  shape.n = N;
  shape.k = K;
  shape.gathered = Rows != gathered::none;
  const bool reads = reads_old<TC>(shape, mode, options);
  if (reads) shape.epilogue = epilogue_kind::read_old;
  enqueue_variable_m<Order, Rows, store_epilogue<TC>>(
      stream, d, shape, groups, 0, a, b,
      {make_output(d.encode, c.data, N, groups.max_rows, c.stride, 1, 0, false, "c"), mode == write::accumulate, reads,
       bias},
      options);
}

template <int Parts>
void product_with_parts(device_stream stream, const device& d, const row_groups& rows, std::int64_t N, std::int64_t K,
                        row_operand<bfloat16> a, const bfloat16* b, matrix_view<float> c,
                        const launch_options& options) {
  using namespace tessera::detail::hopper;
  TESSERA_EXPECTS(rows.num_groups == 1, "a product with parts has one group, these rows have " << rows.num_groups);
  if (!expect_result(rows, N, c)) return;
  problem shape;
  shape.max_rows = rows.max_rows;
  shape.num_groups = 1;
  shape.n = N;
  shape.k = K;
  config c_of_parts;
  c_of_parts.tile_n = 64;
  const std::int64_t tiles = max_tiles(shape, c_of_parts);
  const int most =
      options.sm_budget > 0 && options.sm_budget < d.num_multiprocessors ? options.sm_budget : d.num_multiprocessors;
  c_of_parts.grid = static_cast<int>(tiles < most ? tiles : most);
  all_kernels_options forced{options};
  forced.forced = &c_of_parts;
  enqueue_variable_m<contiguous::k, gathered::none, parts_epilogue<Parts>, Parts>(
      stream, d, shape, rows, 0, a, {b, N * K, K, 1},
      {make_output(d.encode, c.data, N, rows.max_rows, c.stride, 1, 0, false, "c")}, forced);
}

template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class Options>
void variable_m_activation(device_stream stream, const device& d, const row_groups& groups, std::int64_t n,
                           std::int64_t K, row_operand<bfloat16> a, group_operand<const bfloat16> b,
                           const bfloat16* bias, matrix_view<bfloat16> h, matrix_view<bfloat16> out,
                           const typename Activation::options& activation, const Options& options) {
  using namespace tessera::detail::hopper;
  using epilogue = activation_epilogue<Activation, Interleaved>;
  const std::int64_t U = Activation::gated ? 2 * n : n;
  if (!expect_activations(groups, n, U, h, out)) return;
  problem shape;
  shape.max_rows = groups.max_rows;
  shape.num_groups = groups.num_groups;
  shape.n = U;
  shape.k = K;
  shape.epilogue = epilogue_kind::activation;
  shape.gathered = Rows != gathered::none;
  enqueue_variable_m<Order, Rows, epilogue>(
      stream, d, shape, groups, epilogue::split ? n : 0, a, b,
      {output_of_h<Activation, Interleaved>(d, h, n, groups.max_rows),
       make_output(d.encode, out.data, n, groups.max_rows, out.stride, 1, 0, false, "the activation"),
       static_cast<int>(n), bias, activation},
      options);
}

template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class Options>
void variable_m_activation_backward(device_stream stream, const device& d, const row_groups& groups, std::int64_t n,
                                    std::int64_t K, row_operand<bfloat16> a, group_operand<const bfloat16> b,
                                    const float* weights, matrix_view<bfloat16> h, matrix_view<bfloat16> out,
                                    float* parts, const typename Activation::options& activation,
                                    const Options& options) {
  using namespace tessera::detail::hopper;
  if (!expect_activations(groups, n, Activation::gated ? 2 * n : n, h, out)) return;
  problem shape;
  shape.max_rows = groups.max_rows;
  shape.num_groups = groups.num_groups;
  shape.n = n;
  shape.k = K;
  shape.epilogue = epilogue_kind::activation_backward;
  shape.gathered = Rows != gathered::none;
  enqueue_variable_m<Order, Rows, activation_backward_epilogue<Activation, Interleaved>>(
      stream, d, shape, groups, 0, a, b,
      {output_of_h<Activation, Interleaved>(d, h, n, groups.max_rows),
       make_output(d.encode, out.data, n, groups.max_rows, out.stride, 1, 0, false, "the activation"),
       static_cast<int>(n), weights, parts, groups.max_rows, activation},
      options);
}

inline void sum_weight_parts(device_stream stream, const row_groups& groups, std::int64_t num_parts, const float* parts,
                             float* out) {
  if (groups.num_groups == 0 || groups.max_rows == 0) return;
  const std::int64_t blocks = (groups.max_rows + 255) / 256;
  tessera::detail::launch_early(stream, "sum_partials_kernel", tessera::detail::sum_partials_kernel<float>,
                                dim3(static_cast<unsigned>(blocks < 1024 ? blocks : 1024)), 256, 0, parts,
                                static_cast<int>(num_parts), groups.max_rows, groups.row_offsets,
                                static_cast<int>(groups.num_groups), out);
}

template <gathered Rows, class TC, class Options>
void variable_k(device_stream stream, const device& d, const row_groups& groups, std::int64_t M, std::int64_t N,
                row_operand<bfloat16> a, row_operand<bfloat16> b, group_operand<TC> c, write mode,
                const Options& options) {
  using namespace tessera::detail::hopper;
  static_assert(std::is_same_v<TC, bfloat16> || std::is_same_v<TC, float>, "results are bfloat16 or float");
  if (!expect_variable_k<Rows>(groups, M, N, a, b, c)) return;
  problem shape;
  shape.variable_k = true;
  shape.max_rows = groups.max_rows;
  shape.num_groups = groups.num_groups;
  shape.gathered = Rows != gathered::none;
  const bool adds = mode == write::accumulate, reads = reads_old<TC>(shape, mode, options);
  const auto to = make_output(d.encode, c.data, N, M, c.row_stride, groups.num_groups, c.group_stride, true, "c");
  if constexpr (Rows == gathered::b) {
    using epilogue = transposed_epilogue<TC>;
    typename epilogue::params p{to, static_cast<int>(M), adds, reads, {}};
    if (reads)
      p.boxes = swizzled_map<epilogue::box_bytes>(
          d.encode, c.data, 3, {N, M, groups.num_groups},
          {c.row_stride, groups.num_groups > 1 ? c.group_stride : c.row_stride * M}, chunk_rows, "c");
    enqueue_variable_k<gathered::a, epilogue>(stream, d, shape, groups, N, M, b, a, c.data, p, options);
  } else {
    enqueue_variable_k<Rows, store_epilogue<TC>>(stream, d, shape, groups, M, N, a, b, c.data,
                                                 {to, adds, reads, nullptr}, options);
  }
}

}  // namespace gemm::hopper

TESSERA_NAMESPACE_END
