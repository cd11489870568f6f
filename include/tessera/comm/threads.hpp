// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// N ranks in one process, one thread each.

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <tessera/comm/collectives.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/comm/detail/split.hpp>
#include <tessera/comm/detail/thread_world.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace comm {

/// Options of `comm::threads`.
struct threads_options {
  /// How long an operation may wait without any progress, at least 1 ms.
  std::chrono::milliseconds timeout{30000};
};

/// One rank of N in this process: a handle, which its thread uses. Messages are copied once, from the sender's memory
/// to the receiver's.
///
/// Ranks run at the same time; a wait is bounded by the timeout. When a rank throws (`run`), calls `fail`, leaves
/// (`run`), sends another size than its peer expects or does not arrive in time, all operations of all ranks, those of
/// sub-communicators included, throw a `comm_error` that names the same culprit, until every rank of the world has
/// called `reset`. Ranks in errors are ranks of the world, not of a sub-communicator. Buffers whose operation threw
/// hold unspecified bytes and may be freed: nobody reads or writes them any more.
///
/// A handle belongs to one thread at a time. Copies are further handles of the same rank; handles of one rank may be
/// used on different threads when they belong to different communicators.
class threads : public collectives<threads> {
 public:
  /// One handle for each rank, in rank order, for engines with threads of their own.
  /// @param num_ranks At least 1. @param options Timeout. @throws invalid_argument for wrong values.
  static std::vector<threads> create(int num_ranks, threads_options options = {}) {
    TESSERA_EXPECTS(num_ranks >= 1, "comm::threads needs at least 1 rank, num_ranks = " << num_ranks);
    TESSERA_EXPECTS(options.timeout.count() >= 1,
                    "comm::threads: the timeout is " << options.timeout.count() << " ms, it must be at least 1 ms");
    auto world = std::make_shared<detail::thread_world>(num_ranks, options.timeout);
    std::vector<int> world_ranks(static_cast<std::size_t>(num_ranks));
    std::iota(world_ranks.begin(), world_ranks.end(), 0);
    auto group = std::make_shared<detail::thread_group>(std::move(world_ranks));
    std::vector<threads> ranks;
    for (int rank = 0; rank < num_ranks; ++rank) ranks.push_back(threads(world, group, rank));
    return ranks;
  }

  /// Calls `f(rank)` on a thread of its own for each rank, with the rank's `comm::threads&`, and returns when all are
  /// done. A rank that throws ends the operations of the others at once; the exception that came first, the root cause,
  /// is rethrown here. A rank that returns leaves: whoever waits for it afterwards gets a `comm_error` at once.
  /// @param num_ranks At least 1. @param f `void(comm::threads&)`, called from several threads at the same time.
  /// @param options Timeout.
  template <class F>
  static void run(int num_ranks, F&& f, threads_options options = {}) {
    static_assert(std::invocable<F&, threads&>, "comm::threads::run needs a callable void(comm::threads&).");
    std::vector<threads> ranks = create(num_ranks, options);
    std::mutex mutex;
    std::exception_ptr first;
    const auto keep = [&] {
      const std::lock_guard lock(mutex);
      if (!first) first = std::current_exception();
    };
    const auto body = [&](threads& self) {
      try {
        f(self);
      } catch (const std::exception& e) {
        keep();  // before the others learn of it, so that their exceptions come later
        self.fail(e.what());
      } catch (...) {
        keep();
        self.fail("it threw something that is not a std::exception");
      }
      self.world_->leave(self.world_rank());
    };
    std::vector<std::thread> workers;
    workers.reserve(ranks.size());
    try {
      for (threads& self : ranks) workers.emplace_back([&body, &self] { body(self); });
    } catch (const std::exception& e) {
      keep();
      ranks[workers.size()].fail(std::string("its thread could not be started: ") + e.what());
    }
    for (std::thread& worker : workers) worker.join();
    if (first) std::rethrow_exception(first);
  }

  /// This rank, in `[0, size())`.
  int rank() const noexcept { return rank_; }
  /// Number of ranks.
  int size() const noexcept { return static_cast<int>(group_->world_ranks.size()); }
  /// This rank in the communicator that `create` or `run` made: the number that errors use.
  int world_rank() const noexcept { return group_->world_ranks[static_cast<std::size_t>(rank_)]; }
  /// How long an operation may wait without any progress.
  std::chrono::milliseconds timeout() const noexcept { return world_->timeout(); }

  /// Collective: the ranks of equal color form a communicator, ordered by key, then by rank. It shares failures with
  /// this one. @param color Not negative. @param key Any.
  /// @throws invalid_argument on all ranks if the color of any is negative.
  threads split(int color, int key) {
    const std::vector<int> members = detail::split_members(
        color, key, size(), [&](const auto* send, auto* recv) { this->gather(send, recv, 1, "split"); });
    const auto count = static_cast<int>(members.size());
    const auto place = static_cast<int>(std::find(members.begin(), members.end(), rank_) - members.begin());
    std::shared_ptr<detail::thread_group> group;
    std::uint64_t ticket = 0;
    if (place == 0) {  // the first member makes the group, the others fetch it
      std::vector<int> world_ranks;
      for (const int member : members) world_ranks.push_back(group_->world_ranks[static_cast<std::size_t>(member)]);
      group = std::make_shared<detail::thread_group>(std::move(world_ranks));
      if (count > 1) ticket = world_->offer(group, count - 1);
      std::vector<transfer> sends;
      for (int i = 1; i < count; ++i) {
        sends.push_back(send_to(members[static_cast<std::size_t>(i)], &ticket, 1));
      }
      exchange_remote(sends, {}, "split");
    } else {
      const transfer receive = receive_from(members[0], &ticket, 1);
      exchange_remote({}, {&receive, 1}, "split");
      group = world_->collect(ticket);
    }
    return threads(world_, std::move(group), place);
  }

  /// Tells all ranks of the world that this one cannot go on: their operations throw `comm_error` at once, waiting or
  /// not. Does not wait and does not throw. The first failure counts. @param reason For the others' message.
  void fail(const std::string& reason) { world_->fail(world_rank(), reason); }

  /// Whether operations throw because of a failure.
  bool failed() const { return world_->failed(); }

  /// Collective over the world, from any of its communicators: waits until all ranks have called it, at most for the
  /// timeout, then makes all communicators of the world usable again. No rank may be in another operation.
  /// @throws comm_error naming a rank that does not come; it may be called again then.
  void reset() { world_->reset(world_rank()); }

  /// The primitive of `collectives`. @param sends Messages to other ranks. @param receives Messages from other ranks.
  /// @param phase How errors call the operation.
  void exchange_remote(std::span<const transfer> sends, std::span<const transfer> receives, const char* phase) {
    world_->exchange(*group_, rank_, sends, receives, phase, posts_, received_);
  }

 private:
  threads(std::shared_ptr<detail::thread_world> world, std::shared_ptr<detail::thread_group> group, int rank)
      : world_(std::move(world)), group_(std::move(group)), rank_(rank) {}

  std::shared_ptr<detail::thread_world> world_;
  std::shared_ptr<detail::thread_group> group_;
  int rank_ = 0;
  std::vector<detail::thread_post> posts_;
  std::vector<detail::thread_receive> received_;
};

static_assert(communicator<threads>);

}  // namespace comm

TESSERA_NAMESPACE_END
