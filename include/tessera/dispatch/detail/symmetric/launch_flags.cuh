// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include <cuda_runtime.h>

#include <tessera/core/stream.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/router/detail/device/warp.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

// Launches a kernel of one warp that posts or awaits flags. It asks for the division of an SM's memory that products
// have, most of it shared: an SM does not change it while blocks stand there, and this warp should find room beside
// them.
template <class... Parameters>
void launch_flags(device_stream stream, const char* name, void (*kernel)(Parameters...),
                  const std::type_identity_t<std::remove_cv_t<Parameters>>&... arguments) {
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "cudaFuncSetAttribute");
  kernel<<<1, warp_size, 0, stream.get()>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
