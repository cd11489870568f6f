// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <sstream>
#include <string>
#include <utility>

#include <cuda_runtime.h>
#include <nccl.h>

#if NCCL_VERSION_CODE < 22800
#error "comm::symmetric needs NCCL 2.28 or later: windows that kernels can use came with that version."
#endif
// Nowhere else: it takes its time to compile, and stands where compilers do not know it for a system header.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <nccl_device.h>
#pragma GCC diagnostic pop

#include <tessera/comm/detail/nccl/state.cuh>
#include <tessera/comm/nccl.cuh>
#include <tessera/comm/symmetric_view.hpp>

// What is asked of NCCL's device library: addresses, and nothing else. Flags are our own, because its barriers wait
// without end.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

static __global__ void peer_addresses_kernel(ncclWindow_t window, int size, std::byte** peers) {
  const int r = static_cast<int>(threadIdx.x);
  if (r < size) peers[r] = static_cast<std::byte*>(ncclGetLsaPointer(window, 0, r));
}

/// Memory of this rank that the others map, and theirs that this rank maps.
///
/// Registered with a communicator of its own, for two reasons. One that fails is aborted, which unmaps its windows:
/// kernels under way would write to addresses that are gone. And NCCL takes kernels that no abort can end for
/// collectives on buffers in a window of their communicator.
///
/// A rank may end its mappings at any time: memory lives as long as anybody maps it, so what others still write goes
/// to memory that nobody reads.
class registered_window {
 public:
  /// Collective. @param over Ranks, at most `max_symmetric_ranks`. @param base From ncclMemAlloc, kept until this is
  /// gone. @param bytes Size. @throws what `comm::nccl` throws.
  registered_window(comm::nccl& over, std::byte* base, std::size_t bytes)
      : own_(over.split(0, over.rank())), window_(new ncclWindow_t(nullptr)) {
    try {
      own_.call("create", "ncclTeamLsa", [&](ncclComm_t native) {
        team_ = ncclTeamLsa(native).nRanks;
        return ncclSuccess;
      });
      if (team_ != own_.size()) return;  // the same on all ranks
      own_.call("create", "ncclCommWindowRegister", [&](ncclComm_t native) {
        const ncclResult_t called = ncclCommWindowRegister(native, base, bytes, window_, NCCL_WIN_COLL_SYMMETRIC);
        if (called != ncclSuccess) return called;
        ncclResult_t state = ncclSuccess;  // a thread of NCCL's may be at it still, though the call has succeeded
        const ncclResult_t asked = ncclCommGetAsyncError(native, &state);
        return asked == ncclSuccess ? state : asked;
      });
    } catch (...) {
      release();
      throw;
    }
  }
  registered_window(const registered_window&) = delete;
  registered_window& operator=(const registered_window&) = delete;
  ~registered_window() { release(); }

  /// Why kernels cannot use it; empty if they can.
  std::string obstacle() const {
    std::ostringstream text;
    if (team_ != own_.size()) {
      text << "it reaches the memory of " << team_ << " of " << own_.size() << " ranks by load and store";
      return text.str();
    }
    // Where symmetric memory is missing registration succeeds all the same, with no handle or one of the host.
    cudaPointerAttributes attributes{};
    const cudaError_t known = *window_ == nullptr ? cudaSuccess : cudaPointerGetAttributes(&attributes, *window_);
    static_cast<void>(cudaGetLastError());
    if (*window_ == nullptr || known != cudaSuccess || attributes.type != cudaMemoryTypeDevice) {
      text << "NCCL gives no window that kernels can use (handle " << static_cast<const void*>(*window_)
           << "): all GPUs must be peers of each other, and NCCL_CUMEM_ENABLE and NCCL_WIN_ENABLE must not be 0";
    }
    return text.str();
  }

  /// Writes where this device sees each rank's memory. @param peers `[size]`, which the device sees.
  /// @param stream Where.
  void write_addresses(std::byte** peers, cudaStream_t stream) const {
    peer_addresses_kernel<<<1, comm::max_symmetric_ranks, 0, stream>>>(*window_, own_.size(), peers);
    expect_launched("peer_addresses_kernel");
  }

 private:
  void release() noexcept {
    if (own_.failed()) return;  // aborted, and NCCL knows what of it is left; a thread of its may write the handle yet
    if (*window_ != nullptr) static_cast<void>(ncclCommWindowDeregister(own_.native(), *window_));
    delete window_;
  }

  comm::nccl own_;
  ncclWindow_t* window_;
  int team_ = 0;  // ranks that reach each other by load and store
};

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
