// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of AdamW: one launch updates a list of tensors in place.
///
/// An element moves 30 bytes with fp32 moments and a bf16 parameter (gradient 4, master 8, moments 16, parameter 2), 22
/// with bf16 moments; the kernel is bound by them. Nothing here allocates, synchronises or reads device memory on the
/// host. Step number, rate and factor are device scalars, so a CUDA graph captured once sees new values. An element's
/// bits depend on nothing but the element: not on alignment, not on how tensors are cut.

#include <cstdint>
#include <span>

#include <cuda_runtime.h>

#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/shard/adamw.hpp>
#include <tessera/shard/detail/device/adamw.cuh>

TESSERA_NAMESPACE_BEGIN
namespace shard {

/// Writes the form that the kernel reads, for the caller to copy to the device once.
/// @param tensors Pointers in device memory; tensors do not overlap.
/// @param out     `[tensors.size()]`, in host memory.
/// @return the number of tiles of all tensors.
/// @throws invalid_argument for a tensor without data.
template <storage_type S, accumulate_type A, storage_type M>
std::int64_t describe_adamw(std::span<const adamw_tensor<S, A, M>> tensors, adamw_device_tensor<S, A, M>* out) {
  std::int64_t tiles = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const adamw_tensor<S, A, M>& t = tensors[i];
    TESSERA_EXPECTS(t.count >= 0 && (t.count == 0 || (t.master != nullptr && t.gradient != nullptr &&
                                                      t.exp_avg != nullptr && t.exp_avg_sq != nullptr)),
                    "adamw: tensor " << i << " of " << t.count << " elements lacks a master, a gradient or a moment");
    const std::uintptr_t together =
        reinterpret_cast<std::uintptr_t>(t.parameter) | reinterpret_cast<std::uintptr_t>(t.master) |
        reinterpret_cast<std::uintptr_t>(t.gradient) | reinterpret_cast<std::uintptr_t>(t.exp_avg) |
        reinterpret_cast<std::uintptr_t>(t.exp_avg_sq);
    out[i] = {t, tiles, together % 16 == 0};
    tiles += (t.count + detail::adamw_tile - 1) / detail::adamw_tile;
  }
  return tiles;
}

/// Updates all tensors in place with one launch. Enqueues, does not synchronise; may be captured.
/// @param stream  Where the work is enqueued.
/// @param options Coefficients; fixed in a captured graph.
/// @param control One, in device memory: step, rate and scale. `step` is one higher afterwards.
/// @param list    What is updated.
/// @throws invalid_argument for coefficients out of range, cuda_error if the launch fails.
template <storage_type S, accumulate_type A, storage_type M>
void adamw(device_stream stream, const adamw_options& options, adamw_control* control,
           const adamw_device_list<S, A, M>& list) {
  expect_adamw(options, 1, 0.0, 1.0);
  TESSERA_EXPECTS(control != nullptr && list.num_tensors >= 0 && (list.num_tensors == 0 || list.tensors != nullptr),
                  "adamw needs a control block and the list of its " << list.num_tensors << " tensors");
  detail::launch_adamw<S, A, M>(stream, options, control, list);
}

}  // namespace shard
TESSERA_NAMESPACE_END
