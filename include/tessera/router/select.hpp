// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Selections: which K experts a token goes to.

#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

/// Where the expert ids come from.
enum class select_by {
  key,       ///< The K largest keys; the key is the score (or the logit) plus the bias of `balance::bias`.
  group,     ///< As `key`, among the experts of the best groups only.
  token_id,  ///< A table, by token id.
  given,     ///< The caller.
};

/// Atom: `typename S::options`, default-constructible.
template <class S>
concept select_has_options = requires {
  typename S::options;
  requires std::default_initializable<typename S::options>;
};

/// Atom: `static constexpr select_by by`.
template <class S>
concept select_states_by = requires {
  { S::by } -> std::convertible_to<select_by>;
};

/// Atom: a `group_score` where the selection is by groups.
template <class S>
concept select_has_group_score = S::by != select_by::group ||
                                 requires(typename S::group_score::template accumulator<float> accumulator) {
  accumulator.add(1.0f);
  { accumulator.value() } -> std::same_as<float>;
};

/// A selection. Optional: `static void check(const options&, int num_experts, int top_k)`, which throws
/// `invalid_argument`.
template <class S>
concept select_policy = select_has_options<S> && select_states_by<S> && select_has_group_score<S>;

/// Selection policies. Equal keys go to the lowest expert id, equal groups to the lowest group. Ids are written in
/// descending order of their keys.
namespace select {

/// The K largest keys of all experts.
struct top_k {
  /// None.
  struct options {};
  static constexpr select_by by = select_by::key;  ///< By key.
};

/// How the keys of its experts make the score of a group.
namespace group_score {

/// Sum of the two largest keys (DeepSeek-V3: K_r / M = 2).
struct top2_sum {
  static constexpr int min_group_size = 2;  ///< Experts a group must have.
  /// Running state over the keys of one group.
  template <accumulate_type A>
  struct accumulator {
    A first = -std::numeric_limits<A>::infinity();   ///< Largest key.
    A second = -std::numeric_limits<A>::infinity();  ///< Second largest key.
    /// Takes one key.
    TESSERA_HD constexpr void add(A key) {
      if (key > first) {
        second = first;
        first = key;
      } else if (key > second) {
        second = key;
      }
    }
    /// Score of the group.
    TESSERA_HD constexpr A value() const { return first + second; }
  };
};

/// Largest key (DeepSeek-V2).
struct max {
  static constexpr int min_group_size = 1;  ///< Experts a group must have.
  /// Running state over the keys of one group.
  template <accumulate_type A>
  struct accumulator {
    A first = -std::numeric_limits<A>::infinity();  ///< Largest key.
    /// Takes one key.
    TESSERA_HD constexpr void add(A key) {
      if (key > first) first = key;
    }
    /// Score of the group.
    TESSERA_HD constexpr A value() const { return first; }
  };
};

}  // namespace group_score

/// The K largest keys among the experts of the `kept_groups` best of `groups` equal, contiguous groups (node-limited
/// routing). Other experts are masked with -inf: one of a kept group wins against them even where its key is negative.
template <class GroupScore = group_score::top2_sum>
struct group_limited {
  using group_score = GroupScore;  ///< Score of a group.
  /// Numbers of groups.
  struct options {
    int groups = 1;       ///< Divides E.
    int kept_groups = 1;  ///< Groups a token may reach; together they have at least K experts.
  };
  static constexpr select_by by = select_by::group;  ///< By key, within groups.

  /// @throws invalid_argument if the groups do not fit E and K.
  static void check(const options& options, int num_experts, int top_k) {
    TESSERA_EXPECTS(options.groups >= 1 && num_experts % options.groups == 0,
                    "groups = " << options.groups << " does not divide num_experts = " << num_experts);
    TESSERA_EXPECTS(
        options.kept_groups >= 1 && options.kept_groups <= options.groups,
        "kept_groups = " << options.kept_groups << " is outside [1, groups] with groups = " << options.groups);
    const int group_size = num_experts / options.groups;
    TESSERA_EXPECTS(group_size * options.kept_groups >= top_k,
                    "kept_groups = " << options.kept_groups << " groups of " << group_size
                                     << " experts cannot give top_k = " << top_k << " experts");
    if constexpr (requires { GroupScore::min_group_size; }) {
      TESSERA_EXPECTS(group_size >= GroupScore::min_group_size,
                      "groups of " << group_size << " experts are too small: this group score needs "
                                   << GroupScore::min_group_size << " (num_experts = " << num_experts
                                   << ", groups = " << options.groups << "); group_score::max needs 1");
    }
  }
};

/// A table of expert ids by token id (hash layers, first layers of DeepSeek-V4). Scores weigh, they do not select.
struct hash {
  /// The table, in the memory of the work, owned by the caller.
  struct options {
    const std::int32_t* table = nullptr;  ///< `[vocab, K]`, rows of K distinct ids in [0, E).
    std::int64_t vocab = 0;               ///< Rows of the table.
  };
  static constexpr select_by by = select_by::token_id;  ///< By token id.

  /// @throws invalid_argument if there is no table.
  static void check(const options& options, int, int) {
    TESSERA_EXPECTS(options.table != nullptr && options.vocab > 0,
                    "select::hash needs a table [vocab, top_k]; it was given "
                        << static_cast<const void*>(options.table) << " with vocab = " << options.vocab);
  }
};

/// Ids from the caller, `[T, K]`, distinct within a token; `no_expert` leaves a slot unused (padding, fewer experts).
/// Scores weigh, they do not select.
struct external {
  /// None.
  struct options {};
  static constexpr select_by by = select_by::given;  ///< By the caller.
};

}  // namespace select

TESSERA_NAMESPACE_END
