// expect: sub_communicator needs a communicator
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Something that only splits is no communicator.

#include <tessera/comm/self.hpp>
#include <tessera/mesh/mesh.hpp>

namespace ts = tessera;

struct splits_only {
  int rank() const { return 0; }
  int size() const { return 1; }
  splits_only split(int, int) { return *this; }
};

#if defined(TESSERA_EXPECT_FAILURE)
using group = splits_only;
#else
using group = ts::comm::self<ts::space::host>;
#endif

int main() {
  group world;
  return ts::sub_communicator(world, ts::mesh{{"dp", 1}}, "dp").rank();
}
