// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Loads kernels before GPUs wait for each other. Needs nvcc.
///
/// CUDA loads a kernel when it is first launched, unless CUDA_MODULE_LOADING is EAGER, and that may wait until the
/// device is idle. With a thread per GPU the launching thread may hold a lock meanwhile that the others need to launch
/// what the device waits for: nobody goes on until the timeout. So kernels are loaded while no GPU waits.

#include <vector>

#include <cuda.h>
#include <cuda_runtime.h>

#include <tessera/core/config.hpp>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// One in each file, to find what was compiled with it.
static __global__ void file_mark_kernel() {}

}  // namespace detail

/// Loads every kernel of the `.cu` file that calls it onto the current device. A layer between GPUs does so when it is
/// made, for the file where it is instantiated; an engine that calls operations over `comm::symmetric` itself, or has
/// kernels of its own beside them, calls it in each of its files, on each device, before the first operation. Static,
/// so that every file has its own. Does nothing where all kernels are loaded. Host: returns when they are loaded.
/// @throws cuda_error if a kernel cannot be loaded, or the driver is older than CUDA 12.5.
/// @return number of kernels.
static inline int load_kernels() {
  cudaKernel_t mark = nullptr;
  detail::check_cuda(cudaGetKernel(&mark, reinterpret_cast<const void*>(&detail::file_mark_kernel)),
                     "load_kernels: cudaGetKernel");
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  detail::check_cuda(
      cudaGetDriverEntryPointByVersion("cuKernelGetLibrary", &function, 12050, cudaEnableDefault, &found),
      "load_kernels: cudaGetDriverEntryPointByVersion");
  TESSERA_EXPECTS_AS(cuda_error, found == cudaDriverEntryPointSuccess && function != nullptr,
                     "load_kernels: the driver has no cuKernelGetLibrary: one of CUDA 12.5 or later is needed");
  cudaLibrary_t library = nullptr;
  const CUresult asked = reinterpret_cast<CUresult (*)(CUlibrary*, CUkernel)>(function)(&library, mark);
  TESSERA_EXPECTS_AS(cuda_error, asked == CUDA_SUCCESS,
                     "load_kernels: cuKernelGetLibrary: error " << static_cast<int>(asked));
  unsigned count = 0;
  detail::check_cuda(cudaLibraryGetKernelCount(&count, library), "load_kernels: cudaLibraryGetKernelCount");
  std::vector<cudaKernel_t> kernels(count);
  if (count > 0)
    detail::check_cuda(cudaLibraryEnumerateKernels(kernels.data(), count, library),
                       "load_kernels: cudaLibraryEnumerateKernels");
  for (const cudaKernel_t kernel : kernels) {
    cudaFuncAttributes attributes{};
    detail::check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
                       "load_kernels: cudaFuncGetAttributes");
  }
  return static_cast<int>(count);
}

TESSERA_NAMESPACE_END
