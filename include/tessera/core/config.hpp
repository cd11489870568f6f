// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Compiler requirements, the versioned namespace and the decorations of shared functions.

#include <tessera/core/version.hpp>

#if !defined(__cplusplus) || __cplusplus < 202002L
#error "Tessera needs C++20: compile with -std=c++20 or later."
#endif

/// Opens `tessera` and its inline namespace, which carries the version and nothing else: an architecture list there
/// would give two translation units of one program different types.
#define TESSERA_NAMESPACE_BEGIN \
  namespace tessera {           \
  inline namespace v0_1 {
/// Closes what `TESSERA_NAMESPACE_BEGIN` opened.
#define TESSERA_NAMESPACE_END \
  }                           \
  }

/// Marks a function that host and device code share. It only decorates: no behaviour depends on it.
#if defined(__CUDACC__)
#define TESSERA_HD __host__ __device__
#else
#define TESSERA_HD
#endif

/// 1 while a shared function is compiled for the device, where it may use the hardware's own instructions for the same
/// meaning; 0 in all host code.
#if defined(__CUDA_ARCH__)
#define TESSERA_DEVICE_PASS 1
#else
#define TESSERA_DEVICE_PASS 0
#endif

/// `restrict` where the compiler has it.
#define TESSERA_RESTRICT __restrict__
