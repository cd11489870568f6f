// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What the model needs from a mixture-of-experts layer, whatever its router, combine policy and communicator are.
///
/// The library states structure by types. The model is one type, so this interface erases them at the granularity of a
/// layer call: `layer_block` in layers.hpp implements it for every `tessera::moe_layer`.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <tessera/core/passes.hpp>
#include <tessera/moe/state.hpp>

#include "parameters.hpp"

namespace train_lm {

/// How the tokens of an expert-parallel group divide into calls of the layer. In training one call has the tokens of
/// one chunk, which one rank brings: a gradient then belongs to a chunk, whoever holds the chunk and the expert.
struct chunk_calls {
  std::vector<std::int64_t> chunks;  ///< Chunks of each rank of the group, which are consecutive in the global order.
  std::int64_t chunk_rows = 0;       ///< Tokens of a chunk.
  std::int64_t max_rows = 0;         ///< Most tokens of any rank, for calls that do not train.

  /// Chunks of the group.
  std::int64_t total() const {
    std::int64_t sum = 0;
    for (const std::int64_t count : chunks) sum += count;
    return sum;
  }
};

/// Weights of the experts of one rank.
template <class A>
struct expert_tensors {
  const A* up = nullptr;    ///< `[slots, 2 n, d]`, gate and up.
  const A* down = nullptr;  ///< `[slots, d, n]`.
};

/// Where the gradients of the experts of one rank go.
template <class A>
struct expert_contributions {
  A* up = nullptr;          ///< `[count]` times `[slots, 2 n, d]`, `stride` elements apart.
  A* down = nullptr;        ///< The same for `[slots, d, n]`.
  std::int64_t stride = 0;  ///< Elements from one contribution to the next.
  std::int64_t count = 0;   ///< One for each chunk of the group in their order, or 1: their sum in this order.
};

/// The routed half of one block. All calls are collective over the expert-parallel group.
template <class A>
class moe_block {
 public:
  virtual ~moe_block() = default;

  /// Appends the experts' tensors. @param name Of the block.
  virtual void add_parameters(parameter_table& table, const std::string& name) const = 0;

  /// Initial values of the experts. @param name Of the block. @param deviation Of the up projections. @param
  /// depth_scale Of the down projections relative to their width. @param up,down As in `expert_tensors`.
  virtual void initialize(std::uint64_t seed, const std::string& name, double deviation, double depth_scale, A* up,
                          A* down) const = 0;

  /// `y [rows, d]` from `x [rows, d]`. @param gate `[E, d]`, replicated.
  virtual void forward(ts::pass pass, std::int64_t rows, const A* x, const A* gate, const expert_tensors<A>& experts,
                       A* y) = 0;

  /// Gradients of the last training forward: `dx [rows, d]` overwritten, the experts' in `gradients`, the gate's as
  /// contributions `dgate [chunks, E, d]`.
  virtual void backward(std::int64_t rows, const A* x, const A* dy, const A* gate, const expert_tensors<A>& experts,
                        A* dx, A* dgate, const expert_contributions<A>& gradients) = 0;

  /// After the optimizer's step: moves the selection bias, where the router has one. Collective over all ranks.
  virtual void end_step(float rate) = 0;

  /// Pairs of each expert in the optimizer step that `end_step` has ended, over all ranks: `[E]`.
  virtual std::span<const std::int64_t> load() const = 0;
  /// The share that a chunk of this rank has in the auxiliary losses of the last training forward, coefficients
  /// included; 0 without any.
  virtual double auxiliary_loss(std::int64_t chunk) const = 0;
  /// What the layer remembers between steps: selection bias and counters.
  virtual std::vector<ts::named_array> state() const = 0;
};

}  // namespace train_lm
