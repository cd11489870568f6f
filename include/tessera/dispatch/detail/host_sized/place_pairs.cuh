// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/dispatch/detail/host_sized/find_rows.cuh>
#include <tessera/dispatch/host_sized.hpp>

// Which expert rows go home to whom, and where they stand there, for `combine::ordered`. Pairs travel in the order
// (source, token, k), so that their owner and their home number them alike and nobody tells anybody. What a bound drops
// is the last of that order, so home knows that, too.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::host_sized {

struct place_pairs_task {
  int num_ranks;
  int rank;
  int pairs_per_rank;                 // max_tokens * K
  std::int64_t max_pairs;             // of every rank
  const std::int32_t* before;         // [3, R], see host_sized_lists::pairs_before
  const std::int32_t* owners;         // [pairs_per_rank] of this rank's pairs; -1: nobody
  const std::int32_t* expert_row_of;  // [R, pairs_per_rank]
  level_lists lists;
};

// A block for each rank as an owner of this one's pairs, then for each rank as a home.
static __launch_bounds__(number_threads) TESSERA_KERNEL
    place_pairs_kernel(const __grid_constant__ place_pairs_task task) {
  __shared__ int sent[max_host_sized_ranks + 1];
  __shared__ int received[max_host_sized_ranks + 1];
  __shared__ int arriving[max_host_sized_ranks + 1];
  const int R = task.num_ranks;
  const int tid = static_cast<int>(threadIdx.x);
  const int warp = tid / warp_size;
  // Of `count` pairs that stand behind `ahead` others, how many their owner admits.
  const auto admitted = [&](std::int64_t ahead, int count) {
    const std::int64_t left = task.max_pairs - ahead;
    return left <= 0 ? 0 : static_cast<int>(left < count ? left : count);
  };
  if (warp == 0) {
    prefix_sums([&](int r) { return admitted(task.before[r], task.before[R + r]); }, R, received);
    prefix_sums([&](int r) { return task.before[2 * R + r]; }, R, arriving);
    __syncwarp();
    // own pairs stay here and stand behind the others
    prefix_sums([&](int r) { return r == task.rank ? 0 : admitted(arriving[r], task.before[2 * R + r]); }, R, sent);
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int r = tid; r <= R; r += number_threads) {
      task.lists.sent_offsets[r] = sent[r];
      task.lists.received_offsets[r] = received[r];
    }
  }
  const int job = static_cast<int>(blockIdx.x);
  if (job < R) {
    number_tokens(
        task.pairs_per_rank, [&](int i) { return task.owners[i] == job; },
        [&](int i, int number) {
          if (number >= 0) {
            task.lists.places[i] = number < received[job + 1] - received[job] ? received[job] + number : -1;
          } else if (job == 0 && task.owners[i] < 0) {
            task.lists.places[i] = -1;
          }
        });
    return;
  }
  const int source = job - R;
  const std::int32_t* const rows = task.expert_row_of + static_cast<std::int64_t>(source) * task.pairs_per_rank;
  const int first = sent[source == task.rank ? R : source];
  number_tokens(
      task.pairs_per_rank, [&](int i) { return rows[i] >= 0; },
      [&](int i, int number) {
        if (number >= 0) task.lists.sent_rows[first + number] = rows[i];
      });
}

}  // namespace detail::host_sized

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
