// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What the model needs from a mixture-of-experts layer, whatever its router, combine policy and communicator are.
///
/// The library states structure by types. The model is one type, so this interface erases them at the granularity of a
/// layer call: `moe_layer_block` in layers.hpp implements it for every `tessera::moe_layer`.

#include <cstdint>
#include <span>
#include <string>

#include <tessera/core/passes.hpp>

namespace train_lm {

namespace ts = tessera;

/// The routed half of one block. All calls are collective over the ranks.
template <class A>
class moe_block {
 public:
  virtual ~moe_block() = default;

  /// Initial values of the experts. @param name Of the block. @param deviation Of the up projections. @param
  /// depth_scale Of the down projections relative to their width.
  virtual void initialize(std::uint64_t seed, const std::string& name, double deviation, double depth_scale) = 0;

  /// `y [rows, d]` from `x [rows, d]`. @param gate `[E, d]`, replicated.
  virtual void forward(ts::pass pass, std::int64_t rows, const A* x, const A* gate, A* y) = 0;

  /// Gradients of the last training forward: `dx [rows, d]` overwritten, the experts' in `gradients()`, the gate's as
  /// contributions `dgate [chunks, E, d]`.
  virtual void backward(std::int64_t rows, const A* x, const A* dy, const A* gate, A* dx, A* dgate) = 0;

  /// After the optimizer's step: moves the selection bias, where the router has one.
  virtual void end_step(float rate) = 0;

  /// This rank's experts, one after another, `expert_size()` elements each.
  virtual std::span<A> weights() = 0;
  /// Gradients of `weights()`.
  virtual std::span<A> gradients() = 0;
  /// Elements of one expert.
  virtual std::int64_t expert_size() const = 0;
  /// Experts of this rank.
  virtual int num_local_experts() const = 0;
  /// The expert in a slot of this rank.
  virtual int expert_at(int slot) const = 0;

  /// Pairs of each expert in the optimizer step that `end_step` has ended, over all ranks: `[E]`.
  virtual std::span<const std::int64_t> load() const = 0;
  /// The auxiliary losses of a chunk of this rank in the last training forward, coefficients included; 0 without any.
  virtual double auxiliary_loss(std::int64_t chunk) const = 0;
};

}  // namespace train_lm
