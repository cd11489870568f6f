// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The lanes of an overlapped pair on a device: two streams, events between them, and a budget of multiprocessors.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/core/detail/launch.cuh>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/pipeline/overlap.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

namespace detail {

using tessera::detail::check_cuda;
using tessera::detail::expect_launched;

static __global__ void wait_kernel(std::uint64_t ns) {
  std::uint64_t begin = 0;
  std::uint64_t now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < ns);
}

inline void wait_on_device(device_stream stream, std::chrono::nanoseconds time) {
  wait_kernel<<<1, 1, 0, stream.get()>>>(static_cast<std::uint64_t>(time.count()));
  expect_launched("wait_kernel");
}

}  // namespace detail

/// Options of `device_lanes`.
struct device_lanes_options {
  /// Multiprocessors for the kernels of the communication lane, in `[0, multiprocessors of the device)`. 0: neither
  /// lane is limited. The lanes only hand the budgets on (`lane`): a kernel keeps to its budget by the number of blocks
  /// it is launched with.
  int communication_sms = 0;
  /// Of those, how many are for phases that send rows as they are (`sends_rows`): links are full with that many, while
  /// sums want more. 0, or not less than `communication_sms`: all.
  int dispatch_sms = 16;
  /// How long a phase of the compute lane waits where a phase of the communication lane begins with it
  /// (`overlap_node::communication`), so that the blocks of that one stand first: then its first product has all
  /// multiprocessors that they leave, and those too when they end. It pays where computation takes several times as
  /// long as communication. 0, for where they take about as long: that product keeps to the multiprocessors beside the
  /// budget of communication, whose kernels find the others free whenever they come. Later products have no limit. 0 to
  /// 1 ms; without a budget there is none.
  std::chrono::nanoseconds head_start = std::chrono::microseconds(4);
};

/// Two streams: the caller's computes, one that the object owns communicates. Phases enqueue and return; `run` enqueues
/// the whole pair without synchronising. What the caller's stream held before comes before all phases, and what it gets
/// afterwards comes after them. May be captured in a graph; its communication goes first there, too, if it is
/// instantiated with cudaGraphInstantiateFlagUseNodePriority. Streams and events belong to the device that was current
/// at construction, which must be current in `run`. Used by one thread at a time.
class device_lanes {
 public:
  using space = tessera::space::device;     ///< Where the work is.
  static constexpr bool concurrent = true;  ///< Two phases at a time.

  /// Makes the stream. @param options Budgets. @throws invalid_argument for a budget the device does not have or a
  /// head start out of range, cuda_error if the runtime fails.
  explicit device_lanes(const device_lanes_options& options = {}) {
    int device = 0;
    detail::check_cuda(cudaGetDevice(&device), "device_lanes: cudaGetDevice");
    int sms = 0;
    detail::check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device),
                       "device_lanes: cudaDeviceGetAttribute");
    TESSERA_EXPECTS(options.communication_sms >= 0 && options.communication_sms < sms,
                    "device_lanes: communication_sms = " << options.communication_sms << ", device " << device
                                                         << " has " << sms << " multiprocessors: give 0 (no limit) to "
                                                         << sms - 1);
    TESSERA_EXPECTS(options.head_start.count() >= 0 && options.head_start <= std::chrono::milliseconds(1),
                    "device_lanes: head_start = " << options.head_start.count() << " ns, expected 0 to 1 ms");
    TESSERA_EXPECTS(options.dispatch_sms >= 0,
                    "device_lanes: dispatch_sms = " << options.dispatch_sms << ", it must not be negative");
    head_start_ = options.head_start;
    communication_sms_ = options.communication_sms;
    dispatch_sms_ = options.dispatch_sms == 0 ? communication_sms_ : std::min(options.dispatch_sms, communication_sms_);
    device_sms_ = sms;
    int lowest = 0;
    int highest = 0;
    detail::check_cuda(cudaDeviceGetStreamPriorityRange(&lowest, &highest),
                       "device_lanes: cudaDeviceGetStreamPriorityRange");
    // Communication first where both wait for room: its kernels are few blocks that others wait for.
    detail::check_cuda(cudaStreamCreateWithPriority(&communication_, cudaStreamNonBlocking, highest),
                       "device_lanes: cudaStreamCreateWithPriority");
  }
  device_lanes(const device_lanes&) = delete;
  device_lanes& operator=(const device_lanes&) = delete;
  /// Work that was enqueued goes on to its end.
  ~device_lanes() {
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
    cudaStreamDestroy(communication_);
  }

  /// Enqueues an overlapped pair.
  /// @param stream  The compute lane. @param order The phases.
  /// @param execute `(const overlap_node&, const lane<space::device>&)`: enqueues a phase on the lane's stream.
  /// @param fail    Not called: what `execute` throws goes to the caller, after the lanes have been joined.
  /// @throws cuda_error if the runtime fails.
  template <class Execute, class Fail>
  void run(device_stream stream, const overlap_order& order, Execute&& execute, [[maybe_unused]] Fail&& fail) {
    reserve(order.nodes.size() + 2);
    const cudaEvent_t fork = events_[order.nodes.size()];
    const cudaEvent_t join = events_[order.nodes.size() + 1];
    detail::check_cuda(cudaEventRecord(fork, stream.get()), "device_lanes: cudaEventRecord");
    detail::check_cuda(cudaStreamWaitEvent(communication_, fork, 0), "device_lanes: cudaStreamWaitEvent");
    try {
      for (std::size_t i = 0; i < order.nodes.size(); ++i) {  // what a phase waits for has been recorded before
        const overlap_node& node = order.nodes[i];
        const bool communicates = is_communication(node.what);
        const cudaStream_t own = communicates ? communication_ : stream.get();
        if (node.after >= 0) {
          const auto after = static_cast<std::size_t>(node.after);
          if (is_communication(order.nodes[after].what) != communicates)
            detail::check_cuda(cudaStreamWaitEvent(own, events_[after], 0), "device_lanes: cudaStreamWaitEvent");
        }
        if (communicates) {
          execute(node, lane<tessera::space::device>{own, communication_sms(sends_rows(node.what))});
        } else {
          const bool beside = node.communication > 0 && communication_sms_ > 0;
          const bool ahead = beside && head_start_.count() > 0;
          if (ahead) tessera::pipeline::detail::wait_on_device(own, head_start_);
          const int budget = beside && !ahead ? compute_sms(node.sends) : 0;
          execute(node, lane<tessera::space::device>{own, budget, {true, ahead ? device_sms_ : budget}});
        }
        detail::check_cuda(cudaEventRecord(events_[i], own), "device_lanes: cudaEventRecord");
      }
    } catch (...) {
      cudaEventRecord(join, communication_);
      cudaStreamWaitEvent(stream.get(), join, 0);
      throw;
    }
    detail::check_cuda(cudaEventRecord(join, communication_), "device_lanes: cudaEventRecord");
    detail::check_cuda(cudaStreamWaitEvent(stream.get(), join, 0), "device_lanes: cudaStreamWaitEvent");
  }

  /// Multiprocessors of a phase of the communication lane, 0: no limit. @param sends Whether it sends rows.
  int communication_sms(bool sends = false) const noexcept { return sends ? dispatch_sms_ : communication_sms_; }
  /// Multiprocessors beside those, which the first product of a phase that communication begins with keeps to if there
  /// is no head start; 0: no limit. @param sends Whether that communication sends rows.
  int compute_sms(bool sends = false) const noexcept {
    return communication_sms_ == 0 ? 0 : device_sms_ - communication_sms(sends);
  }

 private:
  void reserve(std::size_t count) {
    while (events_.size() < count) {
      cudaEvent_t event = nullptr;
      detail::check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming),
                         "device_lanes: cudaEventCreateWithFlags");
      events_.push_back(event);
    }
  }

  cudaStream_t communication_ = nullptr;
  std::vector<cudaEvent_t> events_;  // one per phase, and two
  std::chrono::nanoseconds head_start_{0};
  int communication_sms_ = 0;
  int dispatch_sms_ = 0;
  int device_sms_ = 0;
};

static_assert(lane_policy<device_lanes>);

}  // namespace pipeline

TESSERA_NAMESPACE_END
