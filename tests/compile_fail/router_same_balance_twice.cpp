// expect: tessera::router: these policies do not go together
// expect: balances_differ
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Each balance at most once.

#include <tessera/router/router.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
using second = ts::balance::z_loss;
#else
using second = ts::balance::switch_loss;
#endif

template class ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized, ts::balance::z_loss, second>;

int main() { return 0; }
