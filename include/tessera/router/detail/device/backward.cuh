// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <tessera/router/detail/device/balance.cuh>

// The joint backward of weights and losses, one warp per token, and the step of the bias.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class Score, class Weigh, class A, class... Balances>
struct backward_task : balance_task<Score, A, Balances...> {
  typename Weigh::options weigh;
  matrix_view<const std::int32_t> ids;
  matrix_view<const A> dweights;
  A loss_scale;
  const float* device_loss_scale;  // multiplied to the other; null: 1
  matrix_view<A> dlogits;
  static constexpr int num_losses = (0 + ... + int(balance_is_loss<Balances>));
};

inline constexpr int backward_threads = 256;
inline constexpr int backward_warps = backward_threads / warp_size;

template <class Score, class Weigh, int Chunks, class A, class... Balances>
__launch_bounds__(backward_threads) TESSERA_KERNEL
    backward_kernel(const __grid_constant__ backward_task<Score, Weigh, A, Balances...> task) {
  using task_type = backward_task<Score, Weigh, A, Balances...>;
  constexpr int num_losses = task_type::num_losses;
  constexpr bool scores_all = Score::over == score_over::all || task_type::on_load;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const balance_shared<A, Chunks> shared(shared_bytes);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  A* const spread = reinterpret_cast<A*>(shared_bytes + balance_shared<A, Chunks>::bytes(backward_threads)) +
                    warp * balance_shared<A, Chunks>::width;
  const cell_map map = task.map;
  const int k = task.top_k;

  [[maybe_unused]] A factors[num_losses == 0 ? 1 : num_losses];
  double scale = static_cast<double>(task.loss_scale);
  if (num_losses > 0 && task.device_loss_scale != nullptr) scale *= static_cast<double>(*task.device_loss_scale);

  const auto backward_token = [&](std::int64_t t) {
    const A* const row = task.logits.row(t);
    cells<Chunks, A> x;
    load_cells<Chunks>(row, map, lane, x);
    const int id = lane < k ? task.ids.row(t)[lane] : no_expert;
    const bool chosen = id >= 0 && id < map.num_experts;
    const A dweight = chosen ? task.dweights.row(t)[lane] : A(0);
    const A logit = chosen ? __ldg(row + id) : A(0);

    [[maybe_unused]] cells<Chunks, A> p;
    softmax_terms<A> terms;
    A total = A(1);
    if constexpr (scores_all) {
      p = x;
      probabilities<Score, Chunks>(p, map, lane, task.score, terms, total);
    }
    A selected = A(0);
    if (chosen) {
      if constexpr (Score::over == score_over::selected) {
        selected = score_value<Score>(logit, task.score);
      } else {
        selected = score_of<Score>(logit, task.score, terms);
      }
    }
    selected = softmax_over_chosen<Score>(selected, chosen);
    const A sum = warp_sum(selected);
    const A by_sum = chosen ? dweight * Weigh::derivative_by_sum(selected, sum, task.weigh) : A(0);
    A dselected = chosen ? dweight * Weigh::derivative_by_score(selected, sum, task.weigh) : A(0);
    const A dsum = warp_sum(by_sum);
    if (chosen) dselected += dsum;

    // what a chosen expert adds to the gradient: by its probability, or by its logit
    A own = dselected;
    if constexpr (Score::over == score_over::each) {
      own = dselected * score_derivative<Score>(logit, selected, task.score);
    } else if constexpr (Score::over == score_over::selected) {
      const A mean = warp_sum(selected * dselected);
      own = selected * (dselected - mean) *
            score_derivative<Score>(logit, score_value<Score>(logit, task.score), task.score);
    }
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      for (int i = lane; i < warp_size * cell_width; i += warp_size) spread[c * warp_size * cell_width + i] = A(0);
    }
    __syncwarp();
    if (chosen) spread[id] = own;
    __syncwarp();
    cells<Chunks, A> gradient;
    load_shared_cells<Chunks>(spread, map, lane, gradient);
    __syncwarp();

    if constexpr (scores_all) {
      cells<Chunks, A> dp;
      for_each_cell<Chunks>(
          [&](int c, int j) { dp.value[c][j] = Score::over == score_over::all ? gradient.value[c][j] : A(0); });
      each_loss(task.balances, [&](auto tag, const auto& policy, int loss) {
        using balance = typename decltype(tag)::type;
        if constexpr (balance_on_load<balance>) {
          cells<Chunks, A> load;
          load_shared_cells<Chunks>(balance::by == balance_by::batch_load ? shared.batch_load : shared.sequence_load,
                                    map, lane, load);
          for_each_cell<Chunks>([&](int c, int j) {
            dp.value[c][j] += factors[loss] * balance::derivative(p.value[c][j], load.value[c][j], policy);
          });
        }
      });
      fill_missing<Chunks>(dp, map, lane, A(0));
      A mean = A(0);
      for_each_cell<Chunks>([&](int c, int j) { mean += p.value[c][j] * dp.value[c][j]; });
      mean = warp_sum(mean);
      const A inverse = total != A(0) ? fast_reciprocal(total) : A(0);
      for_each_cell<Chunks>([&](int c, int j) {
        const A centred = dp.value[c][j] - mean;
        if constexpr (Score::over == score_over::each) {
          gradient.value[c][j] +=
              centred * inverse * score_derivative<Score>(x.value[c][j], p.value[c][j] * total, task.score);
        } else {
          const A through =
              p.value[c][j] * centred *
              score_derivative<Score>(x.value[c][j], score_value<Score>(x.value[c][j], task.score), task.score);
          gradient.value[c][j] = Score::over == score_over::all ? through : gradient.value[c][j] + through;
        }
      });
    }
    if constexpr (task_type::by_size) {
      const A log_sum = log_sum_exp_of<Chunks>(x, map, lane);
      A dlog_sum = A(0);
      each_loss(task.balances, [&](auto tag, const auto& policy, int loss) {
        using balance = typename decltype(tag)::type;
        if constexpr (balance::by == balance_by::log_sum_exp) {
          dlog_sum += factors[loss] * balance::derivative(log_sum, policy);
        }
      });
      for_each_cell<Chunks>([&](int c, int j) { gradient.value[c][j] += dlog_sum * x.value[c][j]; });
    }
    store_cells<Chunks>(task.dlogits.row(t), map, lane, gradient);
  };

  if constexpr (num_losses > 0) {
    each_loss(task.balances, [&](auto tag, const auto&, int loss) {
      if constexpr (decltype(tag)::type::by != balance_by::sequence_load) {
        factors[loss] = static_cast<A>(scale * static_cast<double>(task.coefficients[loss]) / task.tokens());
      }
    });
  }
  if constexpr (task_type::by_batch) set_batch_loads<Chunks>(task, shared);
  __syncthreads();
  if constexpr (task_type::by_sequence) {
    std::int64_t first;
    std::int64_t last;
    task.sequence(blockIdx.x / static_cast<unsigned>(cluster_size()), first, last);
    if (first >= last) return;  // the whole cluster
    set_sequence_loads<Score, Chunks>(task, shared, first, last);
    const double scope = task.sequences() * static_cast<double>(last - first);
    each_loss(task.balances, [&](auto tag, const auto&, int loss) {
      if constexpr (decltype(tag)::type::by == balance_by::sequence_load) {
        factors[loss] = static_cast<A>(scale * static_cast<double>(task.coefficients[loss]) / scope);
      }
    });
    for (std::int64_t t = first + cluster_rank() * backward_warps + warp; t < last;
         t += cluster_size() * backward_warps) {
      backward_token(t);
    }
  } else {
    for (std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * backward_warps + warp; t < task.logits.rows;
         t += static_cast<std::int64_t>(gridDim.x) * backward_warps) {
      backward_token(t);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Bias

// @param rate A device scalar.
template <int Threads>
__launch_bounds__(Threads) TESSERA_KERNEL
    update_bias_kernel(float* bias, const std::int64_t* load, int num_experts, const float* rate) {
  __shared__ std::int64_t sums[Threads / warp_size];
  const int tid = static_cast<int>(threadIdx.x);
  std::int64_t sum = 0;
  for (int e = tid; e < num_experts; e += Threads) sum += load[e];
  sum = warp_sum(sum);
  if (tid % warp_size == 0) sums[tid / warp_size] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < Threads / warp_size; ++w) sum += sums[w];
  for (int e = tid; e < num_experts; e += Threads) {
    const std::int64_t scaled = load[e] * num_experts;
    if (scaled > sum) bias[e] -= *rate;
    if (scaled < sum) bias[e] += *rate;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side

template <class Score, class Select, class Weigh, class... Balances, accumulate_type A>
void backward_on_device(device_stream stream, const router<Score, Select, Weigh, Balances...>& r,
                        const router_inputs<A>& in, const matrix_view<const std::int32_t>& ids,
                        const matrix_view<const A>& dweights, const_balance_counts counts, const float* coefficients,
                        A loss_scale, const float* device_loss_scale, const matrix_view<A>& dlogits) {
  using router_type = router<Score, Select, Weigh, Balances...>;
  using task_type = backward_task<Score, Weigh, A, Balances...>;
  const auto& options = r.get_options();
  const std::int64_t num_tokens = in.logits.rows;
  expect_matrix(ids, num_tokens, options.top_k, "routing.expert_ids");
  expect_matrix(dweights, num_tokens, options.top_k, "dweights");
  expect_matrix(dlogits, num_tokens, options.num_experts, "dlogits");
  expect_disjoint(dlogits, "dlogits", in.logits, "logits");
  expect_disjoint(dlogits, "dlogits", dweights, "dweights");
  const int num_sms = expect_device("router::backward");
  task_type task{};
  fill_balance_task(task, options, in, counts, coefficients,
                    is_vector_aligned(dlogits.data, dlogits.stride * static_cast<std::int64_t>(sizeof(A))),
                    router_type::num_losses);
  if constexpr (sizeof...(Balances) > 0) task.balances = make_balance_pack<Balances...>(options.balance);
  task.weigh = options.weigh;
  task.ids = ids;
  task.dweights = dweights;
  task.loss_scale = loss_scale;
  task.device_loss_scale = device_loss_scale;
  task.dlogits = dlogits;
  if (num_tokens == 0) return;

  std::int64_t clusters = 0;
  int cluster = 1;
  if constexpr (task_type::by_sequence) {
    clusters = sequences_of(task);
    cluster = cluster_for(num_tokens / clusters, backward_warps);
  } else {
    clusters = std::min<std::int64_t>((num_tokens + backward_warps - 1) / backward_warps, std::int64_t{num_sms} * 6);
  }
  const auto launch = [&](auto chunks, auto kernel) {
    using shared = balance_shared<A, decltype(chunks)::value>;
    launch_clusters(stream, clusters, cluster, backward_threads,
                    shared::bytes(backward_threads) + sizeof(A) * shared::width * backward_warps, kernel, task,
                    "backward_kernel");
  };
  if (num_chunks_for(options.num_experts) == 1) {
    launch(std::integral_constant<int, 1>{}, backward_kernel<Score, Weigh, 1, A, Balances...>);
  } else {
    launch(std::integral_constant<int, 4>{}, backward_kernel<Score, Weigh, 4, A, Balances...>);
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
