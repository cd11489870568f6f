// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The sizes that benchmarks run at unless they have a reason for others, and how they fill their inputs.

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include <tessera/core/dtype.hpp>

namespace tessera_bench {

// One grouped product: `groups` times [rows, k] x [k, n].
struct gemm_size {
  std::int64_t groups;
  std::int64_t rows;
  std::int64_t n;
  std::int64_t k;
};
// Sizes of small language models' experts, one small product alone, and large ones.
inline constexpr gemm_size gemm_sizes[] = {
    {32, 8, 64, 64},   {32, 40, 128, 128}, {32, 100, 256, 128}, {1, 64, 64, 64},
    {1, 64, 128, 128}, {1, 256, 256, 256}, {8, 512, 512, 1024}, {1, 512, 1024, 1024},
};

// Normal numbers of the type, the same in every run.
template <class T>
std::vector<T> normal(std::size_t count, float deviation = 1.0f, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0.0f, deviation);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(distribution(random));
  return values;
}

}  // namespace tessera_bench
