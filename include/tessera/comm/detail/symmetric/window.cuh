// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <nccl.h>
#include <nccl_device.h>  // nowhere else: it takes its time to compile

#include <tessera/comm/detail/nccl/checks.cuh>
#include <tessera/comm/nccl.cuh>
#include <tessera/comm/symmetric.hpp>

// The registered window of one rank with the addresses of the others, the words that count operations, and the second
// streams. NCCL's device library is asked for addresses only; flags are our own, because its barriers wait without end.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

using nccl::device_guard;
using nccl::expect_cuda;

inline constexpr std::size_t window_alignment = 1024;

// Words of flags at the start of a window: per slot and channel those of entry and arrival, per slot those of chunks.
struct flag_layout {
  static constexpr std::size_t pair_words = 2 * comm::max_symmetric_ranks;
  static constexpr std::size_t slot_words =
      comm::num_symmetric_channels * pair_words +
      static_cast<std::size_t>(comm::max_symmetric_ranks) * comm::max_symmetric_chunks;
  static std::size_t bytes(int slots) {
    const std::size_t all = static_cast<std::size_t>(slots) * slot_words * sizeof(std::uint32_t);
    return (all + window_alignment - 1) / window_alignment * window_alignment;
  }
};

static __global__ void peer_addresses_kernel(ncclWindow_t window, int size, std::byte** peers) {
  const int r = static_cast<int>(threadIdx.x);
  if (r < size) peers[r] = static_cast<std::byte*>(ncclGetLsaPointer(window, 0, r));
}

// A few numbers of every rank, on the host. Waits.
inline std::vector<std::int64_t> gather_numbers(comm::nccl& over, std::int64_t own) {
  const device_guard guard(over.device());
  struct scratch {
    cudaStream_t stream = nullptr;
    std::int64_t* data = nullptr;
    explicit scratch(int size) {
      expect_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
      expect_cuda(cudaMalloc(reinterpret_cast<void**>(&data), (static_cast<std::size_t>(size) + 1) * sizeof(*data)),
                  "cudaMalloc");
    }
    scratch(const scratch&) = delete;
    scratch& operator=(const scratch&) = delete;
    ~scratch() {
      static_cast<void>(cudaFree(data));
      static_cast<void>(cudaStreamDestroy(stream));
    }
  } const s(over.size());
  std::vector<std::int64_t> all(static_cast<std::size_t>(over.size()));
  expect_cuda(cudaMemcpyAsync(s.data, &own, sizeof(own), cudaMemcpyHostToDevice, s.stream), "cudaMemcpyAsync");
  over.all_gather(s.stream, s.data, s.data + 1, 1);
  over.wait(s.stream);
  expect_cuda(cudaMemcpyAsync(all.data(), s.data + 1, all.size() * sizeof(own), cudaMemcpyDeviceToHost, s.stream),
              "cudaMemcpyAsync");
  over.wait(s.stream);
  return all;
}

class shared_window {
 public:
  shared_window(comm::nccl over, const comm::symmetric_options& options)
      : over_(std::move(over)), options_(options), flag_bytes_(flag_layout::bytes(options.slots)) {
    const device_guard guard(over_.device());
    bytes_ = flag_bytes_ + options.window_bytes;
    used_ = flag_bytes_;
    try {
      create();
    } catch (...) {
      release();
      throw;
    }
  }
  shared_window(const shared_window&) = delete;
  shared_window& operator=(const shared_window&) = delete;
  ~shared_window() { release(); }

  std::byte* allocate(std::size_t bytes) {
    const std::size_t begin = (used_ + window_alignment - 1) / window_alignment * window_alignment;
    TESSERA_EXPECTS(bytes <= bytes_ - begin, "comm::symmetric: " << bytes << " bytes are asked for, " << bytes_ - begin
                                                                 << " of window_bytes = " << bytes_ - flag_bytes_
                                                                 << " are left");
    used_ = begin + bytes;
    return base_ + begin;
  }
  void release_all() { used_ = flag_bytes_; }
  std::pair<std::size_t, std::size_t> usage() const { return {used_ - flag_bytes_, bytes_ - flag_bytes_}; }
  bool contains(const void* address) const {
    const auto* const byte = static_cast<const std::byte*>(address);
    return byte >= base_ && byte < base_ + bytes_;
  }

  comm::symmetric_view view(int slot, comm::symmetric_channel channel) const {
    const auto c = static_cast<std::size_t>(channel);
    const auto s = static_cast<std::size_t>(slot);
    comm::symmetric_view v;
    v.rank = over_.rank();
    v.size = over_.size();
    v.channel = channel;
    for (int r = 0; r < v.size; ++r) v.peer[r] = peers_[static_cast<std::size_t>(r)];
    auto* const words = reinterpret_cast<std::uint32_t*>(base_) + s * flag_layout::slot_words;
    v.entered = words + c * flag_layout::pair_words;
    v.arrived = v.entered + comm::max_symmetric_ranks;
    v.chunks = channel == comm::symmetric_channel::sums ? words + comm::num_symmetric_channels * flag_layout::pair_words
                                                        : nullptr;
    v.generation = local_ + (s * comm::num_symmetric_channels + c) * words_per_channel;
    v.tickets = v.generation + 4;
    v.failure = failure_;
    v.host_failure = host_failure_device_;
    v.timeout_ns =
        static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(options_.timeout).count());
    return v;
  }

  // Flags, counts and failure as they were at the start. Nothing runs.
  void clear() {
    const device_guard guard(over_.device());
    expect_cuda(cudaMemset(base_, 0, flag_bytes_), "cudaMemset");
    expect_cuda(cudaMemset(local_, 0, local_bytes()), "cudaMemset");
    expect_cuda(cudaMemset(failure_, 0, sizeof(*failure_)), "cudaMemset");
    *host_failure_ = comm::symmetric_failure{};
    expect_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  comm::nccl& over() { return over_; }
  const comm::symmetric_options& options() const { return options_; }
  cudaStream_t side_stream(int slot) const { return sides_[static_cast<std::size_t>(slot)].stream; }
  cudaEvent_t fork_event(int slot) const { return sides_[static_cast<std::size_t>(slot)].fork; }
  cudaEvent_t join_event(int slot) const { return sides_[static_cast<std::size_t>(slot)].join; }
  const volatile comm::symmetric_failure& host_failure() const { return *host_failure_; }

 private:
  static constexpr std::size_t words_per_channel = 32;  // a line of 128 bytes

  struct side {
    cudaStream_t stream = nullptr;
    cudaEvent_t fork = nullptr;
    cudaEvent_t join = nullptr;
  };

  std::size_t local_bytes() const {
    return static_cast<std::size_t>(options_.slots) * comm::num_symmetric_channels * words_per_channel *
           sizeof(std::uint32_t);
  }

  void create() {
    TESSERA_EXPECTS_AS(nccl_error, ncclMemAlloc(reinterpret_cast<void**>(&base_), bytes_) == ncclSuccess,
                       "comm::symmetric: ncclMemAlloc of " << bytes_ << " bytes failed");
    over_.call("create", "ncclCommWindowRegister", [this](ncclComm_t native) {
      return static_cast<int>(ncclCommWindowRegister(native, base_, bytes_, &window_, NCCL_WIN_COLL_SYMMETRIC));
    });
    // NCCL's own thread may write the handle a little later than it says that it is done.
    const auto deadline = std::chrono::steady_clock::now() + options_.timeout;
    const auto written = [this] { return std::atomic_ref<ncclWindow_t>(window_).load(std::memory_order_acquire); };
    while (written() == nullptr && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    // Where symmetric memory is missing the call succeeds all the same, with a handle that no kernel can use.
    cudaPointerAttributes attributes{};
    const cudaError_t known = cudaPointerGetAttributes(&attributes, window_);
    static_cast<void>(cudaGetLastError());
    TESSERA_EXPECTS_AS(nccl_error,
                       window_ != nullptr && known == cudaSuccess && attributes.type == cudaMemoryTypeDevice,
                       "comm::symmetric: NCCL gives no symmetric memory here (handle "
                           << static_cast<const void*>(window_) << ", memory type " << attributes.type
                           << "): NCCL_CUMEM_ENABLE and NCCL_WIN_ENABLE must not be 0");

    expect_cuda(cudaMalloc(reinterpret_cast<void**>(&local_), local_bytes()), "cudaMalloc");
    expect_cuda(cudaMalloc(reinterpret_cast<void**>(&failure_), sizeof(*failure_)), "cudaMalloc");
    expect_cuda(cudaHostAlloc(reinterpret_cast<void**>(&host_failure_), sizeof(*host_failure_), cudaHostAllocMapped),
                "cudaHostAlloc");
    expect_cuda(cudaHostGetDevicePointer(reinterpret_cast<void**>(&host_failure_device_), host_failure_, 0),
                "cudaHostGetDevicePointer");
    int least = 0;
    int greatest = 0;
    expect_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    sides_.resize(static_cast<std::size_t>(options_.slots));
    for (side& s : sides_) {
      expect_cuda(cudaStreamCreateWithPriority(&s.stream, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
      expect_cuda(cudaEventCreateWithFlags(&s.fork, cudaEventDisableTiming), "cudaEventCreate");
      expect_cuda(cudaEventCreateWithFlags(&s.join, cudaEventDisableTiming), "cudaEventCreate");
    }
    clear();

    std::byte** peers = nullptr;
    expect_cuda(cudaHostAlloc(reinterpret_cast<void**>(&peers), sizeof(peers_), cudaHostAllocMapped), "cudaHostAlloc");
    peer_addresses_kernel<<<1, comm::max_symmetric_ranks, 0, sides_[0].stream>>>(window_, over_.size(), peers);
    const cudaError_t launched = cudaGetLastError();
    const cudaError_t done = cudaStreamSynchronize(sides_[0].stream);
    for (std::size_t r = 0; r < static_cast<std::size_t>(over_.size()); ++r) peers_[r] = peers[r];
    static_cast<void>(cudaFreeHost(peers));
    expect_cuda(launched, "peer_addresses_kernel");
    expect_cuda(done, "peer_addresses_kernel");
    // This rank's own address of its window may be another than the one it allocated.
    base_of_own_ = std::exchange(base_, peers_[static_cast<std::size_t>(over_.rank())]);
    static_cast<void>(gather_numbers(over_, 0));  // no rank writes before all have cleared their flags
  }

  void release() noexcept {
    std::byte* const memory = base_of_own_ != nullptr ? base_of_own_ : base_;
    try {
      const device_guard guard(over_.device());
      // All ranks come here, or the communicator fails: then nobody may be writing, but the window stays mapped.
      if (!over_.failed()) {
        static_cast<void>(gather_numbers(over_, 0));
        if (window_ != nullptr) {
          over_.call("destroy", "ncclCommWindowDeregister",
                     [this](ncclComm_t native) { return static_cast<int>(ncclCommWindowDeregister(native, window_)); });
        }
        if (memory != nullptr) static_cast<void>(ncclMemFree(memory));
      }
    } catch (...) {  // a rank that is gone: its window may still be written to, so ours stays
    }
    for (const side& s : sides_) {
      if (s.fork != nullptr) static_cast<void>(cudaEventDestroy(s.fork));
      if (s.join != nullptr) static_cast<void>(cudaEventDestroy(s.join));
      if (s.stream != nullptr) static_cast<void>(cudaStreamDestroy(s.stream));
    }
    static_cast<void>(cudaFree(local_));
    static_cast<void>(cudaFree(failure_));
    if (host_failure_ != nullptr) static_cast<void>(cudaFreeHost(host_failure_));
  }

  comm::nccl over_;
  comm::symmetric_options options_;
  std::size_t flag_bytes_;
  std::size_t bytes_ = 0;
  std::size_t used_ = 0;
  std::byte* base_ = nullptr;         // as kernels see this rank's window
  std::byte* base_of_own_ = nullptr;  // as it was allocated
  ncclWindow_t window_ = nullptr;
  std::array<std::byte*, comm::max_symmetric_ranks> peers_{};
  std::uint32_t* local_ = nullptr;
  comm::symmetric_failure* failure_ = nullptr;
  comm::symmetric_failure* host_failure_ = nullptr;
  comm::symmetric_failure* host_failure_device_ = nullptr;
  std::vector<side> sides_;
};

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
