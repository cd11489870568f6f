// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <tessera/core/config.hpp>

// Words of global memory by which GPUs and blocks tell each other something: the instructions of flags.cuh.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

/// Everything that this thread wrote, or knows to have been written, is seen by who sees the flag.
__device__ __forceinline__ void post(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ std::uint32_t peek(const std::uint32_t* flag) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

/// Adds one to a count of this GPU's: who counts knows what those wrote who counted before. @return what it was.
__device__ __forceinline__ std::uint32_t count_up(std::uint32_t* count) {
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before;
}

__device__ __forceinline__ std::uint64_t nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
