// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A thread that gathers groups in the background, in the order they were asked for.

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

/// One job per group at a time; no memory is allocated after construction.
class gather_queue {
 public:
  /// @param num_groups Jobs are `[0, num_groups)`. @param work Runs a job, on the thread. @param give_up Called on the
  /// destructor's thread when a job does not end while an exception unwinds this rank.
  gather_queue(int num_groups, std::function<void(int)> work, std::function<void()> give_up)
      : work_(std::move(work)),
        give_up_(std::move(give_up)),
        order_(static_cast<std::size_t>(num_groups)),
        jobs_(static_cast<std::size_t>(num_groups)),
        thread_([this] { run(); }) {}

  gather_queue(const gather_queue&) = delete;
  gather_queue& operator=(const gather_queue&) = delete;

  /// Does what has been posted, because the other ranks may have begun it; while an exception unwinds this rank, drops
  /// what has not begun.
  ~gather_queue() {
    {
      std::unique_lock lock(mutex_);
      // The other ranks may wait for this one, which is on its way to say that it failed, so it cannot wait for them.
      const bool unwinding = std::uncaught_exceptions() > 0;
      stopping_ = true;
      if (unwinding) queued_ = 0;
      changed_.notify_all();
      if (unwinding && !changed_.wait_for(lock, std::chrono::milliseconds(200), [&] { return !running_; })) {
        lock.unlock();
        give_up_();
      }
    }
    thread_.join();
  }

  /// Queues a job that is not under way.
  void post(int job) {
    const std::lock_guard lock(mutex_);
    jobs_[static_cast<std::size_t>(job)] = {};
    order_[(first_ + queued_++) % order_.size()] = job;
    changed_.notify_all();
  }

  /// Returns when a job that was posted is done, and throws what it threw.
  void wait(int job) {
    std::unique_lock lock(mutex_);
    outcome& mine = jobs_[static_cast<std::size_t>(job)];
    changed_.wait(lock, [&] { return mine.done; });
    if (mine.error) std::rethrow_exception(std::exchange(mine.error, nullptr));
  }

 private:
  struct outcome {
    bool done = false;
    std::exception_ptr error;
  };

  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopping_ || queued_ > 0; });
      if (queued_ == 0) return;
      const int job = order_[first_];
      first_ = (first_ + 1) % order_.size();
      --queued_;
      running_ = true;
      lock.unlock();
      std::exception_ptr error;
      try {
        work_(job);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      running_ = false;
      jobs_[static_cast<std::size_t>(job)] = {true, error};
      changed_.notify_all();
    }
  }

  std::function<void(int)> work_;
  std::function<void()> give_up_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int> order_;  // a ring of queued jobs
  std::size_t first_ = 0, queued_ = 0;
  std::vector<outcome> jobs_;
  bool running_ = false, stopping_ = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace shard::detail
TESSERA_NAMESPACE_END
