// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// How gradients are summed over data-parallel ranks: policies of `shard::fully_sharded`.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/ordered_reduce.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

/// Sums of gradients over ranks, in two steps: `scatter` over the shard communicator gives each rank its row, `join`
/// over the replicate communicator makes the rows of all replicas one sum.
namespace reduction {

/// What the communicator's own reduce-scatter and all-reduce do: fewest bytes, and bits that depend on how many ranks
/// there are (not on the run). A rank adds up its own chunks first.
struct native {
  /// Whether the chunks of a rank travel one by one.
  static constexpr bool keeps_chunks = false;

  /// Rows that a rank has between the steps.
  static constexpr std::int64_t rows([[maybe_unused]] int shard_ranks, [[maybe_unused]] std::int64_t max_chunks) {
    return 1;
  }
  /// Bytes of workspace that a step needs: none; the communicator keeps what it needs itself.
  template <accumulate_type A>
  static std::size_t workspace_bytes([[maybe_unused]] int shard_ranks, [[maybe_unused]] int replicas,
                                     [[maybe_unused]] std::int64_t max_chunks, [[maybe_unused]] std::int64_t count) {
    return 0;
  }
  /// Reduce-scatter. @param stream Where. @param comm Shard ranks. @param packed `[1, ranks, count]`.
  /// @param count Elements per row. @param out `[1, count]`. @return 1, the rows written.
  template <host_communicator Comm, accumulate_type A>
  static std::int64_t scatter(host_stream stream, Comm& comm, const A* packed, std::int64_t, std::int64_t count, A* out,
                              std::int64_t, workspace_memory) {
    comm.reduce_scatter(stream, packed, out, count);
    return 1;
  }
  /// The same in device memory; enqueues.
  template <device_communicator Comm, accumulate_type A>
  static std::int64_t scatter(device_stream stream, Comm& comm, const A* packed, std::span<const std::int64_t>,
                              std::int64_t count, A* out, workspace_memory) {
    comm.reduce_scatter(stream, packed, out, count);
    return 1;
  }
  /// All-reduce. @param stream Where. @param replicate Replicas, or null. @param in `[1, count]`.
  /// @param count Elements per row. @param out `[count]`.
  template <host_communicator Comm, accumulate_type A>
  static void join(host_stream stream, Comm* replicate, const A* in, std::int64_t, std::int64_t count, A* out,
                   workspace_memory) {
    if (replicate == nullptr) {
      std::copy_n(in, count, out);
    } else {
      replicate->all_reduce(stream, in, out, count);
    }
  }
  /// The same in device memory; enqueues. Defined in `reduction.cuh`.
  template <device_communicator Comm, accumulate_type A>
  static void join(device_stream stream, Comm* replicate, const A* in, std::span<const std::int64_t> rows,
                   std::int64_t count, A* out, workspace_memory workspace);
};

/// Chunk by chunk in global order (`ordered_reduce.hpp`): the same bits for every number of ranks and replicas and
/// every division of the chunks among them. The order is that of replicas, then shard ranks, then local chunks. It
/// moves and keeps one contribution per chunk.
struct ordered {
  /// Whether the chunks of a rank travel one by one.
  static constexpr bool keeps_chunks = true;

  /// Rows that a rank has between the steps. @param shard_ranks Ranks. @param max_chunks Chunks of one rank, at most.
  static constexpr std::int64_t rows(int shard_ranks, std::int64_t max_chunks) { return shard_ranks * max_chunks; }

  /// Bytes of workspace that a step needs. @param shard_ranks Ranks. @param replicas Replicas. @param max_chunks Chunks
  /// of one rank, at most. @param count Elements per row.
  template <accumulate_type A>
  static std::size_t workspace_bytes(int shard_ranks, int replicas, std::int64_t max_chunks, std::int64_t count) {
    const std::size_t first = ordered_scatter_workspace_bytes(shard_ranks, max_chunks);
    if (replicas == 1) return first;
    const std::int64_t all_rows = rows(shard_ranks, max_chunks) * replicas;
    return (std::max)(first, ordered_all_reduce_workspace_bytes<A>(replicas, all_rows, count));
  }
  /// Sends rows, without a sum. @param stream Host stream. @param comm Shard ranks. @param packed
  /// `[chunks, ranks, count]`. @param chunks Of this rank. @param count Elements per row. @param out `[rows, count]`.
  /// @param max_rows Rows there is memory for. @param workspace Memory. @return the rows written.
  template <host_communicator Comm, accumulate_type A>
  static std::int64_t scatter(stream_ref<typename Comm::space> stream, Comm& comm, const A* packed, std::int64_t chunks,
                              std::int64_t count, A* out, std::int64_t max_rows, workspace_memory workspace) {
    memory_builder builder(workspace, "reduction workspace");
    return ordered_scatter(stream, comm, packed, chunks, count, out, max_rows, builder);
  }
  /// The same in device memory; enqueues. Defined in `reduction.cuh`. @param stream Where. @param comm Shard ranks.
  /// @param packed `[chunks[rank], ranks, count]`. @param chunks Host array `[ranks]`, of each rank. @param count
  /// Elements per row. @param out `[sum of chunks, count]`. @param workspace Memory. @return the rows written.
  template <device_communicator Comm, accumulate_type A>
  static std::int64_t scatter(device_stream stream, Comm& comm, const A* packed, std::span<const std::int64_t> chunks,
                              std::int64_t count, A* out, workspace_memory workspace);
  /// Sums the rows of all replicas. @param stream Host stream. @param replicate Replicas, or null. @param in
  /// `[num_rows, count]`. @param num_rows Rows of this replica. @param count Elements per row. @param out `[count]`.
  /// @param workspace Memory.
  template <host_communicator Comm, accumulate_type A>
  static void join(stream_ref<typename Comm::space> stream, Comm* replicate, const A* in, std::int64_t num_rows,
                   std::int64_t count, A* out, workspace_memory workspace) {
    if (replicate != nullptr) {
      ordered_all_reduce(stream, *replicate, in, num_rows, count, out, workspace);
    } else if (num_rows == 0) {
      std::fill_n(out, count, A{0});
    } else {
      tessera::detail::reduce_in_order(
          reduce_op::sum, num_rows, [&](std::int64_t row) { return in + row * count; }, count, out);
    }
  }
  /// The same in device memory; enqueues. Defined in `reduction.cuh`. @param stream Where. @param replicate Replicas,
  /// or null. @param in `[rows[replica], count]`. @param rows Host array `[replicas]`, of each replica. @param count
  /// Elements per row. @param out `[count]`. @param workspace Memory.
  template <device_communicator Comm, accumulate_type A>
  static void join(device_stream stream, Comm* replicate, const A* in, std::span<const std::int64_t> rows,
                   std::int64_t count, A* out, workspace_memory workspace);
};

}  // namespace reduction

/// `R::keeps_chunks`: whether the chunks of a rank travel one by one.
template <class R>
concept reduction_has_keeps_chunks = requires {
  { R::keeps_chunks } -> std::convertible_to<bool>;
};

/// `R::rows(shard_ranks, max_chunks)`: rows that a rank has between the steps.
template <class R>
concept reduction_has_rows = requires {
  { R::rows(1, std::int64_t{1}) } -> std::convertible_to<std::int64_t>;
};

/// `R::workspace_bytes<A>(shard_ranks, replicas, max_chunks, count)`: memory that a step needs.
template <class R>
concept reduction_has_workspace_bytes = requires {
  { R::template workspace_bytes<float>(1, 1, std::int64_t{1}, std::int64_t{1}) } -> std::convertible_to<std::size_t>;
};

/// `R::scatter(stream, comm, packed, chunks, count, out, max_rows, workspace)`: the first step.
template <class R, class Comm>
concept reduction_has_scatter = requires(Comm& comm, stream_ref<typename Comm::space> stream, const float* in,
                                         float* out, std::int64_t count, workspace_memory workspace) {
  { R::scatter(stream, comm, in, count, count, out, count, workspace) } -> std::convertible_to<std::int64_t>;
};

/// `R::join(stream, replicate, in, num_rows, count, out, workspace)`: the second step.
template <class R, class Comm>
concept reduction_has_join = requires(Comm* comm, stream_ref<typename Comm::space> stream, const float* in, float* out,
                                      std::int64_t count, workspace_memory workspace) {
  R::join(stream, comm, in, count, count, out, workspace);
};

/// A way to sum gradients over the ranks of `Comm` in host memory. Models: `reduction::native`, `reduction::ordered`.
template <class R, class Comm>
concept reduction_policy = reduction_has_keeps_chunks<R> && reduction_has_rows<R> && reduction_has_workspace_bytes<R> &&
    reduction_has_scatter<R, Comm> && reduction_has_join<R, Comm>;

/// `R::scatter(stream, comm, packed, chunks, count, out, workspace)`: the first step, told the chunks of all ranks.
template <class R, class Comm>
concept reduction_has_device_scatter = requires(Comm& comm, device_stream stream, const float* in, float* out,
                                                std::span<const std::int64_t> chunks, std::int64_t count,
                                                workspace_memory workspace) {
  { R::scatter(stream, comm, in, chunks, count, out, workspace) } -> std::convertible_to<std::int64_t>;
};

/// `R::join(stream, replicate, in, rows, count, out, workspace)`: the second step, told the rows of all replicas.
template <class R, class Comm>
concept reduction_has_device_join = requires(Comm* comm, device_stream stream, const float* in, float* out,
                                             std::span<const std::int64_t> rows, std::int64_t count,
                                             workspace_memory workspace) {
  R::join(stream, comm, in, rows, count, out, workspace);
};

/// A way to sum gradients over the ranks of `Comm` in device memory, without waiting for the device. Models:
/// `reduction::native`, `reduction::ordered`.
template <class R, class Comm>
concept device_reduction_policy = reduction_has_keeps_chunks<R> && reduction_has_rows<R> &&
    reduction_has_workspace_bytes<R> && reduction_has_device_scatter<R, Comm> && reduction_has_device_join<R, Comm>;

TESSERA_NAMESPACE_END
