// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <vector>

#include <tessera/comm/comm.hpp>

#include "../support/comm_checks.hpp"

namespace {

namespace ts = tessera;

// Rank r's row of the ordered sum of `chunks` chunks of [ranks, count] elements, spread as `first` says.
template <class A>
std::vector<A> row_of_sum(ts::comm::threads& comm, const std::vector<std::int64_t>& first, std::int64_t count) {
  const auto rank = static_cast<std::size_t>(comm.rank());
  const std::int64_t local = first[rank + 1] - first[rank], width = comm.size() * count;
  std::vector<A> contributions;
  for (std::int64_t chunk = first[rank]; chunk < first[rank + 1]; ++chunk) {
    const auto values = comm_checks::chunk_values<A>(chunk, width);
    contributions.insert(contributions.end(), values.begin(), values.end());
  }
  std::vector<A> result(static_cast<std::size_t>(count), A(7));
  ts::host_buffer memory(ts::ordered_reduce_scatter_workspace_bytes<A>(comm.size(), first.back(), count));
  ts::memory_builder builder(ts::workspace_memory(memory), "workspace");
  ts::ordered_reduce_scatter({}, comm, contributions.data(), local, count, result.data(), first.back(), builder);
  return result;
}

TEST_CASE("an ordered reduce-scatter gives each rank its slice of the ordered all-reduce, bit for bit") {
  struct spread {
    int ranks;
    std::vector<std::int64_t> first;
  };
  const spread spreads[] = {{1, {0, 6}},       {2, {0, 3, 6}},       {2, {0, 6, 6}},
                            {3, {0, 0, 5, 6}}, {4, {0, 1, 1, 4, 6}}, {4, {0, 0, 0, 0, 0}}};
  for (const spread& s : spreads) {
    CAPTURE(s.ranks);
    for (const std::int64_t count : {std::int64_t{0}, std::int64_t{1}, std::int64_t{700}}) {
      ts::comm::threads::run(s.ranks, [&](ts::comm::threads& comm) {
        const auto row = row_of_sum<float>(comm, s.first, count);
        const auto rank = static_cast<std::size_t>(comm.rank());
        const auto whole = comm_checks::ordered_sum<float>(comm, s.first[rank], s.first[rank + 1] - s.first[rank],
                                                           s.first.back(), comm.size() * count);
        const std::vector<float> expected(whole.begin() + comm.rank() * count,
                                          whole.begin() + (comm.rank() + 1) * count);
        comm_checks::require(comm_checks::same_bits(row, expected), "rank ", rank, " of ", s.ranks, ", count ", count);
      });
    }
  }
}

TEST_CASE("an ordered scatter brings rows in the global order of chunks, and refuses memory that is too small") {
  ts::comm::threads::run(3, [&](ts::comm::threads& comm) {
    const std::int64_t local = comm.rank() == 1 ? 0 : 2;  // chunks 0, 1 on rank 0 and 2, 3 on rank 2
    std::vector<std::int32_t> contributions;
    for (std::int64_t c = 0; c < local; ++c) {
      for (int row = 0; row < 3; ++row) {
        for (int k = 0; k < 2; ++k) {
          contributions.push_back(static_cast<std::int32_t>(100 * (c + comm.rank()) + 10 * row + k));
        }
      }
    }
    ts::host_buffer memory(ts::ordered_scatter_workspace_bytes(3, 2));
    std::vector<std::int32_t> rows(8, -1);
    {
      ts::memory_builder builder(ts::workspace_memory(memory), "workspace");
      comm_checks::caught<ts::invalid_argument>(
          [&] { ts::ordered_scatter({}, comm, contributions.data(), local, 2, rows.data(), 3, builder); });
    }
    comm_checks::require(rows == std::vector<std::int32_t>(8, -1), "rows were written");
    ts::memory_builder builder(ts::workspace_memory(memory), "workspace");
    const std::int64_t total = ts::ordered_scatter({}, comm, contributions.data(), local, 2, rows.data(), 4, builder);
    const std::int32_t own = 10 * comm.rank();
    comm_checks::require(total == 4, "total = ", total);
    comm_checks::require(rows == std::vector<std::int32_t>{own, own + 1, own + 100, own + 101, own + 200, own + 201,
                                                           own + 300, own + 301},
                         "rows of rank ", comm.rank());
  });
}

}  // namespace
