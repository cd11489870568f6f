// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// GPUs of one host that reach each other's memory: the type, for any compiler. Its members are defined in
/// `symmetric.cuh`, which needs nvcc and NCCL; a program that uses them includes it and links `tessera::nccl`.

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include <tessera/comm/nccl.hpp>
#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/stream.hpp>

struct CUevent_st;

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {
class shared_window;
}

namespace comm {

/// Options of `comm::symmetric`.
struct symmetric_options {
  std::size_t window_bytes = 0;              ///< Bytes that `allocate` hands out, the same on all ranks; not 0.
  int slots = 1;                             ///< Sets of flags: operations of different slots may overlap. 1 to 8.
  std::chrono::milliseconds timeout{30000};  ///< How long a kernel waits for another rank; at least 1 ms.
  int num_sms = 0;              ///< SMs that an operation takes, the library's choice if 0; may differ by rank.
  int copy_streams = 0;         ///< Streams of each slot for `transport::copy_engines`, 0 to 8; may differ by rank.
  bool allow_direct = true;     ///< Without, GPUs do not share memory even if they could: to try what happens then.
  bool require_direct = false;  ///< Whether creation throws if GPUs cannot share memory; the same on all ranks.
  nccl_options nccl{};          ///< For `create` from a communicator of host memory.
};

/// A communicator of GPUs that write into each other's memory: everything that `comm::nccl` does, and one window of
/// memory per rank, registered once, of which every rank has the others' addresses. Kernels of `dispatch/symmetric.cuh`
/// move rows through it by themselves, without counts on the host.
///
/// **Where that is missing**, because GPUs are no peers, stand in different hosts, are more than eight, or are older
/// than compute capability 9.0, the communicator is made all the same: `direct` is false on all ranks, `reason` says
/// why, memory is memory of this rank alone, and collectives work. Kernels cannot dispatch, `view` throws; NCCL's sends
/// and receives can, see `dispatch/host_sized.cuh` and `dispatch_options::host_sized`.
///
/// **Memory.** `allocate` takes memory from the window. All ranks call it with the same sizes in the same order, so
/// that an array stands at the same offset everywhere; nothing else makes memory symmetric. The window goes with the
/// last handle, without waiting for other ranks: what they may still write there does no harm.
///
/// **Slots.** Operations of one slot are enqueued in the same order on all ranks, on one stream. `on_slot` gives a
/// handle for another slot, whose operations may run at the same time on another stream: two micro-batches that
/// overlap. Kernels of overlapping slots wait for those of other ranks at the same time, so their SMs must add up to no
/// more than the device has: the library's choice shares them among the slots, see `symmetric_sms`. Other kernels that
/// wait for ranks while these run, such as NCCL's collectives on another stream, count too. The library's choice leaves
/// them room beside dispatch, and combine needs none to be left: what peers wait for is sent by the blocks that have
/// room. Rows in the order of experts (`dispatch_expanded_begin`) take all: give them a budget (`num_sms`) that leaves
/// room, or order such collectives before or after them. Streams that share a hardware queue wait for each other: with
/// slots that overlap, or with more streams than eight, set CUDA_DEVICE_MAX_CONNECTIONS=32. Loading a kernel when it is
/// first launched may wait for kernels that wait for another rank's: a layer loads its kernels when it is made, and
/// engines with kernels of their own call `load_kernels` (`comm/load_kernels.cuh`) in their files, or set
/// CUDA_MODULE_LOADING=EAGER.
///
/// **Failure.** A kernel that waits for another rank longer than the timeout writes down whom it waited for and ends;
/// later operations of this rank do nothing. `failure` looks without waiting, `check` throws, `wait` does so for a
/// stream. When all ranks are back, `reset` makes the communicator usable again. A failure of NCCL is final, see
/// `comm::nccl`; memory stays valid then, too. What a call that failed has written, lists and
/// saved memory included, must not be used.
///
/// Operations are numbered modulo 2^32, and a flag that has not been posted for 2^31 operations of its slot and kind
/// counts as posted: an engine that changes the shape or the way of its combine after so many (a month at 800 a second)
/// calls `reset` before.
///
/// Handles are copies that share all of this, used by one thread at a time; destroy CUDA graphs of operations first.
/// NVLink multicast is not used.
class symmetric : public nccl {
 public:
  /// Collective: makes a communicator over one of host memory, one GPU a rank. Host: returns when it is ready.
  /// @param bootstrap Same ranks, same size; used during the call alone. @param options See there.
  /// @throws what `nccl::create` throws, and on all ranks: invalid_argument for wrong options or ones that differ,
  /// cuda_error if one has too little memory, nccl_error if `require_direct` cannot be had.
  template <host_communicator Bootstrap>
  static symmetric create(Bootstrap& bootstrap, const symmetric_options& options) {
    return create(nccl::create(bootstrap, options.nccl), options);
  }

  /// Collective: the same over a communicator of NCCL. @param over Its ranks; a handle is kept. An engine's own must
  /// not be destroyed before the last handle. @param options `options.nccl` is not used. @throws as the other one.
  static symmetric create(nccl over, const symmetric_options& options);

  /// Collective: as `nccl::split`; the new communicator has a window of its own, with this one's options.
  /// @param color Not negative. @param key Any.
  symmetric split(int color, int key);
  /// The same with other options. @param color Not negative. @param key Any. @param options Of the new one.
  symmetric split(int color, int key, const symmetric_options& options);

  /// The communicator of NCCL that collectives go over.
  nccl& over() noexcept { return *this; }
  /// Whether kernels reach the memory of all ranks; the same on all ranks.
  bool direct() const noexcept;
  /// Why not, naming a rank; empty if they do. The same on all ranks.
  const std::string& reason() const noexcept;

  /// Memory of the window, at an offset that is a multiple of 1024 bytes, aligned as much. Not initialised.
  /// @param bytes Size. @throws invalid_argument if less is left. @return its first byte.
  std::byte* allocate(std::size_t bytes);
  /// Forgets all allocations; nothing may use them any more, on any rank.
  void release_all() noexcept;
  /// Bytes that `allocate` can hand out in all, `options.window_bytes`.
  std::size_t capacity_bytes() const noexcept;
  /// Bytes that it has handed out, gaps for alignment included.
  std::size_t used_bytes() const noexcept;
  /// Whether an address is in this rank's window. @param address Any.
  bool contains(const void* address) const noexcept;
  /// Bytes from the window's start, where flags come first. @param address In this rank's window.
  /// @throws invalid_argument if it is not.
  std::size_t offset_of(const void* address) const;

  /// A handle of the same communicator for another slot. @param slot In `[0, options.slots)`.
  symmetric on_slot(int slot) const;
  /// Number of slots.
  int slots() const noexcept;
  /// This handle's slot; 0 at first.
  int slot() const noexcept { return slot_; }
  /// SMs that operations take; 0: the library's choice.
  int num_sms() const noexcept { return num_sms_; }
  /// @param sms SMs that operations of this handle take from now on; 0: the library's choice.
  void set_num_sms(int sms);

  /// What kernels need. @param channel Kind of operation. @throws invalid_argument with the reason if this is not
  /// `direct`.
  symmetric_view view(symmetric_channel channel) const;
  /// A second stream of this handle's slot, of high priority, for work beside the caller's stream.
  device_stream side_stream() const;
  /// Orders the side stream after the caller's. An event without timing, one per slot.
  CUevent_st* fork_event() const;
  /// Orders the caller's stream after the side stream. An event without timing, one per slot.
  CUevent_st* join_event() const;
  /// Streams of this handle's slot for copies between GPUs, `options.copy_streams`.
  int copy_streams() const noexcept;
  /// One of them. @param i In `[0, copy_streams())`.
  device_stream copy_stream(int i) const;
  /// Orders streams of copies and the caller's after each other: what is recorded is awaited at once. An event without
  /// timing, one per slot.
  CUevent_st* copy_event() const;

  /// The first failure that a kernel of this rank has seen, in ranks of this communicator; does not wait.
  /// @return nothing without one.
  std::optional<symmetric_failure> failure() const;
  /// Throws if a kernel of this rank has seen a failure, or NCCL has; does not wait. @throws comm_error naming rank,
  /// peer and operation; error for a row bound, with the need.
  void check();
  /// Waits on the host until the stream is done, at most for the timeouts of kernels and of NCCL together, and checks.
  /// @param stream Not being captured. @throws as `check` and `nccl::wait`.
  void wait(device_stream stream);
  /// The same with a timeout of its own, for all work of the stream. @param stream Not being captured.
  /// @param timeout At least 1 ms; if it is less than that of kernels, NCCL's communicator ends before they do.
  void wait(device_stream stream, std::chrono::milliseconds timeout);

  /// Collective: clears failure and flags of all slots, when all ranks are back. Host: returns when all ranks are
  /// ready; waits for the streams of all slots and the given stream, which end because their kernels do, and for other
  /// ranks as long as for a call of NCCL. Allocations stay. Nothing is enqueued between a reset that throws and one
  /// that does not. Where this is not `direct`, NCCL makes the ranks meet, and a rank that does not come is final.
  /// @param stream Where this rank has enqueued operations. @throws comm_error naming the rank that does not come; then
  /// nothing has changed, and it may be called again.
  void reset(device_stream stream);
  /// The same where there were several. @param streams All streams with operations of any slot.
  void reset(std::span<const device_stream> streams);

 private:
  symmetric(nccl over, std::shared_ptr<tessera::detail::symmetric::shared_window> window, int slot, int num_sms);
  void check_operations() const;

  std::shared_ptr<tessera::detail::symmetric::shared_window> window_;
  int slot_ = 0;
  int num_sms_ = 0;
};

static_assert(device_communicator<symmetric>);

}  // namespace comm

TESSERA_NAMESPACE_END
