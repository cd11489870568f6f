// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Runs rows of the pairwise table through the gradient check.

#include <utility>

#include "layer_gradients.hpp"
#include "pairwise.hpp"

namespace tessera_test::pairwise {

// 8 experts, 3 of them per token, three sequences of different lengths.
template <row R>
void check_row() {
  using activation = std::tuple_element_t<R.activation, activations>;
  using placement_type = std::tuple_element_t<R.placement, placements>;
  using experts = ts::experts<activation, ts::precision::fp64, std::tuple_element_t<R.weight_layout, weight_layouts>>;
  using layer = ts::moe_layer<router_of<R>, experts, placement_type, ts::comm::threads,
                              std::tuple_element_t<R.combine, combines>>;

  auto p = make_problem({.num_experts = 8,
                         .top_k = 3,
                         .hidden = 6,
                         .intermediate = 3,
                         .num_shared_experts = R.shared,
                         .gate_bias = R.gate_bias == 1,
                         .expert_bias = R.expert_bias == 1},
                        12, activation::gated, 7);
  p.sequence_offsets = {0, 5, 8, 12};
  const int ranks = R.ranks + 1;
  const std::vector<std::vector<std::int64_t>> splits{{0, 12}, {0, 8, 12}, {0, 5, 8, 12}};

  typename layer::router_options routing;
  routing.weigh.scale = 1.7f;
  if constexpr (requires { routing.select.groups; }) routing.select = {.groups = 4, .kept_groups = 2};
  const std::vector<std::int32_t> hash_table{0, 1, 2, 5, 3, 7, 6, 4, 0, 2, 5, 1, 7, 6, 3};
  if constexpr (requires { routing.select.table; }) routing.select = {.table = hash_table.data(), .vocab = 5};
  const auto raise = [](auto& balance) {  // so that a wrong loss would be seen
    if constexpr (requires { balance.coefficient; }) balance.coefficient = 0.3f;
  };
  std::apply([&](auto&... balance) { (raise(balance), ...); }, routing.balance);

  const auto check = [&](const placement_type& placement) {
    check_gradients<layer>(p, placement, splits[std::size_t(R.ranks)], routing,
                           {.dispatch = {.row_bound = ts::dispatch_options::full_row_bound}}, 3);
  };
  if constexpr (R.placement == 2) {  // uneven, and replicated where there are ranks to replicate on
    const std::vector<std::vector<std::vector<std::int32_t>>> lists{
        {{7, 6, 5, 4, 3, 2, 1, 0}}, {{0, 1, 2, 3, 4}, {7, 0, 6, 5}}, {{1, 0}, {2, 1, 3, 4, 5, 6}, {7, 1}}};
    const ts::layout::table_storage storage(8, lists[std::size_t(R.ranks)]);
    check(storage.view());
  } else {
    check(placement_type(8, ranks));
  }
}

template <std::size_t First, std::size_t... I>
void check_rows(std::index_sequence<I...>) {
  const auto one = [](auto index) {
    CAPTURE(decltype(index)::value);
    check_row<table[decltype(index)::value]>();
  };
  (one(std::integral_constant<std::size_t, First + I>{}), ...);
}

}  // namespace tessera_test::pairwise
