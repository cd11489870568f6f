// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name.

#include <tessera/core/config.hpp>

#include "emulated/language.hpp"

#define TESSERA_KERNEL void

TESSERA_NAMESPACE_BEGIN
namespace detail {
inline constexpr int warp_size = emulated::warp_lanes;
inline constexpr unsigned full_warp = 0xffffffffu;

template <class T>
T warp_sum(T x) {
  for (int step = warp_size / 2; step > 0; step /= 2) x += __shfl_xor_sync(full_warp, x, step);
  return x;
}

inline std::uint32_t barrier_phase(const std::uint32_t* word) {
  return std::atomic_ref<std::uint32_t>(*const_cast<std::uint32_t*>(word)).load(std::memory_order_relaxed);
}
inline void barrier_arrive(std::uint32_t* word) {
  const std::uint32_t part = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
  std::atomic_ref<std::uint32_t>(*word).fetch_add(part, std::memory_order_release);
}
inline void barrier_wait(std::uint32_t* word, std::uint32_t phase) {
  emulated::block::own()->wait([&] {
    const std::uint32_t now = std::atomic_ref<std::uint32_t>(*word).load(std::memory_order_acquire);
    return ((now ^ phase) & 0x80000000u) != 0;
  });
}
}  // namespace detail
TESSERA_NAMESPACE_END
