// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The one file of the engine that compiles the layer for device memory. In an engine it is a .cu file that includes
// tessera.cuh. This one gives the layer a device half of its own, which records that it was reached and computes
// nothing: what must fit is the declarations, and those are the same for both compilers.

#include "layers.hpp"

#include "calls.hpp"

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class Layer>
void layer_forward(device_stream, const Layer&, pass, const typename Layer::inputs&, const typename Layer::weights&,
                   matrix_view<typename Layer::storage>, saved_memory, workspace_memory) {
  engine::record("forward");
}

template <class Layer>
void layer_backward_input(device_stream, const Layer&, const typename Layer::inputs&,
                          matrix_view<const typename Layer::storage>, const typename Layer::weights&, saved_memory,
                          matrix_view<typename Layer::storage>, deferred_memory, workspace_memory) {
  engine::record("backward_input");
}

template <class Layer>
void layer_backward_weights(device_stream, const Layer&, const typename Layer::inputs&,
                            matrix_view<const typename Layer::storage>, saved_memory, deferred_memory,
                            const typename Layer::gradients&, write) {
  engine::record("backward_weights");
}

template <class Layer>
void layer_reset_state(device_stream, const Layer&) {
  engine::record("reset_state");
}

template <class Layer>
void layer_end_step(device_stream, const Layer&, typename Layer::communicator_type&) {
  engine::record("end_step");
}

}  // namespace detail

TESSERA_NAMESPACE_END

template class tessera::moe_layer<engine::router, engine::experts, tessera::layout::block,
                                  tessera::comm::self<tessera::space::device>>;
