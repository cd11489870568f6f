// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// AdamW's loop on the host. It runs over blocks of constant length; what is left at the end goes through the same
/// block in a copy. So every element passes through the same instructions wherever it stands, whatever the compiler
/// contracts.

#include <cmath>
#include <cstdint>

#include <tessera/core/config.hpp>
#include <tessera/shard/detail/copy_parts.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

/// Elements worked on at a time.
inline constexpr int adamw_block = 256;

/// One block; never inlined, so that whole blocks and the rest share its code.
template <class Scalars, class A, class M, class S>
[[gnu::noinline]] void adamw_one_block(const Scalars& s, const A* TESSERA_RESTRICT gradient,
                                       M* TESSERA_RESTRICT exp_avg, M* TESSERA_RESTRICT exp_avg_sq,
                                       A* TESSERA_RESTRICT master, S* TESSERA_RESTRICT parameter) {
  const A take1 = s.take1, beta2 = s.beta2, take2 = s.take2, epsilon = s.epsilon, keep = s.keep;
  const A step_size = s.step_size, correction = s.correction, scale = s.scale;
  A mean[adamw_block], square[adamw_block];
  for (int i = 0; i < adamw_block; ++i) {
    const A g = scale * gradient[i];
    const auto m = static_cast<A>(exp_avg[i]);
    mean[i] = m + take1 * (g - m);
    square[i] = beta2 * static_cast<A>(exp_avg_sq[i]) + take2 * (g * g);
  }
  for (int i = 0; i < adamw_block; ++i) exp_avg[i] = to_element<M>(mean[i]);
  for (int i = 0; i < adamw_block; ++i) exp_avg_sq[i] = to_element<M>(square[i]);
  for (int i = 0; i < adamw_block; ++i) square[i] = std::sqrt(square[i]);  // on its own: it does not vectorise
  for (int i = 0; i < adamw_block; ++i) {
    master[i] = keep * master[i] - step_size * mean[i] / (square[i] / correction + epsilon);
  }
  if (parameter == nullptr) return;
  for (int i = 0; i < adamw_block; ++i) parameter[i] = to_element<S>(master[i]);
}

/// A whole tensor; `parameter` may be null.
template <class Scalars, class A, class M, class S>
void adamw_tensor_on_host(const Scalars& s, const A* gradient, M* exp_avg, M* exp_avg_sq, A* master, S* parameter,
                          std::int64_t count) {
  std::int64_t i = 0;
  for (; i + adamw_block <= count; i += adamw_block) {
    adamw_one_block(s, gradient + i, exp_avg + i, exp_avg_sq + i, master + i,
                    parameter == nullptr ? nullptr : parameter + i);
  }
  if (i == count) return;
  const std::int64_t left = count - i;
  A g[adamw_block] = {}, p[adamw_block] = {};
  M m[adamw_block] = {}, v[adamw_block] = {};
  S out[adamw_block] = {};
  copy_elements(gradient + i, g, left, false);
  copy_elements(exp_avg + i, m, left, false);
  copy_elements(exp_avg_sq + i, v, left, false);
  copy_elements(master + i, p, left, false);
  adamw_one_block(s, g, m, v, p, parameter == nullptr ? nullptr : out);
  copy_elements(m, exp_avg + i, left, false);
  copy_elements(v, exp_avg_sq + i, left, false);
  copy_elements(p, master + i, left, false);
  if (parameter != nullptr) copy_elements(out, parameter + i, left, false);
}

}  // namespace shard::detail
TESSERA_NAMESPACE_END
