// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the two units give each other: sizes and types of the library, as each of them sees the library.

#include <cstddef>
#include <vector>

#if defined(__CUDACC__)
#include <all_headers.cuh>
#else
#include <all_headers.hpp>
#endif

#define TESSERA_TEST_EXPORT __attribute__((visibility("default")))

TESSERA_TEST_EXPORT std::vector<std::size_t> sizes_in_first();
TESSERA_TEST_EXPORT std::vector<std::size_t> sizes_in_second();
TESSERA_TEST_EXPORT float first_element(tessera::matrix_view<const tessera::bfloat16> view);
TESSERA_TEST_EXPORT void throw_in_first();
TESSERA_TEST_EXPORT bool second_catches_first();

// Internal linkage: each unit has its own, made from its own view of the headers.
static inline std::vector<std::size_t> sizes_here() {
  return {sizeof(tessera::bfloat16),     sizeof(tessera::matrix_view<float>),
          sizeof(tessera::saved_memory), sizeof(tessera::memory_builder),
          sizeof(tessera::host_stream),  sizeof(tessera::device_stream),
          sizeof(tessera::expert_rows),  sizeof(tessera::comm_error),
          sizeof(tessera::log_sink),     alignof(tessera::memory_builder),
          sizeof(tessera::shape),        TESSERA_VERSION};
}
