// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Loops over rows, with one order of additions whatever the compiler vectorises.

#include <cstdint>
#include <type_traits>

#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/views.hpp>
#include <tessera/mtp/rows.hpp>

TESSERA_NAMESPACE_BEGIN

namespace mtp::detail {

// One rounding to the storage type; from double to bf16 two, by way of float.
template <class S, class A>
constexpr S narrow(A value) {
  if constexpr (std::is_same_v<S, bfloat16>)
    return bfloat16(static_cast<float>(value));
  else
    return static_cast<S>(value);
}

// sum_i f(i) over [0, count) in 16 lanes that are added in order.
template <class A, class F>
A sum_in_lanes(std::int64_t count, const F& f) {
  constexpr int lanes = 16;
  A sums[lanes] = {};
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int j = 0; j < lanes; ++j) sums[j] += f(i + j);
  for (int j = 0; i + j < count; ++j) sums[j] += f(i + j);
  A sum = 0;
  for (const A lane : sums) sum += lane;
  return sum;
}

template <class S>
void copy_row(const S* from, std::int64_t count, S* to) {
  for (std::int64_t j = 0; j < count; ++j) to[j] = from[j];
}

template <class S>
void zero_row(std::int64_t count, S* row) {
  for (std::int64_t j = 0; j < count; ++j) row[j] = S(0.0f);
}

// to += from, one rounding.
template <class A, class S>
void add_row(const S* from, std::int64_t count, S* to) {
  for (std::int64_t j = 0; j < count; ++j) to[j] = narrow<S>(static_cast<A>(to[j]) + static_cast<A>(from[j]));
}

// A slice of bytes for a part of the chain.
template <class Lifetime>
memory_ref<Lifetime> take_memory(memory_builder& memory, const char* name, std::size_t bytes) {
  return {memory.take<std::byte>(name, static_cast<std::int64_t>(bytes)), bytes};
}

inline void expect_chunks(const depth_rows& rows, std::int64_t count, const char* who) {
  TESSERA_EXPECTS(!rows.chunk_offsets.empty() && rows.chunk_offsets.front() == 0 && rows.chunk_offsets.back() == count,
                  who << ": chunk_offsets must run from 0 to the number of rows, " << count);
}

inline void expect_gradient(const depth_rows& rows, const void* gradient, std::int64_t stride, std::int64_t size,
                            const char* who) {
  TESSERA_EXPECTS(gradient != nullptr, who << ": backward_weights needs a place for the gradient, it is null");
  TESSERA_EXPECTS(rows.num_chunks() <= 1 || stride >= size, who << ": gradients of chunks are " << stride
                                                                << " elements apart, at least " << size
                                                                << " are needed");
}

}  // namespace mtp::detail

TESSERA_NAMESPACE_END
