// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// What of comm::nccl needs neither NCCL nor a GPU: its type. tests/gpu/nccl_test.cu has the rest.

#include <doctest/doctest.h>

#include <type_traits>

#include <tessera/comm/nccl.hpp>

namespace {

namespace ts = tessera;

TEST_CASE("a plain compiler sees comm::nccl as a communicator of device memory") {
  using nccl = ts::comm::nccl;
  static_assert(ts::device_communicator<nccl> && !ts::host_communicator<nccl>);
  static_assert(std::is_copy_constructible_v<nccl> && std::is_nothrow_move_constructible_v<nccl>);
  static_assert(!std::is_default_constructible_v<nccl>);
  static_assert(!std::is_convertible_v<ncclComm*, nccl>, "wrapping is asked for by name");
  const ts::comm::nccl_options options;
  CHECK(options.timeout.count() > 0);
  CHECK_FALSE(options.abort_wrapped);
}

}  // namespace
