// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <tessera/comm/self.hpp>
#include <tessera/core/chunks.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/views.hpp>
#include <tessera/moe/detail/layer_memory.hpp>
#include <tessera/moe/shape.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// What both halves of moe_layer refuse, before anything is enqueued or changed. Only extents, strides and addresses are
// looked at: the data may be on a device.

template <class Layer>
void check_tokens(const Layer& layer, const typename Layer::inputs& in) {
  const shape& s = layer.dims();
  TESSERA_EXPECTS(in.x.rows <= s.max_tokens, "x has " << in.x.rows << " tokens, the layer was made for max_tokens = "
                                                      << s.max_tokens << " at most");
  expect_matrix(in.x, -1, s.hidden, "x");
}

template <class Layer>
void check_weights(const Layer& layer, const typename Layer::weights& params) {
  const shape& s = layer.dims();
  expect_matrix(params.gate, s.num_experts, s.hidden, "the gate's weight");
  TESSERA_EXPECTS((params.gate_bias != nullptr) == s.gate_bias,
                  "gate_bias is " << (params.gate_bias == nullptr ? "null" : "given")
                                  << ", but the shape was made with gate_bias = " << (s.gate_bias ? "true" : "false"));
}

// A rank without a chunk contributes nothing to replicated parameters, so it needs no room for them.
template <class Gradients>
void check_gate_gradients(const shape& s, const Gradients& grads, std::int64_t chunks) {
  TESSERA_EXPECTS(grads.gate != nullptr || chunks == 0, "the gradient of the gate has no data");
  TESSERA_EXPECTS((grads.gate_bias != nullptr) == s.gate_bias || chunks == 0,
                  "the gradient of gate_bias is "
                      << (grads.gate_bias == nullptr ? "null" : "given")
                      << ", but the shape was made with gate_bias = " << (s.gate_bias ? "true" : "false"));
}

// A layer between GPUs, when it is made.
template <class Layer>
void check_spread(const shape& s, const typename Layer::options& chosen, typename Layer::communicator_type& comm) {
  if constexpr (std::is_same_v<typename Layer::space, space::device> &&
                !std::is_same_v<typename Layer::communicator_type, comm::self<space::device>>) {
    int ranks_per_host = 0;
    if constexpr (requires { comm.ranks_per_host(); }) ranks_per_host = comm.ranks_per_host();
    TESSERA_EXPECTS(host_grid::make(comm.size(), chosen.dispatch.ranks_per_host).ranks_per_host ==
                        host_grid::make(comm.size(), ranks_per_host).ranks_per_host,
                    "moe_layer: dispatch_options::ranks_per_host = " << chosen.dispatch.ranks_per_host
                                                                     << ", the communicator has hosts of "
                                                                     << ranks_per_host << " ranks (0: all)");
    if (goes_by_host<typename Layer::communicator_type>(chosen.dispatch)) return;
    if constexpr (requires { comm.direct(); }) {
      TESSERA_EXPECTS(comm.direct(), "moe_layer: kernels cannot reach the memory of other ranks: "
                                         << comm.reason() << "; with dispatch_options::host_sized rows go by NCCL");
    }
    constexpr std::size_t line = 16;
    TESSERA_EXPECTS(
        static_cast<std::size_t>(s.hidden) * sizeof(typename Layer::storage) % line == 0,
        "moe_layer: hidden = " << s.hidden << ": rows that travel between GPUs are multiples of " << line << " bytes");
  }
}

// The residual, without the sizes that a caller may have given to one without data.
template <class Layer>
matrix_view<const typename Layer::storage> residual_of(const typename Layer::inputs& in) {
  if (in.residual.data == nullptr) return {};
  return in.residual;
}

template <class Layer>
void check_forward(const Layer& layer, const typename Layer::inputs& in, const typename Layer::weights& params,
                   const matrix_view<typename Layer::storage>& y) {
  check_tokens(layer, in);
  check_weights(layer, params);
  expect_matrix(y, in.x.rows, layer.dims().hidden, "y");
  expect_disjoint(in.x, "x", y, "y");
  if (in.residual.data == nullptr) return;
  expect_matrix(in.residual, y.rows, y.cols, "the residual");
  expect_disjoint(in.residual, "the residual", y, "y");
}

template <class Layer>
void check_backward_input(const Layer& layer, const typename Layer::inputs& in,
                          const matrix_view<const typename Layer::storage>& dy, const typename Layer::weights& params,
                          const matrix_view<typename Layer::storage>& dx) {
  check_tokens(layer, in);
  check_weights(layer, params);
  expect_matrix(dy, in.x.rows, layer.dims().hidden, "dy");
  expect_matrix(dx, in.x.rows, layer.dims().hidden, "dx");
  expect_disjoint(in.x, "x", dx, "dx");
  expect_disjoint(dy, "dy", dx, "dx");
}

template <class Layer>
void check_backward_weights(const Layer& layer, const typename Layer::inputs& in,
                            const matrix_view<const typename Layer::storage>& dy,
                            const typename Layer::gradients& grads) {
  check_tokens(layer, in);
  expect_matrix(dy, in.x.rows, layer.dims().hidden, "dy");
  check_gate_gradients(layer.dims(), grads, num_chunks(in.x.rows, layer.get_options().chunk_tokens));
}

}  // namespace detail

TESSERA_NAMESPACE_END
