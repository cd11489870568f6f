// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Ordered sums in device memory, over comm::nccl with one thread per GPU and on a rank alone, against the sum by
// definition.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include <tessera/comm/nccl.cuh>
#include <tessera/comm/ordered_reduce.cuh>
#include <tessera/comm/self.cuh>
#include <tessera/comm/threads.hpp>

#include "../support/comm_checks.hpp"

namespace {

namespace ts = tessera;
using comm_checks::require;
using comm_checks::same_bits;
using device_test::on_ranks;
using device_test::rank_counts;
using device_test::rank_memory;
using nccl = ts::comm::nccl;

// The ordered sums of `Comm` in device memory against the sum by definition, bit by bit.
template <class A, class Comm>
void check_ordered(Comm& c, rank_memory& device, const std::function<void()>& wait) {
  const auto ranks = static_cast<std::size_t>(c.size());
  for (const std::int64_t total : {0, 1, 5, 12}) {
    for (const std::int64_t count : {0, 1, 3, 100, 2501}) {
      for (int division = 0; division < 3; ++division) {
        std::vector<std::int64_t> chunks(ranks, 0);
        for (std::int64_t chunk = 0; chunk < total; ++chunk) {
          if (division == 0) ++chunks[static_cast<std::size_t>(chunk * c.size() / total)];
          if (division == 1) ++chunks[ranks - 1];
          if (division == 2) ++chunks[static_cast<std::size_t>(chunk == 2 ? 0 : (total - chunk) % c.size())];
        }
        std::int64_t first = 0;
        for (int r = 0; r < c.rank(); ++r) first += chunks[static_cast<std::size_t>(r)];
        const std::int64_t local = chunks[static_cast<std::size_t>(c.rank())];
        const auto sum_by_definition = [&](std::int64_t length) {
          std::vector<A> sum(static_cast<std::size_t>(length), A{0});
          for (std::int64_t chunk = 0; chunk < total; ++chunk) {
            const auto next = comm_checks::chunk_values<A>(chunk, length);
            for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = chunk == 0 ? next[i] : sum[i] + next[i];
          }
          return sum;
        };
        const auto contributions = [&](std::int64_t length) {
          std::vector<A> all;
          for (std::int64_t chunk = first; chunk < first + local; ++chunk) {
            const auto next = comm_checks::chunk_values<A>(chunk, length);
            all.insert(all.end(), next.begin(), next.end());
          }
          return all;
        };
        const auto workspace = [&](std::size_t bytes) {
          auto* start = device.take<std::byte>(static_cast<std::int64_t>(bytes + ts::memory_alignment));
          const std::size_t gap = ts::memory_alignment - reinterpret_cast<std::uintptr_t>(start) % ts::memory_alignment;
          return ts::memory_builder(ts::workspace_memory(start + gap, bytes), "the test's workspace");
        };
        std::vector<A> got(static_cast<std::size_t>(count), A{-1});
        {
          device.clear();
          const auto mine = contributions(count);
          const A* in = device.put(mine.data(), static_cast<std::int64_t>(mine.size()));
          A* out = device.put(got.data(), count);
          auto memory = workspace(ts::ordered_all_reduce_workspace_bytes<A>(c.size(), total, count));
          ts::ordered_all_reduce(device.stream(), c, in, std::span<const std::int64_t>(chunks), count, out, memory);
          wait();
          device.get(got.data(), out, count);
          require(same_bits(got, sum_by_definition(count)), "ordered_all_reduce of ", total, " chunks of ", count,
                  ", division ", division);
        }
        {
          device.clear();
          const std::int64_t whole = count * c.size();
          const auto mine = contributions(whole);
          const A* in = device.put(mine.data(), static_cast<std::int64_t>(mine.size()));
          A* out = device.put(got.data(), count);
          auto memory = workspace(ts::ordered_reduce_scatter_workspace_bytes<A>(c.size(), total, count));
          ts::ordered_reduce_scatter(device.stream(), c, in, std::span<const std::int64_t>(chunks), count, out, memory);
          wait();
          device.get(got.data(), out, count);
          const auto sum = sum_by_definition(whole);
          const std::vector<A> row(sum.begin() + count * c.rank(), sum.begin() + count * (c.rank() + 1));
          require(same_bits(got, row), "ordered_reduce_scatter of ", total, " chunks of ", count, ", division ",
                  division);
        }
      }
    }
  }
}

TEST_CASE("ordered sums have the bits of the sum by definition, however chunks are spread") {
  for (const int ranks : rank_counts()) {
    CAPTURE(ranks);
    CHECK_NOTHROW(on_ranks(ranks, [](ts::comm::threads& t) {
      rank_memory device;
      nccl c = nccl::create(t);
      check_ordered<float>(c, device, [&] { c.wait(device.stream()); });
      check_ordered<double>(c, device, [&] { c.wait(device.stream()); });
    }));
  }
  rank_memory device;
  ts::comm::self<ts::space::device> alone;
  CHECK_NOTHROW(check_ordered<float>(alone, device, [] { device_test::synchronize(); }));
}

}  // namespace

#endif
