// expect: tessera::shard::fully_sharded needs a reduction
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A combine policy where a reduction belongs.

#include <tessera/comm/self.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/shard/fully_sharded.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
using summed = ts::combine::ordered;
#else
using summed = ts::reduction::ordered;
#endif

template class ts::shard::fully_sharded<ts::precision::bf16, float, summed, ts::comm::self<ts::space::host>>;

int main() { return 0; }
