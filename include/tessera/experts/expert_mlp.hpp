// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The expert: up-projection, activation, down-projection over rows sorted by expert; forward, and a backward in two
/// parts that may run at different times.

#include <concepts>
#include <cstdint>

#include <tessera/core/expert_rows.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/precision.hpp>
#include <tessera/core/sm_share.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/experts/activation.hpp>
#include <tessera/experts/expert_weights.hpp>
#include <tessera/experts/weight_layout.hpp>
#include <tessera/gemm/automatic.hpp>

TESSERA_NAMESPACE_BEGIN

/// The experts of one rank. For expert row `i` of expert `e`, with `x = X[gather[i]]` (times the pair's weight, rounded
/// to storage, where weights apply to the input):
///
///     H[i] = x W1_e^T + b1_e      A[i] = act(H[i])      Y[i] = A[i] W2_e^T + b2_e
///
/// Only H is kept for backward. The weight of a pair needs no Y, because
/// `dL/dweight = <dY, Y> = <dY W2, A> + <dY, b2>` (SonicMoE, arXiv 2512.14080).
///
/// Sums are in `Precision::accumulate`; H, A, dH and dX are rounded to storage once. With `gemm::reference` a row's
/// bits depend on that row and its expert alone, and a weight gradient's on the sequence of its expert's rows.
///
/// The object holds sizes and options, no memory: what lives how long is carved from the caller's buffers by the
/// `carve_` members, which also count bytes. Host overloads return when they are done; device overloads enqueue,
/// neither allocate nor synchronise, and are defined in `expert_mlp.cuh`. Const members may run concurrently on
/// different buffers.
///
/// @tparam Activation Between the projections; models `activation_policy`.
/// @tparam Precision Element types; models `precision_policy`.
/// @tparam WeightLayout How weights lie; models `weight_layout_policy`.
/// @tparam Gemm Backend of the grouped products: `gemm::automatic`; in host memory `gemm::reference` or `gemm::blas`,
/// in device memory `gemm::hopper::backend` or `gemm::portable::backend`.
template <class Activation, class Precision, class WeightLayout = weight_layout::out_in_concatenated,
          class Gemm = gemm::automatic>
class experts {
  static_assert(precision_policy<Precision>,
                "experts: the second argument must be a precision policy (members storage, accumulate, gradient): "
                "precision::bf16, precision::bf16_gradients, precision::fp32, precision::fp64, or your own "
                "precision::policy<...>");
  static_assert(
      activation_policy<Activation, typename Precision::accumulate>,
      "experts: the first argument must be an activation: a struct with options, a static constexpr bool gated, "
      "and static forward and backward (gated: forward(gate, up, options), backward(gate, up, dout, dgate, dup, "
      "options); plain: forward(value, options), backward(value, dout, options)). Models: activation::swiglu, "
      "geglu, geglu_tanh, clamped_swiglu, relu2, gelu");
  static_assert(weight_layout_policy<WeightLayout>,
                "experts: the third argument must be a weight layout (static up, down, gate_column, up_column): "
                "weight_layout::out_in_concatenated, out_in_interleaved, in_out_concatenated, in_out_interleaved");

 public:
  using storage = typename Precision::storage;        ///< Element of activations and weights.
  using accumulate = typename Precision::accumulate;  ///< Element of sums and pair weights.
  using gradient = typename Precision::gradient;      ///< Element of weight gradients.
  using activation_type = Activation;                 ///< The activation.
  using precision_type = Precision;                   ///< The precision.
  using layout_type = WeightLayout;                   ///< The weight layout.
  using gemm_type = Gemm;                             ///< The backend, as given.
  using options = typename Activation::options;       ///< Options of the activation.
  using weights = expert_weights<const storage>;      ///< What forward and `backward_input` read.
  using gradients = expert_weights<gradient>;         ///< What `backward_weights` writes.

  /// The same experts with gradients in `accumulate`: shared experts are replicated, and contributions to their
  /// gradients are summed over ranks before they are rounded.
  using shared = experts<Activation, precision::policy<storage, accumulate, accumulate>, WeightLayout, Gemm>;

  /// Whether the activation takes a gate.
  static constexpr bool gated = Activation::gated;

  /// From forward to `backward_weights`.
  struct saved_view {
    matrix_view<storage> h;  ///< `[max_pairs, U]`: H; `backward_input` writes dH over it.
  };
  /// From `backward_input` to `backward_weights`.
  struct deferred_view {
    matrix_view<storage> activation;  ///< `[max_pairs, n]`: A, times the pair's weight where it applies to the output.
  };
  /// During forward.
  struct forward_scratch {
    matrix_view<storage> activation;  ///< `[max_pairs, n]`: A.
    matrix_view<storage> input;       ///< `[max_pairs, d]`: weighted inputs; empty for weights on the output.
    /// Device: two words that are zero between calls, one call at a time; see `gemm::hopper::launch_options`. Or null.
    std::int32_t* tile_counter = nullptr;
    sm_share share = {};  ///< Device: with kernels of another stream.
  };
  /// During `backward_input`.
  struct backward_input_scratch {
    matrix_view<accumulate> dactivation;  ///< `[max_pairs, n]`: dY W2; on a device `[(n + 127) / 128, max_pairs]`.
    matrix_view<accumulate> dinput;       ///< `[max_pairs, d]`: dH W1; empty for weights on the output.
    /// Device: two words that are zero between calls, one call at a time; see `gemm::hopper::launch_options`. Or null.
    std::int32_t* tile_counter = nullptr;
    sm_share share = {};  ///< Device: with kernels of another stream.
  };
  /// During `backward_weights`.
  struct backward_weights_scratch {
    matrix_view<storage> input;  ///< `[max_pairs, d]`: weighted inputs; empty for weights on the output.
    /// Device: two words that are zero between calls, one call at a time; see `gemm::hopper::launch_options`. Or null.
    std::int32_t* tile_counter = nullptr;
    sm_share share = {};  ///< Device: with kernels of another stream.
  };

  /// @param sizes Sizes of this rank's experts. @param activation_options Options of the activation.
  /// @throws invalid_argument if a size is not positive (no local experts are allowed).
  explicit experts(const expert_dims& sizes, const options& activation_options = {});

  /// The sizes.
  const expert_dims& dims() const noexcept { return dims_; }
  /// The activation's options.
  const options& activation_options() const noexcept { return options_; }
  /// U: outputs of the up-projection, `2 * intermediate` for a gated activation, otherwise `intermediate`.
  std::int64_t up_width() const noexcept { return (gated ? 2 : 1) * static_cast<std::int64_t>(dims_.intermediate); }
  /// Elements of one expert's up-projection, `U * d`.
  std::int64_t up_elements() const noexcept { return up_width() * dims_.hidden; }
  /// Elements of one expert's down-projection, `d * n`.
  std::int64_t down_elements() const noexcept { return static_cast<std::int64_t>(dims_.hidden) * dims_.intermediate; }

  /// Slices of saved memory. @param memory Counts or carves. @param max_pairs Bound of the number of expert rows.
  saved_view carve_saved(memory_builder& memory, std::int64_t max_pairs) const;
  /// Slices of deferred memory. @param memory Counts or carves. @param max_pairs Bound of the number of expert rows.
  deferred_view carve_deferred(memory_builder& memory, std::int64_t max_pairs) const;
  /// Slices of forward's workspace. @param memory Counts or carves. @param max_pairs Bound of the number of expert
  /// rows.
  /// @param applied Where pair weights apply.
  forward_scratch carve_forward(memory_builder& memory, std::int64_t max_pairs, weight_on applied) const;
  /// Slices of `backward_input`'s workspace. @param memory Counts or carves. @param max_pairs Bound of the number of
  /// expert rows. @param applied Where pair weights apply.
  /// @tparam Space Where the call will run: a device needs less.
  template <class Space = space::host>
  backward_input_scratch carve_backward_input(memory_builder& memory, std::int64_t max_pairs, weight_on applied) const;
  /// Slices of `backward_weights`' workspace. @param memory Counts or carves. @param max_pairs Bound of the number of
  /// expert rows. @param applied Where pair weights apply.
  backward_weights_scratch carve_backward_weights(memory_builder& memory, std::int64_t max_pairs,
                                                  weight_on applied) const;

  /// Computes `y[i]`, unweighted unless weights apply to the input. Nothing is written when it throws.
  /// @param stream   Order of the work.
  /// @param rows     The rows of each local expert, P in all.
  /// @param x        `[*, d]`, received tokens, read through `rows.gather`; rows may repeat.
  /// @param weighting Pair weights `[P]`; read only where they apply to the input.
  /// @param w        The experts' weights.
  /// @param saved    H is written; its number of rows bounds P. For evaluation it may lie in workspace.
  /// @param y        `[>= P, d]`; rows from P on are not touched.
  /// @param scratch  From `carve_forward`.
  /// @throws invalid_argument if shapes disagree, P exceeds a buffer, a gather index is out of range, or the weights
  /// are not those of `dims()`: missing, with biases that dims do not have or without those they have, or with a stride
  /// that is not 0 and less than one expert's matrix.
  void forward(host_stream stream, const expert_rows& rows, matrix_view<const storage> x,
               pair_weights<accumulate> weighting, const weights& w, const saved_view& saved, matrix_view<storage> y,
               const forward_scratch& scratch) const;
  /// Device half: enqueues on `stream`; all pointers, those in `rows` included, are device memory. Of what the host
  /// half refuses it sees the weights alone.
  /// @tparam Rows `expert_rows`, or a type that says more. @tparam Weighting `pair_weights`, or a type that says more.
  template <class Rows = expert_rows, class Weighting = pair_weights<accumulate>>
  requires std::derived_from<Rows, expert_rows> && std::derived_from<Weighting, pair_weights<accumulate>>
  void forward(device_stream stream, const Rows& rows, matrix_view<const storage> x, const Weighting& weighting,
               const weights& w, const saved_view& saved, matrix_view<storage> y, const forward_scratch& scratch) const;

  /// Gradients of the inputs and of the pair weights. Nothing is written when it throws.
  /// @param stream   Order of the work.
  /// @param rows     As in forward.
  /// @param x        As in forward; read only where weights apply to the input, otherwise it may be empty.
  /// @param dy       `[*, d]`, gradients of the tokens' outputs as they were received, unweighted; read through
  ///                 `rows.gather`. Row `i` has the gradient `weight[i] * dy[gather[i]]` where weights apply to the
  ///                 output, `dy[gather[i]]` otherwise.
  /// @param weighting As in forward.
  /// @param w        The experts' weights, as in forward.
  /// @param saved    H is read and dH is written over it.
  /// @param deferred Written for `backward_weights`.
  /// @param dx       `[>= P, d]`, one row per pair; the gradient of a token is the sum over its pairs.
  /// @param dpair_weights `[P]`, gradients of the pair weights; may be null.
  /// @param scratch  From `carve_backward_input`.
  /// @throws invalid_argument as forward.
  void backward_input(host_stream stream, const expert_rows& rows, matrix_view<const storage> x,
                      matrix_view<const storage> dy, pair_weights<accumulate> weighting, const weights& w,
                      const saved_view& saved, const deferred_view& deferred, matrix_view<storage> dx,
                      accumulate* dpair_weights, const backward_input_scratch& scratch) const;
  /// Device half: enqueues on `stream`; all pointers, those in `rows` included, are device memory. Of what the host
  /// half refuses it sees the weights alone.
  /// @tparam Rows `expert_rows`, or a type that says more. @tparam Weighting `pair_weights`, or a type that says more.
  template <class Rows = expert_rows, class Weighting = pair_weights<accumulate>>
  requires std::derived_from<Rows, expert_rows> && std::derived_from<Weighting, pair_weights<accumulate>>
  void backward_input(device_stream stream, const Rows& rows, matrix_view<const storage> x,
                      matrix_view<const storage> dy, const Weighting& weighting, const weights& w,
                      const saved_view& saved, const deferred_view& deferred, matrix_view<storage> dx,
                      accumulate* dpair_weights, const backward_input_scratch& scratch) const;

  /// Gradients of weights and biases; any time after `backward_input`, while x, dy, `saved` and `deferred` live. A
  /// group without rows gets zeros when overwriting. Nothing is written when it throws.
  /// @param stream   Order of the work.
  /// @param groups   As in forward: one gradient per local expert. Another grouping of the same rows gives one gradient
  ///                 per group (`chunked_rows`), with as many matrices in `g`.
  /// @param x        As in forward.
  /// @param dy       As in `backward_input`.
  /// @param weighting As in forward.
  /// @param saved    Holds dH.
  /// @param deferred From `backward_input`.
  /// @param g        `[groups]` gradients, in the weights' layout.
  /// @param mode     Overwrite, or add to what is there.
  /// @param scratch  From `carve_backward_weights`.
  /// @throws invalid_argument as forward.
  void backward_weights(host_stream stream, const expert_rows& groups, matrix_view<const storage> x,
                        matrix_view<const storage> dy, pair_weights<accumulate> weighting, const saved_view& saved,
                        const deferred_view& deferred, const gradients& g, write mode,
                        const backward_weights_scratch& scratch) const;
  /// Device half: enqueues on `stream`; all pointers, those in `groups` included, are device memory. Of what the host
  /// half refuses it sees the gradients' arrays alone.
  /// @tparam Rows `expert_rows`, or a type that says more. @tparam Weighting `pair_weights`, or a type that says more.
  template <class Rows = expert_rows, class Weighting = pair_weights<accumulate>>
  requires std::derived_from<Rows, expert_rows> && std::derived_from<Weighting, pair_weights<accumulate>>
  void backward_weights(device_stream stream, const Rows& groups, matrix_view<const storage> x,
                        matrix_view<const storage> dy, const Weighting& weighting, const saved_view& saved,
                        const deferred_view& deferred, const gradients& g, write mode,
                        const backward_weights_scratch& scratch) const;

 private:
  expert_dims dims_;
  options options_;
};

TESSERA_NAMESPACE_END

#include <tessera/experts/detail/expert_mlp.hpp>
