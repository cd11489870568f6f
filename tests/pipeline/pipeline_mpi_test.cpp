// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Run under mpirun with any number of processes; exits with 1 where a check does not hold. Every rank takes part in
// every check.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <tessera/comm/mpi.hpp>
#include <tessera/pipeline/dualpipe.hpp>
#include <tessera/pipeline/dualpipev.hpp>
#include <tessera/pipeline/one_f_one_b.hpp>
#include <tessera/pipeline/zb1p.hpp>

#include "../support/messages.hpp"
#include "pipeline_fixture.hpp"

namespace {

using namespace pipeline_test;
using tessera_test::contains;
using ts::comm::mpi;
using clock_type = std::chrono::steady_clock;

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

std::vector<pl::schedule> schedules(int ranks) {
  std::vector<pl::schedule> list{pl::one_f_one_b(ranks, 1), pl::one_f_one_b(ranks, 2 * ranks + 1),
                                 pl::zb1p(ranks, 2 * ranks + 1), pl::dualpipev(ranks, 2 * ranks),
                                 pl::dualpipev(ranks, 2 * ranks + 3)};
  if (ranks % 2 == 0) list.push_back(pl::dualpipe(ranks, 2 * ranks + 2));
  return list;
}

void gives_the_bits_of_a_serial_run() {
  mpi comm(MPI_COMM_WORLD);
  for (const pl::schedule& s : schedules(comm.size())) {
    const auto rows = ragged_rows(s.num_micro_batches, 4);
    const auto expected = serial_gradients(s.num_stages, rows, 4);
    pipeline_rank<mpi> rank(s, comm, 4);
    for (int step = 0; step < 2; ++step) {  // the same executor for two steps
      rank.run(rows);
      rank.sum_mirrored();
      for (int chunk = 0; chunk < s.num_chunks; ++chunk)
        require(same_bits(rank.gradient(chunk), expected[static_cast<std::size_t>(s.stage_of(comm.rank(), chunk))]),
                s.name + ": other gradients than a serial run");
    }
  }
}

// MPI may still read the buffers of an operation that threw: they are kept until it is finalised.
std::vector<std::shared_ptr<void>> kept;

template <class... Arguments>
pipeline_rank<mpi>& kept_rank(Arguments&&... arguments) {
  auto rank = std::make_shared<pipeline_rank<mpi>>(std::forward<Arguments>(arguments)...);
  kept.push_back(rank);
  return *rank;
}

// What run() throws on this rank.
template <class Rank>
std::string thrown(Rank& rank, const std::vector<std::int64_t>& rows, bool by_a_stage) {
  try {
    rank.run(rows);
  } catch (const pl::stage_error& e) {
    require(by_a_stage, std::string("a stage_error where no stage threw: ") + e.what());
    return e.what();
  } catch (const ts::comm_error& e) {
    require(!by_a_stage, std::string("a comm_error where the stage threw: ") + e.what());
    return e.what();
  }
  return "nothing was thrown";
}

void tells_all_ranks_of_a_stage_that_throws() {
  using k = pl::action_kind;
  for (const k kind : {k::forward, k::backward_input, k::backward_weights}) {
    mpi comm(MPI_COMM_WORLD);  // a failure is final: one world for each
    const pl::schedule s = pl::dualpipev(comm.size(), 2 * comm.size());
    const auto rows = ragged_rows(s.num_micro_batches, 3);
    pipeline_rank<mpi>& rank = kept_rank(s, comm, 3);
    const int culprit = s.num_stages / 2, there = s.rank_of(culprit, 1);
    for (auto& stage : rank.stages) {
      stage->before = [&](const pl::work_item& item, k doing) {
        if (doing == kind && item.stage == culprit && item.micro_batch == 1)
          throw std::runtime_error("the disk is full");
      };
    }
    const auto start = clock_type::now();
    const std::string text = thrown(rank, rows, comm.rank() == there);
    require(contains(text, "stage " + std::to_string(culprit) + " (rank " + std::to_string(there) +
                               "), micro-batch 1, in ") &&
                contains(text, "the disk is full"),
            "not told of the stage: " + text);
    require(clock_type::now() - start < std::chrono::seconds(10), "told too late");
    MPI_Barrier(MPI_COMM_WORLD);  // the message of the failure has been taken by all
  }
}

void gives_an_error_when_a_rank_dies() {
  mpi comm(MPI_COMM_WORLD, {.timeout = std::chrono::milliseconds(500)});
  if (comm.size() > 1) {
    const pl::schedule s = pl::one_f_one_b(comm.size(), 2 * comm.size());
    const auto rows = std::vector<std::int64_t>(static_cast<std::size_t>(s.num_micro_batches), 3);
    const auto start = clock_type::now();
    if (comm.rank() != comm.size() - 1) {
      pipeline_rank<mpi>& rank = kept_rank(s, comm, 3);
      const std::string text = thrown(rank, rows, false);
      require(contains(text, "rank " + std::to_string(comm.size() - 1) + " did not arrive"), "not told: " + text);
      require(clock_type::now() - start < std::chrono::seconds(10), "told too late");
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(1500));  // the last rank does nothing any more
    }
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

// Runs a check on all ranks; true where it holds on all.
bool holds(const char* name, const std::function<void()>& check, int rank) {
  int good = 1;
  try {
    check();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rank %d: %s: %s\n", rank, name, e.what());
    good = 0;
  }
  MPI_Allreduce(MPI_IN_PLACE, &good, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
  if (rank == 0) std::printf("%s: %s\n", name, good != 0 ? "ok" : "FAILED");
  return good != 0;
}

}  // namespace

int main() {
  try {
    const ts::comm::mpi_session session;
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    bool good = true;
    good &= holds("every schedule gives the bits of a serial run", gives_the_bits_of_a_serial_run, rank);
    good &= holds("all ranks are told of a stage that throws", tells_all_ranks_of_a_stage_that_throws, rank);
    good &= holds("a rank that dies gives an error on the others", gives_an_error_when_a_rank_dies, rank);
    return good ? EXIT_SUCCESS : EXIT_FAILURE;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return EXIT_FAILURE;
  }
}
