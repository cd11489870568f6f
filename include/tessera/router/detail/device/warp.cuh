// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

// Kernels are hidden: two shared libraries with the same kernel each launch their own.
#define TESSERA_KERNEL __attribute__((visibility("hidden"))) __global__ void

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr int warp_size = 32;
inline constexpr unsigned full_warp = 0xffffffffu;

inline void check_cuda(cudaError_t status, const char* what) {
  TESSERA_EXPECTS_AS(cuda_error, status == cudaSuccess, what << ": " << cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// The kernels use warp reductions in hardware. Returns the number of multiprocessors.
inline int expect_device(const char* operation) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  TESSERA_EXPECTS(major >= 8,
                  operation << " needs a device of compute capability 8.0 or later, this one has major " << major);
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers as unsigned integers of the same order; 0 is below every number. Both zeros are one.

template <class A>
using ordered_t = std::conditional_t<sizeof(A) == 4, std::uint32_t, std::uint64_t>;

__device__ inline std::uint32_t ordered(float x) {
  const std::uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ inline std::uint64_t ordered(double x) {
  const auto bits = static_cast<std::uint64_t>(__double_as_longlong(x + 0.0));
  return bits ^ (static_cast<std::uint64_t>(static_cast<std::int64_t>(bits) >> 63) | 0x8000000000000000ull);
}
__device__ inline float unordered(std::uint32_t u) {
  return __uint_as_float((u & 0x80000000u) != 0 ? u ^ 0x80000000u : ~u);
}
__device__ inline double unordered(std::uint64_t u) {
  return __longlong_as_double(static_cast<long long>((u >> 63) != 0 ? u ^ 0x8000000000000000ull : ~u));
}

template <class A>
__device__ inline A minus_infinity() {
  return -static_cast<A>(__int_as_float(0x7f800000));
}

template <class A>
__device__ inline A largest_number() {
  if constexpr (sizeof(A) == 4) {
    return __int_as_float(0x7f7fffff);
  } else {
    return __longlong_as_double(0x7fefffffffffffffll);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Reductions over a warp, the result in every lane. Sums are taken in a fixed tree.

__device__ inline std::uint32_t warp_max(std::uint32_t x) { return __reduce_max_sync(full_warp, x); }
__device__ inline std::uint64_t warp_max(std::uint64_t x) {
  const auto high = static_cast<std::uint32_t>(x >> 32);
  const std::uint32_t top = __reduce_max_sync(full_warp, high);
  const std::uint32_t low = __reduce_max_sync(full_warp, high == top ? static_cast<std::uint32_t>(x) : 0u);
  return (static_cast<std::uint64_t>(top) << 32) | low;
}
template <accumulate_type A>
__device__ inline A warp_max_value(A x) {
  return unordered(warp_max(ordered(x)));
}
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) x += __shfl_xor_sync(full_warp, x, step);
  return x;
}

// ---------------------------------------------------------------------------------------------------------------------
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }
__device__ inline float smaller(float a, float b) { return fminf(a, b); }
__device__ inline double smaller(double a, double b) { return fmin(a, b); }

// Functions that are fast in float and exact in double. Errors in float stay below 6e-6 relative, of the argument's
// rounding before the exponential, for every result that is a normal number.

inline constexpr float log2_of_e = 1.4426950408889634f;

__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_exp(float x) { return fast_exp2(x * log2_of_e); }
__device__ inline double fast_exp(double x) { return ::exp(x); }
__device__ inline float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline double fast_reciprocal(double x) { return 1.0 / x; }

// A sum that the compiler may not join with a product before it, so that a key has the same bits wherever it is made.
__device__ inline float plain_sum(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double plain_sum(double a, double b) { return __dadd_rn(a, b); }

// Not a number, or infinite, once: x * 0 is NaN then, and stays in a sum.
template <accumulate_type A>
__device__ inline bool is_number(A zero_sum) {
  return zero_sum == A(0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks that wait for each other

// The word's low bits count arrivals and come back to 0; its top bit flips once all have come, which this block knows
// beforehand cannot be before itself. Only thread 0 calls.
__device__ inline std::uint32_t barrier_phase(const std::uint32_t* word) {
  std::uint32_t now;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
  return now;  // looked at in barrier_wait, so that nobody waits for it here
}
__device__ inline void barrier_arrive(std::uint32_t* word) {
  const std::uint32_t part = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(part) : "memory");
}
__device__ inline void barrier_wait(const std::uint32_t* word, std::uint32_t phase) {
  std::uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
  } while (((now ^ phase) & 0x80000000u) == 0);
}

}  // namespace detail

TESSERA_NAMESPACE_END
