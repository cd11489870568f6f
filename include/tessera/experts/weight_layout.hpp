// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// How the weights of experts lie in memory. Checkpoints of the same architecture differ in it; experts read each
/// layout in place, nothing is ever repacked.

#include <concepts>
#include <cstdint>

#include <tessera/core/config.hpp>
#include <tessera/gemm/operands.hpp>

TESSERA_NAMESPACE_BEGIN

/// Weight layouts of experts.
namespace weight_layout {

/// Which extent of a projection's matrix is contiguous.
enum class orientation {
  out_in,  ///< `[outputs, inputs]`, as `torch.nn.Linear` has it.
  in_out,  ///< `[inputs, outputs]`, as GPT-OSS and Llama 4 have it.
};

/// Where the gate and the up outputs of a gated expert stand among the `2 * intermediate` outputs of its
/// up-projection.
enum class gate_order {
  concatenated,  ///< All gates, then all ups.
  interleaved,   ///< Gate, up, gate, up, ... (GPT-OSS).
};

/// A weight layout: strides of both projections, and the columns of gate and up.
/// @tparam Orientation Of both projections. @tparam Order Of the up-projection's outputs; without meaning for plain
/// activations.
template <orientation Orientation, gate_order Order>
struct policy {
  /// Up-projections as logical `[width, hidden]` per expert.
  /// @param data First element of the first expert's matrix.
  /// @param width Outputs U: `intermediate`, or twice that for gated activations.
  /// @param hidden Inputs d.
  /// @param expert_stride Elements from one expert to the next, 0 for `width * hidden`.
  template <class T>
  TESSERA_HD static constexpr gemm::group_operand<T> up(T* data, std::int64_t width, std::int64_t hidden,
                                                        std::int64_t expert_stride) {
    return matrix(data, width, hidden, expert_stride);
  }

  /// Down-projections as logical `[hidden, intermediate]` per expert.
  /// @param data First element of the first expert's matrix.
  /// @param hidden Outputs d.
  /// @param intermediate Inputs n.
  /// @param expert_stride Elements from one expert to the next, 0 for `hidden * intermediate`.
  template <class T>
  TESSERA_HD static constexpr gemm::group_operand<T> down(T* data, std::int64_t hidden, std::int64_t intermediate,
                                                          std::int64_t expert_stride) {
    return matrix(data, hidden, intermediate, expert_stride);
  }

  /// Column of gate `i` among the up-projection's outputs. @param i In `[0, intermediate)`. @param intermediate n.
  TESSERA_HD static constexpr std::int64_t gate_column(std::int64_t i, [[maybe_unused]] std::int64_t intermediate) {
    return Order == gate_order::interleaved ? 2 * i : i;
  }

  /// Column of up value `i` among the up-projection's outputs. @param i In `[0, intermediate)`. @param intermediate n.
  TESSERA_HD static constexpr std::int64_t up_column(std::int64_t i, [[maybe_unused]] std::int64_t intermediate) {
    return Order == gate_order::interleaved ? 2 * i + 1 : intermediate + i;
  }

 private:
  template <class T>
  TESSERA_HD static constexpr gemm::group_operand<T> matrix(T* data, std::int64_t outputs, std::int64_t inputs,
                                                            std::int64_t expert_stride) {
    const std::int64_t stride = expert_stride == 0 ? outputs * inputs : expert_stride;
    if constexpr (Orientation == orientation::out_in)
      return {data, stride, inputs, 1};
    else
      return {data, stride, 1, outputs};
  }
};

/// `[U, d]` and `[d, n]`, gates before ups: DeepSeek, Qwen, Mixtral with their gate and up matrices stacked.
using out_in_concatenated = policy<orientation::out_in, gate_order::concatenated>;
/// `[U, d]` and `[d, n]`, gate and up in turn.
using out_in_interleaved = policy<orientation::out_in, gate_order::interleaved>;
/// `[d, U]` and `[n, d]`, gates before ups: Llama 4.
using in_out_concatenated = policy<orientation::in_out, gate_order::concatenated>;
/// `[d, U]` and `[n, d]`, gate and up in turn: GPT-OSS.
using in_out_interleaved = policy<orientation::in_out, gate_order::interleaved>;

}  // namespace weight_layout

/// `T::up(float*, width, hidden, expert_stride)` gives the up-projections' operand.
template <class T>
concept weight_layout_has_up = requires(float* data, std::int64_t n) {
  { T::up(data, n, n, n) } -> std::same_as<gemm::group_operand<float>>;
};

/// `T::down(float*, hidden, intermediate, expert_stride)` gives the down-projections' operand.
template <class T>
concept weight_layout_has_down = requires(float* data, std::int64_t n) {
  { T::down(data, n, n, n) } -> std::same_as<gemm::group_operand<float>>;
};

/// `T::gate_column(i, intermediate)` exists.
template <class T>
concept weight_layout_has_gate_column = requires(std::int64_t n) {
  { T::gate_column(n, n) } -> std::same_as<std::int64_t>;
};

/// `T::up_column(i, intermediate)` exists.
template <class T>
concept weight_layout_has_up_column = requires(std::int64_t n) {
  { T::up_column(n, n) } -> std::same_as<std::int64_t>;
};

/// A `weight_layout::policy`, or a type with the same members.
template <class T>
concept weight_layout_policy = weight_layout_has_up<T> && weight_layout_has_down<T> &&
    weight_layout_has_gate_column<T> && weight_layout_has_up_column<T>;

TESSERA_NAMESPACE_END
