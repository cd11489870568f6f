// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The usual placements of parameters on a training mesh: ZeRO-3 for dense ones, expert parallelism with ZeRO-3 for
/// experts.

#include <cstdint>
#include <string>

#include <tessera/core/error.hpp>
#include <tessera/mesh/placement.hpp>
#include <tessera/mesh/training_mesh.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// Throws: the experts cannot be spread evenly.
[[noreturn]] inline void fail_expert_count(std::int64_t num_experts, int ep) {
  std::string text = "num_experts = " + std::to_string(num_experts) + " over ep = " + std::to_string(ep) +
                     " ranks: expert_placements needs ep to divide the experts";
  if (num_experts >= 1) {
    std::int64_t below = ep < num_experts ? ep : num_experts;
    while (num_experts % below != 0) --below;
    text += "; ep = " + std::to_string(below) + " would be right";
  }
  throw invalid_argument(text + "; layout::table and held_boxes describe uneven experts");
}

}  // namespace detail

/// Placements of an expert parameter `[E, ...]` of at least two dimensions on `training_mesh::sparse_stage()`
/// (dp_replicate, efsdp, ep): experts are split over ep first, so that a rank of ep holds consecutive ones as
/// `layout::block` says; then each group of experts is split over efsdp, by expert where there is one for each rank
/// (`efsdp * ep <= E`), otherwise on dimension 1 (torchtitan's rule, which avoids padding). The split over ep comes
/// first although its axis is the inner one: hence a strided shard.
/// @param ranks The mesh. @param num_experts E, a multiple of ep.
/// @throws invalid_argument if ep does not divide E, with the nearest ep that does.
constexpr placements expert_placements(const training_mesh& ranks, std::int64_t num_experts) {
  const int ep = ranks.sizes.ep;
  if (num_experts < 1 || num_experts % ep != 0) detail::fail_expert_count(num_experts, ep);
  const bool by_expert = std::int64_t{ranks.efsdp} * ep <= num_experts;
  return {placement::replicate(), by_expert ? placement::strided_shard(0, ep) : placement::shard(1),
          placement::shard(0)};
}

/// Placements of a dense parameter on `training_mesh::fsdp_stage()` (dp_replicate, fsdp, tp): sharded over fsdp, the
/// same on all replicas and, unless a tensor-parallel placement is given, on all ranks of tp.
/// @param dim Dimension that fsdp shards. @param tensor_parallel Placement on tp. Where it shards the same dimension,
/// pass a strided `fsdp` of your own if tp is to split first.
/// @throws invalid_argument if `dim` is negative.
constexpr placements dense_placements(int dim = 0, const placement& tensor_parallel = placement::replicate()) {
  return {placement::replicate(), placement::shard(dim), tensor_parallel};
}

TESSERA_NAMESPACE_END
