// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What the executor asks of a stage: forward, and a backward in two parts that may run at different times.

#include <concepts>
#include <cstdint>
#include <string>
#include <type_traits>

#include <tessera/core/error.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/pipeline/action.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// One micro-batch at one stage: what every call of a stage is told.
struct work_item {
  int stage = 0;          ///< The stage, in `[0, num_stages)`.
  int chunk = 0;          ///< Which of the rank's stages it is.
  int micro_batch = 0;    ///< The micro-batch, numbered over the whole pipeline.
  std::int64_t rows = 0;  ///< Its rows; may be 0.
  /// Which of the chunk's places for saved memory is this micro-batch's own from forward to `backward_weights`, in
  /// `[0, execution_plan::saved_slots[chunk])`.
  int slot = 0;
  /// Row of the chunk's gradients, `[execution_plan::gradient_rows[chunk], ...]`, that `backward_weights` writes; 0
  /// unless the stage lies in two places (`sum_mirrored_gradients`).
  int gradient_row = 0;
  /// Whether that row is overwritten or added to: `g = g + contribution`, the contribution being complete before it is
  /// added. Only `backward_weights` reads it.
  write gradient_mode = write::overwrite;
};

/// `S::element`: type of the activations between stages, the same for all stages; its bytes are its value.
template <class S>
concept stage_has_element = std::is_trivially_copyable_v<typename S::element>;

/// `forward(stream, item, x, y)`: `x [rows, width]` is the previous stage's output, `y [rows, width]` is overwritten.
template <class S, class Space>
concept stage_has_forward = requires(S& s, stream_ref<Space> stream, const work_item& item,
                                     matrix_view<const typename S::element> x, matrix_view<typename S::element> y) {
  s.forward(stream, item, x, y);
};

/// `backward_input(stream, item, x, dy, dx)`: `dy [rows, width]` is the gradient of the output, `dx [rows, width]`,
/// that of the input, is overwritten.
template <class S, class Space>
concept stage_has_backward_input = requires(S& s, stream_ref<Space> stream, const work_item& item,
                                            matrix_view<const typename S::element> x,
                                            matrix_view<const typename S::element> dy,
                                            matrix_view<typename S::element> dx) {
  s.backward_input(stream, item, x, dy, dx);
};

/// `backward_weights(stream, item, x, dy)`: any time after `backward_input` of the same micro-batch.
template <class S, class Space>
concept stage_has_backward_weights = requires(S& s, stream_ref<Space> stream, const work_item& item,
                                              matrix_view<const typename S::element> x,
                                              matrix_view<const typename S::element> dy) {
  s.backward_weights(stream, item, x, dy);
};

/// A part of a model, as the executor runs it. `x` and `dy` keep their place and their content from the call that first
/// shows them until `backward_weights` returns; `y` and `dx` belong to the stage only during the call. What else a
/// stage keeps from forward to backward lies in its own memory, in the place that `work_item::slot` names.
///
/// The first stage has no `x` and no `dx`, the last no `y` and no `dy`: those views have `rows` rows, no columns and no
/// data. The first reads the user's tokens of `item.micro_batch`; the last computes the loss in forward and starts the
/// backward from what it saved.
///
/// Host: calls return when done. Device: calls enqueue on `stream` and do not synchronise.
///
/// @tparam S The stage. @tparam Space Where activations lie, that of the communicator.
template <class S, class Space>
concept pipeline_stage = stage_has_element<S> && stage_has_forward<S, Space> && stage_has_backward_input<S, Space> &&
    stage_has_backward_weights<S, Space>;

/// `overlapped(stream, item, x, y, other, backward_item, bx, dy, dx)`: the forward of `item` in this stage and the
/// whole backward of `backward_item` in `other`, another chunk of the rank or the same, interleaved. Optional: without
/// it the executor runs the one after the other. The results are the same bits.
template <class S, class Space>
concept stage_has_overlapped = requires(S& s, stream_ref<Space> stream, const work_item& item,
                                        matrix_view<const typename S::element> x, matrix_view<typename S::element> y,
                                        S& other) {
  s.overlapped(stream, item, x, y, other, item, x, x, y);
};

/// A stage threw. Thrown on its rank with the stage's exception nested in it (`std::rethrow_if_nested`); the other
/// ranks get a `comm_error` with the same text.
class stage_error : public error {
 public:
  /// @param what        The whole sentence. @param rank The rank. @param stage The stage.
  /// @param micro_batch The micro-batch of the forward, in an overlapped pair.
  /// @param during      What was computed.
  stage_error(const std::string& what, int rank, int stage, int micro_batch, action_kind during)
      : error(what), rank_(rank), stage_(stage), micro_batch_(micro_batch), during_(during) {}

  /// The rank on which it happened.
  int rank() const noexcept { return rank_; }
  /// The stage that threw.
  int stage() const noexcept { return stage_; }
  /// The micro-batch it worked on.
  int micro_batch() const noexcept { return micro_batch_; }
  /// What it computed: a forward, a part of a backward, or an overlapped pair.
  action_kind during() const noexcept { return during_; }

 private:
  int rank_;
  int stage_;
  int micro_batch_;
  action_kind during_;
};

}  // namespace pipeline

TESSERA_NAMESPACE_END
