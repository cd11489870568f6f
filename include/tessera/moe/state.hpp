// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a layer remembers between calls: caller-owned, named for checkpoints and metrics.

#include <array>
#include <cstdint>
#include <string_view>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/device_status.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/memory.hpp>

TESSERA_NAMESPACE_BEGIN

/// One array of a state.
struct named_array {
  std::string_view name;   ///< Stable: checkpoints use it.
  std::string_view dtype;  ///< As `dtype_name` spells it.
  std::int64_t rows;       ///< First extent.
  std::int64_t cols;       ///< Second extent, 1 for vectors.
  void* data;              ///< `rows * cols` elements in the communicator's space; null when there are none.
};

/// Words that kernels of one call share their work by; 0 between calls. Calls of a layer that run at the same time, as
/// two micro-batches on two slots do, have their own.
struct alignas(128) call_counters {
  std::uint32_t barrier;          ///< Of the kernel that sorts a routing.
  std::int32_t tile_counters[8];  ///< Of products: two of routed and two of shared experts, then the same of their
                                  ///< weights' gradients, which may be computed beside other calls.
};

/// The state of one layer: a view of caller-owned memory in the communicator's space.
///
/// Two micro-batches that overlap are two layers over two slots of a communicator with the same state memory: what
/// counts over a step adds up over both; `losses` are those of the last pass, and a mixture where passes overlap.
/// @tparam A Type of losses.
template <class A>
struct layer_state {
  float* bias = nullptr;                ///< `[E]` of `balance::bias`; null without it. Moved by `end_step`.
  std::int64_t* load = nullptr;         ///< `[E]` pairs this rank's tokens chose in `pass::train` since `end_step`.
  std::int64_t* global_load = nullptr;  ///< `[E]` sum of `load` over all ranks, as of the last `end_step`.
  float* bias_rate = nullptr;           ///< One: step of the bias in `end_step`; may be changed between calls.
  /// `[num_losses]`, in the order of the router's balances; may be changed between calls.
  float* coefficients = nullptr;
  float* loss_scale = nullptr;  ///< One: factor of the losses' gradients. 1 after `reset_state`.
  /// `[max_chunks, num_losses]` of the last `train` or `recompute` pass, coefficients included. A pass over T tokens
  /// writes its first `num_chunks(T, chunk_tokens)` rows alone: the rows behind are those of earlier, longer passes,
  /// and do not belong to a sum.
  A* losses = nullptr;
  std::int64_t* dropped_by_capacity = nullptr;  ///< One: pairs of this rank since `reset_state`.
  std::int64_t* dropped_by_bound = nullptr;  ///< One: pairs of this rank since `reset_state`; between GPUs pairs that
                                             ///< this rank's bound dropped.
  std::int64_t* most_received_pairs = nullptr;  ///< One: largest number of pairs this rank has computed in one call.

  /// One: what a kernel found wrong since `reset_state`; see `expect_ok`. Host: stays clear.
  device_status* status = nullptr;
  call_counters* counters = nullptr;      ///< `[comm::max_symmetric_slots]`, one of each slot; 0 after `reset_state`.
  std::uint32_t* barrier = nullptr;       ///< One of this slot: belongs to the router's kernels.
  std::int32_t* tile_counters = nullptr;  ///< `call_counters::tile_counters` of this slot: belong to products' kernels.

  int num_experts = 0;          ///< E.
  int num_losses = 0;           ///< Balances that are losses.
  std::int64_t max_chunks = 0;  ///< Rows of `losses`.

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param num_experts E. @param has_bias With
  /// `balance::bias`. @param num_losses Balances that are losses. @param max_chunks Chunks in one call.
  static layer_state layout(memory_builder& builder, int num_experts, bool has_bias, int num_losses,
                            std::int64_t max_chunks) {
    layer_state s;
    s.bias = builder.take<float>("bias", has_bias ? num_experts : 0);
    s.load = builder.take<std::int64_t>("load", num_experts);
    s.global_load = builder.take<std::int64_t>("global_load", num_experts);
    s.bias_rate = builder.take<float>("bias_rate", 1);
    s.coefficients = builder.take<float>("coefficients", num_losses);
    s.loss_scale = builder.take<float>("loss_scale", 1);
    s.losses = builder.take<A>("losses", max_chunks * num_losses);
    s.dropped_by_capacity = builder.take<std::int64_t>("dropped_by_capacity", 1);
    s.dropped_by_bound = builder.take<std::int64_t>("dropped_by_bound", 1);
    s.most_received_pairs = builder.take<std::int64_t>("most_received_pairs", 1);
    s.status = builder.take<device_status>("status", 1);
    s.counters = builder.take<call_counters>("counters of calls", comm::max_symmetric_slots);
    s.use_slot(0);
    s.num_experts = num_experts;
    s.num_losses = num_losses;
    s.max_chunks = max_chunks;
    return s;
  }

  /// Takes the counters of a slot. @param slot Of the communicator, in `[0, comm::max_symmetric_slots)`.
  void use_slot(int slot) {
    if (counters == nullptr) return;  // sizes are being counted
    barrier = &counters[slot].barrier;
    tile_counters = counters[slot].tile_counters;
  }

  /// The arrays of checkpoints and metrics, with their names.
  std::array<named_array, 10> arrays() const {
    const auto entry = [](std::string_view name, auto* data, std::int64_t rows, std::int64_t cols) {
      return named_array{name, dtype_name<std::remove_pointer_t<decltype(data)>>(), rows, cols, data};
    };
    return {entry("bias", bias, bias == nullptr ? 0 : num_experts, 1),
            entry("load", load, num_experts, 1),
            entry("global_load", global_load, num_experts, 1),
            entry("bias_rate", bias_rate, 1, 1),
            entry("coefficients", coefficients, num_losses, 1),
            entry("loss_scale", loss_scale, 1, 1),
            entry("losses", losses, max_chunks, num_losses),
            entry("dropped_by_capacity", dropped_by_capacity, 1, 1),
            entry("dropped_by_bound", dropped_by_bound, 1, 1),
            entry("most_received_pairs", most_received_pairs, 1, 1)};
  }
};

TESSERA_NAMESPACE_END
