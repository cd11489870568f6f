// expect: tessera::router: these policies do not go together
// expect: normalized_once
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Softmax over the selected experts is normalised already.

#include <tessera/router/router.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
using weigh = ts::weigh::normalized;
#else
using weigh = ts::weigh::raw;
#endif

template class ts::router<ts::score::softmax_selected, ts::select::top_k, weigh>;

int main() { return 0; }
