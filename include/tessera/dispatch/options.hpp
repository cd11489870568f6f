// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a user chooses about dispatch and combine, and the bounds that follow.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

/// How the outputs of a token's experts are added up.
namespace combine {

/// Every pair's output row travels home, where the rows of a token are added in the order of k. The bits of a token do
/// not depend on how the experts are spread over ranks.
struct ordered {};

/// The owner adds the rows of a token that it computed (in the order of k) and one row per (token, rank) travels home,
/// where the rows are added in the order of ranks. Moves fewer bytes; run-to-run bitwise; rounding depends on the
/// spread of the experts.
struct reduced {};

}  // namespace combine

/// A combine policy: `combine::ordered` or `combine::reduced`.
template <class C>
concept combine_policy = std::is_same_v<C, combine::ordered> || std::is_same_v<C, combine::reduced>;

/// What happens when a rank would receive more pairs than its bound.
enum class overflow_policy {
  error,  ///< Every rank throws the same `tessera::error`, naming rank, need and bound; the engine may re-run with a
          ///< larger bound. Between GPUs it is a failure of the communicator: `check` throws, `reset` goes on. On one
          ///< GPU it is a fault in the `device_status`, and pairs are dropped as by `drop`.
  drop,   ///< The receiver admits pairs in the order (source rank, token, k) up to its bound; the rest is dropped and
          ///< counted.
};

/// Which of an expert's pairs are dropped where a capacity factor limits them.
enum class drop_order {
  position,  ///< The last in the order (token, k).
  weight,    ///< Those with the smallest routing weight; among equals the last in the order (token, k).
};

/// Bounds of a dispatch. The defaults drop nothing.
struct dispatch_options {
  /// Pairs a rank can receive; 0 means `min(R*T*K, 2*T*K)` with T = `max_tokens`, `full_row_bound` means `R*T*K`, which
  /// no routing exceeds.
  std::int64_t row_bound = 0;
  /// 0: dropless. Otherwise, on every path, each rank sends at most `ceil(T*K*capacity_factor / E)` of its own pairs to
  /// one expert, T its tokens in this call. This depends on how tokens are split over ranks.
  double capacity_factor = 0;
  drop_order order = drop_order::position;            ///< Which pairs a capacity drops.
  overflow_policy overflow = overflow_policy::error;  ///< What happens beyond `row_bound`.
  /// For a layer over `comm::symmetric`: whether rows go by NCCL's sends and receives, with counts that the host waits
  /// for, as over `comm::nccl`: set it where the communicator is not `direct`. Sizes of memory depend on it.
  bool host_sized = false;
  /// For a layer over `comm::hosts`: its `ranks_per_host()`. 0: all ranks.
  int ranks_per_host = 0;

  /// For `row_bound`: room for every pair of every rank.
  static constexpr std::int64_t full_row_bound = -1;

  /// Whether a capacity limits what is sent.
  bool has_capacity() const { return capacity_factor > 0; }
  /// Pairs of one expert that a rank keeps of its own: `ceil(T*K*capacity_factor / E)`, and no more than it has.
  /// @param num_pairs T*K, T its tokens in this call. @param num_experts E.
  std::int64_t capacity(std::int64_t num_pairs, int num_experts) const {
    if (!has_capacity()) return num_pairs;
    return static_cast<std::int64_t>(
        std::min(std::ceil(static_cast<double>(num_pairs) * capacity_factor / static_cast<double>(num_experts)),
                 static_cast<double>(num_pairs)));
  }
};

/// Sizes that bound one dispatch on one rank; equal on all ranks but for `num_local_experts`.
struct dispatch_bounds {
  int num_ranks = 1;            ///< R.
  int num_experts = 0;          ///< E, over all ranks.
  int num_local_experts = 0;    ///< Slots of this rank.
  int top_k = 0;                ///< K.
  std::int64_t max_tokens = 0;  ///< T at most, per rank.
  std::int64_t max_pairs = 0;   ///< Pairs this rank can receive.

  /// Bounds from sizes and options.
  static dispatch_bounds make(int num_ranks, int num_experts, int num_local_experts, int top_k, std::int64_t max_tokens,
                              const dispatch_options& options) {
    TESSERA_EXPECTS(options.row_bound >= dispatch_options::full_row_bound,
                    "row_bound = " << options.row_bound << ": give a number of pairs, 0 or full_row_bound");
    TESSERA_EXPECTS(options.capacity_factor >= 0, "capacity_factor = " << options.capacity_factor << " is negative");
    const auto expect_numbered = [](const char* what, std::int64_t pairs) {
      TESSERA_EXPECTS(pairs < INT32_MAX,
                      what << " = " << pairs << " pairs; at most " << INT32_MAX - 1 << " can be numbered");
    };
    // One factor after the other, so that no product overflows.
    expect_numbered("max_tokens", max_tokens);
    const std::int64_t sent = max_tokens * top_k;
    expect_numbered("max_tokens * top_k", sent);
    const std::int64_t full = sent * num_ranks;
    expect_numbered("num_ranks * max_tokens * top_k", full);
    // One rank keeps all of its pairs, so no bound below the full one makes sense unless it is asked for.
    std::int64_t bound = options.row_bound > 0 ? std::min(options.row_bound, full) : std::min(full, 2 * sent);
    if (options.row_bound == dispatch_options::full_row_bound) bound = full;
    return {num_ranks, num_experts, num_local_experts, top_k, max_tokens, bound};
  }

  /// Pairs a rank sends at most.
  std::int64_t max_sent_pairs() const { return max_tokens * top_k; }
  /// Deduplicated rows a rank sends at most.
  std::int64_t max_sent_rows() const { return max_tokens * std::min(top_k, num_ranks); }
  /// Deduplicated rows a rank receives at most: one per token, and no row without a pair. One rank reads its tokens in
  /// place.
  std::int64_t max_received_rows() const {
    return num_ranks == 1 ? max_tokens : std::min(max_tokens * num_ranks, max_pairs);
  }
  /// Rows of an array in device memory that rows of all ranks arrive in: token t of rank s has row
  /// `s * max_tokens + t`.
  std::int64_t addressed_rows() const { return max_tokens * num_ranks; }
};

TESSERA_NAMESPACE_END
