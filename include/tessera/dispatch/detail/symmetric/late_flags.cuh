// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/gemm/detail/hopper/ptx.cuh>
#include <tessera/router/detail/device/warp.cuh>

// Flags of units that have been sent, posted by a warp of their own.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

// Where sending warps leave the units whose flags are to be posted: a release to other GPUs takes a microsecond or
// more, which a warp of its own spends.
struct flag_mail {
  static constexpr std::uint32_t done = 0xffffffffu;
  std::uint32_t address;  // of a word of shared memory for each sending warp

  __device__ std::uint32_t read(int warp) const { return hopper::load_acquire_shared(word(warp)); }
  __device__ void write(int warp, std::uint32_t value) const { hopper::store_release_shared(word(warp), value); }
  __device__ void send(int warp, std::uint32_t value) const {
    while (read(warp) != 0) continue;
    write(warp, value);
  }

 private:
  __device__ std::uint32_t word(int warp) const { return address + static_cast<std::uint32_t>(4 * warp); }
};

// Hands over the flag of a unit when some pieces have been sent after it, which is when its own have been written. One
// thread's. @tparam Post `post(unit)` tells those whom it concerns that a unit is there, which this thread knows.
template <class Post>
class late_post {
 public:
  static constexpr int lag = 3;
  __device__ late_post(flag_mail mail, int warp, Post post) : mail_(mail), warp_(warp), post_(post) {}
  // After each piece's commit.
  __device__ void sent() {
    ++groups_;
    if (waiting_ != 0 && groups_ == lag) flush();
  }
  // After the last piece of a unit.
  __device__ void unit(int unit) {
    if (groups_ == 0) return mail_.send(warp_, static_cast<std::uint32_t>(unit) + 1);  // nothing of it is under way
    if (waiting_ != 0) flush();
    waiting_ = static_cast<std::uint32_t>(unit) + 1;
    groups_ = 0;
  }
  // The last flag is posted here, as the warp has nothing left to send that would have to wait for it: last flags are
  // what home waits for in the end, and in the warp of flags they would wait for each other.
  __device__ void last() {
    if (waiting_ != 0) {
      bulk::wait_written<0>();
      post_(static_cast<int>(waiting_ - 1));
    }
    mail_.send(warp_, flag_mail::done);
  }

 private:
  __device__ void flush() {
    // what was sent since then may still be under way
    if (groups_ == 0) bulk::wait_written<0>();
    if (groups_ == 1) bulk::wait_written<1>();
    if (groups_ == 2) bulk::wait_written<2>();
    if (groups_ >= 3) bulk::wait_written<3>();
    mail_.send(warp_, waiting_);
    waiting_ = 0;
  }

  flag_mail mail_;
  int warp_;
  Post post_;
  std::uint32_t waiting_ = 0;  // the unit before, and 1
  int groups_ = 0;             // committed since then
};

// A lane for each of `senders` sending warps. @param any Whether they send. @param post As in `late_post`.
template <class Post>
__device__ __forceinline__ void post_role(flag_mail mail, int senders, bool any, int lane, Post post) {
  bool open = lane < senders && any;
  while (__any_sync(full_warp, open)) {
    if (!open) continue;
    const std::uint32_t got = mail.read(lane);
    if (got == flag_mail::done) open = false;
    if (got == 0 || got == flag_mail::done) continue;
    mail.write(lane, 0);
    post(static_cast<int>(got - 1));
  }
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
