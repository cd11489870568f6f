// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Which backend computes the grouped products, and what a host backend must offer.

#include <cstdint>
#include <span>

#include <tessera/core/passes.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/operands.hpp>
#include <tessera/gemm/reference.hpp>

TESSERA_NAMESPACE_BEGIN

namespace gemm {

/// Lets the library choose the backend: `reference` in host memory.
struct automatic {};

namespace detail {

template <class G>
struct host_backend {
  using type = G;
};
template <>
struct host_backend<automatic> {
  using type = reference;
};

}  // namespace detail

/// The backend that the policy `G` stands for in host memory: `reference` for `automatic`, otherwise `G` itself.
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
