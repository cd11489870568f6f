// expect: the second argument must be a precision policy
// expect: precision::bf16
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// An element type where a precision policy belongs.

#include <tessera/experts/experts.hpp>

namespace ts = tessera;

#if defined(TESSERA_EXPECT_FAILURE)
using precision = ts::bfloat16;
#else
using precision = ts::precision::bf16;
#endif

int main() {
  const ts::experts<ts::activation::relu2, precision> experts({.num_local_experts = 1, .hidden = 2, .intermediate = 3});
  return static_cast<int>(experts.up_width()) - 3;
}
