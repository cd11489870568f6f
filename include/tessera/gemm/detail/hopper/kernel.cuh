// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The kernel of grouped products: persistent blocks of one producer and two consumer warpgroups.

#include <cstdint>

#include <tessera/core/detail/launch.cuh>
#include <tessera/gemm/detail/hopper/consumer.cuh>
#include <tessera/gemm/detail/hopper/epilogue.cuh>

TESSERA_NAMESPACE_BEGIN
namespace detail {

/// A grouped product. @tparam Shape A `hopper::kernel_shape`. @tparam Accumulation How products are summed.
/// @tparam Epilogue What becomes of the sums.
template <class Shape, class Accumulation, class Epilogue>
__global__ void __launch_bounds__(Shape::threads, 1)
    multiply_kernel([[maybe_unused]] const __grid_constant__ CUtensorMap map_a,
                    [[maybe_unused]] const __grid_constant__ CUtensorMap map_b,
                    [[maybe_unused]] const __grid_constant__ hopper::multiply_params<typename Epilogue::params> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using layout = shared_layout<Shape>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const std::uint32_t base = shared_address(shared_memory);
  const rings<Shape> r{base,
                       base + layout::full,
                       base + layout::empty,
                       base + layout::tiles,
                       base + layout::tile_full,
                       base + layout::tile_empty,
                       base + layout::turns,
                       base + layout::orders};
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
  static constexpr int gathering_warps = Shape::gather == gathered::none ? 0 : 4;
  static constexpr int releases = (Shape::ping_pong ? 1 : 2) * Shape::cluster;

  if (threadIdx.x == 0) {
    tma_prefetch(map_a);
    tma_prefetch(map_b);
    for (std::uint32_t i = 0; i < Shape::stages; ++i) {
      barrier_init(r.full + 8 * i, 1 + 32 * gathering_warps);
      barrier_init(r.empty + 8 * i, releases);
    }
    for (std::uint32_t i = 0; i < Shape::tile_slots; ++i) {
      barrier_init(r.tile_full + 8 * i, 1);
      barrier_init(r.tile_empty + 8 * i,
                   32 * (Shape::consumer_warps + (gathering_warps > 0 ? gathering_warps - 1 : 0)));
    }
    for (std::uint32_t i = 0; i < 2; ++i) barrier_init(r.turns + 8 * i, 1);
    if constexpr (Shape::cluster > 1) {
      for (std::uint32_t i = 0; i < order_slots; ++i) barrier_init(r.orders + 8 * i, 1);
    }
    barrier_init_fence();
  }
  int rank = 0;
  if constexpr (Shape::cluster > 1) {
    rank = static_cast<int>(cluster_rank());
    cluster_barrier();
  } else {
    __syncthreads();
  }
  if (!p.leaves_room) let_next_start();  // its blocks would take the room, and wait there
  await_stream();

  if (warpgroup == 0) {
    registers_release<Shape::producer_registers>();
    static constexpr int step_n = Shape::tile_n / (Epilogue::split ? 2 : Shape::parts);
    if constexpr (Shape::gather != gathered::none) {
      produce_gathered<Shape, Epilogue, step_n>(map_b, p, r, rank);
    } else {
      if (warp == 0) produce<Shape, Epilogue, step_n>(map_a, map_b, p, r, rank);
    }
  } else {
    registers_take<Shape::consumer_registers>();
    const auto staging = static_cast<std::uint32_t>(layout::staging + (warp - 4) * layout::warp_staging);
    consume<Shape, Accumulation, Epilogue>(p, r, warpgroup - 1, base + staging);
  }
  // A block must not end while its neighbour may still arrive on its barriers.
  if constexpr (Shape::cluster > 1) cluster_barrier();
#endif
}

/// `out[i] = sum over t of partial[t * stride + i]`, ascending, for the rows of all groups.
template <class A>
__global__ void __launch_bounds__(256) sum_partials_kernel(const A* partial, int parts, std::int64_t stride,
                                                           const std::int32_t* row_offsets, int num_groups, A* out) {
  start_early();
  const std::int64_t first = row_offsets[0], last = row_offsets[num_groups];
  for (std::int64_t i = first + blockIdx.x * blockDim.x + threadIdx.x; i < last; i += gridDim.x * blockDim.x) {
    A sum = partial[i];
    for (int part = 1; part < parts; ++part) sum += partial[part * stride + i];
    out[i] = sum;
  }
}

}  // namespace detail
TESSERA_NAMESPACE_END
