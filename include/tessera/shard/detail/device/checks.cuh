// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Calls of the CUDA runtime that throw.

#include <cstdint>

#include <cuda_runtime.h>

#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

inline void expect_cuda(cudaError_t status, const char* call) {
  TESSERA_EXPECTS_AS(cuda_error, status == cudaSuccess, "shard: " << call << " failed: " << cudaGetErrorString(status));
}

inline void expect_launch(const char* kernel) { expect_cuda(cudaGetLastError(), kernel); }

/// Copies on the device.
template <class T>
void copy_elements(device_stream stream, const T* from, T* to, std::int64_t count) {
  if (count == 0 || from == to) return;
  expect_cuda(
      cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyDeviceToDevice, stream.get()),
      "cudaMemcpyAsync");
}

}  // namespace shard::detail
TESSERA_NAMESPACE_END
