// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The way of a tensor from one placement to another: a list of collectives along single axes of the mesh, as data.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>
#include <tessera/mesh/axes.hpp>
#include <tessera/mesh/placement.hpp>

TESSERA_NAMESPACE_BEGIN

/// What a step does along its axis.
enum class redistribution_kind {
  all_gather,      ///< shard to replicate.
  reduce_scatter,  ///< partial to shard.
  all_reduce,      ///< partial to replicate.
  all_to_all,      ///< shard to shard: of another dimension, or of the same one in another order.
  slice,           ///< replicate to shard: each rank keeps its part, nothing moves.
  contribute,      ///< to partial: each rank keeps what it counts for, nothing moves.
};

/// One step: the placement of one axis changes.
struct redistribution_step {
  redistribution_kind kind = redistribution_kind::slice;  ///< What happens.
  int axis = 0;                                           ///< Axis of the mesh.
  placement from;                                         ///< Its placement before.
  placement to;                                           ///< Its placement afterwards.
  std::int64_t bytes = 0;                                 ///< What the rank that receives most receives.

  /// Same step.
  constexpr bool operator==(const redistribution_step&) const = default;
};

/// What the search counts for each step that communicates, on top of its bytes: about what a link moves while a
/// collective starts. It keeps small tensors from going many ways.
inline constexpr std::int64_t redistribution_start_bytes = 65536;

/// How a tensor gets from one placement to another. Plain values, the same on every rank; `redistribute` executes it.
struct redistribution_plan {
  mesh ranks;                              ///< The mesh.
  box tensor;                              ///< The whole tensor.
  placements from;                         ///< Placements before.
  placements to;                           ///< Placements afterwards.
  std::int64_t element_bytes = 0;          ///< Bytes of an element.
  std::vector<redistribution_step> steps;  ///< In this order; none where no rank has anything to do but copy.
  std::int64_t bytes = 0;                  ///< Received by the busiest rank: sum over the steps.
  std::int64_t array_elements = 0;         ///< Largest local array between two steps, over all ranks.
  std::int64_t send_elements = 0;          ///< Largest packed send buffer, over all ranks.
  std::int64_t receive_elements = 0;       ///< Largest packed receive buffer, over all ranks.

  /// Same plan.
  bool operator==(const redistribution_plan&) const = default;
};

/// The cheapest sequence of steps from one placement to another. A pure function: every rank computes the same plan
/// from the same arguments, without a message. On the way an axis has its old placement, its new one, or is replicated.
/// A step is taken only where every rank finds what it needs within its group along the step's axis, which is checked
/// index by index, so that uneven and strided shards are right. The plan with the lowest cost is taken: the bytes that
/// the busiest rank receives plus `redistribution_start_bytes` for each step that communicates; of equal ones that with
/// fewer steps. What a rank of n receives: in all_gather and all_to_all what it lacks, in reduce_scatter n-1 times its
/// part, in all_reduce `2 (n-1)/n` of the array.
///
/// Along an axis of one rank nothing needs to be done. Host: set-up code, allocates; its time grows with the number of
/// ranks and as `3^(axes)`.
/// @param ranks         The mesh.
/// @param from          Placements before, one for each axis.
/// @param to            Placements afterwards, one for each axis.
/// @param tensor        The whole tensor, `box::whole({...})`.
/// @param element_bytes Bytes of an element, at least 1.
/// @throws invalid_argument if placements do not fit the mesh and the tensor, or `element_bytes` is less than 1.
inline redistribution_plan plan_redistribution(const mesh& ranks, const placements& from, const placements& to,
                                               const box& tensor, std::int64_t element_bytes);

/// Bytes of workspace that `redistribute` needs for a plan, on every rank the same.
/// @param plan From `plan_redistribution`.
inline std::size_t redistribute_workspace_bytes(const redistribution_plan& plan);

/// For people: `all_gather(ep, dim 0) 96 B`. Host: allocates. @param step A step. @param ranks Its mesh.
inline std::string to_string(const redistribution_step& step, const mesh& ranks) {
  const std::string axis(ranks.axes[step.axis].label());
  const std::string bytes = " " + std::to_string(step.bytes) + " B";
  const std::string from_dim = ", dim " + std::to_string(step.from.dim);
  const std::string to_dim = ", dim " + std::to_string(step.to.dim);
  switch (step.kind) {
    case redistribution_kind::all_gather:
      return "all_gather(" + axis + from_dim + ")" + bytes;
    case redistribution_kind::reduce_scatter:
      return "reduce_scatter(" + axis + to_dim + ")" + bytes;
    case redistribution_kind::all_reduce:
      return "all_reduce(" + axis + ")" + bytes;
    case redistribution_kind::all_to_all:
      return "all_to_all(" + axis + from_dim + " to" + to_dim.substr(1) + ")" + bytes;
    case redistribution_kind::slice:
      return "slice(" + axis + to_dim + ")" + bytes;
    case redistribution_kind::contribute:
      break;
  }
  return "contribute(" + axis + ")" + bytes;
}

/// For people: the steps, separated by semicolons; `nothing` for a plan without steps. Host: allocates.
inline std::string to_string(const redistribution_plan& plan) {
  std::string result;
  for (const redistribution_step& step : plan.steps) {
    result += (result.empty() ? "" : "; ") + to_string(step, plan.ranks);
  }
  return result.empty() ? "nothing" : result;
}

TESSERA_NAMESPACE_END

#include <tessera/mesh/detail/redistribution_search.hpp>
