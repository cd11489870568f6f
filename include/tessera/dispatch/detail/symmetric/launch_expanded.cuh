// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/symmetric/expand_parts.cuh>
#include <tessera/dispatch/detail/symmetric/launch_send.cuh>
#include <tessera/dispatch/detail/symmetric/operands.cuh>
#include <tessera/dispatch/detail/symmetric/send_parts.cuh>
#include <tessera/dispatch/dispatch.cuh>
#include <tessera/dispatch/symmetric.hpp>

// The host side of rows that are put in the order of experts while others arrive.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

// Rows with flags of parts on the stream, and beside them, on the side stream, the kernel that waits for those.
template <class Comm, class A, class S>
void launch_send_and_expand(device_stream stream, Comm& comm, const dispatch_handle<A>& handle, matrix_view<const S> x,
                            matrix_view<S> received, matrix_view<S> expanded) {
  const auto bytes = [](std::int64_t elements) { return elements * static_cast<std::int64_t>(sizeof(S)); };
  const auto sms = expanded_sms::choose(comm.num_sms(), expect_sm90("dispatch"), comm.slots());
  const auto plan = send_plan::make(static_cast<int>(bytes(x.cols)));

  send_parts_task send{};
  static_cast<send_task&>(send) = {.view = rows_view(comm),
                                   .rows = reinterpret_cast<const std::byte*>(x.data),
                                   .row_stride = bytes(x.stride),
                                   .num_rows = x.rows,
                                   .destinations = handle.destinations,
                                   .sends_own = false,
                                   .received = reinterpret_cast<std::byte*>(received.data),
                                   .received_stride = bytes(received.stride),
                                   .max_tokens = handle.max_tokens,
                                   .plan = plan,
                                   .awaits = false};
  send.parts = comm.view(comm::symmetric_channel::parts);
  send.part_tokens = tokens_of_part(handle.max_tokens);
  const int send_bytes = send_parts_shared_bytes(plan);
  allow_shared_memory(send_parts_kernel, send_bytes);
  launch_early(stream, "send_parts_kernel", send_parts_kernel, dim3(static_cast<unsigned>(sms.rows)),
               static_cast<unsigned>((plan.warps + 1) * warp_size), static_cast<std::size_t>(send_bytes), send);

  expand_task expand{};
  expand.view = send.parts;
  expand.view.timeout_ns += expand.view.timeout_ns / 4;  // of a rank that does not come rows are to say so
  expand.received = send.received;
  expand.max_tokens = handle.max_tokens;
  expand.own = send.rows;
  expand.own_stride = send.row_stride;
  expand.expert_row_of = handle.expert_row_of;
  expand.top_k = handle.top_k;
  expand.expanded = reinterpret_cast<std::byte*>(expanded.data);
  expand.expanded_stride = bytes(expanded.stride);
  expand.part_tokens = send.part_tokens;
  expand.plan = plan;
  allow_shared_memory(expand_parts_kernel, plan.shared_bytes());
  // One block takes a multiprocessor's shared memory: beside them there is room for those that send.
  expand_parts_kernel<<<static_cast<unsigned>(sms.order), static_cast<unsigned>(plan.warps * warp_size),
                        static_cast<std::size_t>(plan.shared_bytes()), comm.side_stream().get()>>>(expand);
  expect_launched("expand_parts_kernel");
}

// @param as_they_come Whether rows are put in order while others arrive; else behind them all.
template <class Comm, class A, class S>
void begin_expanded(device_stream stream, Comm& comm, const dispatch_handle<A>& handle, matrix_view<const S> x,
                    matrix_view<S> received, matrix_view<S> expanded, bool as_they_come) {
  const device_stream side = comm.side_stream();
  if (as_they_come) {
    let_side_wait(stream, comm);
    launch_send_and_expand(stream, comm, handle, x, received, expanded);
  } else {
    launch_send(stream, comm, handle.destinations, true, x, received);
    end_send(stream, comm, received);
    let_side_wait(stream, comm);
    expand_rows(side, matrix_view<const S>(received), handle.expert_row_of, handle.top_k, expanded);
  }
  check_cuda(cudaEventRecord(comm.join_event(), side.get()), "cudaEventRecord");
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
