// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What runs the two lanes of an overlapped pair: one thread for both, or a thread for each. The device's lanes, two
/// streams, are in `overlap.cuh`.

#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <tessera/core/error.hpp>
#include <tessera/core/sm_share.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/pipeline/overlap_order.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// Where a phase runs.
/// @tparam Space Of its memory.
template <memory_space Space>
struct lane {
  stream_ref<Space> stream;  ///< Order of its work.
  /// Multiprocessors that its kernels may occupy; 0: no limit. Where both lanes have one, they add up to the device.
  int num_sms = 0;
  /// Device, of a phase that computes: how its products share the device with those that communicate.
  sm_share share = {};
};

/// `L::space`: where the work is.
template <class L>
concept lanes_have_space = memory_space<typename L::space>;

/// `L::concurrent`: whether the two lanes run at the same time, so that a chunk's phases of different lanes must not
/// share scratch memory.
template <class L>
concept lanes_have_concurrent = requires {
  { L::concurrent } -> std::convertible_to<bool>;
};

/// `run(stream, order, execute, fail)`: calls `execute(node, lane)` for every node, in the order of its lane and after
/// the node it waits for; `fail(text)` at once when one throws, to end what waits on other ranks.
template <class L>
concept lanes_have_run = requires(L& lanes, stream_ref<typename L::space> stream, const overlap_order& order,
                                  void (*execute)(const overlap_node&, const lane<typename L::space>&),
                                  void (*fail)(const std::string&)) {
  lanes.run(stream, order, execute, fail);
};

/// Runs the two lanes of an overlapped pair. Models: `serial_lanes`, `host_lanes`, and on devices `device_lanes`.
template <class L>
concept lane_policy = lanes_have_space<L> && lanes_have_concurrent<L> && lanes_have_run<L>;

/// Both lanes on the calling thread or on one stream: nothing overlaps. The oracle of the others, and what a
/// communicator that one thread alone may use (`comm::mpi`) needs.
/// @tparam Space Of the work.
template <memory_space Space>
struct serial_lanes {
  using space = Space;                       ///< Where the work is.
  static constexpr bool concurrent = false;  ///< One phase at a time.

  /// Runs the phases in their order. @param stream Order of the work. @param order The phases. @param execute Called
  /// for each. @param fail Not called: what `execute` throws goes straight to the caller.
  template <class Execute, class Fail>
  void run(stream_ref<Space> stream, const overlap_order& order, Execute&& execute, [[maybe_unused]] Fail&& fail) {
    for (const overlap_node& node : order.nodes) execute(node, lane<Space>{stream, 0});
  }
};

/// Two threads: the caller's computes, one that the object owns communicates. The communicator of the chunks must
/// allow another thread than the pipeline's: with `comm::threads` a communicator of its own from `split`.
///
/// Every phase starts when its lane has come to it and the phase it waits for is done. When one throws, `fail` is
/// called, the other lane stops before its next phase, and `run` throws the first exception when both have stopped. The
/// object is used by one thread at a time.
class host_lanes {
 public:
  using space = tessera::space::host;       ///< Where the work is.
  static constexpr bool concurrent = true;  ///< Two phases at a time.

  /// Starts the thread, which sleeps between runs.
  host_lanes() : worker_([this] { serve(); }) {}
  host_lanes(const host_lanes&) = delete;
  host_lanes& operator=(const host_lanes&) = delete;
  ~host_lanes() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    worker_.join();
  }

  /// Runs an overlapped pair; returns when all phases are done.
  /// @param stream  Host stream. @param order The phases.
  /// @param execute `(const overlap_node&, const lane<space::host>&)`, called on both threads.
  /// @param fail    `(const std::string&)`, called once with the text of the first exception, before `run` throws it.
  template <class Execute, class Fail>
  void run(host_stream stream, const overlap_order& order, Execute&& execute, Fail&& fail) {
    static_cast<void>(stream);
    struct context {
      Execute& execute;
      Fail& fail;
    } both{execute, fail};
    {
      const std::lock_guard lock(mutex_);
      order_ = &order;
      done_.assign(order.nodes.size(), 0);
      failure_ = nullptr;
      context_ = &both;
      call_ = [](void* c, const overlap_node& node) {
        static_cast<context*>(c)->execute(node, lane<tessera::space::host>{});
      };
      tell_ = [](void* c, const std::string& text) { static_cast<context*>(c)->fail(text); };
      busy_ = true;
    }
    changed_.notify_all();
    walk(false);
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !busy_; });
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void serve() {
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return busy_ || ended_; });
        if (ended_) return;
      }
      walk(true);
      {
        const std::lock_guard lock(mutex_);
        busy_ = false;
      }
      changed_.notify_all();
    }
  }

  // Runs the phases of one lane.
  void walk(bool communicates) {
    for (std::size_t i = 0; i < order_->nodes.size(); ++i) {
      const overlap_node& node = order_->nodes[i];
      if (is_communication(node.what) != communicates) continue;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock,
                      [&] { return failure_ || node.after < 0 || done_[static_cast<std::size_t>(node.after)] != 0; });
        if (failure_) return;
      }
      try {
        call_(context_, node);
      } catch (const std::exception& e) {
        return stop(e.what());
      } catch (...) {
        return stop("a phase threw something that is not a std::exception");
      }
      {
        const std::lock_guard lock(mutex_);
        done_[i] = 1;
      }
      changed_.notify_all();
    }
  }

  // Called in a handler: keeps the first exception and releases the other lane.
  void stop(const char* text) {
    {
      const std::lock_guard lock(mutex_);
      if (failure_) return;
      failure_ = std::current_exception();
    }
    changed_.notify_all();
    tell_(context_, text);
  }

  std::mutex mutex_;  // guards what follows while both threads run
  std::condition_variable changed_;
  const overlap_order* order_ = nullptr;
  std::vector<char> done_;  // of each node
  std::exception_ptr failure_;
  void* context_ = nullptr;
  void (*call_)(void*, const overlap_node&) = nullptr;
  void (*tell_)(void*, const std::string&) = nullptr;
  bool busy_ = false;  // the worker has a lane to walk
  bool ended_ = false;
  std::thread worker_;  // last: it uses the others
};

static_assert(lane_policy<serial_lanes<space::host>> && lane_policy<host_lanes>);

}  // namespace pipeline

TESSERA_NAMESPACE_END
