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
#include <string>
#include <utility>

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
  int slots = 2;                             ///< Sets of flags: operations of different slots may overlap. 1 to 8.
  std::chrono::milliseconds timeout{30000};  ///< How long a kernel waits for another rank; at least 1 ms.
  int num_sms = 0;      ///< SMs that an operation takes, the library's choice if 0; need not be the same on all ranks.
  nccl_options nccl{};  ///< For `create` from a communicator of host memory.
};

/// A communicator of GPUs that write into each other's memory: everything that `comm::nccl` does, and one window of
/// memory per rank, registered once, of which every rank has the others' addresses. Kernels of `dispatch/symmetric.cuh`
/// move rows through it by themselves, without counts on the host.
///
/// **Memory.** `allocate` takes memory from the window. All ranks call it with the same sizes in the same order, so
/// that an array stands at the same offset everywhere; nothing else makes memory symmetric. The window is freed with
/// the last handle, which all ranks drop about the same time.
///
/// **Slots.** Operations of one slot are enqueued in the same order on all ranks, on one stream. `on_slot` gives a
/// handle for another slot, whose operations may run at the same time on another stream: two micro-batches that
/// overlap.
///
/// **Failure.** A kernel that waits for another rank longer than the timeout writes down whom it waited for and ends;
/// later operations of this rank do nothing. `failure` looks without waiting, `check` throws, `wait` does so for a
/// stream. When all ranks are back, `reset` makes the communicator usable again.
///
/// NVLink multicast is not used.
class symmetric : public nccl {
 public:
  /// Collective: makes a communicator over one of host memory, one GPU a rank. Host: returns when it is ready.
  /// @param bootstrap Same ranks, same size; used during the call alone. @param options See there.
  /// @throws what `nccl::create` throws; invalid_argument if options differ between ranks; nccl_error with the reason
  /// if the GPUs cannot reach each other's memory (see `problem`), or the window cannot be had.
  template <host_communicator Bootstrap>
  static symmetric create(Bootstrap& bootstrap, const symmetric_options& options) {
    return create(nccl::create(bootstrap, options.nccl), options);
  }

  /// Collective: the same over a communicator of NCCL. @param over Its ranks; kept. @param options See there.
  static symmetric create(nccl over, const symmetric_options& options);

  /// Collective: why the ranks of a communicator cannot reach each other's memory; empty if they can. An engine that
  /// gets a reason uses `comm::nccl` itself. @param over Ranks.
  static std::string problem(nccl& over);

  /// Collective: as `nccl::split`; the new communicator has a window of its own, as large.
  /// @param color Not negative. @param key Any.
  symmetric split(int color, int key);

  /// Memory of the window, at an offset that is a multiple of 1024 bytes. Not initialised. @param bytes Size.
  /// @throws invalid_argument if less is left. @return its first byte.
  std::byte* allocate(std::size_t bytes);
  /// Forgets all allocations; nothing may use them any more, on any rank.
  void release_all();
  /// Bytes that `allocate` handed out, and those of the window. @return both.
  std::pair<std::size_t, std::size_t> usage() const;
  /// Whether an address is in this rank's window. @param address Any.
  bool contains(const void* address) const;

  /// A handle of the same communicator for another slot. @param slot In `[0, options.slots)`.
  symmetric on_slot(int slot) const;
  /// This handle's slot.
  int slot() const noexcept { return slot_; }
  /// SMs that operations take; 0: the library's choice.
  int num_sms() const noexcept { return num_sms_; }
  /// @param sms SMs that operations of this handle take from now on; 0: the library's choice.
  void set_num_sms(int sms);

  /// What kernels need. @param channel Kind of operation.
  symmetric_view view(symmetric_channel channel) const;
  /// A second stream of this handle's slot, for work beside the caller's stream.
  device_stream side_stream() const;
  /// Orders the side stream after the caller's.
  CUevent_st* fork_event() const;
  /// Orders the caller's stream after the side stream.
  CUevent_st* join_event() const;

  /// The first failure that a kernel of this rank has seen; does not wait. @return nothing without one.
  std::optional<symmetric_failure> failure() const;
  /// Throws if a kernel of this rank has seen a failure, or NCCL has; does not wait. @throws comm_error naming rank,
  /// peer and operation; error for a row bound, with the need.
  void check();
  /// Waits on the host until the stream is done, at most for twice the timeout, and checks. @param stream Not being
  /// captured. @throws as `check`.
  void wait(device_stream stream);
  /// Collective: clears failure and flags of all slots, when all ranks are back. Host: waits for the side streams and
  /// the given stream, which are bounded because their kernels are. @param stream What this rank has used.
  /// @throws comm_error if a rank does not come.
  void reset(device_stream stream);

 private:
  symmetric(nccl over, std::shared_ptr<tessera::detail::symmetric::shared_window> window, int slot, int num_sms);

  std::shared_ptr<tessera::detail::symmetric::shared_window> window_;
  int slot_ = 0;
  int num_sms_ = 0;
};

static_assert(device_communicator<symmetric>);

}  // namespace comm

TESSERA_NAMESPACE_END
