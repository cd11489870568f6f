// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// All rooms with their device halves, for `.cu` files.

#include <tessera/comm/load_kernels.cuh>
#include <tessera/comm/ordered_reduce.cuh>
#include <tessera/comm/self.cuh>
#include <tessera/dispatch/dispatch.cuh>
#include <tessera/dispatch/host_sized.cuh>
#include <tessera/dispatch/symmetric.cuh>
#include <tessera/experts/expert_mlp.cuh>
#include <tessera/gemm/automatic.cuh>
#include <tessera/gemm/hopper.cuh>
#include <tessera/gemm/portable.cuh>
#include <tessera/mesh/redistribute.cuh>
#include <tessera/moe/moe_layer.cuh>
#include <tessera/pipeline/mirrored_gradients.cuh>
#include <tessera/pipeline/moe_chunk.cuh>
#include <tessera/pipeline/overlap.cuh>
#include <tessera/router/router.cuh>
#include <tessera/shard/adamw.cuh>
#include <tessera/shard/fully_sharded.cuh>
#include <tessera/shard/reduction.cuh>
#include <tessera/tessera.hpp>

#if !defined(__CUDACC__)
#error "tessera.cuh is for CUDA files, compiled by nvcc; other files include tessera.hpp."
#endif
