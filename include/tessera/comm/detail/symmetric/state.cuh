// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <nccl.h>

#include <tessera/comm/detail/nccl/state.cuh>
#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/comm/detail/symmetric/window.cuh>
#include <tessera/comm/symmetric.hpp>
#include <tessera/core/error.hpp>

// What the handles of one comm::symmetric on one rank share: the memory that peers write, with the flags in front, the
// words that count operations, the second streams, and a barrier of the ranks' host threads.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

using nccl::call_within;
using nccl::device_guard;
using nccl::poll_pause;
using std::chrono::milliseconds;

inline constexpr std::size_t window_alignment = 1024;
inline constexpr milliseconds longest_wait = std::chrono::hours(24 * 365);  // sums of longer ones might overflow

constexpr std::size_t to_alignment(std::size_t bytes) {
  return (bytes + window_alignment - 1) / window_alignment * window_alignment;
}

/// Words at the start of a window: those of the hosts' barrier; then per slot those of entry and arrival of each
/// channel, and those of the chunks of two.
struct flag_layout {
  static constexpr std::size_t barrier_words = 32;  // a line of 128 bytes
  static constexpr std::size_t pair_words = 2 * comm::max_symmetric_ranks;
  static constexpr std::size_t chunk_words =
      static_cast<std::size_t>(comm::max_symmetric_ranks) * comm::max_symmetric_chunks;
  static constexpr std::size_t slot_words = comm::num_symmetric_channels * pair_words + 2 * chunk_words;
  static constexpr std::size_t bytes(int slots) {
    return to_alignment((barrier_words + static_cast<std::size_t>(slots) * slot_words) * sizeof(std::uint32_t));
  }
};

/// Comes to a barrier and waits for the others.
static __global__ void meet_kernel(const __grid_constant__ comm::symmetric_view view, std::uint32_t generation) {
  announce(view, generation);
  const int r = static_cast<int>(threadIdx.x);
  if (r < view.size) await(view, view.entered + r, generation, r, symmetric_step::entry);
}

/// Says where this rank is.
static __global__ void announce_kernel(const __grid_constant__ comm::symmetric_view view, std::uint32_t generation) {
  announce(view, generation);
}

/// Waits on the host, at most for `patience`. @return whether the stream is done.
inline bool drain(cudaStream_t stream, milliseconds patience) {
  const auto start = std::chrono::steady_clock::now();
  poll_pause pause;
  for (bool last = false;;) {
    const cudaError_t status = cudaStreamQuery(stream);
    if (status == cudaSuccess) return true;
    static_cast<void>(cudaGetLastError());  // "not ready" counts as an error
    if (status != cudaErrorNotReady) check_cuda(status, "cudaStreamQuery");
    if (last) return false;
    last = std::chrono::steady_clock::now() - start >= patience;
    if (!last) pause();
  }
}

/// One rank's share.
class shared_window {
 public:
  struct side {
    cudaStream_t stream = nullptr;
    cudaEvent_t fork = nullptr;
    cudaEvent_t join = nullptr;
    std::vector<cudaStream_t> copies;
    cudaEvent_t copied = nullptr;
  };

  /// Has nothing yet. @param over Ranks. @param options Checked. @param world_ranks Of all ranks, for errors.
  shared_window(const comm::nccl& over, const comm::symmetric_options& options, std::vector<int> world_ranks)
      : options_(options),
        world_ranks_(std::move(world_ranks)),
        patience_((std::min)(over.timeout(), longest_wait)),
        rank_(over.rank()),
        size_(over.size()),
        flag_bytes_(flag_layout::bytes(options.slots)),
        bytes_(flag_bytes_ + options.window_bytes),
        used_(flag_bytes_) {
    held_ = std::make_unique<holdings>();
    held_->device = over.device();
  }
  shared_window(const shared_window&) = delete;
  shared_window& operator=(const shared_window&) = delete;
  /// Does not wait for other ranks, and not long for this one's GPU.
  ~shared_window() {
    call_within(milliseconds(5000), [held = held_.release()] { delete held; });
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Creation

  /// Allocates everything but the mappings. @param mappable Whether peers are going to map the memory.
  void allocate_all(bool mappable) {
    holdings& h = *held_;
    if (mappable) {
      const ncclResult_t result = ncclMemAlloc(reinterpret_cast<void**>(&h.memory), bytes_ + window_alignment);
      h.from_nccl = true;
      TESSERA_EXPECTS_AS(cuda_error, result == ncclSuccess,
                         "ncclMemAlloc of " << bytes_ << " bytes: " << nccl::text_of(result, nullptr));
    } else {
      check_cuda(cudaMalloc(reinterpret_cast<void**>(&h.memory), bytes_ + window_alignment),
                 ("cudaMalloc of " + std::to_string(bytes_) + " bytes").c_str());
    }
    base_ = reinterpret_cast<std::byte*>(to_alignment(reinterpret_cast<std::size_t>(h.memory)));
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&h.local), sizeof(failures) + count_bytes()), "cudaMalloc");
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&h.seen), sizeof(*h.seen), cudaHostAllocMapped), "cudaHostAlloc");
    check_cuda(cudaHostGetDevicePointer(reinterpret_cast<void**>(&seen_by_device_), h.seen, 0),
               "cudaHostGetDevicePointer");
    new (h.seen) host_words{};
    int least = 0;
    int greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    check_cuda(cudaStreamCreateWithFlags(&h.own_stream, cudaStreamNonBlocking), "cudaStreamCreate");
    h.sides.resize(static_cast<std::size_t>(options_.slots));
    for (side& s : h.sides) {
      check_cuda(cudaStreamCreateWithPriority(&s.stream, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
      check_cuda(cudaEventCreateWithFlags(&s.fork, cudaEventDisableTiming), "cudaEventCreate");
      check_cuda(cudaEventCreateWithFlags(&s.join, cudaEventDisableTiming), "cudaEventCreate");
      s.copies.resize(static_cast<std::size_t>(options_.copy_streams));
      for (cudaStream_t& copies : s.copies) {
        check_cuda(cudaStreamCreateWithPriority(&copies, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
      }
      check_cuda(cudaEventCreateWithFlags(&s.copied, cudaEventDisableTiming), "cudaEventCreate");
    }
    // Own memory is used at its own address, which stays whatever becomes of mappings. Where there are more ranks than
    // may share memory, nobody asks for addresses.
    peers_.fill(nullptr);
    if (size_ <= comm::max_symmetric_ranks) peers_[static_cast<std::size_t>(rank_)] = base_;
    clear(true);
    forget_failure();
  }

  /// Collective: maps the others' memory. @param over Ranks. @return what is in the way, empty if nothing is.
  std::string map_peers(comm::nccl& over) {
    held_->window = std::make_unique<registered_window>(over, base_, bytes_);
    return held_->window->obstacle();
  }

  /// After `map_peers` on all ranks: learns the addresses.
  void learn_addresses() {
    held_->window->write_addresses(seen_by_device_->peers, held_->own_stream);
    finish_own("peer_addresses_kernel");
    for (int r = 0; r < size_; ++r) {
      if (r != rank_) peers_[static_cast<std::size_t>(r)] = held_->seen->peers[r];
    }
  }

  /// @param reason Why peers cannot be reached; empty if they can.
  void settle(std::string reason) { reason_ = std::move(reason); }

  // -------------------------------------------------------------------------------------------------------------------
  // Memory

  std::byte* allocate(std::size_t bytes) {
    const std::size_t begin = to_alignment(used_);
    TESSERA_EXPECTS(begin <= bytes_ && bytes <= bytes_ - begin,
                    "comm::symmetric: " << bytes << " bytes are asked for, " << (begin <= bytes_ ? bytes_ - begin : 0)
                                        << " of window_bytes = " << options_.window_bytes << " are left");
    used_ = begin + bytes;
    return base_ + begin;
  }
  void release_all() noexcept { used_ = flag_bytes_; }
  std::size_t used_bytes() const noexcept { return used_ - flag_bytes_; }
  bool contains(const void* address) const noexcept {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    const auto base = reinterpret_cast<std::uintptr_t>(base_);
    return at >= base && at - base < bytes_;
  }
  std::size_t offset_of(const void* address) const {
    TESSERA_EXPECTS(contains(address), "comm::symmetric: " << address << " is not in the window, which is "
                                                           << static_cast<const void*>(base_) << " to "
                                                           << static_cast<const void*>(base_ + bytes_));
    return static_cast<std::size_t>(static_cast<const std::byte*>(address) - base_);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // What kernels get

  comm::symmetric_view view(int slot, comm::symmetric_channel channel) const {
    TESSERA_EXPECTS(direct(), "comm::symmetric: kernels cannot reach the memory of other ranks: " << reason_);
    const auto c = static_cast<std::size_t>(channel);
    const auto s = static_cast<std::size_t>(slot);
    comm::symmetric_view v = plain_view();
    v.channel = channel;
    auto* const words =
        reinterpret_cast<std::uint32_t*>(base_) + flag_layout::barrier_words + s * flag_layout::slot_words;
    v.entered = words + c * flag_layout::pair_words;
    v.arrived = v.entered + comm::max_symmetric_ranks;
    auto* const chunks = words + comm::num_symmetric_channels * flag_layout::pair_words;
    if (channel == comm::symmetric_channel::sums) v.chunks = chunks;
    if (channel == comm::symmetric_channel::parts) v.chunks = chunks + flag_layout::chunk_words;
    v.generation = counts() + (s * comm::num_symmetric_channels + c) * words_per_channel;
    v.tickets = v.generation + 4;
    v.failure = &held_->local->of_operations;
    v.host_failure = &seen_by_device_->failed.of_operations;
    v.timeout_ns = nanoseconds_of(options_.timeout);
    return v;
  }
  const side& beside(int slot) const { return held_->sides[static_cast<std::size_t>(slot)]; }

  /// What a kernel has written down, without waiting.
  comm::symmetric_failure seen_failure() const { return copy_of(held_->seen->failed.of_operations); }

  // -------------------------------------------------------------------------------------------------------------------
  // Among the ranks' host threads

  /// Waits until all ranks have called it as often. @return -1, or a rank that has not come in time: then this rank has
  /// not come either, so that the next attempt starts where this one did.
  int meet() {
    holdings& h = *held_;
    h.seen->failed.of_barrier = comm::symmetric_failure{};
    check_cuda(cudaMemsetAsync(&h.local->of_barrier, 0, sizeof(h.local->of_barrier), h.own_stream), "cudaMemsetAsync");
    comm::symmetric_view v = plain_view();
    v.entered = reinterpret_cast<std::uint32_t*>(base_);
    v.failure = &h.local->of_barrier;
    v.host_failure = &seen_by_device_->failed.of_barrier;
    v.timeout_ns = nanoseconds_of(patience_);
    meet_kernel<<<1, 32, 0, h.own_stream>>>(v, meetings_ + 1);
    expect_launched("meet_kernel");
    finish_own("meet_kernel");
    const comm::symmetric_failure seen = copy_of(h.seen->failed.of_barrier);
    if (seen.state != 0) {
      withdraw(meetings_);
      return seen.peer;
    }
    ++meetings_;
    return -1;
  }
  /// Meetings so far.
  std::uint32_t meetings() const noexcept { return meetings_; }
  /// Takes back that this rank has come to meetings after `count` of them.
  void withdraw(std::uint32_t count) {
    meetings_ = count;
    comm::symmetric_view v = plain_view();
    v.entered = reinterpret_cast<std::uint32_t*>(base_);
    announce_kernel<<<1, 32, 0, held_->own_stream>>>(v, count);
    expect_launched("announce_kernel");
    finish_own("announce_kernel");
  }

  /// Flags and counts as they were at the start. No kernel of any rank uses them.
  /// @param barrier Whether the barrier begins anew, too.
  void clear(bool barrier) {
    const holdings& h = *held_;
    const std::size_t kept = barrier ? 0 : flag_layout::barrier_words * sizeof(std::uint32_t);
    check_cuda(cudaMemsetAsync(base_ + kept, 0, flag_bytes_ - kept, h.own_stream), "cudaMemsetAsync");
    check_cuda(cudaMemsetAsync(counts(), 0, count_bytes(), h.own_stream), "cudaMemsetAsync");
    finish_own("cudaMemsetAsync");
    is_cleared_ = true;
  }
  /// Whether no operation has worked since `clear`.
  bool is_cleared() const noexcept { return is_cleared_; }
  /// Forgets what kernels have written down: operations work again.
  void forget_failure() {
    check_cuda(cudaMemsetAsync(held_->local, 0, sizeof(failures), held_->own_stream), "cudaMemsetAsync");
    finish_own("cudaMemsetAsync");
    held_->seen->failed = failures{};
    is_cleared_ = false;
  }

  const comm::symmetric_options& options() const noexcept { return options_; }
  bool direct() const noexcept { return reason_.empty(); }
  const std::string& reason() const noexcept { return reason_; }
  /// In errors. @param rank Of this communicator.
  int world_rank(int rank) const { return world_ranks_.at(static_cast<std::size_t>(rank)); }
  /// How long the host waits for other ranks.
  milliseconds patience() const noexcept { return patience_; }
  /// How long the host waits for a stream whose kernels may wait for other ranks.
  milliseconds stream_patience() const noexcept { return (std::min)(options_.timeout, longest_wait) + patience_; }

 private:
  static constexpr std::size_t words_per_channel = 32;  // a line of 128 bytes

  struct failures {
    comm::symmetric_failure of_operations;
    comm::symmetric_failure of_barrier;
    std::byte line[128 - 2 * sizeof(comm::symmetric_failure)];  // counts begin on a line of their own
  };
  struct host_words {  // pinned, and mapped into the device
    failures failed{};
    std::byte* peers[comm::max_symmetric_ranks] = {};
  };

  /// Everything that is freed in the end, in one piece because that may take longer than a destructor should.
  struct holdings {
    int device = 0;
    std::byte* memory = nullptr;
    bool from_nccl = false;
    std::unique_ptr<registered_window> window;
    failures* local = nullptr;  // counts follow
    host_words* seen = nullptr;
    cudaStream_t own_stream = nullptr;
    std::vector<side> sides;

    holdings() = default;
    holdings(const holdings&) = delete;
    holdings& operator=(const holdings&) = delete;
    ~holdings() {
      static_cast<void>(cudaSetDevice(device));
      static_cast<void>(cudaFree(local));  // waits for what runs on the device
      window.reset();
      if (from_nccl) {
        if (memory != nullptr) static_cast<void>(ncclMemFree(memory));
      } else {
        static_cast<void>(cudaFree(memory));
      }
      if (seen != nullptr) static_cast<void>(cudaFreeHost(seen));
      for (const side& s : sides) {
        if (s.fork != nullptr) static_cast<void>(cudaEventDestroy(s.fork));
        if (s.join != nullptr) static_cast<void>(cudaEventDestroy(s.join));
        if (s.stream != nullptr) static_cast<void>(cudaStreamDestroy(s.stream));
        for (cudaStream_t copies : s.copies) {
          if (copies != nullptr) static_cast<void>(cudaStreamDestroy(copies));
        }
        if (s.copied != nullptr) static_cast<void>(cudaEventDestroy(s.copied));
      }
      if (own_stream != nullptr) static_cast<void>(cudaStreamDestroy(own_stream));
    }
  };

  static std::uint64_t nanoseconds_of(milliseconds time) {
    return static_cast<std::uint64_t>(std::chrono::nanoseconds((std::min)(time, longest_wait)).count());
  }

  static comm::symmetric_failure copy_of(const volatile comm::symmetric_failure& seen) {
    comm::symmetric_failure copy;
    if (seen.state != 2) return copy;
    std::atomic_thread_fence(std::memory_order_acquire);
    copy.state = 2;
    copy.rank = seen.rank;
    copy.peer = seen.peer;
    copy.channel = seen.channel;
    copy.step = seen.step;
    copy.generation = seen.generation;
    return copy;
  }

  std::size_t count_bytes() const {
    return static_cast<std::size_t>(options_.slots) * comm::num_symmetric_channels * words_per_channel *
           sizeof(std::uint32_t);
  }
  std::uint32_t* counts() const { return reinterpret_cast<std::uint32_t*>(held_->local + 1); }

  comm::symmetric_view plain_view() const {
    comm::symmetric_view v;
    v.rank = rank_;
    v.size = size_;
    for (int r = 0; r < size_; ++r) v.peer[r] = peers_[static_cast<std::size_t>(r)];
    return v;
  }

  // Waits for what this class has enqueued, which is short or ends by itself.
  void finish_own(const char* what) const {
    TESSERA_EXPECTS_AS(cuda_error, drain(held_->own_stream, 2 * patience_ + milliseconds(1000)),
                       "comm::symmetric: " << what << " was not done after "
                                           << (2 * patience_ + milliseconds(1000)).count()
                                           << " ms: the GPU does something else");
  }

  comm::symmetric_options options_;
  std::vector<int> world_ranks_;
  milliseconds patience_;
  int rank_;
  int size_;
  std::size_t flag_bytes_;
  std::size_t bytes_;
  std::size_t used_;
  std::unique_ptr<holdings> held_;
  std::byte* base_ = nullptr;
  host_words* seen_by_device_ = nullptr;
  std::array<std::byte*, comm::max_symmetric_ranks> peers_{};
  std::string reason_ = "it is being made";
  std::uint32_t meetings_ = 0;
  bool is_cleared_ = false;
};

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
