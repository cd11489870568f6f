// expect: A class derived from tessera::comm::collectives needs int rank() const
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A communicator on the collectives base class that cannot exchange messages.

#include <span>

#include <tessera/comm/collectives.hpp>

namespace ts = tessera;

class lonely : public ts::comm::collectives<lonely> {
 public:
  int rank() const { return 0; }
  int size() const { return 1; }
  lonely split(int, int) { return *this; }
#if !defined(TESSERA_EXPECT_FAILURE)
  void exchange_remote(std::span<const ts::transfer>, std::span<const ts::transfer>, const char*) {}
#endif
};

int main() {
  lonely comm;
  comm.barrier({});
  return 0;
}
