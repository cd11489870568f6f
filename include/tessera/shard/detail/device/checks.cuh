// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Calls of the CUDA runtime that throw, and copies on the device.

#include <cstdint>

#include <cuda_runtime.h>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

using tessera::detail::check_cuda;
using tessera::detail::expect_launched;

/// Copies on the device.
template <class T>
void copy_elements(device_stream stream, const T* from, T* to, std::int64_t count) {
  if (count == 0 || from == to) return;
  check_cuda(
      cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyDeviceToDevice, stream.get()),
      "shard: cudaMemcpyAsync");
}

}  // namespace shard::detail
TESSERA_NAMESPACE_END
