// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of redistribution: packing on the stream. Enqueues, does not synchronise; allocates no device memory.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/stream.hpp>
#include <tessera/mesh/redistribute.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class T>
void copy_rows(device_stream stream, const T* from, std::int64_t from_pitch, T* to, std::int64_t to_pitch,
               std::int64_t width, std::int64_t height) {
  if (width <= 0 || height <= 0) return;
  constexpr auto element = static_cast<std::int64_t>(sizeof(T));
  constexpr std::int64_t longest_pitch = 2147483647;  // of a copy in two dimensions, in bytes
  if (height > 1 && (std::max)(from_pitch, to_pitch) * element <= longest_pitch) {
    check_cuda(
        cudaMemcpy2DAsync(to, static_cast<std::size_t>(to_pitch * element), from,
                          static_cast<std::size_t>(from_pitch * element), static_cast<std::size_t>(width * element),
                          static_cast<std::size_t>(height), cudaMemcpyDeviceToDevice, stream.get()),
        "redistribute: cudaMemcpy2DAsync");
    return;
  }
  for (std::int64_t i = 0; i < height; ++i) {
    check_cuda(cudaMemcpyAsync(to + i * to_pitch, from + i * from_pitch, static_cast<std::size_t>(width * element),
                               cudaMemcpyDeviceToDevice, stream.get()),
               "redistribute: cudaMemcpyAsync");
  }
}

template <class T>
__global__ void __launch_bounds__(256) fill_values_kernel(T* to, std::int64_t count, T value) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] = value;
  }
}

template <class T>
void fill_values(device_stream stream, T* to, std::int64_t count, T value) {
  if (count <= 0) return;
  const auto blocks = static_cast<unsigned>((std::min<std::int64_t>)((count + 255) / 256, 1024));
  fill_values_kernel<T><<<blocks, 256, 0, stream.get()>>>(to, count, value);
  expect_launched("redistribute: fill_values_kernel");
}

}  // namespace detail

TESSERA_NAMESPACE_END
