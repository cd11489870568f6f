// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A chunk of the overlap made of mixture-of-experts layers: the stages of `moe_layer` spread over the phases.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/moe/detail/host_steps.hpp>
#include <tessera/moe/moe_layer.hpp>
#include <tessera/pipeline/overlap.hpp>
#include <tessera/pipeline/stage.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// `forward(stream, item, x, h, u)`: from the block's input `x [T, d]` the residual stream `h [T, d]` and the input of
/// the experts `u [T, d]`, both overwritten.
template <class M, class S, class Space = space::host>
concept mixer_has_forward = requires(M& m, stream_ref<Space> stream, const work_item& item, matrix_view<const S> x,
                                     matrix_view<S> h, matrix_view<S> u) {
  m.forward(stream, item, x, h, u);
};

/// `backward_input(stream, item, x, dh, du, dx)`: `dx [T, d]` from the gradients of `h` and `u`.
template <class M, class S, class Space = space::host>
concept mixer_has_backward_input = requires(M& m, stream_ref<Space> stream, const work_item& item,
                                            matrix_view<const S> x, matrix_view<const S> dh, matrix_view<const S> du,
                                            matrix_view<S> dx) {
  m.backward_input(stream, item, x, dh, du, dx);
};

/// `backward_weights(stream, item, x, dh, du)`: any time after `backward_input`; `item` tells where gradients go.
template <class M, class S, class Space = space::host>
concept mixer_has_backward_weights = requires(M& m, stream_ref<Space> stream, const work_item& item,
                                              matrix_view<const S> x, matrix_view<const S> dh,
                                              matrix_view<const S> du) {
  m.backward_weights(stream, item, x, dh, du);
};

/// What comes before the experts in a block: norms, attention, the residual. What it keeps from forward to backward
/// lies in its own memory, by `work_item::slot`. In a block without experts it is the whole block: `h` is the block's
/// output, and `u` and `du` have no columns. Host: calls return when done. Device: they enqueue.
template <class M, class S, class Space = space::host>
concept mixer =
    mixer_has_forward<M, S, Space> && mixer_has_backward_input<M, S, Space> && mixer_has_backward_weights<M, S, Space>;

/// One layer of a `moe_chunk`: `(h, u) = mixer(x)`, `y = h + experts(u)`. Without experts (`layer` null) `y = h`: a
/// dense layer, the embedding as the first block of the first stage, or norm, head and loss as the last block of the
/// last stage (whose `h` has no columns).
/// @tparam Layer A `moe_layer`. @tparam Mixer What comes before the experts.
template <class Layer, class Mixer>
struct moe_block {
  Mixer* before = nullptr;               ///< What comes before the experts.
  Layer* layer = nullptr;                ///< The experts, with their router; null: none.
  typename Layer::weights weights = {};  ///< Parameters of `layer`.
  /// `[gradient_rows]`: gradients of `layer`, one set per `work_item::gradient_row`.
  std::span<const typename Layer::gradients> gradients = {};
};

/// Bytes of each memory class of a `moe_chunk`.
struct moe_chunk_sizes {
  std::size_t saved_bytes = 0;      ///< From forward to the weight part of the backward, all slots.
  std::size_t deferred_bytes = 0;   ///< From the input part to the weight part of the backward, all slots.
  std::size_t workspace_bytes = 0;  ///< During one forward and one backward.
};

/// Blocks of a chunk and their memory: what `moe_chunk` of both memory spaces has in common.
/// @tparam Layer A `moe_layer`. @tparam Mixer What comes before the experts.
template <class Layer, class Mixer>
class moe_chunk_blocks {
 public:
  using space = typename Layer::space;                  ///< Where memory lies.
  using element = typename Layer::storage;              ///< Type of activations between stages.
  using block = moe_block<Layer, Mixer>;                ///< A layer.
  using forward_type = forward_call<element, space>;    ///< What forward phases are told.
  using backward_type = backward_call<element, space>;  ///< What backward phases are told.

  /// Bytes that a chunk needs.
  /// @param blocks    Its layers. @param max_rows Bound of the rows of a micro-batch. @param width d.
  /// @param num_slots `execution_plan::saved_slots` of the chunk.
  static moe_chunk_sizes sizes(std::span<const block> blocks, std::int64_t max_rows, std::int64_t width, int num_slots);

  /// Number of blocks.
  int num_layers() const noexcept { return static_cast<int>(blocks_.size()); }

  /// Ends what waits on the expert-parallel group. @param text For the others' message.
  void fail([[maybe_unused]] const std::string& text) {
    for (const block& b : blocks_) {
      if constexpr (requires { b.layer->comm().fail(text); }) {
        if (b.layer != nullptr) b.layer->comm().fail(text);
      }
    }
  }

 protected:
  struct memory;  ///< Of one block and slot.

  /// Checks and lays out. @param blocks,max_rows,width,num_slots,saved,deferred,workspace As for `moe_chunk`.
  moe_chunk_blocks(std::span<const block> blocks, std::int64_t max_rows, std::int64_t width, int num_slots,
                   saved_memory saved, deferred_memory deferred, workspace_memory workspace);

  /// Block `layer`.
  const block& block_of(int layer) const { return blocks_[static_cast<std::size_t>(layer)]; }
  /// Memory of a block. @param layer Which. @param slot Of the micro-batch.
  memory& memory_of(int layer, int slot) {
    return memories_[static_cast<std::size_t>(layer) * static_cast<std::size_t>(num_slots_) +
                     static_cast<std::size_t>(slot)];
  }
  /// `[rows, width]`. @param data Where. @param rows How many.
  matrix_view<element> view(element* data, std::int64_t rows) const { return {data, rows, width_}; }
  /// @throws invalid_argument if there is no room for a micro-batch. @param item It.
  void expect_room(const work_item& item) const;
  /// Input of a block. @param call The phase.
  template <class Call>
  matrix_view<const element> input(const Call& call);
  /// Output of a block. @param call The phase.
  matrix_view<element> output(const forward_type& call);
  /// Gradient of the output. @param call The phase.
  matrix_view<const element> output_gradient(const backward_type& call);
  /// Gradient of the input. @param call The phase.
  matrix_view<element> input_gradient(const backward_type& call);
  /// Input of the experts. @param call The phase.
  template <class Call>
  matrix_view<const element> experts_input(const Call& call);
  /// Gradients of a block's parameters, of the micro-batch's row. @param call The phase. @throws invalid_argument if
  /// the block has no such row.
  const typename Layer::gradients& gradients_of(const backward_type& call) const;
  /// What the layer is given: what its router sees and, in forward, h as the residual. @param call The phase.
  template <class Call>
  typename Layer::inputs inputs_of(const Call& call);

  std::vector<block> blocks_;          ///< The blocks.
  std::int64_t max_rows_;              ///< Bound of the rows.
  std::int64_t width_;                 ///< d.
  int num_slots_;                      ///< Slots of each block.
  std::vector<memory> memories_;       ///< `[layer][slot]`.
  element* residual_ = nullptr;        ///< h of the forward in progress.
  workspace_memory forward_scratch_;   ///< Of the forward in progress.
  workspace_memory backward_scratch_;  ///< Of the backward in progress.
};

/// A chunk of blocks for `overlap_stage`. This is the half of host memory, whose phases return when done; for layers in
/// device memory the specialisation in `moe_chunk_device.hpp` is chosen.
///
/// `forward_attention` computes mixer, gate and routing; `forward_dispatch` exchanges the routing and the rows;
/// `forward_mlp` runs routed and shared experts; `forward_combine` brings rows home and adds `h`. Backward accordingly;
/// the gradient of the gate belongs to attention. The result of a layer is bit for bit that of `moe_layer::forward`
/// with `h` as `layer_inputs::residual`, `backward_input` and `backward_weights` with `pass::train`.
///
/// Token ids, given expert ids and sequence offsets, where the router's policies need them, come from a member of the
/// mixer, `typename Layer::inputs inputs(const work_item&)`, whose `x` and `residual` are not read and whose memory
/// stays until `backward_attention_weights`; without it the rows of a micro-batch are one sequence. With losses
/// `forward_combine` asks it, too, with `host_lanes` from another thread while other members may run.
///
/// All blocks have the same width d. Layers may share one expert-parallel communicator; all its ranks run the same
/// schedule. With `host_lanes` the communicator is used from two threads, one at a time.
/// @tparam Layer A `moe_layer` over a host communicator. @tparam Mixer What comes before the experts.
template <class Layer, class Mixer>
class moe_chunk : public moe_chunk_blocks<Layer, Mixer> {
  static_assert(host_communicator<typename Layer::communicator_type>,
                "moe_chunk: the layer must be a moe_layer over a communicator: comm::self<Space>, comm::threads, "
                "comm::mpi");
  static_assert(mixer<Mixer, typename Layer::storage>,
                "moe_chunk: a mixer needs forward(stream, item, x, h, u), backward_input(stream, item, x, dh, du, dx) "
                "and backward_weights(stream, item, x, dh, du)");

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
  /// bytes. All outlive the chunk.
  /// @throws invalid_argument if sizes and memory do not fit each other.
  moe_chunk(std::span<const block> blocks, std::int64_t max_rows, std::int64_t width, int num_slots, saved_memory saved,
            deferred_memory deferred, workspace_memory workspace)
      : base(blocks, max_rows, width, num_slots, saved, deferred, workspace) {}

  /// Mixer, gate and routing. @param call The phase.
  void forward_attention(const forward_type& call);
  /// Routing and rows to the owners of the experts. @param call The phase.
  void forward_dispatch(const forward_type& call);
  /// The experts. @param call The phase.
  void forward_mlp(const forward_type& call);
  /// Rows home, and the sum with the residual. @param call The phase.
  void forward_combine(const forward_type& call);
  /// Gradients of the output to the owners. @param call The phase.
  void backward_combine(const backward_type& call);
  /// Gradients of the experts' inputs. @param call The phase.
  void backward_mlp_input(const backward_type& call);
  /// Gradients of the experts' weights. @param call The phase.
  void backward_mlp_weights(const backward_type& call);
  /// Input gradients home. @param call The phase.
  void backward_dispatch(const backward_type& call);
  /// Gradients through routing, gate and mixer. @param call The phase.
  void backward_attention_input(const backward_type& call);
  /// Gradients of the gate's and the mixer's weights. @param call The phase.
  void backward_attention_weights(const backward_type& call);

 private:
  using memory = typename base::memory;

  tessera::detail::host_forward_steps<Layer> steps_of(const forward_type& call, const typename Layer::inputs& in);
  tessera::detail::host_backward_steps<Layer> steps_of(const backward_type& call, const typename Layer::inputs& in);
  tessera::detail::host_weight_steps<Layer> weight_steps_of(const backward_type& call);
  template <class Call>
  typename Layer::inputs rows_alone(const Call& call);

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

#include <tessera/pipeline/detail/moe_chunk.hpp>
#include <tessera/pipeline/moe_chunk_device.hpp>
