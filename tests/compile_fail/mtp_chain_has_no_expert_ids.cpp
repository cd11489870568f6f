// expect: a chain has no expert ids to give to select::external
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A depth of a chain is given tokens, from which a router may look experts up, and no ids of experts.

#include <tessera/comm/comm.hpp>
#include <tessera/layout/layout.hpp>
#include <tessera/moe/moe_layer.hpp>
#include <tessera/mtp/mtp.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
using selection = ts::select::external;
#else
using selection = ts::select::hash;
#endif

using layer = ts::moe_layer<ts::router<ts::score::sigmoid, selection, ts::weigh::normalized>,
                            ts::experts<ts::activation::swiglu, ts::precision::fp32>, ts::layout::block,
                            ts::comm::self<ts::space::host>>;

int main() { return sizeof(ts::mtp::residual_moe<layer>) == 0 ? 1 : 0; }
