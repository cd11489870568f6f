// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/dispatch.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail {

// `to = round(from + to)`, summed in A, `Width` elements a thread.
template <class A, class S, int Width>
__launch_bounds__(256) TESSERA_KERNEL add_residual_kernel(matrix_view<const S> from, matrix_view<S> to) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  const std::int64_t per_row = to.cols / Width, count = to.rows * per_row;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const std::int64_t row = i / per_row, column = (i - row * per_row) * Width;
    auto& place = *reinterpret_cast<elements<S, Width>*>(to.row(row) + column);
    const auto added = *reinterpret_cast<const elements<S, Width>*>(from.row(row) + column);
    elements<S, Width> sum = place;
#pragma unroll
    for (int j = 0; j < Width; ++j)
      sum.value[j] = static_cast<S>(static_cast<A>(added.value[j]) + static_cast<A>(sum.value[j]));
    place = sum;
  }
}

// Not launched early: its blocks would stand where rows that travel beside the products need room.
template <class A, class S>
void add_residual(device_stream stream, matrix_view<const S> from, matrix_view<S> to) {
  constexpr int width = 16 / sizeof(S);
  const bool by_lines = moves_vectors<S>(to.cols, from, to);
  const std::int64_t count = to.rows * (to.cols / (by_lines ? width : 1));
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>((std::min<std::int64_t>)((count + 255) / 256, 2048));
  auto* const kernel = by_lines ? add_residual_kernel<A, S, width> : add_residual_kernel<A, S, 1>;
  kernel<<<blocks, 256, 0, stream.get()>>>(from, to);
  expect_launched("add_residual_kernel");
}

}  // namespace detail

TESSERA_NAMESPACE_END
