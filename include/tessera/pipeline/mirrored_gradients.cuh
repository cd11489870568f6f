// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of the sum over the places of a stage. Enqueues, does not synchronise; in the order of the host half.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include <cuda_runtime.h>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/dtype.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/pipeline/mirrored_gradients.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

namespace detail {

inline constexpr int summed_rows = 64;  // of a launch: their addresses are its parameters

template <class G>
struct row_list {
  const G* rows[summed_rows];
  int count;
};

// `to = ((r0 + r1) + r2) + ...`; `to` may be r0 of the list.
template <class G>
__global__ void __launch_bounds__(256)
    sum_rows_kernel(const __grid_constant__ row_list<G> list, std::int64_t size, G* to) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) {
    G sum = list.rows[0][i];
    for (int k = 1; k < list.count; ++k) sum += list.rows[k][i];
    to[i] = sum;
  }
}

template <accumulate_type G>
void sum_rows(device_stream stream, std::span<const G* const> rows, std::int64_t size, G* sum, G* result) {
  if (size == 0) return;
  const auto blocks = static_cast<unsigned>((std::min<std::int64_t>)((size + 255) / 256, 1024));
  for (std::size_t next = 0; next < rows.size();) {
    row_list<G> list{};
    if (next > 0) list.rows[list.count++] = sum;
    while (next < rows.size() && list.count < summed_rows) list.rows[list.count++] = rows[next++];
    // An element is read before it is written, by the same thread; but `result` may be a row of a later launch.
    G* const to = next == rows.size() ? result : sum;
    sum_rows_kernel<G><<<blocks, 256, 0, stream.get()>>>(list, size, to);
    tessera::detail::expect_launched("mirrored gradients: sum_rows_kernel");
  }
}

}  // namespace detail

}  // namespace pipeline

TESSERA_NAMESPACE_END
