// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A table of policy combinations in which every pair of compatible choices stands in some row. The rows are split over
// several translation units, because each is a layer type of its own.

#include <array>
#include <tuple>

#include <tessera/moe/moe.hpp>

namespace tessera_test::pairwise {

namespace ts = tessera;

// One row: an index into the lists below for each factor, and run-time choices.
struct row {
  int score, select, weigh, balance, activation, weight_layout, combine, placement, ranks, gate_bias, expert_bias,
      shared;
};

constexpr std::array<int, 12> levels{5, 5, 4, 6, 6, 4, 2, 3, 3, 2, 2, 3};

constexpr std::array<int, 12> indices(const row& r) {
  return {r.score,   r.select,    r.weigh, r.balance,   r.activation,  r.weight_layout,
          r.combine, r.placement, r.ranks, r.gate_bias, r.expert_bias, r.shared};
}

template <class... B>
struct balances {
  template <class Score, class Select, class Weigh>
  using router = ts::router<Score, Select, Weigh, B...>;
  template <class Score, class Select, class Weigh>
  static constexpr bool fit = ts::compatible<Score, Select, Weigh, B...>;
};

using scores = std::tuple<ts::score::softmax, ts::score::softmax_selected, ts::score::sigmoid,
                          ts::score::sigmoid_selected, ts::score::sqrt_softplus>;
using selections =
    std::tuple<ts::select::top_k, ts::select::group_limited<ts::select::group_score::top2_sum>,
               ts::select::group_limited<ts::select::group_score::max>, ts::select::hash, ts::select::external>;
using weighings = std::tuple<ts::weigh::raw, ts::weigh::normalized, ts::weigh::on_input<ts::weigh::raw>,
                             ts::weigh::on_input<ts::weigh::normalized>>;
using balance_sets =
    std::tuple<balances<>, balances<ts::balance::switch_loss>, balances<ts::balance::sequence_loss>,
               balances<ts::balance::z_loss>, balances<ts::balance::bias, ts::balance::sequence_loss>,
               balances<ts::balance::switch_loss, ts::balance::z_loss, ts::balance::sequence_loss, ts::balance::bias>>;
using activations = std::tuple<ts::activation::swiglu, ts::activation::geglu, ts::activation::geglu_tanh,
                               ts::activation::clamped_swiglu, ts::activation::relu2, ts::activation::gelu>;
using weight_layouts = std::tuple<ts::weight_layout::out_in_concatenated, ts::weight_layout::out_in_interleaved,
                                  ts::weight_layout::in_out_concatenated, ts::weight_layout::in_out_interleaved>;
using combines = std::tuple<ts::combine::ordered, ts::combine::reduced>;
using placements = std::tuple<ts::layout::block, ts::layout::round_robin, ts::layout::table>;

template <row R>
using router_of =
    typename std::tuple_element_t<R.balance, balance_sets>::template router<std::tuple_element_t<R.score, scores>,
                                                                            std::tuple_element_t<R.select, selections>,
                                                                            std::tuple_element_t<R.weigh, weighings>>;

// Whether two choices may stand together, by the library's own `compatible`.
template <int Score, int Select, int Weigh, int Balance>
constexpr bool fit = std::tuple_element_t<Balance, balance_sets>::template fit<std::tuple_element_t<Score, scores>,
                                                                               std::tuple_element_t<Select, selections>,
                                                                               std::tuple_element_t<Weigh, weighings>>;

// clang-format off
inline constexpr std::array<row, 40> table{{
    {2, 3, 1, 1, 0, 0, 1, 2, 2, 0, 0, 0},
    {0, 0, 2, 2, 5, 3, 0, 0, 0, 1, 1, 0},
    {3, 2, 3, 5, 1, 2, 0, 1, 1, 0, 0, 2},
    {4, 4, 0, 0, 2, 1, 1, 1, 0, 0, 1, 1},
    {1, 1, 0, 3, 4, 3, 1, 2, 1, 1, 1, 2},
    {3, 4, 1, 3, 3, 1, 0, 0, 2, 1, 0, 1},
    {2, 2, 2, 4, 1, 2, 1, 2, 2, 1, 1, 1},
    {4, 1, 3, 5, 0, 0, 0, 0, 0, 1, 1, 1},
    {1, 3, 2, 0, 2, 0, 0, 0, 1, 1, 0, 2},
    {0, 0, 3, 4, 3, 1, 1, 2, 0, 0, 0, 2},
    {4, 1, 1, 2, 5, 2, 1, 1, 1, 0, 0, 0},
    {0, 3, 0, 1, 4, 3, 0, 1, 2, 0, 0, 1},
    {1, 2, 0, 5, 3, 2, 1, 0, 0, 0, 1, 0},
    {3, 0, 0, 4, 0, 0, 1, 1, 1, 1, 1, 0},
    {2, 4, 3, 1, 5, 3, 0, 2, 1, 1, 1, 2},
    {2, 3, 1, 3, 1, 1, 0, 0, 0, 0, 1, 0},
    {4, 0, 1, 5, 2, 3, 1, 2, 2, 0, 0, 2},
    {1, 4, 2, 2, 0, 1, 1, 1, 2, 0, 0, 2},
    {3, 3, 3, 0, 4, 2, 1, 2, 2, 1, 0, 0},
    {0, 2, 1, 3, 5, 0, 0, 1, 1, 1, 0, 1},
    {3, 1, 2, 1, 2, 1, 0, 0, 0, 0, 0, 0},
    {4, 2, 2, 4, 4, 3, 0, 0, 0, 1, 0, 2},
    {2, 0, 1, 0, 3, 3, 0, 1, 1, 1, 1, 1},
    {2, 1, 0, 2, 1, 0, 0, 2, 2, 1, 0, 2},
    {0, 4, 3, 3, 2, 2, 1, 1, 1, 0, 1, 0},
    {4, 3, 3, 2, 3, 0, 1, 1, 1, 1, 1, 1},
    {1, 0, 0, 1, 1, 2, 1, 0, 1, 1, 0, 0},
    {2, 2, 2, 5, 5, 1, 0, 0, 2, 0, 1, 1},
    {1, 1, 0, 4, 5, 1, 1, 1, 1, 0, 1, 1},
    {0, 2, 3, 0, 0, 2, 1, 1, 2, 1, 0, 0},
    {3, 4, 1, 2, 4, 0, 0, 0, 1, 1, 0, 1},
    {0, 1, 2, 0, 1, 3, 0, 1, 1, 0, 0, 2},
    {4, 0, 2, 3, 0, 3, 1, 2, 2, 0, 0, 2},
    {3, 3, 2, 0, 5, 3, 0, 2, 2, 0, 0, 0},
    {2, 2, 1, 4, 2, 2, 1, 0, 0, 1, 0, 1},
    {2, 0, 1, 5, 4, 1, 0, 1, 0, 1, 0, 1},
    {4, 2, 2, 1, 3, 3, 0, 0, 1, 1, 1, 0},
    {0, 1, 0, 5, 3, 1, 1, 0, 0, 0, 0, 1},
    {0, 2, 0, 2, 2, 3, 1, 0, 0, 1, 1, 1},
    {4, 4, 1, 1, 1, 3, 0, 2, 2, 1, 0, 1},
}};
// clang-format on

}  // namespace tessera_test::pairwise
