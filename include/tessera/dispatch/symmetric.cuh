// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Dispatch and combine between GPUs that reach each other's memory (`comm::symmetric`), started by kernels, without
/// counts on the host. Needs sm_90.
///
/// Token t of rank s stands in row `s * max_tokens + t` of what arrives, whatever the routing, so that a row needs no
/// slot and a rank at most `R * max_tokens` rows. A row travels once to each rank that owns one of its experts; the
/// owner's gather list finds it there. On the way home an owner adds up its rows of a token in fp32 in the order of k,
/// rounds the sum once and stores it at home, where it is added to home's own rows in the order of ranks
/// (`combine_rows`); or every row goes home and all are added there (`combine_pairs`).
///
/// Every operation is a collective of the communicator: all ranks enqueue the same operations of a slot in the same
/// order, on one stream. They do not synchronise, do not allocate, and can be captured in a CUDA graph, the same on all
/// ranks or on none, because branches of it wait for other ranks; a replay sees new routings. Waits for other ranks
/// happen in kernels and are bounded by the communicator's timeout: see `comm::symmetric::check`. After a failure, and
/// until the communicator is reset, operations do nothing; lists are empty then, so that products on them do nothing
/// either. Arrays that peers write are memory of `comm::symmetric::allocate`, at the same offset on all ranks; they may
/// be reused as soon as the stream has passed what reads them, because every rank announces that before others write.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/comm/symmetric_view.hpp>
#include <tessera/dispatch/combine.hpp>
#include <tessera/dispatch/detail/device/arrivals.cuh>
#include <tessera/dispatch/detail/device/capacity.cuh>
#include <tessera/dispatch/detail/device/expect_routing.cuh>
#include <tessera/dispatch/detail/symmetric/launch_send.cuh>
#include <tessera/dispatch/detail/symmetric/operands.cuh>
#include <tessera/dispatch/detail/symmetric/push_routing.cuh>
#include <tessera/dispatch/detail/symmetric/return_values.cuh>
#include <tessera/dispatch/detail/symmetric/send_pairs.cuh>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/dispatch/detail/symmetric/send_sums.cuh>
#include <tessera/dispatch/dispatch.cuh>
#include <tessera/dispatch/symmetric.hpp>

TESSERA_NAMESPACE_BEGIN

/// Pushes this rank's routing to all ranks and sorts what arrives from them, on the communicator's side stream where it
/// runs beside the rows. `handle.destinations` is ready for `dispatch_begin`, the lists after `exchange_routing_end`;
/// one of each in turns on a slot, both in the same graph capture.
/// @param stream    Where the work is enqueued.
/// @param comm      R ranks.
/// @param layout    Where the experts are; its members are `TESSERA_HD` and read memory that the device sees.
/// @param bounds    Sizes, the same on all ranks but for `num_local_experts`.
/// @param options   Capacity and overflow. A capacity drops this rank's own pairs before anything travels, with two
/// more launches, or three by weight, and is counted in `handle.total`. `overflow_policy::drop` admits pairs in the
/// order (source, token, k) and counts on the receiver what it drops; `error` is a failure of the communicator that
/// names the rank and its need.
/// @param chosen    `[T, K]` ids and weights; ids outside [0, E) are slots without expert. Kept until
/// `exchange_routing_end`.
/// @param handle    From `dispatch_handle::layout_device`, written.
/// @param workspace Scratch, kept until `exchange_routing_end`; its sort's barrier was 0 before its first use.
/// @param counts    Counts of this rank's pairs, as a router makes them, to be added up over all ranks; without data
/// nothing is. Kept like the routing. @param sums Where the sums go, ready with the lists; 0 after a failure.
/// @throws invalid_argument if shapes, bounds, options or memory do not fit.
template <peer_communicator Comm, class Layout, class A>
void exchange_routing_begin(device_stream stream, Comm& comm, const Layout& layout, const dispatch_bounds& bounds,
                            const dispatch_options& options, const routing<A>& chosen, const dispatch_handle<A>& handle,
                            const symmetric_routing_workspace<A>& workspace, balance_counts counts = {},
                            balance_counts sums = {}) {
  using namespace detail::symmetric;
  const std::int64_t num_tokens = chosen.expert_ids.rows;
  detail::expect_routing(comm, layout, bounds, chosen);
  expect_tokens(handle, bounds.max_tokens, "the routing of these bounds");
  expect_top_k(handle, bounds.top_k);
  const std::int64_t pairs_of_all = bounds.addressed_rows() * bounds.top_k;
  expect_window(comm, workspace.tables.slots, pairs_of_all, "routing_tables::slots");
  expect_window(comm, workspace.tables.weights, pairs_of_all, "routing_tables::weights");
  expect_window(comm, workspace.tables.counts, bounds.num_ranks * bounds.num_ranks, "routing_tables::counts");
  TESSERA_EXPECTS(workspace.tables.block_counts != nullptr && workspace.sort.barrier != nullptr &&
                      workspace.sort.block_counts != nullptr && handle.destinations != nullptr,
                  "exchange_routing needs routing_tables::layout, a router_workspace with barrier and counts, and a "
                  "handle of dispatch_handle::layout_device that travels");
  const int num_sms = expect_sm90("exchange_routing");
  const auto view = comm.view(comm::symmetric_channel::tables);
  const int blocks_of_lists = symmetric_sms::choose(comm.num_sms(), num_sms, comm.slots()).lists;
  const std::int64_t rows = bounds.addressed_rows();
  const auto sort_plan = detail::make_list_plan(rows, std::max(bounds.num_local_experts, 1), blocks_of_lists,
                                                detail::sort_scratch_bytes);  // throws before anything is enqueued
  const routing<A> kept =
      detail::keep_within_capacity(stream, bounds, options, chosen, workspace.sort, workspace.capacity, blocks_of_lists,
                                   &handle.total->capacity_drops);

  // Rows wait for their destinations only; tables and lists take the side stream. Both wait for other ranks: graphs of
  // all ranks have the same shape, without tokens too, so that the branches of each begin in the same order.
  const device_stream side = comm.side_stream();
  let_side_wait(stream, comm);
  const auto token_blocks =
      static_cast<unsigned>(std::max<std::int64_t>((num_tokens + destination_threads - 1) / destination_threads, 1));
  detail::launch_early(stream, "find_destinations_kernel", find_destinations_kernel<Layout>, dim3(token_blocks),
                       destination_threads, 0, layout, matrix_view<const std::int32_t>(kept.expert_ids),
                       handle.destinations);
  const int num_counts = routing_tables<A>::counts_per_rank(bounds);
  const push_task<A, Layout> push{.view = view,
                                  .layout = layout,
                                  .ids = kept.expert_ids,
                                  .weights = kept.weights,
                                  .max_tokens = bounds.max_tokens,
                                  .tables = workspace.tables,
                                  .expert_counts = counts.data,
                                  .num_counts = num_counts};
  const arrival_task<A> sort{.view = view,
                             .plan = sort_plan,
                             .lists = detail::make_arrival_lists<A>(bounds, options, workspace.tables.slots,
                                                                    workspace.tables.weights, handle, workspace.sort),
                             .slots = workspace.tables.slots,
                             .counts = workspace.tables.counts,
                             .max_tokens = bounds.max_tokens,
                             .max_pairs = bounds.max_pairs,
                             .drops = options.overflow == overflow_policy::drop,
                             .total = handle.total,
                             .expert_counts = workspace.tables.expert_counts,
                             .sum_of_counts = sums.data,
                             .num_counts = num_counts};
  if (push_and_sort_at_once(rows)) {
    const exchange_task<A, Layout> both{push, sort};
    detail::launch_cooperative(side, sort.plan, detail::list_threads, exchange_tables_kernel<A, Layout>, both,
                               "exchange_tables_kernel");
  } else {
    const std::int64_t pairs = bounds.max_tokens * bounds.top_k;
    const auto blocks = static_cast<unsigned>(
        std::clamp<std::int64_t>((pairs + push_threads - 1) / push_threads, 1, routing_tables<A>::max_blocks));
    push_routing_kernel<A, Layout><<<blocks, push_threads, 0, side.get()>>>(push);
    detail::expect_launched("push_routing_kernel");
    // Tables may be long in coming: blocks that would wait for them on many SMs are launched when they are there.
    if (sort.plan.num_blocks > most_waiting_blocks) launch_await(side, view);
    detail::launch_cooperative(side, sort.plan, detail::list_threads, sort_arrivals_kernel<A>, sort,
                               "sort_arrivals_kernel");
  }
  detail::check_cuda(cudaEventRecord(comm.join_event(), side.get()), "cudaEventRecord");
}

/// Lets the stream wait for the lists that `exchange_routing_begin` started. @param stream Of the begin, or one that
/// comes after it. @param comm As there.
template <peer_communicator Comm>
void exchange_routing_end(device_stream stream, Comm& comm) {
  detail::check_cuda(cudaStreamWaitEvent(stream.get(), comm.join_event(), 0), "cudaStreamWaitEvent");
}

/// Begin and end in one. Parameters as there.
template <peer_communicator Comm, class Layout, class A>
void exchange_routing(device_stream stream, Comm& comm, const Layout& layout, const dispatch_bounds& bounds,
                      const dispatch_options& options, const routing<A>& chosen, const dispatch_handle<A>& handle,
                      const symmetric_routing_workspace<A>& workspace) {
  exchange_routing_begin(stream, comm, layout, bounds, options, chosen, handle, workspace);
  exchange_routing_end(stream, comm);
}

/// Sends each token once to every rank that owns one of its experts. Its adjoint is `combine` without weights.
/// @param stream   Where the work is enqueued.
/// @param comm     R ranks; takes SMs as `symmetric_sms::choose` says: `rows`.
/// @param handle   With `destinations`; forward and backward use the same.
/// @param x        `[T, d]`; d, the rows' distance and the address are multiples of 16 bytes.
/// @param received `[R * max_tokens, d]` in the window, packed; rows that nobody sends stay as they are.
template <peer_communicator Comm, class A, class S>
void dispatch_begin(device_stream stream, Comm& comm, const dispatch_handle<A>& handle, matrix_view<const S> x,
                    matrix_view<S> received) {
  const std::int64_t max_tokens = detail::symmetric::expect_dispatch(comm, x, received);
  detail::symmetric::expect_tokens(handle, max_tokens, "received");
  TESSERA_EXPECTS(handle.destinations != nullptr, "the handle has no destinations: it does not travel");
  detail::symmetric::launch_send(stream, comm, handle.destinations, true, x, received);
}

/// Lets the stream wait until the rows of all ranks are there; for few rows it does so already behind `dispatch_begin`.
/// @param stream,comm,received As in `dispatch_begin`. @return `received`.
template <peer_communicator Comm, class S>
matrix_view<const S> dispatch_end(device_stream stream, Comm& comm, matrix_view<S> received) {
  detail::symmetric::end_send(stream, comm, received);
  return received;
}

/// What `combine` reads.
enum class combine_source {
  expert_rows,  ///< `[received_pairs, d]` outputs of experts in the order of the handle's rows.
  summed_rows,  ///< `[R * max_tokens, d]`: for each arrived row the sum that its owner has made already.
};

/// Brings the outputs of experts home and adds them up: `combine::reduced`. A token without pairs becomes what is added
/// to it, or zeros.
/// @param stream   Where the work is enqueued.
/// @param comm     R ranks; takes SMs as `symmetric_sms::choose` says: `sums`.
/// @param handle   From `exchange_routing`, of top_k <= 32.
/// @param weights  Whether expert rows are multiplied by their routing weights; not used for summed rows.
/// @param source   What `rows` are.
/// @param rows     See `combine_source`; d, the rows' distance and the address are multiples of 16 bytes.
/// @param returned `[R * max_tokens, d]` in the window, packed: scratch that peers write, from when this stream comes
/// here. Unless it is `rows`, it may be what rows were dispatched to, on all ranks or on none.
/// @param plus     `[T, d]` added in the end, such as outputs of shared experts; without data nothing is added.
/// @param y        `[T, d]`, overwritten.
template <peer_communicator Comm, class A, class S, class Out>
void combine_rows(device_stream stream, Comm& comm, const dispatch_handle<A>& handle, combine_weights weights,
                  combine_source source, matrix_view<const S> rows, matrix_view<S> returned, matrix_view<const S> plus,
                  matrix_view<Out> y) {
  using namespace detail::symmetric;
  const std::int64_t max_tokens =
      expect_combine(comm, handle, source == combine_source::summed_rows, rows, returned, plus, y);
  const int num_sms = expect_sm90("combine");
  const std::int64_t row_bytes = y.cols * static_cast<std::int64_t>(sizeof(S));
  const auto plan = sums_plan::make(max_tokens, row_bytes, comm.size() - 1);
  const int blocks = symmetric_sms::choose(comm.num_sms(), num_sms, comm.slots()).sums;
  const bool summed = source == combine_source::summed_rows;
  const sums_task<S, A, Out> task{.view = comm.view(comm::symmetric_channel::sums),
                                  .pairs = rows,
                                  .expert_row_of = handle.expert_row_of,
                                  .weights = weights == combine_weights::routing ? handle.pair_weights : nullptr,
                                  .returned = returned.data,
                                  .destinations = handle.destinations,
                                  .num_tokens = static_cast<int>(y.rows),
                                  .max_tokens = static_cast<int>(max_tokens),
                                  .top_k = handle.top_k,
                                  .plan = plan,
                                  .home_plan = plan.at_home(row_bytes),
                                  .summed = summed,
                                  .senders = plan.senders(blocks, comm.size(), handle.top_k, summed),
                                  .plus = plus,
                                  .y = y};
  allow_shared_memory(send_sums_kernel<S, A, Out>, sums_shared_bytes);
  detail::launch_early(stream, "send_sums_kernel", send_sums_kernel<S, A, Out>, dim3(static_cast<unsigned>(blocks)),
                       sums_threads, sums_shared_bytes, task);
}

/// Brings the output of every expert home and adds it up there in the order of k: `combine::ordered`. The bits of a
/// token are those that one GPU computes. A token without pairs becomes what is added to it, or zeros.
/// @param stream   Where the work is enqueued.
/// @param comm     R ranks; takes SMs as `symmetric_sms::choose` says: `pairs`.
/// @param handle   From `exchange_routing`.
/// @param pairs    `[received_pairs, d]` outputs of experts in the order of the handle's rows; d, the rows' distance
/// and the address are multiples of 16 bytes.
/// @param returned From `returned_rows::layout` with `combine::ordered`: scratch that peers write.
/// @param weights  `[T, K]` routing weights of this rank's tokens; without data every weight is 1, and K is its number
/// of columns all the same.
/// @param plus     `[T, d]` added in the end; without data nothing is added.
/// @param y        `[T, d]`, overwritten.
template <peer_communicator Comm, class A, class S, class Out>
void combine_pairs(device_stream stream, Comm& comm, const dispatch_handle<A>& handle, matrix_view<const S> pairs,
                   const returned_rows<S>& returned, std::type_identity_t<matrix_view<const A>> weights,
                   std::type_identity_t<matrix_view<const S>> plus, matrix_view<Out> y) {
  using namespace detail::symmetric;
  const std::int64_t pairs_per_rank = handle.max_tokens * handle.top_k;
  expect_matrix(pairs, -1, y.cols, "rows to combine");
  expect_bulk_rows(pairs, "rows to combine");
  TESSERA_EXPECTS(y.rows <= handle.max_tokens,
                  y.rows << " tokens, the handle is of max_tokens = " << handle.max_tokens << " of each rank");
  expect_top_k(handle, weights.cols);
  TESSERA_EXPECTS(handle.destinations != nullptr, "the handle has no destinations: it does not travel");
  const std::int64_t row_bytes = y.cols * static_cast<std::int64_t>(sizeof(S));
  TESSERA_EXPECTS(row_bytes <= INT32_MAX, "rows of " << y.cols << " elements are too wide");
  expect_window(comm, returned.rows, pairs_per_rank * y.cols, "returned_rows::rows");
  expect_window(comm, returned.places, pairs_per_rank, "returned_rows::places");
  const int num_sms = expect_sm90("combine");
  const auto view = comm.view(comm::symmetric_channel::sums);

  detail::check_cuda(cudaMemsetAsync(returned.places, 0xff,
                                     static_cast<std::size_t>(pairs_per_rank) * sizeof(std::int32_t), stream.get()),
                     "cudaMemsetAsync");
  const auto plan = send_plan::make(static_cast<int>(row_bytes));
  const pairs_task task{.view = view,
                        .rows = reinterpret_cast<const std::byte*>(pairs.data),
                        .row_stride = pairs.stride * static_cast<std::int64_t>(sizeof(S)),
                        .expert_row_of = handle.expert_row_of,
                        .returned = reinterpret_cast<std::byte*>(returned.rows),
                        .places = returned.places,
                        .pairs_per_rank = pairs_per_rank,
                        .plan = plan};
  allow_shared_memory(send_pairs_kernel, plan.shared_bytes());
  const int blocks = symmetric_sms::choose(comm.num_sms(), num_sms, comm.slots()).pairs;
  send_pairs_kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(plan.warps * detail::warp_size),
                      static_cast<std::size_t>(plan.shared_bytes()), stream.get()>>>(task);
  detail::expect_launched("send_pairs_kernel");
  launch_await(stream, view);
  combine_rows(stream, matrix_view<const S>{returned.rows, pairs_per_rank, y.cols}, returned.places, weights, plus, y);
}

/// What `return_pair_values` finds at home.
enum class pair_values_home : std::uint8_t {
  any,     ///< It puts zeros there first, ahead of its kernel.
  zeroed,  ///< Zeros in all of `[max_tokens, K]`, put there on this stream (or one that it waits for) behind whoever
           ///< read the last values: then nothing stands between its kernel and the one ahead, beside whose end it is
           ///< launched.
};

/// Brings one number per expert row home to its pair: gradients of routing weights. Pairs that were not sent, or were
/// dropped, become 0.
/// @param stream Where the work is enqueued.
/// @param comm   R ranks.
/// @param handle From `exchange_routing`.
/// @param values `[received_pairs]`.
/// @param home   `[max_tokens, K]` in the window, packed, overwritten; rows from T on are 0.
/// @param found  What is there.
template <peer_communicator Comm, class A>
void return_pair_values(device_stream stream, Comm& comm, const dispatch_handle<A>& handle,
                        const std::type_identity_t<A>* values, matrix_view<std::type_identity_t<A>> home,
                        pair_values_home found = pair_values_home::any) {
  using namespace detail::symmetric;
  expect_tokens(handle, home.rows, "home");
  expect_top_k(handle, home.cols);
  expect_window(comm, home.data, home.rows * home.cols, "home");
  TESSERA_EXPECTS(home.stride == home.cols,
                  "pair values are " << home.stride << " elements apart, they must be packed");
  const std::int64_t pairs = home.rows * home.cols;
  if (pairs == 0) return;
  const auto view = comm.view(comm::symmetric_channel::values);
  if (found == pair_values_home::any)
    detail::check_cuda(cudaMemsetAsync(home.data, 0, static_cast<std::size_t>(pairs) * sizeof(A), stream.get()),
                       "cudaMemsetAsync");
  const values_task<A> task{.view = view,
                            .values = values,
                            .expert_row_of = handle.expert_row_of,
                            .returned = home.data,
                            .pairs_per_rank = pairs};
  const auto blocks =
      static_cast<unsigned>(std::clamp<std::int64_t>((pairs + values_threads - 1) / values_threads, 1, 32));
  detail::launch_early(stream, "return_values_kernel", return_values_kernel<A>, dim3(blocks), values_threads, 0, task);
  launch_await(stream, view);
}

TESSERA_NAMESPACE_END
