// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of the ordered sums: the bits of `ordered_reduce.hpp`, in device memory, on a stream.
///
/// The host half learns from the other ranks how many chunks they have. Here that would make the host wait for the
/// device, so the caller says it: the numbers follow from how the batch is divided. Nothing here allocates or waits
/// beyond what `exchange` of the communicator does.

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

#include <cuda_runtime.h>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/detail/reduce.hpp>
#include <tessera/comm/ordered_reduce.hpp>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// Where the chunks of all ranks are, in their global order: those of lower ranks and of higher ones in one array, this
/// rank's own where they were computed.
template <class A>
struct ordered_chunks {
  const A* received;        ///< `[total - local, count]`, without this rank's.
  const A* own;             ///< First element of this rank's first chunk.
  std::int64_t own_stride;  ///< Elements from one of its chunks to the next.
  std::int64_t before;      ///< Chunks of lower ranks.
  std::int64_t local;       ///< Chunks of this rank.
  std::int64_t total;       ///< Chunks of all ranks.
};

template <class A>
static __global__ void __launch_bounds__(256)
    sum_chunks_kernel(ordered_chunks<A> chunks, std::int64_t count, A* __restrict__ result) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const auto at = [&](std::int64_t chunk) -> A {
      const std::int64_t own = chunk - chunks.before;
      if (own >= 0 && own < chunks.local) return chunks.own[own * chunks.own_stride + i];
      return chunks.received[(own < 0 ? chunk : chunk - chunks.local) * count + i];
    };
    A sum = chunks.total > 0 ? at(0) : A{0};  // from the first chunk, not from 0: that keeps the sign of -0
    for (std::int64_t chunk = 1; chunk < chunks.total; ++chunk) sum += at(chunk);
    result[i] = sum;
  }
}

template <class A>
void sum_chunks(device_stream stream, const ordered_chunks<A>& chunks, std::int64_t count, A* result) {
  if (count == 0) return;
  constexpr std::int64_t threads = 256;
  const auto blocks = static_cast<unsigned>((std::min)((count + threads - 1) / threads, std::int64_t{1024}));
  sum_chunks_kernel<A><<<blocks, static_cast<unsigned>(threads), 0, stream.get()>>>(chunks, count, result);
  expect_launched("sum_chunks_kernel");
}

/// Messages in rounds, which all ranks count alike: in a round each rank sends at most one message and receives at most
/// one. So they can be exchanged in groups of so many rounds without a list of all, and no group waits for a later one.
template <class Comm>
class message_rounds {
 public:
  message_rounds(device_stream stream, Comm& comm) : stream_(stream), comm_(comm) {}

  /// The next round. @param send,receive Messages; 0 bytes where there is none.
  void add(const transfer& send, const transfer& receive) {
    sends_[size_] = send;
    receives_[size_] = receive;
    if (++size_ == sends_.size()) flush();
  }
  /// Exchanges what is left.
  void flush() {
    if (size_ == 0) return;
    comm_.exchange(stream_, std::span<const transfer>(sends_.data(), size_),
                   std::span<const transfer>(receives_.data(), size_));
    size_ = 0;
  }

 private:
  device_stream stream_;
  Comm& comm_;
  std::array<transfer, 64> sends_;
  std::array<transfer, 64> receives_;
  std::size_t size_ = 0;
};

/// Sends a part of each of this rank's chunks to each other rank, and places what comes in global order.
/// @param chunks Of each rank. @param part_of `part_of(peer, chunk)`: what goes to a rank, `length_of(peer)` elements.
/// @param length_of Elements that a rank gets of each chunk. @param received Where chunks of other ranks go.
template <class A, class Comm, class Part, class Length>
void exchange_chunks(device_stream stream, Comm& comm, std::span<const std::int64_t> chunks, Part part_of,
                     Length length_of, A* received) {
  const int ranks = comm.size();
  const int rank = comm.rank();
  const std::int64_t own_length = length_of(rank);
  std::int64_t most = 0;
  for (const std::int64_t n : chunks) most = (std::max)(most, n);
  message_rounds<Comm> rounds(stream, comm);
  for (std::int64_t chunk = 0; chunk < most; ++chunk) {
    for (int shift = 1; shift < ranks; ++shift) {
      const int to = (rank + shift) % ranks;
      const int from = (rank - shift + ranks) % ranks;
      transfer send{to, nullptr, 0};
      transfer receive{from, nullptr, 0};
      if (chunk < chunks[static_cast<std::size_t>(rank)]) send = send_to(to, part_of(to, chunk), length_of(to));
      if (chunk < chunks[static_cast<std::size_t>(from)]) {
        std::int64_t place = chunk;
        for (int peer = 0; peer < from; ++peer) place += peer == rank ? 0 : chunks[static_cast<std::size_t>(peer)];
        receive = receive_from(from, received + place * own_length, own_length);
      }
      rounds.add(send, receive);
    }
  }
  rounds.flush();
}

/// What is wrong with the arguments of an ordered sum. @return chunks of all ranks.
template <class Comm>
std::int64_t expect_chunks(const char* phase, const Comm& comm, std::span<const std::int64_t> chunks,
                           std::int64_t count, const void* contributions, const void* result,
                           const memory_builder& workspace) {
  TESSERA_EXPECTS(static_cast<int>(chunks.size()) == comm.size(), phase << ": chunks are given for " << chunks.size()
                                                                        << " ranks, the communicator has "
                                                                        << comm.size());
  std::int64_t total = 0;
  for (std::size_t r = 0; r < chunks.size(); ++r) {
    TESSERA_EXPECTS(chunks[r] >= 0, phase << ": rank " << r << " has " << chunks[r] << " chunks");
    total += chunks[r];
  }
  TESSERA_EXPECTS(count >= 0, phase << ": count = " << count << ", it must not be negative");
  TESSERA_EXPECTS(
      count == 0 ||
          (result != nullptr && (contributions != nullptr || chunks[static_cast<std::size_t>(comm.rank())] == 0)),
      phase << ": rank " << comm.rank() << " gives no data for " << chunks[static_cast<std::size_t>(comm.rank())]
            << " chunks of " << count << " elements or for the result");
  TESSERA_EXPECTS(!workspace.counting(), phase << " needs a memory_builder with memory, not one that counts");
  return total;
}

}  // namespace detail

/// Sums the chunks of all ranks in device memory: `result = ((c0 + c1) + c2) + ...`, elementwise, in global chunk order
/// (all chunks of rank 0, then all of rank 1, ...). The bits are those of the host half, for every number of ranks and
/// every division of the chunks among them. Without any chunk the result is zero. Collective; enqueues, does not wait.
/// @param stream        Where the work is enqueued; of the current device.
/// @param comm          All ranks that hold chunks or want the result.
/// @param contributions `[chunks[rank], count]`, this rank's chunks in order; null when it has none.
/// @param chunks        Host array `[size]`, chunks of each rank; the same on all ranks. Read before this returns.
/// @param count         Elements per chunk, the same on all ranks.
/// @param result        `[count]`, disjoint from `contributions`; the same on all ranks afterwards.
/// @param workspace     Builder of device memory with at least `ordered_all_reduce_workspace_bytes` bytes left; in use
///                      until the stream has done the work.
/// @throws invalid_argument for wrong arguments on this rank, cuda_error if the launch fails, what the communicator
/// throws.
template <device_communicator Comm, accumulate_type A>
void ordered_all_reduce(device_stream stream, Comm& comm, const A* contributions, std::span<const std::int64_t> chunks,
                        std::int64_t count, A* result, memory_builder& workspace) {
  const int ranks = comm.size();
  const int rank = comm.rank();
  const std::int64_t total =
      detail::expect_chunks("ordered_all_reduce", comm, chunks, count, contributions, result, workspace);
  const std::int64_t local = chunks[static_cast<std::size_t>(rank)];
  constexpr auto element = static_cast<std::int64_t>(sizeof(A));
  expect_disjoint(contributions, local * count * element, "contributions", result, count * element, "result");
  const auto slice_of_rank = [&](int peer) { return detail::ordered_reduce_slice(total, count, ranks, peer); };
  const detail::slice own = slice_of_rank(rank);
  A* received = workspace.take<A>("ordered_all_reduce.received", (total - local) * own.length);

  detail::exchange_chunks(
      stream, comm, chunks,
      [&](int peer, std::int64_t chunk) { return contributions + chunk * count + slice_of_rank(peer).begin; },
      [&](int peer) { return slice_of_rank(peer).length; }, received);
  std::int64_t before = 0;
  for (int peer = 0; peer < rank; ++peer) before += chunks[static_cast<std::size_t>(peer)];
  const A* first = local == 0 ? nullptr : contributions + own.begin;
  detail::sum_chunks<A>(stream, {received, first, count, before, local, total}, own.length, result + own.begin);
  if (detail::ordered_reduce_is_small(total, count)) return;

  detail::message_rounds<Comm> rounds(stream, comm);
  for (int shift = 1; shift < ranks; ++shift) {
    const int to = (rank + shift) % ranks;
    const int from = (rank - shift + ranks) % ranks;
    const detail::slice theirs = slice_of_rank(from);
    rounds.add(send_to(to, result + own.begin, own.length), receive_from(from, result + theirs.begin, theirs.length));
  }
  rounds.flush();
}

/// Sums the chunks of all ranks in device memory and gives each rank its row of the sum: the bits that
/// `ordered_all_reduce` of the same chunks has there. Collective; enqueues, does not wait.
/// @param stream        Where the work is enqueued; of the current device.
/// @param comm          All ranks.
/// @param contributions `[chunks[rank], size, count]`: row `r` of a chunk is for rank `r`.
/// @param chunks        Host array `[size]`, chunks of each rank; the same on all ranks. Read before this returns.
/// @param count         Elements per row, the same on all ranks.
/// @param result        `[count]`, disjoint from `contributions`; zero where no rank has a chunk.
/// @param workspace     Builder of device memory with at least `ordered_reduce_scatter_workspace_bytes` bytes left; in
///                      use until the stream has done the work.
/// @throws invalid_argument for wrong arguments on this rank, cuda_error if the launch fails, what the communicator
/// throws.
template <device_communicator Comm, accumulate_type A>
void ordered_reduce_scatter(device_stream stream, Comm& comm, const A* contributions,
                            std::span<const std::int64_t> chunks, std::int64_t count, A* result,
                            memory_builder& workspace) {
  const int ranks = comm.size();
  const int rank = comm.rank();
  const std::int64_t total =
      detail::expect_chunks("ordered_reduce_scatter", comm, chunks, count, contributions, result, workspace);
  const std::int64_t local = chunks[static_cast<std::size_t>(rank)];
  constexpr auto element = static_cast<std::int64_t>(sizeof(A));
  expect_disjoint(contributions, local * ranks * count * element, "contributions", result, count * element, "result");
  A* received = workspace.take<A>("ordered_reduce_scatter.rows", (total - local) * count);
  detail::exchange_chunks(
      stream, comm, chunks,
      [&](int peer, std::int64_t chunk) { return contributions + (chunk * ranks + peer) * count; },
      [&](int) { return count; }, received);
  std::int64_t before = 0;
  for (int peer = 0; peer < rank; ++peer) before += chunks[static_cast<std::size_t>(peer)];
  const A* first = local == 0 ? nullptr : contributions + rank * count;
  detail::sum_chunks<A>(stream, {received, first, ranks * count, before, local, total}, count, result);
}

TESSERA_NAMESPACE_END
