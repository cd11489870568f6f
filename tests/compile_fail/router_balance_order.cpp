// expect: tessera::router: the third argument must be a weighing policy
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A balance where the weighing belongs: it was left out.

#include <tessera/router/router.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
using router = ts::router<ts::score::sigmoid, ts::select::top_k, ts::balance::bias>;
#else
using router = ts::router<ts::score::sigmoid, ts::select::top_k, ts::weigh::normalized, ts::balance::bias>;
#endif

static_assert(router::num_losses == 0);

int main() { return 0; }
