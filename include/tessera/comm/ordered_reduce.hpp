// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A sum over the global batch whose bits do not depend on how many ranks the batch is spread over.
///
/// Floating-point addition is not associative: an all-reduce adds one partial sum per rank, so its bits change with the
/// number of ranks. Here each fixed piece of the batch, a chunk, contributes on its own, and chunks are added in their
/// global order wherever they were computed.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/detail/reduce.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/views.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// Workspace of an ordered reduction.
template <class A>
struct ordered_reduce_buffers {
  std::int64_t* chunks = nullptr;  ///< `[ranks]`, chunks of each rank.
  transfer* sends = nullptr;       ///< Messages to send.
  transfer* receives = nullptr;    ///< Messages to receive.
  A* received = nullptr;           ///< Other ranks' pieces of this rank's slice, in global chunk order.
};

/// Up to so many contributed elements, every rank gets all of them and adds them up itself: one exchange, not two.
inline constexpr std::int64_t ordered_reduce_small_elements = 4096;

/// Whether that is the case.
constexpr bool ordered_reduce_is_small(std::int64_t total_chunks, std::int64_t count) {
  return count <= ordered_reduce_small_elements && total_chunks * count <= ordered_reduce_small_elements;
}

/// The slice of the elements that rank `rank` adds up.
constexpr slice ordered_reduce_slice(std::int64_t total_chunks, std::int64_t count, int ranks, int rank) {
  return ordered_reduce_is_small(total_chunks, count) ? slice{0, count} : slice_of(count, ranks, rank);
}

/// Lays out all but `chunks`, which is needed to know the other sizes.
template <class A>
void lay_out(ordered_reduce_buffers<A>& buffers, memory_builder& memory, int ranks, std::int64_t local_chunks,
             std::int64_t remote_chunks, std::int64_t received_elements) {
  const std::int64_t messages = std::max<std::int64_t>(local_chunks, 1) * (ranks - 1);
  buffers.sends = memory.take<transfer>("ordered_all_reduce.sends", messages);
  buffers.receives = memory.take<transfer>("ordered_all_reduce.receives", std::max<std::int64_t>(remote_chunks, ranks));
  buffers.received = memory.take<A>("ordered_all_reduce.received", received_elements);
}

}  // namespace detail

/// Bytes of workspace with which `ordered_all_reduce` works on every rank, however the chunks are spread.
/// About `total_chunks * count / num_ranks` elements, at least one alignment unit.
/// @param num_ranks R. @param total_chunks Chunks of all ranks together, at most. @param count Elements per chunk.
template <accumulate_type A>
std::size_t ordered_all_reduce_workspace_bytes(int num_ranks, std::int64_t total_chunks, std::int64_t count) {
  TESSERA_EXPECTS(num_ranks >= 1 && total_chunks >= 0 && count >= 0,
                  "ordered_all_reduce_workspace_bytes: num_ranks = " << num_ranks << ", total_chunks = " << total_chunks
                                                                     << ", count = " << count
                                                                     << ": needs at least 1, 0 and 0");
  memory_builder memory;
  memory.take<std::int64_t>("ordered_all_reduce.chunks", num_ranks);
  detail::ordered_reduce_buffers<A> buffers;
  detail::lay_out(buffers, memory, num_ranks, total_chunks, total_chunks,
                  (std::max)(total_chunks * detail::slice_of(count, num_ranks, 0).length,
                             (std::min)(total_chunks * count, detail::ordered_reduce_small_elements)));
  return memory.bytes();
}

/// Sums the chunks of all ranks: `result = ((c0 + c1) + c2) + ...`, elementwise, in global chunk order (all chunks of
/// rank 0, then all of rank 1, ...). The bits are the same for every number of ranks and every division of the chunks
/// among them. Without any chunk the result is zero. Collective; host: returns when done; allocates nothing of its own.
/// Each rank sends and receives about `count * (local_chunks + 1)` elements.
/// @param stream        Host stream.
/// @param comm          All ranks that hold chunks or want the result.
/// @param contributions `[local_chunks, count]`, this rank's chunks in order; null when `local_chunks` is 0.
/// @param local_chunks  Chunks of this rank; may differ between ranks and may be 0.
/// @param count         Elements per chunk, the same on all ranks.
/// @param result        `[count]`, disjoint from `contributions`; the same on all ranks afterwards.
/// @param workspace     Builder with at least `ordered_all_reduce_workspace_bytes` bytes left, from which slices are
///                      taken. They are free again when the call returns: give a copy of a builder to keep its place.
/// @throws invalid_argument for wrong arguments on this rank, comm_error if another rank does not do its part.
template <host_communicator Comm, accumulate_type A>
void ordered_all_reduce(stream_ref<typename Comm::space> stream, Comm& comm, const A* contributions,
                        std::int64_t local_chunks, std::int64_t count, A* result, memory_builder& workspace) {
  const int ranks = comm.size();
  const int rank = comm.rank();
  TESSERA_EXPECTS(local_chunks >= 0 && count >= 0, "ordered_all_reduce: rank "
                                                       << rank << " gives local_chunks = " << local_chunks
                                                       << ", count = " << count << ", they must not be negative");
  const std::int64_t limit = (std::numeric_limits<std::int64_t>::max)() / static_cast<std::int64_t>(sizeof(A));
  TESSERA_EXPECTS(count == 0 || local_chunks <= limit / count,
                  "ordered_all_reduce: " << local_chunks << " chunks of " << count << " elements exceed the memory");
  TESSERA_EXPECTS((contributions != nullptr || local_chunks * count == 0) && (result != nullptr || count == 0),
                  "ordered_all_reduce: rank " << rank << " gives no data for " << local_chunks << " chunks of " << count
                                              << " elements or for the result");
  TESSERA_EXPECTS(!workspace.counting(), "ordered_all_reduce needs a memory_builder with memory, not one that counts");
  expect_disjoint(contributions, local_chunks * count * static_cast<std::int64_t>(sizeof(A)), "contributions", result,
                  count * static_cast<std::int64_t>(sizeof(A)), "result");

  detail::ordered_reduce_buffers<A> buffers;
  buffers.chunks = workspace.take<std::int64_t>("ordered_all_reduce.chunks", ranks);
  comm.all_gather(stream, &local_chunks, buffers.chunks, 1);
  std::int64_t total_chunks = 0;
  for (int peer = 0; peer < ranks; ++peer) total_chunks += buffers.chunks[peer];
  const auto slice_of_rank = [&](int peer) { return detail::ordered_reduce_slice(total_chunks, count, ranks, peer); };
  const detail::slice own = slice_of_rank(rank);
  detail::lay_out(buffers, workspace, ranks, local_chunks, total_chunks - local_chunks,
                  (total_chunks - local_chunks) * own.length);

  // Pieces travel straight out of the contributions, one message each: no copy is packed.
  std::size_t num_sends = 0;
  std::size_t num_receives = 0;
  std::int64_t place = 0;
  for (int peer = 0; peer < ranks; ++peer) {
    if (peer == rank) continue;
    const detail::slice theirs = slice_of_rank(peer);
    for (std::int64_t chunk = 0; chunk < local_chunks; ++chunk) {
      buffers.sends[num_sends++] = send_to(peer, contributions + chunk * count + theirs.begin, theirs.length);
    }
    for (std::int64_t chunk = 0; chunk < buffers.chunks[peer]; ++chunk) {
      buffers.receives[num_receives++] = receive_from(peer, buffers.received + place++ * own.length, own.length);
    }
  }
  comm.exchange(stream, std::span(buffers.sends, num_sends), std::span(buffers.receives, num_receives));

  std::int64_t before = 0;  // chunks of lower ranks
  for (int peer = 0; peer < rank; ++peer) before += buffers.chunks[peer];
  const auto source = [&](std::int64_t chunk) -> const A* {
    if (chunk < before) return buffers.received + chunk * own.length;
    if (chunk < before + local_chunks) return contributions + (chunk - before) * count + own.begin;
    return buffers.received + (chunk - local_chunks) * own.length;
  };
  if (total_chunks == 0) {
    std::fill_n(result + own.begin, own.length, A{0});
  } else {
    detail::reduce_in_order(reduce_op::sum, total_chunks, source, own.length, result + own.begin);
  }
  if (detail::ordered_reduce_is_small(total_chunks, count)) return;

  num_sends = num_receives = 0;
  for (int peer = 0; peer < ranks; ++peer) {
    if (peer == rank) continue;
    const detail::slice theirs = slice_of_rank(peer);
    buffers.sends[num_sends++] = send_to(peer, result + own.begin, own.length);
    buffers.receives[num_receives++] = receive_from(peer, result + theirs.begin, theirs.length);
  }
  comm.exchange(stream, std::span(buffers.sends, num_sends), std::span(buffers.receives, num_receives));
}

/// The same with a buffer of its own. @param stream Host stream. @param comm All ranks.
/// @param contributions `[local_chunks, count]`. @param local_chunks Chunks of this rank. @param count Elements per
/// chunk. @param result `[count]`. @param workspace At least `ordered_all_reduce_workspace_bytes` bytes.
template <host_communicator Comm, accumulate_type A>
void ordered_all_reduce(stream_ref<typename Comm::space> stream, Comm& comm, const A* contributions,
                        std::int64_t local_chunks, std::int64_t count, A* result, workspace_memory workspace) {
  memory_builder builder(workspace, "ordered_all_reduce workspace");
  ordered_all_reduce(stream, comm, contributions, local_chunks, count, result, builder);
}

/// Bytes of workspace with which `ordered_scatter` works on every rank.
/// @param num_ranks R. @param max_chunks Chunks of one rank, at most.
inline std::size_t ordered_scatter_workspace_bytes(int num_ranks, std::int64_t max_chunks) {
  TESSERA_EXPECTS(num_ranks >= 1 && max_chunks >= 0,
                  "ordered_scatter_workspace_bytes: num_ranks = " << num_ranks << ", max_chunks = " << max_chunks
                                                                  << ": needs at least 1 and 0");
  memory_builder memory;
  memory.take<std::int64_t>("ordered_scatter.chunks", num_ranks);
  memory.take<transfer>("ordered_scatter.sends", max_chunks * (num_ranks - 1));
  memory.take<transfer>("ordered_scatter.receives", max_chunks * (num_ranks - 1));
  return memory.bytes();
}

/// Gives each rank its row of every chunk of all ranks, in global chunk order and not yet added up: what an ordered
/// reduce-scatter adds, and what a second ordered reduction over other ranks may go on with. Collective; host: returns
/// when done; allocates nothing of its own.
/// @param stream        Host stream.
/// @param comm          All ranks.
/// @param contributions `[local_chunks, size, count]`: row `r` of a chunk is for rank `r`.
/// @param local_chunks  Chunks of this rank; may differ between ranks and may be 0.
/// @param count         Elements per row, the same on all ranks.
/// @param rows          `[total_chunks, count]`, disjoint from `contributions`.
/// @param max_rows      Rows there is memory for, the same on all ranks.
/// @param workspace     Builder with at least `ordered_scatter_workspace_bytes` bytes left, from which slices are
/// taken.
/// @return the number of chunks of all ranks.
/// @throws invalid_argument for wrong arguments, comm_error if another rank does not do its part.
template <host_communicator Comm, transferable T>
std::int64_t ordered_scatter(stream_ref<typename Comm::space> stream, Comm& comm, const T* contributions,
                             std::int64_t local_chunks, std::int64_t count, T* rows, std::int64_t max_rows,
                             memory_builder& workspace) {
  const int ranks = comm.size();
  const int rank = comm.rank();
  TESSERA_EXPECTS(local_chunks >= 0 && count >= 0, "ordered_scatter: rank "
                                                       << rank << " gives local_chunks = " << local_chunks
                                                       << ", count = " << count << ", they must not be negative");
  const std::int64_t limit = (std::numeric_limits<std::int64_t>::max)() / static_cast<std::int64_t>(sizeof(T)) / ranks;
  TESSERA_EXPECTS(count == 0 || local_chunks <= limit / count, "ordered_scatter: " << local_chunks << " chunks of "
                                                                                   << ranks << " rows of " << count
                                                                                   << " elements exceed the memory");
  TESSERA_EXPECTS(contributions != nullptr || local_chunks * count == 0,
                  "ordered_scatter: rank " << rank << " gives no data for " << local_chunks << " chunks of " << count
                                           << " elements");
  TESSERA_EXPECTS(!workspace.counting(), "ordered_scatter needs a memory_builder with memory, not one that counts");

  auto* chunks = workspace.take<std::int64_t>("ordered_scatter.chunks", ranks);
  comm.all_gather(stream, &local_chunks, chunks, 1);
  std::int64_t total = 0;
  for (int peer = 0; peer < ranks; ++peer) total += chunks[peer];
  TESSERA_EXPECTS(total <= max_rows && (rows != nullptr || total * count == 0),
                  "ordered_scatter: the ranks have " << total << " chunks, there is memory for " << max_rows);
  constexpr auto size = static_cast<std::int64_t>(sizeof(T));
  expect_disjoint(contributions, local_chunks * ranks * count * size, "contributions", rows, total * count * size,
                  "rows");
  auto* sends = workspace.take<transfer>("ordered_scatter.sends", local_chunks * (ranks - 1));
  auto* receives = workspace.take<transfer>("ordered_scatter.receives", total - local_chunks);
  std::size_t num_sends = 0;
  std::size_t num_receives = 0;
  T* place = rows;
  for (int peer = 0; peer < ranks; ++peer) {
    for (std::int64_t chunk = 0; peer != rank && chunk < local_chunks; ++chunk) {
      sends[num_sends++] = send_to(peer, contributions + (chunk * ranks + peer) * count, count);
    }
    for (std::int64_t chunk = 0; chunk < chunks[peer]; ++chunk, place += count) {
      if (peer != rank) {
        receives[num_receives++] = receive_from(peer, place, count);
      } else if (count > 0) {
        std::copy_n(contributions + (chunk * ranks + rank) * count, count, place);
      }
    }
  }
  comm.exchange(stream, std::span(sends, num_sends), std::span(receives, num_receives));
  return total;
}

/// Bytes of workspace with which `ordered_reduce_scatter` works on every rank, however the chunks are spread.
/// @param num_ranks R. @param total_chunks Chunks of all ranks together, at most. @param count Elements per row.
template <accumulate_type A>
std::size_t ordered_reduce_scatter_workspace_bytes(int num_ranks, std::int64_t total_chunks, std::int64_t count) {
  TESSERA_EXPECTS(count >= 0,
                  "ordered_reduce_scatter_workspace_bytes: count = " << count << ", it must not be negative");
  const std::size_t scatter_bytes = ordered_scatter_workspace_bytes(num_ranks, total_chunks);
  memory_builder memory;
  memory.take<A>("ordered_reduce_scatter.rows", total_chunks * count);
  memory.take<std::byte>("ordered_reduce_scatter.scatter", static_cast<std::int64_t>(scatter_bytes));
  return memory.bytes();
}

/// Sums the chunks of all ranks and gives each rank its row of the sum: the bits that `ordered_all_reduce` of the same
/// chunks has there, for every number of ranks and every division of the chunks among them. Collective; host: returns
/// when done; allocates nothing of its own.
/// @param stream        Host stream.
/// @param comm          All ranks.
/// @param contributions `[local_chunks, size, count]`: row `r` of a chunk is for rank `r`.
/// @param local_chunks  Chunks of this rank; may differ between ranks and may be 0.
/// @param count         Elements per row, the same on all ranks.
/// @param result        `[count]`, disjoint from `contributions`; zero where no rank has a chunk.
/// @param total_chunks  Chunks of all ranks together, at most; the same on all ranks.
/// @param workspace     Builder with at least `ordered_reduce_scatter_workspace_bytes` bytes left.
/// @throws invalid_argument for wrong arguments, comm_error if another rank does not do its part.
template <host_communicator Comm, accumulate_type A>
void ordered_reduce_scatter(stream_ref<typename Comm::space> stream, Comm& comm, const A* contributions,
                            std::int64_t local_chunks, std::int64_t count, A* result, std::int64_t total_chunks,
                            memory_builder& workspace) {
  TESSERA_EXPECTS(
      total_chunks >= 0 && count >= 0 && (result != nullptr || count == 0),
      "ordered_reduce_scatter: total_chunks = " << total_chunks << ", count = " << count << ", or there is no result");
  TESSERA_EXPECTS(!workspace.counting(),
                  "ordered_reduce_scatter needs a memory_builder with memory, not one that counts");
  A* rows = workspace.take<A>("ordered_reduce_scatter.rows", total_chunks * count);
  const std::int64_t total =
      ordered_scatter(stream, comm, contributions, local_chunks, count, rows, total_chunks, workspace);
  if (total == 0) {
    std::fill_n(result, count, A{0});
  } else {
    detail::reduce_in_order(
        reduce_op::sum, total, [&](std::int64_t chunk) { return rows + chunk * count; }, count, result);
  }
}

TESSERA_NAMESPACE_END
