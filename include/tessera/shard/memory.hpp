// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// How much memory sharded training needs, as a pure function of groups and policy.

#include <cstddef>
#include <cstdint>
#include <vector>

#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/precision.hpp>
#include <tessera/shard/group_layout.hpp>
#include <tessera/shard/parameter.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard {

/// What the memory of a group depends on.
struct group_shape {
  std::vector<parameter> parameters;  ///< What is gathered and reduced together.
  int shard_ranks = 1;                ///< Ranks that divide the parameters.
  int shard_rank = 0;                 ///< This rank among them.
  int replicas = 1;                   ///< Ranks that hold the same parts (HSDP).
  std::int64_t max_chunks = 1;        ///< Gradient contributions of one rank, at most; the same on all ranks.

  /// Whether the gathered parameters are given up after forward and gathered again for backward. Where not, they stay
  /// until the optimizer step and have memory of their own, and so have the whole gradients: for groups that are in use
  /// at both ends of the model, and for pipelines, which would gather once per micro-batch.
  bool reshard_after_forward = true;
};

/// Choices that hold for all groups.
struct options {
  /// Groups that may be gathered while another one is in use, at least 0. As many as there are means all.
  int prefetch = 1;
  /// Whether micro-batches may leave their whole gradients unreduced (`set_requires_gradient_sync(false)`): every group
  /// then has memory for its whole gradients, instead of all sharing that of the largest one.
  bool accumulate_unsharded = false;
};

/// Bytes on one rank, alignment included. State lives as long as training; step memory from the first gather to the
/// end of `step`.
struct memory_sizes {
  std::size_t parameters = 0;      ///< State: parts in the storage type.
  std::size_t masters = 0;         ///< State: parts in the accumulation type, where that is another one.
  std::size_t moments = 0;         ///< State: both moments.
  std::size_t tables = 0;          ///< State: what kernels read to find all this; device memory alone.
  std::size_t gathered = 0;        ///< Step: whole parameters; the peak over all times.
  std::size_t gather_buffer = 0;   ///< Step: communication buffer of one all-gather.
  std::size_t full_gradients = 0;  ///< Step: whole gradients, one per chunk.
  std::size_t gradients = 0;       ///< Step: parts of the summed gradients.
  std::size_t reduce_buffers = 0;  ///< Step: communication buffers and workspace of reductions.
  std::size_t norm = 0;            ///< Step: sums of squares.

  /// Bytes of state.
  std::size_t state() const { return parameters + masters + moments + tables; }
  /// Bytes of step memory.
  std::size_t step() const { return gathered + gather_buffer + full_gradients + gradients + reduce_buffers + norm; }
};

/// Memory of a training step: gathered parameters, gradients and buffers.
struct step_lifetime {};
using step_memory = memory_ref<step_lifetime>;  ///< From the first gather to the end of `step`.

}  // namespace shard
TESSERA_NAMESPACE_END
