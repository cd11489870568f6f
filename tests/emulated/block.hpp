// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Blocks of a kernel on the host: each is a thread, its lanes are contexts that take turns in an order that differs
// from run to run by the seed. Ranks and their blocks run at the same time.
//
// Built with ThreadSanitizer, every lane and every copy is a thread to it (races.hpp). It reports each pair of accesses
// that nothing orders, in whatever order they happened to come: barriers, flags and waits order what they order on a
// GPU; shuffles, votes and counters without an order of their own order nothing.

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include <ucontext.h>

#include "emulated/copies.hpp"
#include "emulated/races.hpp"

namespace emulated {

inline constexpr std::size_t shared_bytes_of_a_block = 227 * 1024;
inline constexpr int warp_lanes = 32;

struct lane {
  unsigned thread = 0;
  bool is_done = false;
  std::uint64_t told = 0;  // to other lanes of the warp
  std::vector<char> stack = std::vector<char>(64 * 1024);
  ucontext_t context{};
  copy_strands copies;
  lane_stores stores;
  strand self;
};

// A kernel in a stream.
struct launched {
  unsigned blocks = 0;
  launched* before = nullptr;        // still running when this one was launched
  std::atomic<unsigned> passed = 0;  // blocks that let the next one start, or have ended
  std::atomic<bool> is_done = false;

  bool lets_next_start() const { return passed.load(std::memory_order_relaxed) == blocks; }
};

class block {
 public:
  // @param place Of this block in its kernel. @param lanes Of its own while it runs.
  block(unsigned place, launched& kernel, std::vector<lane*> lanes, std::uint32_t seed)
      : index(place),
        blocks(kernel.blocks),
        threads(static_cast<unsigned>(lanes.size())),
        random(seed),
        launched_(kernel),
        lanes_(std::move(lanes)),
        warps_(threads / warp_lanes) {}

  // Calls `kernel` in every lane.
  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    own() = this;
    for (unsigned t = 0; t < threads; ++t) begin(t);
    for (unsigned left = threads; left > 0;) {
      const unseen own_work;
      const auto first = static_cast<unsigned>(random());
      for (unsigned i = 0; i < threads; ++i) {
        lane& l = *lanes_[(first + i * 7) % threads];  // 7 and multiples of 32 have no common factor
        if (l.is_done) continue;
        current_.store(&l, std::memory_order_relaxed);
        emulated::enter(l.self.name());
        swapcontext(&scheduler_, &l.context);
        if (l.is_done) --left;
      }
      if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
    }
    take_knowledge(&own_strand_);
    let_next_start();
  }

  static block*& own() {
    static thread_local block* of_thread = nullptr;
    return of_thread;
  }
  lane& current() { return *current_.load(std::memory_order_relaxed); }

  // Others run before the first look, too.
  template <class Condition>
  void wait(Condition condition) {
    do yield();
    while (!condition());
  }
  void yield() {
    if (std::chrono::steady_clock::now() > deadline_) {
      std::fprintf(stderr, "block %u, thread %u: waits for ever\n", index, current().thread);
      std::abort();
    }
    give_way();
  }

  // Barriers of the block and of a warp.
  void meet() { meet(all_, threads, true); }
  void meet_warp() { meet(own_warp(), warp_lanes, true); }

  // The same for all threads, and what each told: those of a block by a barrier; those of a warp by no more than the
  // exchange.
  int vote(bool yes) {
    const unseen own_work;
    meet();  // everybody has seen the last vote
    votes_ = false;
    meet();
    votes_ = votes_ || yes;
    meet();
    return votes_ ? 1 : 0;
  }
  std::array<std::uint64_t, warp_lanes> tell_warp(std::uint64_t value) {
    const unseen own_work;
    current().told = value;
    meet(own_warp(), warp_lanes, false);
    std::array<std::uint64_t, warp_lanes> told;
    const unsigned first = current().thread / warp_lanes * warp_lanes;
    for (unsigned i = 0; i < warp_lanes; ++i) told[i] = lanes_[first + i]->told;
    meet(own_warp(), warp_lanes, false);
    return told;
  }

  // The kernel ahead in the stream has ended, for all lanes that call; and the next one may start, for all blocks that
  // have called or ended.
  void await_before() {
    if (launched_.before != nullptr) wait([&] { return launched_.before->is_done.load(std::memory_order_acquire); });
  }
  void let_next_start() {
    if (!lets_next_start_.exchange(true, std::memory_order_relaxed))
      launched_.passed.fetch_add(1, std::memory_order_relaxed);
  }

  transaction_barrier& barrier(std::uint32_t address) { return barriers_[address]; }

  const unsigned index, blocks, threads;
  std::mt19937 random;

 private:
  // What a lane is before its first turn. Apart from `run`, because getcontext may return twice to the compiler.
  void begin(unsigned thread) {
    lane& l = *lanes_[thread];
    l.thread = thread;
    l.is_done = false;
    getcontext(&l.context);
    l.context.uc_stack.ss_sp = l.stack.data();
    l.context.uc_stack.ss_size = l.stack.size();
    makecontext(&l.context, &block::begin_lane, 0);
    hand_over(own_strand_.name(), l.self.name(), &l);
  }

  struct meeting {
    unsigned here = 0, phase = 0;
    char places[2] =
        {};  // of what is known at even and odd ones: nobody comes to the next but one before all have left
  };
  void meet(meeting& m, unsigned size, bool orders) {
    const unseen own_work;
    const unsigned phase = m.phase;
    char* const place = m.places + phase % 2;
    if (orders) leave_knowledge(place);
    if (++m.here == size) {
      m.here = 0;
      ++m.phase;
    } else {
      wait([&] { return m.phase != phase; });
    }
    if (orders) take_knowledge(place);
  }
  meeting& own_warp() { return warps_[current().thread / warp_lanes]; }
  void give_way() {
    lane& from = current();
    emulated::enter(own_strand_.name());
    swapcontext(&from.context, &scheduler_);
  }
  void end_lane() {
    const unseen own_work;
    current().is_done = true;
  }
  static void begin_lane() {
    block& b = *own();
    (*b.kernel_)();
    leave_knowledge(&b.own_strand_);
    b.end_lane();
    b.give_way();
  }

  launched& launched_;
  std::atomic<bool> lets_next_start_ = false;
  std::vector<lane*> lanes_;
  std::vector<meeting> warps_;
  meeting all_;
  bool votes_ = false;
  std::map<std::uint32_t, transaction_barrier> barriers_;
  ucontext_t scheduler_{};
  strand own_strand_ = strand::current();
  std::atomic<lane*> current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::chrono::steady_clock::time_point deadline_ = std::chrono::steady_clock::now() + std::chrono::seconds(120);
};

}  // namespace emulated
