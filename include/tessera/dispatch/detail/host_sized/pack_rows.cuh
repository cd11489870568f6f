// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/dispatch/host_sized.hpp>

// Rows of one level in the order of their destinations: those for others to the buffer that is sent, those that stay to
// their place among what arrives.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::host_sized {

template <class S>
struct pack_task {
  row_plan plan;
  matrix_view<const S> source;
  const std::int32_t* rows;  // [sent + kept]: row of the source
  matrix_view<S> sent;
  matrix_view<S> kept;
};

template <class S, int Width>
__launch_bounds__(row_threads) TESSERA_KERNEL pack_rows_kernel(const __grid_constant__ pack_task<S> task) {
  start_early();
  constexpr int batch = 4;  // rows in flight per thread
  const int vector = task.plan.column();
  if (vector >= task.plan.vectors) return;
  const std::int64_t column = static_cast<std::int64_t>(vector) * Width;
  const std::int64_t end = task.sent.rows + task.kept.rows;
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * task.plan.rows + task.plan.row()) * batch;
  elements<S, Width> row[batch];
#pragma unroll
  for (int i = 0; i < batch; ++i) {
    if (first + i < end) row[i] = load_once<S, Width>(task.source.row(__ldg(task.rows + first + i)) + column);
  }
#pragma unroll
  for (int i = 0; i < batch; ++i) {
    const std::int64_t at = first + i;
    if (at >= end) continue;
    S* const to = at < task.sent.rows ? task.sent.row(at) : task.kept.row(at - task.sent.rows);
    store_elements(to + column, row[i]);
  }
}

// @param own This rank in the level. @param sent Packed rows for others. @param received Packed rows of the level.
template <class S>
void pack_rows(device_stream stream, const level_lists& lists, const level_counts& counts, int ranks, int own,
               matrix_view<const S> source, S* sent, matrix_view<S> received) {
  const std::int64_t others = counts.sent[static_cast<std::size_t>(ranks)];
  pack_task<S> task{{},
                    source,
                    lists.sent_rows,
                    {sent, others, source.cols},
                    received.subrows(counts.received[static_cast<std::size_t>(own)], counts.own_rows(own))};
  const std::int64_t groups = (task.sent.rows + task.kept.rows + 3) / 4;
  constexpr int width = 16 / sizeof(S);
  if (moves_vectors<S>(source.cols, source, task.sent, task.kept)) {
    task.plan = make_row_plan(source.cols, width);
    launch_rows(stream, pack_rows_kernel<S, width>, task, groups, "pack_rows_kernel");
  } else {
    task.plan = make_row_plan(source.cols, 1);
    launch_rows(stream, pack_rows_kernel<S, 1>, task, groups, "pack_rows_kernel");
  }
}

}  // namespace detail::host_sized

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
