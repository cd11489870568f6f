// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The thread that gathers in the background.

#include <doctest/doctest.h>

#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include <tessera/shard/detail/gather_queue.hpp>

namespace {

namespace ts = tessera;

// What has been done when a queue of three posted jobs is gone.
template <class Then>
std::vector<int> done_when_gone(Then then) {
  std::vector<int> done;
  try {
    ts::shard::detail::gather_queue queue(
        3,
        [&](int job) {
          std::this_thread::sleep_for(std::chrono::milliseconds(20));
          done.push_back(job);
        },
        [] {});
    for (const int job : {0, 1, 2}) queue.post(job);
    queue.wait(0);
    then();
  } catch (const std::runtime_error&) {
  }
  return done;
}

}  // namespace

TEST_CASE("a queue of threads that is destroyed does what was posted: other ranks may have begun it") {
  CHECK(done_when_gone([] {}) == std::vector<int>{0, 1, 2});
}

TEST_CASE("a queue of threads that an exception destroys drops what has not begun") {
  CHECK(done_when_gone([] { throw std::runtime_error("stop"); }).size() < 3);
}
