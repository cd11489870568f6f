// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Which element type is used where: a policy of the experts and of the layer.

#include <tessera/core/dtype.hpp>

TESSERA_NAMESPACE_BEGIN

/// Element types of a layer, as one policy.
namespace precision {

/// @tparam Storage    Activations and expert weights, in memory and on the wire.
/// @tparam Accumulate Sums, router weights, logits and scores.
/// @tparam Gradient   Gradients of expert weights.
template <storage_type Storage, accumulate_type Accumulate, storage_type Gradient>
struct policy {
  static_assert(!std::is_same_v<Storage, double> || std::is_same_v<Accumulate, double>,
                "double activations need double sums: use precision::fp64");
  using storage = Storage;        ///< Activations and expert weights.
  using accumulate = Accumulate;  ///< Sums, router weights, logits and scores.
  using gradient = Gradient;      ///< Gradients of expert weights.
};

using fp64 = policy<double, double, double>;               ///< For oracles and gradient checks.
using fp32 = policy<float, float, float>;                  ///< Single precision throughout.
using bf16 = policy<bfloat16, float, float>;               ///< bf16 storage, fp32 sums and main gradients.
using bf16_gradients = policy<bfloat16, float, bfloat16>;  ///< As `bf16`, weight gradients rounded to bf16.

}  // namespace precision

/// A `precision::policy`, or a type with the same members.
template <class P>
concept precision_policy =
    storage_type<typename P::storage> && accumulate_type<typename P::accumulate> && storage_type<typename P::gradient>;

TESSERA_NAMESPACE_END
