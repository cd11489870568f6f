// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// AdamW on local parts of parameters: host half, and what it shares with the device half in `adamw.cuh`.
///
/// With gradient `g` (times `scale`), step `t` from 1 and rate `r` (Loshchilov and Hutter, Decoupled Weight Decay
/// Regularization, 2019; written as `torch.optim.AdamW` computes it):
///
///     m = m + (1 - beta1) (g - m)            p = p (1 - r weight_decay)   (where the parameter decays)
///     v = beta2 v + (1 - beta2) g g          p = p - r / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
///
/// Everything is computed in the type of the masters, from the unrounded new `m` and `v`; moments and parameters are
/// then rounded to their own types. An element's bits depend on nothing but the element, so not on how tensors are
/// sharded.
///
/// Moments in bf16 halve their memory (DeepSeek-V3 trains so, with `beta2 = 0.95`). A bf16 `v` cannot move by less than
/// 1/256 of itself: with `beta2 = 0.999` it stops following small changes.

#include <cmath>
#include <cstdint>
#include <span>
#include <type_traits>

#include <tessera/core/dtype.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/shard/detail/adamw.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard {

/// Coefficients of AdamW; the defaults are PyTorch's.
struct adamw_options {
  double beta1 = 0.9;          ///< Decay of the mean, in [0, 1).
  double beta2 = 0.999;        ///< Decay of the mean square, in [0, 1).
  double epsilon = 1e-8;       ///< Added to the root of the mean square, not negative.
  double weight_decay = 0.01;  ///< Times the rate, for parameters that decay; not negative.
};

/// One tensor of an update: `count` elements at each place.
/// @tparam S Type of the parameter. @tparam A Type of masters and gradients. @tparam M Type of the moments.
template <storage_type S, accumulate_type A, storage_type M>
struct adamw_tensor {
  S* parameter = nullptr;       ///< Written, rounded from the master; null: there is only the master.
  A* master = nullptr;          ///< Read and written; the same address as `parameter` where the types are the same.
  const A* gradient = nullptr;  ///< Read.
  M* exp_avg = nullptr;         ///< `m`, read and written.
  M* exp_avg_sq = nullptr;      ///< `v`, read and written.
  std::int64_t count = 0;       ///< Elements.
  bool decays = true;           ///< Whether weight decay applies.
};

/// What an update reads, in device memory. Zero-filled memory with a rate and a scale is a right start.
struct adamw_control {
  std::int64_t step;   ///< Number of the last update. The kernel counts: an update is number `step + 1`.
  double rate;         ///< Learning rate.
  double scale;        ///< Factor on gradients. Not finite: nothing is updated, and `step` stays.
  std::uint32_t done;  ///< Belongs to the kernel; 0 between launches.
};

/// A tensor in the form that the kernel reads.
template <storage_type S, accumulate_type A, storage_type M>
struct adamw_device_tensor {
  adamw_tensor<S, A, M> tensor;  ///< Pointers in device memory.
  std::int64_t first_tile;       ///< Tiles of the tensors before it.
  bool aligned;                  ///< Whether all its pointers are aligned to 16 bytes.
};

/// A list of tensors in device memory.
template <storage_type S, accumulate_type A, storage_type M>
struct adamw_device_list {
  const adamw_device_tensor<S, A, M>* tensors = nullptr;  ///< `[num_tensors]`, in device memory.
  int num_tensors = 0;                                    ///< How many.
  std::int64_t num_tiles = 0;                             ///< As `describe_adamw` returned.
};

/// What an element needs of options, step and rate.
template <accumulate_type A>
struct adamw_scalars {
  A take1;       ///< `1 - beta1`.
  A beta2;       ///< Decay of the mean square.
  A take2;       ///< `1 - beta2`.
  A epsilon;     ///< Added to the root.
  A keep;        ///< `1 - rate * weight_decay`.
  A step_size;   ///< `rate / (1 - beta1^t)`.
  A correction;  ///< `sqrt(1 - beta2^t)`.
  A scale;       ///< Factor on the gradient.

  /// Computed in double, rounded once. @param options Coefficients. @param step t, from 1. @param rate Learning rate.
  /// @param scale_ Factor on the gradient, such as `clip_factor` gives.
  TESSERA_HD static adamw_scalars make(const adamw_options& options, std::int64_t step, double rate, double scale_) {
    const auto t = static_cast<double>(step);
    return {static_cast<A>(1.0 - options.beta1),
            static_cast<A>(options.beta2),
            static_cast<A>(1.0 - options.beta2),
            static_cast<A>(options.epsilon),
            static_cast<A>(1.0 - rate * options.weight_decay),
            static_cast<A>(rate / (1.0 - pow(options.beta1, t))),
            static_cast<A>(sqrt(1.0 - pow(options.beta2, t))),
            static_cast<A>(scale_)};
  }
};

/// Checks options, step, rate and scale.
/// @param options Coefficients. @param step t, from 1. @param rate Learning rate. @param scale Factor on the gradient.
/// @throws invalid_argument with the value that is out of range.
inline void expect_adamw(const adamw_options& options, std::int64_t step, double rate, double scale) {
  TESSERA_EXPECTS(options.beta1 >= 0 && options.beta1 < 1 && options.beta2 >= 0 && options.beta2 < 1,
                  "adamw: beta1 = " << options.beta1 << " and beta2 = " << options.beta2 << " must be in [0, 1)");
  TESSERA_EXPECTS(options.epsilon >= 0 && options.weight_decay >= 0,
                  "adamw: epsilon = " << options.epsilon << " and weight_decay = " << options.weight_decay
                                      << " must not be negative");
  TESSERA_EXPECTS(step >= 1, "adamw: step = " << step << ", steps count from 1");
  TESSERA_EXPECTS(
      std::isfinite(rate) && rate >= 0 && std::isfinite(scale),
      "adamw: rate = " << rate << " must be finite and not negative, scale = " << scale << " must be finite");
}

/// Updates tensors in place. Host: returns when done; allocates nothing.
/// @param options Coefficients. @param step t, from 1: the number of this update. @param rate Learning rate.
/// @param scale   Factor on the gradients, such as `clip_factor` gives.
/// @param tensors What is updated; tensors do not overlap.
/// @throws invalid_argument for coefficients out of range and for a tensor without data; nothing is changed then.
template <storage_type S, accumulate_type A, storage_type M>
void adamw(host_stream, const adamw_options& options, std::int64_t step, double rate, double scale,
           std::span<const adamw_tensor<S, A, M>> tensors) {
  expect_adamw(options, step, rate, scale);
  for (const adamw_tensor<S, A, M>& t : tensors) {
    TESSERA_EXPECTS(t.count >= 0 && (t.count == 0 || (t.master != nullptr && t.gradient != nullptr &&
                                                      t.exp_avg != nullptr && t.exp_avg_sq != nullptr)),
                    "adamw: tensor " << (&t - tensors.data()) << " of " << t.count
                                     << " elements lacks a master, a gradient or a moment");
  }
  const auto scalars = adamw_scalars<A>::make(options, step, rate, scale);
  for (const adamw_tensor<S, A, M>& t : tensors) {
    adamw_scalars<A> own = scalars;
    if (!t.decays) own.keep = A(1);
    S* parameter = t.parameter;
    if constexpr (std::is_same_v<S, A>) {
      if (parameter == t.master) parameter = nullptr;
    }
    detail::adamw_tensor_on_host(own, t.gradient, t.exp_avg, t.exp_avg_sq, t.master, parameter, t.count);
  }
}

}  // namespace shard
TESSERA_NAMESPACE_END
