// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include <tessera/comm/detail/symmetric/process_memory.hpp>

namespace {
using tessera::detail::symmetric::process_memory;

std::shared_ptr<std::byte> block() {
  return {new std::byte[1], [](std::byte* b) { delete[] b; }};
}
}  // namespace

TEST_CASE("what a rank offers is found as long as somebody keeps it, and kept by who finds it") {
  auto& memory = process_memory::instance();
  auto own = block();
  const std::uint64_t number = memory.offer(own);
  auto found = memory.find(number);
  CHECK(found == own);
  own.reset();
  CHECK(memory.find(number) == found);
  found.reset();
  CHECK(memory.find(number) == nullptr);
  CHECK(memory.find(number + 1) == nullptr);
  const auto next = block();
  CHECK(memory.offer(next) > number);
  CHECK(memory.size() == 1);  // what is gone has been forgotten
}

TEST_CASE("threads find what others offer, all of it at once") {
  auto& memory = process_memory::instance();
  constexpr int ranks = 8, rounds = 200;
  std::vector<std::shared_ptr<std::byte>> own(ranks);
  std::vector<std::uint64_t> numbers(ranks);
  for (int r = 0; r < ranks; ++r) {
    own[static_cast<std::size_t>(r)] = block();
    numbers[static_cast<std::size_t>(r)] = memory.offer(own[static_cast<std::size_t>(r)]);
  }
  std::vector<int> missing(ranks, 0);
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      for (int i = 0; i < rounds; ++i) {
        const auto mine = block();
        memory.offer(mine);
        for (int other = 0; other < ranks; ++other) {
          const auto o = static_cast<std::size_t>(other);
          missing[static_cast<std::size_t>(r)] += memory.find(numbers[o]) != own[o];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(missing == std::vector<int>(ranks, 0));
}

TEST_CASE("threads of a process have its token") {
  const std::uint64_t own = process_memory::instance().token();
  CHECK(own != 0);
  std::uint64_t of_thread = 0;
  std::thread([&] { of_thread = process_memory::instance().token(); }).join();
  CHECK(of_thread == own);
}
