// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The communicator of a single rank.

#include <cstdint>
#include <span>

#include <tessera/comm/collectives.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace comm {

/// One rank alone: collectives are copies, exchanges are copies to itself.
template <memory_space Space>
class self;

/// One rank alone, host memory. It never waits.
template <>
class self<space::host> : public collectives<self<space::host>> {
 public:
  self() = default;

  /// 0.
  int rank() const noexcept { return 0; }
  /// 1.
  int size() const noexcept { return 1; }

  /// The same again. @param color Not negative. @param key Any. @throws invalid_argument for a negative color.
  self split(int color, [[maybe_unused]] int key) {
    TESSERA_EXPECTS(color >= 0, "split: color = " << color << ", it must not be negative");
    return self();
  }

  /// There is no other rank: nothing to do.
  void exchange_remote(std::span<const transfer>, std::span<const transfer>, const char*) noexcept {}
};

/// One rank alone, device memory: copies are enqueued on the stream. Declared here for both compilers; the members are
/// defined in `self.cuh`.
template <>
class self<space::device> {
 public:
  using space = tessera::space::device;  ///< Buffers are device memory.

  /// 0.
  int rank() const noexcept { return 0; }
  /// 1.
  int size() const noexcept { return 1; }
  /// The same again. @param color Not negative. @param key Any. @throws invalid_argument for a negative color.
  self split(int color, int key);
  /// Nothing to wait for.
  void barrier(device_stream stream);
  /// Nothing to do. @param stream Where. @param data `[count]`. @param count Elements. @param root 0.
  template <transferable T>
  void broadcast(device_stream stream, T* data, std::int64_t count, int root);
  /// Copies. @param stream Where. @param send `[count]`. @param recv `[count]`. @param count Elements. @param op Any.
  template <reducible T>
  void all_reduce(device_stream stream, const T* send, T* recv, std::int64_t count, reduce_op op = reduce_op::sum);
  /// Copies. @param stream Where. @param send `[count]`. @param recv `[count]`. @param count Elements.
  template <transferable T>
  void all_gather(device_stream stream, const T* send, T* recv, std::int64_t count);
  /// Copies. @param stream Where. @param send `[count]`. @param recv `[count]`. @param count Elements. @param op Any.
  template <reducible T>
  void reduce_scatter(device_stream stream, const T* send, T* recv, std::int64_t count, reduce_op op = reduce_op::sum);
  /// Copies. @param stream Where. @param send Elements. @param send_counts,send_offsets,recv_counts,recv_offsets Host
  /// arrays `[1]`. @param recv Elements. @throws invalid_argument if the two counts differ.
  template <transferable T>
  void all_to_all_v(device_stream stream, const T* send, const std::int64_t* send_counts,
                    const std::int64_t* send_offsets, T* recv, const std::int64_t* recv_counts,
                    const std::int64_t* recv_offsets);
  /// Copies. @param stream Where. @param sends Messages to itself. @param receives Where they go.
  /// @throws invalid_argument if their numbers, sizes or ranks differ.
  void exchange(device_stream stream, std::span<const transfer> sends, std::span<const transfer> receives);
};

static_assert(communicator<self<tessera::space::host>> && communicator<self<tessera::space::device>>);

}  // namespace comm

TESSERA_NAMESPACE_END
