// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The words of CUDA that kernels are written with.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "emulated/block.hpp"

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct uint1 {
  unsigned x;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace emulated {
struct index {
  unsigned x;
};
}  // namespace emulated

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define threadIdx (::emulated::index{::emulated::block::own()->current().thread})
#define blockIdx (::emulated::index{::emulated::block::own()->index})
#define blockDim (::emulated::index{::emulated::block::own()->threads})
#define gridDim (::emulated::index{::emulated::block::own()->blocks})

// Orders nothing here: kernels order by flags and counts that release and acquire.
inline void __threadfence() {}
inline void __syncthreads() { emulated::block::own()->meet(); }
inline int __syncthreads_or(int vote) { return emulated::block::own()->vote(vote != 0); }
inline int __syncthreads_and(int vote) { return emulated::block::own()->vote(vote == 0) == 0 ? 1 : 0; }
inline void __syncwarp() { emulated::block::own()->meet_warp(); }
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulated::block::own()->tell_warp(bits)[static_cast<unsigned>(source) % emulated::warp_lanes];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  return __shfl_sync(lanes, value, static_cast<int>(threadIdx.x % emulated::warp_lanes) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned lanes, T value, int step) {
  const auto lane = static_cast<int>(threadIdx.x % emulated::warp_lanes);
  return __shfl_sync(lanes, value, lane >= step ? lane - step : lane);
}
inline int __reduce_add_sync(unsigned, int value) {
  std::uint64_t sum = 0;
  for (const std::uint64_t told : emulated::block::own()->tell_warp(static_cast<std::uint64_t>(value))) sum += told;
  return static_cast<int>(sum);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0, lane = 0;
  for (const std::uint64_t told : emulated::block::own()->tell_warp(vote ? 1 : 0))
    votes |= static_cast<unsigned>(told) << lane++;
  return votes;
}
inline int __any_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, vote) != 0 ? 1 : 0; }
inline int __all_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, !vote) == 0 ? 1 : 0; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
// Bytes of a, then of b, chosen by the digits of `selector`.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t bytes = a | static_cast<std::uint64_t>(b) << 32;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
inline std::uint32_t atomicOr(std::uint32_t* to, std::uint32_t bits) {
  return std::atomic_ref<std::uint32_t>(*to).fetch_or(bits, std::memory_order_relaxed);
}
template <class T>
T atomicAdd(T* to, T value) {
  return std::atomic_ref<T>(*to).fetch_add(value, std::memory_order_relaxed);
}
inline std::uint32_t atomicCAS(std::uint32_t* to, std::uint32_t expected, std::uint32_t value) {
  std::atomic_ref<std::uint32_t>(*to).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
using std::max;
using std::min;
