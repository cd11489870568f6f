// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <string>
#include <type_traits>

#include <tessera/comm/comm.hpp>

#include "../support/comm_checks.hpp"

namespace {

namespace ts = tessera;

struct without_split : ts::comm::self<ts::space::host> {
  without_split split(int, int) = delete;
};

struct without_rank {
  using space = ts::space::host;
};

TEST_CASE("the concept tells communicators from what is none") {
  static_assert(ts::host_communicator<ts::comm::self<ts::space::host>>);
  static_assert(ts::device_communicator<ts::comm::self<ts::space::device>>);
  static_assert(ts::host_communicator<ts::comm::threads>);
  static_assert(!ts::communicator<int>);
  static_assert(!ts::communicator<without_rank>);
  static_assert(ts::communicator_has_all_reduce<without_split> && !ts::communicator_has_split<without_split>);
  static_assert(std::is_move_constructible_v<ts::comm::threads> && std::is_move_assignable_v<ts::comm::threads>);
}

TEST_CASE("a single rank passes all checks of a communicator") {
  ts::comm::self<ts::space::host> c;
  CHECK_NOTHROW(comm_checks::check_all(c));
}

TEST_CASE("slices cover the elements once, in order, with lengths that differ by at most one") {
  for (const std::int64_t count : {0, 1, 7, 8, 100}) {
    for (const int parts : {1, 2, 3, 8}) {
      std::int64_t next = 0;
      for (int i = 0; i < parts; ++i) {
        const auto slice = ts::detail::slice_of(count, parts, i);
        CHECK(slice.begin == next);
        CHECK(slice.length >= count / parts);
        CHECK(slice.length <= count / parts + 1);
        next += slice.length;
      }
      CHECK(next == count);
    }
  }
}

TEST_CASE("integer sums wrap around instead of being undefined") {
  std::int32_t into[2] = {2147483647, -2147483647 - 1};
  const std::int32_t from[2] = {1, -1};
  ts::detail::reduce_into(ts::reduce_op::sum, into, from, 2);
  CHECK(into[0] == -2147483647 - 1);
  CHECK(into[1] == 2147483647);
}

}  // namespace
