// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a rank of a pipeline can do next: the word that schedules are lists of.

#include <cstdint>
#include <ostream>
#include <string>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// The kinds of action. A backward is done whole, or in two parts of which the second may come much later.
enum class action_kind : std::uint8_t {
  forward,           ///< Forward of a stage.
  backward,          ///< Its whole backward: gradients of the input and of the weights.
  backward_input,    ///< The part that the previous stage waits for: the gradient of the input.
  backward_weights,  ///< The part that nobody waits for: the gradients of the weights.
  overlapped,        ///< The forward of one micro-batch and the whole backward of another, interleaved.
  send_forward,      ///< Sends this stage's output to the next stage.
  receive_forward,   ///< Receives this stage's input from the previous stage.
  send_backward,     ///< Sends the gradient of this stage's input to the previous stage.
  receive_backward,  ///< Receives the gradient of this stage's output from the next stage.
};

/// One action of one rank. `chunk` counts the stages that the rank holds, and micro-batches are counted over the whole
/// pipeline. Sends and receives name the stage on *this* rank; the other side follows from the schedule's routes.
struct action {
  action_kind kind = action_kind::forward;  ///< What is done.
  int chunk = 0;                            ///< Which of the rank's stages; of the forward, in an overlapped pair.
  int micro_batch = 0;                      ///< Of which micro-batch; of the forward, in an overlapped pair.
  int backward_chunk = -1;                  ///< Only in an overlapped pair: which stage's backward.
  int backward_micro_batch = -1;            ///< Only in an overlapped pair: of which micro-batch.

  /// The same action.
  constexpr bool operator==(const action&) const = default;
};

/// Whether `kind` sends or receives. A maximal run of such actions is one batch: all its messages are under way at
/// once (one `exchange` of the communicator), and the rank goes on when all have arrived.
constexpr bool is_communication(action_kind kind) { return kind >= action_kind::send_forward; }

/// Whether `kind` sends.
constexpr bool is_send(action_kind kind) {
  return kind == action_kind::send_forward || kind == action_kind::send_backward;
}

/// Whether `kind` receives.
constexpr bool is_receive(action_kind kind) {
  return kind == action_kind::receive_forward || kind == action_kind::receive_backward;
}

/// Whether the action computes a forward, alone or in a pair.
constexpr bool has_forward(action_kind kind) { return kind == action_kind::forward || kind == action_kind::overlapped; }

/// Whether the action computes gradients of a stage's input.
constexpr bool has_backward_input(action_kind kind) {
  return kind == action_kind::backward || kind == action_kind::backward_input || kind == action_kind::overlapped;
}

/// Whether the action computes gradients of a stage's weights.
constexpr bool has_backward_weights(action_kind kind) {
  return kind == action_kind::backward || kind == action_kind::backward_weights || kind == action_kind::overlapped;
}

/// Chunk of the backward within the action. @param a An action for which `has_backward_input` or
/// `has_backward_weights` holds.
constexpr int backward_chunk_of(const action& a) {
  return a.kind == action_kind::overlapped ? a.backward_chunk : a.chunk;
}

/// Micro-batch of the backward within the action. @param a As for `backward_chunk_of`.
constexpr int backward_micro_batch_of(const action& a) {
  return a.kind == action_kind::overlapped ? a.backward_micro_batch : a.micro_batch;
}

/// The letters of `kind` in printed schedules: `F`, `B`, `I` (input part), `W` (weight part), `F&B`, and `sF rF sB rB`
/// of communication.
constexpr const char* symbol_of(action_kind kind) {
  switch (kind) {
    case action_kind::forward:
      return "F";
    case action_kind::backward:
      return "B";
    case action_kind::backward_input:
      return "I";
    case action_kind::backward_weights:
      return "W";
    case action_kind::overlapped:
      return "F&B";
    case action_kind::send_forward:
      return "sF";
    case action_kind::receive_forward:
      return "rF";
    case action_kind::send_backward:
      return "sB";
    case action_kind::receive_backward:
      return "rB";
  }
  return "?";
}

/// The action as text: `F3`, `B3'`, `F4'&B2`, `rF5`; a stroke for each chunk after the first.
inline std::string to_string(const action& a) {
  const auto one = [](const char* symbol, int chunk, int micro_batch) {
    return symbol + std::to_string(micro_batch) + std::string(static_cast<std::size_t>(chunk > 0 ? chunk : 0), '\'');
  };
  if (a.kind == action_kind::overlapped) {
    return one("F", a.chunk, a.micro_batch) + "&" + one("B", a.backward_chunk, a.backward_micro_batch);
  }
  return one(symbol_of(a.kind), a.chunk, a.micro_batch);
}

/// Writes the action as text. @param out Where to. @param a The action.
inline std::ostream& operator<<(std::ostream& out, const action& a) { return out << to_string(a); }

}  // namespace pipeline

TESSERA_NAMESPACE_END
