// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Values of the balance losses: what a token adds to them, and the sums over chunks and sequences.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include <tessera/core/views.hpp>
#include <tessera/router/balance.hpp>
#include <tessera/router/detail/checks.hpp>
#include <tessera/router/detail/token.hpp>
#include <tessera/router/routing.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

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

/// Adds a token's values of the losses on load of kind `By` to `sums`. @param probabilities Of the token.
template <balance_by By, class... Balances, accumulate_type A>
void add_load_losses(const std::tuple<typename Balances::options...>& policies, const A* probabilities, const A* load,
                     int num_experts, double* sums) {
  for_each_loss<Balances...>(policies, [&](auto tag, const auto& policy, int loss) {
    using balance = typename decltype(tag)::type;
    if constexpr (balance::by == By) {
      A token = A(0);
      for (int e = 0; e < num_experts; ++e) token += balance::value(probabilities[e], load[e], policy);
      sums[loss] += static_cast<double>(token);
    }
  });
}

/// Adds a token's values of the losses on the size of its logits to `sums`.
template <class... Balances, accumulate_type A>
void add_size_losses(const std::tuple<typename Balances::options...>& policies, const A* logits, int num_experts,
                     double* sums) {
  A exp[max_experts];
  A sum;
  const A log_sum = log_sum_exp(logits, num_experts, exp, sum);
  for_each_loss<Balances...>(policies, [&](auto tag, const auto& policy, int loss) {
    using balance = typename decltype(tag)::type;
    if constexpr (balance::by == balance_by::log_sum_exp) {
      sums[loss] += static_cast<double>(balance::value(log_sum, policy));
    }
  });
}

/// The losses whose scope is the batch, chunk by chunk; those of sequences are 0 afterwards.
template <class Score, class... Balances, class Options, accumulate_type A>
void batch_losses(const Options& options, const router_inputs<A>& in, const_balance_counts global_counts,
                  const float* coefficients, std::int64_t chunk_tokens, matrix_view<A> chunk_losses) {
  const int num_experts = options.num_experts;
  const std::int64_t num_tokens = in.logits.rows;
  A load[max_experts];
  loads(global_counts.data, num_experts, options.top_k, global_counts.tokens(), load);
  const std::int64_t chunk = chunk_tokens == 0 ? num_tokens : chunk_tokens;
  for (std::int64_t first = 0; first < num_tokens; first += chunk) {
    const std::int64_t last = first + chunk < num_tokens ? first + chunk : num_tokens;
    double sums[sizeof...(Balances)] = {};
    for (std::int64_t t = first; t < last; ++t) {
      const A* const logits = in.logits.row(t);
      if constexpr (has_balance<balance_by::batch_load, Balances...>) {
        A row[max_experts];
        all_scores<Score>(options.score, logits, num_experts, row);
        scores_to_probabilities<Score>(row, num_experts);
        add_load_losses<balance_by::batch_load, Balances...>(options.balance, row, load, num_experts, sums);
      }
      if constexpr (has_balance<balance_by::log_sum_exp, Balances...>) {
        add_size_losses<Balances...>(options.balance, logits, num_experts, sums);
      }
    }
    for (std::int64_t loss = 0; loss < chunk_losses.cols; ++loss) {
      chunk_losses(first / chunk, loss) = static_cast<A>(static_cast<double>(coefficients[loss]) * sums[loss] /
                                                         static_cast<double>(global_counts.tokens()));
    }
  }
}

/// Load of one sequence's experts, of choices without bias and without groups.
/// @param scores Calls `scores(t)`, which gives the scores of token t where the selection needs them.
template <class Score, class Options, accumulate_type A, class Scores>
void sequence_loads(const Options& options, const router_inputs<A>& in, std::int64_t first, std::int64_t last,
                    Scores&& scores, A* load) {
  std::int32_t counts[max_experts] = {};
  for (std::int64_t t = first; t < last; ++t) {
    count_unbiased<Score>(in.logits.row(t), scores(t), options.num_experts, options.top_k, counts);
  }
  loads(counts, options.num_experts, options.top_k, last - first, load);
}

/// Adds the losses whose scope is a sequence, to the chunk of its last token.
template <class Score, class... Balances, class Options, accumulate_type A>
void sequence_losses(const Options& options, const router_inputs<A>& in, const_balance_counts global_counts,
                     const float* coefficients, std::int64_t chunk_tokens, matrix_view<A> chunk_losses) {
  const int num_experts = options.num_experts;
  A load[max_experts];
  A row[max_experts];
  for_each_sequence(in.sequence_offsets, in.logits.rows, [&](std::int64_t first, std::int64_t last) {
    const auto scores = [&](std::int64_t t) {
      if constexpr (!score_selects_on_logits<Score>) {
        all_scores<Score>(options.score, in.logits.row(t), num_experts, row);
      }
      return static_cast<const A*>(row);
    };
    sequence_loads<Score>(options, in, first, last, scores, load);
    double sums[sizeof...(Balances)] = {};
    for (std::int64_t t = first; t < last; ++t) {
      all_scores<Score>(options.score, in.logits.row(t), num_experts, row);
      scores_to_probabilities<Score>(row, num_experts);
      add_load_losses<balance_by::sequence_load, Balances...>(options.balance, row, load, num_experts, sums);
    }
    const double scope = static_cast<double>(global_counts.sequences()) * static_cast<double>(last - first);
    const std::int64_t chunk = chunk_tokens == 0 ? 0 : (last - 1) / chunk_tokens;
    for_each_loss<Balances...>(options.balance, [&](auto tag, const auto&, int loss) {
      if constexpr (decltype(tag)::type::by == balance_by::sequence_load) {
        chunk_losses(chunk, loss) += static_cast<A>(static_cast<double>(coefficients[loss]) * sums[loss] / scope);
      }
    });
  });
}

}  // namespace detail

TESSERA_NAMESPACE_END
