// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Kernels that move parts between whole tensors and communication buffers, and those that go over all parts once. A
/// block walks over tiles of `part_tile` elements; a thread owns 8 neighbours, moved as vectors where they may be.

#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>

#include <tessera/core/dtype.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/shard/detail/copy_parts.hpp>
#include <tessera/shard/detail/device/adamw.cuh>
#include <tessera/shard/detail/device/checks.cuh>
#include <tessera/shard/detail/part_tables.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

inline constexpr int part_threads = 256;
static_assert(part_tile == part_threads * adamw_width && part_tile == adamw_tile);

/// The last of `count` entries whose first tile is not beyond `tile`.
template <class FirstTile>
__device__ __forceinline__ int entry_of_tile(int count, std::int64_t tile, FirstTile first_tile) {
  int low = 0;
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_tile(middle) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class To, class From>
__device__ __forceinline__ void move_element(To& to, From from, bool add) {
  const To value = to_element<To>(from);
  to = add ? to_element<To>(to + value) : value;
}

template <class To, class From>
__device__ __forceinline__ void move_vector(To* to, const From* from, bool add) {
  const adamw_vector<From> values = load_vector(from);
  adamw_vector<To> result;
  if (add) result = load_vector(to);
#pragma unroll
  for (int i = 0; i < adamw_width; ++i) move_element(result.value[i], values.value[i], add);
  store_vector(to, result);
}

__device__ __forceinline__ bool on_vectors(const void* a, const void* b) {
  return ((reinterpret_cast<std::uintptr_t>(a) | reinterpret_cast<std::uintptr_t>(b)) & 15) == 0;
}

/// Whole tensors to packed elements, or back. Padding becomes zero when packing without adding, and is skipped
/// otherwise.
template <bool Pack, class Whole, class Packed>
__global__ void __launch_bounds__(part_threads)
    move_parts_kernel(part_list list, Whole* const* whole, Packed* packed, bool add) {
  for (std::int64_t tile = blockIdx.x; tile < list.num_tiles; tile += gridDim.x) {
    const part_entry& e =
        list.entries[entry_of_tile(list.num_entries, tile, [&](int i) { return list.entries[i].first_tile; })];
    const std::int64_t first = (tile - e.first_tile) * part_tile + static_cast<std::int64_t>(threadIdx.x) * adamw_width;
    const std::int64_t left = e.count - first;
    if (left <= 0) continue;
    const int count = left < adamw_width ? static_cast<int>(left) : adamw_width;
    Packed* const there = packed + e.packed + first;
    if (e.parameter < 0) {
      if constexpr (Pack) {
        for (int i = 0; i < count && !add; ++i) there[i] = Packed{};
      }
      continue;
    }
    std::int64_t run = first < e.length ? 0 : first / e.length;
    std::int64_t in_run = first - run * e.length;
    Whole* here = whole[e.parameter] + e.first + run * e.stride + in_run;
    if (count == adamw_width && in_run + adamw_width <= e.length && on_vectors(here, there)) {
      if constexpr (Pack) {
        move_vector(there, here, add);
      } else {
        move_vector(here, there, add);
      }
      continue;
    }
    for (int i = 0; i < count; ++i) {
      if constexpr (Pack) {
        move_element(there[i], *here, add);
      } else {
        move_element(*here, there[i], add);
      }
      ++here;
      if (++in_run == e.length) {
        in_run = 0;
        here += e.stride - e.length;
      }
    }
  }
}

inline unsigned blocks_for(std::int64_t tiles) {
  return static_cast<unsigned>((std::max<std::int64_t>)(1, (std::min<std::int64_t>)(tiles, 1024)));
}

template <bool Pack, class Whole, class Packed>
void move_parts(device_stream stream, const part_list& list, Whole* const* whole, Packed* packed, bool add) {
  if (list.num_tiles == 0) return;
  move_parts_kernel<Pack, Whole, Packed>
      <<<blocks_for(list.num_tiles), part_threads, 0, stream.get()>>>(list, whole, packed, add);
  expect_launched("move_parts_kernel");
}

/// `to[i] += from[i]`.
template <class A>
__global__ void __launch_bounds__(part_threads) add_elements_kernel(const A* from, A* to, std::int64_t count) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * part_threads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * part_threads + threadIdx.x; i < count; i += stride) {
    to[i] = to[i] + from[i];
  }
}

template <class A>
void add_elements(device_stream stream, const A* from, A* to, std::int64_t count) {
  if (count == 0) return;
  add_elements_kernel<A><<<blocks_for(tiles_of(count)), part_threads, 0, stream.get()>>>(from, to, count);
  expect_launched("add_elements_kernel");
}

/// Calls `each(tensor, i)` for every element of all tensors.
template <class List, class Each>
__device__ __forceinline__ void for_each_element(const List& list, std::int64_t num_tiles, Each each) {
  for (std::int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const auto& described =
        list.tensors[entry_of_tile(list.num_tensors, tile, [&](int i) { return list.tensors[i].first_tile; })];
    const auto tensor = described.tensor;
    const std::int64_t begin = (tile - described.first_tile) * part_tile;
    const std::int64_t end = begin + part_tile < tensor.count ? begin + part_tile : tensor.count;
    for (std::int64_t i = begin + threadIdx.x; i < end; i += part_threads) each(tensor, i);
  }
}

__device__ __forceinline__ float quotient(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return __ddiv_rn(a, b); }

template <class List, class A>
__global__ void __launch_bounds__(part_threads) divide_kernel(List list, A divisor) {
  for_each_element(list, list.num_tiles, [&](const auto& tensor, std::int64_t i) {
    A* const gradient = const_cast<A*>(tensor.gradient);  // the list is AdamW's, which only reads it
    gradient[i] = quotient(gradient[i], divisor);
  });
}

template <class List>
__global__ void __launch_bounds__(part_threads) masters_kernel(List list) {
  for_each_element(list, list.num_tiles, [&](const auto& tensor, std::int64_t i) {
    tensor.master[i] = to_element<std::remove_cvref_t<decltype(*tensor.master)>>(tensor.parameter[i]);
  });
}

}  // namespace shard::detail
TESSERA_NAMESPACE_END
