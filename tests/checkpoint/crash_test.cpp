// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <tessera/comm/self.hpp>

#include "checkpoint_case.hpp"

using namespace tessera_test;

namespace {

using alone = ts::comm::self<ts::space::host>;

// Saves in a loop, step after step, until it is killed. The elements of step s are those of version s + 1.
[[noreturn]] void save_for_ever(const std::string& folder, std::int64_t step, bool in_background) {
  try {
    const ck::save_plan plan = model_plan(1, 1);
    model_rank model(0, 1, 1, 0);
    alone comm;
    ck::saver saver(comm, {.directory = folder, .keep_last = 2, .sync = step % 4 == 0});
    for (;; ++step) {
      model.fill(static_cast<std::uint64_t>(step) + 1);
      if (in_background) {
        saver.save_async(plan, model.sources(), {.step = step});
      } else {
        saver.save(plan, model.sources(), {.step = step});
        saver.save(plan, model.sources(), {.step = step});  // and once more, over itself
      }
    }
  } catch (...) {
  }
  ::_exit(1);
}

int unfinished_in(const std::string& folder) {
  int count = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (contains(entry.path().filename().string(), ".tmp-")) ++count;
  }
  return count;
}

TEST_CASE("killed at any moment, a save leaves the checkpoint before it or itself, whole, and nothing after the next") {
  temporary_folder folder;
  alone comm;
  {
    const model_rank model(0, 1, 1, 1);
    ck::saver saver(comm, {.directory = folder.str(), .sync = false});
    saver.save(model_plan(1, 1), model.sources(), {.step = 0});
  }
  std::mt19937 random(7);
  std::int64_t step = 0;
  std::int64_t advanced = 0;
  int unfinished = 0;
  unsigned longest_us = 12000;  // becomes such that about half of the children save something, on any machine
  for (int kill = 0; kill < 200; ++kill) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) save_for_ever(folder.str(), step + 1, kill % 2 == 1);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % longest_us));
    ::kill(child, SIGKILL);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));  // it had not given up by itself
    unfinished += unfinished_in(folder.str()) > 0 ? 1 : 0;

    for (const std::int64_t named : ck::list_steps(folder.str())) {  // what has its name is whole
      REQUIRE_NOTHROW(ck::read_manifest(folder / ck::step_name(named)));
    }

    model_rank model(0, 1, 1, 0);
    const auto result = ck::resume(comm, folder.str(), model.targets());
    REQUIRE(result);
    REQUIRE(result->state.step >= step);  // never back behind what was there
    REQUIRE(model.differences(static_cast<std::uint64_t>(result->state.step) + 1) == 0);
    longest_us =
        result->state.step == step ? std::min(longest_us * 5 / 4, 100000U) : std::max(longest_us * 3 / 4, 1000U);
    advanced += result->state.step - step;
    step = result->state.step;
    if (kill % 10 == 9) {  // the next save: also after several that were killed
      ck::saver saver(comm, {.directory = folder.str(), .keep_last = 2, .sync = false});
      model.fill(static_cast<std::uint64_t>(++step) + 1);
      saver.save(model_plan(1, 1), model.sources(), {.step = step});
      REQUIRE(unfinished_in(folder.str()) == 0);
      REQUIRE(ck::list_steps(folder.str()).size() <= 2);
    }
  }
  MESSAGE("checkpoints: " << advanced << ", kills that left something unfinished: " << unfinished);
  CHECK(advanced > 20);
  CHECK(unfinished > 10);
}

}  // namespace
