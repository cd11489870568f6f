// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A stage made of layers whose phases are known, so that overlapped pairs really overlap: communication of the one
/// runs under computation of the other.

#include <concepts>
#include <string>

#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/pipeline/lanes.hpp>
#include <tessera/pipeline/overlap_order.hpp>
#include <tessera/pipeline/stage.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// What the forward phases of a chunk are told.
/// @tparam T Type of activations between stages. @tparam Space Where they lie.
template <class T, memory_space Space>
struct forward_call {
  work_item item;              ///< Stage, micro-batch, slot of saved memory.
  matrix_view<const T> x;      ///< Input of the chunk, that of layer 0; unchanged until `backward_attention_weights`.
  matrix_view<T> y;            ///< Output of the chunk, that of the last layer.
  int layer = 0;               ///< Which layer.
  pipeline::lane<Space> lane;  ///< Stream and budget of the phase.
};

/// What the backward phases of a chunk are told.
/// @tparam T Type of activations between stages. @tparam Space Where they lie.
template <class T, memory_space Space>
struct backward_call {
  work_item item;           ///< Stage, micro-batch, slot of saved memory, place of gradients.
  matrix_view<const T> x;   ///< As forward saw it.
  matrix_view<const T> dy;  ///< Gradient of the chunk's output; unchanged until `backward_attention_weights`.
  matrix_view<T> dx;        ///< Gradient of the chunk's input, written by layer 0; empty in phases `..._weights` that
                            ///< run later than the rest.
  int layer = 0;            ///< Which layer.
  pipeline::lane<Space> lane;  ///< Stream and budget of the phase.
};

/// `C::element`: type of the activations between stages.
template <class C>
concept chunk_has_element = std::is_trivially_copyable_v<typename C::element>;

/// `int num_layers()`: layers of the chunk.
template <class C>
concept chunk_has_num_layers = requires(const C& c) {
  { c.num_layers() } -> std::convertible_to<int>;
};

/// `forward_attention(call)`: from the layer's input; needs `forward_combine` of the layer before.
template <class C, class Space>
concept chunk_has_forward_attention = requires(C& c, const forward_call<typename C::element, Space>& call) {
  c.forward_attention(call);
};
/// `forward_dispatch(call)`: communicates; needs `forward_attention`.
template <class C, class Space>
concept chunk_has_forward_dispatch = requires(C& c, const forward_call<typename C::element, Space>& call) {
  c.forward_dispatch(call);
};
/// `forward_mlp(call)`: needs `forward_dispatch`.
template <class C, class Space>
concept chunk_has_forward_mlp = requires(C& c, const forward_call<typename C::element, Space>& call) {
  c.forward_mlp(call);
};
/// `forward_combine(call)`: communicates and writes the layer's output; needs `forward_mlp`.
template <class C, class Space>
concept chunk_has_forward_combine = requires(C& c, const forward_call<typename C::element, Space>& call) {
  c.forward_combine(call);
};
/// `backward_combine(call)`: communicates; needs `backward_attention_input` of the layer after.
template <class C, class Space>
concept chunk_has_backward_combine = requires(C& c, const backward_call<typename C::element, Space>& call) {
  c.backward_combine(call);
};
/// `backward_mlp_input(call)`: needs `backward_combine`.
template <class C, class Space>
concept chunk_has_backward_mlp_input = requires(C& c, const backward_call<typename C::element, Space>& call) {
  c.backward_mlp_input(call);
};
/// `backward_mlp_weights(call)`: any time after `backward_mlp_input`.
template <class C, class Space>
concept chunk_has_backward_mlp_weights = requires(C& c, const backward_call<typename C::element, Space>& call) {
  c.backward_mlp_weights(call);
};
/// `backward_dispatch(call)`: communicates; needs `backward_mlp_input`.
template <class C, class Space>
concept chunk_has_backward_dispatch = requires(C& c, const backward_call<typename C::element, Space>& call) {
  c.backward_dispatch(call);
};
/// `backward_attention_input(call)`: writes the gradient of the layer's input; needs `backward_dispatch`.
template <class C, class Space>
concept chunk_has_backward_attention_input = requires(C& c, const backward_call<typename C::element, Space>& call) {
  c.backward_attention_input(call);
};
/// `backward_attention_weights(call)`: any time after `backward_attention_input`.
template <class C, class Space>
concept chunk_has_backward_attention_weights = requires(C& c, const backward_call<typename C::element, Space>& call) {
  c.backward_attention_weights(call);
};

/// A stage of a model as layers of attention, dispatch, MLP and combine. At any time at most one forward and one
/// backward of a chunk are in progress, each with one phase in the compute lane and one in the communication lane;
/// what both lanes, or forward and backward, touch at the same time must be separate memory. The weight phases may come
/// much later, with others between. A member `fail(const std::string&)` is called, where there is one, when a phase of
/// the other lane threw: it should end what waits for other ranks (the communicator's `fail`). Model: `moe_chunk`.
template <class C, class Space>
concept overlap_chunk = chunk_has_element<C> && chunk_has_num_layers<C> && chunk_has_forward_attention<C, Space> &&
    chunk_has_forward_dispatch<C, Space> && chunk_has_forward_mlp<C, Space> && chunk_has_forward_combine<C, Space> &&
    chunk_has_backward_combine<C, Space> && chunk_has_backward_mlp_input<C, Space> &&
    chunk_has_backward_mlp_weights<C, Space> && chunk_has_backward_dispatch<C, Space> &&
    chunk_has_backward_attention_input<C, Space> && chunk_has_backward_attention_weights<C, Space>;

/// A stage for `executor` from a chunk: alone it runs its phases one after another, in an overlapped pair in the order
/// of `make_overlap_order` by the given lanes. The results are the same bits either way.
/// @tparam Chunk The chunk. @tparam Lanes What runs a pair: `host_lanes`, `serial_lanes<Space>`, `device_lanes`.
template <class Chunk, lane_policy Lanes>
class overlap_stage {
  static_assert(overlap_chunk<Chunk, typename Lanes::space>,
                "overlap_stage: the chunk needs a type element, num_layers() and the ten phases forward_attention, "
                "forward_dispatch, forward_mlp, forward_combine, backward_combine, backward_mlp_input, "
                "backward_mlp_weights, backward_dispatch, backward_attention_input, backward_attention_weights. Model: "
                "moe_chunk");

 public:
  using element = typename Chunk::element;              ///< Type of activations between stages.
  using space = typename Lanes::space;                  ///< Where they lie.
  using stream_type = stream_ref<space>;                ///< Order of the work.
  using forward_type = forward_call<element, space>;    ///< What forward phases are told.
  using backward_type = backward_call<element, space>;  ///< What backward phases are told.

  /// @param chunk The layers. @param lanes What runs overlapped pairs; may be shared by the stages of a rank. Both
  /// outlive the stage. @param style Order of the phases of a pair, the same on all ranks.
  overlap_stage(Chunk& chunk, Lanes& lanes, overlap_style style = overlap_style::attention)
      : chunk_(&chunk), lanes_(&lanes), style_(style) {}

  /// The four forward phases of each layer. @param stream Order of the work. @param item The micro-batch.
  /// @param x Input. @param y Output.
  void forward(stream_type stream, const work_item& item, matrix_view<const element> x, matrix_view<element> y) {
    forward_type call{item, x, y, 0, {stream, 0}};
    for (call.layer = 0; call.layer < chunk_->num_layers(); ++call.layer) {
      chunk_->forward_attention(call);
      chunk_->forward_dispatch(call);
      chunk_->forward_mlp(call);
      chunk_->forward_combine(call);
    }
  }

  /// The backward phases for the gradient of the input. @param stream Order of the work. @param item The micro-batch.
  /// @param x Input. @param dy Gradient of the output. @param dx Gradient of the input.
  void backward_input(stream_type stream, const work_item& item, matrix_view<const element> x,
                      matrix_view<const element> dy, matrix_view<element> dx) {
    backward_type call{item, x, dy, dx, 0, {stream, 0}};
    for (call.layer = chunk_->num_layers() - 1; call.layer >= 0; --call.layer) {
      chunk_->backward_combine(call);
      chunk_->backward_mlp_input(call);
      chunk_->backward_dispatch(call);
      chunk_->backward_attention_input(call);
    }
  }

  /// The backward phases for the weights. @param stream Order of the work. @param item The micro-batch. @param x Input.
  /// @param dy Gradient of the output.
  void backward_weights(stream_type stream, const work_item& item, matrix_view<const element> x,
                        matrix_view<const element> dy) {
    backward_type call{item, x, dy, {nullptr, item.rows, 0}, 0, {stream, 0}};
    for (call.layer = chunk_->num_layers() - 1; call.layer >= 0; --call.layer) {
      chunk_->backward_mlp_weights(call);
      chunk_->backward_attention_weights(call);
    }
  }

  /// A forward here and a whole backward in `other`, interleaved. @param stream Order of the work. @param item The
  /// forward's micro-batch. @param x Its input. @param y Its output. @param other The stage that runs backward; may be
  /// this one. @param backward_item The backward's micro-batch. @param bx Input of its forward. @param dy Gradient of
  /// its output. @param dx Gradient of its input.
  void overlapped(stream_type stream, const work_item& item, matrix_view<const element> x, matrix_view<element> y,
                  overlap_stage& other, const work_item& backward_item, matrix_view<const element> bx,
                  matrix_view<const element> dy, matrix_view<element> dx) {
    const int forward_layers = chunk_->num_layers();
    const int backward_layers = other.chunk_->num_layers();
    if (forward_layers != forward_layers_ || backward_layers != backward_layers_) {
      order_ = make_overlap_order(forward_layers, backward_layers, style_);
      forward_layers_ = forward_layers;
      backward_layers_ = backward_layers;
    }
    const auto execute = [&](const overlap_node& node, const lane<space>& where) {
      if (is_forward(node.what)) {
        run_forward(node.what, forward_type{item, x, y, node.layer, where});
      } else {
        other.run_backward(node.what, backward_type{backward_item, bx, dy, dx, node.layer, where});
      }
    };
    run(stream, order_, execute, other);
  }

  /// Two forwards, here and in `other`, interleaved by the lanes of this stage: of two micro-batches, or of two parts
  /// of the tokens of one, whose counts and losses are those of two micro-batches. All ranks of a chunk's communicator
  /// call it alike.
  /// @param stream Order of the work. @param item The micro-batch here. @param x Its input. @param y Its output.
  /// @param other A stage whose chunk has as many layers, perhaps the same ones, and memory of its own. @param
  /// other_item The micro-batch there, in another slot if the chunks share what they keep. @param other_x Its input.
  /// @param other_y Its output. @throws invalid_argument if both have one chunk, or the numbers of layers differ.
  void two_forwards(stream_type stream, const work_item& item, matrix_view<const element> x, matrix_view<element> y,
                    overlap_stage& other, const work_item& other_item, matrix_view<const element> other_x,
                    matrix_view<element> other_y) {
    expect_partner(other);
    const overlap_order order = make_two_forward_order(chunk_->num_layers());
    const auto execute = [&](const overlap_node& node, const lane<space>& where) {
      if (node.batch == 0) {
        run_forward(node.what, forward_type{item, x, y, node.layer, where});
      } else {
        other.run_forward(node.what, forward_type{other_item, other_x, other_y, node.layer, where});
      }
    };
    run(stream, order, execute, other);
  }

  /// Two whole backwards, interleaved; gradients of weights are those of `item` first.
  /// @param stream Order of the work. @param item The micro-batch here. @param x Input of its forward. @param dy
  /// Gradient of its output. @param dx Gradient of its input. @param other As in `two_forwards`. @param other_item The
  /// micro-batch there; it adds to the gradients if both have one row of them. @param other_x Input of its forward.
  /// @param other_dy Gradient of its output. @param other_dx Gradient of its input.
  /// @throws invalid_argument as `two_forwards`.
  void two_backwards(stream_type stream, const work_item& item, matrix_view<const element> x,
                     matrix_view<const element> dy, matrix_view<element> dx, overlap_stage& other,
                     const work_item& other_item, matrix_view<const element> other_x,
                     matrix_view<const element> other_dy, matrix_view<element> other_dx) {
    expect_partner(other);
    const overlap_order order = make_two_backward_order(chunk_->num_layers());
    const auto execute = [&](const overlap_node& node, const lane<space>& where) {
      if (node.batch == 0) {
        run_backward(node.what, backward_type{item, x, dy, dx, node.layer, where});
      } else {
        other.run_backward(node.what, backward_type{other_item, other_x, other_dy, other_dx, node.layer, where});
      }
    };
    run(stream, order, execute, other);
  }

  /// The layers.
  Chunk& chunk() const noexcept { return *chunk_; }

 private:
  void expect_partner(const overlap_stage& other) const {
    TESSERA_EXPECTS(other.chunk_ != chunk_,
                    "overlap_stage: two batches that go the same way need a chunk each, these have one");
    TESSERA_EXPECTS(other.chunk_->num_layers() == chunk_->num_layers(),
                    "overlap_stage: two batches that go the same way have " << chunk_->num_layers() << " and "
                                                                            << other.chunk_->num_layers() << " layers");
  }

  template <class Execute>
  void run(stream_type stream, const overlap_order& order, Execute& execute, overlap_stage& other) {
    const auto fail = [&]([[maybe_unused]] const std::string& text) {
      if constexpr (requires(Chunk & c) { c.fail(text); }) {
        chunk_->fail(text);
        if (other.chunk_ != chunk_) other.chunk_->fail(text);
      }
    };
    lanes_->run(stream, order, execute, fail);
  }

  void run_forward(phase what, const forward_type& call) {
    switch (what) {
      case phase::forward_attention:
        return chunk_->forward_attention(call);
      case phase::forward_dispatch:
        return chunk_->forward_dispatch(call);
      case phase::forward_mlp:
        return chunk_->forward_mlp(call);
      default:
        return chunk_->forward_combine(call);
    }
  }

  void run_backward(phase what, const backward_type& call) {
    switch (what) {
      case phase::backward_combine:
        return chunk_->backward_combine(call);
      case phase::backward_mlp_input:
        return chunk_->backward_mlp_input(call);
      case phase::backward_mlp_weights:
        return chunk_->backward_mlp_weights(call);
      case phase::backward_dispatch:
        return chunk_->backward_dispatch(call);
      case phase::backward_attention_input:
        return chunk_->backward_attention_input(call);
      default:
        return chunk_->backward_attention_weights(call);
    }
  }

  Chunk* chunk_;
  Lanes* lanes_;
  overlap_style style_;
  overlap_order order_;
  int forward_layers_ = -1;
  int backward_layers_ = -1;
};

}  // namespace pipeline

TESSERA_NAMESPACE_END
