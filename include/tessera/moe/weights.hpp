// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What goes into a layer and what its gradients are: views of memory the engine owns.

#include <cstdint>
#include <span>

#include <tessera/core/views.hpp>
#include <tessera/experts/expert_weights.hpp>

TESSERA_NAMESPACE_BEGIN

/// The tokens of one call, and what the chosen policies need to know of them.
/// @tparam S Type of activations.
template <class S>
struct layer_inputs {
  matrix_view<const S> x;                        ///< `[T, d]`, rows contiguous; unchanged until the last backward call.
  std::span<const std::int32_t> token_ids = {};  ///< `[T]`, for `select::hash`.
  matrix_view<const std::int32_t> expert_ids = {};      ///< `[T, K]`, for `select::external`.
  std::span<const std::int32_t> sequence_offsets = {};  ///< `[S + 1]` from 0 to T, ascending; empty: one sequence.
  /// `[T, d]`, added to y by `forward`: y = residual + experts; without data nothing is. Does not overlap y. Rows are
  /// aligned as those of x where they travel between GPUs. Added to the shared experts' outputs and rounded, before
  /// these are added to the routed experts'; without shared experts it is added to the rounded sum of the routed ones
  /// on the host, and rounded together with the sum on a device. Its gradient is dy, which the engine adds: backward
  /// does not look at it.
  matrix_view<const S> residual = {};
};

/// The container of shared experts that goes with `Experts`: `Experts::shared` where there is one, otherwise `Experts`.
template <class Experts>
struct shared_container {
  using type = Experts;  ///< The container.
};
/// Where the container names its own.
template <class Experts>
requires requires { typename Experts::shared; }
struct shared_container<Experts> {
  using type = typename Experts::shared;  ///< The container.
};
/// The container of shared experts that goes with `Experts`.
template <class Experts>
using shared_container_t = typename shared_container<Experts>::type;

/// Parameters of a layer on one rank.
/// @tparam Experts The expert container.
template <class Experts>
struct layer_weights {
  matrix_view<const typename Experts::accumulate> gate;     ///< `[E, d]`, replicated on all ranks.
  const typename Experts::accumulate* gate_bias = nullptr;  ///< `[E]` with `shape::gate_bias`, else null.
  typename Experts::weights experts = {};                   ///< This rank's slots, `[L, ...]`.
  /// One expert of width `num_shared_experts * n`, replicated.
  typename shared_container_t<Experts>::weights shared = {};
};

/// Gradients of a layer's parameters on one rank. Those of replicated parameters come as one contribution for each
/// chunk of `layer_options::chunk_tokens` tokens (one in all where that is 0), to be added over chunks and ranks by the
/// engine, in the order of chunks with `ordered_all_reduce` where the result must not depend on the number of ranks.
/// @tparam Experts The expert container.
template <class Experts>
struct layer_gradients {
  typename Experts::accumulate* gate = nullptr;       ///< `[chunks, E, d]`, packed.
  typename Experts::accumulate* gate_bias = nullptr;  ///< `[chunks, E]`, packed, with `shape::gate_bias`.
  /// This rank's slots, `[L, ...]`: no other rank contributes, unless experts have replicas.
  typename Experts::gradients experts = {};
  typename shared_container_t<Experts>::gradients shared = {};  ///< `[chunks, ...]`.
};

TESSERA_NAMESPACE_END
