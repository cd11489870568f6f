// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Checks of layouts. A constexpr function cannot stream a message in C++20, but it may call one that throws.

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace layout::detail {

/// Throws unless both sizes are positive.
inline void expect_sizes(const char* what, int num_experts, int num_ranks) {
  TESSERA_EXPECTS(num_experts >= 1 && num_ranks >= 1,
                  what << " of " << num_experts << " experts over " << num_ranks
                       << " ranks: both must be at least 1 (a rank may hold no expert)");
}

/// `expect_sizes` that a constant expression passes when the sizes are right.
constexpr int checked_experts(const char* what, int num_experts, int num_ranks) {
  if (num_experts < 1 || num_ranks < 1) expect_sizes(what, num_experts, num_ranks);
  return num_experts;
}

/// Throws: a list holds an id that names no expert.
[[noreturn]] inline void fail_id(int rank, std::size_t slot, std::int32_t expert, int num_experts) {
  tessera::detail::throw_message<invalid_argument>(
      tessera::detail::message() << "layout::table: slot " << slot << " of rank " << rank << " holds expert " << expert
                                 << ", ids must be in [0, " << num_experts << ")");
}

/// Throws: a list holds an expert twice.
[[noreturn]] inline void fail_twice(int rank, std::size_t slot, std::int32_t expert) {
  tessera::detail::throw_message<invalid_argument>(
      tessera::detail::message() << "layout::table: slot " << slot << " of rank " << rank << " holds expert " << expert
                                 << ", which an earlier slot of that rank holds already; copies must be on different "
                                    "ranks");
}

/// Throws: names every expert without a copy.
[[noreturn]] inline void fail_missing(const std::vector<std::int32_t>& replicas) {
  std::string missing;
  for (std::size_t expert = 0; expert < replicas.size(); ++expert) {
    if (replicas[expert] == 0) missing += (missing.empty() ? "" : ", ") + std::to_string(expert);
  }
  tessera::detail::throw_message<invalid_argument>(
      tessera::detail::message() << "layout::table: no rank holds expert " << missing << "; each of the "
                                 << replicas.size() << " experts needs at least one slot");
}

/// Throws: more entries than a layout can count.
[[noreturn]] inline void fail_count(std::size_t count) {
  throw invalid_argument("layout::table: " + std::to_string(count) + " ranks or slots, at most " +
                         std::to_string(std::numeric_limits<std::int32_t>::max() / 4) + " are possible");
}

/// The count as an `int`, small enough for sums of a few of them.
constexpr int checked_int(std::size_t count) {
  if (count > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max() / 4)) fail_count(count);
  return static_cast<int>(count);
}

/// Throws: there is no such rank.
[[noreturn]] inline void fail_rank(int rank, int num_ranks) {
  throw invalid_argument("the layout has no rank " + std::to_string(rank) + ", ranks are in [0, " +
                         std::to_string(num_ranks) + ")");
}

/// Throws: a tensor is not one over all experts.
[[noreturn]] inline void fail_tensor(int rank, std::int64_t extent, int num_experts) {
  throw invalid_argument("a tensor of " + std::to_string(rank) + " dimensions with first extent " +
                         std::to_string(extent) + " is not one over all experts: dimension 0 must have extent " +
                         std::to_string(num_experts));
}

}  // namespace layout::detail

TESSERA_NAMESPACE_END
