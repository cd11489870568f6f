// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of the layer. On one GPU of compute capability 8.0 or later, made for 9.0: instantiate `moe_layer` with
/// `comm::self<space::device>` in a `.cu` file that includes this. Between GPUs of compute capability 9.0: with
/// `comm::symmetric`, in one that includes `comm/symmetric.cuh` too; calls of layers that share a state, or a slot of
/// the communicator, are enqueued one after another (but `backward_weights`: see `moe_layer`). Wherever NCCL reaches:
/// with `comm::nccl`, or with `comm::hosts<comm::nccl>` where several GPUs share a host, in a file that includes
/// `comm/nccl.cuh`.
///
/// Calls enqueue on the stream and return; they neither allocate, synchronise nor read device memory, and may be
/// captured in a CUDA graph, whose replays are right when the routing changes. **Sized on the host** they wait: over
/// `comm::nccl`, `comm::hosts`, and `comm::symmetric` with `dispatch_options::host_sized`, `forward` and
/// `backward_input` each wait once until their stream has come to the counts of what travels, at most for the
/// communicator's timeout, and cannot be captured. Results are the same bits in every run. What kernels find wrong
/// (logits that are not finite, ids out of range) is written to the state's `status`: copy it to the host when it suits
/// and ask `expect_ok`.

#include <tessera/comm/self.cuh>
#include <tessera/dispatch/dispatch.cuh>
#include <tessera/experts/expert_mlp.cuh>
#include <tessera/moe/detail/device/layer_device.cuh>
#include <tessera/moe/moe_layer.hpp>
#include <tessera/router/router.cuh>
