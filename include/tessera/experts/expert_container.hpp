// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a layer needs of its experts, so that an engine can bring its own: low-rank adapters, quantised weights, a
/// fused kernel. `experts` is the model that comes with the library, and documents each member.

#include <concepts>
#include <cstdint>

#include <tessera/core/dtype.hpp>
#include <tessera/core/expert_rows.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/experts/expert_weights.hpp>

TESSERA_NAMESPACE_BEGIN

/// `E::storage`, `E::accumulate` and `E::gradient` are element types.
template <class E>
concept expert_container_has_types =
    storage_type<typename E::storage> && accumulate_type<typename E::accumulate> && storage_type<typename E::gradient>;

/// `E::weights` and `E::gradients` exist and can be copied.
template <class E>
concept expert_container_has_weights = std::copyable<typename E::weights> && std::copyable<typename E::gradients>;

/// `E::options` exists, has defaults and can be copied.
template <class E>
concept expert_container_has_options =
    std::default_initializable<typename E::options> && std::copyable<typename E::options>;

/// An `E` is made of `expert_dims` and options, and can be copied.
template <class E>
concept expert_container_is_made_of_dims =
    std::constructible_from<E, const expert_dims&, const typename E::options&> && std::copyable<E>;

/// `carve_saved(memory_builder&, max_pairs)` gives `E::saved_view`.
template <class E>
concept expert_container_has_saved = requires(const E& e, memory_builder& memory, std::int64_t max_pairs) {
  { e.carve_saved(memory, max_pairs) } -> std::same_as<typename E::saved_view>;
};

/// `carve_deferred(memory_builder&, max_pairs)` gives `E::deferred_view`.
template <class E>
concept expert_container_has_deferred = requires(const E& e, memory_builder& memory, std::int64_t max_pairs) {
  { e.carve_deferred(memory, max_pairs) } -> std::same_as<typename E::deferred_view>;
};

/// `carve_forward`, `carve_backward_input` and `carve_backward_weights` `(memory_builder&, max_pairs, weight_on)` give
/// `E::forward_scratch`, `E::backward_input_scratch` and `E::backward_weights_scratch`.
template <class E>
concept expert_container_has_scratch = requires(const E& e, memory_builder& memory, std::int64_t max_pairs,
                                                weight_on applied) {
  { e.carve_forward(memory, max_pairs, applied) } -> std::same_as<typename E::forward_scratch>;
  { e.carve_backward_input(memory, max_pairs, applied) } -> std::same_as<typename E::backward_input_scratch>;
  { e.carve_backward_weights(memory, max_pairs, applied) } -> std::same_as<typename E::backward_weights_scratch>;
};

/// `forward(stream, rows, x, pair_weights, weights, saved, y, scratch)` exists.
template <class E, class Space>
concept expert_container_has_forward = requires(const E& e, stream_ref<Space> stream, const expert_rows& rows,
                                                matrix_view<const typename E::storage> x,
                                                pair_weights<typename E::accumulate> weighting,
                                                const typename E::weights& w, const typename E::saved_view& saved,
                                                matrix_view<typename E::storage> y,
                                                const typename E::forward_scratch& scratch) {
  e.forward(stream, rows, x, weighting, w, saved, y, scratch);
};

/// `backward_input(stream, rows, x, dy, pair_weights, weights, saved, deferred, dx, dpair_weights, scratch)` exists.
template <class E, class Space>
concept expert_container_has_backward_input = requires(
    const E& e, stream_ref<Space> stream, const expert_rows& rows, matrix_view<const typename E::storage> x,
    pair_weights<typename E::accumulate> weighting, const typename E::weights& w, const typename E::saved_view& saved,
    const typename E::deferred_view& deferred, matrix_view<typename E::storage> dx,
    typename E::accumulate* dpair_weights, const typename E::backward_input_scratch& scratch) {
  e.backward_input(stream, rows, x, x, weighting, w, saved, deferred, dx, dpair_weights, scratch);
};

/// `backward_weights(stream, groups, x, dy, pair_weights, saved, deferred, gradients, write, scratch)` exists.
template <class E, class Space>
concept expert_container_has_backward_weights =
    requires(const E& e, stream_ref<Space> stream, const expert_rows& groups, matrix_view<const typename E::storage> x,
             pair_weights<typename E::accumulate> weighting, const typename E::saved_view& saved,
             const typename E::deferred_view& deferred, const typename E::gradients& g, write mode,
             const typename E::backward_weights_scratch& scratch) {
  e.backward_weights(stream, groups, x, x, weighting, saved, deferred, g, mode, scratch);
};

/// Experts that a layer can run in `Space`.
template <class E, class Space = space::host>
concept expert_container = expert_container_has_types<E> && expert_container_has_weights<E> &&
    expert_container_has_options<E> && expert_container_is_made_of_dims<E> && expert_container_has_saved<E> &&
    expert_container_has_deferred<E> && expert_container_has_scratch<E> && expert_container_has_forward<E, Space> &&
    expert_container_has_backward_input<E, Space> && expert_container_has_backward_weights<E, Space>;

TESSERA_NAMESPACE_END
