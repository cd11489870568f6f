// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Memory spaces, and the stream that work in each of them is ordered on.

#include <cstddef>
#include <type_traits>

#include <tessera/core/config.hpp>

struct CUstream_st;  // what cudaStream_t points to: named here so that no CUDA header is needed

TESSERA_NAMESPACE_BEGIN

/// Where memory lives and work runs. The communicator's space chooses between the host and the device half of an
/// operation.
namespace space {
struct host {};    ///< Ordinary memory; calls run on the calling thread and return when they are done.
struct device {};  ///< CUDA device memory; calls enqueue work on a stream and return.
}  // namespace space

/// One of the two memory spaces.
template <class S>
concept memory_space = std::is_same_v<S, space::host> || std::is_same_v<S, space::device>;

/// The order that work in `Space` is put in.
template <memory_space Space>
class stream_ref;

/// Host work happens at once, in program order: there is nothing to refer to.
template <>
class stream_ref<space::host> {};

/// A CUDA stream, not owned.
template <>
class stream_ref<space::device> {
 public:
  /// @param stream A `cudaStream_t` that outlives the work enqueued on it.
  constexpr stream_ref(CUstream_st* stream) noexcept : stream_(stream) {}  // NOLINT: meant to be implicit
  stream_ref(int) = delete;                                                // a literal 0 is no stream
  stream_ref(std::nullptr_t) = delete;                                     // nor is nullptr
  /// The `cudaStream_t`.
  constexpr CUstream_st* get() const noexcept { return stream_; }

 private:
  CUstream_st* stream_;
};

using host_stream = stream_ref<space::host>;      ///< Order of host work: program order.
using device_stream = stream_ref<space::device>;  ///< A CUDA stream.

TESSERA_NAMESPACE_END
