// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include <tessera/router/detail/device/route.cuh>

// Balance losses and the joint backward: one warp per token. Losses on the load of sequences need the counts of a
// sequence first; a cluster of blocks owns a sequence then and keeps the counts in its shared memory.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

// ---------------------------------------------------------------------------------------------------------------------
// Options of balances as a kernel can hold them: std::get is a host function

template <class... Balances>
struct balance_pack {};
template <class First, class... Rest>
struct balance_pack<First, Rest...> {
  typename First::options first;
  balance_pack<Rest...> rest;
};

template <class First, class... Rest>
balance_pack<First, Rest...> pack_of(const typename First::options& first, const typename Rest::options&... rest) {
  if constexpr (sizeof...(Rest) == 0) {
    return {first, {}};
  } else {
    return {first, pack_of<Rest...>(rest...)};
  }
}

template <class... Balances>
balance_pack<Balances...> make_balance_pack(const std::tuple<typename Balances::options...>& options) {
  return [&]<std::size_t... I>(std::index_sequence<I...>) {
    if constexpr (sizeof...(Balances) == 0) {
      return balance_pack<Balances...>{};
    } else {
      return pack_of<Balances...>(std::get<I>(options)...);
    }
  }
  (std::index_sequence_for<Balances...>{});
}
// Calls f(std::type_identity<Balance>{}, options, loss) for each balance that is a loss.
template <int Loss = 0, class F>
__device__ __forceinline__ void each_loss(const balance_pack<>&, F&&) {}
template <int Loss = 0, class First, class... Rest, class F>
__device__ __forceinline__ void each_loss(const balance_pack<First, Rest...>& pack, F&& f) {
  if constexpr (balance_is_loss<First>) {
    f(std::type_identity<First>{}, pack.first, Loss);
    each_loss<Loss + 1>(pack.rest, f);
  } else {
    each_loss<Loss>(pack.rest, f);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Clusters; on devices without them every block is one

__device__ inline int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
__device__ inline int cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  std::uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}
__device__ inline void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// A word of shared memory of another block of the cluster.
__device__ inline std::uint32_t cluster_read(const void* own, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  std::uint32_t address;
  std::uint32_t value;
  const auto local = static_cast<std::uint32_t>(__cvta_generic_to_shared(own));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(local), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
#else
  static_cast<void>(rank);
  return *static_cast<const std::uint32_t*>(own);
#endif
}
__device__ inline double cluster_read_double(const double* own, int rank) {
  const auto* const words = reinterpret_cast<const std::uint32_t*>(own);
  const std::uint32_t low = cluster_read(words, rank);
  const std::uint32_t high = cluster_read(words + 1, rank);
  return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}

// Blocks of a cluster for so many tokens.
inline int cluster_for(std::int64_t num_tokens, int warps) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 1;
  int size = 1;
  while (size < 8 && num_tokens > std::int64_t{size} * warps) size *= 2;
  return size;
}

template <class Task>
void launch_clusters(device_stream stream, std::int64_t clusters, int cluster, int threads, std::size_t shared,
                     void (*kernel)(Task), const Task& task, const char* what) {
  TESSERA_EXPECTS(clusters * cluster <= INT32_MAX, what << " would need " << clusters * cluster << " blocks");
  if (shared > max_static_shared_bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
               what);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream.get();
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, task), what);
}

// ---------------------------------------------------------------------------------------------------------------------
// What both kernels share

template <class Score, class A, class... Balances>
struct balance_task {
  typename Score::options score;
  balance_pack<Balances...> balances;
  cell_map map;
  int top_k;
  matrix_view<const A> logits;
  const std::int32_t* sequence_offsets;
  std::int64_t num_sequence_offsets;
  const std::int64_t* counts;  // [E + 2]
  const float* coefficients;   // [num_losses]

  static constexpr bool by_batch = has_balance<balance_by::batch_load, Balances...>;
  static constexpr bool by_sequence = has_balance<balance_by::sequence_load, Balances...>;
  static constexpr bool by_size = has_balance<balance_by::log_sum_exp, Balances...>;
  static constexpr bool on_load = by_batch || by_sequence;

  __device__ double tokens() const { return static_cast<double>(counts[map.num_experts]); }
  __device__ double sequences() const { return static_cast<double>(counts[map.num_experts + 1]); }

  // Tokens of sequence s, clamped to the tokens there are.
  __device__ void sequence(std::int64_t s, std::int64_t& first, std::int64_t& last) const {
    first = 0;
    last = logits.rows;
    if (num_sequence_offsets == 0) return;
    const std::int64_t begin = sequence_offsets[s];
    const std::int64_t end = sequence_offsets[s + 1];
    first = begin < 0 ? 0 : begin;
    last = end > logits.rows ? logits.rows : end;
  }
};

template <class Task>
std::int64_t sequences_of(const Task& task) {
  return task.num_sequence_offsets == 0 ? 1 : task.num_sequence_offsets - 1;
}

// Shared memory: loads of the batch and of a sequence, counts of a sequence, scratch of the selection.
template <class A, int Chunks>
struct balance_shared {
  static constexpr int width = Chunks * warp_size * cell_width;
  A* batch_load;
  A* sequence_load;
  std::uint32_t* counts;
  ranked_key<A>* scratch;  // [threads]

  TESSERA_HD static constexpr std::size_t bytes(int threads) {
    return static_cast<std::size_t>(width) * (2 * sizeof(A) + sizeof(std::uint32_t)) +
           static_cast<std::size_t>(threads) * sizeof(ranked_key<A>);
  }
  __device__ explicit balance_shared(unsigned char* shared) : scratch(reinterpret_cast<ranked_key<A>*>(shared)) {
    batch_load = reinterpret_cast<A*>(scratch + blockDim.x);
    sequence_load = batch_load + width;
    counts = reinterpret_cast<std::uint32_t*>(sequence_load + width);
  }
};

template <int Chunks, class A>
__device__ __forceinline__ void load_shared_cells(const A* row, const cell_map& map, int lane, cells<Chunks, A>& x) {
  constexpr int width = 16 / sizeof(A);
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int first = map.first_expert(c, lane);
    if (map.per_lane == cell_width) {
#pragma unroll
      for (int v = 0; v < cell_width; v += width) {
        const vector16<A> packed = *reinterpret_cast<const vector16<A>*>(row + first + v);
#pragma unroll
        for (int j = 0; j < width; ++j) x.value[c][v + j] = packed.element[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < cell_width; ++j) x.value[c][j] = j < map.per_lane ? row[first + j] : A(0);
    }
  }
}

template <class A>
__device__ inline A load_of(double num_experts, double count, double pairs) {
  return pairs > 0 ? static_cast<A>(num_experts * count / pairs) : A(0);
}

template <int Chunks, class Task, class A>
__device__ void set_batch_loads(const Task& task, const balance_shared<A, Chunks>& shared) {
  const int num_experts = task.map.num_experts;
  const double pairs = static_cast<double>(task.top_k) * task.tokens();
  for (int e = static_cast<int>(threadIdx.x); e < shared.width; e += static_cast<int>(blockDim.x)) {
    shared.batch_load[e] = e < num_experts ? load_of<A>(num_experts, static_cast<double>(task.counts[e]), pairs) : A(0);
  }
}

// The load of tokens [first, last), by the whole cluster: the choice without bias and without groups.
template <class Score, int Chunks, class Task, class A>
__device__ void set_sequence_loads(const Task& task, const balance_shared<A, Chunks>& shared, std::int64_t first,
                                   std::int64_t last) {
  const int threads = static_cast<int>(blockDim.x);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int warps = threads / warp_size;
  for (int e = static_cast<int>(threadIdx.x); e < shared.width; e += threads) shared.counts[e] = 0;
  __syncthreads();
  for (std::int64_t t = first + cluster_rank() * warps + warp; t < last; t += cluster_size() * warps) {
    const A* const row = task.logits.row(t);
    cells<Chunks, A> x;
    load_cells<Chunks>(row, task.map, lane, x);
    softmax_terms<A> terms;
    if constexpr (!score_selects_on_logits<Score>) terms = all_scores<Score, Chunks>(x, task.map, lane, task.score);
    fill_missing<Chunks>(x, task.map, lane, minus_infinity<A>());
    const auto key_of = [&](int expert) {
      const A logit = __ldg(row + expert);
      if constexpr (score_selects_on_logits<Score>) {
        return logit;
      } else {
        return score_of<Score>(logit, task.score, terms);
      }
    };
    const chosen_expert mine =
        select_largest<Chunks>(x, task.map, lane, task.top_k, key_of, shared.scratch + warp * warp_size);
    if (mine.rank < task.top_k) atomicAdd(shared.counts + mine.id, 1u);
  }
  cluster_sync();
  const double pairs = static_cast<double>(task.top_k) * static_cast<double>(last - first);
  for (int e = static_cast<int>(threadIdx.x); e < shared.width; e += threads) {
    std::uint32_t count = 0;
    for (int r = 0; r < cluster_size(); ++r) count += cluster_read(shared.counts + e, r);
    shared.sequence_load[e] = load_of<A>(task.map.num_experts, count, pairs);
  }
  cluster_sync();  // counts may be cleared again
}

// Replaces logits by the probabilities of the balance losses, 0 in registers without an expert. `total` is what scores
// over each expert were divided by, `terms` those of a score over all experts.
template <class Score, int Chunks, class A>
__device__ __forceinline__ void probabilities(cells<Chunks, A>& x, const cell_map& map, int lane,
                                              const typename Score::options& options, softmax_terms<A>& terms,
                                              A& total) {
  terms = all_scores<Score, Chunks>(x, map, lane, options);
  total = A(1);
  if constexpr (Score::over == score_over::each) {
    fill_missing<Chunks>(x, map, lane, A(0));
    A sum = A(0);
    for_each_cell<Chunks>([&](int c, int j) { sum += x.value[c][j]; });
    total = warp_sum(sum);
    const A inverse = total != A(0) ? fast_reciprocal(total) : A(0);
    for_each_cell<Chunks>([&](int c, int j) { x.value[c][j] *= inverse; });
  } else if constexpr (Score::over == score_over::selected) {
    fill_missing<Chunks>(x, map, lane, minus_infinity<A>());
    A sum;
    const softmax_terms<A> all = exponentials<Chunks>(x, sum);
    for_each_cell<Chunks>([&](int c, int j) { x.value[c][j] *= all.inverse_sum; });
  }
}

// Log-sum-exp of the logits; they become the softmax.
template <int Chunks, class A>
__device__ __forceinline__ A log_sum_exp_of(cells<Chunks, A>& x, const cell_map& map, int lane) {
  fill_missing<Chunks>(x, map, lane, minus_infinity<A>());
  A sum;
  const softmax_terms<A> terms = exponentials<Chunks>(x, sum);
  for_each_cell<Chunks>([&](int c, int j) { x.value[c][j] *= terms.inverse_sum; });
  return terms.max + ::log(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Losses: a cluster per chunk of tokens

template <class Score, class A, class... Balances>
struct losses_task : balance_task<Score, A, Balances...> {
  std::int64_t chunk_tokens;
  matrix_view<A> chunk_losses;
  static constexpr int num_losses = (0 + ... + int(balance_is_loss<Balances>));
};

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
  const auto add_loads = [&](const cells<Chunks, A>& p, const A* loads, auto tag, const auto& policy) {
    using balance = typename decltype(tag)::type;
    cells<Chunks, A> load;
    load_shared_cells<Chunks>(loads, task.map, lane, load);
    A sum = A(0);
    for_each_cell<Chunks>([&](int c, int j) {
      const int expert = task.map.first_expert(c, lane) + j;
      if (task.map.full || task.map.holds(expert, j)) sum += balance::value(p.value[c][j], load.value[c][j], policy);
    });
    return static_cast<double>(warp_sum(sum));
  };

  double result = 0;  // of thread `loss`
  if constexpr (task_type::by_batch || task_type::by_size) {
    if constexpr (task_type::by_batch) set_batch_loads<Chunks>(task, shared);
    __syncthreads();
    const double sum = add_tokens(first, last, [&](std::int64_t t, double* sums) {
      [[maybe_unused]] cells<Chunks, A> p;
      if constexpr (task_type::by_batch) {
        softmax_terms<A> terms;
        A total;
        load_cells<Chunks>(task.logits.row(t), task.map, lane, p);
        probabilities<Score, Chunks>(p, task.map, lane, task.score, terms, total);
      }
      [[maybe_unused]] A log_sum = A(0);
      if constexpr (task_type::by_size) {
        cells<Chunks, A> x;
        load_cells<Chunks>(task.logits.row(t), task.map, lane, x);
        log_sum = log_sum_exp_of<Chunks>(x, task.map, lane);
      }
      each_loss(task.balances, [&](auto tag, const auto& policy, int loss) {
        using balance = typename decltype(tag)::type;
        if constexpr (balance::by == balance_by::batch_load) {
          sums[loss] += add_loads(p, shared.batch_load, tag, policy);
        } else if constexpr (balance::by == balance_by::log_sum_exp) {
          sums[loss] += static_cast<double>(balance::value(log_sum, policy));
        }
      });
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
          if constexpr (decltype(tag)::type::by == balance_by::sequence_load) {
            sums[loss] += add_loads(p, shared.sequence_load, tag, policy);
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
// Backward

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

template <class Task, class A, class Options>
void fill_balance_task(Task& task, const Options& options, const router_inputs<A>& in, const_balance_counts counts,
                       const float* coefficients, bool aligned, int num_losses) {
  expect_matrix(in.logits, -1, options.num_experts, "logits");
  TESSERA_EXPECTS(num_losses == 0 || (counts.data != nullptr && coefficients != nullptr),
                  "balance losses need global_counts and coefficients [" << num_losses << "]");
  TESSERA_EXPECTS(num_losses == 0 || counts.num_experts == options.num_experts,
                  "global_counts are of " << counts.num_experts << " experts, the router has " << options.num_experts);
  task.score = options.score;
  task.map = make_cell_map(
      options.num_experts,
      aligned && is_vector_aligned(in.logits.data, in.logits.stride * static_cast<std::int64_t>(sizeof(A))));
  task.top_k = options.top_k;
  task.logits = in.logits;
  task.sequence_offsets = in.sequence_offsets.data();
  task.num_sequence_offsets = static_cast<std::int64_t>(in.sequence_offsets.size());
  task.counts = counts.data;
  task.coefficients = coefficients;
}

template <class Score, class Select, class Weigh, class... Balances, accumulate_type A>
void losses_on_device(device_stream stream, const router<Score, Select, Weigh, Balances...>& r,
                      const router_inputs<A>& in, const_balance_counts counts, const float* coefficients,
                      std::int64_t chunk_tokens, const matrix_view<A>& chunk_losses) {
  using router_type = router<Score, Select, Weigh, Balances...>;
  check_losses_out(in, chunk_tokens, chunk_losses, router_type::num_losses);
  if constexpr (router_type::num_losses > 0) {
    static_cast<void>(expect_device("router::losses"));
    losses_task<Score, A, Balances...> task{};
    fill_balance_task(task, r.get_options(), in, counts, coefficients, true, router_type::num_losses);
    task.balances = make_balance_pack<Balances...>(r.get_options().balance);
    task.chunk_tokens = chunk_tokens == 0 ? in.logits.rows : chunk_tokens;
    task.chunk_losses = chunk_losses;
    if (chunk_losses.rows == 0) return;
    const int cluster = cluster_for(task.chunk_tokens, list_warps);
    if (num_chunks_for(task.map.num_experts) == 1) {
      launch_clusters(stream, chunk_losses.rows, cluster, list_threads, balance_shared<A, 1>::bytes(list_threads),
                      losses_kernel<Score, 1, A, Balances...>, task, "losses_kernel");
    } else {
      launch_clusters(stream, chunk_losses.rows, cluster, list_threads, balance_shared<A, 4>::bytes(list_threads),
                      losses_kernel<Score, 4, A, Balances...>, task, "losses_kernel");
    }
  }
}

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
