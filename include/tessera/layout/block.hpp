// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The layout of consecutive experts: rank 0 holds the first ones.

#include <tessera/layout/detail/checks.hpp>
#include <tessera/layout/expert_layout.hpp>

TESSERA_NAMESPACE_BEGIN

namespace layout {

/// Consecutive experts on one rank, in ascending order. Where the ranks do not divide the experts, the first
/// `num_experts mod num_ranks` ranks hold one more; with more ranks than experts the last ranks hold none.
class block {
 public:
  /// @param num_experts E, at least 1. @param num_ranks R, at least 1.
  /// @throws invalid_argument if either is not.
  constexpr block(int num_experts, int num_ranks)
      : num_experts_(detail::checked_experts("layout::block", num_experts, num_ranks)),
        num_ranks_(num_ranks),
        small_(num_experts / num_ranks),
        num_large_(num_experts % num_ranks) {}

  /// E.
  TESSERA_HD constexpr int num_experts() const { return num_experts_; }
  /// R.
  TESSERA_HD constexpr int num_ranks() const { return num_ranks_; }
  /// Experts on `rank`.
  TESSERA_HD constexpr int num_slots(int rank) const { return small_ + (rank < num_large_ ? 1 : 0); }
  /// Experts on rank 0, which holds the most.
  TESSERA_HD constexpr int max_slots() const { return small_ + (num_large_ > 0 ? 1 : 0); }
  /// 1 for every expert.
  TESSERA_HD constexpr int num_replicas(int /*expert*/) const { return 1; }

  /// Place of `expert`. Its only replica is 0.
  TESSERA_HD constexpr slot_ref owner(int expert, int /*replica*/ = 0) const {
    const int in_large = num_large_ * (small_ + 1);
    if (expert < in_large) return {expert / (small_ + 1), expert % (small_ + 1)};
    return {num_large_ + (expert - in_large) / small_, (expert - in_large) % small_};
  }

  /// The expert in `slot` of `rank`.
  TESSERA_HD constexpr int expert_at(int rank, int slot) const {
    return rank * small_ + (rank < num_large_ ? rank : num_large_) + slot;
  }

 private:
  int num_experts_;
  int num_ranks_;
  int small_;      // slots of a rank without an extra one
  int num_large_;  // ranks with an extra one
};

}  // namespace layout

TESSERA_NAMESPACE_END
