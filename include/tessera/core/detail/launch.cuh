// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

// Calls of the CUDA runtime, and launches of kernels that start while the kernel ahead of them in the stream ends.

TESSERA_NAMESPACE_BEGIN

namespace detail {

[[noreturn, gnu::noinline, gnu::cold]] inline void throw_cuda_error(cudaError_t status, const char* what) {
  throw_message<cuda_error>(message() << what << ": " << cudaGetErrorString(status));
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) [[unlikely]]
    throw_cuda_error(status, what);
}

inline void expect_launched(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

[[gnu::noinline]] inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Kernels that start early are launched while the kernel ahead of them in the stream still runs, so that they are there
// when it ends. They wait for its end before they touch memory that others write or read; and so, in turn, for
// everything that was ahead of it, because it does not end before it has waited itself.

// Waits until the kernels ahead have ended, and their writes can be read. Every thread calls it.
__device__ __forceinline__ void await_stream() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel behind be launched once every block has called this, or ended. A kernel that waits for other ranks
// calls it behind its last wait: the blocks of the next would take room that what it waits for may need.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Both, for kernels that wait for nothing but the stream.
__device__ __forceinline__ void start_early() {
  let_next_start();
  await_stream();
}

inline cudaLaunchAttribute early_start_attribute() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Adds what lets `kernel`, which calls `await_stream`, start early to the attributes of its launch, on devices that
// can. @param count Of attributes so far. @param what The kernel's name, for messages.
inline void allow_early_start(const void* kernel, cudaLaunchAttribute* attributes, int& count, const char* what) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return;
  // code for earlier devices, which runs on later ones too, does not wait for the kernel before it
  cudaFuncAttributes compiled{};
  check_cuda(cudaFuncGetAttributes(&compiled, kernel), what);
  if (compiled.ptxVersion >= 90) attributes[count++] = early_start_attribute();
}
template <class... Parameters>
void allow_early_start(void (*kernel)(Parameters...), cudaLaunchAttribute* attributes, int& count, const char* what) {
  allow_early_start(reinterpret_cast<const void*>(kernel), attributes, count, what);
}

// `launch_early` of a kernel whose parameters are at `arguments`.
inline void launch_early_at(device_stream stream, const char* what, const void* kernel, dim3 grid, unsigned threads,
                            std::size_t shared_bytes, const void* const* arguments) {
  cudaLaunchAttribute attribute{};
  int count = 0;
  allow_early_start(kernel, &attribute, count, what);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.get();
  config.attrs = &attribute;
  config.numAttrs = static_cast<unsigned>(count);
  check_cuda(cudaLaunchKernelExC(&config, kernel, const_cast<void**>(arguments)), what);
}

// Launches a kernel that calls `await_stream`. @param what Its name, for messages.
template <class... Parameters>
void launch_early(device_stream stream, const char* what, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                  std::size_t shared_bytes, const std::type_identity_t<Parameters>&... arguments) {
  const void* const at[] = {&arguments...};
  launch_early_at(stream, what, reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, at);
}

}  // namespace detail

TESSERA_NAMESPACE_END
