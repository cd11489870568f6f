// expect: the third argument must be concat::hidden_first
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A struct of the user's where the order of concatenation belongs.

#include <tessera/mtp/mtp.hpp>

namespace ts = tessera;

struct my_order {};
#if defined(TESSERA_EXPECT_FAILURE)
using order = my_order;
#else
using order = ts::mtp::concat::embedding_first;
#endif

using part = ts::mtp::rms_norm<ts::precision::fp32>;  // any row layer can stand in the block's place
using drafts = ts::mtp::chain<part, ts::precision::fp32, order>;

int main() { return sizeof(drafts) == 0 ? 1 : 0; }
