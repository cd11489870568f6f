// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <chrono>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <tessera/comm/comm.hpp>

#include "../support/comm_checks.hpp"
#include "../support/messages.hpp"

namespace {

namespace ts = tessera;
using clock_type = std::chrono::steady_clock;
using std::chrono::milliseconds;
using tessera_test::contains;

// Sanitizers and busy machines slow ranks down: "fast" means far below the timeout that is in force then.
constexpr milliseconds long_timeout{20000};
constexpr milliseconds soon{5000};
constexpr milliseconds short_timeout{150};

milliseconds since(clock_type::time_point start) {
  return std::chrono::duration_cast<milliseconds>(clock_type::now() - start);
}

// What each rank's `f` threw, as messages; "" where it threw nothing. Nothing escapes, so no rank leaves by an error.
struct outcome {
  std::string text;
  int rank = -2;
  int peer = -2;
  std::string phase;
  milliseconds took{0};
};

outcome observe(const std::function<void()>& f) {
  outcome result;
  const auto start = clock_type::now();
  try {
    f();
  } catch (const ts::comm_error& e) {
    result = {e.what(), e.rank(), e.peer(), e.phase(), {}};
  } catch (const std::exception& e) {
    result.text = std::string("not a comm_error: ") + e.what();
  }
  result.took = since(start);
  return result;
}

// The root cause without "rank r in phase: ", which differs between ranks, and without what follows on later calls.
std::string cause(const outcome& o) {
  const std::size_t begin = o.text.find(": ");
  if (begin == std::string::npos) return o.text;
  return o.text.substr(begin + 2, o.text.find(" (earlier") - begin - 2);
}

struct arrivals {
  std::atomic<std::int64_t>* counter;
  void operator()() const { counter->fetch_add(1); }
  std::int64_t count() const { return counter->load(); }
};

TEST_CASE("threads pass all checks of a communicator") {
  for (const int ranks : {1, 2, 3, 4, 8}) {
    CAPTURE(ranks);
    CHECK_NOTHROW(ts::comm::threads::run(ranks, [](ts::comm::threads& c) { comm_checks::check_all(c); }));
  }
}

TEST_CASE("a NaN of any rank is the minimum and the maximum on all ranks, with its bits") {
  // both ways of an all-reduce, and the reduce-scatter
  for (const std::int64_t count : {1, 70000}) {
    for (const ts::reduce_op op : {ts::reduce_op::min, ts::reduce_op::max}) {
      for (unsigned having = 1; having < 8; ++having) {
        CAPTURE(count);
        CAPTURE(having);
        std::atomic<int> wrong{0};
        ts::comm::threads::run(3, [&](ts::comm::threads& c) {
          const auto nan_of = [](int rank) { return std::bit_cast<float>(0x7fc00000U + static_cast<unsigned>(rank)); };
          const float mine = (having >> c.rank() & 1U) != 0 ? nan_of(c.rank()) : static_cast<float>(c.rank() - 1);
          const std::vector<float> own(static_cast<std::size_t>(3 * count), mine);
          std::vector<float> all(own.size()), part(own.size() / 3);
          c.all_reduce({}, own.data(), all.data(), 3 * count, op);
          c.reduce_scatter({}, own.data(), part.data(), count, op);
          const auto expected = std::bit_cast<unsigned>(nan_of(std::countr_zero(having)));
          for (const float x : all) wrong += std::bit_cast<unsigned>(x) != expected;
          for (const float x : part) wrong += std::bit_cast<unsigned>(x) != expected;
        });
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("no rank passes a barrier before all have come") {
  std::atomic<std::int64_t> counter{0};
  CHECK_NOTHROW(
      ts::comm::threads::run(4, [&](ts::comm::threads& c) { comm_checks::check_barrier(c, arrivals{&counter}); }));
}

TEST_CASE("an engine may own the threads, and handles move") {
  std::vector<ts::comm::threads> ranks = ts::comm::threads::create(3, {.timeout = long_timeout});
  std::vector<std::thread> workers;
  std::vector<double> sums(3);
  for (int r = 0; r < 3; ++r) {
    workers.emplace_back([&sums, c = std::move(ranks[static_cast<std::size_t>(r)])]() mutable {
      double value = c.rank() + 1;
      c.all_reduce({}, &value, &sums[static_cast<std::size_t>(c.rank())], 1);
      c = c.split(0, -c.rank());
      sums[static_cast<std::size_t>(c.world_rank())] += 10 * c.rank();
    });
  }
  for (std::thread& worker : workers) worker.join();
  CHECK(sums == std::vector<double>{26, 16, 6});
}

TEST_CASE("ranks really run at the same time") {
  std::atomic<int> inside{0};
  ts::comm::threads::run(3, [&](ts::comm::threads&) {
    ++inside;
    const auto start = clock_type::now();
    while (inside < 3 && since(start) < soon) std::this_thread::yield();
  });
  CHECK(inside == 3);
}

TEST_CASE("wrong numbers of ranks and wrong timeouts are refused") {
  CHECK_THROWS_WITH_AS(ts::comm::threads::create(0), "comm::threads needs at least 1 rank, num_ranks = 0",
                       ts::invalid_argument);
  CHECK_THROWS_AS(ts::comm::threads::run(2, [](ts::comm::threads&) {}, {.timeout = milliseconds(0)}),
                  ts::invalid_argument);
}

TEST_CASE("the longest timeout there is is no timeout that has passed") {
  ts::comm::threads::run(2,
                         [](ts::comm::threads& comm) {
                           if (comm.rank() == 1) std::this_thread::sleep_for(milliseconds(20));
                           comm.barrier({});
                         },
                         {.timeout = milliseconds::max()});
}

TEST_CASE("run rethrows the first exception and the others are told at once") {
  std::vector<outcome> outcomes(4);
  const auto start = clock_type::now();
  CHECK_THROWS_WITH_AS(ts::comm::threads::run(4,
                                              [&](ts::comm::threads& c) {
                                                if (c.rank() == 2) {
                                                  std::this_thread::sleep_for(milliseconds(20));
                                                  throw std::out_of_range("expert 300 of 256");
                                                }
                                                outcomes[static_cast<std::size_t>(c.rank())] =
                                                    observe([&] { c.barrier({}); });
                                                c.barrier({});  // escapes: a consequence, not the root cause
                                              },
                                              {.timeout = long_timeout}),
                       "expert 300 of 256", std::out_of_range);
  CHECK(since(start) < soon);
  for (const int r : {0, 1, 3}) {
    const outcome& o = outcomes[static_cast<std::size_t>(r)];
    CHECK(o.rank == r);
    CHECK(o.peer == 2);
    CHECK(o.phase == "barrier");
    CHECK(cause(o) == "rank 2 failed: expert 300 of 256");
    CHECK(contains(o.text, "rank " + std::to_string(r) + " in barrier: "));
  }
}

TEST_CASE("an exception that is no std::exception ends the others too") {
  outcome other;
  try {
    ts::comm::threads::run(2,
                           [&](ts::comm::threads& c) {
                             if (c.rank() == 0) throw 42;
                             other = observe([&] { c.barrier({}); });
                           },
                           {.timeout = long_timeout});
    FAIL("nothing was thrown");
  } catch (int value) {
    CHECK(value == 42);
  }
  CHECK(other.peer == 0);
}

TEST_CASE("a rank that returns early is named at once by whoever waits for it") {
  std::vector<outcome> outcomes(3);
  const auto start = clock_type::now();
  ts::comm::threads::run(3,
                         [&](ts::comm::threads& c) {
                           if (c.rank() == 1) return;
                           outcomes[static_cast<std::size_t>(c.rank())] = observe([&] { c.barrier({}); });
                         },
                         {.timeout = long_timeout});
  CHECK(since(start) < soon);
  for (const int r : {0, 2}) {
    CHECK(outcomes[static_cast<std::size_t>(r)].peer == 1);
    CHECK(contains(outcomes[static_cast<std::size_t>(r)].text, "rank 1 has left"));
  }
}

TEST_CASE(
    "a stalled rank is named within the timeout by all others, through sub-communicators and in every operation") {
  using operation = std::function<void(ts::comm::threads&)>;
  const std::vector<std::pair<const char*, operation>> operations{
      {"barrier", [](ts::comm::threads& c) { c.barrier({}); }},
      {"all_reduce",
       [](ts::comm::threads& c) {
         std::vector<float> data(50000);
         c.all_reduce({}, data.data(), data.data(), 50000);
       }},
      {"broadcast",
       [](ts::comm::threads& c) {
         int data = 0;
         c.broadcast({}, &data, 1, 2);
       }},
      {"all_to_all_v",
       [](ts::comm::threads& c) {
         const std::vector<std::int64_t> counts(4, 1), offsets{0, 1, 2, 3};
         std::vector<double> send(4), recv(4);
         c.all_to_all_v({}, send.data(), counts.data(), offsets.data(), recv.data(), counts.data(), offsets.data());
       }},
      {"split", [](ts::comm::threads& c) { c.split(0, 0); }},
  };
  for (const auto& [name, operate] : operations) {
    CAPTURE(name);
    std::vector<outcome> outcomes(4);
    std::atomic<int> reported{0};
    ts::comm::threads::run(4,
                           [&, operate = operate](ts::comm::threads& c) {
                             outcome& own = outcomes[static_cast<std::size_t>(c.rank())];
                             if (c.rank() == 2) {
                               const auto start = clock_type::now();
                               while (reported < 3 && since(start) < long_timeout)
                                 std::this_thread::sleep_for(milliseconds(1));
                             }
                             own = observe([&] { operate(c); });
                             ++reported;
                           },
                           {.timeout = short_timeout});
    for (int r = 0; r < 4; ++r) {
      const outcome& o = outcomes[static_cast<std::size_t>(r)];
      CHECK(o.rank == r);
      CHECK(o.peer == 2);
      CHECK(o.phase == name);
      CHECK(contains(cause(o), "rank 2 did not arrive within 150 ms"));
      CHECK(cause(o) == cause(outcomes[0]));  // the stalled rank learns of it when it comes back
      CHECK(o.took < short_timeout + soon);
    }
    const milliseconds longest = std::max({outcomes[0].took, outcomes[1].took, outcomes[3].took});
    CHECK(longest >= short_timeout - milliseconds(1));
  }
}

TEST_CASE("who waits for whom is followed to the rank that is really absent") {
  // 0 waits for 1 in one communicator, 1 for 2 in another, 2 for 3 in the world; 3 is absent. Rank 0 is the first whose
  // time is up.
  std::vector<outcome> outcomes(4);
  std::atomic<int> reported{0};
  ts::comm::threads::run(4,
                         [&](ts::comm::threads& c) {
                           ts::comm::threads lower = c.split(c.rank() < 2 ? 0 : 1, 0);
                           ts::comm::threads middle = c.split(c.rank() == 1 || c.rank() == 2 ? 0 : 1, 0);
                           c.barrier({});
                           outcome& own = outcomes[static_cast<std::size_t>(c.rank())];
                           const auto step = milliseconds(20);
                           if (c.rank() == 3) {
                             while (reported < 3) std::this_thread::sleep_for(milliseconds(1));
                             return;
                           }
                           std::this_thread::sleep_for(step * c.rank());
                           own = observe([&] {
                             double x = 0;
                             const ts::transfer from_three = ts::receive_from(3, &x, 1);
                             if (c.rank() == 0) lower.all_reduce({}, &x, &x, 1);
                             if (c.rank() == 1) middle.broadcast({}, &x, 1, 1);
                             if (c.rank() == 2) c.exchange({}, {}, {&from_three, 1}, "receive of activations");
                           });
                           ++reported;
                         },
                         {.timeout = 2 * short_timeout});
  for (int r = 0; r < 3; ++r) {
    const outcome& o = outcomes[static_cast<std::size_t>(r)];
    CHECK(o.peer == 3);
    CHECK(cause(o) == "rank 3 did not arrive within 300 ms: rank 2 waits for it in receive of activations");
  }
  CHECK(outcomes[0].phase == "all_reduce");
  CHECK(outcomes[1].phase == "broadcast");
}

TEST_CASE("ranks that wait for one another are told so") {
  std::vector<outcome> outcomes(2);
  ts::comm::threads::run(2,
                         [&](ts::comm::threads& c) {
                           ts::comm::threads same = c.split(0, 0);
                           outcomes[static_cast<std::size_t>(c.rank())] = observe([&] {
                             if (c.rank() == 0) same.barrier({});
                             if (c.rank() == 1) c.barrier({});
                           });
                         },
                         {.timeout = short_timeout});
  CHECK(cause(outcomes[0]) == cause(outcomes[1]));
  CHECK(contains(outcomes[0].text, "ranks wait for one another (rank "));
  CHECK(contains(outcomes[0].text, "the same operations in the same order"));
}

TEST_CASE("different sizes of one message are an error that says both") {
  std::vector<outcome> outcomes(3);
  ts::comm::threads::run(3,
                         [&](ts::comm::threads& c) {
                           outcomes[static_cast<std::size_t>(c.rank())] = observe([&] {
                             std::vector<float> data(8);
                             c.all_reduce({}, data.data(), data.data(), c.rank() == 1 ? 8 : 7);
                           });
                         },
                         {.timeout = long_timeout});
  for (const outcome& o : outcomes) {
    CHECK(cause(o) == cause(outcomes[0]));
    CHECK(contains(o.text, "28 bytes"));
    CHECK(contains(o.text, "32 bytes"));
    CHECK(o.took < soon);
  }
}

TEST_CASE("after a failure everything throws until all ranks reset; then everything works, again and again") {
  std::atomic<int> thrown{0};
  std::barrier rounds(4);  // not of the library: the next failure must not hit ranks that are still in this round
  CHECK_NOTHROW(ts::comm::threads::run(
      4,
      [&](ts::comm::threads& c) {
        ts::comm::threads part = c.split(c.rank() % 2, 0);
        for (int round = 0; round < 6; ++round) {
          const int culprit = round % 4;
          // Messages of the failed round must not turn up in the next one: they differ in every round.
          std::vector<double> data(static_cast<std::size_t>(300 + round), round);
          const auto count = static_cast<std::int64_t>(data.size());
          if (c.rank() == culprit) {
            if (round % 2 == 0) {  // some of its messages are already on their way
              const auto o = observe([&] {
                const ts::transfer send = ts::send_to((culprit + 1) % 4, data.data(), count - 1);
                c.exchange({}, {&send, 1}, {});
              });
              comm_checks::require(!o.text.empty(), "a send that nobody wants came through");
            }
            (round % 3 == 0 ? part : c).fail("round " + std::to_string(round));
          }
          const auto first = observe([&] { c.all_reduce({}, data.data(), data.data(), count); });
          const auto second = observe([&] { part.barrier({}); });
          comm_checks::require(c.failed() && !first.text.empty(), "all_reduce did not fail in round ", round);
          comm_checks::require(contains(second.text, "reset()") && second.peer == first.peer, second.text);
          comm_checks::require(round % 2 == 0 || first.peer == culprit, first.text);
          thrown += 2;
          (round % 2 == 0 ? c : part).reset();
          comm_checks::require(!c.failed(), "reset did not help");
          double sum = c.rank();
          part.all_reduce({}, &sum, &sum, 1);
          comm_checks::require(sum == (c.rank() % 2 == 0 ? 2 : 4), "sum ", sum);
          comm_checks::check_exchange(c, 5);
          comm_checks::check_moves<int>(part);
          rounds.arrive_and_wait();
        }
        comm_checks::check_all(c);
      },
      {.timeout = long_timeout}));
  CHECK(thrown == 48);
}

TEST_CASE("a failed split is forgotten by reset") {
  std::barrier rounds(3);
  CHECK_NOTHROW(ts::comm::threads::run(3,
                                       [&](ts::comm::threads& c) {
                                         for (int round = 0; round < 3; ++round) {
                                           const auto o = observe([&] {
                                             if (c.rank() == round) throw ts::comm_error("mine", 0, 0, "");
                                             c.split(0, 0);
                                           });
                                           if (c.rank() == round) c.fail("no split");
                                           comm_checks::require(!o.text.empty(), "split came through");
                                           c.reset();
                                           comm_checks::check_split(c);
                                           rounds.arrive_and_wait();
                                         }
                                       },
                                       {.timeout = long_timeout}));
}

TEST_CASE("reset is bounded, names the rank that does not come, and may be tried again") {
  std::vector<outcome> outcomes(3);
  std::atomic<int> reported{0};
  CHECK_NOTHROW(ts::comm::threads::run(3,
                                       [&](ts::comm::threads& c) {
                                         if (c.rank() == 0) c.fail("first");
                                         if (c.rank() != 1) {
                                           outcomes[static_cast<std::size_t>(c.rank())] = observe([&] { c.reset(); });
                                           ++reported;
                                         }
                                         while (reported < 2) std::this_thread::sleep_for(milliseconds(1));
                                         comm_checks::require(c.failed(), "a reset without all ranks took effect");
                                         for (int attempt = 0; attempt < 100 && c.failed(); ++attempt) {
                                           try {
                                             c.reset();
                                           } catch (
                                               const ts::comm_error&) {  // the others may be late on a busy machine
                                           }
                                         }
                                         c.barrier({});
                                       },
                                       {.timeout = short_timeout}));
  for (const int r : {0, 2}) {
    CHECK(outcomes[static_cast<std::size_t>(r)].peer == 1);
    CHECK(outcomes[static_cast<std::size_t>(r)].phase == "reset");
    CHECK(contains(outcomes[static_cast<std::size_t>(r)].text, "rank 1 did not arrive"));
  }
}

TEST_CASE("reset without the rank that has left fails at once") {
  outcome other;
  CHECK_THROWS_AS(ts::comm::threads::run(2,
                                         [&](ts::comm::threads& c) {
                                           if (c.rank() == 1) throw std::runtime_error("gone");
                                           observe([&] { c.barrier({}); });
                                           other = observe([&] { c.reset(); });
                                         },
                                         {.timeout = long_timeout}),
                  std::runtime_error);
  CHECK(other.peer == 1);
  CHECK(other.took < soon);
}

TEST_CASE("a slow rank is waited for as long as messages keep moving") {
  // 12 steps of 40 ms: longer than the timeout altogether, none of them alone.
  CHECK_NOTHROW(ts::comm::threads::run(2,
                                       [](ts::comm::threads& c) {
                                         for (int i = 0; i < 12; ++i) {
                                           if (c.rank() == 0) std::this_thread::sleep_for(milliseconds(40));
                                           c.barrier({});
                                         }
                                       },
                                       {.timeout = milliseconds(400)}));
}

TEST_CASE("buffers of a failed operation may be freed at once") {
  // AddressSanitizer and ThreadSanitizer see a receiver that still reads them.
  for (int round = 0; round < 12; ++round) {
    try {
      ts::comm::threads::run(4,
                             [&](ts::comm::threads& c) {
                               for (int i = 0;; ++i) {
                                 std::vector<double> send(4000, 1.0), recv(4000 * 4);
                                 if (c.rank() == round % 4 && i == round / 4) throw std::runtime_error("stop");
                                 c.all_gather({}, send.data(), recv.data(), 4000);
                               }
                             },
                             {.timeout = long_timeout});
      FAIL("nothing was thrown");
    } catch (const std::runtime_error& e) {
      CHECK(std::string(e.what()) == "stop");
    }
  }
}

}  // namespace
