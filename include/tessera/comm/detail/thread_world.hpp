// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The state that the ranks of `comm::threads` share: message queues, who waits for whom, and the failure.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// A message that a sender offers. It lives in the sender's list until it is consumed or withdrawn.
struct thread_post {
  /// Life of a message: offered, being copied by the receiver, copied, given up by the receiver.
  enum class states { posted, taken, consumed, dropped };

  const void* data = nullptr;       ///< First byte, in the sender's memory.
  std::int64_t bytes = 0;           ///< Size.
  const char* phase = "";           ///< The sender's operation.
  int to = 0;                       ///< World rank of the receiver.
  thread_post* next = nullptr;      ///< Next message of the same sender to the same receiver.
  states state = states::consumed;  ///< Guarded by the world's mutex.
};

/// Messages from one rank to another within a group, oldest first.
class thread_queue {
 public:
  /// The oldest message, or null.
  thread_post* front() const noexcept { return head_; }

  /// Appends. @param post Stays where it is until it is removed.
  void push(thread_post& post) noexcept {
    post.next = nullptr;
    (tail_ == nullptr ? head_ : tail_->next) = &post;
    tail_ = &post;
  }

  /// Removes. @param post One that is in the queue.
  void remove(thread_post& post) noexcept {
    thread_post* before = nullptr;
    for (thread_post* p = head_; p != &post; p = p->next) before = p;
    (before == nullptr ? head_ : before->next) = post.next;
    if (tail_ == &post) tail_ = before;
  }

 private:
  thread_post* head_ = nullptr;
  thread_post* tail_ = nullptr;
};

/// The ranks of one communicator and their queues.
struct thread_group {
  /// @param world_ranks_ World rank of each member.
  explicit thread_group(std::vector<int> world_ranks_)
      : world_ranks(std::move(world_ranks_)), queues(world_ranks.size() * world_ranks.size()) {}

  /// Messages from member `from` to member `to`.
  thread_queue& queue(int from, int to) {
    return queues[static_cast<std::size_t>(from) * world_ranks.size() + static_cast<std::size_t>(to)];
  }

  std::vector<int> world_ranks;      ///< World rank of each member.
  std::vector<thread_queue> queues;  ///< `[size, size]`, sender first.
};

/// How far a receive is.
struct thread_receive {
  thread_post* post = nullptr;  ///< The message it has been matched with.
  bool done = false;            ///< Whether its bytes have arrived.
};

/// One operation of one rank that may wait. It lives on the stack of that rank; everything in it is guarded by the
/// world's mutex.
struct thread_wait {
  int rank = 0;                              ///< World rank that waits.
  const char* phase = "";                    ///< Its operation.
  thread_group* group = nullptr;             ///< Where it waits; null in a reset.
  int member = 0;                            ///< Its rank in the group.
  std::span<const transfer> receives;        ///< What it wants.
  std::span<const thread_receive> received;  ///< How far that is.
  std::span<const thread_post> posts;        ///< What it offers.
  bool copying = false;                      ///< It is not waiting but copying.
  thread_wait* next = nullptr;               ///< Another operation of the same rank, on another thread.
};

/// Why no rank can go on.
struct thread_failure {
  int culprit = -1;  ///< World rank at fault.
  std::string text;  ///< The sentence that all ranks report.
};

/// See the file's comment. All ranks below are world ranks unless they are called members of a group.
class thread_world {
 public:
  /// @param num_ranks Number of ranks. @param timeout How long an operation may wait without any progress; at most a
  /// year, so that no time of a clock overflows.
  thread_world(int num_ranks, std::chrono::milliseconds timeout)
      : timeout_((std::min)(timeout, std::chrono::milliseconds(std::chrono::hours(24 * 365)))),
        ranks_(static_cast<std::size_t>(num_ranks)) {}

  /// How long an operation may wait without any progress.
  std::chrono::milliseconds timeout() const noexcept { return timeout_; }

  /// Moves messages. `posts` and `received` are the caller's scratch. See `collectives`.
  void exchange(thread_group& group, int member, std::span<const transfer> sends, std::span<const transfer> receives,
                const char* phase, std::vector<thread_post>& posts, std::vector<thread_receive>& received);

  /// Ends all operations of all ranks, unless something else has done so before.
  void fail(int rank, const std::string& reason) {
    const std::lock_guard lock(mutex_);
    set_failure({rank, "rank " + std::to_string(rank) + " failed: " + reason});
  }

  /// Whether operations throw.
  bool failed() {
    const std::lock_guard lock(mutex_);
    return failure_.has_value();
  }

  /// From now on nobody needs to wait for this rank.
  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    at(rank).gone = true;
    wake_all();
  }

  /// Collective over the world: forgets the failure.
  void reset(int rank);

  /// Keeps `group` for `takers` calls of `collect`. Returns a ticket.
  std::uint64_t offer(std::shared_ptr<thread_group> group, int takers) {
    const std::lock_guard lock(mutex_);
    offers_[++last_ticket_] = {std::move(group), takers};
    return last_ticket_;
  }

  /// What was offered under `ticket`.
  std::shared_ptr<thread_group> collect(std::uint64_t ticket) {
    const std::lock_guard lock(mutex_);
    const auto found = offers_.find(ticket);
    std::shared_ptr<thread_group> group = found->second.first;
    if (--found->second.second == 0) offers_.erase(found);
    return group;
  }

 private:
  using clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds max_yield{200};

  struct rank_state {
    std::condition_variable sleeping;
    std::atomic<std::uint64_t> events{0};  // advanced, under the mutex, whenever this rank may be able to go on
    thread_wait* waits = nullptr;          // operations this rank is in
    int patience = 0;                      // negative: yielding has taken long, so it is left out for some waits
    bool gone = false;                     // it will never enter another one
    bool resetting = false;                // it is in reset()
    std::optional<thread_failure> reset_failure;
  };

  // Keeps an operation visible to other ranks' diagnosis. Constructed and destroyed under the mutex.
  class visible {
   public:
    visible(rank_state& state, thread_wait& wait) : state_(state), wait_(wait) {
      wait.next = state.waits;
      state.waits = &wait;
    }
    ~visible() {
      thread_wait** link = &state_.waits;
      while (*link != &wait_) link = &(*link)->next;
      *link = wait_.next;
    }
    visible(const visible&) = delete;
    visible& operator=(const visible&) = delete;

   private:
    rank_state& state_;
    thread_wait& wait_;
  };

  rank_state& at(int rank) { return ranks_[static_cast<std::size_t>(rank)]; }
  int size() const { return static_cast<int>(ranks_.size()); }

  void wake(rank_state& state) {
    state.events.fetch_add(1, std::memory_order_release);
    state.sleeping.notify_all();
  }

  void wake_all() {
    for (rank_state& state : ranks_) wake(state);
  }

  void set_failure(thread_failure failure) {
    if (!failure_) failure_ = std::move(failure);
    wake_all();
  }

  // Waits for an event or the deadline. Most events come soon: giving the processor to the other ranks a few times is
  // cheaper than sleeping, even when there are more ranks than processors, unless it goes to somebody with much to do.
  void wait_event(rank_state& state, std::unique_lock<std::mutex>& lock, clock::time_point deadline) {
    const std::uint64_t seen = state.events.load(std::memory_order_relaxed);
    if (state.patience < 0) {
      ++state.patience;
    } else {
      lock.unlock();
      const auto start = clock::now();
      auto took = clock::duration::zero();
      for (int i = 0; i < 64 && took < max_yield && state.events.load(std::memory_order_acquire) == seen; ++i) {
        std::this_thread::yield();
        took = clock::now() - start;
      }
      lock.lock();
      if (took >= max_yield) state.patience = -64;  // sleep the next times
    }
    while (state.events.load(std::memory_order_relaxed) == seen) {
      if (state.sleeping.wait_until(lock, deadline) == std::cv_status::timeout) return;
    }
  }

  [[noreturn]] static void report(int rank, const char* phase, const thread_failure& failure, const char* suffix = "") {
    std::ostringstream message;
    message << "rank " << rank << " in " << phase << ": " << failure.text << suffix;
    throw comm_error(message.str(), rank, failure.culprit, phase);
  }

  // Calls visit(rank) for each rank that `wait` cannot go on without; returns whether it can go on by itself.
  template <class Visit>
  bool for_each_missing(const thread_wait& wait, Visit visit) {
    if (wait.copying) return true;
    bool any = false;
    if (wait.group == nullptr) {
      if (!at(wait.rank).resetting) return true;
      for (int rank = 0; rank < size(); ++rank) {
        if (at(rank).resetting) continue;
        any = true;
        visit(rank);
      }
      return !any;
    }
    for (std::size_t i = 0; i < wait.receives.size(); ++i) {
      if (wait.received[i].post != nullptr) continue;
      if (wait.group->queue(wait.receives[i].peer, wait.member).front() != nullptr) return true;
      any = true;
      visit(wait.group->world_ranks[static_cast<std::size_t>(wait.receives[i].peer)]);
    }
    for (const thread_post& post : wait.posts) {
      if (post.state != thread_post::states::posted) continue;
      any = true;
      visit(post.to);
    }
    return !any;
  }

  // The first rank that will never serve `wait`, or -1.
  int find_gone(const thread_wait& wait) {
    int gone = -1;
    for_each_missing(wait, [&](int rank) {
      if (gone < 0 && at(rank).gone) gone = rank;
    });
    return gone;
  }

  thread_failure left(int culprit, const thread_wait& wait) const {
    std::ostringstream text;
    text << "rank " << culprit << " has left: its function returned, and rank " << wait.rank << " waits for it in "
         << wait.phase;
    return {culprit, text.str()};
  }

  std::optional<thread_failure> diagnose(const thread_wait& reporter, bool patient);

  // Matches receives with messages, in order. Returns the number of new matches.
  std::size_t match(thread_group& group, int member, std::span<const transfer> receives, const char* phase,
                    std::vector<thread_receive>& received);

  const std::chrono::milliseconds timeout_;
  std::mutex mutex_;  // guards everything below, and the queues of all groups
  std::vector<rank_state> ranks_;
  std::optional<thread_failure> failure_;
  std::map<std::uint64_t, std::pair<std::shared_ptr<thread_group>, int>> offers_;
  std::uint64_t last_ticket_ = 0;
};

/// Follows who waits for whom, nearest first, to a rank that is in no operation: the root cause. Empty if `patient` and
/// somebody on the way can go on by itself.
inline std::optional<thread_failure> thread_world::diagnose(const thread_wait& reporter, bool patient) {
  std::vector<const thread_wait*> reached(ranks_.size(), nullptr);
  std::vector<int> order{reporter.rank};
  const thread_wait* last = nullptr;  // the operation that waits for the culprit
  int culprit = -1;
  for (std::size_t i = 0; i < order.size() && culprit < 0; ++i) {
    for (const thread_wait* wait = at(order[i]).waits; wait != nullptr && culprit < 0; wait = wait->next) {
      const bool goes_on = for_each_missing(*wait, [&](int rank) {
        if (culprit >= 0 || reached[static_cast<std::size_t>(rank)] != nullptr) return;
        reached[static_cast<std::size_t>(rank)] = wait;
        order.push_back(rank);
        if (at(rank).waits == nullptr) {
          culprit = rank;
          last = wait;
        }
      });
      if (goes_on && patient) return std::nullopt;
    }
  }
  std::ostringstream text;
  if (culprit >= 0) {
    if (at(culprit).gone) return left(culprit, *last);
    text << "rank " << culprit << " did not arrive within " << timeout_.count() << " ms: rank " << last->rank
         << " waits for it in " << last->phase;
    return thread_failure{culprit, text.str()};
  }
  text << "ranks wait for one another (";
  for (std::size_t i = 1; i < order.size(); ++i) {
    const thread_wait* wait = reached[static_cast<std::size_t>(order[i])];
    text << (i > 1 ? ", " : "") << "rank " << wait->rank << " in " << wait->phase << " for rank " << order[i];
  }
  text << ") since " << timeout_.count()
       << " ms: all ranks of a communicator must call the same operations in the same "
       << "order";
  return thread_failure{order.size() > 1 ? order[1] : -1, text.str()};
}

inline std::size_t thread_world::match(thread_group& group, int member, std::span<const transfer> receives,
                                       const char* phase, std::vector<thread_receive>& received) {
  std::size_t matched = 0;
  for (std::size_t i = 0; i < receives.size(); ++i) {
    if (received[i].post != nullptr) continue;
    thread_queue& queue = group.queue(receives[i].peer, member);
    thread_post* post = queue.front();
    if (post == nullptr) continue;
    if (post->bytes != receives[i].bytes) {
      const int from = group.world_ranks[static_cast<std::size_t>(receives[i].peer)];
      std::ostringstream text;
      text << "rank " << from << " sends " << post->bytes << " bytes in " << post->phase << " to rank " << post->to
           << ", which expects " << receives[i].bytes << " bytes in " << phase;
      for (std::size_t k = 0; k < i; ++k) {  // matched above, not to be copied any more
        if (received[k].post != nullptr && !received[k].done) received[k].post->state = thread_post::states::dropped;
      }
      set_failure({from, text.str()});
      return 0;
    }
    queue.remove(*post);
    post->state = thread_post::states::taken;
    received[i].post = post;
    ++matched;
  }
  return matched;
}

inline void thread_world::exchange(thread_group& group, int member, std::span<const transfer> sends,
                                   std::span<const transfer> receives, const char* phase,
                                   std::vector<thread_post>& posts, std::vector<thread_receive>& received) {
  using states = thread_post::states;
  const int rank = group.world_ranks[static_cast<std::size_t>(member)];
  posts.assign(sends.size(), {});
  received.assign(receives.size(), {});
  thread_wait wait{rank, phase, &group, member, receives, received, posts, false, nullptr};

  std::unique_lock lock(mutex_);
  if (failure_)
    report(rank, phase, *failure_, " (earlier; a reset() on all ranks makes the communicator usable again)");
  for (std::size_t i = 0; i < sends.size(); ++i) {
    const int to = group.world_ranks[static_cast<std::size_t>(sends[i].peer)];
    posts[i] = {sends[i].data, sends[i].bytes, phase, to, nullptr, states::posted};
    group.queue(member, sends[i].peer).push(posts[i]);
    wake(at(to));
  }
  const visible record(at(rank), wait);

  std::size_t open_sends = sends.size();
  std::size_t open_receives = receives.size();
  auto deadline = clock::now() + timeout_;
  for (int patience = 8;;) {
    if (match(group, member, receives, phase, received) > 0) {
      wait.copying = true;
      lock.unlock();
      for (std::size_t i = 0; i < receives.size(); ++i) {
        if (received[i].post == nullptr || received[i].done) continue;
        std::memcpy(receives[i].data, received[i].post->data, static_cast<std::size_t>(receives[i].bytes));
      }
      lock.lock();
      wait.copying = false;
      for (std::size_t i = 0; i < receives.size(); ++i) {
        if (received[i].post == nullptr || received[i].done) continue;
        received[i].post->state = states::consumed;  // from here on the post may be gone
        received[i].done = true;
        --open_receives;
        wake(at(group.world_ranks[static_cast<std::size_t>(receives[i].peer)]));
      }
      deadline = clock::now() + timeout_;
      continue;
    }
    std::size_t still_open = 0;
    for (const thread_post& post : posts) still_open += post.state != states::consumed ? 1 : 0;
    if (still_open == 0 && open_receives == 0) return;
    if (failure_) break;
    if (still_open < open_sends) deadline = clock::now() + timeout_;
    open_sends = still_open;
    if (const int gone = find_gone(wait); gone >= 0) {
      set_failure(left(gone, wait));
      break;
    }
    if (clock::now() >= deadline) {
      if (std::optional<thread_failure> cause = diagnose(wait, patience > 0)) {
        set_failure(std::move(*cause));
        break;
      }
      --patience;  // somebody on the way is about to go on
      deadline = clock::now() + timeout_ / 8 + std::chrono::milliseconds(1);
    }
    wait_event(at(rank), lock, deadline);
  }

  // No receiver may read this rank's memory after it has left.
  for (std::size_t i = 0; i < posts.size(); ++i) {
    if (posts[i].state != states::posted) continue;
    group.queue(member, sends[i].peer).remove(posts[i]);
    posts[i].state = states::dropped;
  }
  at(rank).sleeping.wait(lock, [&] {
    for (const thread_post& post : posts) {
      if (post.state == states::taken) return false;
    }
    return true;
  });
  report(rank, phase, *failure_);
}

inline void thread_world::reset(int rank) {
  thread_wait wait;
  wait.rank = rank;
  wait.phase = "reset";
  std::unique_lock lock(mutex_);
  rank_state& state = at(rank);
  const visible record(state, wait);
  state.resetting = true;
  state.reset_failure.reset();
  // Ends this attempt for all who are in it; every one of them reports the same cause.
  const auto finish = [&](const std::optional<thread_failure>& cause) {
    for (rank_state& other : ranks_) {
      if (!other.resetting) continue;
      other.resetting = false;
      other.reset_failure = cause;
    }
    wake_all();
  };
  const auto deadline = clock::now() + timeout_;
  while (state.resetting) {
    const bool complete = for_each_missing(wait, [](int) {});
    const int gone = find_gone(wait);
    if (complete) {
      failure_.reset();
      offers_.clear();
      finish(std::nullopt);
    } else if (gone >= 0) {
      finish(left(gone, wait));
    } else if (clock::now() >= deadline) {
      finish(diagnose(wait, false));
    } else {
      wait_event(state, lock, deadline);
    }
  }
  if (state.reset_failure) {
    if (!failure_) set_failure(*state.reset_failure);
    report(rank, "reset", *state.reset_failure);
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END
