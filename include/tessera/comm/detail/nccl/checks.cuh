// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Argument checks of `comm::nccl`, its types in NCCL's words, and groups of sends and receives.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include <cuda_runtime.h>
#include <nccl.h>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/detail/nccl/state.cuh>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail::nccl {

/// NCCL's name of an element type.
template <reducible T>
constexpr ncclDataType_t type_of() {
  if constexpr (std::same_as<T, float>) return ncclFloat32;
  if constexpr (std::same_as<T, double>) return ncclFloat64;
  if constexpr (std::same_as<T, std::int32_t>) return ncclInt32;
  if constexpr (std::same_as<T, std::int64_t>) return ncclInt64;
  if constexpr (std::same_as<T, std::uint64_t>) return ncclUint64;
}

/// NCCL's name of a reduction.
constexpr ncclRedOp_t op_of(reduce_op op) {
  return op == reduce_op::sum ? ncclSum : op == reduce_op::min ? ncclMin : ncclMax;
}

inline void expect_rank(const comm::nccl& comm, int peer, const char* phase, const char* name) {
  TESSERA_EXPECTS(peer >= 0 && peer < comm.size(), phase << ": " << name << " = " << peer
                                                         << " is not a rank of a communicator of " << comm.size()
                                                         << " ranks");
}

/// The bytes of `count` elements. @param parts How many such counts there are in a buffer.
template <class T>
std::size_t expect_elements(const comm::nccl& comm, const char* phase, const char* name, const T* data,
                            std::int64_t count, int parts = 1) {
  const std::int64_t limit = (std::numeric_limits<std::int64_t>::max)() / static_cast<std::int64_t>(sizeof(T)) / parts;
  TESSERA_EXPECTS(count >= 0 && count <= limit, phase << ": rank " << comm.rank() << " gives count = " << count
                                                      << " for " << name << ", it must be in [0, " << limit << "]");
  TESSERA_EXPECTS(count == 0 || data != nullptr,
                  phase << ": rank " << comm.rank() << " gives no data as " << name << " of " << count << " elements");
  return static_cast<std::size_t>(count) * sizeof(T);
}

inline void expect_transfers(const comm::nccl& comm, std::span<const transfer> transfers, const char* phase,
                             const char* name) {
  for (const transfer& t : transfers) {
    expect_rank(comm, t.peer, phase, name);
    TESSERA_EXPECTS(t.bytes >= 0, phase << ": " << name << " holds a message of " << t.bytes << " bytes for rank "
                                        << t.peer << ", sizes must not be negative");
    TESSERA_EXPECTS(t.bytes == 0 || t.data != nullptr, phase << ": " << name << " holds a message of " << t.bytes
                                                             << " bytes for rank " << t.peer << " without data");
  }
}

/// Calls `f(send, receive)` for each message of `rank` to itself and the receive it meets; null where there is none.
template <class F>
void pair_own_transfers(int rank, std::span<const transfer> sends, std::span<const transfer> receives, F&& f) {
  std::size_t next = 0;
  const auto skip = [&](std::span<const transfer> list, std::size_t i) {
    while (i < list.size() && !(list[i].peer == rank && list[i].bytes > 0)) ++i;
    return i;
  };
  const auto at = [](std::span<const transfer> list, std::size_t i) { return i < list.size() ? &list[i] : nullptr; };
  for (std::size_t i = skip(sends, 0);; i = skip(sends, i + 1), ++next) {
    next = skip(receives, next);
    const transfer* from = at(sends, i);
    const transfer* to = at(receives, next);
    if (from == nullptr && to == nullptr) return;
    f(from, to);
  }
}

/// Throws unless each message of `rank` to itself meets a receive of its size.
inline void expect_own_transfers(int rank, std::span<const transfer> sends, std::span<const transfer> receives,
                                 const char* phase) {
  pair_own_transfers(rank, sends, receives, [&](const transfer* from, const transfer* to) {
    TESSERA_EXPECTS(from != nullptr, phase << ": rank " << rank << " would receive " << to->bytes
                                           << " bytes from itself that it does not send");
    const std::int64_t expected = to == nullptr ? 0 : to->bytes;
    TESSERA_EXPECTS(from->bytes == expected, phase << ": rank " << rank << " would send itself " << from->bytes
                                                   << " bytes and receive " << expected);
  });
}

/// Enqueues a copy on the device. @param stream Where. @param from Source. @param to Destination. @param bytes Size.
inline void copy_to_self(device_stream stream, const void* from, void* to, std::size_t bytes) {
  if (bytes == 0 || from == to) return;
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream.get()), "cudaMemcpyAsync");
}

/// Sends and receives that NCCL starts together. The group is closed in any case: one that stays open would swallow
/// the calls that follow on this thread.
class message_group {
 public:
  message_group() = default;
  message_group(const message_group&) = delete;
  message_group& operator=(const message_group&) = delete;
  ~message_group() {
    if (open_) static_cast<void>(ncclGroupEnd());
  }

  /// Adds a message; nothing after a failure or for 0 bytes.
  void send(const void* data, std::size_t bytes, int peer, ncclComm_t comm, device_stream stream) {
    if (prepare(bytes)) keep(ncclSend(data, bytes, ncclInt8, peer, comm, stream.get()));
  }
  /// Adds a receive; nothing after a failure or for 0 bytes.
  void receive(void* data, std::size_t bytes, int peer, ncclComm_t comm, device_stream stream) {
    if (prepare(bytes)) keep(ncclRecv(data, bytes, ncclInt8, peer, comm, stream.get()));
  }
  /// Starts what was added. @return the first failure, or what ncclGroupEnd says.
  ncclResult_t end() {
    if (!open_) return result_;
    open_ = false;
    const ncclResult_t ended = ncclGroupEnd();
    return result_ == ncclSuccess ? ended : result_;
  }

 private:
  bool prepare(std::size_t bytes) {
    if (bytes == 0 || result_ != ncclSuccess) return false;
    if (!open_) {
      result_ = ncclGroupStart();
      open_ = result_ == ncclSuccess;
    }
    return open_;
  }
  void keep(ncclResult_t result) {
    if (result != ncclSuccess && result != ncclInProgress) result_ = result;
  }

  ncclResult_t result_ = ncclSuccess;
  bool open_ = false;
};

}  // namespace detail::nccl

TESSERA_NAMESPACE_END
