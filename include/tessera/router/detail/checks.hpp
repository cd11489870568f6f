// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a router's host functions check before they write. Apart from the router's class template, so that each message
/// is compiled once and not once per combination of policies.

#include <cstdint>
#include <span>
#include <string_view>

#include <tessera/core/error.hpp>
#include <tessera/core/views.hpp>
#include <tessera/router/balance.hpp>
#include <tessera/router/detail/token.hpp>
#include <tessera/router/routing.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline void check_sizes(int num_experts, int top_k) {
  TESSERA_EXPECTS(num_experts >= 1 && num_experts <= max_experts,
                  "num_experts = " << num_experts << " is outside [1, " << max_experts << "]");
  TESSERA_EXPECTS(top_k >= 1, "top_k = " << top_k << ", it must be at least 1");
  TESSERA_EXPECTS(top_k <= num_experts, "top_k = " << top_k << " exceeds num_experts = " << num_experts);
  TESSERA_EXPECTS(top_k <= max_top_k, "top_k = " << top_k << " exceeds the limit of " << max_top_k);
}

inline void check_coefficient(float coefficient, std::string_view name) {
  TESSERA_EXPECTS(is_finite(coefficient), name << " has coefficient = " << coefficient << ", it must be finite");
}

template <class Balance>
void check_balance(const typename Balance::options& options) {
  if constexpr (balance_is_loss<Balance>) check_coefficient(options.coefficient, Balance::name);
  if constexpr (requires { Balance::check(options); }) Balance::check(options);
}

/// Calls `f(first, last)` for each sequence that has a token.
template <class F>
void for_each_sequence(std::span<const std::int32_t> offsets, std::int64_t num_tokens, F&& f) {
  if (offsets.empty()) {
    if (num_tokens > 0) f(std::int64_t{0}, num_tokens);
    return;
  }
  for (std::size_t s = 1; s < offsets.size(); ++s) {
    if (offsets[s - 1] < offsets[s]) f(std::int64_t{offsets[s - 1]}, std::int64_t{offsets[s]});
  }
}

inline std::int64_t count_sequences(std::span<const std::int32_t> offsets, std::int64_t num_tokens) {
  std::int64_t sequences = 0;
  for_each_sequence(offsets, num_tokens, [&](std::int64_t, std::int64_t) { ++sequences; });
  return sequences;
}

inline void check_sequences(std::span<const std::int32_t> offsets, std::int64_t num_tokens) {
  if (offsets.empty()) return;
  TESSERA_EXPECTS(offsets.front() == 0 && offsets.back() == num_tokens,
                  "sequence_offsets run from " << offsets.front() << " to " << offsets.back()
                                               << ", they must run from 0 to the number of tokens, " << num_tokens);
  for (std::size_t s = 1; s < offsets.size(); ++s) {
    TESSERA_EXPECTS(offsets[s - 1] <= offsets[s], "sequence_offsets[" << s - 1 << "] = " << offsets[s - 1]
                                                                      << " exceeds sequence_offsets[" << s
                                                                      << "] = " << offsets[s]);
  }
}

/// Logits and sequences, which every function reads.
template <accumulate_type A>
void check_inputs(const router_inputs<A>& in, int num_experts) {
  expect_matrix(in.logits, -1, num_experts, "logits");
  for (std::int64_t t = 0; t < in.logits.rows; ++t) {
    const int e = find_not_finite(in.logits.row(t), num_experts);
    TESSERA_EXPECTS(e < 0, "the logit of token " << t << " for expert " << e << " is " << in.logits(t, e)
                                                 << ", logits must be finite");
  }
  check_sequences(in.sequence_offsets, in.logits.rows);
}

inline void check_bias(const float* bias, bool has_bias, int num_experts) {
  if (bias == nullptr) return;
  TESSERA_EXPECTS(has_bias, "a bias was given to a router without balance::bias");
  const int e = find_not_finite(bias, num_experts);
  TESSERA_EXPECTS(e < 0, "the bias of expert " << e << " is " << bias[e] << ", it must be finite");
}

/// Ids of one token. @param source How the message calls them. @param may_be_unused Whether `no_expert` is an id.
inline void check_ids(const std::int32_t* ids, int top_k, int num_experts, std::int64_t token, const char* source,
                      bool may_be_unused) {
  for (int i = 0; i < top_k; ++i) {
    if (may_be_unused && ids[i] == no_expert) continue;
    TESSERA_EXPECTS(ids[i] >= 0 && ids[i] < num_experts, source << " gives token " << token << " expert id " << ids[i]
                                                                << " in slot " << i << ", outside [0, " << num_experts
                                                                << ")");
    for (int j = 0; j < i; ++j) {
      TESSERA_EXPECTS(ids[j] != ids[i], source << " gives token " << token << " expert id " << ids[i] << " in slots "
                                               << j << " and " << i << ", the ids of a token must differ");
    }
  }
}

/// Ids of all tokens, unused slots allowed.
template <class Id>
void check_all_ids(const matrix_view<Id>& ids, std::int64_t num_tokens, int top_k, int num_experts, const char* name) {
  expect_matrix(ids, num_tokens, top_k, name);
  for (std::int64_t t = 0; t < num_tokens; ++t) check_ids(ids.row(t), top_k, num_experts, t, name, true);
}

/// Token ids, and the rows of the table that they point to.
inline void check_table(std::span<const std::int32_t> token_ids, const std::int32_t* table, std::int64_t vocab,
                        std::int64_t num_tokens, int top_k, int num_experts) {
  TESSERA_EXPECTS(
      static_cast<std::int64_t>(token_ids.size()) == num_tokens,
      "select::hash needs one token id per token, it got " << token_ids.size() << " for " << num_tokens << " tokens");
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    const std::int64_t id = token_ids[static_cast<std::size_t>(t)];
    TESSERA_EXPECTS(id >= 0 && id < vocab,
                    "token " << t << " has id " << id << ", outside the table's vocabulary [0, " << vocab << ")");
    check_ids(table + id * top_k, top_k, num_experts, t, "the table of select::hash", false);
  }
}

/// What `route` writes.
template <accumulate_type A>
void check_routing_out(const router_inputs<A>& in, const routing<A>& out, const balance_counts& counts, int num_experts,
                       int top_k) {
  expect_matrix(out.expert_ids, in.logits.rows, top_k, "routing.expert_ids");
  expect_matrix(out.weights, in.logits.rows, top_k, "routing.weights");
  expect_disjoint(out.expert_ids, "routing.expert_ids", in.logits, "logits");
  expect_disjoint(out.weights, "routing.weights", in.logits, "logits");
  expect_disjoint(out.expert_ids, "routing.expert_ids", out.weights, "routing.weights");
  TESSERA_EXPECTS(counts.data == nullptr || counts.num_experts == num_experts,
                  "local_counts are of " << counts.num_experts << " experts, the router has " << num_experts);
}

/// What losses read besides the inputs.
inline void check_loss_inputs(const const_balance_counts& counts, const float* coefficients, int num_losses,
                              int num_experts, std::int64_t num_tokens, std::int64_t num_sequences) {
  if (num_losses == 0) return;
  TESSERA_EXPECTS(counts.data != nullptr, "balance losses need global_counts, these have no data");
  TESSERA_EXPECTS(counts.num_experts == num_experts,
                  "global_counts are of " << counts.num_experts << " experts, the router has " << num_experts);
  TESSERA_EXPECTS(counts.tokens() >= num_tokens && counts.sequences() >= num_sequences,
                  "global_counts hold " << counts.tokens() << " tokens in " << counts.sequences()
                                        << " sequences, this call alone has " << num_tokens << " in " << num_sequences
                                        << ": sum the local counts over all ranks first");
  TESSERA_EXPECTS(coefficients != nullptr, "balance losses need coefficients [" << num_losses << "]");
  for (int i = 0; i < num_losses; ++i) {
    TESSERA_EXPECTS(is_finite(coefficients[i]),
                    "coefficient " << i << " is " << coefficients[i] << ", it must be finite");
  }
}

/// What `losses` writes.
template <accumulate_type A>
void check_losses_out(const router_inputs<A>& in, std::int64_t chunk_tokens, const matrix_view<A>& chunk_losses,
                      int num_losses) {
  TESSERA_EXPECTS(chunk_tokens >= 0, "chunk_tokens = " << chunk_tokens << ", it must be at least 0");
  expect_matrix(chunk_losses, num_chunks(in.logits.rows, chunk_tokens), num_losses, "chunk_losses");
  expect_disjoint(chunk_losses, "chunk_losses", in.logits, "logits");
}

/// What `backward` reads besides the inputs, and writes.
template <accumulate_type A>
void check_backward_views(const router_inputs<A>& in, const routing<A>& routed, const matrix_view<const A>& dweights,
                          const matrix_view<A>& dlogits, int num_experts, int top_k) {
  check_all_ids(routed.expert_ids, in.logits.rows, top_k, num_experts, "routing.expert_ids");
  expect_matrix(dweights, in.logits.rows, top_k, "dweights");
  expect_matrix(dlogits, in.logits.rows, num_experts, "dlogits");
  expect_disjoint(dlogits, "dlogits", in.logits, "logits");
  expect_disjoint(dlogits, "dlogits", dweights, "dweights");
  expect_disjoint(dlogits, "dlogits", routed.expert_ids, "routing.expert_ids");
}

/// Throws where a score left fewer than K experts.
inline void check_complete(bool complete, std::int64_t token, int top_k) {
  TESSERA_EXPECTS(complete, "the scores of token " << token << " leave fewer than top_k = " << top_k
                                                   << " experts: a score must be a number above -inf");
}

}  // namespace detail

TESSERA_NAMESPACE_END
