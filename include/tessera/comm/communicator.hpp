// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What the library asks of a communicator: the concept, made of named one-requirement atoms, and its vocabulary.

#include <concepts>
#include <cstdint>
#include <span>
#include <type_traits>

#include <tessera/core/config.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

/// How a reduction joins the contributions of the ranks.
///
/// Where a contribution is NaN, so is the result on the host, whatever the operation: with `min` and `max` it is the
/// NaN of the lowest rank that has one, the same bits on all ranks. NCCL documents nothing; its minima and maxima are
/// those of `fmin` and `fmax`, which pass over a NaN where another rank has a number.
enum class reduce_op {
  sum,  ///< Floating point: `((c0 + c1) + c2) + ...` in rank order on the host; integers wrap around.
  min,  ///< The smallest; of equal ones that of the lowest rank.
  max,  ///< The largest; of equal ones that of the lowest rank.
};

/// One message of an `exchange`.
struct transfer {
  int peer = 0;            ///< Rank of the other side, within the communicator.
  void* data = nullptr;    ///< First byte, in the communicator's space; only read when sending.
  std::int64_t bytes = 0;  ///< Size, the same on both sides. A transfer of 0 bytes does not happen, on either side.
};

/// Elements that collectives move: anything whose bytes are its value.
template <class T>
concept transferable = std::is_trivially_copyable_v<T>;

/// Elements that collectives reduce.
template <class T>
concept reducible = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, std::int32_t> ||
    std::same_as<T, std::int64_t> || std::same_as<T, std::uint64_t>;

/// A message of `count` elements to `peer`. @param peer Receiving rank. @param data First element, only read.
/// @param count Number of elements.
template <transferable T>
transfer send_to(int peer, const T* data, std::int64_t count) {
  return {peer, const_cast<T*>(data), count * static_cast<std::int64_t>(sizeof(T))};
}

/// A message of `count` elements from `peer`. @param peer Sending rank. @param data Where the first element goes.
/// @param count Number of elements.
template <transferable T>
transfer receive_from(int peer, T* data, std::int64_t count) {
  return {peer, data, count * static_cast<std::int64_t>(sizeof(T))};
}

/// `C::space` is `space::host` or `space::device`: where buffers live and the kind of stream that calls take.
template <class C>
concept communicator_has_space = memory_space<typename C::space>;

/// `int rank()`: this rank, in `[0, size())`.
template <class C>
concept communicator_has_rank = requires(const C& c) {
  { c.rank() } -> std::same_as<int>;
};

/// `int size()`: number of ranks.
template <class C>
concept communicator_has_size = requires(const C& c) {
  { c.size() } -> std::same_as<int>;
};

/// `C split(int color, int key)`: collective; the ranks of equal color form a communicator, ordered by key, then by
/// rank.
template <class C>
concept communicator_has_split = requires(C& c) {
  { c.split(0, 0) } -> std::same_as<C>;
};

/// `barrier(stream)`: no rank passes before all have come.
template <class C>
concept communicator_has_barrier = requires(C& c, stream_ref<typename C::space> s) {
  c.barrier(s);
};

/// `broadcast(stream, T* data, int64 count, int root)`: `data [count]` of the root to all.
template <class C>
concept communicator_has_broadcast = requires(C& c, stream_ref<typename C::space> s, double* data, std::int64_t count,
                                              int root) {
  c.broadcast(s, data, count, root);
};

/// `all_reduce(stream, const T* send, T* recv, int64 count, reduce_op op = sum)`: `send [count]` may equal
/// `recv [count]`.
template <class C>
concept communicator_has_all_reduce = requires(C& c, stream_ref<typename C::space> s, const float* send, float* recv,
                                               std::int64_t count) {
  c.all_reduce(s, send, recv, count);
  c.all_reduce(s, send, recv, count, reduce_op::max);
};

/// `all_gather(stream, const T* send, T* recv, int64 count)`: `send [count]`, `recv [size, count]`.
template <class C>
concept communicator_has_all_gather = requires(C& c, stream_ref<typename C::space> s, const double* send, double* recv,
                                               std::int64_t count) {
  c.all_gather(s, send, recv, count);
};

/// `reduce_scatter(stream, const T* send, T* recv, int64 count, reduce_op op = sum)`: `send [size, count]`,
/// `recv [count]`.
template <class C>
concept communicator_has_reduce_scatter = requires(C& c, stream_ref<typename C::space> s, const float* send,
                                                   float* recv, std::int64_t count) {
  c.reduce_scatter(s, send, recv, count);
  c.reduce_scatter(s, send, recv, count, reduce_op::max);
};

/// `all_to_all_v(stream, send, send_counts, send_offsets, recv, recv_counts, recv_offsets)`: counts and offsets are
/// host arrays `[size]` of int64, in elements.
template <class C>
concept communicator_has_all_to_all_v = requires(C& c, stream_ref<typename C::space> s, const double* send,
                                                 double* recv, const std::int64_t* sizes) {
  c.all_to_all_v(s, send, sizes, sizes, recv, sizes, sizes);
};

/// `exchange(stream, span<const transfer> sends, span<const transfer> receives)`: grouped sends and receives. Only the
/// ranks named take part; the k-th message from one rank to another meets the k-th receive, over all exchanges.
template <class C>
concept communicator_has_exchange = requires(C& c, stream_ref<typename C::space> s,
                                             std::span<const transfer> transfers) {
  c.exchange(s, transfers, transfers);
};

/// A group of ranks that move data between one another, in one memory space.
///
/// All calls take the stream first. In host space they return when they are done: buffers may be reused at once. Every
/// collective must be called by all ranks in the same order. A rank that does not do its part becomes a `comm_error`
/// on the others within a bounded time.
///
/// Models: `comm::self<Space>`, `comm::threads`, `comm::mpi`, `comm::nccl`, `comm::symmetric`. A communicator of a
/// user's own derives from `comm::collectives` and adds four members.
template <class C>
concept communicator = communicator_has_space<C> && communicator_has_rank<C> && communicator_has_size<C> &&
    communicator_has_split<C> && communicator_has_barrier<C> && communicator_has_broadcast<C> &&
    communicator_has_all_reduce<C> && communicator_has_all_gather<C> && communicator_has_reduce_scatter<C> &&
    communicator_has_all_to_all_v<C> && communicator_has_exchange<C>;

/// A communicator of host memory.
template <class C>
concept host_communicator = communicator<C> && std::same_as<typename C::space, space::host>;

/// A communicator of device memory.
template <class C>
concept device_communicator = communicator<C> && std::same_as<typename C::space, space::device>;

TESSERA_NAMESPACE_END
