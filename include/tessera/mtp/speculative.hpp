// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Drafts at inference: a proposal of several tokens is verified by one call of the main model. With greedy choices the
/// output is exactly that of the main model alone, however bad the proposals are; they only save calls.

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/views.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// Most tokens of one proposal.
inline constexpr int max_draft_depth = 16;

/// What became of proposals, by depth: depth k is the k-th token of a proposal, `[k - 1]` here.
struct acceptance {
  std::array<std::int64_t, max_draft_depth> proposed{};  ///< Tokens proposed at each depth.
  std::array<std::int64_t, max_draft_depth> accepted{};  ///< Of those, accepted, with all before them.
  std::int64_t calls = 0;                                ///< Calls of the main model.
  std::int64_t tokens = 0;                               ///< Tokens they have given, proposals and its own.

  /// Share of depth k's proposals that were accepted (DeepSeek-V3 reports 0.85 to 0.9 for k = 1); 0 without any.
  /// @param k From 1 to `max_draft_depth`. @throws invalid_argument if it is not.
  double rate(int k) const {
    TESSERA_EXPECTS(k >= 1 && k <= max_draft_depth,
                    "acceptance::rate: depth " << k << " is not in [1, " << max_draft_depth << "]");
    const auto i = static_cast<std::size_t>(k - 1);
    return proposed[i] == 0 ? 0.0 : static_cast<double>(accepted[i]) / static_cast<double>(proposed[i]);
  }
  /// Tokens for each call of the main model: 1 without proposals, at most D + 1; 0 without calls.
  double tokens_per_call() const { return calls == 0 ? 0.0 : static_cast<double>(tokens) / static_cast<double>(calls); }
};

/// What a verification has found.
struct verified {
  int accepted = 0;       ///< Leading drafts that the main model would have chosen itself.
  std::int32_t next = 0;  ///< Its own choice after them.
};

/// The greedy choice: the largest logit's id, the lowest of equal ones.
/// @param logits `[V]`, V at least 1. @param count V.
/// @throws invalid_argument if there is none, or one is not a number.
template <accumulate_type A>
std::int32_t greedy_choice(const A* logits, std::int64_t count) {
  TESSERA_EXPECTS(count >= 1 && logits != nullptr, "greedy_choice needs logits, there are " << count);
  std::int64_t best = 0;
  for (std::int64_t v = 0; v < count; ++v) {
    TESSERA_EXPECTS(logits[v] == logits[v], "greedy_choice: the logit of id " << v << " is not a number");
    if (logits[v] > logits[best]) best = v;
  }
  return static_cast<std::int32_t>(best);
}

/// Verifies drafts: the longest prefix in which every draft is the greedy choice after what precedes it, and the choice
/// after that prefix. Host: returns when done.
/// @param drafts `[n]`, at most `max_draft_depth`.
/// @param logits `[n + 1, V]` of the main model: row 0 after the last known token, row j after `drafts[j - 1]`.
/// @param record Counted up, all but `calls` and `tokens`; may be null.
/// @throws invalid_argument if shapes are wrong or a logit that is looked at is not a number.
template <accumulate_type A>
verified greedy_verify(std::span<const std::int32_t> drafts, matrix_view<const A> logits,
                       acceptance* record = nullptr) {
  TESSERA_EXPECTS(drafts.size() <= static_cast<std::size_t>(max_draft_depth),
                  "greedy_verify: " << drafts.size() << " drafts, at most " << max_draft_depth << " are possible");
  expect_matrix(logits, static_cast<std::int64_t>(drafts.size()) + 1, -1, "greedy_verify: logits");
  verified result;
  result.next = greedy_choice(logits.row(0), logits.cols);
  while (result.accepted < static_cast<int>(drafts.size()) &&
         drafts[static_cast<std::size_t>(result.accepted)] == result.next) {
    ++result.accepted;
    result.next = greedy_choice(logits.row(result.accepted), logits.cols);
  }
  if (record != nullptr) {
    for (std::size_t k = 0; k < drafts.size(); ++k) {
      ++record->proposed[k];
      if (static_cast<int>(k) < result.accepted) ++record->accepted[k];
    }
  }
  return result;
}

/// `model(tokens, count)` answers logits in the type `A`.
template <class M, class A>
concept logits_callback = requires(M& model, std::span<const std::int32_t> tokens, std::int64_t count) {
  { model(tokens, count) } -> std::convertible_to<matrix_view<const A>>;
};

/// `draft(tokens, drafts)` writes all of `drafts`.
template <class D>
concept draft_callback = requires(D& draft, std::span<const std::int32_t> tokens, std::span<std::int32_t> drafts) {
  draft(tokens, drafts);
};

/// How far `greedy_decode` goes.
struct decode_options {
  std::int64_t new_tokens = 0;  ///< Most tokens to append.
  int depth = 0;                ///< D, tokens of a proposal; 0 is plain greedy decoding.
  std::int32_t end_token = -1;  ///< Decoding ends with this token; -1: with none.
};

/// Appends the main model's greedy continuation to `tokens`.
///
/// The appended tokens are those of plain greedy decoding (`depth` 0), whatever `draft` proposes, provided that the
/// main model's logits after a token depend on the tokens up to it and on nothing else, to the last bit where two ids
/// compete: not on the tokens after it, nor on how many are evaluated at once (with `gemm::reference` they do not).
///
/// Where the model communicates, all ranks decode the same tokens with the same callbacks, or follow rank 0 in theirs.
/// Host: returns when done; allocates nothing but room in `tokens`.
/// @tparam A Type of the logits.
/// @param model  Called as `model(span<const int32> tokens, int64 count)`: the logits after each of the last `count`
///               tokens, `[count, V]`, valid until the next call. All tokens but those are final: later calls have them
///               too, so a cache may keep them, and must forget what lies behind.
/// @param draft  Called as `draft(span<const int32> tokens, span<int32> drafts)` with `drafts.size()` from 1 to D: what
///               may follow `tokens`. The last of `tokens` is the model's own newest choice, which it has not been
///               given yet; it has been given all others. Model: a call of `chain::draft` with the hidden states of its
///               last evaluation.
/// @param tokens At least one token; the appended ones follow.
/// @param options How far.
/// @return What became of the proposals.
/// @throws invalid_argument if options are wrong, there is no token to start from, or the model answers with another
///         shape; and what the callbacks throw. Then `tokens` has what was verified so far.
template <accumulate_type A, class Model, class Draft>
acceptance greedy_decode(Model&& model, Draft&& draft, std::vector<std::int32_t>& tokens,
                         const decode_options& options) {
  static_assert(logits_callback<Model, A>,
                "greedy_decode: the first argument must be callable as matrix_view<const A> model(span<const int32> "
                "tokens, int64 count)");
  static_assert(draft_callback<Draft>,
                "greedy_decode: the second argument must be callable as draft(span<const int32> tokens, span<int32> "
                "drafts)");
  TESSERA_EXPECTS(options.new_tokens >= 0 && options.depth >= 0 && options.depth <= max_draft_depth,
                  "greedy_decode needs new_tokens >= 0 and depth in [0, "
                      << max_draft_depth << "], got " << options.new_tokens << " and " << options.depth);
  TESSERA_EXPECTS(!tokens.empty(), "greedy_decode needs at least one token to start from");
  acceptance record;
  const std::size_t first = tokens.size();
  const std::size_t end = first + static_cast<std::size_t>(options.new_tokens);
  tokens.reserve(end);
  std::array<std::int32_t, max_draft_depth> drafts{};
  while (tokens.size() < end) {
    // Before the first call there are no hidden states to draft from, and the last token needs no proposal after it.
    const std::size_t known = tokens.size();
    const std::size_t count = known == first ? 0 : std::min(static_cast<std::size_t>(options.depth), end - known - 1);
    const std::span<std::int32_t> proposal(drafts.data(), count);
    if (count > 0) draft(std::span<const std::int32_t>(tokens), proposal);
    tokens.insert(tokens.end(), proposal.begin(), proposal.end());
    verified found;
    try {
      const matrix_view<const A> logits =
          model(std::span<const std::int32_t>(tokens), static_cast<std::int64_t>(count) + 1);
      found = greedy_verify<A>(proposal, logits, &record);
    } catch (...) {
      tokens.resize(known);
      throw;
    }
    ++record.calls;
    tokens.resize(known + static_cast<std::size_t>(found.accepted));
    tokens.push_back(found.next);
    if (options.end_token >= 0) {
      const auto from = tokens.begin() + static_cast<std::ptrdiff_t>(known);
      const auto stop = std::find(from, tokens.end(), options.end_token);
      if (stop != tokens.end()) {
        tokens.erase(stop + 1, tokens.end());
        break;
      }
    }
  }
  record.tokens = static_cast<std::int64_t>(tokens.size() - first);
  return record;
}

}  // namespace mtp

TESSERA_NAMESPACE_END
