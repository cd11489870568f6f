// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What the handles of one NCCL communicator on one rank share: calls that poll, failures, and the way it ends.
///
/// A call of a non-blocking communicator may return ncclInProgress: NCCL goes on in a thread of its own, and the next
/// call is refused until ncclCommGetAsyncError says otherwise. So no function here returns while that is the case.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>

#include <cuda_runtime.h>
#include <nccl.h>

#include <tessera/comm/nccl.hpp>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail::nccl {

/// Makes a device current while it lives.
class device_guard {
 public:
  explicit device_guard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  device_guard(const device_guard&) = delete;
  device_guard& operator=(const device_guard&) = delete;
  ~device_guard() { static_cast<void>(cudaSetDevice(before_)); }

 private:
  int before_ = 0;
};

/// "remote process exited or there was a network error (NCCL says: ...)".
inline std::string text_of(ncclResult_t result, ncclComm_t comm) {
  std::string text = ncclGetErrorString(result);
  const char* last = ncclGetLastError(comm);
  if (last != nullptr && *last != '\0') text += std::string(" (NCCL says: ") + last + ")";
  return text;
}

/// 2 of 22809, and of 2804, as versions were counted up to 2.8.
constexpr int major_of(int code) { return code / (code < 10000 ? 1000 : 10000); }

/// "2.28.9" of 22809.
inline std::string version_text(int code) {
  std::ostringstream text;
  text << major_of(code) << '.' << code % (code < 10000 ? 1000 : 10000) / 100 << '.' << code % 100;
  return text.str();
}

/// What is wrong with the NCCL that is loaded; empty when nothing is. Structures grow from version to version, and a
/// newer library reads older ones, so it may be newer than the header, but not older.
inline std::string version_problem() {
  int loaded = 0;
  if (const ncclResult_t result = ncclGetVersion(&loaded); result != ncclSuccess) {
    return std::string("ncclGetVersion: ") + text_of(result, nullptr);
  }
  if (major_of(loaded) == major_of(NCCL_VERSION_CODE) && loaded >= NCCL_VERSION_CODE) return {};
  std::ostringstream text;
  text << "the NCCL that is loaded is version " << version_text(loaded) << " (" << loaded
       << "), the header this was compiled with is " << version_text(NCCL_VERSION_CODE) << " (" << NCCL_VERSION_CODE
       << "): load that version or a newer one of the same major number";
  return text.str();
}

/// Calls `f` in a thread of its own and waits for its end, at most for `patience`; it goes on alone afterwards. For
/// calls of NCCL that end communicators: they set their flags at once, but may wait for other threads, and for CUDA
/// graphs that somebody keeps. @return whether it has ended.
template <class F>
bool call_within(std::chrono::milliseconds patience, F f) noexcept {
  struct completion {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
  };
  std::shared_ptr<completion> shared;
  try {
    shared = std::make_shared<completion>();
    std::thread([shared, f] {
      f();
      const std::lock_guard lock(shared->mutex);
      shared->done = true;
      shared->changed.notify_all();
    }).detach();
  } catch (...) {  // no thread or no memory to be had
    f();
    return true;
  }
  std::unique_lock lock(shared->mutex);
  return shared->changed.wait_for(lock, patience, [&] { return shared->done; });
}

/// Waits a little between two polls, longer when it has been asked often.
class poll_pause {
 public:
  void operator()() {
    if (++rounds_ < 2000) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  int rounds_ = 0;
};

/// Throws for options that mean nothing.
inline void expect_options(const comm::nccl_options& options) {
  TESSERA_EXPECTS(options.timeout.count() >= 1 && options.creation_timeout.count() >= 1,
                  "comm::nccl: the timeouts are " << options.timeout.count() << " ms (calls) and "
                                                  << options.creation_timeout.count()
                                                  << " ms (creation), they must be at least 1 ms");
  TESSERA_EXPECTS(
      options.min_ctas >= 0 && options.max_ctas >= 0 && (options.max_ctas == 0 || options.min_ctas <= options.max_ctas),
      "comm::nccl: min_ctas = " << options.min_ctas << ", max_ctas = " << options.max_ctas
                                << ": needs 0 <= min_ctas <= max_ctas, or 0 for NCCL's choice");
}

/// What a communicator and those split from it know of failures on this rank. They may be on different threads.
class failure_record {
 public:
  /// The first failure counts.
  void record(const std::string& cause) {
    const std::lock_guard lock(mutex_);
    if (failed_.load(std::memory_order_relaxed)) return;
    cause_ = cause;
    failed_.store(true, std::memory_order_release);
  }
  /// Whether there was one.
  bool failed() const noexcept { return failed_.load(std::memory_order_acquire); }
  /// Its words.
  std::string cause() const {
    const std::lock_guard lock(mutex_);
    return cause_;
  }

 private:
  mutable std::mutex mutex_;
  std::atomic<bool> failed_{false};
  std::string cause_;
};

/// One communicator on one rank.
class rank_state {
 public:
  using clock = std::chrono::steady_clock;

  /// For the current device. @param options Checked here. @param family Null for a communicator that is not split from
  /// another one. @param world_rank In errors.
  rank_state(const comm::nccl_options& options, std::shared_ptr<failure_record> family, int world_rank)
      : options_(options),
        family_(family ? std::move(family) : std::make_shared<failure_record>()),
        world_rank_(world_rank) {
    expect_options(options);
    check_cuda(cudaGetDevice(&device_), "cudaGetDevice");
    // Before GPUs wait for one another, because an allocation may wait for all of them.
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&words_), 2 * sizeof(*words_)), "cudaMalloc");
    const cudaError_t pinned = cudaMallocHost(reinterpret_cast<void**>(&host_words_), num_host_words * sizeof(*words_));
    if (pinned != cudaSuccess) static_cast<void>(cudaFree(words_));
    check_cuda(pinned, "cudaMallocHost");
    std::fill_n(host_words_, num_host_words, 0);
  }
  rank_state(const rank_state&) = delete;
  rank_state& operator=(const rank_state&) = delete;

  ~rank_state() {
    if (owned_ && comm_ != nullptr && !failed() &&
        settled(ncclCommFinalize(comm_), after(options_.timeout)) == ncclSuccess) {
      if (size_ > 1) std::this_thread::sleep_for(service_pause);
      call_within(patience(), [device = device_, comm = std::exchange(comm_, nullptr)] {
        static_cast<void>(cudaSetDevice(device));
        static_cast<void>(ncclCommDestroy(comm));
      });
    }
    if (owned_) abort();
    call_within(patience(), [device = device_, words = words_, host_words = host_words_] {
      static_cast<void>(cudaSetDevice(device));  // freeing may wait for all work of the device
      static_cast<void>(cudaFree(words));
      static_cast<void>(cudaFreeHost(host_words));
    });
  }

  /// Takes a communicator, perhaps not ready yet. @param communicator Aborted or finalised here if it is owned.
  /// @param owned Whether it is.
  void adopt(ncclComm_t communicator, bool owned) {
    comm_ = communicator;
    owned_ = owned;
  }

  /// Where ncclCommInitRankConfig puts the communicator, which is owned from the first moment.
  ncclComm_t* slot() {
    owned_ = true;
    return &comm_;
  }

  /// Waits until the communicator is ready and asks it what it is. @param phase How errors call the operation.
  /// @param first Whether its ranks are those of errors.
  void learn(const char* phase, bool first) {
    begin(phase);
    phase_ = phase;
    complete(ncclCommUserRank(comm_, &rank_), "ncclCommUserRank", phase);
    complete(ncclCommCount(comm_, &size_), "ncclCommCount", phase);
    complete(ncclCommCuDevice(comm_, &device_), "ncclCommCuDevice", phase);
    if (first) world_rank_ = rank_;
  }

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  int world_rank() const noexcept { return world_rank_; }
  int device() const noexcept { return device_; }
  ncclComm_t native() const noexcept { return comm_; }
  /// Device memory that a barrier adds up, whatever it holds.
  std::int32_t* token() const noexcept { return words_; }
  /// Pinned memory that the device writes.
  std::span<std::int32_t> host_words() const noexcept { return {host_words_, num_host_words}; }
  const comm::nccl_options& options() const noexcept { return options_; }
  const std::shared_ptr<failure_record>& family() const noexcept { return family_; }
  bool failed() const noexcept { return failed_ || family_->failed(); }

  /// Calls `f(ncclComm_t)`, whose result is that of a call of NCCL, and waits until it is no longer in progress.
  /// @param phase How errors call the operation, a literal. @param call The function of NCCL, for errors.
  /// @param f The call.
  template <class F>
  void enqueue(const char* phase, const char* call, F&& f) {
    enqueue_within(options_.timeout, phase, call, f);
  }

  /// The same for a call that may take as long as creation. @param f The call; its result is an ncclResult_t.
  template <class F>
  void call(const char* phase, const char* function, F&& f) {
    enqueue_within(options_.creation_timeout, phase, function,
                   [&](ncclComm_t communicator) { return static_cast<ncclResult_t>(f(communicator)); });
  }

  /// After a call that belongs to creation: waits until it is no longer in progress, and throws what it says.
  /// @param result Of the call. @param call Its name. @param phase How errors call the operation, a literal.
  void complete(ncclResult_t result, const char* call, const char* phase) {
    finish(result, call, phase, options_.creation_timeout, after(options_.creation_timeout));
  }

  /// The least of all ranks' values. Waits. @param value This rank's. @param phase How errors call the operation.
  std::int32_t least(std::int32_t value, const char* phase) {
    struct own_stream {
      cudaStream_t stream = nullptr;
      own_stream() { check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate"); }
      own_stream(const own_stream&) = delete;
      own_stream& operator=(const own_stream&) = delete;
      ~own_stream() { static_cast<void>(cudaStreamDestroy(stream)); }
    };
    const device_guard guard(device_);
    const own_stream own;
    std::int32_t* word = words_ + 1;
    check_cuda(cudaMemcpyAsync(word, &value, sizeof(value), cudaMemcpyHostToDevice, own.stream), "cudaMemcpyAsync");
    enqueue_within(options_.creation_timeout, phase, "ncclAllReduce", [&](ncclComm_t communicator) {
      return ncclAllReduce(word, word, 1, ncclInt32, ncclMin, communicator, own.stream);
    });
    wait(own.stream, options_.creation_timeout);  // before a copy to pageable memory, which would wait without end
    check_cuda(cudaMemcpyAsync(&value, word, sizeof(value), cudaMemcpyDeviceToHost, own.stream), "cudaMemcpyAsync");
    wait(own.stream, options_.creation_timeout);
    return value;
  }

  /// Splits. @param color,key As ncclCommSplit has them. @return the new communicator.
  ncclComm_t split(int color, int key) {
    auto child = std::make_shared<ncclComm_t>(nullptr);  // NCCL writes to it later, perhaps after this has thrown
    enqueue_within(options_.creation_timeout, "split", "ncclCommSplit", [&](ncclComm_t parent) {
      child_ = child;
      ncclConfig_t config = configuration();
      return ncclCommSplit(parent, color, key, child.get(), &config);
    });
    // The parent may be in order again before NCCL's thread has written the child's address.
    const auto written = [&] { return std::atomic_ref<ncclComm_t>(*child).load(std::memory_order_acquire) != nullptr; };
    const auto deadline = after(options_.creation_timeout);
    poll_pause pause;
    for (bool last = false; !written(); last = clock::now() >= deadline) {
      begin("split");
      if (last) {
        fail_with<comm_error>("split", "ncclCommSplit was not done after " +
                                           std::to_string(options_.creation_timeout.count()) +
                                           " ms: another rank has not done its part, or cannot be reached");
      }
      pause();
    }
    child_.reset();
    return *child;
  }

  /// What communicators of these options are made with.
  ncclConfig_t configuration() const {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    if (options_.min_ctas > 0) config.minCTAs = options_.min_ctas;
    if (options_.max_ctas > 0) config.maxCTAs = options_.max_ctas;
    return config;
  }

  void wait(device_stream stream, std::chrono::milliseconds timeout) {
    TESSERA_EXPECTS(timeout.count() >= 1,
                    "wait: the timeout is " << timeout.count() << " ms, it must be at least 1 ms");
    begin(phase_);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check_cuda(cudaStreamIsCapturing(stream.get(), &capture), "cudaStreamIsCapturing");
    TESSERA_EXPECTS(capture == cudaStreamCaptureStatusNone, "wait: the stream is being captured, nothing runs in it");
    const auto deadline = after(timeout);
    poll_pause pause;
    for (bool last = false;;) {
      const cudaError_t status = cudaStreamQuery(stream.get());
      if (status == cudaErrorNotReady) {
        static_cast<void>(cudaGetLastError());  // it counts as one
      } else {
        check_cuda(status, "cudaStreamQuery");
      }
      check();
      if (status == cudaSuccess) return;
      if (last) break;
      last = clock::now() >= deadline;
      if (!last) pause();
    }
    std::ostringstream text;
    text << "the stream was not done after " << timeout.count() << " ms; " << phase_ << ", operation " << operations_
         << " of this communicator, was enqueued last: another rank has not called it, or hangs before it";
    fail_with<comm_error>(phase_, text.str());
  }

  /// Throws what NCCL has found in the background.
  void check() { begin(phase_); }

  /// Ends the communicator of this rank.
  void fail(const std::string& cause) noexcept {
    try {
      family_->record(cause);
    } catch (...) {  // no memory for the words; `failed_` is what counts
    }
    abort();
  }

 private:
  static clock::time_point after(std::chrono::milliseconds timeout) {
    constexpr std::chrono::milliseconds longest = std::chrono::hours(24 * 365);  // more might overflow
    return clock::now() + (std::min)(timeout, longest);
  }

  // How long something that should be quick may take where nothing can be thrown.
  std::chrono::milliseconds patience() const noexcept {
    return (std::min)(options_.timeout, std::chrono::milliseconds(5000));
  }

  // Between finalizing and destroying. After the first, NCCL's service threads free their buffers in their own time;
  // the last rank of a process to destroy unmaps those of all its ranks, having waited for the threads of its own
  // alone. Both at once abort the process now and then (NCCL 2.28.9; tests/gpu/nccl_teardown.cu).
  static constexpr std::chrono::milliseconds service_pause{250};

  // NCCL's word on the communicator as soon as it is not ncclInProgress, or that after the deadline.
  ncclResult_t settled(ncclResult_t result, clock::time_point deadline) noexcept {
    poll_pause pause;
    for (bool last = false; result == ncclInProgress;) {
      ncclResult_t state = ncclSuccess;
      result = ncclCommGetAsyncError(comm_, &state);
      if (result == ncclSuccess) result = state;
      if (result != ncclInProgress || last) break;
      if (family_->failed()) break;
      last = clock::now() >= deadline;
      if (!last) pause();
    }
    return result;
  }

  // Before a call: whether the communicator is in order. An engine may have left its own in progress.
  void begin(const char* phase) {
    if (failed()) report(phase);
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
    if (asked != ncclSuccess || state != ncclSuccess) {
      finish(asked == ncclSuccess ? state : asked, "an earlier operation", phase, options_.timeout,
             after(options_.timeout));
    }
  }

  template <class F>
  void enqueue_within(std::chrono::milliseconds timeout, const char* phase, const char* call, F&& f) {
    begin(phase);
    phase_ = phase;
    ++operations_;
    const auto deadline = after(timeout);
    finish(f(comm_), call, phase, timeout, deadline);
  }

  // After a call.
  void finish(ncclResult_t result, const char* call, const char* phase, std::chrono::milliseconds timeout,
              clock::time_point deadline) {
    // A call may say that it is done while a thread of NCCL's is at it: registering a window does.
    ncclResult_t state = ncclSuccess;
    if (result == ncclSuccess && ncclCommGetAsyncError(comm_, &state) == ncclSuccess) result = state;
    if (result == ncclInProgress) result = settled(result, deadline);
    if (result == ncclSuccess) return;
    if (family_->failed()) report(phase);
    std::ostringstream text;
    if (result == ncclInProgress) {
      text << call << " was not done after " << timeout.count()
           << " ms: another rank has not done its part, or cannot be reached";
      fail_with<comm_error>(phase, text.str());
    }
    text << call << ": " << text_of(result, comm_);
    if (result == ncclRemoteError) fail_with<comm_error>(phase, text.str());
    fail_with<nccl_error>(phase, text.str());
  }

  template <class Exception>
  [[noreturn]] void fail_with(const char* phase, const std::string& cause) {
    const std::string text = "rank " + std::to_string(world_rank_) + " in " + phase + ": " + cause;
    fail(text);
    if constexpr (std::is_same_v<Exception, comm_error>) {
      throw comm_error(text, world_rank_, -1, phase);
    } else {
      throw Exception(text);
    }
  }

  // A failure that was known before.
  [[noreturn]] void report(const char* phase) {
    abort();
    throw comm_error("rank " + std::to_string(world_rank_) + " in " + phase + ": " + family_->cause() +
                         " (earlier; the communicator is not usable any more)",
                     world_rank_, -1, phase);
  }

  void abort() noexcept {
    failed_ = failed_ || comm_ != nullptr;
    if (comm_ == nullptr || !(owned_ || options_.abort_wrapped)) return;
    call_within(patience(), [device = device_, comm = std::exchange(comm_, nullptr), child = std::move(child_)] {
      static_cast<void>(cudaSetDevice(device));
      static_cast<void>(ncclCommAbort(comm));  // also ends a split that is under way
      if (child && *child != nullptr) static_cast<void>(ncclCommAbort(*child));
    });
  }

  static constexpr std::size_t num_host_words = 4096;

  comm::nccl_options options_;
  std::shared_ptr<failure_record> family_;
  ncclComm_t comm_ = nullptr;
  bool owned_ = false;
  bool failed_ = false;
  std::int32_t* words_ = nullptr;  // [2]: of barriers and of `least`
  std::int32_t* host_words_ = nullptr;
  std::shared_ptr<ncclComm_t> child_;
  const char* phase_ = "create";  // of the operation that was called last
  std::int64_t operations_ = 0;
  int rank_ = 0;
  int size_ = 1;
  int world_rank_ = 0;
  int device_ = 0;
};

}  // namespace detail::nccl

TESSERA_NAMESPACE_END
