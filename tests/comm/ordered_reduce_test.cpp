// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include <tessera/comm/comm.hpp>

#include "../support/comm_checks.hpp"

namespace {

namespace ts = tessera;

// The sum of 12 chunks, six different numbers of ranks, as every rank sees it.
template <class A>
std::vector<std::vector<A>> ordered_over_ranks(std::int64_t count) {
  std::vector<std::vector<A>> all;
  for (const int ranks : {1, 2, 3, 4, 6}) {
    std::vector<std::vector<A>> results(static_cast<std::size_t>(ranks));
    ts::comm::threads::run(ranks, [&](ts::comm::threads& c) {
      const std::int64_t local = 12 / ranks;
      results[static_cast<std::size_t>(c.rank())] = comm_checks::ordered_sum<A>(c, c.rank() * local, local, 12, count);
    });
    all.insert(all.end(), results.begin(), results.end());
  }
  return all;
}

// The same by what the ordered reduction replaces: one partial sum per rank, and an all-reduce.
template <class A>
std::vector<A> plain_over_ranks(int ranks, std::int64_t count) {
  std::vector<A> result(static_cast<std::size_t>(count));
  ts::comm::threads::run(ranks, [&](ts::comm::threads& c) {
    const std::int64_t local = 12 / ranks;
    std::vector<A> sum = comm_checks::chunk_values<A>(c.rank() * local, count);
    for (std::int64_t chunk = 1; chunk < local; ++chunk) {
      const auto next = comm_checks::chunk_values<A>(c.rank() * local + chunk, count);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += next[i];
    }
    c.all_reduce({}, sum.data(), sum.data(), count);
    if (c.rank() == 0) result = sum;
  });
  return result;
}

TEST_CASE("an ordered sum has the same bits for 1, 2, 3, 4 and 6 ranks; a plain one has not") {
  for (const std::int64_t count : {17, 5000}) {  // one exchange, two exchanges
    CAPTURE(count);
    const auto floats = ordered_over_ranks<float>(count);
    for (const auto& result : floats) CHECK(comm_checks::same_bits(result, floats[0]));
    const auto doubles = ordered_over_ranks<double>(count);
    for (const auto& result : doubles) CHECK(comm_checks::same_bits(result, doubles[0]));

    CHECK(comm_checks::same_bits(plain_over_ranks<float>(1, count), floats[0]));
    CHECK_FALSE(comm_checks::same_bits(plain_over_ranks<float>(3, count), floats[0]));
    CHECK_FALSE(comm_checks::same_bits(plain_over_ranks<double>(4, count), doubles[0]));
  }
}

TEST_CASE("a single rank sums its chunks as many ranks do") {
  ts::comm::self<ts::space::host> self;
  const auto expected = comm_checks::ordered_sum<double>(self, 0, 7, 7, 3001);
  ts::comm::threads::run(5, [&](ts::comm::threads& c) {
    const std::int64_t first[] = {0, 0, 3, 3, 4, 7};
    const auto sum =
        comm_checks::ordered_sum<double>(c, first[c.rank()], first[c.rank() + 1] - first[c.rank()], 7, 3001);
    comm_checks::require(comm_checks::same_bits(sum, expected), "rank ", c.rank(), " differs");
  });
}

TEST_CASE("the sum starts with the first chunk, so a sum of negative zeros stays negative") {
  ts::comm::self<ts::space::host> self;
  const std::vector<float> zeros(4, -0.0f);
  std::vector<float> result(2, 1.0f);
  ts::host_buffer workspace(ts::ordered_all_reduce_workspace_bytes<float>(1, 2, 2));
  ts::ordered_all_reduce({}, self, zeros.data(), 2, 2, result.data(), ts::workspace_memory(workspace));
  CHECK(std::signbit(result[0]));
  CHECK(std::signbit(result[1]));
}

TEST_CASE("wrong arguments and a workspace too small are refused, and the result is untouched") {
  ts::comm::self<ts::space::host> self;
  std::vector<double> data(8, 1.0);
  std::vector<double> result(4, 5.0);
  ts::host_buffer buffer(4096);
  const ts::workspace_memory enough(buffer);
  CHECK_THROWS_AS(ts::ordered_all_reduce({}, self, data.data(), -1, 4, result.data(), enough), ts::invalid_argument);
  CHECK_THROWS_AS(ts::ordered_all_reduce({}, self, data.data(), 2, -4, result.data(), enough), ts::invalid_argument);
  CHECK_THROWS_AS(ts::ordered_all_reduce({}, self, static_cast<double*>(nullptr), 2, 4, result.data(), enough),
                  ts::invalid_argument);
  CHECK_THROWS_AS(ts::ordered_all_reduce({}, self, data.data(), 2, 4, data.data() + 1, enough), ts::invalid_argument);
  CHECK_THROWS_AS(ts::ordered_all_reduce({}, self, data.data(), std::int64_t{1} << 40, std::int64_t{1} << 40,
                                         result.data(), enough),
                  ts::invalid_argument);
  ts::memory_builder counting;
  CHECK_THROWS_AS(ts::ordered_all_reduce({}, self, data.data(), 2, 4, result.data(), counting), ts::invalid_argument);
  try {
    ts::ordered_all_reduce({}, self, data.data(), 2, 4, result.data(), ts::workspace_memory(buffer.data(), 4));
    FAIL("nothing was thrown");
  } catch (const ts::invalid_argument& e) {
    CHECK(std::string(e.what()).find("'ordered_all_reduce.chunks'") != std::string::npos);
  }
  CHECK(result == std::vector<double>(4, 5.0));
}

}  // namespace
