// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of the communicator of a single rank: collectives are copies on the stream.

#include <cuda_runtime.h>

#include <tessera/comm/self.hpp>
#include <tessera/core/detail/launch.cuh>

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline void copy_on_device(device_stream stream, const void* from, void* to, std::int64_t bytes) {
  if (from == to || bytes == 0) return;
  check_cuda(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice, stream.get()),
             "cudaMemcpyAsync");
}

}  // namespace detail

namespace comm {

inline self<space::device> self<space::device>::split(int color, int) {
  TESSERA_EXPECTS(color >= 0, "split: color = " << color << ", it must not be negative");
  return {};
}

inline void self<space::device>::barrier(device_stream) {}

template <transferable T>
void self<space::device>::broadcast(device_stream, T*, std::int64_t, int) {}

template <reducible T>
void self<space::device>::all_reduce(device_stream stream, const T* send, T* recv, std::int64_t count, reduce_op) {
  tessera::detail::copy_on_device(stream, send, recv, count * static_cast<std::int64_t>(sizeof(T)));
}

template <transferable T>
void self<space::device>::all_gather(device_stream stream, const T* send, T* recv, std::int64_t count) {
  tessera::detail::copy_on_device(stream, send, recv, count * static_cast<std::int64_t>(sizeof(T)));
}

template <reducible T>
void self<space::device>::reduce_scatter(device_stream stream, const T* send, T* recv, std::int64_t count, reduce_op) {
  tessera::detail::copy_on_device(stream, send, recv, count * static_cast<std::int64_t>(sizeof(T)));
}

template <transferable T>
void self<space::device>::all_to_all_v(device_stream stream, const T* send, const std::int64_t* send_counts,
                                       const std::int64_t* send_offsets, T* recv, const std::int64_t* recv_counts,
                                       const std::int64_t* recv_offsets) {
  TESSERA_EXPECTS(send_counts[0] == recv_counts[0],
                  "all_to_all_v: " << send_counts[0] << " elements to itself, " << recv_counts[0] << " expected");
  tessera::detail::copy_on_device(stream, send + send_offsets[0], recv + recv_offsets[0],
                                  send_counts[0] * static_cast<std::int64_t>(sizeof(T)));
}

inline void self<space::device>::exchange(device_stream stream, std::span<const transfer> sends,
                                          std::span<const transfer> receives) {
  TESSERA_EXPECTS(sends.size() == receives.size(),
                  "exchange: " << sends.size() << " messages to itself, " << receives.size() << " expected");
  for (std::size_t i = 0; i < sends.size(); ++i) {
    TESSERA_EXPECTS(sends[i].peer == 0 && receives[i].peer == 0 && sends[i].bytes == receives[i].bytes,
                    "exchange: message " << i << " is of " << sends[i].bytes << " bytes to rank " << sends[i].peer
                                         << ", expected " << receives[i].bytes << " from rank " << receives[i].peer);
    tessera::detail::copy_on_device(stream, sends[i].data, receives[i].data, sends[i].bytes);
  }
}

}  // namespace comm

TESSERA_NAMESPACE_END
