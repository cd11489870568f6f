// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The mixture-of-experts layer: gate, router, dispatch, experts, combine and shared experts, forward and backward.

#include <cstddef>
#include <cstdint>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/passes.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/dispatch.hpp>
#include <tessera/experts/experts.hpp>
#include <tessera/layout/expert_layout.hpp>
#include <tessera/moe/saved_rows.hpp>
#include <tessera/moe/shape.hpp>
#include <tessera/moe/side_stream.hpp>
#include <tessera/moe/state.hpp>
#include <tessera/moe/weights.hpp>
#include <tessera/router/router.hpp>

TESSERA_NAMESPACE_BEGIN

/// What a user tunes besides sizes and router options.
/// @tparam Experts The expert container.
template <class Experts>
struct layer_options {
  dispatch_options dispatch = {};  ///< Bounds, capacity, overflow.
  /// How rows travel over `comm::symmetric`, the same on all ranks; with `combine::ordered` that of dispatch. Other
  /// communicators do not look at it.
  tessera::transport::automatic transport = {};
  typename Experts::options activation = {};  ///< Of the activation, routed and shared.
  std::int64_t chunk_tokens = 0;           ///< Tokens of a chunk of gradients and losses; 0: one contribution per call.
  saved_rows rows = saved_rows::received;  ///< Whether received rows are kept; the same on all ranks.
  side_stream side = {};  ///< One GPU, or sized on the host: shared experts run on it, beside routed ones. Else, over
                          ///< `comm::symmetric`, they run on the communicator's own.
};

/// Bytes of each memory class on one rank. Pure functions of bounds: equal sizes give equal bytes.
struct layer_sizes {
  std::size_t saved_bytes = 0;           ///< Per layer and micro-batch, from forward to `backward_weights`.
  std::size_t deferred_bytes = 0;        ///< Per layer and micro-batch, from `backward_input` to `backward_weights`.
  std::size_t workspace_bytes = 0;       ///< During one call, any pass but eval; shared by all layers.
  std::size_t eval_workspace_bytes = 0;  ///< During forward with `pass::eval`, which needs no saved memory.
  std::size_t state_bytes = 0;           ///< Per layer.
};

/// A mixture-of-experts layer on one rank of an expert-parallel group.
///
///     logits = x W_g^T + b_g                             y[t] = sum_k w[t, k] expert_{id[t, k]}(x[t]) + shared(x[t])
///
/// The object holds sizes, options and pointers to state: the caller owns all memory. Calls on the hot path do not
/// allocate; on the host they return when the work is done, in device space they enqueue on the stream and do not
/// synchronise. Every call but `backward_weights` and `reset_state` is a collective of the communicator.
///
/// With `comm::symmetric` other ranks write into this one's memory: saved, deferred and workspace memory come from its
/// `allocate`, called with the same sizes in the same order on all ranks, and the calls of one handle's layers are
/// enqueued on one stream, in the same order everywhere, with the same options and passes. `sizes` gives the same bytes
/// on every rank there. Rows of x, residual, y, dy and dx, and their distances, are multiples of 16 bytes;
/// `layout::table` is in memory that host and device read. A row bound that is exceeded is found by
/// `comm::symmetric::check`, not by the call.
///
/// Two micro-batches at once are two layers over two slots of a communicator, with the same state memory and otherwise
/// memory of their own, each on one stream. Calls on one GPU that share a state are enqueued in one order, but for
/// `backward_weights`: behind its `backward_input` it may run on a stream of its own, beside all but another one.
///
/// With `comm::nccl` and `comm::hosts`, and with `comm::symmetric` and `dispatch_options::host_sized`, the host waits
/// for counts: see `moe_layer.cuh` and `dispatch/host_sized.cuh`. Memory is any device memory then, rows have any
/// width, and `forward` throws where a row bound is exceeded, on all ranks. With `combine::ordered` every rank sends
/// pairs to every other, over `comm::hosts` too, where rows come in over two levels.
///
/// If a call throws, state is unchanged; outputs, saved, deferred and workspace memory are undefined.
///
/// The host half is defined with this header, the device half in `moe_layer.cuh`: which of them is used follows from
/// `Comm::space`. An engine may write `extern template class tessera::moe_layer<...>` in its `.cpp` files and
/// instantiate the layer in one `.cu` file; without that file the program does not link.
///
/// @tparam Router  Score, selection, weights and balances: `router<...>`.
/// @tparam Experts Expert container: `experts<...>`, or a user's own `expert_container`.
/// @tparam Layout  Which rank owns which expert: `layout::block`, `layout::round_robin`, `layout::table`, or a user's
/// own.
/// @tparam Comm    Communicator of the expert-parallel group.
/// @tparam Combine `combine::reduced` (fewer bytes) or `combine::ordered` (the same bits for every number of ranks).
/// @tparam Fixed   Sizes known at compile time; 0 leaves a size to run time. With `num_shared_experts = shape::none`
/// nothing is compiled for shared experts.
template <class Router, class Experts, class Layout, class Comm, class Combine = combine::reduced,
          shape Fixed = shape{}>
class moe_layer {
  static_assert(
      communicator<Comm>,
      "moe_layer: the fourth argument must be a communicator. Models: comm::self<Space>, comm::threads, comm::mpi, "
      "comm::symmetric, comm::nccl, comm::hosts<comm::nccl>; a user's own derives from comm::collectives");
  static_assert(
      expert_container<Experts, typename Comm::space>,
      "moe_layer: the second argument must be an expert container for the communicator's memory space. Model: "
      "experts<activation::swiglu, precision::bf16>");
  static_assert(is_expert_layout<Layout>());
  static_assert(combine_policy<Combine>, "moe_layer: the fifth argument is combine::reduced or combine::ordered");

 public:
  using router_type = Router;                       ///< The router.
  using experts_type = Experts;                     ///< Routed experts.
  using shared_type = shared_container_t<Experts>;  ///< Shared experts.
  using layout_type = Layout;                       ///< Placement of experts.
  using communicator_type = Comm;                   ///< Communicator.
  using combine_type = Combine;                     ///< Where sums are made.
  using space = typename Comm::space;               ///< Where memory lives.
  using stream_type = stream_ref<space>;            ///< Order of work.
  using storage = typename Experts::storage;        ///< Type of activations.
  using accumulate = typename Experts::accumulate;  ///< Type of sums and of the router's weights.
  using router_options = typename Router::options;  ///< `num_experts` and `top_k` may stay 0: the shape has them.
  using options = layer_options<Experts>;           ///< The rest of what a user tunes.
  using inputs = layer_inputs<storage>;             ///< Tokens.
  using weights = layer_weights<Experts>;           ///< Parameters.
  using gradients = layer_gradients<Experts>;       ///< Gradients.
  using state_type = layer_state<accumulate>;       ///< What outlives a call.

  /// Whether there may be shared experts.
  static constexpr bool may_have_shared = Fixed.num_shared_experts != shape::none;
  /// Number of the router's balances that are losses.
  static constexpr int num_losses = Router::num_losses;

  /// Bytes that a layer needs on `rank`.
  /// @param sizes_of  Sizes of the layer. @param placement Placement of experts. @param rank Rank in the communicator.
  /// @param chosen    Options the layer will be made with.
  /// @throws invalid_argument if sizes cannot work.
  static layer_sizes sizes(const shape& sizes_of, const Layout& placement, int rank, const options& chosen = {});

  /// @param sizes_of   Sizes of the layer, the same on all ranks.
  /// @param routing    Options of the router.
  /// @param placement  Placement of experts over `comm.size()` ranks, the same on all ranks.
  /// @param comm       The expert-parallel group; outlives the layer.
  /// @param state      `sizes(...).state_bytes` bytes in the communicator's space, outlive the layer. The content is
  ///                   kept: call `reset_state` for a new layer, or load a checkpoint.
  /// @param chosen     The rest.
  /// Between GPUs the kernels of the file that instantiates the layer are loaded onto the current device, which is the
  /// communicator's: no rank has work enqueued that waits for another one's.
  /// @throws invalid_argument if sizes, options, placement and communicator do not fit each other, or the state is too
  /// small.
  moe_layer(const shape& sizes_of, const router_options& routing, const Layout& placement, Comm& comm,
            state_memory state, const options& chosen = {});

  /// Sets the state of a new layer: bias, counters and losses 0, loss scale 1, coefficients and rate as the options
  /// have them.
  /// @param stream Order of the work.
  void reset_state(stream_type stream);

  /// Computes the layer's output.
  ///
  /// Balance losses are those of the micro-batch of all ranks of the communicator. With losses, passes `train` and
  /// `recompute` all-reduce `E + 2` integers.
  /// @param stream    Order of the work.
  /// @param mode      `train` and `recompute` fill `saved`; `train` counts the load; `eval` does neither.
  /// @param in        `x [T, d]`, T at most `max_tokens`; what the router's policies ask for; a residual to add to y.
  /// @param params    Parameters.
  /// @param y         `[T, d]`, overwritten; overlaps neither `x` nor the residual.
  /// @param saved     `saved_bytes`, aligned to `memory_alignment`; may be empty for `eval`.
  /// @param workspace `workspace_bytes`, or `eval_workspace_bytes` for `eval`; aligned to `memory_alignment`.
  /// @throws invalid_argument if a shape, a view or a memory size is wrong; on the host also if a logit is not finite
  /// or an id is out of range, which a device writes to `state().status` instead.
  /// @throws error if a row bound is exceeded (on every rank).
  void forward(stream_type stream, pass mode, const inputs& in, const weights& params, matrix_view<storage> y,
               saved_memory saved, workspace_memory workspace);

  /// Computes the gradient of the input, with that of the balance losses times the state's `loss_scale`.
  /// @param stream    Order of the work.
  /// @param in        As in forward.
  /// @param dy        `[T, d]`, gradient of the output; unchanged until `backward_weights`.
  /// @param params    As in forward.
  /// @param saved     From forward; consumed: afterwards it serves `backward_weights` only.
  /// @param dx        `[T, d]`, overwritten; overlaps neither `x` nor `dy`.
  /// @param deferred  `deferred_bytes`, written for `backward_weights`.
  /// @param workspace `workspace_bytes`.
  void backward_input(stream_type stream, const inputs& in, matrix_view<const storage> dy, const weights& params,
                      saved_memory saved, matrix_view<storage> dx, deferred_memory deferred,
                      workspace_memory workspace);

  /// Computes the gradients of the parameters; any time after `backward_input`, without communication.
  /// @param stream   Order of the work.
  /// @param in       As in forward.
  /// @param dy       As in `backward_input`.
  /// @param saved    As `backward_input` left it.
  /// @param deferred From `backward_input`.
  /// @param grads    Gradients.
  /// @param mode     Overwrite, or add to what is there.
  void backward_weights(stream_type stream, const inputs& in, matrix_view<const storage> dy, saved_memory saved,
                        deferred_memory deferred, const gradients& grads, write mode);

  /// Ends an optimizer step: sums the load of every rank of `batch` into `global_load`, moves the bias by `bias_rate`
  /// where the router has one, and starts counting anew. Once per optimizer step, after any number of micro-batches.
  /// @param stream Order of the work.
  /// @param batch  All ranks that share the global batch: the expert-parallel group, or a larger one that contains it.
  /// @throws invalid_argument on the host, before anything is sent, if the router has a bias and `bias_rate` is
  /// negative or not finite.
  void end_step(stream_type stream, Comm& batch);

  /// Sizes.
  const shape& dims() const noexcept { return shape_; }
  /// Named state in the communicator's space.
  const state_type& state() const noexcept { return state_; }
  /// Options.
  const options& get_options() const noexcept { return options_; }
  /// Placement of experts.
  const Layout& placement() const noexcept { return placement_; }
  /// The router.
  const Router& get_router() const noexcept { return router_; }
  /// The expert-parallel group.
  Comm& comm() const noexcept { return *comm_; }

 private:
  shape shape_;
  options options_;
  Layout placement_;
  Comm* comm_;
  Router router_;
  state_type state_;
};

TESSERA_NAMESPACE_END

#include <tessera/moe/detail/moe_layer.hpp>
