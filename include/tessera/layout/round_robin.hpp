// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The layout that deals experts out like cards.

#include <tessera/layout/detail/checks.hpp>
#include <tessera/layout/expert_layout.hpp>

TESSERA_NAMESPACE_BEGIN

namespace layout {

/// Expert `e` on rank `e mod num_ranks`, in slot `e / num_ranks`. Groups of neighbouring experts spread over all ranks,
/// which evens the load out where selection is limited to groups.
class round_robin {
 public:
  /// @param num_experts E, at least 1. @param num_ranks R, at least 1.
  /// @throws invalid_argument if either is not.
  constexpr round_robin(int num_experts, int num_ranks)
      : num_experts_(detail::checked_experts("layout::round_robin", num_experts, num_ranks)), num_ranks_(num_ranks) {}

  /// E.
  TESSERA_HD constexpr int num_experts() const { return num_experts_; }
  /// R.
  TESSERA_HD constexpr int num_ranks() const { return num_ranks_; }
  /// Experts on `rank`.
  TESSERA_HD constexpr int num_slots(int rank) const {
    return num_experts_ / num_ranks_ + (rank < num_experts_ % num_ranks_ ? 1 : 0);
  }
  /// Experts on rank 0, which holds the most.
  TESSERA_HD constexpr int max_slots() const { return num_slots(0); }
  /// 1 for every expert.
  TESSERA_HD constexpr int num_replicas(int /*expert*/) const { return 1; }
  /// Place of `expert`. Its only replica is 0.
  TESSERA_HD constexpr slot_ref owner(int expert, int /*replica*/ = 0) const {
    return {expert % num_ranks_, expert / num_ranks_};
  }
  /// The expert in `slot` of `rank`.
  TESSERA_HD constexpr int expert_at(int rank, int slot) const { return slot * num_ranks_ + rank; }

 private:
  int num_experts_;
  int num_ranks_;
};

}  // namespace layout

TESSERA_NAMESPACE_END
