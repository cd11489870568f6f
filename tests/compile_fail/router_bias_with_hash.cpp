// expect: tessera::router: these policies do not go together
// expect: bias_has_keys
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A bias cannot move a selection by table.

#include <tessera/router/router.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
using selection = ts::select::hash;
#else
using selection = ts::select::top_k;
#endif

template class ts::router<ts::score::sigmoid, selection, ts::weigh::normalized, ts::balance::bias>;

int main() { return 0; }
