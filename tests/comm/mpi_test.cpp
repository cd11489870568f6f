// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Run under mpirun with any number of processes; exits with 1 where a check does not hold. It has its own main and no
// test framework: every rank must take part in every check.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <tessera/comm/comm.hpp>
#include <tessera/comm/mpi.hpp>

#include "../support/comm_checks.hpp"
#include "../support/messages.hpp"

namespace {

namespace ts = tessera;
using clock_type = std::chrono::steady_clock;
using comm_checks::require;
using std::chrono::milliseconds;
using tessera_test::contains;

constexpr milliseconds long_timeout{20000};
constexpr milliseconds soon{8000};
constexpr milliseconds short_timeout{500};

milliseconds since(clock_type::time_point start) {
  return std::chrono::duration_cast<milliseconds>(clock_type::now() - start);
}

void passes_all_checks() {
  ts::comm::mpi c(MPI_COMM_WORLD);
  comm_checks::check_all(c);
  ts::comm::mpi copy = c;  // another handle of the same rank
  c = std::move(copy);
  c.barrier({});
}

void gives_the_bits_of_threads() {
  ts::comm::mpi c(MPI_COMM_WORLD);
  const std::vector<double> own = comm_checks::results(c);
  std::vector<std::vector<double>> expected(static_cast<std::size_t>(c.size()));
  ts::comm::threads::run(
      c.size(), [&](ts::comm::threads& t) { expected[static_cast<std::size_t>(t.rank())] = comm_checks::results(t); });
  require(comm_checks::same_bits(own, expected[static_cast<std::size_t>(c.rank())]), "mpi and threads differ");
}

void cuts_large_messages() {
  ts::comm::mpi c(MPI_COMM_WORLD, {.max_message_bytes = 1000});  // 2^31 - 1 in small
  comm_checks::check_reductions<float>(c);
  comm_checks::check_moves<std::uint8_t>(c);
  comm_checks::check_exchange(c, 10);
}

void refuses_bad_options() {
  comm_checks::caught<ts::invalid_argument>([] { ts::comm::mpi c(MPI_COMM_WORLD, {.timeout = milliseconds(0)}); });
  comm_checks::caught<ts::invalid_argument>([] { ts::comm::mpi c(MPI_COMM_WORLD, {.max_message_bytes = 0}); });
  comm_checks::caught<ts::invalid_argument>([] { ts::comm::mpi c(MPI_COMM_NULL); });
}

// From here on the last rank fails. Each case makes a world of its own, because a failure is final.

void names_a_failing_rank() {
  ts::comm::mpi c(MPI_COMM_WORLD, {.timeout = long_timeout});
  ts::comm::mpi part = c.split(c.rank() % 2, 0);
  const int last = c.size() - 1;
  if (last == 0) return;
  std::vector<double> data(100000, 1.0);
  MPI_Barrier(MPI_COMM_WORLD);  // a barrier of the library could still be under way here when the failure arrives
  const auto start = clock_type::now();
  if (c.rank() == last) {
    c.fail("disk full");
    require(c.failed() && part.failed(), "fail() is not known on its own rank");
  }
  const auto e = comm_checks::caught<ts::comm_error>([&] {
    while (true) c.all_reduce({}, data.data(), data.data(), 100000);
  });
  require(since(start) < soon, "it took ", since(start).count(), " ms to learn of the failure");
  require(e.peer() == last && e.rank() == c.rank() && e.phase() == "all_reduce", e.what());
  require(contains(e.what(), "rank " + std::to_string(last) + " failed: disk full"), e.what());
  const auto later = comm_checks::caught<ts::comm_error>([&] {
    while (true) part.broadcast({}, data.data(), 8, 0);  // sub-communicators share the failure
  });
  require(later.peer() == last, later.what());
}

void names_a_stalled_rank() {
  const int cases = 2;
  for (int i = 0; i < cases; ++i) {
    ts::comm::mpi c(MPI_COMM_WORLD, {.timeout = short_timeout});
    const int last = c.size() - 1;
    if (last == 0) return;
    MPI_Barrier(MPI_COMM_WORLD);
    if (c.rank() == last) std::this_thread::sleep_for(short_timeout + milliseconds(700));
    const auto start = clock_type::now();
    const auto e = comm_checks::caught<ts::comm_error>([&] {
      if (i == 0 || c.rank() == last) {
        while (true) c.barrier({});  // the first one may find all messages of the others
      } else {                       // each waits for the next: the end of the chain is to blame
        double x = 0;
        const ts::transfer receive = ts::receive_from(c.rank() + 1, &x, 1);
        c.exchange({}, {}, {&receive, 1}, "pipeline");
      }
    });
    require(e.peer() == last, e.what());
    require(contains(e.what(), "rank " + std::to_string(last) + " did not arrive within 500 ms"), e.what());
    if (i == 1) require(contains(e.what(), "rank " + std::to_string(last - 1) + " waits for it in pipeline"), e.what());
    require(since(start) < short_timeout + soon, "it took ", since(start).count(), " ms");
    MPI_Barrier(MPI_COMM_WORLD);
  }
}

void names_ranks_that_wait_for_one_another() {
  ts::comm::mpi c(MPI_COMM_WORLD, {.timeout = short_timeout});
  ts::comm::mpi same = c.split(0, 0);
  if (c.size() == 1) return;
  const auto e = comm_checks::caught<ts::comm_error>([&] { (c.rank() == 0 ? same : c).barrier({}); });
  require(contains(e.what(), "wait for one another") && contains(e.what(), "the same operations"), e.what());
}

void names_different_sizes() {
  for (const bool longer : {false, true}) {
    ts::comm::mpi c(MPI_COMM_WORLD, {.timeout = long_timeout});
    if (c.size() == 1) return;
    std::vector<std::int32_t> data(16);
    const std::int64_t count = c.rank() == 0 ? (longer ? 9 : 7) : 8;
    const auto e = comm_checks::caught<ts::comm_error>([&] {
      if (c.rank() == 0) {
        const ts::transfer send = ts::send_to(1, data.data(), count);
        c.exchange({}, {&send, 1}, {});
      } else if (c.rank() == 1) {
        const ts::transfer receive = ts::receive_from(0, data.data(), count);
        c.exchange({}, {}, {&receive, 1});
      }
      while (true) c.barrier({});
    });
    require(contains(e.what(), "which expects 32 bytes"), e.what());
    require(contains(e.what(), longer ? "more than 32 bytes" : "28 bytes"), e.what());
    MPI_Barrier(MPI_COMM_WORLD);
  }
}

// No time of a clock overflows.
void waits_with_the_longest_timeout() {
  ts::comm::mpi c(MPI_COMM_WORLD, {.timeout = milliseconds::max()});
  if (c.rank() == 1) std::this_thread::sleep_for(milliseconds(50));
  c.barrier({});
}

// Runs a check on all ranks; true where it holds on this one.
bool holds(const char* name, const std::function<void()>& check, int rank) {
  bool good = true;
  try {
    check();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rank %d: %s: %s\n", rank, name, e.what());
    good = false;
  }
  int all = good ? 1 : 0;
  MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
  if (rank == 0) std::printf("%s: %s\n", name, all != 0 ? "ok" : "FAILED");
  return all != 0;
}

}  // namespace

int main() {
  try {
    comm_checks::caught<ts::invalid_argument>([] { ts::comm::mpi too_early(MPI_COMM_WORLD); });
    const ts::comm::mpi_session session;
    const ts::comm::mpi_session inner;  // finds MPI running and leaves it alone
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    bool good = true;
    good &= holds("passes all checks of a communicator", passes_all_checks, rank);
    good &= holds("gives the same bits as threads", gives_the_bits_of_threads, rank);
    good &= holds("cuts large messages into pieces", cuts_large_messages, rank);
    good &= holds("refuses bad options", refuses_bad_options, rank);
    good &= holds("waits with the longest timeout", waits_with_the_longest_timeout, rank);
    good &= holds("names a failing rank on all others", names_a_failing_rank, rank);
    good &= holds("names a stalled rank on all others", names_a_stalled_rank, rank);
    good &= holds("names ranks that wait for one another", names_ranks_that_wait_for_one_another, rank);
    good &= holds("names different sizes of one message", names_different_sizes, rank);
    return good ? EXIT_SUCCESS : EXIT_FAILURE;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return EXIT_FAILURE;
  }
}
