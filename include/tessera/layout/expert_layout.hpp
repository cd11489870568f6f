// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What the library asks of a layout: the map between logical expert ids and the places where their weights live.

#include <concepts>
#include <cstdint>
#include <type_traits>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// The place of one copy of an expert. Slots of a rank count from 0 in the order of its weight arrays `[L, ...]`.
struct slot_ref {
  std::int32_t rank = 0;  ///< Rank of the expert-parallel communicator.
  std::int32_t slot = 0;  ///< Local expert on that rank, in `[0, num_slots(rank))`.

  /// Same place.
  constexpr bool operator==(const slot_ref&) const = default;
};

/// A layout goes to kernels by value, so it may not own memory.
template <class L>
concept layout_trivially_copyable = std::is_trivially_copyable_v<L>;

/// `num_experts()`: E, logical experts over all ranks.
template <class L>
concept layout_has_num_experts = requires(const L& l) {
  { l.num_experts() } -> std::convertible_to<int>;
};

/// `num_ranks()`: R, ranks the experts are spread over.
template <class L>
concept layout_has_num_ranks = requires(const L& l) {
  { l.num_ranks() } -> std::convertible_to<int>;
};

/// `num_slots(rank)`: local experts of a rank; 0 is allowed.
template <class L>
concept layout_has_num_slots = requires(const L& l) {
  { l.num_slots(0) } -> std::convertible_to<int>;
};

/// `max_slots()`: the largest `num_slots(rank)`, which bounds buffers of equal size.
template <class L>
concept layout_has_max_slots = requires(const L& l) {
  { l.max_slots() } -> std::convertible_to<int>;
};

/// `num_replicas(expert)`: copies of an expert, at least 1, each on a rank of its own.
template <class L>
concept layout_has_num_replicas = requires(const L& l) {
  { l.num_replicas(0) } -> std::convertible_to<int>;
};

/// `owner(expert, replica)`: where a copy lives. Replicas are ordered by rank; replica 0 is the primary one.
template <class L>
concept layout_has_owner = requires(const L& l) {
  { l.owner(0, 0) } -> std::convertible_to<slot_ref>;
};

/// `expert_at(rank, slot)`: the inverse of `owner`.
template <class L>
concept layout_has_expert_at = requires(const L& l) {
  { l.expert_at(0, 0) } -> std::convertible_to<int>;
};

/// A layout says which rank owns which expert, in which slot. Models: `layout::block`, `layout::round_robin`,
/// `layout::table`. All members are pure functions of values that are equal on every rank. Arguments are
/// preconditions: experts in `[0, num_experts())`, ranks in `[0, num_ranks())`, slots in `[0, num_slots(rank))`,
/// replicas in `[0, num_replicas(expert))`. A layout used on the device has `TESSERA_HD` members.
///
/// Semantic requirements: `expert_at(owner(e, i).rank, owner(e, i).slot) == e` for every copy, no expert twice on one
/// rank, and the numbers of slots of all ranks sum to the numbers of replicas of all experts.
template <class L>
concept expert_layout =
    layout_trivially_copyable<L> && layout_has_num_experts<L> && layout_has_num_ranks<L> && layout_has_num_slots<L> &&
    layout_has_max_slots<L> && layout_has_num_replicas<L> && layout_has_owner<L> && layout_has_expert_at<L>;

/// Whether `L` is a layout, saying what is missing when it is not: for the static assertions of classes that take one,
/// and for the author of a layout, who writes `static_assert(tessera::is_expert_layout<mine>());`.
/// @return true; otherwise compilation stops with the guiding sentence.
template <class L>
consteval bool is_expert_layout() {
  static_assert(layout_trivially_copyable<L>,
                "expert_layout: a layout must be trivially copyable, because kernels take it by value. An owning table "
                "is layout::table_storage; its view() is the layout");
  static_assert(expert_layout<L>,
                "expert_layout: a layout needs num_experts(), num_ranks(), num_slots(rank), max_slots(), "
                "num_replicas(expert), owner(expert, replica) -> slot_ref and expert_at(rank, slot). Models: "
                "layout::block, layout::round_robin, layout::table");
  return expert_layout<L>;
}

/// Which copy of an expert serves a token: `token_index mod num_replicas(expert)`. Every rank that knows the index
/// comes to the same answer, so no communication is needed; tokens spread evenly over the copies.
/// @param placement   The layout. @param expert Expert id.
/// @param token_index Index of the token, at least 0. With the index in the global batch the choice does not depend on
///                    how tokens are split over ranks.
/// @return A replica for `placement.owner(expert, replica)`.
template <expert_layout Layout>
TESSERA_HD constexpr int choose_replica(const Layout& placement, int expert, std::int64_t token_index) {
  const int replicas = placement.num_replicas(expert);
  return replicas == 1 ? 0 : static_cast<int>(token_index % replicas);
}

TESSERA_NAMESPACE_END
