// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a rank holds, told in logical experts: whoever stores or moves expert weights speaks of these boxes, never of
/// local indices, so that another layout can read them.

#include <cstdint>
#include <vector>

#include <tessera/core/box.hpp>
#include <tessera/layout/detail/checks.hpp>
#include <tessera/layout/expert_layout.hpp>

TESSERA_NAMESPACE_BEGIN

/// Consecutive experts in consecutive slots of one rank.
struct expert_range {
  std::int32_t first_expert = 0;  ///< Logical id of the first.
  std::int32_t first_slot = 0;    ///< Its slot.
  std::int32_t count = 0;         ///< How many, at least 1.

  /// Same experts in the same slots.
  constexpr bool operator==(const expert_range&) const = default;
};

/// Which copies to speak of.
enum class copies {
  all,      ///< Every slot of the rank.
  primary,  ///< Only replica 0 of each expert: over all ranks these cover each expert exactly once.
};

/// A part of a tensor `[E, ...]` and where it lies in the rank's own tensor `[num_slots, ...]`.
struct held_box {
  box logical;  ///< In the tensor of all experts.
  box local;    ///< In the rank's tensor; packed, so it is one contiguous run.

  /// Same part in the same place.
  constexpr bool operator==(const held_box&) const = default;
};

/// The ranges that `rank` holds, in order of their slots, merged as far as possible: one for `layout::block`. Host:
/// set-up code, allocates.
/// @param placement The layout. @param rank Rank in `[0, num_ranks())`. @param which All copies, or primary ones.
/// @throws invalid_argument if there is no such rank.
template <expert_layout Layout>
constexpr std::vector<expert_range> expert_ranges(const Layout& placement, int rank, copies which = copies::all) {
  if (rank < 0 || rank >= placement.num_ranks()) {
    layout::detail::fail_rank(rank, placement.num_ranks());
  }
  std::vector<expert_range> ranges;
  for (int slot = 0; slot < placement.num_slots(rank); ++slot) {
    const int expert = placement.expert_at(rank, slot);
    if (which == copies::primary && placement.owner(expert, 0).rank != rank) continue;
    if (!ranges.empty() && ranges.back().first_expert + ranges.back().count == expert &&
        ranges.back().first_slot + ranges.back().count == slot) {
      ++ranges.back().count;
    } else {
      ranges.push_back({expert, slot, 1});
    }
  }
  return ranges;
}

/// The boxes of an expert tensor that `rank` holds, in order of their slots, merged as far as possible.
/// @param placement The layout. @param rank Rank in `[0, num_ranks())`.
/// @param tensor    Whole of the tensor over all experts, `box::whole({E, ...})`: experts are dimension 0.
/// @param which     All copies, or primary ones.
/// @throws invalid_argument if there is no such rank, or the tensor's first extent is not the number of experts.
template <expert_layout Layout>
constexpr std::vector<held_box> held_boxes(const Layout& placement, int rank, const box& tensor,
                                           copies which = copies::all) {
  if (tensor.rank < 1 || tensor.size[0] != placement.num_experts()) {
    layout::detail::fail_tensor(tensor.rank, tensor.size[0], placement.num_experts());
  }
  std::vector<held_box> boxes;
  for (const expert_range& range : expert_ranges(placement, rank, which)) {
    held_box held{tensor, tensor};
    held.logical.offset[0] = tensor.offset[0] + range.first_expert;
    held.logical.size[0] = range.count;
    for (int i = 0; i < tensor.rank; ++i) held.local.offset[i] = 0;
    held.local.offset[0] = range.first_slot;
    held.local.size[0] = range.count;
    boxes.push_back(held);
  }
  return boxes;
}

TESSERA_NAMESPACE_END
