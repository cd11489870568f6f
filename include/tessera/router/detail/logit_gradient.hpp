// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Joint backward of a router: the gradient by the logits of one token after another.

#include <cstdint>

#include <tessera/core/views.hpp>
#include <tessera/router/balance.hpp>
#include <tessera/router/detail/token.hpp>
#include <tessera/router/detail/token_losses.hpp>
#include <tessera/router/routing.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// A token's row of `dlogits` holds its scores, where they are needed, until its gradient replaces them.
template <accumulate_type A, class Options, class Score, class Weigh, class... Balances>
class logit_gradient {
 public:
  static constexpr bool by_batch = has_balance<balance_by::batch_load, Balances...>;
  static constexpr bool by_sequence = has_balance<balance_by::sequence_load, Balances...>;
  static constexpr bool by_size = has_balance<balance_by::log_sum_exp, Balances...>;

  logit_gradient(const Options& options, const router_inputs<A>& in, const routing<A>& routed,
                 const matrix_view<const A>& dweights, const_balance_counts counts, const float* coefficients,
                 A loss_scale, const matrix_view<A>& dlogits)
      : options_(options),
        in_(in),
        routed_(routed),
        dweights_(dweights),
        counts_(counts),
        coefficients_(coefficients),
        scale_(static_cast<double>(loss_scale)),
        dlogits_(dlogits) {
    if constexpr (by_batch) loads(counts.data, options.num_experts, options.top_k, counts.tokens(), batch_load_);
  }

  /// Before the tokens of a sequence, where there is a loss on sequences: their scores and their load.
  void start_sequence(std::int64_t first, std::int64_t last) {
    const auto scores = [&](std::int64_t t) {
      start_token(t);
      return static_cast<const A*>(dlogits_.row(t));
    };
    sequence_loads<Score>(options_, in_, first, last, scores, sequence_load_);
    sequence_tokens_ = last - first;
  }

  /// Before a token, where there is none: its scores.
  void start_token(std::int64_t t) {
    if constexpr (scores_all) {
      all_scores<Score>(options_.score, in_.logits.row(t), options_.num_experts, dlogits_.row(t));
    }
  }

  /// Writes the gradient of a token that was started.
  void token(std::int64_t t) {
    const A* const logits = in_.logits.row(t);
    const std::int32_t* const ids = routed_.expert_ids.row(t);
    A* const row = dlogits_.row(t);
    A selected[max_top_k];
    A dselected[max_top_k];
    by_selected(t, logits, ids, row, selected, dselected);
    if constexpr (scores_all) {
      through_probabilities(logits, ids, dselected, row);
    } else {
      for (int e = 0; e < options_.num_experts; ++e) row[e] = A(0);
    }
    if constexpr (Score::over != score_over::all) through_selected(logits, ids, selected, dselected, row);
    if constexpr (by_size) through_log_sum(logits, row);
  }

 private:
  static constexpr bool scores_all = Score::over == score_over::all || by_batch || by_sequence;

  // The selected scores, and the gradient of the weights by them.
  void by_selected(std::int64_t t, const A* logits, const std::int32_t* ids, const A* row, A* selected,
                   A* dselected) const {
    const int k = options_.top_k;
    selected_scores<Score>(options_.score, logits, scores_all ? row : nullptr, ids, k, selected);
    A sum = A(0);
    for (int i = 0; i < k; ++i) sum += selected[i];
    A dsum = A(0);
    for (int i = 0; i < k; ++i) {
      if (ids[i] == no_expert) continue;
      dselected[i] = dweights_(t, i) * Weigh::derivative_by_score(selected[i], sum, options_.weigh);
      dsum += dweights_(t, i) * Weigh::derivative_by_sum(selected[i], sum, options_.weigh);
    }
    for (int i = 0; i < k; ++i) dselected[i] = ids[i] == no_expert ? A(0) : dselected[i] + dsum;
  }

  // Adds the gradient of the losses on load by every probability to `dp`.
  void by_probability(const A* probabilities, A* dp) const {
    for_each_loss<Balances...>(options_.balance, [&](auto tag, const auto& policy, int loss) {
      using balance = typename decltype(tag)::type;
      if constexpr (balance_on_load<balance>) {
        const A* load = nullptr;
        double scope = 0;
        if constexpr (balance::by == balance_by::batch_load) {
          load = batch_load_;
          scope = static_cast<double>(counts_.tokens());
        } else {
          load = sequence_load_;
          scope = static_cast<double>(counts_.sequences()) * static_cast<double>(sequence_tokens_);
        }
        const A factor = static_cast<A>(scale_ * static_cast<double>(coefficients_[loss]) / scope);
        for (int e = 0; e < options_.num_experts; ++e) {
          dp[e] += factor * balance::derivative(probabilities[e], load[e], policy);
        }
      }
    });
  }

  // Gradient by every probability, then by `value(logit)` through the normalisation of the probabilities.
  void through_probabilities(const A* logits, const std::int32_t* ids, const A* dselected, A* row) const {
    const typename Score::options& score = options_.score;
    const int num_experts = options_.num_experts;
    [[maybe_unused]] const A total = scores_to_probabilities<Score>(row, num_experts);
    A dp[max_experts];
    for (int e = 0; e < num_experts; ++e) dp[e] = A(0);
    by_probability(row, dp);
    if constexpr (Score::over == score_over::all) {
      for (int i = 0; i < options_.top_k; ++i) {
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
  }

  // Adds the gradient through the scores of the selected, each on its own or through their softmax.
  void through_selected(const A* logits, const std::int32_t* ids, const A* selected, const A* dselected, A* row) const {
    const typename Score::options& score = options_.score;
    const int k = options_.top_k;
    if constexpr (Score::over == score_over::each) {
      for (int i = 0; i < k; ++i) {
        if (ids[i] != no_expert) row[ids[i]] += dselected[i] * Score::derivative(logits[ids[i]], selected[i], score);
      }
    } else {
      A mean = A(0);
      for (int i = 0; i < k; ++i) mean += selected[i] * dselected[i];
      for (int i = 0; i < k; ++i) {
        if (ids[i] == no_expert) continue;
        const A logit = logits[ids[i]];
        row[ids[i]] +=
            selected[i] * (dselected[i] - mean) * Score::derivative(logit, Score::value(logit, score), score);
      }
    }
  }

  // Adds the gradient of the losses on the size of the logits.
  void through_log_sum(const A* logits, A* row) const {
    A exp[max_experts];
    A total;
    const A log_sum = log_sum_exp(logits, options_.num_experts, exp, total);
    A dlog_sum = A(0);
    for_each_loss<Balances...>(options_.balance, [&](auto tag, const auto& policy, int loss) {
      using balance = typename decltype(tag)::type;
      if constexpr (balance::by == balance_by::log_sum_exp) {
        const double scope = static_cast<double>(counts_.tokens());
        dlog_sum += static_cast<A>(scale_ * static_cast<double>(coefficients_[loss]) / scope) *
                    balance::derivative(log_sum, policy);
      }
    });
    for (int e = 0; e < options_.num_experts; ++e) row[e] += dlog_sum * (exp[e] / total);
  }

  const Options& options_;
  const router_inputs<A>& in_;
  const routing<A>& routed_;
  matrix_view<const A> dweights_;
  const_balance_counts counts_;
  const float* coefficients_;
  double scale_;
  matrix_view<A> dlogits_;
  std::int64_t sequence_tokens_ = 0;
  A batch_load_[by_batch ? max_experts : 1];
  A sequence_load_[by_sequence ? max_experts : 1];
};

}  // namespace detail

TESSERA_NAMESPACE_END
