// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The sizes of a layer that the GPU benchmarks measure.

#include <cstdint>

namespace tessera_bench {

struct layer_shape {
  const char* name;
  std::int64_t T, d, n;
  int E, K;
  std::int64_t projected = 0;  // width of the products that stand for attention, where there are any
};

}  // namespace tessera_bench
