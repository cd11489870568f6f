// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

// Calls of the CUDA runtime, and launches of kernels that start while the kernel ahead of them in the stream ends.

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline void check_cuda(cudaError_t status, const char* what) {
  TESSERA_EXPECTS_AS(cuda_error, status == cudaSuccess, what << ": " << cudaGetErrorString(status));
}

inline void expect_launched(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// For kernels that may be launched before the kernel ahead of them in the stream has ended: waits until it has, and its
// writes can be read, and lets such a kernel behind this one be launched. Every thread calls it before it touches
// memory that others write or read.
//
// Blocks of the kernel behind take the places of this one's as they end, and wait there. A kernel that waits for other
// GPUs, or for kernels of another stream, therefore must not call it: those might need the places.
__device__ __forceinline__ void start_early() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

// Whether a launch of this kernel, which calls `start_early`, may have the attribute below.
template <class Kernel>
bool can_start_early(Kernel* kernel) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return false;
  // code for earlier devices, which runs on later ones too, does not wait for the kernel before it
  cudaFuncAttributes compiled{};
  check_cuda(cudaFuncGetAttributes(&compiled, kernel), "cudaFuncGetAttributes");
  return compiled.ptxVersion >= 90;
}

inline cudaLaunchAttribute early_start_attribute() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Launches a kernel that calls `start_early`. @param what Its name, for messages.
template <class... Parameters, class... Arguments>
void launch_early(device_stream stream, const char* what, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                  std::size_t shared_bytes, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = early_start_attribute();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.get();
  config.attrs = &attribute;
  config.numAttrs = can_start_early(kernel) ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

}  // namespace detail

TESSERA_NAMESPACE_END
