// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include <tessera/core/nvtx.hpp>
#include <tessera/moe/detail/layer_checks.hpp>
#include <tessera/moe/detail/layer_device.hpp>
#include <tessera/moe/detail/layer_host.hpp>
#include <tessera/moe/detail/layer_memory.hpp>
#include <tessera/moe/moe_layer.hpp>
#include <tessera/router/detail/checks.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// Where `Fixed` names a size, the run-time one must be equal.
constexpr void expect_fixed(const shape& fixed, const shape& sizes) {
  const auto check = [](const char* name, std::int64_t known, std::int64_t given) {
    TESSERA_EXPECTS(known == 0 || known == given,
                    "the layer's type fixes " << name << " = " << known << ", it was made with " << given);
  };
  check("num_experts", fixed.num_experts, sizes.num_experts);
  check("top_k", fixed.top_k, sizes.top_k);
  check("hidden", fixed.hidden, sizes.hidden);
  check("intermediate", fixed.intermediate, sizes.intermediate);
  check("max_tokens", fixed.max_tokens, sizes.max_tokens);
  TESSERA_EXPECTS(
      fixed.num_shared_experts != shape::none || sizes.num_shared_experts == 0,
      "the layer's type has no shared experts, it was made with num_shared_experts = " << sizes.num_shared_experts);
  if (fixed.num_shared_experts != shape::none)
    check("num_shared_experts", fixed.num_shared_experts, sizes.num_shared_experts);
}

inline const shape& checked_shape(const shape& sizes, int layout_experts) {
  const auto positive = [](const char* name, std::int64_t value) {
    TESSERA_EXPECTS(value > 0, name << " = " << value << ", it must be positive");
  };
  check_sizes(sizes.num_experts, sizes.top_k);  // what the router will refuse, before bytes are counted with it
  positive("hidden", sizes.hidden);
  positive("intermediate", sizes.intermediate);
  positive("max_tokens", sizes.max_tokens);
  TESSERA_EXPECTS(sizes.num_shared_experts >= 0, "num_shared_experts = " << sizes.num_shared_experts << " is negative");
  TESSERA_EXPECTS(std::int64_t{sizes.num_shared_experts} * sizes.intermediate <= INT32_MAX,
                  "num_shared_experts = " << sizes.num_shared_experts << " of intermediate = " << sizes.intermediate
                                          << " make an expert wider than " << INT32_MAX);
  TESSERA_EXPECTS(
      layout_experts == sizes.num_experts,
      "the layout places " << layout_experts << " experts, the shape has num_experts = " << sizes.num_experts);
  return sizes;
}

template <class Options>
Options with_sizes(Options routing, const shape& sizes) {
  const auto merge = [](int& chosen, int size, const char* name) {
    TESSERA_EXPECTS(chosen == 0 || chosen == size,
                    "the router's options have " << name << " = " << chosen << ", the shape has " << size);
    chosen = size;
  };
  merge(routing.num_experts, sizes.num_experts, "num_experts");
  merge(routing.top_k, sizes.top_k, "top_k");
  return routing;
}

// Bytes of everything on the plan's rank.
template <class Layer>
layer_sizes sizes_of(const layer_plan<Layer>& plan) {
  using window = layer_forward_window<Layer>;
  using forward = layer_forward_scratch<Layer>;
  memory_builder state;
  Layer::state_type::layout(state, plan.sizes.num_experts, Layer::router_type::has_bias, Layer::num_losses,
                            plan.max_chunks);
  return {.saved_bytes = bytes_of<layer_saved<Layer>>(plan),
          .deferred_bytes = bytes_of<layer_deferred<Layer>>(plan),
          .workspace_bytes = std::max(bytes_of<window, forward>(plan), bytes_of<layer_backward_scratch<Layer>>(plan)),
          .eval_workspace_bytes = bytes_of<window, layer_saved<Layer>, forward>(plan),
          .state_bytes = state.bytes()};
}

}  // namespace detail

#define TESSERA_LAYER_TEMPLATE \
  template <class Router, class Experts, class Layout, class Comm, class Combine, shape Fixed>
#define TESSERA_LAYER moe_layer<Router, Experts, Layout, Comm, Combine, Fixed>

TESSERA_LAYER_TEMPLATE
layer_sizes TESSERA_LAYER::sizes(const shape& sizes_of, const Layout& placement, int rank, const options& chosen) {
  using namespace detail;
  expect_fixed(Fixed, checked_shape(sizes_of, placement.num_experts()));
  TESSERA_EXPECTS(rank >= 0 && rank < placement.num_ranks(),
                  "rank " << rank << " of a layout over " << placement.num_ranks() << " ranks");
  TESSERA_EXPECTS(chosen.chunk_tokens >= 0, "chunk_tokens = " << chosen.chunk_tokens << " is negative");
  layer_sizes bytes = detail::sizes_of(layer_plan<moe_layer>(sizes_of, placement, rank, chosen));
  if constexpr (layer_plan<moe_layer>::travels) {
    // Memory that peers address is as large everywhere, whatever a container makes of its experts.
    for (int r = 0; r < placement.num_ranks(); ++r) {
      const layer_sizes other = detail::sizes_of(layer_plan<moe_layer>(sizes_of, placement, r, chosen));
      bytes.saved_bytes = std::max(bytes.saved_bytes, other.saved_bytes);
      bytes.deferred_bytes = std::max(bytes.deferred_bytes, other.deferred_bytes);
      bytes.workspace_bytes = std::max(bytes.workspace_bytes, other.workspace_bytes);
      bytes.eval_workspace_bytes = std::max(bytes.eval_workspace_bytes, other.eval_workspace_bytes);
      bytes.state_bytes = std::max(bytes.state_bytes, other.state_bytes);
    }
  }
  return bytes;
}

TESSERA_LAYER_TEMPLATE
TESSERA_LAYER::moe_layer(const shape& sizes_of, const router_options& routing, const Layout& placement, Comm& comm,
                         state_memory state, const options& chosen)
    : shape_(detail::checked_shape(sizes_of, placement.num_experts())),
      options_(chosen),
      placement_(placement),
      comm_(&comm),
      router_(detail::with_sizes(routing, sizes_of)) {
  TESSERA_EXPECTS(placement.num_ranks() == comm.size(), "the layout places experts on "
                                                            << placement.num_ranks() << " ranks, the communicator has "
                                                            << comm.size());
  detail::check_spread<moe_layer>(shape_, chosen, comm);
  const layer_sizes needed = sizes(sizes_of, placement, comm.rank(), chosen);
  TESSERA_EXPECTS(state.bytes >= needed.state_bytes,
                  "state memory has " << state.bytes << " bytes, " << needed.state_bytes << " are needed");
  memory_builder builder(state, "state memory");
  state_ = state_type::layout(builder, shape_.num_experts, Router::has_bias, num_losses,
                              num_chunks(shape_.max_tokens, chosen.chunk_tokens));
  if constexpr (requires { comm.slot(); }) state_.use_slot(comm.slot());
  if constexpr (detail::layer_plan<moe_layer>::travels) detail::layer_load_kernels<moe_layer>();
}

TESSERA_LAYER_TEMPLATE
void TESSERA_LAYER::reset_state(stream_type stream) { detail::layer_reset_state(stream, *this); }

TESSERA_LAYER_TEMPLATE
void TESSERA_LAYER::forward(stream_type stream, pass mode, const inputs& in, const weights& params,
                            matrix_view<storage> y, saved_memory saved, workspace_memory workspace) {
  [[maybe_unused]] const nvtx_range range("tessera::moe_layer::forward");
  detail::layer_forward(stream, *this, mode, in, params, y, saved, workspace);
}

TESSERA_LAYER_TEMPLATE
void TESSERA_LAYER::backward_input(stream_type stream, const inputs& in, matrix_view<const storage> dy,
                                   const weights& params, saved_memory saved, matrix_view<storage> dx,
                                   deferred_memory deferred, workspace_memory workspace) {
  [[maybe_unused]] const nvtx_range range("tessera::moe_layer::backward_input");
  detail::layer_backward_input(stream, *this, in, dy, params, saved, dx, deferred, workspace);
}

TESSERA_LAYER_TEMPLATE
void TESSERA_LAYER::backward_weights(stream_type stream, const inputs& in, matrix_view<const storage> dy,
                                     saved_memory saved, deferred_memory deferred, const gradients& grads, write mode) {
  [[maybe_unused]] const nvtx_range range("tessera::moe_layer::backward_weights");
  detail::layer_backward_weights(stream, *this, in, dy, saved, deferred, grads, mode);
}

TESSERA_LAYER_TEMPLATE
void TESSERA_LAYER::end_step(stream_type stream, Comm& batch) {
  [[maybe_unused]] const nvtx_range range("tessera::moe_layer::end_step");
  detail::layer_end_step(stream, *this, batch);
}

#undef TESSERA_LAYER_TEMPLATE
#undef TESSERA_LAYER

TESSERA_NAMESPACE_END
