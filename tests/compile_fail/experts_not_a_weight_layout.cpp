// expect: the third argument must be a weight layout
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The name of an order where a whole weight layout belongs.

#include <tessera/experts/experts.hpp>

namespace ts = tessera;

struct interleaved {
  static constexpr long gate_column(long i, long) { return 2 * i; }
  static constexpr long up_column(long i, long) { return 2 * i + 1; }
};

#if defined(TESSERA_EXPECT_FAILURE)
using layout = interleaved;
#else
using layout = ts::weight_layout::out_in_interleaved;
#endif

int main() {
  const ts::experts<ts::activation::swiglu, ts::precision::fp32, layout> experts(
      {.num_local_experts = 1, .hidden = 2, .intermediate = 3});
  return static_cast<int>(experts.up_width()) - 6;
}
