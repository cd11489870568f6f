// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The members of `comm::symmetric`. Needs nvcc and NCCL (link `tessera::nccl`), so no other header includes this one.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include <cuda_runtime.h>

#include <tessera/comm/detail/symmetric/window.cuh>
#include <tessera/comm/nccl.cuh>
#include <tessera/comm/symmetric.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace comm {

inline symmetric::symmetric(nccl over, std::shared_ptr<tessera::detail::symmetric::shared_window> window, int slot,
                            int num_sms)
    : nccl(std::move(over)), window_(std::move(window)), slot_(slot), num_sms_(num_sms) {}

inline std::string symmetric::problem(nccl& over) {
  if (over.size() > max_symmetric_ranks) {
    return "there are " + std::to_string(over.size()) + " ranks, at most " + std::to_string(max_symmetric_ranks) +
           " share memory";
  }
  const detail::nccl::device_guard guard(over.device());
  int major = 0;
  detail::nccl::expect_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, over.device()),
                            "cudaDeviceGetAttribute");
  int reached = 0;
  over.call("create", "ncclTeamLsa", [&](ncclComm_t native) {
    reached = ncclTeamLsa(native).nRanks;
    return static_cast<int>(ncclSuccess);
  });
  // Every rank says what it found, so that all come to the same answer.
  std::int64_t found = 0;
  if (major < 9) found = 1;
  if (reached < over.size()) found = 2;
  const auto all = detail::symmetric::gather_numbers(over, found);
  for (std::size_t r = 0; r < all.size(); ++r) {
    const std::string rank = "rank " + std::to_string(r);
    if (all[r] == 1) return rank + " has a device of compute capability below 9.0";
    if (all[r] == 2) return rank + " does not reach the memory of all others by load and store";
  }
  return {};
}

inline symmetric symmetric::create(nccl over, const symmetric_options& options) {
  TESSERA_EXPECTS(options.window_bytes > 0, "comm::symmetric: window_bytes is 0");
  TESSERA_EXPECTS(options.slots >= 1 && options.slots <= 8,
                  "comm::symmetric: slots = " << options.slots << ", it must be 1 to 8");
  TESSERA_EXPECTS(options.timeout.count() >= 1,
                  "comm::symmetric: the timeout is " << options.timeout.count() << " ms, it must be at least 1 ms");
  TESSERA_EXPECTS(options.num_sms >= 0, "comm::symmetric: num_sms = " << options.num_sms << " is negative");
  const std::string reason = problem(over);
  TESSERA_EXPECTS_AS(nccl_error, reason.empty(), "comm::symmetric: " << reason << ": use comm::nccl");
  const std::int64_t size = static_cast<std::int64_t>(options.window_bytes) * 8 + options.slots - 1;
  const auto sizes = detail::symmetric::gather_numbers(over, size);
  for (std::size_t r = 0; r < sizes.size(); ++r) {
    TESSERA_EXPECTS(sizes[r] == sizes[0], "comm::symmetric: rank 0 has " << sizes[0] / 8 << " bytes of window and "
                                                                         << sizes[0] % 8 + 1 << " slots, rank " << r
                                                                         << " has " << sizes[r] / 8 << " and "
                                                                         << sizes[r] % 8 + 1);
  }
  auto window = std::make_shared<tessera::detail::symmetric::shared_window>(over, options);
  return symmetric(std::move(over), std::move(window), 0, options.num_sms);
}

inline symmetric symmetric::split(int color, int key) { return create(nccl::split(color, key), window_->options()); }

inline std::byte* symmetric::allocate(std::size_t bytes) { return window_->allocate(bytes); }
inline void symmetric::release_all() { window_->release_all(); }
inline std::pair<std::size_t, std::size_t> symmetric::usage() const { return window_->usage(); }
inline bool symmetric::contains(const void* address) const { return window_->contains(address); }

inline symmetric symmetric::on_slot(int slot) const {
  TESSERA_EXPECTS(slot >= 0 && slot < window_->options().slots,
                  "comm::symmetric: slot " << slot << " of " << window_->options().slots);
  return symmetric(*this, window_, slot, num_sms_);
}
inline void symmetric::set_num_sms(int sms) {
  TESSERA_EXPECTS(sms >= 0, "comm::symmetric: num_sms = " << sms << " is negative");
  num_sms_ = sms;
}

inline symmetric_view symmetric::view(symmetric_channel channel) const { return window_->view(slot_, channel); }
inline device_stream symmetric::side_stream() const { return window_->side_stream(slot_); }
inline CUevent_st* symmetric::fork_event() const { return window_->fork_event(slot_); }
inline CUevent_st* symmetric::join_event() const { return window_->join_event(slot_); }

inline std::optional<symmetric_failure> symmetric::failure() const {
  const volatile symmetric_failure& seen = window_->host_failure();
  if (seen.state != 2) return std::nullopt;
  std::atomic_thread_fence(std::memory_order_acquire);
  symmetric_failure copy;
  copy.state = seen.state;
  copy.rank = seen.rank;
  copy.peer = seen.peer;
  copy.channel = seen.channel;
  copy.step = seen.step;
  copy.generation = seen.generation;
  return copy;
}

inline void symmetric::check() {
  if (const auto f = failure()) {
    constexpr const char* operations[] = {"the exchange of routings", "dispatch", "combine", "the return of values"};
    constexpr const char* phases[] = {"has not come to it", "has not sent all", "has not sent a part"};
    const char* const operation = operations[static_cast<int>(f->channel)];
    TESSERA_EXPECTS_AS(error, f->step != symmetric_step::overflow,
                       "rank " << f->peer << " would receive " << f->generation
                               << " pairs, which is more than its bound: raise dispatch_options::row_bound to "
                               << f->generation << " or more, or choose overflow_policy::drop; then reset()");
    throw comm_error("rank " + std::to_string(f->rank) + " in " + operation + " " + std::to_string(f->generation) +
                         " of slot operations: rank " + std::to_string(f->peer) + " " +
                         phases[static_cast<int>(f->step)] + " within " +
                         std::to_string(window_->options().timeout.count()) + " ms; reset() when all ranks are back",
                     f->rank, f->peer, operation);
  }
  nccl::check();
}

inline void symmetric::wait(device_stream stream) {
  nccl::wait(stream, 2 * window_->options().timeout + timeout());
  check();
}

inline void symmetric::reset(device_stream stream) {
  const detail::nccl::device_guard guard(device());
  nccl::wait(stream, 2 * window_->options().timeout + timeout());
  for (int s = 0; s < window_->options().slots; ++s) {
    nccl::wait(window_->side_stream(s), 2 * window_->options().timeout + timeout());
  }
  static_cast<void>(tessera::detail::symmetric::gather_numbers(*this, 0));  // nobody's kernels run any more
  window_->clear();
  static_cast<void>(tessera::detail::symmetric::gather_numbers(*this, 0));  // nobody's flags are old any more
}

}  // namespace comm

TESSERA_NAMESPACE_END
