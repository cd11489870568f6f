// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Blocks of a kernel on the host: each is a thread, its lanes are contexts that take turns in an order that differs
// from run to run by the seed. What a kernel leaves to the copy engine is done as late as its waits allow, or at once,
// so that a wait that is missing or too short shows as wrong rows. Ranks and their blocks run at the same time.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include <ucontext.h>

namespace emulated {

inline constexpr std::size_t shared_bytes_of_a_block = 227 * 1024;
inline constexpr int warp_lanes = 32;

// From shared to global memory.
struct store {
  unsigned char* to;
  const unsigned char* from;
  std::size_t bytes;
  std::vector<unsigned char> data = {};  // as it was when the copy engine read it
  bool is_read = false;

  void read() {
    if (!is_read) data.assign(from, from + bytes);
    is_read = true;
  }
  void write() {
    read();
    std::memcpy(to, data.data(), bytes);
  }
};

struct lane {
  ucontext_t context{};
  std::vector<char> stack;
  unsigned thread = 0;
  bool is_done = false;
  std::vector<store> open;                // of the group that is not committed
  std::deque<std::vector<store>> groups;  // committed, the oldest first
  std::uint64_t told = 0;                 // to other lanes of the warp
};

// A barrier in shared memory that one thread arms for a phase.
struct transaction_barrier {
  std::uint64_t phase = 0;
  std::uint32_t expected = 0, arrived = 0;
  std::vector<std::function<void()>> loads;  // not done yet
};

class block {
 public:
  // @param place Of this block among `count`. @param size Threads.
  block(unsigned place, unsigned count, unsigned size, std::uint32_t seed)
      : index(place), blocks(count), threads(size), random(seed), warps_(size / warp_lanes) {}

  // Calls `kernel` in every lane.
  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    own() = this;
    lanes_.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
      lane& l = lanes_[t];
      l.thread = t;
      l.stack.resize(32 * 1024);
      getcontext(&l.context);
      l.context.uc_stack.ss_sp = l.stack.data();
      l.context.uc_stack.ss_size = l.stack.size();
      l.context.uc_link = &scheduler_;
      makecontext(&l.context, &block::enter, 0);
    }
    for (unsigned left = threads; left > 0;) {
      const auto first = static_cast<unsigned>(random());
      for (unsigned i = 0; i < threads; ++i) {
        lane& l = lanes_[(first + i * 7) % threads];  // 7 and multiples of 32 have no common factor
        if (l.is_done) continue;
        current_ = &l;
        swapcontext(&scheduler_, &l.context);
        if (l.is_done) --left;
      }
      if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
    }
  }

  static block*& own() {
    static thread_local block* of_thread = nullptr;
    return of_thread;
  }
  lane& current() { return *current_; }
  void yield() {
    if (std::chrono::steady_clock::now() > deadline_) {
      std::fprintf(stderr, "block %u, thread %u: waits for ever\n", index, current_->thread);
      std::abort();
    }
    swapcontext(&current_->context, &scheduler_);
  }
  // Others run before the first look, too.
  template <class Condition>
  void wait(Condition condition) {
    do yield();
    while (!condition());
  }

  void meet() { meet(all_, threads); }
  void meet_warp() { meet(warps_[current_->thread / warp_lanes], warp_lanes); }
  // What lane `i` of the warp has told; between two meetings of the warp.
  std::uint64_t told(unsigned i) { return lanes_[current_->thread / warp_lanes * warp_lanes + i].told; }

  transaction_barrier& barrier(std::uint32_t address) { return barriers_[address]; }

  unsigned index, blocks, threads;
  std::mt19937 random;
  int votes = 0;  // of a vote of the block

 private:
  struct meeting {
    unsigned here = 0, phase = 0;
  };
  void meet(meeting& m, unsigned size) {
    const unsigned phase = m.phase;
    if (++m.here == size) {
      m.here = 0;
      ++m.phase;
      return;
    }
    wait([&] { return m.phase != phase; });
  }
  static void enter() {
    (*own()->kernel_)();
    own()->current_->is_done = true;
  }

  std::vector<lane> lanes_;
  std::vector<meeting> warps_;
  meeting all_;
  std::map<std::uint32_t, transaction_barrier> barriers_;
  ucontext_t scheduler_{};
  lane* current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::chrono::steady_clock::time_point deadline_ = std::chrono::steady_clock::now() + std::chrono::seconds(60);
};

// Launches of several kernels and ranks, which run at the same time.
class device {
 public:
  explicit device(std::uint32_t seed) : seed_(seed) {}
  template <class Kernel, class Task>
  void launch(Kernel kernel, const Task& task, unsigned blocks, int threads) {
    for (unsigned b = 0; b < blocks; ++b) {
      running_.emplace_back([=, seed = ++seed_] {
        const auto own = std::make_unique<block>(b, blocks, static_cast<unsigned>(threads), seed);
        own->run([&] { kernel(task); });
      });
    }
  }
  ~device() {
    for (std::thread& t : running_) t.join();
  }

 private:
  std::uint32_t seed_;
  std::vector<std::thread> running_;
};

struct index {
  unsigned x;
};

}  // namespace emulated

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// The language of kernels.

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define threadIdx (::emulated::index{::emulated::block::own()->current().thread})
#define blockIdx (::emulated::index{::emulated::block::own()->index})
#define blockDim (::emulated::index{::emulated::block::own()->threads})
#define gridDim (::emulated::index{::emulated::block::own()->blocks})

inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __syncthreads() { emulated::block::own()->meet(); }
inline int __syncthreads_or(int vote) {
  emulated::block& b = *emulated::block::own();
  b.meet();  // everybody has seen the last vote
  b.votes = 0;
  b.meet();
  b.votes |= vote;
  b.meet();
  return b.votes;
}
inline int __syncthreads_and(int vote) { return __syncthreads_or(vote == 0 ? 1 : 0) == 0 ? 1 : 0; }
inline void __syncwarp() { emulated::block::own()->meet_warp(); }
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  emulated::block& b = *emulated::block::own();
  b.current().told = 0;
  std::memcpy(&b.current().told, &value, sizeof(T));
  b.meet_warp();
  const std::uint64_t told = b.told(static_cast<unsigned>(source) % emulated::warp_lanes);
  b.meet_warp();
  T result;
  std::memcpy(&result, &told, sizeof(T));
  return result;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  emulated::block& b = *emulated::block::own();
  b.current().told = vote ? 1 : 0;
  b.meet_warp();
  unsigned votes = 0;
  for (unsigned i = 0; i < emulated::warp_lanes; ++i) votes |= static_cast<unsigned>(b.told(i)) << i;
  b.meet_warp();
  return votes;
}
inline int __any_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, vote) != 0 ? 1 : 0; }
inline int __all_sync(unsigned lanes, bool vote) { return __ballot_sync(lanes, !vote) == 0 ? 1 : 0; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T atomicAdd(T* to, T value) {
  return std::atomic_ref<T>(*to).fetch_add(value);
}
inline std::uint32_t atomicCAS(std::uint32_t* to, std::uint32_t expected, std::uint32_t value) {
  std::atomic_ref<std::uint32_t>(*to).compare_exchange_strong(expected, value);
  return expected;
}
using std::max;
using std::min;
