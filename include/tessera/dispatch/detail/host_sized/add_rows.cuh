// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/dispatch/detail/host_sized/find_rows.cuh>

// The way home, one kernel for every stop: a rank adds its expert rows of a token to what has come back for it, inside
// the host and from other hosts, and rounds once.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::host_sized {

// Which tokens the rows of a result belong to.
struct token_list {
  token_grid tokens;
  const std::int32_t* list;  // null: tokens `first`, `first + 1`, ... of the rail
  int first;
  int skip_from;  // list entries from here on ...
  int skip;       // ... that are this rank's own and left out
  bool of_rail;   // entries are tokens of the rail; otherwise rows of the tables, for which nothing comes back

  struct entry {
    int row;   // in tables of all ranks
    int rail;  // h * max_tokens + t; -1: not of this rail
    int own;   // t
  };
  __device__ entry at(int i) const {
    const int token = list == nullptr ? first + i : __ldg(list + (i < skip_from ? i : i + skip));
    if (!of_rail) return {token, -1, -1};
    return {tokens.row_of(tokens.place(), token), token, token % tokens.max_tokens};
  }
};

// What has come back on one level: a row for each rank that a token was sent to.
template <class T>
struct brought_rows {
  const T* rows = nullptr;  // packed; null: nothing comes back here
  level_lists lists{};
  int ranks = 0;

  // Calls `f(number)` in the order of ranks.
  template <class F>
  __device__ __forceinline__ void for_each(int token, F f) const {
    if (rows == nullptr || token < 0) return;
    for (int r = 0; r < ranks; ++r) {
      const int place = __ldg(lists.places + token * ranks + r);
      if (place >= 0) f(__ldg(lists.sent_offsets + r) + place);
    }
  }
};

template <class S, class A, class Out>
struct add_rows_task {
  row_plan plan;
  token_list tokens;
  matrix_view<const S> pairs;         // expert rows
  const std::int32_t* expert_row_of;  // [R * max_tokens, K]
  int top_k;
  const A* weights;  // of expert rows; null: 1
  brought_rows<S> within, across;
  matrix_view<const S> plus;  // no data: nothing
  matrix_view<Out> sums;
};

// sums[i] = expert rows in the order of k, what came back in the order of ranks, then what is added.
template <class S, class A, class Out, int Width>
__launch_bounds__(row_threads) TESSERA_KERNEL add_rows_kernel(const __grid_constant__ add_rows_task<S, A, Out> task) {
  start_early();
  constexpr int batch = 4;  // rows in flight per thread
  const int vector = task.plan.column();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * task.plan.rows + task.plan.row();
  if (vector >= task.plan.vectors || i >= task.sums.rows) return;
  const std::int64_t column = static_cast<std::int64_t>(vector) * Width;
  const auto token = task.tokens.at(static_cast<int>(i));
  const std::int32_t* const places = task.expert_row_of + static_cast<std::int64_t>(token.row) * task.top_k;

  A sum[Width] = {};
  for (int first = 0; first < task.top_k; first += batch) {
    std::int32_t place[batch];
    A weight[batch];
    elements<S, Width> row[batch];
#pragma unroll
    for (int n = 0; n < batch; ++n) place[n] = first + n < task.top_k ? __ldg(places + first + n) : -1;
#pragma unroll
    for (int n = 0; n < batch; ++n) {
      if (place[n] < 0) continue;
      row[n] = load_once<S, Width>(task.pairs.row(place[n]) + column);
      weight[n] = task.weights != nullptr ? __ldg(task.weights + place[n]) : A(1);
    }
#pragma unroll
    for (int n = 0; n < batch; ++n) {
      if (place[n] >= 0) add_elements(sum, row[n], weight[n]);
    }
  }
  const auto add = [&](const S* from) { add_elements(sum, load_once<S, Width>(from + column)); };
  const std::int64_t hidden = task.sums.cols;
  task.within.for_each(token.rail, [&](int number) { add(task.within.rows + number * hidden); });
  task.across.for_each(token.own, [&](int number) { add(task.across.rows + number * hidden); });
  if (task.plus.data != nullptr) add(task.plus.row(i));
  elements<Out, Width> out;
#pragma unroll
  for (int j = 0; j < Width; ++j) out.value[j] = static_cast<Out>(sum[j]);
  store_elements(task.sums.row(i) + column, out);
}

template <class A>
struct add_values_task {
  token_list tokens;
  const A* values;                    // of expert rows
  const std::int32_t* expert_row_of;  // [R * max_tokens, K]
  int top_k;
  brought_rows<A> within, across;
  matrix_view<A> sums;
};

// The same for one number per pair, which one rank alone has: the others add 0.
template <class A>
__launch_bounds__(row_threads) TESSERA_KERNEL add_values_kernel(const __grid_constant__ add_values_task<A> task) {
  const std::int64_t pair = static_cast<std::int64_t>(blockIdx.x) * row_threads + threadIdx.x;
  if (pair >= task.sums.rows * task.top_k) return;
  const std::int64_t i = pair / task.top_k;
  const int k = static_cast<int>(pair - i * task.top_k);
  const auto token = task.tokens.at(static_cast<int>(i));
  const std::int32_t place = __ldg(task.expert_row_of + static_cast<std::int64_t>(token.row) * task.top_k + k);
  A sum = place >= 0 ? __ldg(task.values + place) : A(0);
  const std::int64_t top_k = task.top_k;
  task.within.for_each(token.rail, [&](int number) { sum += task.within.rows[number * top_k + k]; });
  task.across.for_each(token.own, [&](int number) { sum += task.across.rows[number * top_k + k]; });
  task.sums.row(i)[k] = sum;
}

template <class S, class A, class Out>
void launch_add_rows(device_stream stream, add_rows_task<S, A, Out> task) {
  constexpr int width = 16 / sizeof(S);
  const std::int64_t hidden = task.sums.cols;
  const auto packed = [&](const S* rows) { return matrix_view<const S>{rows, 2, hidden}; };
  if (moves_vectors<S>(hidden, task.pairs, packed(task.within.rows), packed(task.across.rows), task.plus, task.sums)) {
    task.plan = make_row_plan(hidden, width);
    launch_rows(stream, add_rows_kernel<S, A, Out, width>, task, task.sums.rows, "add_rows_kernel");
  } else {
    task.plan = make_row_plan(hidden, 1);
    launch_rows(stream, add_rows_kernel<S, A, Out, 1>, task, task.sums.rows, "add_rows_kernel");
  }
}

template <class A>
void launch_add_values(device_stream stream, const add_values_task<A>& task) {
  const std::int64_t blocks = (task.sums.rows * task.top_k + row_threads - 1) / row_threads;
  if (blocks == 0) return;
  add_values_kernel<A><<<static_cast<unsigned>(blocks), row_threads, 0, stream.get()>>>(task);
  expect_launched("add_values_kernel");
}

}  // namespace detail::host_sized

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
