// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name: the same protocol between ranks of one process, without failures.

#include <tessera/comm/symmetric_view.hpp>

#include "emulated/block.hpp"

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

using comm::symmetric_step;
using comm::symmetric_view;

template <class T>
T* at_peer(const symmetric_view& view, T* own, int peer) {
  return reinterpret_cast<T*>(view.peer[peer] + (reinterpret_cast<const std::byte*>(own) - view.peer[view.rank]));
}
inline void post(std::uint32_t* flag, std::uint32_t value) { std::atomic_ref<std::uint32_t>(*flag).store(value); }
inline std::uint32_t peek(const std::uint32_t* flag) {
  return std::atomic_ref<std::uint32_t>(*const_cast<std::uint32_t*>(flag)).load();
}
inline bool reached(std::uint32_t value, std::uint32_t generation) {
  return static_cast<std::int32_t>(value - generation) >= 0;
}
inline bool block_failed(const symmetric_view&) { return false; }
inline bool await(const symmetric_view&, const std::uint32_t* flag, std::uint32_t generation, int, symmetric_step) {
  emulated::block::own()->wait([&] { return reached(peek(flag), generation); });
  return true;
}
inline std::uint32_t next_generation(const symmetric_view& view) { return peek(view.generation) + 1; }
inline void announce(const symmetric_view& view, std::uint32_t generation) {
  const int r = static_cast<int>(threadIdx.x) % emulated::warp_lanes;
  if (r < view.size) post(at_peer(view, view.entered + view.rank, r), generation);
}
inline bool all_entered(const symmetric_view& view, std::uint32_t generation) {
  const int r = static_cast<int>(threadIdx.x);
  if (r < view.size && r != view.rank) await(view, view.entered + r, generation, r, symmetric_step::entry);
  return __syncthreads_and(1) != 0;
}
inline bool last_block(const symmetric_view& view) {
  if (atomicAdd(view.tickets, 1u) + 1 != gridDim.x) return false;
  *view.tickets = 0;
  return true;
}
inline void finish(const symmetric_view& view, std::uint32_t generation) {
  for (int i = 1; i < 4; ++i) view.tickets[i] = 0;
  post(view.generation, generation);
}
inline bool leave(const symmetric_view& view, std::uint32_t generation) {
  __syncthreads();
  const int last = threadIdx.x == 0 && last_block(view) ? 1 : 0;
  if (__syncthreads_or(last) == 0) return false;
  const int r = static_cast<int>(threadIdx.x);
  if (r < view.size) post(at_peer(view, view.arrived + view.rank, r), generation);
  if (r == 0) finish(view, generation);
  return true;
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
