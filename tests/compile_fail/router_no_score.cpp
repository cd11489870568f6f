// expect: tessera::router: the first argument must be a score policy
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A weighing where a score belongs.

#include <tessera/router/router.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
using score = ts::weigh::raw;
#else
using score = ts::score::softmax;
#endif

template class ts::router<score, ts::select::top_k, ts::weigh::normalized>;

int main() { return 0; }
