// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// In which order a depth joins hidden state and embedding. Both orders exist, and the projection's columns follow:
/// equation 21 of DeepSeek-V3 writes the hidden state first, its published weights (`eh_proj`) take the embedding
/// first. A checkpoint read with the wrong order has the right shapes and the wrong model, so `chain` has no default.

#include <concepts>
#include <cstdint>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp {

/// Orders of the two halves of a projection's input, `[2 d]`.
namespace concat {

/// `[norm(hidden); norm(embedding)]`: equation 21 as it is written.
struct hidden_first {
  /// First column of the hidden half. @param hidden d.
  static constexpr std::int64_t hidden_column([[maybe_unused]] std::int64_t hidden) { return 0; }
  /// First column of the embedding half. @param hidden d.
  static constexpr std::int64_t embedding_column(std::int64_t hidden) { return hidden; }
};

/// `[norm(embedding); norm(hidden)]`: the published weights of DeepSeek-V3 and the models that follow it.
struct embedding_first {
  /// First column of the hidden half. @param hidden d.
  static constexpr std::int64_t hidden_column(std::int64_t hidden) { return hidden; }
  /// First column of the embedding half. @param hidden d.
  static constexpr std::int64_t embedding_column([[maybe_unused]] std::int64_t hidden) { return 0; }
};

}  // namespace concat

/// `C::hidden_column(d)` is 0 or d.
template <class C>
concept concat_has_hidden_column = requires(std::int64_t hidden) {
  { C::hidden_column(hidden) } -> std::same_as<std::int64_t>;
};

/// `C::embedding_column(d)` is the other of the two.
template <class C>
concept concat_has_embedding_column = requires(std::int64_t hidden) {
  { C::embedding_column(hidden) } -> std::same_as<std::int64_t>;
};

/// An order. Models: `concat::hidden_first`, `concat::embedding_first`.
template <class C>
concept concat_policy = concat_has_hidden_column<C> && concat_has_embedding_column<C>;

}  // namespace mtp

TESSERA_NAMESPACE_END
