// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Dispatch and combine between GPUs wherever their communicator reaches, by its sends and receives: the one path that
/// is **sized on the host**. For sm_80 and later.
///
/// `exchange_routing` gathers the routing of all ranks, from which every rank finds out by itself which rows it sends
/// and receives, and **waits on the host until the stream has come there**, once, to read how many: bounded, see
/// `wait` of the communicator. `read_counts` waits in the same way. Nothing else here waits, and nothing allocates; but
/// nothing here can be captured in a CUDA graph, and calls throw on a stream that is being captured.
///
/// The lists of the handle are those of `dispatch/symmetric.cuh`, and so are the bits of all results with one level.
/// Rows stand packed in `received`, in the order (source, token): the gather list names them so. With several hosts
/// (`host_grid`) a row crosses the network once per host, to the rank there that has its source's number, which hands
/// it on inside the host. On the way home ranks of a host add up first: an owner its rows of a token in fp32 in the
/// order of k, rounded; the rank of the rail, to its own rows, those of the other owners in the order of ranks,
/// rounded; and home, to what its own host has, the sums of the other hosts in the order of hosts, rounded once.
/// Run-to-run bitwise the same. Or every pair's row goes straight home, over no other rank, and all are added there in
/// the order of k (`combine_pairs`), which gives the bits of one GPU.
///
/// Every operation is a collective of the communicator, called in the same order by all ranks.

#include <cstdint>
#include <span>
#include <type_traits>

#include <tessera/dispatch/combine.hpp>
#include <tessera/dispatch/detail/device/capacity.cuh>
#include <tessera/dispatch/detail/device/expect_routing.cuh>
#include <tessera/dispatch/detail/host_sized/add_rows.cuh>
#include <tessera/dispatch/detail/host_sized/exchange.cuh>
#include <tessera/dispatch/detail/host_sized/levels.cuh>
#include <tessera/dispatch/detail/host_sized/pack_rows.cuh>
#include <tessera/dispatch/dispatch.cuh>
#include <tessera/dispatch/host_sized.hpp>

TESSERA_NAMESPACE_BEGIN

/// How the ranks of a communicator stand on hosts: all on one where it does not say. @param comm R ranks.
template <host_sized_communicator Comm>
host_grid grid_of(const Comm& comm) {
  if constexpr (requires { comm.ranks_per_host(); }) {
    return host_grid::make(comm.size(), comm.ranks_per_host());
  } else {
    return host_grid::make(comm.size(), 0);
  }
}

/// Gathers the routing of all ranks, makes the lists, and **waits on the host** for the counts, at most for the
/// communicator's timeout.
/// @param stream    Where the work is enqueued; not being captured.
/// @param comm      R ranks.
/// @param layout    Where the experts are; its members are `TESSERA_HD` and read memory that the device sees.
/// @param bounds    Sizes, the same on all ranks but for `num_local_experts`.
/// @param options   Capacity and overflow. A capacity drops this rank's own pairs before anything travels, with two
/// more launches, or three by weight, and is counted in `handle.total`. `overflow_policy::drop` admits pairs in the
/// order (source, token, k) and counts on the receiver what it drops.
/// @param chosen    `[T, K]` ids and weights; ids outside [0, E) are slots without expert.
/// @param handle    From `dispatch_handle::layout_device`, written; `destinations` is not.
/// @param lists     From `host_sized_lists::layout`, written.
/// @param tables    Scratch; its sort's barrier was 0 before its first use.
/// @return what the operations of this handle need.
/// @throws invalid_argument if shapes, bounds, options or memory do not fit, or the stream is being captured; what
/// `wait` of the communicator throws.
/// @throws error on every rank, with the same text, if a rank's bound would be exceeded and the policy is
/// `overflow_policy::error`; the communicator goes on.
template <host_sized_communicator Comm, class Layout, class A>
host_sized_counts exchange_routing(device_stream stream, Comm& comm, const Layout& layout,
                                   const dispatch_bounds& bounds, const dispatch_options& options,
                                   const routing<A>& chosen, const dispatch_handle<A>& handle,
                                   const host_sized_lists& lists, const host_sized_tables<A>& tables) {
  using namespace detail::host_sized;
  const host_grid grid = grid_of(comm);
  expect_no_capture(stream, "exchange_routing");
  detail::expect_routing(comm, layout, bounds, chosen);
  TESSERA_EXPECTS(lists.words != nullptr && tables.records != nullptr && tables.sort.barrier != nullptr &&
                      tables.sort.block_counts != nullptr && handle.expert_row_of != nullptr &&
                      (!lists.ordered() || tables.owners_home != nullptr),
                  "exchange_routing needs host_sized_lists::layout, host_sized_tables::layout of the same combine with "
                  "a router_workspace that has barrier and counts, and a handle of dispatch_handle::layout_device");
  const int num_sms = detail::expect_device("exchange_routing");
  const exchange_call<A> call{.stream = stream,
                              .tokens = {grid, comm.rank(), static_cast<int>(bounds.max_tokens)},
                              .bounds = bounds,
                              .options = options,
                              .handle = handle,
                              .lists = lists,
                              .tables = tables,
                              .num_sms = num_sms};
  const routing<A> kept = detail::keep_within_capacity(stream, bounds, options, chosen, tables.sort, tables.capacity,
                                                       num_sms, &handle.total->capacity_drops);
  gather_routing(call, comm, kept);
  find_owners(call, layout);
  number_rows(call);
  list_rows(call);
  sort_pairs(call);
  if (lists.ordered()) place_pairs(call);
  return wait_for_counts(call, comm);
}

/// The counts of an exchange that was made before, for backward: **waits on the host** for the stream, at most for the
/// communicator's timeout. @param stream Where the exchange was enqueued, or one that comes after it; not being
/// captured. @param comm As there. @param lists As there. @return what `exchange_routing` returned.
template <host_sized_communicator Comm>
host_sized_counts read_counts(device_stream stream, Comm& comm, const host_sized_lists& lists) {
  using namespace detail::host_sized;
  expect_no_capture(stream, "read_counts");
  TESSERA_EXPECTS(lists.words != nullptr, "read_counts needs the lists of an exchange_routing");
  const host_grid grid = grid_of(comm);
  const std::int64_t words = host_sized_counts::words(grid, lists.ordered());
  return host_sized_counts::read(grid, comm.rank(), read_words(stream, comm, lists.words, words), lists.ordered());
}

/// The counts that this communicator has read last, if they were those of these lists; otherwise `read_counts`, which
/// waits. For the operations after the first of a pass: the first one reads, because the memory of lists may have been
/// filled anew since. Parameters as there.
template <host_sized_communicator Comm>
host_sized_counts known_counts(device_stream stream, Comm& comm, const host_sized_lists& lists) {
  const std::span<std::int32_t> words = comm.host_words();
  if (*detail::host_sized::source_of(words) != lists.words) return read_counts(stream, comm, lists);
  return host_sized_counts::read(grid_of(comm), comm.rank(), words.data(), lists.ordered());
}

/// Sends each token once to every rank that owns one of its experts, over a rank of their host. Its adjoint is
/// `combine` without weights. Enqueues, does not synchronise.
/// @param stream   Where the work is enqueued; not being captured.
/// @param comm     R ranks.
/// @param counts   From `exchange_routing` or `read_counts`.
/// @param lists    From `exchange_routing`; forward and backward use the same.
/// @param x        `[T, d]`.
/// @param received `[>= counts.received_rows(), d]`, packed; rows that the gather list names are written.
/// @param buffers  Scratch, laid out for rows of at least these bytes.
template <host_sized_communicator Comm, class S>
void dispatch_rows(device_stream stream, Comm& comm, const host_sized_counts& counts, const host_sized_lists& lists,
                   matrix_view<const S> x, matrix_view<S> received, const host_sized_buffers& buffers) {
  using namespace detail::host_sized;
  expect_no_capture(stream, "dispatch");
  expect_counts(counts, comm.size(), comm.rank());
  expect_matrix(x, -1, received.cols, "rows to dispatch");
  TESSERA_EXPECTS(received.rows >= counts.received_rows(),
                  "room for " << received.rows << " received rows, " << counts.received_rows() << " are needed");
  TESSERA_EXPECTS(received.stride == received.cols,
                  "received rows are " << received.stride << " elements apart, they must be packed");
  const host_grid& grid = counts.grid;
  const int place = grid.place_of(counts.rank);
  const int host = grid.host_of(counts.rank);
  auto& inside = within_host(comm, grid);
  matrix_view<const S> source = x;
  if (grid.two_levels()) {
    S* const sent = reinterpret_cast<S*>(buffers.across);
    auto& rail = across_hosts(comm);
    const matrix_view<S> middle{reinterpret_cast<S*>(buffers.middle),
                                counts.across.received[static_cast<std::size_t>(grid.hosts())], x.cols};
    pack_rows(stream, lists.across, counts.across, rail.size(), host, x, sent, middle);
    send_rows(stream, rail, counts.across, static_cast<const S*>(sent), middle.data, x.cols);
    source = middle;
  }
  S* const sent = reinterpret_cast<S*>(buffers.within);
  pack_rows(stream, lists.within, counts.within, inside.size(), place, source, sent, received);
  send_rows(stream, inside, counts.within, static_cast<const S*>(sent), received.data, x.cols);
}

/// Brings the outputs of experts home and adds them up: `combine::reduced`. A token without pairs becomes what is added
/// to it, or zeros. Enqueues, does not synchronise.
/// @param stream     Where the work is enqueued; not being captured.
/// @param comm       R ranks.
/// @param counts     From `exchange_routing` or `read_counts`.
/// @param lists      From `exchange_routing`.
/// @param handle     From `exchange_routing`.
/// @param weights    Whether rows are multiplied by their routing weights.
/// @param pairs      `[>= received_pairs, d]` outputs of experts in the order of the handle's rows.
/// @param plus       `[T, d]` added in the end, such as outputs of shared experts; without data nothing is added.
/// @param y          `[T, d]`, overwritten.
/// @param buffers    Scratch, laid out for rows of at least these bytes.
template <host_sized_communicator Comm, class A, class S, class Out>
void combine_rows(device_stream stream, Comm& comm, const host_sized_counts& counts, const host_sized_lists& lists,
                  const dispatch_handle<A>& handle, combine_weights weights, matrix_view<const S> pairs,
                  matrix_view<const S> plus, matrix_view<Out> y, const host_sized_buffers& buffers) {
  using namespace detail::host_sized;
  expect_no_capture(stream, "combine");
  expect_counts(counts, comm.size(), comm.rank());
  expect_matrix(pairs, -1, y.cols, "rows to combine");
  TESSERA_EXPECTS(y.rows <= handle.max_tokens,
                  y.rows << " tokens, the handle is of max_tokens = " << handle.max_tokens);
  if (plus.data != nullptr) expect_matrix(plus, y.rows, y.cols, "rows to add");
  static_cast<void>(detail::expect_device("combine"));
  const A* const scale = weights == combine_weights::routing ? handle.pair_weights : nullptr;
  bring_home<S>(stream, comm, counts, lists, buffers, handle.max_tokens, y.rows, y.cols,
                [&](const token_list& tokens, const brought_rows<S>& within, const brought_rows<S>& across,
                    std::int64_t rows, S* sums) {
                  const auto add = [&](auto to, const matrix_view<const S>& last) {
                    using to_type = std::remove_pointer_t<decltype(to.data)>;
                    launch_add_rows<S, A, to_type>(stream, {.plan = {},
                                                            .tokens = tokens,
                                                            .pairs = pairs,
                                                            .expert_row_of = handle.expert_row_of,
                                                            .top_k = handle.top_k,
                                                            .weights = scale,
                                                            .within = within,
                                                            .across = across,
                                                            .plus = last,
                                                            .sums = to});
                  };
                  if (tokens.list != nullptr) {
                    add(matrix_view<S>{sums, rows, y.cols}, {});
                  } else {
                    add(y, plus);
                  }
                });
}

/// Brings the output of every expert straight home and adds it up there in the order of k: `combine::ordered`. The bits
/// of a token are those that one GPU computes. A token without pairs becomes what is added to it, or zeros. Enqueues,
/// does not synchronise.
/// @param stream  Where the work is enqueued; not being captured.
/// @param comm    R ranks. Rows go over none of its levels: every rank sends to every other.
/// @param counts  From `exchange_routing` or `read_counts`.
/// @param lists   From `exchange_routing`, laid out for `combine::ordered`.
/// @param bounds  As there.
/// @param pairs   `[>= received_pairs, d]` outputs of experts in the order of the handle's rows.
/// @param weights `[T, K]` routing weights of this rank's tokens; without data every weight is 1, and K is its number
/// of columns all the same.
/// @param plus    `[T, d]` added in the end; without data nothing is added.
/// @param y       `[T, d]`, overwritten.
/// @param buffers Scratch, laid out for `combine::ordered` and rows of at least these bytes.
template <host_sized_communicator Comm, class A, class S, class Out>
void combine_pairs(device_stream stream, Comm& comm, const host_sized_counts& counts, const host_sized_lists& lists,
                   const dispatch_bounds& bounds, matrix_view<const S> pairs, matrix_view<const A> weights,
                   std::type_identity_t<matrix_view<const S>> plus, matrix_view<Out> y,
                   const host_sized_buffers& buffers) {
  using namespace detail::host_sized;
  expect_no_capture(stream, "combine");
  expect_counts(counts, comm.size(), comm.rank());
  TESSERA_EXPECTS(lists.ordered(), "combine_pairs needs lists and buffers that are laid out for combine::ordered");
  expect_matrix(pairs, -1, y.cols, "rows to combine");
  TESSERA_EXPECTS(y.rows <= bounds.max_tokens, y.rows << " tokens, the bound max_tokens is " << bounds.max_tokens);
  TESSERA_EXPECTS(weights.cols == bounds.top_k, "top_k = " << weights.cols << ", the bounds have " << bounds.top_k);
  S* const sent = reinterpret_cast<S*>(buffers.sums);
  const matrix_view<S> home{reinterpret_cast<S*>(buffers.within),
                            counts.pairs.received[static_cast<std::size_t>(comm.size())], y.cols};
  pack_rows(stream, lists.pairs_home, counts.pairs, comm.size(), comm.rank(), pairs, sent, home);
  send_rows(stream, comm, counts.pairs, static_cast<const S*>(sent), home.data, y.cols);
  combine_rows(stream, matrix_view<const S>(home), lists.pairs_home.places, weights, plus, y);
}

/// Brings one number per expert row home to its pair: gradients of routing weights. Pairs that were not sent, or were
/// dropped, become 0. Enqueues, does not synchronise.
/// @param stream  Where the work is enqueued; not being captured.
/// @param comm    R ranks.
/// @param counts  From `exchange_routing` or `read_counts`.
/// @param lists   From `exchange_routing`.
/// @param handle  From `exchange_routing`.
/// @param values  `[received_pairs]`.
/// @param home    `[T, K]`, overwritten.
/// @param buffers Scratch, laid out for rows of at least K numbers.
template <host_sized_communicator Comm, class A>
void return_pair_values(device_stream stream, Comm& comm, const host_sized_counts& counts,
                        const host_sized_lists& lists, const dispatch_handle<A>& handle,
                        const std::type_identity_t<A>* values, matrix_view<std::type_identity_t<A>> home,
                        const host_sized_buffers& buffers) {
  using namespace detail::host_sized;
  expect_no_capture(stream, "return_pair_values");
  expect_counts(counts, comm.size(), comm.rank());
  expect_matrix(home, -1, handle.top_k, "pair values");
  TESSERA_EXPECTS(home.rows <= handle.max_tokens,
                  home.rows << " tokens, the handle is of max_tokens = " << handle.max_tokens);
  bring_home<A>(stream, comm, counts, lists, buffers, handle.max_tokens, home.rows, handle.top_k,
                [&](const token_list& tokens, const brought_rows<A>& within, const brought_rows<A>& across,
                    std::int64_t rows, A* sums) {
                  const matrix_view<A> to = tokens.list != nullptr ? matrix_view<A>{sums, rows, handle.top_k} : home;
                  launch_add_values<A>(stream, {.tokens = tokens,
                                                .values = values,
                                                .expert_row_of = handle.expert_row_of,
                                                .top_k = handle.top_k,
                                                .within = within,
                                                .across = across,
                                                .sums = to});
                });
}

TESSERA_NAMESPACE_END
