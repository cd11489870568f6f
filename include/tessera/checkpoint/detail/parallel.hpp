// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A loop whose steps are shared among a few threads.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

/// Calls `step(i)` for all i in `[0, count)`, begun in this order, on the calling thread and up to `num_threads - 1`
/// others, and returns when all are done. After one has thrown none begins; of several that throw, the exception of the
/// lowest i is thrown here, the one that a plain loop would have met.
template <class Step>
void in_parallel(std::size_t count, int num_threads, Step&& step) {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::size_t failed = count;
  std::exception_ptr error;
  const auto work = [&] {
    for (std::size_t i = next++; i < count; i = next++) {
      try {
        step(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (i < failed) {
          failed = i;
          error = std::current_exception();
        }
        next = count;
      }
    }
  };
  const std::size_t wanted = std::min(count, static_cast<std::size_t>(num_threads));
  std::vector<std::thread> others;
  others.reserve(wanted);
  try {
    while (others.size() + 1 < wanted) others.emplace_back(work);
  } catch (...) {  // no more threads to be had: those that are there do it
  }
  work();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
