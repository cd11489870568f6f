// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include <tessera/router/detail/device/route.cuh>

// What the losses and the joint backward share. Losses on the load of sequences need the counts of a sequence first; a
// cluster of blocks owns a sequence then and keeps the counts in its shared memory.

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
  return [&]<std::size_t... Index>(std::index_sequence<Index...>) {
    if constexpr (sizeof...(Balances) == 0) {
      return balance_pack<Balances...>{};
    } else {
      return pack_of<Balances...>(std::get<Index>(options)...);
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

}  // namespace detail

TESSERA_NAMESPACE_END
