// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Device half of dispatch on one GPU, for sm_80 and later: sorted lists, combine and permute, and the staged
/// operations for `comm::self<space::device>`. Nothing here allocates, synchronises or reads device memory on the host;
/// every call can be captured in a CUDA graph; results are run-to-run bitwise the same.
///
/// A handle in device memory at one rank numbers its pairs `t * K + k`: `expert_row_of[t * K + k]` is the expert row of
/// slot k of token t, -1 where there is none. Of the handle, `expert_offsets`, `gather`, `expert_row_of`,
/// `pair_weights` and `total` are written and read; the arrays about other ranks are not.
///
/// Rows are moved 16 bytes at a time where d, strides and addresses allow it, and element by element otherwise.

#include <cstdint>
#include <type_traits>

#include <tessera/comm/self.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/dispatch/detail/device/sort.cuh>
#include <tessera/dispatch/dispatch.hpp>
#include <tessera/router/lists.hpp>

TESSERA_NAMESPACE_BEGIN

/// Adds up the expert rows of each token in the order of k, in `A`, and rounds once to `Out`: forward combine with
/// weights, backward of dispatch without. A token without rows becomes what is added, or zeros. Enqueues, does not
/// synchronise.
/// @param stream        Where the work is enqueued.
/// @param pairs         `[>= row_offsets[E], d]` expert rows; rows that no token names are not read.
/// @param expert_row_of `[T, K]`, -1 where there is no row.
/// @param weights       `[T, K]`; without data every weight is 1, and K is its number of columns all the same.
/// @param plus          `[T, d]`, added after a token's rows, such as outputs of shared experts; without data nothing
/// is.
/// @param y             `[T, d]`, overwritten.
/// @throws invalid_argument if shapes do not fit, cuda_error if the launch fails.
template <class S, class A, class Out>
void combine_rows(device_stream stream, matrix_view<const S> pairs, const std::int32_t* expert_row_of,
                  matrix_view<const A> weights, matrix_view<const S> plus, matrix_view<Out> y) {
  TESSERA_EXPECTS(pairs.cols == y.cols, "expert rows have " << pairs.cols << " columns, combined rows have " << y.cols);
  TESSERA_EXPECTS(weights.data == nullptr || weights.rows == y.rows,
                  "routing weights are of " << weights.rows << " tokens, combined rows of " << y.rows);
  if (plus.data != nullptr) expect_matrix(plus, y.rows, y.cols, "rows to add");
  detail::combine_on_device<S, A, Out>(stream,
                                       {{}, pairs, expert_row_of, static_cast<int>(weights.cols), weights, plus, y});
}

/// Expands tokens to expert rows through the inverse of the gather list: every token is read once. Enqueues, does not
/// synchronise.
/// @param stream        Where the work is enqueued.
/// @param x             `[T, d]`.
/// @param expert_row_of `[T, K]`, -1 where there is no row.
/// @param top_k         K.
/// @param expanded      `[>= row_offsets[E], d]`, written where a pair names a row.
/// @throws invalid_argument if widths differ or there are too many rows for one launch, cuda_error if it fails.
template <class S>
void expand_rows(device_stream stream, matrix_view<const S> x, const std::int32_t* expert_row_of, int top_k,
                 matrix_view<S> expanded) {
  expect_matrix(expanded, -1, x.cols, "expanded rows");
  constexpr int width = 16 / sizeof(S);
  detail::scatter_task<S> task{{}, x, expert_row_of, top_k, expanded};
  if (detail::moves_vectors<S>(x.cols, x, expanded)) {
    task.plan = detail::make_row_plan(x.cols, width);
    detail::launch_rows(stream, detail::scatter_rows_kernel<S, width>, task, x.rows, "scatter_rows_kernel");
  } else {
    task.plan = detail::make_row_plan(x.cols, 1);
    detail::launch_rows(stream, detail::scatter_rows_kernel<S, 1>, task, x.rows, "scatter_rows_kernel");
  }
}

/// `permute` in device memory: enqueues, does not synchronise. Fast where the gather list of each expert ascends and
/// experts are spread evenly over source rows, which holds for what dispatch makes; right for every list.
/// @param stream   Where the work is enqueued.
/// @param received `[received_rows, d]`.
/// @param rows     Gather list and offsets, in device memory; at most 6000 experts.
/// @param expanded `[>= pairs, d]`; rows beyond `row_offsets[num_local_experts]` are not written.
/// @throws invalid_argument if widths differ, or there are too many experts or rows for one launch; cuda_error if it
/// fails.
template <class S>
void permute(device_stream stream, matrix_view<const S> received, const expert_rows& rows, matrix_view<S> expanded) {
  expect_matrix(expanded, -1, received.cols, "expanded rows");
  detail::permute_on_device(stream, received, rows, expanded);
}

/// Sorts a routing by expert: `exchange_routing` where nobody else is. `route_sorted` does the same in the router's own
/// launch. One cooperative launch; a row bound below T * K, or a capacity that drops by weight, takes three. Enqueues,
/// does not synchronise.
/// @param stream    Where the work is enqueued.
/// @param layout    Of one rank; its members are `TESSERA_HD`.
/// @param bounds    Sizes the handle was laid out with.
/// @param options   Capacity and overflow. `overflow_policy::error` drops too, and sets `status`.
/// `drop_order::weight` needs a row bound of T * K at least.
/// @param chosen    `[T, K]` ids and weights. Ids outside [0, E) are slots without expert.
/// @param handle    Written, see the file; `dispatch_handle::layout_device` has room for every bound.
/// @param workspace Scratch; its barrier was 0 before its first use and is not shared by concurrent calls.
/// @param status    Device memory; null: an overflow is only counted, in `handle.total`.
/// @throws invalid_argument if shapes, bounds or options do not fit.
template <class Layout, class A>
void exchange_routing(device_stream stream, comm::self<space::device>&, const Layout& layout,
                      const dispatch_bounds& bounds, const dispatch_options& options, const routing<A>& chosen,
                      const dispatch_handle<A>& handle, const router_workspace& workspace,
                      device_status* status = nullptr) {
  detail::sort_on_device(stream, layout, bounds, options, chosen, handle, workspace, status);
}

/// Nothing: one rank's experts read `x` in place.
template <class A, class S>
void dispatch_begin(device_stream, comm::self<space::device>&, const dispatch_handle<A>&, matrix_view<const S>,
                    matrix_view<S>, const dispatch_workspace<S>&) {}

/// `x` itself. @param x `[T, d]`.
template <class A, class S>
matrix_view<const S> dispatch_end(device_stream, comm::self<space::device>&, const dispatch_handle<A>&,
                                  matrix_view<const S> x, matrix_view<S>, const dispatch_workspace<S>&) {
  return x;
}

/// Nothing: rows are added where they stand.
template <combine_policy Combine, class A, class S>
void combine_begin(device_stream, comm::self<space::device>&, const dispatch_handle<A>&, combine_weights,
                   matrix_view<const S>, const combine_workspace<S, A>&) {}

/// Adds up the rows of each token, as `combine_rows` does. Both policies are the same at one rank. Enqueues, does not
/// synchronise.
/// @param stream          Where the work is enqueued.
/// @param handle          From `exchange_routing`.
/// @param weights         Whether rows are multiplied by their routing weights.
/// @param pairs           `[>= received_pairs, d]` expert rows.
/// @param routing_weights `[T, K]`; its number of columns is K.
/// @param y               `[T, d]`, overwritten.
template <combine_policy Combine, class A, class S, class Out>
void combine_end(device_stream stream, comm::self<space::device>&, const dispatch_handle<A>& handle,
                 combine_weights weights, matrix_view<const S> pairs, matrix_view<const A> routing_weights,
                 matrix_view<Out> y, const combine_workspace<S, A>&) {
  if (weights == combine_weights::none) routing_weights.data = nullptr;
  combine_rows(stream, pairs, handle.expert_row_of, routing_weights, matrix_view<const S>{}, y);
}

/// `return_pair_values` in device memory: enqueues, does not synchronise.
/// @param stream Where the work is enqueued.
/// @param handle From `exchange_routing`.
/// @param values `[received_pairs]`.
/// @param home   `[T, K]`, overwritten.
template <class A>
void return_pair_values(device_stream stream, comm::self<space::device>&, const dispatch_handle<A>& handle,
                        const std::type_identity_t<A>* values, matrix_view<std::type_identity_t<A>> home,
                        const pair_values_workspace<A>&) {
  const std::int64_t blocks = (home.rows * home.cols + detail::row_threads - 1) / detail::row_threads;
  if (blocks == 0) return;
  detail::launch_early(stream, "gather_values_kernel", detail::gather_values_kernel<A>,
                       dim3(static_cast<unsigned>(blocks)), detail::row_threads, 0, static_cast<const A*>(values),
                       handle.expert_row_of, home);
}

TESSERA_NAMESPACE_END
