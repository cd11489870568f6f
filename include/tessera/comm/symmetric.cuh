// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The members of `comm::symmetric`. Needs nvcc and NCCL (link `tessera::nccl`), so no other header includes this one.

#include <array>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <utility>

#include <cuda_runtime.h>

#include <tessera/comm/detail/symmetric/create.cuh>
#include <tessera/comm/detail/symmetric/state.cuh>
#include <tessera/comm/nccl.cuh>
#include <tessera/comm/symmetric.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace comm {

inline symmetric::symmetric(nccl over, std::shared_ptr<tessera::detail::symmetric::shared_window> window, int slot,
                            int num_sms)
    : nccl(std::move(over)), window_(std::move(window)), slot_(slot), num_sms_(num_sms) {}

inline symmetric symmetric::create(nccl over, const symmetric_options& options) {
  auto window = tessera::detail::symmetric::create(over, options);
  return symmetric(std::move(over), std::move(window), 0, options.num_sms);
}

inline symmetric symmetric::split(int color, int key) { return split(color, key, window_->options()); }
inline symmetric symmetric::split(int color, int key, const symmetric_options& options) {
  return create(nccl::split(color, key), options);
}

inline bool symmetric::direct() const noexcept { return window_->direct(); }
inline const std::string& symmetric::reason() const noexcept { return window_->reason(); }

inline std::byte* symmetric::allocate(std::size_t bytes) { return window_->allocate(bytes); }
inline void symmetric::release_all() noexcept { window_->release_all(); }
inline std::size_t symmetric::capacity_bytes() const noexcept { return window_->options().window_bytes; }
inline std::size_t symmetric::used_bytes() const noexcept { return window_->used_bytes(); }
inline bool symmetric::contains(const void* address) const noexcept { return window_->contains(address); }
inline std::size_t symmetric::offset_of(const void* address) const { return window_->offset_of(address); }

inline symmetric symmetric::on_slot(int slot) const {
  TESSERA_EXPECTS(slot >= 0 && slot < window_->options().slots,
                  "comm::symmetric: slot " << slot << " of " << window_->options().slots << " slots");
  return symmetric(*this, window_, slot, num_sms_);
}
inline int symmetric::slots() const noexcept { return window_->options().slots; }
inline void symmetric::set_num_sms(int sms) {
  TESSERA_EXPECTS(sms >= 0,
                  "comm::symmetric: num_sms = " << sms << ", it must be at least 1, or 0 for the library's choice");
  num_sms_ = sms;
}

inline symmetric_view symmetric::view(symmetric_channel channel) const { return window_->view(slot_, channel); }
inline device_stream symmetric::side_stream() const { return window_->beside(slot_).stream; }
inline CUevent_st* symmetric::fork_event() const { return window_->beside(slot_).fork; }
inline CUevent_st* symmetric::join_event() const { return window_->beside(slot_).join; }
inline int symmetric::copy_streams() const noexcept { return window_->options().copy_streams; }
inline device_stream symmetric::copy_stream(int i) const {
  TESSERA_EXPECTS(i >= 0 && i < copy_streams(),
                  "comm::symmetric: stream " << i << " of " << copy_streams() << " streams of copies");
  return window_->beside(slot_).copies[static_cast<std::size_t>(i)];
}
inline CUevent_st* symmetric::copy_event() const { return window_->beside(slot_).copied; }

inline std::optional<symmetric_failure> symmetric::failure() const {
  const symmetric_failure seen = window_->seen_failure();
  if (seen.state == 0) return std::nullopt;
  return seen;
}

inline void symmetric::check() {
  check_operations();
  nccl::check();
}

inline void symmetric::check_operations() const {
  const auto seen = failure();
  if (!seen) return;
  const auto phase = [&]() -> const char* {
    switch (seen->channel) {
      case symmetric_channel::tables:
        return "exchange of routings";
      case symmetric_channel::rows:
        return "dispatch of rows";
      case symmetric_channel::sums:
        return "combine of rows";
      case symmetric_channel::values:
        return "return of values";
      case symmetric_channel::parts:
        return "expansion of rows";
    }
    return "operation";
  }();
  const int rank = window_->world_rank(seen->rank);
  const int peer = window_->world_rank(seen->peer);
  TESSERA_EXPECTS_AS(error, seen->step != symmetric_step::overflow,
                     "rank " << rank << " in " << phase << ": rank " << peer << " would receive " << seen->generation
                             << " pairs, which is more than its bound: raise dispatch_options::row_bound to "
                             << seen->generation << " or more, or choose overflow_policy::drop; then reset()");
  std::ostringstream text;
  text << "rank " << rank << " in " << phase << ": rank " << peer
       << (seen->step == symmetric_step::entry     ? " has not come to"
           : seen->step == symmetric_step::arrival ? " has not sent its part of"
                                                   : " has not sent a chunk of")
       << " operation " << seen->generation << " of its slot within " << window_->options().timeout.count()
       << " ms; reset() when all ranks are back";
  throw comm_error(text.str(), rank, peer, phase);
}

inline void symmetric::wait(device_stream stream) { wait(stream, window_->stream_patience()); }
inline void symmetric::wait(device_stream stream, std::chrono::milliseconds timeout) {
  try {
    nccl::wait(stream, timeout);
  } catch (const comm_error&) {
    check_operations();  // knows who was missing, which NCCL does not
    throw;
  }
  check_operations();
}

inline void symmetric::reset(device_stream stream) { reset(std::span<const device_stream>(&stream, 1)); }

inline void symmetric::reset(std::span<const device_stream> streams) {
  using tessera::detail::symmetric::drain;
  nccl::check();
  const tessera::detail::nccl::device_guard guard(device());
  const auto fail_with = [&](int peer, const std::string& cause) {
    throw comm_error("rank " + std::to_string(world_rank()) + " in reset: " + cause, world_rank(), peer, "reset");
  };
  const auto expect_drained = [&](device_stream stream) {
    if (drain(stream.get(), window_->stream_patience())) return;
    fail_with(-1, "a stream was not done after " + std::to_string(window_->stream_patience().count()) +
                      " ms; what it does besides operations of this communicator must end first");
  };
  for (const device_stream stream : streams) expect_drained(stream);
  for (int slot = 0; slot < window_->options().slots; ++slot) {
    expect_drained(window_->beside(slot).stream);
    for (const device_stream copies : window_->beside(slot).copies) expect_drained(copies);
  }
  if (!direct()) {
    barrier(side_stream());
    nccl::wait(side_stream());
    return;
  }
  const auto meet = [&] {
    const int missing = window_->meet();
    if (missing < 0) return;
    fail_with(window_->world_rank(missing), "rank " + std::to_string(window_->world_rank(missing)) +
                                                " has not come to it within " +
                                                std::to_string(window_->patience().count()) + " ms");
  };
  // Whoever has seen this rank come to the second meeting goes on, and what it posts from then on is not old: a rank
  // that has cleared its flags and misses somebody has only to come to that meeting again.
  if (!window_->is_cleared()) {
    const std::uint32_t before = window_->meetings();
    meet();  // nobody's kernels run any more
    try {
      window_->clear(false);
    } catch (...) {
      window_->withdraw(before);
      throw;
    }
  }
  meet();  // nobody's flags are old any more
  window_->forget_failure();
}

}  // namespace comm

TESSERA_NAMESPACE_END
