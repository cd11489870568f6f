// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <utility>

#include <tessera/router/detail/device/warp.cuh>

// Kernels that are launched while the kernel ahead of them in the stream still runs, so that they are there when it
// ends. They wait for its end before they touch memory that others write or read; and so, in turn, for everything that
// was ahead of it, because it does not end before it has waited itself.

TESSERA_NAMESPACE_BEGIN

namespace detail {

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

// Adds what lets `kernel`, which calls `await_stream`, start early to the attributes of its launch, on devices that
// can.
// @param count Of attributes so far. @param what For errors.
template <class... Params>
void allow_early_start(void (*kernel)(Params...), cudaLaunchAttribute* attributes, int& count, const char* what) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return;
  // code for earlier devices, which runs on later ones too, does not wait for the kernel before it
  cudaFuncAttributes compiled{};
  check_cuda(cudaFuncGetAttributes(&compiled, kernel), what);
  if (compiled.ptxVersion < 90) return;
  attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[count++].val.programmaticStreamSerializationAllowed = 1;
}

// Launches a kernel that calls `await_stream`. @param what For errors.
template <class... Params, class... Args>
void launch_early(device_stream stream, int blocks, int threads, std::size_t shared_bytes, const char* what,
                  void (*kernel)(Params...), Args&&... args) {
  cudaLaunchAttribute attribute{};
  int count = 0;
  allow_early_start(kernel, &attribute, count, what);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream.get();
  config.attrs = &attribute;
  config.numAttrs = static_cast<unsigned>(count);
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), what);
}

}  // namespace detail

TESSERA_NAMESPACE_END
