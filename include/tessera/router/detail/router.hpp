// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Host half of the router. Each function checks everything first, then works token by token.

#include <type_traits>
#include <utility>

#include <tessera/router/detail/checks.hpp>
#include <tessera/router/detail/token.hpp>
#include <tessera/router/router.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// Calls `f(std::type_identity<Balance>{}, options, loss_index)` for each balance that is a loss.
template <class... Balances, class F>
void for_each_loss(const std::tuple<typename Balances::options...>& options, F&& f) {
  int loss = 0;
  [[maybe_unused]] const auto visit = [&](auto tag, const auto& balance_options) {
    if constexpr (balance_is_loss<typename decltype(tag)::type>) f(tag, balance_options, loss++);
  };
  [&]<std::size_t... Index>(std::index_sequence<Index...>) {
    (visit(std::type_identity<Balances>{}, std::get<Index>(options)), ...);
  }
  (std::index_sequence_for<Balances...>{});
  (void)loss;
}

template <balance_by By, class... Balances>
inline constexpr bool has_balance = (false || ... || (Balances::by == By));

/// `load[e] = E / (K T) * counts[e]`.
template <accumulate_type A, class Count>
void loads(const Count* counts, int num_experts, int top_k, std::int64_t num_tokens, A* load) {
  const double pairs = static_cast<double>(top_k) * static_cast<double>(num_tokens);
  for (int e = 0; e < num_experts; ++e) {
    load[e] = static_cast<A>(static_cast<double>(num_experts) * static_cast<double>(counts[e]) / pairs);
  }
}

/// Adds one token's choice without bias and without groups, which `balance_by::sequence_load` counts.
template <class Score, accumulate_type A>
void count_unbiased(const A* logits, const A* scores, int num_experts, int k, std::int32_t* counts) {
  std::int32_t ids[max_top_k];
  select_top_k(score_selects_on_logits<Score> ? logits : scores, num_experts, k, ids);
  for (int i = 0; i < k; ++i) {
    if (ids[i] != no_expert) ++counts[ids[i]];
  }
}

/// Log-sum-exp of the logits; `exp` receives `exp(logit - max)` and `sum` their sum.
template <accumulate_type A>
A log_sum_exp(const A* logits, int num_experts, A* exp, A& sum) {
  for (int e = 0; e < num_experts; ++e) exp[e] = logits[e];
  A max;
  sum = exponentials(exp, num_experts, max);
  return max + std::log(sum);
}

}  // namespace detail

template <class Score, class Select, class Weigh, class... Balances>
router<Score, Select, Weigh, Balances...>::router(const options& chosen) : options_(chosen) {
  detail::check_sizes(chosen.num_experts, chosen.top_k);
  if constexpr (requires { Score::check(chosen.score); }) Score::check(chosen.score);
  if constexpr (requires { Select::check(chosen.select, 1, 1); }) {
    Select::check(chosen.select, chosen.num_experts, chosen.top_k);
  }
  if constexpr (requires { Weigh::check(chosen.weigh); }) Weigh::check(chosen.weigh);
  detail::for_each_loss<Balances...>(chosen.balance, [](auto tag, const auto& policy, int) {
    detail::check_coefficient(policy.coefficient, decltype(tag)::type::name);
  });
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

    A load[max_experts];
    A row[max_experts];
    if constexpr (by_batch || by_size) {
      detail::loads(global_counts.data, num_experts, options_.top_k, global_counts.tokens(), load);
      const std::int64_t chunk = chunk_tokens == 0 ? num_tokens : chunk_tokens;
      for (std::int64_t first = 0; first < num_tokens; first += chunk) {
        const std::int64_t last = first + chunk < num_tokens ? first + chunk : num_tokens;
        double sums[num_losses] = {};
        for (std::int64_t t = first; t < last; ++t) {
          const A* const logits = in.logits.row(t);
          if constexpr (by_batch) {
            detail::all_scores<Score>(options_.score, logits, num_experts, row);
            detail::scores_to_probabilities<Score>(row, num_experts);
          }
          A log_sum = A(0);
          if constexpr (by_size) {
            A exp[max_experts];
            A sum;
            log_sum = detail::log_sum_exp(logits, num_experts, exp, sum);
          }
          detail::for_each_loss<Balances...>(options_.balance, [&](auto tag, const auto& policy, int loss) {
            using balance = typename decltype(tag)::type;
            if constexpr (balance::by == balance_by::batch_load) {
              A token = A(0);
              for (int e = 0; e < num_experts; ++e) token += balance::value(row[e], load[e], policy);
              sums[loss] += static_cast<double>(token);
            } else if constexpr (balance::by == balance_by::log_sum_exp) {
              sums[loss] += static_cast<double>(balance::value(log_sum, policy));
            }
          });
        }
        for (int loss = 0; loss < num_losses; ++loss) {
          chunk_losses(first / chunk, loss) = static_cast<A>(static_cast<double>(coefficients[loss]) * sums[loss] /
                                                             static_cast<double>(global_counts.tokens()));
        }
      }
    }
    if constexpr (by_sequence) {
      detail::for_each_sequence(in.sequence_offsets, num_tokens, [&](std::int64_t first, std::int64_t last) {
        std::int32_t counts[max_experts] = {};
        for (std::int64_t t = first; t < last; ++t) {
          const A* const logits = in.logits.row(t);
          if constexpr (!score_selects_on_logits<Score>) {
            detail::all_scores<Score>(options_.score, logits, num_experts, row);
          }
          detail::count_unbiased<Score>(logits, row, num_experts, options_.top_k, counts);
        }
        detail::loads(counts, num_experts, options_.top_k, last - first, load);
        double sums[num_losses] = {};
        for (std::int64_t t = first; t < last; ++t) {
          detail::all_scores<Score>(options_.score, in.logits.row(t), num_experts, row);
          detail::scores_to_probabilities<Score>(row, num_experts);
          detail::for_each_loss<Balances...>(options_.balance, [&](auto tag, const auto& policy, int loss) {
            using balance = typename decltype(tag)::type;
            if constexpr (balance::by == balance_by::sequence_load) {
              A token = A(0);
              for (int e = 0; e < num_experts; ++e) token += balance::value(row[e], load[e], policy);
              sums[loss] += static_cast<double>(token);
            }
          });
        }
        const double scope = static_cast<double>(global_counts.sequences()) * static_cast<double>(last - first);
        const std::int64_t chunk = chunk_tokens == 0 ? 0 : (last - 1) / chunk_tokens;
        detail::for_each_loss<Balances...>(options_.balance, [&](auto tag, const auto&, int loss) {
          if constexpr (decltype(tag)::type::by == balance_by::sequence_load) {
            chunk_losses(chunk, loss) += static_cast<A>(static_cast<double>(coefficients[loss]) * sums[loss] / scope);
          }
        });
      });
    }
  }
}

template <class Score, class Select, class Weigh, class... Balances>
template <accumulate_type A>
void router<Score, Select, Weigh, Balances...>::backward(host_stream, const router_inputs<A>& in,
                                                         const routing<A>& routed, matrix_view<const A> dweights,
                                                         const_balance_counts global_counts, const float* coefficients,
                                                         A loss_scale, matrix_view<A> dlogits) const {
  constexpr bool by_batch = detail::has_balance<balance_by::batch_load, Balances...>;
  constexpr bool by_sequence = detail::has_balance<balance_by::sequence_load, Balances...>;
  constexpr bool by_size = detail::has_balance<balance_by::log_sum_exp, Balances...>;
  constexpr bool on_load = by_batch || by_sequence;
  constexpr bool scores_all = Score::over == score_over::all || on_load;
  const int num_experts = options_.num_experts;
  const int k = options_.top_k;
  const std::int64_t num_tokens = in.logits.rows;

  detail::check_backward_views(in, routed, dweights, dlogits, num_experts, k);
  detail::check_inputs(in, num_experts);
  detail::check_loss_inputs(global_counts, coefficients, num_losses, num_experts, num_tokens,
                            detail::count_sequences(in.sequence_offsets, num_tokens));
  if (num_tokens == 0) return;

  const double scale = static_cast<double>(loss_scale);
  const typename Score::options& score = options_.score;
  [[maybe_unused]] A batch_load[by_batch ? max_experts : 1];
  [[maybe_unused]] A sequence_load[by_sequence ? max_experts : 1];
  if constexpr (by_batch) {
    detail::loads(global_counts.data, num_experts, k, global_counts.tokens(), batch_load);
  }

  // `row` of dlogits holds the token's scores until its gradient replaces them.
  const auto backward_token = [&](std::int64_t t, [[maybe_unused]] std::int64_t sequence_tokens) {
    const A* const logits = in.logits.row(t);
    const std::int32_t* const ids = routed.expert_ids.row(t);
    A* const row = dlogits.row(t);

    A selected[max_top_k];
    A dselected[max_top_k];
    detail::selected_scores<Score>(score, logits, scores_all ? row : nullptr, ids, k, selected);
    A sum = A(0);
    for (int i = 0; i < k; ++i) sum += selected[i];
    A dsum = A(0);
    for (int i = 0; i < k; ++i) {
      if (ids[i] == no_expert) continue;
      dselected[i] = dweights(t, i) * Weigh::derivative_by_score(selected[i], sum, options_.weigh);
      dsum += dweights(t, i) * Weigh::derivative_by_sum(selected[i], sum, options_.weigh);
    }
    for (int i = 0; i < k; ++i) dselected[i] = ids[i] == no_expert ? A(0) : dselected[i] + dsum;

    // Gradient by every probability, then by `value(logit)` through the normalisation of the probabilities.
    if constexpr (scores_all) {
      const A total = detail::scores_to_probabilities<Score>(row, num_experts);
      A dp[max_experts];
      for (int e = 0; e < num_experts; ++e) dp[e] = A(0);
      detail::for_each_loss<Balances...>(options_.balance, [&](auto tag, const auto& policy, int loss) {
        using balance = typename decltype(tag)::type;
        if constexpr (balance_on_load<balance>) {
          const A* load = nullptr;
          double scope = 0;
          if constexpr (balance::by == balance_by::batch_load) {
            load = batch_load;
            scope = static_cast<double>(global_counts.tokens());
          } else {
            load = sequence_load;
            scope = static_cast<double>(global_counts.sequences()) * static_cast<double>(sequence_tokens);
          }
          const A factor = static_cast<A>(scale * static_cast<double>(coefficients[loss]) / scope);
          for (int e = 0; e < num_experts; ++e) dp[e] += factor * balance::derivative(row[e], load[e], policy);
        }
      });
      if constexpr (Score::over == score_over::all) {
        for (int i = 0; i < k; ++i) {
          if (ids[i] != no_expert) dp[ids[i]] += dselected[i];
        }
      }
      A mean = A(0);
      for (int e = 0; e < num_experts; ++e) mean += row[e] * dp[e];
      if constexpr (Score::over == score_over::each) {
        for (int e = 0; e < num_experts; ++e) {
          // p = s / total, so that s is p * total again; where all scores underflowed nothing moves
          row[e] = total != A(0) ? (dp[e] - mean) / total * Score::derivative(logits[e], row[e] * total, score) : A(0);
        }
      } else {
        for (int e = 0; e < num_experts; ++e) {
          row[e] *= (dp[e] - mean) * Score::derivative(logits[e], Score::value(logits[e], score), score);
        }
      }
    } else {
      for (int e = 0; e < num_experts; ++e) row[e] = A(0);
    }

    if constexpr (Score::over == score_over::each) {
      for (int i = 0; i < k; ++i) {
        if (ids[i] != no_expert) row[ids[i]] += dselected[i] * Score::derivative(logits[ids[i]], selected[i], score);
      }
    } else if constexpr (Score::over == score_over::selected) {
      A mean = A(0);
      for (int i = 0; i < k; ++i) mean += selected[i] * dselected[i];
      for (int i = 0; i < k; ++i) {
        if (ids[i] == no_expert) continue;
        const A logit = logits[ids[i]];
        row[ids[i]] +=
            selected[i] * (dselected[i] - mean) * Score::derivative(logit, Score::value(logit, score), score);
      }
    }

    if constexpr (by_size) {
      A exp[max_experts];
      A total;
      const A log_sum = detail::log_sum_exp(logits, num_experts, exp, total);
      A dlog_sum = A(0);
      detail::for_each_loss<Balances...>(options_.balance, [&](auto tag, const auto& policy, int loss) {
        using balance = typename decltype(tag)::type;
        if constexpr (balance::by == balance_by::log_sum_exp) {
          const double scope = static_cast<double>(global_counts.tokens());
          dlog_sum += static_cast<A>(scale * static_cast<double>(coefficients[loss]) / scope) *
                      balance::derivative(log_sum, policy);
        }
      });
      for (int e = 0; e < num_experts; ++e) row[e] += dlog_sum * (exp[e] / total);
    }
  };

  if constexpr (by_sequence) {
    detail::for_each_sequence(in.sequence_offsets, num_tokens, [&](std::int64_t first, std::int64_t last) {
      std::int32_t counts[max_experts] = {};
      for (std::int64_t t = first; t < last; ++t) {
        detail::all_scores<Score>(score, in.logits.row(t), num_experts, dlogits.row(t));
        detail::count_unbiased<Score>(in.logits.row(t), dlogits.row(t), num_experts, k, counts);
      }
      detail::loads(counts, num_experts, k, last - first, sequence_load);
      for (std::int64_t t = first; t < last; ++t) backward_token(t, last - first);
    });
  } else {
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      if constexpr (scores_all) {
        detail::all_scores<Score>(score, in.logits.row(t), num_experts, dlogits.row(t));
      }
      backward_token(t, 0);
    }
  }
}

TESSERA_NAMESPACE_END
