// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/symmetric/operands.cuh>
#include <tessera/dispatch/detail/symmetric/return_values.cuh>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/dispatch/symmetric.hpp>

// The host side of rows on their way to the owners of experts, and what launches of other kernels share with it.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

template <class Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
}

// Orders the side stream after the caller's.
template <class Comm>
void let_side_wait(device_stream stream, const Comm& comm) {
  check_cuda(cudaEventRecord(comm.fork_event(), stream.get()), "cudaEventRecord");
  check_cuda(cudaStreamWaitEvent(comm.side_stream().get(), comm.fork_event(), 0), "cudaStreamWaitEvent");
}

inline void launch_await(device_stream stream, const comm::symmetric_view& view) {
  launch_early(stream, "await_kernel", await_kernel, dim3(1), warp_size, 0, view);
}

// What rows on their way to owners need. Routings travel at the same time: of a rank that comes to neither they are to
// say so, which is why rows wait for it a little longer.
template <class Comm>
comm::symmetric_view rows_view(const Comm& comm) {
  auto view = comm.view(comm::symmetric_channel::rows);
  view.timeout_ns += view.timeout_ns / 8;
  return view;
}

// The kernel that sends rows. @param destinations Of each token; null: all ranks. @param sends_own Whether this rank is
// one of them.
template <class Comm, class S>
void launch_send(device_stream stream, Comm& comm, const std::uint32_t* destinations, bool sends_own,
                 matrix_view<const S> x, matrix_view<S> received) {
  const int num_sms = expect_sm90("dispatch");
  const auto bytes = [](std::int64_t elements) { return elements * static_cast<std::int64_t>(sizeof(S)); };
  const auto plan = send_plan::make(static_cast<int>(bytes(x.cols)));
  const send_task task{.view = rows_view(comm),
                       .rows = reinterpret_cast<const std::byte*>(x.data),
                       .row_stride = bytes(x.stride),
                       .num_rows = x.rows,
                       .destinations = destinations,
                       .sends_own = sends_own,
                       .received = reinterpret_cast<std::byte*>(received.data),
                       .received_stride = bytes(received.stride),
                       .max_tokens = received.rows / comm.size(),
                       .plan = plan,
                       .awaits = awaits_in_sender(bytes(received.rows * received.stride))};
  allow_shared_memory(send_rows_kernel, plan.shared_bytes());
  const int blocks = symmetric_sms::choose(comm.num_sms(), num_sms, comm.slots()).rows;
  launch_early(stream, "send_rows_kernel", send_rows_kernel, dim3(static_cast<unsigned>(blocks)),
               static_cast<unsigned>(plan.warps * warp_size), static_cast<std::size_t>(plan.shared_bytes()), task);
}

// Lets the stream wait for rows that `launch_send` has sent.
template <class Comm, class S>
void end_send(device_stream stream, const Comm& comm, const matrix_view<S>& received) {
  if (awaits_in_sender(received.rows * received.stride * static_cast<std::int64_t>(sizeof(S)))) return;
  launch_await(stream, comm.view(comm::symmetric_channel::rows));
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
