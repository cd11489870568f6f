// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tessera/core/memory.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// The device half of moe_layer: declared here, defined where the layer is instantiated. The stream's type chooses the
// half.

template <class Layer>
void layer_forward(device_stream stream, const Layer& layer, pass mode, const typename Layer::inputs& in,
                   const typename Layer::weights& params, matrix_view<typename Layer::storage> y, saved_memory saved,
                   workspace_memory workspace);

template <class Layer>
void layer_backward_input(device_stream stream, const Layer& layer, const typename Layer::inputs& in,
                          matrix_view<const typename Layer::storage> dy, const typename Layer::weights& params,
                          saved_memory saved, matrix_view<typename Layer::storage> dx, deferred_memory deferred,
                          workspace_memory workspace);

template <class Layer>
void layer_backward_weights(device_stream stream, const Layer& layer, const typename Layer::inputs& in,
                            matrix_view<const typename Layer::storage> dy, saved_memory saved, deferred_memory deferred,
                            const typename Layer::gradients& grads, write mode);

// Loads the kernels of a layer between GPUs onto the current device.
template <class Layer>
void layer_load_kernels();

template <class Layer>
void layer_reset_state(device_stream stream, const Layer& layer);

template <class Layer>
void layer_end_step(device_stream stream, const Layer& layer, typename Layer::communicator_type& batch);

}  // namespace detail

TESSERA_NAMESPACE_END
