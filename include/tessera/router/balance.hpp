// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Balances: losses on the router, and the bias that needs none. Any combination of different ones.

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

/// What a balance acts on. A loss on load is
///
///   `coefficient * mean over scopes of (mean over tokens t of the scope of (sum over experts i of value(p_ti,
///   load_i)))`
///
/// with probabilities `p` and `load_i = E / (K T_scope) * count_i`, which is 1 when the experts of the scope are used
/// evenly. Counts carry no gradient. Probabilities sum to 1 over all E: softmax of the logits (of `value(logit)`) for
/// softmax scores, selected or not; `s_i / sum_j s_j` for the others.
enum class balance_by {
  batch_load,      ///< Loss on load. One scope: the micro-batch of all ranks; counts of what was selected.
  sequence_load,   ///< Loss on load. Scopes: sequences; counts of the top K without bias and without groups.
  log_sum_exp,     ///< Loss `coefficient * mean over tokens of value(log sum_i exp(logit_i))` over all ranks' tokens.
  selection_bias,  ///< No loss: a bias `[E]` added to the keys of the selection.
};

/// Atom: `typename B::options`, default-constructible.
template <class B>
concept balance_has_options = requires {
  typename B::options;
  requires std::default_initializable<typename B::options>;
};

/// Atom: `static constexpr balance_by by`.
template <class B>
concept balance_states_by = requires {
  { B::by } -> std::convertible_to<balance_by>;
};

/// Atom: `static constexpr std::string_view name`, for metrics and checkpoints.
template <class B>
concept balance_has_name = requires {
  { B::name } -> std::convertible_to<std::string_view>;
};

/// Atom: a loss has `float options::coefficient`.
template <class B>
concept balance_has_coefficient = B::by == balance_by::selection_bias || requires(const typename B::options& options) {
  { options.coefficient } -> std::convertible_to<float>;
};

/// Atom: a loss has `static A value(A p, A load, const options&)` (on load) or `static A value(A lse, const options&)`.
template <class B>
concept balance_has_value = B::by == balance_by::selection_bias ||
                            (B::by == balance_by::log_sum_exp &&
                             requires(double d, const typename B::options& options) {
                               { B::value(d, options) } -> std::same_as<double>;
                             }) ||
                            (B::by != balance_by::log_sum_exp &&
                             requires(double d, const typename B::options& options) {
                               { B::value(d, d, options) } -> std::same_as<double>;
                             });

/// Atom: a loss has `derivative` with the parameters of `value`: the derivative by the first of them.
template <class B>
concept balance_has_derivative = B::by == balance_by::selection_bias ||
                                 (B::by == balance_by::log_sum_exp &&
                                  requires(double d, const typename B::options& options) {
                                    { B::derivative(d, options) } -> std::same_as<double>;
                                  }) ||
                                 (B::by != balance_by::log_sum_exp &&
                                  requires(double d, const typename B::options& options) {
                                    { B::derivative(d, d, options) } -> std::same_as<double>;
                                  });

/// A balance. Functions are `TESSERA_HD` templates over float and double. Optional: `static void check(const
/// options&)`, which throws `invalid_argument`.
template <class B>
concept balance_policy = balance_has_options<B> && balance_states_by<B> && balance_has_name<B> &&
    balance_has_coefficient<B> && balance_has_value<B> && balance_has_derivative<B>;

/// True for balances that are losses.
template <class B>
inline constexpr bool balance_is_loss = B::by != balance_by::selection_bias;

/// True for losses on load, which need probabilities.
template <class B>
inline constexpr bool balance_on_load = B::by == balance_by::batch_load || B::by == balance_by::sequence_load;

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

inline void check_bias_rate(float rate) {
  TESSERA_EXPECTS(std::isfinite(rate) && rate >= 0.0f, "the bias rate is " << rate << ", it must be finite and >= 0");
}

}  // namespace detail

/// Balance policies.
namespace balance {

/// `coefficient * E / (K T) * sum_i count_i * mean_t p_ti` (Switch Transformer, GShard; MegaBlocks'
/// `batched_load_balancing_loss`); `coefficient` when even.
struct switch_loss {
  /// Values.
  struct options {
    float coefficient = 0.01f;  ///< Factor of the loss.
  };
  static constexpr balance_by by = balance_by::batch_load;  ///< Load of the micro-batch.
  static constexpr std::string_view name = "switch_loss";   ///< In metrics.
  /// `load * p`.
  template <accumulate_type A>
  TESSERA_HD static constexpr A value(A p, A load, const options&) {
    return load * p;
  }
  /// `load`.
  template <accumulate_type A>
  TESSERA_HD static constexpr A derivative(A, A load, const options&) {
    return load;
  }
};

/// The same within each sequence: `coefficient * mean over sequences of sum_i f_i P_i` (arXiv 2412.19437, eq 17 to 20).
/// A sequence lies within one call. Its loss is reported with the chunk of its last token.
struct sequence_loss {
  /// Values.
  struct options {
    float coefficient = 1e-4f;  ///< Factor of the loss.
  };
  static constexpr balance_by by = balance_by::sequence_load;  ///< Load of each sequence.
  static constexpr std::string_view name = "sequence_loss";    ///< In metrics.
  /// `load * p`.
  template <accumulate_type A>
  TESSERA_HD static constexpr A value(A p, A load, const options&) {
    return load * p;
  }
  /// `load`.
  template <accumulate_type A>
  TESSERA_HD static constexpr A derivative(A, A load, const options&) {
    return load;
  }
};

/// `coefficient * mean_t (log sum_i exp(logit_ti))^2` (ST-MoE, arXiv 2202.08906, eq 5).
struct z_loss {
  /// Values.
  struct options {
    float coefficient = 1e-3f;  ///< Factor of the loss.
  };
  static constexpr balance_by by = balance_by::log_sum_exp;  ///< Size of the logits.
  static constexpr std::string_view name = "z_loss";         ///< In metrics.
  /// `lse^2`.
  template <accumulate_type A>
  TESSERA_HD static constexpr A value(A lse, const options&) {
    return lse * lse;
  }
  /// `2 lse`.
  template <accumulate_type A>
  TESSERA_HD static constexpr A derivative(A lse, const options&) {
    return A(2) * lse;
  }
};

/// Auxiliary-loss-free balance (arXiv 2412.19437, eq 16): a bias `[E]` selects and never weighs. It is state, moved by
/// `update_bias` once per optimizer step.
struct bias {
  /// Values.
  struct options {
    float rate = 1e-3f;  ///< Step of `update_bias`, where the caller does not schedule it.
  };
  static constexpr balance_by by = balance_by::selection_bias;  ///< A bias on the keys.
  static constexpr std::string_view name = "bias";              ///< In metrics and checkpoints.
  /// @throws invalid_argument if the rate is negative or not finite.
  static void check(const options& options) { detail::check_bias_rate(options.rate); }
};

/// One step of the bias rule: `bias[e] -= rate` where `load[e]` is above the mean, `+= rate` where it is below,
/// unchanged where it is equal. Compares the integers `load[e] * E` and `sum(load)`, so the result does not depend on
/// how the load was summed. Host: returns when done.
/// @param bias        `[num_experts]`, updated.
/// @param load        `[num_experts]`, selections of each expert over the whole global batch: every rank, every
///                    micro-batch, each token once (recomputation does not count).
/// @param num_experts E.
/// @param rate        Size of the step, at least 0.
/// @throws invalid_argument if the rate is negative or not finite, or a load is negative; the bias is unchanged.
inline void update_bias(host_stream, float* bias, const std::int64_t* load, int num_experts, float rate) {
  detail::check_bias_rate(rate);
  std::int64_t sum = 0;
  for (int e = 0; e < num_experts; ++e) {
    TESSERA_EXPECTS(load[e] >= 0, "the load of expert " << e << " is " << load[e] << ", a count cannot be negative");
    sum += load[e];
  }
  for (int e = 0; e < num_experts; ++e) {
    const std::int64_t scaled = load[e] * num_experts;
    if (scaled > sum) bias[e] -= rate;
    if (scaled < sum) bias[e] += rate;
  }
}

/// As above for device memory; enqueues, does not synchronise. Defined in the device half.
/// @param stream      Where the work is enqueued.
/// @param bias        `[num_experts]`, updated.
/// @param load        `[num_experts]`.
/// @param num_experts E.
/// @param rate        A device scalar.
void update_bias(device_stream stream, float* bias, const std::int64_t* load, int num_experts, const float* rate);

}  // namespace balance

TESSERA_NAMESPACE_END
