// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The layout written down: any expert on any ranks, in any slot.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <tessera/layout/detail/checks.hpp>
#include <tessera/layout/expert_layout.hpp>

TESSERA_NAMESPACE_BEGIN

namespace layout {

/// A layout read from a table: uneven, replicated, in any order; a rank may hold nothing. Trivially copyable view of
/// integers in either memory space, made by `table_storage`, which must outlive it.
class table {
 public:
  /// @param packed      `[packed_size(num_experts, num_ranks, total_slots)]`: the four arrays of
  /// `table_storage::packed`.
  /// @param num_experts E. @param num_ranks R. @param total_slots Slots of all ranks together.
  /// @param max_slots   Slots of the fullest rank.
  TESSERA_HD constexpr table(const std::int32_t* packed, int num_experts, int num_ranks, int total_slots, int max_slots)
      : rank_offsets_(packed),
        num_experts_(num_experts),
        num_ranks_(num_ranks),
        total_slots_(total_slots),
        max_slots_(max_slots) {}

  /// Number of integers behind a table.
  static constexpr std::size_t packed_size(int num_experts, int num_ranks, int total_slots) {
    return static_cast<std::size_t>(num_ranks) + 1 + static_cast<std::size_t>(num_experts) + 1 +
           3 * static_cast<std::size_t>(total_slots);
  }

  /// E.
  TESSERA_HD constexpr int num_experts() const { return num_experts_; }
  /// R.
  TESSERA_HD constexpr int num_ranks() const { return num_ranks_; }
  /// Slots of all ranks together: E where nothing is replicated.
  TESSERA_HD constexpr int total_slots() const { return total_slots_; }
  /// Experts on `rank`.
  TESSERA_HD constexpr int num_slots(int rank) const { return rank_offsets_[rank + 1] - rank_offsets_[rank]; }
  /// Experts on the fullest rank.
  TESSERA_HD constexpr int max_slots() const { return max_slots_; }
  /// Copies of `expert`.
  TESSERA_HD constexpr int num_replicas(int expert) const {
    return replica_offsets()[expert + 1] - replica_offsets()[expert];
  }
  /// Place of a copy of `expert`; copies are ordered by rank.
  TESSERA_HD constexpr slot_ref owner(int expert, int replica = 0) const {
    const std::int32_t* entry = owners() + 2 * (replica_offsets()[expert] + replica);
    return {entry[0], entry[1]};
  }
  /// The expert in `slot` of `rank`.
  TESSERA_HD constexpr int expert_at(int rank, int slot) const { return slot_experts()[rank_offsets_[rank] + slot]; }

 private:
  TESSERA_HD constexpr const std::int32_t* replica_offsets() const { return rank_offsets_ + num_ranks_ + 1; }
  TESSERA_HD constexpr const std::int32_t* slot_experts() const { return replica_offsets() + num_experts_ + 1; }
  TESSERA_HD constexpr const std::int32_t* owners() const { return slot_experts() + total_slots_; }

  const std::int32_t* rank_offsets_;  // start of the packed arrays
  int num_experts_;
  int num_ranks_;
  int total_slots_;
  int max_slots_;
};

/// Owner of a table in host memory, and the place where it is validated. Host: set-up code, allocates.
class table_storage {
 public:
  /// @param num_experts     E, at least 1.
  /// @param experts_of_rank `[R]` lists: the expert in each slot of each rank, in order of the slots. A list may be
  ///                        empty; an expert in several lists is replicated.
  /// @throws invalid_argument if there is no rank, an id is not in `[0, num_experts)`, an expert stands twice in one
  ///         list, or experts stand in no list (all of them are named).
  constexpr table_storage(int num_experts, const std::vector<std::vector<std::int32_t>>& experts_of_rank)
      : num_experts_(
            detail::checked_experts("layout::table", num_experts, detail::checked_int(experts_of_rank.size()))),
        num_ranks_(static_cast<int>(experts_of_rank.size())) {
    std::vector<std::int32_t> replicas(static_cast<std::size_t>(num_experts), 0);
    std::vector<std::int32_t> last_rank(static_cast<std::size_t>(num_experts), -1);
    for (int rank = 0; rank < num_ranks_; ++rank) {
      const auto& list = experts_of_rank[static_cast<std::size_t>(rank)];
      for (std::size_t slot = 0; slot < list.size(); ++slot) {
        const std::int32_t expert = list[slot];
        if (expert < 0 || expert >= num_experts) detail::fail_id(rank, slot, expert, num_experts);
        const auto e = static_cast<std::size_t>(expert);
        if (last_rank[e] == rank) detail::fail_twice(rank, slot, expert);
        last_rank[e] = rank;
        ++replicas[e];
      }
      const int slots = detail::checked_int(list.size());
      total_slots_ += slots;
      max_slots_ = slots > max_slots_ ? slots : max_slots_;
    }
    for (const std::int32_t count : replicas) {
      if (count == 0) detail::fail_missing(replicas);
    }
    pack(experts_of_rank, replicas);
  }

  /// The layout, in host memory. Valid as long as this object is neither destroyed nor assigned to.
  constexpr table view() const { return view_at(packed_.data()); }

  /// The layout over a copy of `packed()` elsewhere, for example in device memory.
  /// @param copy `[packed().size()]` integers that the caller has copied, and keeps.
  constexpr table view_at(const std::int32_t* copy) const {
    return {copy, num_experts_, num_ranks_, total_slots_, max_slots_};
  }

  /// All that the layout reads: `rank_offsets [R+1]`, `replica_offsets [E+1]`, `slot_experts [S]`, and `owners [S, 2]`
  /// of (rank, slot), where `S` is the sum of all slots.
  constexpr std::span<const std::int32_t> packed() const { return packed_; }

 private:
  constexpr void pack(const std::vector<std::vector<std::int32_t>>& experts_of_rank,
                      const std::vector<std::int32_t>& replicas) {
    packed_.reserve(table::packed_size(num_experts_, num_ranks_, total_slots_));
    packed_.push_back(0);
    for (const auto& list : experts_of_rank) {
      packed_.push_back(packed_.back() + static_cast<std::int32_t>(list.size()));
    }
    std::vector<std::int32_t> next;  // where the next copy of each expert is written
    next.reserve(replicas.size() + 1);
    next.push_back(0);
    for (const std::int32_t count : replicas) next.push_back(next.back() + count);
    packed_.insert(packed_.end(), next.begin(), next.end());
    for (const auto& list : experts_of_rank) packed_.insert(packed_.end(), list.begin(), list.end());
    const std::size_t owners = packed_.size();
    packed_.resize(owners + 2 * static_cast<std::size_t>(total_slots_));
    for (std::size_t rank = 0; rank < experts_of_rank.size(); ++rank) {
      for (std::size_t slot = 0; slot < experts_of_rank[rank].size(); ++slot) {
        const auto expert = static_cast<std::size_t>(experts_of_rank[rank][slot]);
        const std::size_t entry = owners + 2 * static_cast<std::size_t>(next[expert]++);
        packed_[entry] = static_cast<std::int32_t>(rank);
        packed_[entry + 1] = static_cast<std::int32_t>(slot);
      }
    }
  }

  int num_experts_;
  int num_ranks_;
  int total_slots_ = 0;
  int max_slots_ = 0;
  std::vector<std::int32_t> packed_;
};

}  // namespace layout

TESSERA_NAMESPACE_END
