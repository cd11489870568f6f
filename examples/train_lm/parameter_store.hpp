// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Where the model's parameters are while it uses them, and where its gradients go.

#include <cstdint>
#include <string>

#include "parameters.hpp"

namespace train_lm {

/// Tensors that are used together.
struct parameter_group {
  std::string name;       ///< For messages.
  parameter_table table;  ///< The tensors.
  bool experts = false;   ///< Experts of this expert-parallel rank; otherwise the same on all ranks.
};

/// Whole gradients of a group.
template <class A>
struct contributions_of {
  A* data = nullptr;        ///< `[count]` flat arrays as the group's table says, `stride` elements apart.
  std::int64_t stride = 0;  ///< Elements from one contribution to the next.
  std::int64_t count = 0;   ///< Contributions: chunks of this rank; for experts of the group, or 1 for their sum.
};

/// Lends parameters to the model, group by group. All calls are collective.
template <class A>
class parameter_store {
 public:
  virtual ~parameter_store() = default;
  /// The whole group as one flat array, until `release`.
  virtual const A* use(int group) = 0;
  /// The group is not needed for now.
  virtual void release(int group) = 0;
  /// Where the gradients of a group go. Not initialised.
  virtual contributions_of<A> gradients(int group) = 0;
  /// The gradients of a group are written: sums them over chunks and ranks.
  virtual void reduce(int group) = 0;
};

}  // namespace train_lm
