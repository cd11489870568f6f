// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <tessera/router/detail/device/balance.cuh>

// Balance losses, one warp per token: a cluster of blocks per chunk of tokens, or the whole device where there is room
// for the losses of every token.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class Score, class A, class... Balances>
struct losses_task : balance_task<Score, A, Balances...> {
  std::int64_t chunk_tokens;
  matrix_view<A> chunk_losses;
  static constexpr int num_losses = (0 + ... + int(balance_is_loss<Balances>));
};

// Sum over the experts of a loss on load, for one token.
template <class Balance, int Chunks, class A>
__device__ __forceinline__ A add_loads(const cells<Chunks, A>& p, const A* loads, const cell_map& map, int lane,
                                       const typename Balance::options& policy) {
  cells<Chunks, A> load;
  load_shared_cells<Chunks>(loads, map, lane, load);
  A sum = A(0);
  for_each_cell<Chunks>([&](int c, int j) {
    if (map.full || map.holds(map.first_expert(c, lane) + j, j)) {
      sum += Balance::value(p.value[c][j], load.value[c][j], policy);
    }
  });
  return warp_sum(sum);
}

// Calls add(loss, value) for the losses whose scope is the micro-batch.
template <class Score, int Chunks, class Task, class A, class F>
__device__ __forceinline__ void token_losses(const Task& task, const balance_shared<A, Chunks>& shared, std::int64_t t,
                                             int lane, F&& add) {
  [[maybe_unused]] cells<Chunks, A> p;
  if constexpr (Task::by_batch) {
    softmax_terms<A> terms;
    A total;
    load_cells<Chunks>(task.logits.row(t), task.map, lane, p);
    probabilities<Score, Chunks>(p, task.map, lane, task.score, terms, total);
  }
  [[maybe_unused]] A log_sum = A(0);
  if constexpr (Task::by_size) {
    cells<Chunks, A> x;
    load_cells<Chunks>(task.logits.row(t), task.map, lane, x);
    log_sum = log_sum_exp_of<Chunks>(x, task.map, lane);
  }
  each_loss(task.balances, [&](auto tag, const auto& policy, int loss) {
    using balance = typename decltype(tag)::type;
    if constexpr (balance::by == balance_by::batch_load) {
      add(loss, add_loads<balance>(p, shared.batch_load, task.map, lane, policy));
    } else if constexpr (balance::by == balance_by::log_sum_exp) {
      add(loss, balance::value(log_sum, policy));
    }
  });
}

inline constexpr int token_loss_threads = 256;

// Losses of every token by the whole device; `values` [T, num_losses].
template <class Score, int Chunks, class A, class... Balances>
__launch_bounds__(token_loss_threads) TESSERA_KERNEL
    token_losses_kernel(const __grid_constant__ losses_task<Score, A, Balances...> task, A* values) {
  constexpr int num_losses = losses_task<Score, A, Balances...>::num_losses;
  constexpr int warps = token_loss_threads / warp_size;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const balance_shared<A, Chunks> shared(shared_bytes);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  if constexpr (losses_task<Score, A, Balances...>::by_batch) set_batch_loads<Chunks>(task, shared);
  __syncthreads();
  for (std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * warps + warp; t < task.logits.rows;
       t += static_cast<std::int64_t>(gridDim.x) * warps) {
    token_losses<Score, Chunks>(task, shared, t, lane, [&](int loss, A value) {
      if (lane == 0) values[t * num_losses + loss] = value;
    });
  }
}

// Adds them up in a fixed order, a block per chunk.
template <class Score, class A, class... Balances>
__launch_bounds__(list_threads, 1) TESSERA_KERNEL
    sum_losses_kernel(const __grid_constant__ losses_task<Score, A, Balances...> task, const A* values) {
  constexpr int num_losses = losses_task<Score, A, Balances...>::num_losses;
  __shared__ double warp_sums[list_warps][num_losses];
  const int tid = static_cast<int>(threadIdx.x);
  const std::int64_t first = blockIdx.x * task.chunk_tokens;
  const std::int64_t after = first + task.chunk_tokens;
  const std::int64_t last = after < task.logits.rows ? after : task.logits.rows;
  double sums[num_losses] = {};
  for (std::int64_t t = first + tid; t < last; t += list_threads) {
#pragma unroll
    for (int loss = 0; loss < num_losses; ++loss) sums[loss] += static_cast<double>(values[t * num_losses + loss]);
  }
#pragma unroll
  for (int loss = 0; loss < num_losses; ++loss) {
    const double sum = warp_sum(sums[loss]);
    if (tid % warp_size == 0) warp_sums[tid / warp_size][loss] = sum;
  }
  __syncthreads();
  if (tid < num_losses) {
    double sum = 0;
    for (int w = 0; w < list_warps; ++w) sum += warp_sums[w][tid];
    task.chunk_losses(blockIdx.x, tid) =
        first < last ? static_cast<A>(static_cast<double>(task.coefficients[tid]) * sum / task.tokens()) : A(0);
  }
}

template <class Score, int Chunks, class A, class... Balances>
__launch_bounds__(list_threads, 1) TESSERA_KERNEL
    losses_kernel(const __grid_constant__ losses_task<Score, A, Balances...> task) {
  using task_type = losses_task<Score, A, Balances...>;
  constexpr int num_losses = task_type::num_losses;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const balance_shared<A, Chunks> shared(shared_bytes);
  __shared__ double warp_sums[list_warps][num_losses];
  __shared__ double block_sums[num_losses];
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % warp_size;
  const int warp = tid / warp_size;
  const int step = cluster_size() * list_warps;
  const std::int64_t chunk = blockIdx.x / static_cast<unsigned>(cluster_size());
  const std::int64_t first = chunk * task.chunk_tokens;
  const std::int64_t after = first + task.chunk_tokens;
  const std::int64_t last = after < task.logits.rows ? after : task.logits.rows;

  // Adds f's value of each loss over the tokens [begin, end), in a fixed order; the result in thread `loss` of rank 0.
  const auto add_tokens = [&](std::int64_t begin, std::int64_t end, auto&& token) {
    double sums[num_losses] = {};
    for (std::int64_t t = begin + cluster_rank() * list_warps + warp; t < end; t += step) token(t, sums);
    if (lane == 0) {
      for (int loss = 0; loss < num_losses; ++loss) warp_sums[warp][loss] = sums[loss];
    }
    __syncthreads();
    if (tid < num_losses) {
      double sum = 0;
      for (int w = 0; w < list_warps; ++w) sum += warp_sums[w][tid];
      block_sums[tid] = sum;
    }
    cluster_sync();
    double sum = 0;
    if (tid < num_losses && cluster_rank() == 0) {
      for (int r = 0; r < cluster_size(); ++r) sum += cluster_read_double(block_sums + tid, r);
    }
    cluster_sync();
    return sum;
  };
  double result = 0;  // of thread `loss`
  if constexpr (task_type::by_batch || task_type::by_size) {
    if constexpr (task_type::by_batch) set_batch_loads<Chunks>(task, shared);
    __syncthreads();
    const double sum = add_tokens(first, last, [&](std::int64_t t, double* sums) {
      token_losses<Score, Chunks>(task, shared, t, lane,
                                  [&](int loss, A value) { sums[loss] += static_cast<double>(value); });
    });
    if (tid < num_losses) result += static_cast<double>(task.coefficients[tid]) * sum / task.tokens();
  }
  if constexpr (task_type::by_sequence) {
    const std::int64_t sequences = task.num_sequence_offsets == 0 ? 1 : task.num_sequence_offsets - 1;
    for (std::int64_t s = 0; s < sequences; ++s) {
      std::int64_t begin;
      std::int64_t end;
      task.sequence(s, begin, end);
      if (begin >= end || end - 1 < first || end - 1 >= last) continue;
      set_sequence_loads<Score, Chunks>(task, shared, begin, end);
      const double sum = add_tokens(begin, end, [&](std::int64_t t, double* sums) {
        cells<Chunks, A> p;
        softmax_terms<A> terms;
        A total;
        load_cells<Chunks>(task.logits.row(t), task.map, lane, p);
        probabilities<Score, Chunks>(p, task.map, lane, task.score, terms, total);
        each_loss(task.balances, [&](auto tag, const auto& policy, int loss) {
          using balance = typename decltype(tag)::type;
          if constexpr (balance::by == balance_by::sequence_load) {
            sums[loss] += static_cast<double>(add_loads<balance>(p, shared.sequence_load, task.map, lane, policy));
          }
        });
      });
      if (tid < num_losses) {
        result +=
            static_cast<double>(task.coefficients[tid]) * sum / (task.sequences() * static_cast<double>(end - begin));
      }
    }
  }
  if (cluster_rank() == 0 && tid < num_losses)
    task.chunk_losses(chunk, tid) = static_cast<A>(first < last ? result : 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side

template <class Score, class Select, class Weigh, class... Balances, accumulate_type A>
void losses_on_device(device_stream stream, const router<Score, Select, Weigh, Balances...>& r,
                      const router_inputs<A>& in, const_balance_counts counts, const float* coefficients,
                      std::int64_t chunk_tokens, const matrix_view<A>& chunk_losses,
                      std::type_identity_t<A>* token_values) {
  using router_type = router<Score, Select, Weigh, Balances...>;
  check_losses_out(in, chunk_tokens, chunk_losses, router_type::num_losses);
  if constexpr (router_type::num_losses > 0) {
    const int num_sms = expect_device("router::losses");
    losses_task<Score, A, Balances...> task{};
    fill_balance_task(task, r.get_options(), in, counts, coefficients, true, router_type::num_losses);
    task.balances = make_balance_pack<Balances...>(r.get_options().balance);
    task.chunk_tokens = chunk_tokens == 0 ? in.logits.rows : chunk_tokens;
    task.chunk_losses = chunk_losses;
    if (chunk_losses.rows == 0) return;
    const bool narrow = num_chunks_for(task.map.num_experts) == 1;
    if (token_values != nullptr && !losses_task<Score, A, Balances...>::by_sequence) {
      constexpr int warps = token_loss_threads / warp_size;
      const std::int64_t blocks =
          std::clamp<std::int64_t>((in.logits.rows + warps - 1) / warps, 1, std::int64_t{num_sms} * 6);
      const auto launch = [&](auto kernel, std::size_t bytes) {
        kernel<<<static_cast<unsigned>(blocks), token_loss_threads, bytes, stream.get()>>>(task, token_values);
        expect_launched("token_losses_kernel");
      };
      if (narrow) {
        launch(token_losses_kernel<Score, 1, A, Balances...>, balance_shared<A, 1>::bytes(token_loss_threads));
      } else {
        launch(token_losses_kernel<Score, 4, A, Balances...>, balance_shared<A, 4>::bytes(token_loss_threads));
      }
      sum_losses_kernel<Score, A, Balances...>
          <<<static_cast<unsigned>(chunk_losses.rows), list_threads, 0, stream.get()>>>(task, token_values);
      expect_launched("sum_losses_kernel");
      return;
    }
    const int cluster = cluster_for(task.chunk_tokens, list_warps);
    if (narrow) {
      launch_clusters(stream, chunk_losses.rows, cluster, list_threads, balance_shared<A, 1>::bytes(list_threads),
                      losses_kernel<Score, 1, A, Balances...>, task, "losses_kernel");
    } else {
      launch_clusters(stream, chunk_losses.rows, cluster, list_threads, balance_shared<A, 4>::bytes(list_threads),
                      losses_kernel<Score, 4, A, Balances...>, task, "losses_kernel");
    }
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
