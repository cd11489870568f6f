// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Which backend computes the grouped products, and what a host backend must offer. The device half of the choice is in
/// `automatic.cuh`.

#include <cstdint>
#include <span>
#include <type_traits>

#include <tessera/core/passes.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/operands.hpp>
#include <tessera/gemm/reference.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm {

/// Lets the library choose the backend: `reference` in host memory; in device memory, when a call is made, `hopper` on
/// compute capability 9.0 in programs compiled for `sm_90a`, `portable` everywhere else from 8.0 on.
struct automatic {};

namespace hopper {
/// The policy that asks for `gemm/hopper.cuh` in device memory: calls throw on devices other than 9.0. In host memory
/// it means `automatic`.
struct backend {};
}  // namespace hopper

/// Grouped products on sm_80 and later.
namespace portable {
/// The policy that asks for `gemm/portable.cuh` in device memory, wherever it runs. In host memory it means
/// `automatic`.
struct backend {};
}  // namespace portable

/// A policy that chooses a backend in device memory. Models: `automatic`, `hopper::backend`, `portable::backend`.
template <class G>
concept device_policy =
    std::is_same_v<G, automatic> || std::is_same_v<G, hopper::backend> || std::is_same_v<G, portable::backend>;

namespace detail {

template <class G>
struct host_backend {
  using type = G;
};
template <device_policy G>
struct host_backend<G> {
  using type = reference;
};

}  // namespace detail

/// The backend that the policy `G` stands for in host memory: `reference` for the policies of device memory, otherwise
/// `G` itself.
template <class G>
using host_backend = typename detail::host_backend<G>::type;

/// `G::variable_m<A>(row_offsets, N, K, a, b, bias, c, mode)` can be called as `reference::variable_m` can.
template <class G>
concept has_variable_m = requires(std::span<const std::int32_t> row_offsets, std::int64_t size, row_operand<float> a,
                                  group_operand<const float> b, const float* bias, matrix_view<float> c, write mode) {
  G::template variable_m<float>(row_offsets, size, size, a, b, bias, c, mode);
};

/// `G::variable_k<A>(row_offsets, M, N, a, b, c, mode)` can be called as `reference::variable_k` can.
template <class G>
concept has_variable_k = requires(std::span<const std::int32_t> row_offsets, std::int64_t size, row_operand<float> a,
                                  row_operand<float> b, group_operand<float> c, write mode) {
  G::template variable_k<float>(row_offsets, size, size, a, b, c, mode);
};

/// A backend of grouped products in host memory. Models: `reference`, `blas` (`gemm/blas.hpp`), or your own struct with
/// the static functions of `reference`, for all element types that it will meet.
template <class G>
concept host_gemm = has_variable_m<G> && has_variable_k<G>;

}  // namespace gemm

TESSERA_NAMESPACE_END
