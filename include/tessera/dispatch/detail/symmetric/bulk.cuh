// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/core/config.hpp>

// Copies of whole pieces of rows by the TMA of an SM (cp.async.bulk, sm_90 and later), to memory of this device
// or of a peer. Addresses and sizes are multiples of 16 bytes. A thread's stores are committed in groups, which it
// waits for; barriers and other PTX are those of gemm/detail/hopper/ptx.cuh.

TESSERA_NAMESPACE_BEGIN

namespace detail::bulk {

inline constexpr int alignment = 16;
inline constexpr int line = 128;

// The first start of a line from `address` on.
__host__ __device__ constexpr std::uint32_t next_line(std::uint32_t address) {
  return (address + line - 1) / line * line;
}

// From global to shared memory; `barrier`, which expects the bytes, is told when they are there.
__device__ __forceinline__ void load(std::uint32_t target, const void* source, int bytes, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

// From shared memory to global memory, perhaps a peer's.
__device__ __forceinline__ void store(void* target, std::uint32_t source, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(source), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `Pending` groups of this thread still read shared memory.
template <int Pending>
__device__ __forceinline__ void wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Orders accesses of global memory by the TMA and by this thread, such as what it has acquired before what it
// asks the TMA to read. Without a space it would be compiled to a fence of the whole device first, which waits
// for this thread's own stores.
__device__ __forceinline__ void fence_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Waits until all but `Pending` groups of this thread have been written, and orders what they wrote before what this
// thread releases afterwards.
template <int Pending>
__device__ __forceinline__ void wait_written() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
  fence_global();
}

// Orders this thread's writes to shared memory before the TMA's reads.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace detail::bulk

TESSERA_NAMESPACE_END
