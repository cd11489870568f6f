// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A user's program, built in every way that users build: it routes a few tokens and sums over two ranks.

#include <cstdint>
#include <cstdio>
#include <vector>

#include <tessera/tessera.hpp>

namespace ts = tessera;

int main() {
  std::vector<float> sums(2);
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
    const float mine = static_cast<float>(comm.rank() + 1);
    comm.all_reduce(ts::host_stream(), &mine, &sums[static_cast<std::size_t>(comm.rank())], 1);
  });
  const ts::layout::block layout(8, 2);
  const bool right = sums[0] == 3.0f && sums[1] == 3.0f && layout.owner(7, 0).rank == 1;
  std::printf("tessera %d.%d.%d: %s\n", TESSERA_VERSION_MAJOR, TESSERA_VERSION_MINOR, TESSERA_VERSION_PATCH,
              right ? "works" : "is wrong");
  return right ? 0 : 1;
}
