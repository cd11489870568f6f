// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name: what sums need of it.

#include <tessera/core/views.hpp>

#include "emulated/language.hpp"

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class T, int Count>
struct alignas(sizeof(T) * Count >= 16 ? 16 : sizeof(T) * Count) elements {
  T value[Count];
};

template <class T, int Count>
void store_elements(T* to, const elements<T, Count>& x) {
  std::memcpy(to, x.value, sizeof(x.value));
}
template <class T, class A, int Count>
elements<T, Count> round_elements(const A (&sum)[Count]) {
  elements<T, Count> result;
  for (int i = 0; i < Count; ++i) result.value[i] = static_cast<T>(sum[i]);
  return result;
}
template <class A, class T, int Count>
void add_elements(A (&sum)[Count], const elements<T, Count>& row, A weight = A(1)) {
  for (int i = 0; i < Count; ++i) sum[i] += weight * static_cast<A>(row.value[i]);
}

}  // namespace detail

TESSERA_NAMESPACE_END
