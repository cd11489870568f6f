// expect: An owning table is layout::table_storage; its view() is the layout
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The owner of a table where its view belongs.

#include <tessera/layout/layout.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
static_assert(ts::is_expert_layout<ts::layout::table_storage>());
#else
static_assert(ts::is_expert_layout<ts::layout::table>());
#endif

int main() { return 0; }
