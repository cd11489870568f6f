// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// All rooms with their device halves, for `.cu` files.

#include <tessera/tessera.hpp>

#if !defined(__CUDACC__)
#error "tessera.cuh is for CUDA files, compiled by nvcc; other files include tessera.hpp."
#endif
