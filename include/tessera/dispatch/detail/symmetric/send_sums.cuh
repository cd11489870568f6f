// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/gemm/detail/hopper/ptx.cuh>

// The way home: one kernel with two roles in every block. Sending warps add up this rank's expert rows of a token that
// came from elsewhere, round the sum once and store it at the token's home; home warps add this rank's rows of its own
// tokens, and to them what comes back. A flag for every few tokens lets home begin while rows are under way.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

inline constexpr int send_warps = 10;
inline constexpr int home_warps = 10;
inline constexpr int sums_threads = (send_warps + home_warps) * warp_size;
inline constexpr int sum_vectors = 2;  // pieces of 16 bytes that a lane adds up at a time
inline constexpr int sums_batch = 4;   // rows that are read at a time
inline constexpr int sum_step_bytes = sum_vectors * warp_size * 16;
inline constexpr int sum_piece_bytes = 2 * sum_step_bytes;  // stored at a time
inline constexpr int sum_buffers = 2;                       // pieces of a warp that are being stored
inline constexpr int sums_shared_bytes = send_warps * sum_buffers * sum_piece_bytes + bulk::line;

// The unit of work of a warp, and what one flag stands for: some pieces of the rows of a few neighbouring tokens. The
// same on all ranks, whatever their blocks.
struct sums_plan {
  int chunk_tokens;
  int parts;        // of a row
  int part_pieces;  // of a part; the last has fewer
  int units;        // chunks * parts, as many flags of each peer

  static sums_plan make(std::int64_t max_tokens, std::int64_t row_bytes) {
    const auto up = [](std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); };
    sums_plan plan;
    plan.chunk_tokens = std::max(1, up(max_tokens, comm::max_symmetric_chunks / 2));
    const int chunks = up(max_tokens, plan.chunk_tokens);
    const int pieces = up(row_bytes, sum_piece_bytes);
    plan.part_pieces = up(pieces, std::clamp(comm::max_symmetric_chunks / std::max(chunks, 1), 1, pieces));
    plan.parts = up(pieces, plan.part_pieces);
    plan.units = chunks * plan.parts;
    return plan;
  }
};

template <class S, class A, class Out>
struct sums_task {
  comm::symmetric_view view;
  matrix_view<const S> pairs;         // expert rows, or [R * max_tokens] sums where `summed`
  const std::int32_t* expert_row_of;  // [R * max_tokens, K]
  const A* weights;                   // of expert rows; null: 1
  S* returned;                        // [R * max_tokens, d] in the window; row r * max_tokens + t is rank r's part of t
  const std::uint32_t* destinations;  // [T]
  int num_tokens;                     // T
  int max_tokens;
  int top_k;
  sums_plan plan;
  bool summed;
  matrix_view<const S> plus;  // [T, d]; no data: nothing
  matrix_view<Out> y;
};

// The rows of one token on one rank, one in each lane: their places, and their weights.
template <class A>
struct token_rows {
  std::int32_t place;
  A weight;
  unsigned here;  // lanes that have a row
  bool any;       // a pair of the token belongs here, though perhaps its row was dropped
};

template <class S, class A, class Out>
__device__ __forceinline__ token_rows<A> find_rows(const sums_task<S, A, Out>& task, std::int64_t row, int lane) {
  token_rows<A> found{-1, A(1), 0, false};
  if (lane < task.top_k) found.place = __ldg(task.expert_row_of + row * task.top_k + lane);
  found.any = __any_sync(full_warp, found.place != -1);
  if (task.summed) {
    found.place = found.any && lane == 0 ? static_cast<std::int32_t>(row) : -1;
  } else if (task.weights != nullptr && found.place >= 0) {
    found.weight = __ldg(task.weights + found.place);
  }
  found.here = __ballot_sync(full_warp, found.place >= 0);
  return found;
}

// Adds `sum_vectors` pieces per lane of the token's rows, in the order of k. @param column Of this lane's first piece.
template <int Width, class S, class A>
__device__ __forceinline__ void add_rows(A (&sum)[sum_vectors][Width], const matrix_view<const S>& pairs,
                                         const token_rows<A>& rows, int column) {
  const int cols = static_cast<int>(pairs.cols);
  for (unsigned left = rows.here; left != 0;) {
    elements<S, Width> part[sums_batch][sum_vectors];
    unsigned loaded = left;
#pragma unroll
    for (int i = 0; i < sums_batch; ++i) {
      if (left == 0) break;
      const std::int32_t place = __shfl_sync(full_warp, rows.place, __ffs(static_cast<int>(left)) - 1);
      left &= left - 1;
      const S* const row = pairs.row(place) + column;
#pragma unroll
      for (int v = 0; v < sum_vectors; ++v) {
        if (column + v * warp_size * Width < cols) part[i][v] = load_once<S, Width>(row + v * warp_size * Width);
      }
    }
#pragma unroll
    for (int i = 0; i < sums_batch; ++i) {
      if (loaded == left) break;
      const A weight = __shfl_sync(full_warp, rows.weight, __ffs(static_cast<int>(loaded)) - 1);
      loaded &= loaded - 1;
#pragma unroll
      for (int v = 0; v < sum_vectors; ++v) {
#pragma unroll
        for (int j = 0; j < Width; ++j) sum[v][j] += weight * widen<A>(part[i][v].value[j]);
      }
    }
  }
}

// Reads what a peer has written during this kernel.
template <class S, int Width>
__device__ __forceinline__ elements<S, Width> load_arrived(const S* from) {
  static_assert(sizeof(elements<S, Width>) == 16);
  uint4 bits;
  asm volatile("ld.relaxed.sys.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(from)
               : "memory");
  return *reinterpret_cast<const elements<S, Width>*>(&bits);
}

// Columns [begin, end) of a part.
template <class S>
struct part_columns {
  int begin;
  int end;
  __device__ part_columns(const sums_plan& plan, int part, int hidden) {
    constexpr int piece = sum_piece_bytes / static_cast<int>(sizeof(S));
    begin = part * plan.part_pieces * piece;
    end = begin + plan.part_pieces * piece;
    end = end < hidden ? end : hidden;
  }
};

template <class S, class A, class Out>
__device__ __forceinline__ void send_role(const sums_task<S, A, Out>& task, std::uint32_t generation, int warp,
                                          int lane) {
  constexpr int width = 16 / sizeof(S);
  constexpr int step = sum_step_bytes / static_cast<int>(sizeof(S));
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const comm::symmetric_view& view = task.view;
  const std::uint32_t shared_start = hopper::shared_address(shared_bytes);
  unsigned char* const ring =
      shared_bytes + (bulk::next_line(shared_start) - shared_start) + warp * sum_buffers * sum_piece_bytes;
  const int peers = view.size - 1;
  const int hidden = static_cast<int>(task.y.cols);
  int buffer = 0;
  int unit_before = -1;  // whose flag has not been posted
  int stores_since = 0;
  const auto post_flag = [&](int unit) {
    const int peer = (view.rank + 1 + unit % peers) % view.size;
    post(at_peer(view, view.chunks + view.rank * comm::max_symmetric_chunks + unit / peers, peer), generation);
  };
  // neighbouring warps of all blocks take neighbouring units, each for another peer
  for (int unit = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x); unit < task.plan.units * peers;
       unit += send_warps * static_cast<int>(gridDim.x)) {
    const int peer = (view.rank + 1 + unit % peers) % view.size;
    const int chunk = unit / peers / task.plan.parts;
    const part_columns<S> columns(task.plan, unit / peers % task.plan.parts, hidden);
    const int first = chunk * task.plan.chunk_tokens;
    const int end = min(first + task.plan.chunk_tokens, task.max_tokens);
    for (int token = first; token < end; ++token) {
      const auto rows = find_rows(task, static_cast<std::int64_t>(peer) * task.max_tokens + token, lane);
      if (!rows.any) continue;
      S* const target = at_peer(
          view, task.returned + (static_cast<std::int64_t>(view.rank) * task.max_tokens + token) * hidden, peer);
      for (int begin = columns.begin; begin < columns.end; begin += 2 * step) {
        unsigned char* const place = ring + buffer * sum_piece_bytes;
        if (lane == 0) bulk::wait_read<sum_buffers - 1>();
        __syncwarp();
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          A sum[sum_vectors][width] = {};
          add_rows<width>(sum, task.pairs, rows, begin + half * step + lane * width);
#pragma unroll
          for (int v = 0; v < sum_vectors; ++v) {
            elements<S, width> out;
#pragma unroll
            for (int j = 0; j < width; ++j) out.value[j] = static_cast<S>(sum[v][j]);
            *reinterpret_cast<elements<S, width>*>(place + ((half * sum_vectors + v) * warp_size + lane) * 16) = out;
          }
        }
        bulk::fence_shared();
        __syncwarp();
        if (lane == 0) {
          bulk::store(target + begin, hopper::shared_address(place),
                      min(columns.end - begin, 2 * step) * static_cast<int>(sizeof(S)));
          bulk::commit();
        }
        buffer = buffer + 1 == sum_buffers ? 0 : buffer + 1;
        ++stores_since;
      }
      if (unit_before >= 0 && stores_since >= sum_buffers) {
        // written while this unit's first token was added up: hardly a wait
        if (lane == 0) {
          bulk::wait_written<sum_buffers>();
          post_flag(unit_before);
        }
        unit_before = -1;
      }
    }
    if (unit_before >= 0 && lane == 0) {
      bulk::wait_written<0>();
      post_flag(unit_before);
    }
    unit_before = unit;
    stores_since = 0;
  }
  if (unit_before >= 0 && lane == 0) {
    bulk::wait_written<0>();
    post_flag(unit_before);
  }
}

template <class S, class A, class Out>
__device__ __forceinline__ void home_role(const sums_task<S, A, Out>& task, std::uint32_t generation, int warp,
                                          int lane) {
  constexpr int width = 16 / sizeof(S);
  constexpr int step = sum_step_bytes / static_cast<int>(sizeof(S));
  const comm::symmetric_view& view = task.view;
  const int hidden = static_cast<int>(task.y.cols);
  for (int unit = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x); unit < task.plan.units;
       unit += home_warps * static_cast<int>(gridDim.x)) {
    const part_columns<S> columns(task.plan, unit % task.plan.parts, hidden);
    const int first = unit / task.plan.parts * task.plan.chunk_tokens;
    const int end = min(first + task.plan.chunk_tokens, task.num_tokens);
    if (first >= end) break;
    bool usable = true;
    if (lane < view.size && lane != view.rank) {
      usable =
          await(view, view.chunks + lane * comm::max_symmetric_chunks + unit, generation, lane, symmetric_step::chunk);
    }
    if (__all_sync(full_warp, usable) == 0) break;
    for (int token = first; token < end; ++token) {
      const auto rows = find_rows(task, static_cast<std::int64_t>(view.rank) * task.max_tokens + token, lane);
      const std::uint32_t others = __ldg(task.destinations + token) & ~(1u << view.rank);
      for (int begin = columns.begin; begin < columns.end; begin += step) {
        const int column = begin + lane * width;
        A sum[sum_vectors][width] = {};
        add_rows<width>(sum, task.pairs, rows, column);
        for (std::uint32_t left = others; left != 0; left &= left - 1) {
          const int r = __ffs(static_cast<int>(left)) - 1;
          const S* const part =
              task.returned + (static_cast<std::int64_t>(r) * task.max_tokens + token) * hidden + column;
          elements<S, width> arrived[sum_vectors];
#pragma unroll
          for (int v = 0; v < sum_vectors; ++v) {
            const int at = v * warp_size * width;
            if (column + at < hidden) arrived[v] = load_arrived<S, width>(part + at);
          }
#pragma unroll
          for (int v = 0; v < sum_vectors; ++v) {
#pragma unroll
            for (int j = 0; j < width; ++j) sum[v][j] += widen<A>(arrived[v].value[j]);
          }
        }
#pragma unroll
        for (int v = 0; v < sum_vectors; ++v) {
          const int at = column + v * warp_size * width;
          if (at >= columns.end) continue;
          if (task.plus.data != nullptr) {
            const auto plus = load_once<S, width>(task.plus.row(token) + at);
#pragma unroll
            for (int j = 0; j < width; ++j) sum[v][j] += widen<A>(plus.value[j]);
          }
          elements<Out, width> out;
#pragma unroll
          for (int j = 0; j < width; ++j) out.value[j] = static_cast<Out>(sum[v][j]);
          store_elements(task.y.row(token) + at, out);
        }
      }
    }
  }
}

template <class S, class A, class Out>
__launch_bounds__(sums_threads, 1) TESSERA_KERNEL send_sums_kernel(const __grid_constant__ sums_task<S, A, Out> task) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const comm::symmetric_view& view = task.view;
  if (failed(view)) return;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const std::uint32_t generation = next_generation(view);
  if (blockIdx.x == 0 && warp == 0) announce(view, generation);
  if (!all_entered(view, generation)) return;
  if (warp < send_warps) {
    send_role(task, generation, warp, lane);
  } else {
    home_role(task, generation, warp - send_warps, lane);
  }
  __syncthreads();
  if (threadIdx.x == 0 && last_block(view)) finish(view, generation);
#else
  static_cast<void>(task);
#endif
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
