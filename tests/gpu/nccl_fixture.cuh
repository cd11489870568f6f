// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The main function of a test of comm::nccl, and its ranks. Without a GPU or without NCCL it says so and exits with 77,
// which CTest reports as skipped. Include doctest with DOCTEST_CONFIG_IMPLEMENT before it, and put the test between
// `#if __has_include(<nccl.h>)` and `#endif`.

#include <cstdio>

#if !__has_include(<nccl.h>)
int main() {
  std::printf("skipped: NCCL's header was not found\n");
  return 77;
}
#else

#include <doctest/doctest.h>
#undef DOCTEST_CONFIG_IMPLEMENT  // the main function is the one below

#include <string>

#include <cuda_runtime.h>
#include <nccl.h>

#include <tessera/comm/nccl.cuh>

#include "gpu_ranks.cuh"

int main(int argc, char** argv) {
  using device_test::skips;
  if (skips(device_test::no_device()) || skips(tessera::detail::nccl::version_problem()))
    return device_test::skip_return_code;
  int version = 0;
  static_cast<void>(ncclGetVersion(&version));
  std::printf("%d GPUs, NCCL %s\n", device_test::num_gpus(), tessera::detail::nccl::version_text(version).c_str());
  return doctest::Context(argc, argv).run();
}

#endif
