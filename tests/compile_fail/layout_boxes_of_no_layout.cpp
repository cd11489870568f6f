// expect: layout_has_num_experts
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A free function names the first requirement that a type misses.

#include <tessera/layout/layout.hpp>

namespace ts = tessera;

int main() {
#if defined(TESSERA_EXPECT_FAILURE)
  return static_cast<int>(ts::expert_ranges(8, 0).size());
#else
  return ts::expert_ranges(ts::layout::block(8, 2), 0).size() == 1 ? 0 : 1;
#endif
}
