// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The router: logits in, routing out, and the joint backward of weights and balance losses. Includes the whole room.

#include <array>
#include <cstdint>
#include <string_view>
#include <tuple>
#include <type_traits>

#include <tessera/core/device_status.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/router/balance.hpp>
#include <tessera/router/compatible.hpp>
#include <tessera/router/lists.hpp>
#include <tessera/router/routing.hpp>
#include <tessera/router/score.hpp>
#include <tessera/router/select.hpp>
#include <tessera/router/weigh.hpp>

TESSERA_NAMESPACE_BEGIN

/// Score x selection x weighing x balances. An object is a few numbers: copy it freely, share it between threads.
///
/// A router does not communicate. `route` counts locally; the caller sums the counts over all ranks (integers) and
/// gives them to `losses` and `backward`, whose results for a token then do not depend on how the tokens are spread
/// over ranks.
///
/// Rules, each pinned by a test: ties go to the lowest expert id; experts of unselected groups are masked with -inf;
/// the bias selects and never weighs; normalisation comes before the scale and adds no epsilon unless asked; logits
/// must be finite (NaN and infinities are refused); counts carry no gradient.
///
/// Every per-token result depends on the token's own inputs and on the global counts alone: not on T, on neighbours or
/// on the order of calls. No function allocates.
template <class Score = score::softmax, class Select = select::top_k, class Weigh = weigh::normalized,
          class... Balances>
class router {
  static_assert(score_policy<Score>,
                "tessera::router: the first argument must be a score policy with options, over, value and derivative "
                "(router/score.hpp); models: score::softmax, softmax_selected, sigmoid, sigmoid_selected, "
                "sqrt_softplus");
  static_assert(select_policy<Select>,
                "tessera::router: the second argument must be a selection policy with options and by "
                "(router/select.hpp); models: select::top_k, group_limited<...>, hash, external");
  static_assert(weigh_policy<Weigh>,
                "tessera::router: the third argument must be a weighing policy with options, value and its two "
                "derivatives (router/weigh.hpp); models: weigh::raw, normalized, on_input<...>");
  static_assert((balance_policy<Balances> && ...),
                "tessera::router: the arguments after the third must be balance policies with options, by, name, and "
                "for losses value and derivative (router/balance.hpp); models: balance::switch_loss, sequence_loss, "
                "z_loss, bias");
  static_assert(compatible<Score, Select, Weigh, Balances...>,
                "tessera::router: these policies do not go together; router/compatible.hpp lists what does not and "
                "what to use instead");

 public:
  using score_type = Score;    ///< Score policy.
  using select_type = Select;  ///< Selection policy.
  using weigh_type = Weigh;    ///< Weighing policy.

  /// True with `balance::bias`: `inputs::bias` is read and the caller keeps `[E]` floats of state.
  static constexpr bool has_bias = (false || ... || (Balances::by == balance_by::selection_bias));
  /// True with `select::hash`: `inputs::token_ids` is read.
  static constexpr bool needs_token_ids = Select::by == select_by::token_id;
  /// True with `select::external`: `inputs::expert_ids` is read.
  static constexpr bool needs_expert_ids = Select::by == select_by::given;
  /// True where the weight multiplies the expert's input.
  static constexpr bool weights_on_input = Weigh::weighs_input;
  /// Number of balances that are losses.
  static constexpr int num_losses = (0 + ... + int(balance_is_loss<Balances>));

  /// What a router is made with. Designated initialisers work:
  /// `{.num_experts = 256, .top_k = 8, .select = {.groups = 8, .kept_groups = 4}, .weigh = {.scale = 2.5f}}`.
  struct options {
    int num_experts = 0;                                  ///< E, in [1, `max_experts`].
    int top_k = 0;                                        ///< K, in [1, min(E, `max_top_k`)].
    typename Score::options score{};                      ///< Of the score.
    typename Select::options select{};                    ///< Of the selection.
    typename Weigh::options weigh{};                      ///< Of the weighing.
    std::tuple<typename Balances::options...> balance{};  ///< One of each balance, in their order.
  };

  /// What `route`, `losses` and `backward` read.
  template <accumulate_type A>
  using inputs = router_inputs<A>;

  /// @throws invalid_argument if sizes, groups, table, scale, coefficients or the bias rate cannot work.
  explicit router(const options& chosen);

  /// E.
  int num_experts() const noexcept { return options_.num_experts; }
  /// K.
  int top_k() const noexcept { return options_.top_k; }
  /// As given.
  const options& get_options() const noexcept { return options_; }

  /// Names of the losses, in the order of `coefficients` and of the columns of `chunk_losses`.
  static constexpr std::array<std::string_view, num_losses> loss_names();
  /// Coefficients of the losses as the options give them. Functions take coefficients apart from the options, so that a
  /// schedule needs no new router.
  std::array<float, num_losses> default_coefficients() const;

  /// Chooses K experts for each token, and their weights. Host: returns when done.
  /// @param stream       Order of the work.
  /// @param in           `[T, E]` logits and what the policies need; T may be 0.
  /// @param out          `[T, K]` ids and weights, written. Descending keys; ids from a table or caller as given.
  /// @param local_counts `[E + 2]`, overwritten with this call's selections, tokens and sequences; without data nothing
  ///                     is counted (recomputation, evaluation).
  /// @throws invalid_argument naming token, slot or expert if shapes do not fit, a logit or bias is not finite, an id
  ///         is out of range or repeated, or views overlap: checked before anything is written. A user's score that
  ///         gives fewer than K numbers above -inf is found later: outputs are then partly written.
  template <accumulate_type A>
  void route(host_stream stream, const router_inputs<A>& in, routing<A> out, balance_counts local_counts) const;

  /// Values of the balance losses, coefficients included, this rank's share. The sum over the chunks of all ranks is
  /// the loss. Host: returns when done.
  /// @param stream        Order of the work.
  /// @param in            As given to `route`.
  /// @param global_counts `[E + 2]`, sum of the local counts over all ranks of the micro-batch. Ignored without losses.
  /// @param coefficients  `[num_losses]`; may be null without losses.
  /// @param chunk_tokens  Tokens per chunk; 0: one chunk.
  /// @param chunk_losses  `[num_chunks(T, chunk_tokens), num_losses]`, overwritten. A chunk's row depends on its tokens
  ///                      and the global counts alone, unless a sequence crosses its border: `sequence_loss` reports a
  ///                      sequence with the chunk of its last token.
  /// @throws invalid_argument if shapes do not fit, a logit is not finite or the counts are smaller than this call's:
  ///         checked before anything is written.
  template <accumulate_type A>
  void losses(host_stream stream, const router_inputs<A>& in, const_balance_counts global_counts,
              const float* coefficients, std::int64_t chunk_tokens, matrix_view<A> chunk_losses) const;

  /// Gradient of `sum(dweights * weights) + loss_scale * (sum of the losses)` by the logits. Scores are computed again:
  /// what must be kept from `route` are logits and ids. Host: returns when done.
  /// @param stream        Order of the work.
  /// @param in            As given to `route`.
  /// @param routed        Ids as `route` wrote them (also those whose row a capacity limit dropped: their `dweights`
  ///                      are 0); weights are not read.
  /// @param dweights      `[T, K]`; not read in slots of `no_expert`.
  /// @param global_counts As for `losses`.
  /// @param coefficients  `[num_losses]`; may be null without losses.
  /// @param loss_scale    Factor of the losses' part, for loss scaling and gradient accumulation.
  /// @param dlogits       `[T, E]`, overwritten; may not overlap an input.
  /// @throws invalid_argument if shapes do not fit, a logit is not finite, an id is out of range, the counts are
  ///         smaller than this call's, or views overlap: checked before anything is written.
  template <accumulate_type A>
  void backward(host_stream stream, const router_inputs<A>& in, const routing<A>& routed, matrix_view<const A> dweights,
                const_balance_counts global_counts, const float* coefficients, A loss_scale,
                matrix_view<A> dlogits) const;

  /// `route` in device memory, defined in the device half: enqueues, does not synchronise.
  /// @param stream       Where the work is enqueued.
  /// @param in           Device memory.
  /// @param out          Device memory.
  /// @param local_counts Device memory.
  /// @param status       Device memory; null: faults are not reported.
  /// @throws invalid_argument if shapes do not fit, cuda_error if the launch fails.
  template <accumulate_type A>
  void route(device_stream stream, const router_inputs<A>& in, routing<A> out, balance_counts local_counts,
             device_status* status = nullptr) const;

  /// `losses` in device memory, defined in the device half: enqueues, does not synchronise.
  /// @param stream        Where the work is enqueued.
  /// @param in            Device memory.
  /// @param global_counts Device memory.
  /// @param coefficients  Device memory.
  /// @param chunk_tokens  Tokens per chunk; 0: one chunk.
  /// @param chunk_losses  Device memory.
  /// @param token_losses  Device memory, scratch `[T, num_losses]`, with which the whole device works; null: each chunk
  ///                      is work of 8 blocks at most. With `balance::sequence_loss` both are the same.
  /// @throws invalid_argument if shapes do not fit, cuda_error if a launch fails.
  template <accumulate_type A>
  void losses(device_stream stream, const router_inputs<A>& in, const_balance_counts global_counts,
              const float* coefficients, std::int64_t chunk_tokens, matrix_view<A> chunk_losses,
              std::type_identity_t<A>* token_losses = nullptr) const;

  /// `backward` in device memory, defined in the device half: enqueues, does not synchronise.
  /// @param stream        Where the work is enqueued.
  /// @param in            Device memory.
  /// @param routed        Device memory.
  /// @param dweights      Device memory.
  /// @param global_counts Device memory.
  /// @param coefficients  Device memory.
  /// @param loss_scale    Factor of the losses' part.
  /// @param dlogits       Device memory.
  /// @throws invalid_argument if shapes do not fit or views overlap, cuda_error if the launch fails.
  template <accumulate_type A>
  void backward(device_stream stream, const router_inputs<A>& in, const routing<A>& routed,
                matrix_view<const A> dweights, const_balance_counts global_counts, const float* coefficients,
                A loss_scale, matrix_view<A> dlogits) const;
  /// The same with `loss_scale` a device scalar, not null, so that graphs see a schedule. The rest as there.
  template <accumulate_type A>
  void backward(device_stream stream, const router_inputs<A>& in, const routing<A>& routed,
                matrix_view<const A> dweights, const_balance_counts global_counts, const float* coefficients,
                const float* loss_scale, matrix_view<A> dlogits) const;

 private:
  options options_;
};

TESSERA_NAMESPACE_END

#include <tessera/router/detail/router.hpp>
