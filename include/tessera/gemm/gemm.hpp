// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The gemm room: grouped matrix products. `gemm/blas.hpp` stands apart, because it needs a CBLAS.

#include <tessera/gemm/automatic.hpp>
#include <tessera/gemm/hopper_config.hpp>
#include <tessera/gemm/operands.hpp>
#include <tessera/gemm/reference.hpp>
