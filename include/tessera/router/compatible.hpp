// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Which policies may stand together in a router.

#include <type_traits>

#include <tessera/router/balance.hpp>
#include <tessera/router/score.hpp>
#include <tessera/router/select.hpp>
#include <tessera/router/weigh.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class First, class... Rest>
constexpr bool all_distinct() {
  if constexpr (sizeof...(Rest) == 0) {
    return true;
  } else {
    return (!std::is_same_v<First, Rest> && ...) && all_distinct<Rest...>();
  }
}

}  // namespace detail

/// Atom: a bias moves a selection by keys; ids from a table or from the caller do not listen to it.
template <class Select, class... Balances>
concept bias_has_keys = (Select::by == select_by::key || Select::by == select_by::group) ||
                        ((Balances::by != balance_by::selection_bias) && ...);

/// Atom: softmax over the selected experts sums to 1 already, so it is not normalised again.
template <class Score, class Weigh>
concept normalized_once = Score::over != score_over::selected || !Weigh::normalizes;

/// Atom: no balance twice.
template <class... Balances>
concept balances_differ = sizeof...(Balances) == 0 || detail::all_distinct<Balances...>();

/// Atom: at most one balance owns the bias.
template <class... Balances>
concept one_bias = (0 + ... + int(Balances::by == balance_by::selection_bias)) <= 1;

/// Policies that may stand together. The combinations that may not:
/// - `balance::bias` with `select::hash` or `select::external`;
/// - `score::softmax_selected` with `weigh::normalized`, on input or output (use `weigh::raw`, which scales too);
/// - the same balance twice, or two balances by bias.
template <class Score, class Select, class Weigh, class... Balances>
concept compatible = bias_has_keys<Select, Balances...> && normalized_once<Score, Weigh> &&
    balances_differ<Balances...> && one_bias<Balances...>;

TESSERA_NAMESPACE_END
