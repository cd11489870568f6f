// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// One parameter of a sharded group, and the rule by which ranks divide it.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>
#include <tessera/layout/boxes.hpp>
#include <tessera/layout/expert_layout.hpp>

TESSERA_NAMESPACE_BEGIN

/// Parameters, gradients and optimizer state divided among data-parallel ranks (ZeRO-3, FSDP, HSDP).
namespace shard {

/// Elements `[begin, begin + length)` of one dimension.
struct chunk {
  std::int64_t begin = 0;   ///< First element.
  std::int64_t length = 0;  ///< How many; may be 0.

  /// Same elements.
  constexpr bool operator==(const chunk&) const = default;
};

/// The part of rank `rank` when `extent` elements are divided as `torch.chunk` does: every part has
/// `ceil(extent / ranks)` elements until they run out, so the last parts may be shorter or empty (6 on 4: 2, 2, 2, 0).
/// @param extent Elements, not negative. @param ranks At least 1. @param rank In `[0, ranks)`.
TESSERA_HD constexpr chunk chunk_of(std::int64_t extent, int ranks, int rank) {
  const std::int64_t full = (extent + ranks - 1) / ranks;
  const std::int64_t begin = full * rank < extent ? full * rank : extent;
  const std::int64_t left = extent - begin;
  return {begin, left < full ? left : full};
}

/// A tensor whose elements the ranks of a shard communicator divide among themselves.
struct parameter {
  std::string name;    ///< Fully qualified; keys of checkpoints begin with it.
  box whole;           ///< The logical tensor, `box::whole({...})`; at least one dimension.
  int dim = 0;         ///< Dimension that is divided. Other than 0, its extent must be a multiple of the ranks.
  bool decays = true;  ///< Whether weight decay applies.

  /// Where these ranks together hold only a part of the logical tensor, as expert-parallel ranks do: the shape of that
  /// part (`[slots, ...]`), which is what is divided. Rank 0: the whole.
  box local = {};
  /// With `local`: which logical elements lie where in it. Empty: `local` begins at the logical origin.
  std::vector<held_box> held = {};

  /// The tensor that is divided: `local` where it is given, else `whole`.
  const box& divided() const { return local.rank == 0 ? whole : local; }
};

/// A parameter of experts as one expert-parallel rank holds it: `[num_slots, ...]` of the logical `[E, ...]`. The split
/// among expert-parallel ranks comes first, the one among the ranks of the shard communicator inside of it (what
/// DTensor calls a strided shard). Where there are more shard ranks than slots, divide another dimension. An expert may
/// have one copy only: copies would each count in the gradient norm, and nothing here adds their gradients up, so they
/// would train apart. Host: set-up code.
/// @param name      Fully qualified.
/// @param placement Which rank holds which expert.
/// @param rank      Expert-parallel rank.
/// @param tensor    `box::whole({E, ...})`.
/// @param dim       Dimension that the shard ranks divide.
/// @param decays    Whether weight decay applies.
/// @throws invalid_argument if there is no such rank, the tensor's first extent is not the number of experts, or an
///         expert has several copies.
template <expert_layout Layout>
parameter expert_parameter(std::string name, const Layout& placement, int rank, const box& tensor, int dim = 0,
                           bool decays = true) {
  for (int e = 0; e < placement.num_experts(); ++e) {
    TESSERA_EXPECTS(placement.num_replicas(e) == 1,
                    "parameter '" << name << "': expert " << e << " has " << placement.num_replicas(e)
                                  << " copies; experts of a sharded parameter must have one copy each");
  }
  parameter result{std::move(name), tensor, dim, decays, tensor, held_boxes(placement, rank, tensor)};
  result.local.size[0] = placement.num_slots(rank);
  return result;
}

}  // namespace shard

TESSERA_NAMESPACE_END
