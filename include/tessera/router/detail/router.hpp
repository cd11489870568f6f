// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Host half of the router. Each function checks everything first, then works token by token.

#include <tessera/router/detail/checks.hpp>
#include <tessera/router/detail/logit_gradient.hpp>
#include <tessera/router/detail/token.hpp>
#include <tessera/router/detail/token_losses.hpp>
#include <tessera/router/router.hpp>

TESSERA_NAMESPACE_BEGIN

template <class Score, class Select, class Weigh, class... Balances>
router<Score, Select, Weigh, Balances...>::router(const options& chosen) : options_(chosen) {
  detail::check_sizes(chosen.num_experts, chosen.top_k);
  if constexpr (requires { Score::check(chosen.score); }) Score::check(chosen.score);
  if constexpr (requires { Select::check(chosen.select, 1, 1); }) {
    Select::check(chosen.select, chosen.num_experts, chosen.top_k);
  }
  if constexpr (requires { Weigh::check(chosen.weigh); }) Weigh::check(chosen.weigh);
  std::apply([](const auto&... policies) { (detail::check_balance<Balances>(policies), ...); }, chosen.balance);
}

template <class Score, class Select, class Weigh, class... Balances>
constexpr auto router<Score, Select, Weigh, Balances...>::loss_names() -> std::array<std::string_view, num_losses> {
  std::array<std::string_view, num_losses> names{};
  [[maybe_unused]] std::size_t loss = 0;
  [[maybe_unused]] const auto visit = [&](bool is_loss, std::string_view name) {
    if (is_loss) names[loss++] = name;
  };
  if constexpr (num_losses > 0) (visit(balance_is_loss<Balances>, Balances::name), ...);
  return names;
}

template <class Score, class Select, class Weigh, class... Balances>
auto router<Score, Select, Weigh, Balances...>::default_coefficients() const -> std::array<float, num_losses> {
  std::array<float, num_losses> coefficients{};
  detail::for_each_loss<Balances...>(options_.balance, [&](auto, const auto& policy, int loss) {
    coefficients[static_cast<std::size_t>(loss)] = policy.coefficient;
  });
  return coefficients;
}

template <class Score, class Select, class Weigh, class... Balances>
template <accumulate_type A>
void router<Score, Select, Weigh, Balances...>::route(host_stream, const router_inputs<A>& in, routing<A> out,
                                                      balance_counts local_counts) const {
  const int num_experts = options_.num_experts;
  const int k = options_.top_k;
  const std::int64_t num_tokens = in.logits.rows;

  detail::check_routing_out(in, out, local_counts, num_experts, k);
  detail::check_inputs(in, num_experts);
  detail::check_bias(in.bias, has_bias, num_experts);
  if constexpr (needs_token_ids) {
    detail::check_table(in.token_ids, options_.select.table, options_.select.vocab, num_tokens, k, num_experts);
  }
  if constexpr (needs_expert_ids) {
    detail::check_all_ids(in.expert_ids, num_tokens, k, num_experts, "inputs.expert_ids");
  }

  if (local_counts.data != nullptr) {
    for (int e = 0; e < num_experts; ++e) local_counts.expert(e) = 0;
    local_counts.tokens() = num_tokens;
    local_counts.sequences() = detail::count_sequences(in.sequence_offsets, num_tokens);
  }
  constexpr bool selects = Select::by == select_by::key || Select::by == select_by::group;
  constexpr bool on_logits = score_selects_on_logits<Score>;
  constexpr bool scores_all = Score::over == score_over::all || (selects && !on_logits);
  A scores[scores_all ? max_experts : 1];
  A biased[has_bias ? max_experts : 1];
  A selected[max_top_k];
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    const A* const logits = in.logits.row(t);
    std::int32_t* const ids = out.expert_ids.row(t);
    if constexpr (scores_all) detail::all_scores<Score>(options_.score, logits, num_experts, scores);
    if constexpr (selects) {
      const A* keys = on_logits ? logits : scores;
      if constexpr (has_bias) {
        if (in.bias != nullptr) {
          for (int e = 0; e < num_experts; ++e) biased[e] = keys[e] + static_cast<A>(in.bias[e]);
          keys = biased;
        }
      }
      bool complete = false;
      if constexpr (Select::by == select_by::group) {
        complete = detail::select_in_groups<typename Select::group_score>(keys, num_experts, k, options_.select.groups,
                                                                          options_.select.kept_groups, ids);
      } else {
        complete = detail::select_top_k(keys, num_experts, k, ids);
      }
      detail::check_complete(complete, t, k);
    } else {
      const std::int32_t* given = nullptr;
      if constexpr (needs_token_ids) {
        given = options_.select.table + std::int64_t{in.token_ids[static_cast<std::size_t>(t)]} * k;
      } else {
        given = in.expert_ids.row(t);
      }
      for (int i = 0; i < k; ++i) ids[i] = given[i];
    }

    detail::selected_scores<Score>(options_.score, logits, scores_all ? scores : nullptr, ids, k, selected);
    A sum = A(0);
    for (int i = 0; i < k; ++i) sum += selected[i];
    for (int i = 0; i < k; ++i) {
      out.weights(t, i) = ids[i] == no_expert ? A(0) : Weigh::value(selected[i], sum, options_.weigh);
    }
    if (local_counts.data != nullptr) {
      for (int i = 0; i < k; ++i) {
        if (ids[i] != no_expert) ++local_counts.expert(ids[i]);
      }
    }
  }
}

template <class Score, class Select, class Weigh, class... Balances>
template <accumulate_type A>
void router<Score, Select, Weigh, Balances...>::losses(host_stream, const router_inputs<A>& in,
                                                       const_balance_counts global_counts, const float* coefficients,
                                                       std::int64_t chunk_tokens, matrix_view<A> chunk_losses) const {
  constexpr bool by_batch = detail::has_balance<balance_by::batch_load, Balances...>;
  constexpr bool by_sequence = detail::has_balance<balance_by::sequence_load, Balances...>;
  constexpr bool by_size = detail::has_balance<balance_by::log_sum_exp, Balances...>;
  const int num_experts = options_.num_experts;
  const std::int64_t num_tokens = in.logits.rows;

  detail::check_losses_out(in, chunk_tokens, chunk_losses, num_losses);
  detail::check_inputs(in, num_experts);
  detail::check_loss_inputs(global_counts, coefficients, num_losses, num_experts, num_tokens,
                            detail::count_sequences(in.sequence_offsets, num_tokens));
  if constexpr (num_losses > 0) {
    for (std::int64_t c = 0; c < chunk_losses.rows; ++c) {
      for (int loss = 0; loss < num_losses; ++loss) chunk_losses(c, loss) = A(0);
    }
    if (num_tokens == 0) return;

    if constexpr (by_batch || by_size) {
      detail::batch_losses<Score, Balances...>(options_, in, global_counts, coefficients, chunk_tokens, chunk_losses);
    }
    if constexpr (by_sequence) {
      detail::sequence_losses<Score, Balances...>(options_, in, global_counts, coefficients, chunk_tokens,
                                                  chunk_losses);
    }
  }
}

template <class Score, class Select, class Weigh, class... Balances>
template <accumulate_type A>
void router<Score, Select, Weigh, Balances...>::backward(host_stream, const router_inputs<A>& in,
                                                         const routing<A>& routed, matrix_view<const A> dweights,
                                                         const_balance_counts global_counts, const float* coefficients,
                                                         A loss_scale, matrix_view<A> dlogits) const {
  const int num_experts = options_.num_experts;
  const int k = options_.top_k;
  const std::int64_t num_tokens = in.logits.rows;

  detail::check_backward_views(in, routed, dweights, dlogits, num_experts, k);
  detail::check_inputs(in, num_experts);
  detail::check_loss_inputs(global_counts, coefficients, num_losses, num_experts, num_tokens,
                            detail::count_sequences(in.sequence_offsets, num_tokens));
  if (num_tokens == 0) return;

  detail::logit_gradient<A, options, Score, Weigh, Balances...> gradient(options_, in, routed, dweights, global_counts,
                                                                         coefficients, loss_scale, dlogits);
  if constexpr (gradient.by_sequence) {
    detail::for_each_sequence(in.sequence_offsets, num_tokens, [&](std::int64_t first, std::int64_t last) {
      gradient.start_sequence(first, last);
      for (std::int64_t t = first; t < last; ++t) gradient.token(t);
    });
  } else {
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      gradient.start_token(t);
      gradient.token(t);
    }
  }
}

TESSERA_NAMESPACE_END
