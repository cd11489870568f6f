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
#include <tessera/core/views.hpp>
#include <tessera/moe/moe_layer.hpp>
#include <tessera/pipeline/overlap.hpp>
#include <tessera/pipeline/stage.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// `forward(stream, item, x, h, u)`: from the block's input `x [T, d]` the residual stream `h [T, d]` and the input of
/// the experts `u [T, d]`, both overwritten.
template <class M, class S>
concept mixer_has_forward = requires(M& m, host_stream stream, const work_item& item, matrix_view<const S> x,
                                     matrix_view<S> h, matrix_view<S> u) {
  m.forward(stream, item, x, h, u);
};

/// `backward_input(stream, item, x, dh, du, dx)`: `dx [T, d]` from the gradients of `h` and `u`.
template <class M, class S>
concept mixer_has_backward_input = requires(M& m, host_stream stream, const work_item& item, matrix_view<const S> x,
                                            matrix_view<const S> dh, matrix_view<const S> du, matrix_view<S> dx) {
  m.backward_input(stream, item, x, dh, du, dx);
};

/// `backward_weights(stream, item, x, dh, du)`: any time after `backward_input`; `item` tells where gradients go.
template <class M, class S>
concept mixer_has_backward_weights = requires(M& m, host_stream stream, const work_item& item, matrix_view<const S> x,
                                              matrix_view<const S> dh, matrix_view<const S> du) {
  m.backward_weights(stream, item, x, dh, du);
};

/// What comes before the experts in a block: norms, attention, the residual. What it keeps from forward to backward
/// lies in its own memory, by `work_item::slot`. In a block without experts it is the whole block: `h` is the block's
/// output, and `u` and `du` have no columns.
template <class M, class S>
concept mixer = mixer_has_forward<M, S> && mixer_has_backward_input<M, S> && mixer_has_backward_weights<M, S>;

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

/// A chunk of blocks for `overlap_stage`. Host memory: phases return when done.
///
/// `forward_attention` computes mixer, gate and routing; `forward_dispatch` exchanges the routing and the rows;
/// `forward_mlp` runs routed and shared experts; `forward_combine` brings rows home and adds `h`. Backward accordingly;
/// the gradient of the gate belongs to attention. The result of a layer is bit for bit that of `moe_layer::forward`,
/// `backward_input` and `backward_weights` with `pass::train`; the sum with `h` is taken in `Layer::accumulate` and
/// rounded once.
///
/// Token ids, given expert ids and sequence offsets, where the router's policies need them, come from a member of the
/// mixer, `typename Layer::inputs inputs(const work_item&)`, whose `x` is not read and whose memory stays until
/// `backward_attention_weights`; without it the rows of a micro-batch are one sequence.
///
/// All blocks have the same width d. Layers may share one expert-parallel communicator; all its ranks run the same
/// schedule. With `host_lanes` the communicator is used from two threads, one at a time.
/// @tparam Layer A `moe_layer` over a host communicator. @tparam Mixer What comes before the experts.
template <class Layer, class Mixer>
class moe_chunk {
  static_assert(host_communicator<typename Layer::communicator_type>,
                "moe_chunk: the layer must be a moe_layer over a communicator of host memory: comm::self<space::host>, "
                "comm::threads, comm::mpi");
  static_assert(mixer<Mixer, typename Layer::storage>,
                "moe_chunk: a mixer needs forward(stream, item, x, h, u), backward_input(stream, item, x, dh, du, dx) "
                "and backward_weights(stream, item, x, dh, du)");

 public:
  using element = typename Layer::storage;                    ///< Type of activations between stages.
  using block = moe_block<Layer, Mixer>;                      ///< A layer.
  using forward_type = forward_call<element, space::host>;    ///< What forward phases are told.
  using backward_type = backward_call<element, space::host>;  ///< What backward phases are told.

  /// Bytes that a chunk needs.
  /// @param blocks    Its layers. @param max_rows Bound of the rows of a micro-batch. @param width d.
  /// @param num_slots `execution_plan::saved_slots` of the chunk.
  static moe_chunk_sizes sizes(std::span<const block> blocks, std::int64_t max_rows, std::int64_t width, int num_slots);

  /// @param blocks    At least one layer; copied, what they point to outlives the chunk.
  /// @param max_rows  Bound of the rows of a micro-batch; at most `max_tokens` of every layer.
  /// @param width     d. @param num_slots `execution_plan::saved_slots` of the chunk.
  /// @param saved     `saved_bytes` bytes. @param deferred `deferred_bytes` bytes. @param workspace `workspace_bytes`
  /// bytes. All outlive the chunk.
  /// @throws invalid_argument if sizes and memory do not fit each other.
  moe_chunk(std::span<const block> blocks, std::int64_t max_rows, std::int64_t width, int num_slots, saved_memory saved,
            deferred_memory deferred, workspace_memory workspace);

  /// Number of blocks.
  int num_layers() const noexcept { return static_cast<int>(blocks_.size()); }

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

  /// Ends what waits on the expert-parallel group. @param text For the others' message.
  void fail([[maybe_unused]] const std::string& text) {
    for (const block& b : blocks_) {
      if constexpr (requires { b.layer->comm().fail(text); }) {
        if (b.layer != nullptr) b.layer->comm().fail(text);
      }
    }
  }

 private:
  using accumulate = typename Layer::accumulate;
  struct memory;  // of one block and slot
  struct parts;   // of the layer, carved from it

  const block& block_of(int layer) const { return blocks_[static_cast<std::size_t>(layer)]; }
  memory& memory_of(int layer, int slot) {
    return memories_[static_cast<std::size_t>(layer) * static_cast<std::size_t>(num_slots_) +
                     static_cast<std::size_t>(slot)];
  }
  matrix_view<element> view(element* data, std::int64_t rows) const { return {data, rows, width_}; }
  template <class Call>
  matrix_view<const element> input(const Call& call);
  matrix_view<element> output(const forward_type& call);
  matrix_view<const element> output_gradient(const backward_type& call);
  matrix_view<element> input_gradient(const backward_type& call);
  template <class Call>
  matrix_view<const element> experts_input(const Call& call);
  template <class Call>
  typename Layer::inputs inputs_of(const Call& call);

  std::vector<block> blocks_;
  std::int64_t max_rows_;
  std::int64_t width_;
  int num_slots_;
  std::vector<memory> memories_;  // [layer][slot]
  element* residual_ = nullptr;   // h of the forward in progress
  workspace_memory forward_scratch_;
  workspace_memory backward_scratch_;
};

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/moe_chunk.hpp>
