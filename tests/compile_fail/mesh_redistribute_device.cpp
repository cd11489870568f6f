// expect: redistribute needs a communicator of host memory
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Redistribution packs on the host: the communicators of a mesh in device memory do not do.

#include <tessera/comm/self.hpp>
#include <tessera/mesh/mesh.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
using memory = ts::space::device;
#else
using memory = ts::space::host;
#endif

void move(ts::mesh_communicators<ts::comm::self<memory>>& comms, const ts::redistribution_plan& plan, const float* in,
          float* out, ts::memory_builder& workspace) {
  ts::redistribute({}, comms, plan, in, out, workspace);
}

int main() { return 0; }
