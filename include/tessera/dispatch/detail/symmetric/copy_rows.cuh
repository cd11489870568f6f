// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/router/detail/device/warp.cuh>

// Rows that copy engines bring: copies in streams of the communicator, kernels of one warp that post and await the
// flags around them, and the kernel that adds rows up before and after they travel. The kernels that wait are one warp,
// so that nobody holds SMs meanwhile, and stand behind what other ranks wait for, so that streams may share a queue.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

// ---------------------------------------------------------------------------------------------------------------------
// Flags

// What comes behind it may write to peers.
static __launch_bounds__(warp_size) TESSERA_KERNEL enter_kernel(const __grid_constant__ comm::symmetric_view view) {
  if (block_failed(view)) return;
  const std::uint32_t generation = next_generation(view);
  announce(view, generation);
  all_entered(view, generation);
}

// What stands before it has been written.
static __launch_bounds__(warp_size) TESSERA_KERNEL leave_kernel(const __grid_constant__ comm::symmetric_view view) {
  if (block_failed(view)) return;
  leave(view, next_generation(view));
}

// The same for a chunk, to some peers, while the operation goes on. @param peers Bit r: rank r.
static __launch_bounds__(warp_size) TESSERA_KERNEL
    post_chunk_kernel(const __grid_constant__ comm::symmetric_view view, int chunk, unsigned peers) {
  if (block_failed(view)) return;
  const int r = static_cast<int>(threadIdx.x);
  if (((peers >> r) & 1u) == 0) return;
  post(at_peer(view, view.chunks + view.rank * comm::max_symmetric_chunks + chunk, r), next_generation(view));
}

// Ends when every peer has posted a chunk; behind the last one the operation is over for this rank.
static __launch_bounds__(warp_size) TESSERA_KERNEL
    await_chunk_kernel(const __grid_constant__ comm::symmetric_view view, int chunk, bool last) {
  if (block_failed(view)) return;
  const std::uint32_t generation = next_generation(view);
  if (!all_entered(view, generation)) return;  // else a peer that waits for a dead one would be blamed
  const int r = static_cast<int>(threadIdx.x);
  bool come = true;
  if (r < view.size && r != view.rank) {
    come = await(view, view.chunks + r * comm::max_symmetric_chunks + chunk, generation, r, symmetric_step::chunk);
  }
  if (__syncthreads_and(come ? 1 : 0) != 0 && last && r == 0) finish(view, generation);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums

template <class S, class A, class Out>
struct sum_rows_task {
  comm::symmetric_view view;
  row_plan plan;
  matrix_view<const S> rows;          // expert rows; where `summed` [R * max_tokens] sums
  const std::int32_t* expert_row_of;  // [R * max_tokens, K]
  const A* weights;                   // of expert rows; null: 1
  int top_k;
  bool summed;
  std::int64_t max_tokens;
  std::int64_t first;  // tokens [first, end)
  std::int64_t end;
  const S* returned;                  // [R * max_tokens, d] that came home
  const std::uint32_t* destinations;  // [T]
  matrix_view<const S> plus;          // [T, d]; no data: nothing
  matrix_view<Out> y;                 // at home [T, d]; away [(R - 1) * max_tokens, d], blocks in the order of peers
};

// The peer whose rows are block `i` of those that leave this rank.
__host__ __device__ constexpr int peer_of_block(int rank, int size, int i) { return (rank + 1 + i) % size; }

// One piece of a row: the columns [column, column + Width) of a token from peer `block`, or at home.
template <bool Home, int Width, int Batch, class S, class A, class Out>
__device__ __forceinline__ void sum_row(const sum_rows_task<S, A, Out>& task, int block, std::int64_t token,
                                        std::int64_t column) {
  const comm::symmetric_view& view = task.view;
  const int home = Home ? view.rank : peer_of_block(view.rank, view.size, block);
  const std::int64_t row = home * task.max_tokens + token;
  const std::int32_t* const places = task.expert_row_of + row * task.top_k;

  A sum[Width] = {};
  if (task.summed) {
    bool any = false;
    for (int k = 0; k < task.top_k; ++k) any = any || __ldg(places + k) != -1;
    if (any) add_elements(sum, load_once<S, Width>(task.rows.row(row) + column));  // -0 becomes 0, as everywhere
  } else {
    const bool any = add_expert_rows<Batch>(sum, task.rows, places, task.top_k, column, [&](int, std::int32_t place) {
      return task.weights != nullptr ? __ldg(task.weights + place) : A(1);
    });
    if (!Home && !any) return;
  }
  std::int64_t target = block * task.max_tokens + token;
  if constexpr (Home) {
    target = token;
    const std::uint32_t others = __ldg(task.destinations + token) & ~(1u << view.rank);
    for (int first = 0; first < view.size; first += Batch) {
      elements<S, Width> part[Batch];
#pragma unroll
      for (int i = 0; i < Batch; ++i) {
        if (((others >> (first + i)) & 1u) == 0) continue;
        part[i] = load_once<S, Width>(task.returned + ((first + i) * task.max_tokens + token) * task.y.cols + column);
      }
#pragma unroll
      for (int i = 0; i < Batch; ++i) {
        if (((others >> (first + i)) & 1u) != 0) add_elements(sum, part[i]);
      }
    }
    if (task.plus.data != nullptr) add_elements(sum, load_once<S, Width>(task.plus.row(token) + column));
  }
  elements<Out, Width> out;
#pragma unroll
  for (int j = 0; j < Width; ++j) out.value[j] = static_cast<Out>(sum[j]);
  store_elements(task.y.row(target) + column, out);
}

// Sums of this rank's rows of tokens from elsewhere, for each peer a plane of the grid; or at home the sums of this
// rank's rows of its own tokens, what came back in the order of ranks, and `plus`. Tokens from elsewhere without pairs
// are left out: their home does not look at them.
template <bool Home, class S, class A, class Out>
__launch_bounds__(row_threads, 4) TESSERA_KERNEL
    sum_rows_kernel(const __grid_constant__ sum_rows_task<S, A, Out> task) {
  constexpr int width = 16 / sizeof(S);
  constexpr int batch = 4;  // rows in flight per thread
  const comm::symmetric_view& view = task.view;
  if (failed(view)) return;
  const int vector = task.plan.column();
  if (vector >= task.plan.vectors) return;
  const std::int64_t column = static_cast<std::int64_t>(vector) * width;
  const int block = static_cast<int>(blockIdx.z);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * task.plan.rows;
#pragma unroll 1
  for (std::int64_t token = task.first + static_cast<std::int64_t>(blockIdx.x) * task.plan.rows + task.plan.row();
       token < task.end; token += step)
    sum_row<Home, width, batch>(task, block, token, column);
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side

// @param sms Multiprocessors that the blocks find room on, all at once; 0: no limit.
template <bool Home, class S, class A, class Out>
void launch_sums(device_stream stream, int sms, sum_rows_task<S, A, Out> task, std::int64_t first, std::int64_t end) {
  const int planes = Home ? 1 : task.view.size - 1;
  if (end <= first || planes == 0 || task.y.cols == 0) return;
  task.plan = make_row_plan(task.y.cols, 16 / sizeof(S));
  task.first = first;
  task.end = end;
  const int threads = task.plan.per_row * task.plan.rows;
  std::int64_t blocks = (end - first + task.plan.rows - 1) / task.plan.rows;
  if (sms > 0) {
    int resident = 0;  // blocks of an SM
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, sum_rows_kernel<Home, S, A, Out>, threads, 0),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    blocks = std::clamp<std::int64_t>(std::int64_t{sms} * resident / (task.plan.parts * planes), 1, blocks);
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(task.plan.parts), static_cast<unsigned>(planes));
  sum_rows_kernel<Home, S, A, Out><<<grid, static_cast<unsigned>(threads), 0, stream.get()>>>(task);
  expect_launched("sum_rows_kernel");
}

// Lets `stream` go on behind what `before` has now.
template <class Comm>
void follow(const Comm& comm, device_stream before, device_stream stream) {
  if (before.get() == stream.get()) return;
  check_cuda(cudaEventRecord(comm.copy_event(), before.get()), "cudaEventRecord");
  check_cuda(cudaStreamWaitEvent(stream.get(), comm.copy_event(), 0), "cudaStreamWaitEvent");
}

template <class Comm>
void expect_copy_streams(const Comm& comm, int streams, int needed) {
  TESSERA_EXPECTS(streams >= 1 && comm.copy_streams() >= needed,
                  "copies in " << streams << " streams need " << needed << " streams of the communicator, which has "
                               << comm.copy_streams()
                               << ": at least one, and no more than symmetric_options::copy_streams");
}

// Copies rows to packed ones, here or at a peer.
template <class S>
void copy_rows(device_stream stream, std::byte* to, const matrix_view<const S>& rows) {
  if (rows.rows == 0 || rows.cols == 0) return;
  const std::size_t row_bytes = static_cast<std::size_t>(rows.cols) * sizeof(S);
  const auto count = static_cast<std::size_t>(rows.rows);
  if (rows.stride == rows.cols) {
    check_cuda(cudaMemcpyAsync(to, rows.data, count * row_bytes, cudaMemcpyDeviceToDevice, stream.get()),
               "cudaMemcpyAsync");
  } else {
    check_cuda(cudaMemcpy2DAsync(to, row_bytes, rows.data, static_cast<std::size_t>(rows.stride) * sizeof(S), row_bytes,
                                 count, cudaMemcpyDeviceToDevice, stream.get()),
               "cudaMemcpy2DAsync");
  }
}

// Where rank `r` has what stands at `own` here, for a copy.
inline std::byte* address_at(const comm::symmetric_view& view, const void* own, int r) {
  return view.peer[r] + (static_cast<const std::byte*>(own) - view.peer[view.rank]);
}

// This rank's own rows of a dispatch, in a stream of copies; `dispatch_end` waits for it.
template <class Comm, class S>
void copy_own_rows(device_stream stream, const Comm& comm, device_stream lane, matrix_view<const S> x,
                   matrix_view<S> received) {
  follow(comm, stream, lane);
  copy_rows(lane, reinterpret_cast<std::byte*>(received.row(comm.rank() * (received.rows / comm.size()))), x);
}

// All rows of this rank to all ranks.
template <class Comm, class S>
void copy_to_all(device_stream stream, const Comm& comm, const comm::symmetric_view& view, int streams,
                 matrix_view<const S> x, matrix_view<S> received) {
  const device_stream first = comm.copy_stream(0);
  follow(comm, stream, first);
  enter_kernel<<<1, warp_size, 0, first.get()>>>(view);
  expect_launched("enter_kernel");
  const device_stream own = comm.copy_stream(streams);
  copy_own_rows(stream, comm, own, x, received);
  for (int i = 1; i < streams; ++i) follow(comm, first, comm.copy_stream(i));
  const S* const block = received.row(view.rank * (received.rows / view.size));
  for (int i = 0; i < view.size - 1; ++i) {
    copy_rows(comm.copy_stream(i % streams), address_at(view, block, peer_of_block(view.rank, view.size, i)), x);
  }
  for (int i = 1; i < streams; ++i) follow(comm, comm.copy_stream(i), first);
  follow(comm, own, first);
  leave_kernel<<<1, warp_size, 0, first.get()>>>(view);
  expect_launched("leave_kernel");
}

// Sums, copies and sums at home, chunk by chunk: one chunk is added up ahead of the one that is copied, which is ahead
// of the one that is added up at home. `task` has everything but its own range and y; `outgoing` is where sums stand
// until they are copied, not used where `task.summed`.
template <class Comm, class S, class A, class Out>
void sum_and_copy(device_stream stream, const Comm& comm, int streams, int num_chunks,
                  const sum_rows_task<S, A, Out>& task, S* returned, matrix_view<S> outgoing) {
  const comm::symmetric_view& view = task.view;
  const std::int64_t max_tokens = task.max_tokens;
  if (max_tokens == 0) return;  // on all ranks
  const std::int64_t chunk_tokens = (max_tokens + num_chunks - 1) / num_chunks;
  const device_stream first = comm.copy_stream(0);
  follow(comm, stream, first);
  enter_kernel<<<1, warp_size, 0, first.get()>>>(view);
  expect_launched("enter_kernel");
  for (int i = 1; i < streams; ++i) follow(comm, first, comm.copy_stream(i));

  const sum_rows_task<S, A, S> away{.view = view,
                                    .plan = {},
                                    .rows = task.rows,
                                    .expert_row_of = task.expert_row_of,
                                    .weights = task.weights,
                                    .top_k = task.top_k,
                                    .summed = task.summed,
                                    .max_tokens = task.max_tokens,
                                    .first = 0,
                                    .end = 0,
                                    .returned = nullptr,
                                    .destinations = nullptr,
                                    .plus = {},
                                    .y = outgoing};
  const S* const block = returned + view.rank * max_tokens * task.y.cols;
  const auto chunks = static_cast<int>((max_tokens + chunk_tokens - 1) / chunk_tokens);
  for (int c = 0; c <= chunks; ++c) {
    const std::int64_t begin = c * chunk_tokens;
    const std::int64_t end = std::min(begin + chunk_tokens, max_tokens);
    if (c < chunks && !task.summed) {
      launch_sums<false>(stream, comm.num_sms(), away, begin, end);
      for (int lane = 0; lane < streams; ++lane) follow(comm, stream, comm.copy_stream(lane));
    }
    if (c > 0) {
      // Behind this rank's own copies of the chunk: in whatever order branches of a graph are executed, nobody waits in
      // front of what the others wait for.
      for (int lane = 0; lane < streams; ++lane) follow(comm, comm.copy_stream(lane), stream);
      await_chunk_kernel<<<1, warp_size, 0, stream.get()>>>(view, c - 1, c == chunks);
      expect_launched("await_chunk_kernel");
      const std::int64_t first_token = std::min(begin - chunk_tokens, task.y.rows);
      launch_sums<true>(stream, comm.num_sms(), task, first_token, std::min(first_token + chunk_tokens, task.y.rows));
    }
    for (int lane = 0; c < chunks && lane < streams; ++lane) {
      const device_stream copies = comm.copy_stream(lane);
      unsigned peers = 0;
      for (int i = lane; i < view.size - 1; i += streams) {
        const int r = peer_of_block(view.rank, view.size, i);
        const std::int64_t from = (task.summed ? r : i) * max_tokens + begin;
        const auto rows = task.summed ? task.rows : matrix_view<const S>(outgoing);
        copy_rows(copies, address_at(view, block + begin * task.y.cols, r), rows.subrows(from, end - begin));
        peers |= 1u << r;
      }
      post_chunk_kernel<<<1, warp_size, 0, copies.get()>>>(view, c, peers);
      expect_launched("post_chunk_kernel");
    }
  }
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
