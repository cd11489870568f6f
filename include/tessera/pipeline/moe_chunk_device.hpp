// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// `moe_chunk` in device memory: the type, for any compiler. Its members are defined in `moe_chunk.cuh`.

#include <cstdint>
#include <span>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/pipeline/moe_chunk.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// A chunk of blocks in device memory, for `overlap_stage` with `serial_lanes<space::device>` or `device_lanes`. Phases
/// enqueue and return; nothing allocates, synchronises or reads device memory on the host.
///
/// The phases are the steps of `moe_layer`'s calls, in their order on the lanes' streams, so a layer's results have
/// just the bits of `forward` with `pass::train` and `h` as `layer_inputs::residual`, `backward_input` and
/// `backward_weights`. `forward_dispatch`, `forward_combine`, `backward_combine` and `backward_dispatch` alone wait for
/// other GPUs. Everything that they enqueue is on one stream in the same order on all ranks, so layers need no more
/// than one slot of `comm::symmetric`, and may share it. Over it, the chunk's saved, deferred and workspace memory come
/// from its `allocate`, and `max_rows` is the same on all ranks.
///
/// Budgets of multiprocessors: in the communication lane, the blocks that move rows; in the compute lane, of phases
/// without a head start, the first product, whose blocks would otherwise stand where communication that begins with it
/// needs room. Later products take every multiprocessor that is free.
/// @tparam Layer A `moe_layer` over a communicator of device memory. @tparam Mixer What comes before the experts.
template <class Layer, class Mixer>
requires device_communicator<typename Layer::communicator_type>
class moe_chunk<Layer, Mixer> : public moe_chunk_blocks<Layer, Mixer> {
  static_assert(
      mixer<Mixer, typename Layer::storage, space::device>,
      "moe_chunk: a mixer for device memory needs forward(stream, item, x, h, u), backward_input(stream, item, "
      "x, dh, du, dx) and backward_weights(stream, item, x, dh, du) with a device_stream");
  using base = moe_chunk_blocks<Layer, Mixer>;

 public:
  using element = typename base::element;              ///< Type of activations between stages.
  using block = typename base::block;                  ///< A layer.
  using forward_type = typename base::forward_type;    ///< What forward phases are told.
  using backward_type = typename base::backward_type;  ///< What backward phases are told.

  /// @param blocks    At least one layer; copied, what they point to outlives the chunk.
  /// @param max_rows  Bound of the rows of a micro-batch; at most `max_tokens` of every layer.
  /// @param width     d. @param num_slots `execution_plan::saved_slots` of the chunk.
  /// @param saved     `saved_bytes` bytes. @param deferred `deferred_bytes` bytes. @param workspace `workspace_bytes`
  /// bytes. All are device memory and outlive the chunk.
  /// @throws invalid_argument if sizes and memory do not fit each other.
  moe_chunk(std::span<const block> blocks, std::int64_t max_rows, std::int64_t width, int num_slots, saved_memory saved,
            deferred_memory deferred, workspace_memory workspace)
      : base(blocks, max_rows, width, num_slots, saved, deferred, workspace) {}

  /// Mixer, gate and choice of experts. @param call The phase.
  void forward_attention(const forward_type& call);
  /// Routing and rows to the owners of the experts. @param call The phase.
  void forward_dispatch(const forward_type& call);
  /// The experts, routed and shared. @param call The phase.
  void forward_mlp(const forward_type& call);
  /// Rows home, and the sum with the residual. @param call The phase.
  void forward_combine(const forward_type& call);
  /// Gradients of the output to the owners. @param call The phase.
  void backward_combine(const backward_type& call);
  /// Gradients of the experts' inputs. @param call The phase.
  void backward_mlp_input(const backward_type& call);
  /// Gradients of the experts' weights. @param call The phase.
  void backward_mlp_weights(const backward_type& call);
  /// Input gradients home, and those of the routing weights. @param call The phase.
  void backward_dispatch(const backward_type& call);
  /// Gradients through routing, gate and mixer. @param call The phase.
  void backward_attention_input(const backward_type& call);
  /// Gradients of the gate's and the mixer's weights. @param call The phase.
  void backward_attention_weights(const backward_type& call);

 private:
  using memory = typename base::memory;

  // Calls `step` with the steps of a block's layer and the multiprocessors of the phase.
  template <class Step>
  void with_forward(const forward_type& call, Step&& step);
  template <class Step>
  void with_backward(const backward_type& call, Step&& step);
  template <class Step>
  void with_weights(const backward_type& call, Step&& step);

  using base::backward_scratch_;
  using base::block_of;
  using base::experts_input;
  using base::forward_scratch_;
  using base::gradients_of;
  using base::input;
  using base::input_gradient;
  using base::inputs_of;
  using base::memory_of;
  using base::output;
  using base::output_gradient;
  using base::residual_;
  using base::view;
};

}  // namespace pipeline

TESSERA_NAMESPACE_END
