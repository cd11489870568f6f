// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The instructions of sm_90 that CUDA C++ has no words for: barriers in shared memory, bulk copies by the TMA (an SM's
/// own, not one of the device's copy engines), asynchronous copies, proxy fences, matrix loads and stores, register
/// budgets of warpgroups.
///
/// Shared memory is addressed by 32-bit shared-window addresses throughout.

#include <cstdint>

#include <cuda.h>
#include <cuda_runtime.h>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN
namespace detail::hopper {

/// The shared-window address of `pointer`.
__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers in shared memory

/// Makes a barrier that a phase of completes after `arrivals`.
__device__ __forceinline__ void barrier_init(std::uint32_t barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// Shows barriers made by this thread to the TMA and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// One arrival on a barrier of this block.
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// One arrival on the barrier at the same place in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_remote(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

/// One arrival that also announces `bytes` to come from the TMA in this phase.
__device__ __forceinline__ void barrier_arrive_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// Waits until the phase of parity `parity` has completed. A new barrier behaves as if one of parity 1 just had. What
/// follows sees shared memory as those left it who arrived, in other blocks of the cluster too; acquiring at the
/// cluster's scope would empty the first-level cache, which nothing here goes through.
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "WAIT:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra DONE;\n\t"
      "bra WAIT;\n\t"
      "DONE:\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/// Stores a word at the place `target` of block `rank` of the cluster; its 4 bytes count on the barrier at the place
/// `barrier` there.
__device__ __forceinline__ void store_remote(std::uint32_t target, std::uint32_t value, std::uint32_t barrier,
                                             std::uint32_t rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 there, told;\n\t"
      "mapa.shared::cluster.u32 there, %0, %3;\n\t"
      "mapa.shared::cluster.u32 told, %2, %3;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [told];\n\t}" ::"r"(target),
      "r"(value), "r"(barrier), "r"(rank)
      : "memory");
}

/// A word of shared memory by which threads of a block tell each other something: who sees what was stored sees what
/// the other wrote before, too.
__device__ __forceinline__ std::uint32_t load_acquire_shared(std::uint32_t address) {
  std::uint32_t value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_release_shared(std::uint32_t address, std::uint32_t value) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

/// Waits for `threads` threads at hardware barrier `id`.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// Waits for all threads of the cluster and what they wrote.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Rank of this block in its cluster.
__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies

/// Fetches a tensor map before its first use.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Enqueues the box at `(x, y)` of a rank-2 map; its bytes count on `barrier`.
__device__ __forceinline__ void tma_load(std::uint32_t target, const CUtensorMap& map, std::uint32_t barrier, int x,
                                         int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          target),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

/// Enqueues the box at `(x, y, z)` of a rank-3 map; its bytes count on `barrier`.
__device__ __forceinline__ void tma_load(std::uint32_t target, const CUtensorMap& map, std::uint32_t barrier, int x,
                                         int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

/// `tma_load` of a rank-2 map into the same place of every block in `blocks`, counting on each one's barrier.
__device__ __forceinline__ void tma_load_multicast(std::uint32_t target, const CUtensorMap& map, std::uint32_t barrier,
                                                   std::uint16_t blocks, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, "
      "%5}], [%2], %3;" ::"r"(target),
      "l"(&map), "r"(barrier), "h"(blocks), "r"(x), "r"(y)
      : "memory");
}

/// `tma_load` of a rank-3 map into the same place of every block in `blocks`, counting on each one's barrier.
__device__ __forceinline__ void tma_load_multicast(std::uint32_t target, const CUtensorMap& map, std::uint32_t barrier,
                                                   std::uint16_t blocks, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, "
      "%5, %6}], [%2], %3;" ::"r"(target),
      "l"(&map), "r"(barrier), "h"(blocks), "r"(x), "r"(y), "r"(z)
      : "memory");
}

/// Enqueues the store of a box to `(x, y, z)` of a rank-3 map, in this thread's current group of stores.
__device__ __forceinline__ void tma_store(const CUtensorMap& map, std::uint32_t source, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(source), "r"(x), "r"(y), "r"(z)
               : "memory");
}

/// `tma_store` that adds fp32 numbers to what is there.
__device__ __forceinline__ void tma_add(const CUtensorMap& map, std::uint32_t source, int x, int y, int z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
      "r"(source), "r"(x), "r"(y), "r"(z)
      : "memory");
}

/// Closes a group of this thread's stores.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Waits until at most `Pending` of this thread's groups of stores still read shared memory.
template <int Pending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

/// Waits until this thread's stores have been made.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/// Enqueues a copy of 16 bytes. All of a stage's lines are whole nearly always.
__device__ __forceinline__ void copy_async(std::uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

/// Enqueues a copy of 16 bytes, of which those from `bytes` (0 or 16) on are zeros. With 0 nothing is read.
__device__ __forceinline__ void copy_async(std::uint32_t target, const void* source, std::uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

/// One arrival on a barrier of this block, which must expect it, once this thread's `copy_async` so far are complete.
__device__ __forceinline__ void copy_async_arrive(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/// Closes a group of this thread's `copy_async`.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// Waits until this thread's `copy_async` are complete.
__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Orders accesses to shared memory that this thread made or knows of, `copy_async` included, before later ones of the
/// matrix units and the TMA.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------------------------
// Registers and matrix fragments

/// Gives registers back, down to `Count` for each thread of the warpgroup.
template <int Count>
__device__ __forceinline__ void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

/// Takes registers, up to `Count` for each thread of the warpgroup.
template <int Count>
__device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

/// Stores four 8x8 matrices of 16-bit elements; lane `l` addresses row `l % 8` of matrix `l / 8`.
__device__ __forceinline__ void store_matrices(std::uint32_t address, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                               std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

/// `store_matrices` of transposed matrices: lane `l` addresses what is column `l % 8` of matrix `l / 8` in registers.
__device__ __forceinline__ void store_matrices_transposed(std::uint32_t address, std::uint32_t a, std::uint32_t b,
                                                          std::uint32_t c, std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

/// Loads four 8x8 matrices of 16-bit elements; lane `l` addresses row `l % 8` of matrix `l / 8`.
__device__ __forceinline__ void load_matrices(std::uint32_t address, std::uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

/// `load_matrices` of transposed matrices: lane `l` addresses what becomes column `l % 8` of matrix `l / 8`.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t address, std::uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

/// 16 bytes from shared memory.
__device__ __forceinline__ uint4 load_shared(std::uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

/// 16 bytes to shared memory.
__device__ __forceinline__ void store_shared(std::uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

/// 8 bytes from shared memory.
__device__ __forceinline__ uint2 load_shared_8(std::uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

/// 4 bytes from shared memory.
__device__ __forceinline__ std::uint32_t load_shared_4(std::uint32_t address) {
  std::uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

/// 8 bytes to shared memory.
__device__ __forceinline__ void store_shared_8(std::uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}

/// 4 bytes to shared memory.
__device__ __forceinline__ void store_shared_4(std::uint32_t address, std::uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

/// 2 bytes to shared memory.
__device__ __forceinline__ void store_shared_2(std::uint32_t address, std::uint16_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}

/// Two floats rounded to bf16, `low` in the low half.
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

/// The low bf16 of a pair.
__device__ __forceinline__ float low_bf16(std::uint32_t pair) { return __uint_as_float(pair << 16); }
/// The high bf16 of a pair.
__device__ __forceinline__ float high_bf16(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace detail::hopper
TESSERA_NAMESPACE_END
