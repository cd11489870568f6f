// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Streams of a device: kernels one after the other, those of different streams and ranks at the same time.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulated/block.hpp"

namespace emulated {

// Work is collected first and begun by `run` for all streams at once, so that nothing but the work itself orders what
// ranks do.
class stream {
 public:
  explicit stream(std::uint32_t seed) : seed_(seed) {}

  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), int blocks, int threads, std::type_identity_t<Parameters>... arguments) {
    enqueue([=] { kernel(arguments...); }, blocks, threads, false);
  }
  // Of a kernel that starts when the blocks of the one ahead let it.
  template <class... Parameters>
  void launch_early(void (*kernel)(Parameters...), int blocks, int threads,
                    std::type_identity_t<Parameters>... arguments) {
    enqueue([=] { kernel(arguments...); }, blocks, threads, true);
  }
  // What is no kernel.
  void call(std::function<void()> work) {
    work_.push_back([=, this] {
      finish();
      work();
    });
  }
  // Goes on when everything is done that `other` has been given until now.
  void follow(stream& other) {
    const auto done = std::make_shared<std::promise<void>>();
    other.call([done] { done->set_value(); });
    call([seen = done->get_future().share()] { seen.wait(); });
  }

  friend void run(std::deque<stream>& streams) {
    std::vector<std::thread> running;
    for (stream& s : streams) {
      running.emplace_back([&s] {
        for (const auto& next : s.work_) next();
        s.finish();
      });
    }
    for (std::thread& t : running) t.join();
    for (stream& s : streams) s.work_.clear();
  }

 private:
  struct running_kernel {
    launched state;
    std::function<void()> of_lane;
    std::vector<std::thread> blocks;
  };

  void enqueue(std::function<void()> of_lane, int blocks, int threads, bool early) {
    work_.push_back(
        [=, this] { start(of_lane, static_cast<unsigned>(blocks), static_cast<std::size_t>(threads), early); });
  }
  void start(std::function<void()> kernel, unsigned blocks, std::size_t threads, bool early) {
    while (early && running_ != nullptr && !running_->state.lets_next_start())
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    if (!early) finish();
    // Lanes serve kernels again that come later in this stream: what they know has happened before these.
    const bool beside_another = running_ != nullptr && !running_->blocks.empty();
    turn_ = beside_another ? turn_ ^ 1 : 0;
    std::deque<lane>& pool = lanes_[turn_];
    while (pool.size() < blocks * threads) pool.emplace_back();
    auto next = std::make_unique<running_kernel>();
    next->state.blocks = blocks;
    next->state.before = running_ == nullptr ? nullptr : &running_->state;
    next->of_lane = std::move(kernel);
    auto free = pool.begin();
    for (unsigned b = 0; b < blocks; ++b) {
      std::vector<lane*> lanes;
      while (lanes.size() < threads) lanes.push_back(&*free++);
      next->blocks.emplace_back([&of = *next, b, of_block = std::move(lanes), seed = ++seed_]() mutable {
        const auto own = std::make_unique<block>(b, of.state, std::move(of_block), seed);
        own->run(of.of_lane);
      });
    }
    finish();
    ended_ = std::move(running_);  // the next one looks at its state until it has ended itself
    running_ = std::move(next);
  }
  void finish() {
    if (running_ == nullptr) return;
    for (std::thread& t : running_->blocks) t.join();
    running_->blocks.clear();
    running_->state.is_done.store(true, std::memory_order_release);
  }

  std::uint32_t seed_;
  std::deque<lane> lanes_[2];
  unsigned turn_ = 0;
  std::unique_ptr<running_kernel> running_, ended_;
  std::vector<std::function<void()>> work_;
};

}  // namespace emulated
