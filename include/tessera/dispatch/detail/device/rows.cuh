// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <tessera/core/expert_rows.hpp>
#include <tessera/core/views.hpp>
#include <tessera/gemm/detail/hopper/ptx.cuh>
#include <tessera/router/detail/device/warp.cuh>

// Moving and adding rows. A thread owns 16 bytes of the input's columns and walks over rows; threads of a warp own
// neighbouring columns. The same kernels with one element per thread serve widths and addresses that 16 bytes do not
// divide.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail {

inline constexpr int row_threads = 256;

// `Count` neighbouring elements, moved in pieces of at most 16 bytes.
template <class T, int Count>
struct alignas(sizeof(T) * Count >= 16 ? 16 : sizeof(T) * Count) elements {
  T value[Count];
};

// Reads what no thread of the block reads again.
template <class T, int Count>
__device__ __forceinline__ elements<T, Count> load_once(const T* from) {
  elements<T, Count> result;
  if constexpr (sizeof(result) == 16) {
    uint4 bits;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(from));
    result = *reinterpret_cast<const elements<T, Count>*>(&bits);
  } else {
    result = *reinterpret_cast<const elements<T, Count>*>(from);
  }
  return result;
}
template <class T, int Count>
__device__ __forceinline__ void store_elements(T* to, const elements<T, Count>& x) {
  if constexpr (sizeof(x) > 16) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(x) / 16); ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&x)[i];
    }
  } else {
    *reinterpret_cast<elements<T, Count>*>(to) = x;
  }
}

// Sums rounded once. Pairs of bf16 are rounded by one instruction.
template <class T, class A, int Count>
__device__ __forceinline__ elements<T, Count> round_elements(const A (&sum)[Count]) {
  elements<T, Count> result;
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<A, float> && Count % 2 == 0) {
#pragma unroll
    for (int i = 0; i < Count; i += 2) {
      *reinterpret_cast<std::uint32_t*>(result.value + i) = hopper::pack_bf16(sum[i], sum[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Count; ++i) result.value[i] = static_cast<T>(sum[i]);
  }
  return result;
}

// Writes what should make way for everything else in the second-level cache.
template <class T, int Count>
__device__ __forceinline__ void store_streaming(T* to, const elements<T, Count>& x) {
  if constexpr (sizeof(x) == 16) {
    __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&x));
  } else {
    store_elements(to, x);
  }
}

// How rows of `vectors` pieces are spread over blocks: `parts` blocks along a row, several rows in a block.
struct row_plan {
  int vectors;
  int per_row;  // threads, a multiple of 32
  int rows;     // per block
  int parts;

  __device__ int row() const { return static_cast<int>(threadIdx.x) / per_row; }
  __device__ int column() const {
    return static_cast<int>(blockIdx.y) * per_row + static_cast<int>(threadIdx.x) % per_row;
  }
};

inline row_plan make_row_plan(std::int64_t hidden, int width) {
  row_plan plan;
  plan.vectors = static_cast<int>(hidden / width);
  plan.parts = std::max(1, (plan.vectors + row_threads - 1) / row_threads);
  const int share = (plan.vectors + plan.parts - 1) / plan.parts;
  plan.per_row = std::max(1, (share + warp_size - 1) / warp_size) * warp_size;
  plan.rows = std::max(1, row_threads / plan.per_row);
  return plan;
}

template <class T>
bool rows_are_aligned(const matrix_view<T>& view, std::size_t bytes) {
  return view.data == nullptr || (reinterpret_cast<std::uintptr_t>(view.data) % bytes == 0 &&
                                  static_cast<std::size_t>(view.stride) * sizeof(T) % bytes == 0);
}

template <class A, class T>
__device__ __forceinline__ A widen(T x) {
  return static_cast<A>(x);
}

// sum += weight * row. Elements of a pair of bf16 are widened by one instruction each; the compiler takes three for the
// second.
template <class A, class T, int Count>
__device__ __forceinline__ void add_elements(A (&sum)[Count], const elements<T, Count>& row, A weight = A(1)) {
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<A, float> && Count % 2 == 0) {
#pragma unroll
    for (int j = 0; j < Count; j += 2) {
      const std::uint32_t pair = *reinterpret_cast<const std::uint32_t*>(row.value + j);
      sum[j] += weight * __uint_as_float(pair << 16);
      sum[j + 1] += weight * __uint_as_float(pair & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < Count; ++j) sum[j] += weight * widen<A>(row.value[j]);
  }
}

// sum += weight * row for the expert rows of a token, in the order of k, columns [column, column + Width).
// `weight_of(k, place)` is asked where there is a row. @return whether a place is another than -1.
template <int Batch, class S, class A, int Width, class Weight>
__device__ __forceinline__ bool add_expert_rows(A (&sum)[Width], const matrix_view<const S>& rows,
                                                const std::int32_t* places, int top_k, std::int64_t column,
                                                Weight weight_of) {
  bool any = false;
  for (int first = 0; first < top_k; first += Batch) {
    std::int32_t place[Batch];
    A weight[Batch];
    elements<S, Width> row[Batch];
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      place[i] = first + i < top_k ? __ldg(places + first + i) : -1;
      any = any || place[i] != -1;
    }
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      if (place[i] >= 0) row[i] = load_once<S, Width>(rows.row(place[i]) + column);
    }
#pragma unroll
    for (int i = 0; i < Batch; ++i) weight[i] = place[i] >= 0 ? weight_of(first + i, place[i]) : A(1);
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      if (place[i] >= 0) add_elements(sum, row[i], weight[i]);
    }
  }
  return any;
}

template <class S, class A, class Out>
struct combine_task {
  row_plan plan;
  matrix_view<const S> rows;
  const std::int32_t* expert_row_of;  // [T, K]
  int top_k;
  matrix_view<const A> weights;  // no data: 1
  matrix_view<const S> plus;     // no data: nothing
  matrix_view<Out> y;
};

// y[t] = sum over k, ascending, of weight * row, then what is added.
template <class S, class A, class Out, int Width>
__launch_bounds__(row_threads) TESSERA_KERNEL combine_kernel(const __grid_constant__ combine_task<S, A, Out> task) {
  start_early();
  constexpr int batch = 4;  // rows in flight per thread
  const int vector = task.plan.column();
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * task.plan.rows + task.plan.row();
  if (vector >= task.plan.vectors || t >= task.y.rows) return;
  const std::int64_t column = static_cast<std::int64_t>(vector) * Width;

  A sum[Width] = {};
  add_expert_rows<batch>(
      sum, task.rows, task.expert_row_of + t * task.top_k, task.top_k, column,
      [&](int k, std::int32_t) { return task.weights.data != nullptr ? __ldg(task.weights.row(t) + k) : A(1); });
  if (task.plus.data != nullptr) add_elements(sum, load_once<S, Width>(task.plus.row(t) + column));
  elements<Out, Width> out;
#pragma unroll
  for (int j = 0; j < Width; ++j) out.value[j] = static_cast<Out>(sum[j]);
  store_elements(task.y.row(t) + column, out);
}

template <class S>
struct permute_task {
  row_plan plan;
  matrix_view<const S> source;
  const std::int32_t* row_offsets;  // [num_experts + 1]
  int num_experts;
  int slices_log2;
  const std::int32_t* gather;  // null: row i is row i
  matrix_view<S> expanded;
};

inline constexpr int permute_slice_rows = 32;  // of all experts together, at most on average

// A source row is read once per pair. Lists of experts ascend over the same tokens, so a block takes the same slice of
// every expert's list, and neighbouring blocks neighbouring slices: readers of a row run at about the same time, and
// all but one find it in the second-level cache. Nothing depends on the order of the lists but the speed.
//
// Of an expert with n rows, slice s of 2^l starts at (n * s + phase) >> l, with a phase of its own, so that experts
// with few rows do not have them in the same slices. A slice has fewer than num_experts rows more than the average.
struct permute_slice {
  int slice;
  int slices_log2;

  __device__ int start(int expert, int rows, int which) const {
    const unsigned phase = slices_log2 == 0 ? 0u : __brev(static_cast<unsigned>(expert)) >> (32 - slices_log2);
    return static_cast<int>((static_cast<std::int64_t>(rows) * which + phase) >> slices_log2);
  }
  __device__ int begin(int expert, int rows) const { return start(expert, rows, slice); }
  __device__ int end(int expert, int rows) const { return start(expert, rows, slice + 1); }
};

// expanded[i] = source[gather[i]].
template <class S, int Width>
__launch_bounds__(row_threads) TESSERA_KERNEL gather_rows_kernel(const __grid_constant__ permute_task<S> task) {
  start_early();
  constexpr int batch = 4;
  extern __shared__ std::int32_t list[];
  __shared__ int count;
  std::int32_t* const sources = list;
  std::int32_t* const targets = list + permute_slice_rows + task.num_experts;
  const int tid = static_cast<int>(threadIdx.x);
  if (tid == 0) count = 0;
  __syncthreads();
  const permute_slice slice{static_cast<int>(blockIdx.x), task.slices_log2};
  for (int e = tid; e < task.num_experts; e += static_cast<int>(blockDim.x)) {
    const int first = __ldg(task.row_offsets + e);
    const int rows = __ldg(task.row_offsets + e + 1) - first;
    const int begin = slice.begin(e, rows);
    const int own = slice.end(e, rows) - begin;
    if (own == 0) continue;
    const int at = atomicAdd(&count, own);
    for (int i = 0; i < own; ++i) targets[at + i] = first + begin + i;
  }
  __syncthreads();
  const int rows = count;
  for (int i = tid; i < rows; i += static_cast<int>(blockDim.x)) {
    sources[i] = task.gather != nullptr ? __ldg(task.gather + targets[i]) : targets[i];
  }
  __syncthreads();

  const int vector = task.plan.column();
  if (vector >= task.plan.vectors) return;
  const std::int64_t column = static_cast<std::int64_t>(vector) * Width;
  for (int first = task.plan.row(); first < rows; first += batch * task.plan.rows) {
    elements<S, Width> row[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int at = first + i * task.plan.rows;
      if (at < rows) row[i] = load_once<S, Width>(task.source.row(sources[at]) + column);
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int at = first + i * task.plan.rows;
      if (at < rows && targets[at] < task.expanded.rows) {
        store_streaming(task.expanded.row(targets[at]) + column, row[i]);
      }
    }
  }
}

template <class S>
struct scatter_task {
  row_plan plan;
  matrix_view<const S> source;
  const std::int32_t* expert_row_of;  // [T, K]
  int top_k;
  matrix_view<S> expanded;
};

// expanded[expert_row_of[t, k]] = source[t]: every row is read once.
template <class S, int Width>
__launch_bounds__(row_threads) TESSERA_KERNEL scatter_rows_kernel(const __grid_constant__ scatter_task<S> task) {
  start_early();
  const int vector = task.plan.column();
  const std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * task.plan.rows + task.plan.row();
  if (vector >= task.plan.vectors || t >= task.source.rows) return;
  const std::int64_t column = static_cast<std::int64_t>(vector) * Width;
  const auto row = load_once<S, Width>(task.source.row(t) + column);
#pragma unroll 4
  for (int k = 0; k < task.top_k; ++k) {
    const std::int32_t place = __ldg(task.expert_row_of + t * task.top_k + k);
    if (place >= 0) store_elements(task.expanded.row(place) + column, row);
  }
}

// home[t, k] = values[expert_row_of[t, k]], 0 where there is no row.
template <class A>
__launch_bounds__(row_threads) TESSERA_KERNEL
    gather_values_kernel(const A* values, const std::int32_t* expert_row_of, matrix_view<A> home) {
  start_early();
  const std::int64_t pair = static_cast<std::int64_t>(blockIdx.x) * row_threads + threadIdx.x;
  if (pair >= home.rows * home.cols) return;
  const std::int32_t place = expert_row_of[pair];
  home(pair / home.cols, pair % home.cols) = place < 0 ? A(0) : values[place];
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side

template <class Task>
void launch_rows(device_stream stream, void (*kernel)(Task), const Task& task, std::int64_t row_groups,
                 const char* what) {
  const std::int64_t blocks = (row_groups + task.plan.rows - 1) / task.plan.rows;
  if (blocks == 0 || task.plan.vectors == 0) return;
  TESSERA_EXPECTS(blocks <= INT32_MAX && task.plan.parts <= 65535,
                  what << " would need " << blocks << " x " << task.plan.parts << " blocks");
  launch_early(stream, what, kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(task.plan.parts)),
               static_cast<unsigned>(task.plan.per_row * task.plan.rows), 0, task);
}

// Elements per thread: 16 bytes of `S`, or one where something does not allow it.
template <class S, class... Views>
bool moves_vectors(std::int64_t hidden, const Views&... views) {
  constexpr std::size_t width = 16 / sizeof(S);
  const auto fits = [&](const auto& view) {
    return rows_are_aligned(view, std::min<std::size_t>(16, width * sizeof(*view.data)));
  };
  return hidden % static_cast<std::int64_t>(width) == 0 && (fits(views) && ...);
}

template <class S>
void permute_on_device(device_stream stream, matrix_view<const S> source, const expert_rows& rows,
                       matrix_view<S> expanded) {
  constexpr int width = 16 / sizeof(S);
  permute_task<S> task{{}, source, rows.row_offsets, rows.num_local_experts, 0, rows.gather, expanded};
  if (expanded.rows == 0 || expanded.cols == 0) return;
  TESSERA_EXPECTS(expanded.rows <= INT32_MAX, expanded.rows << " expert rows are too many for one call");
  while ((std::int64_t{permute_slice_rows} << task.slices_log2) < expanded.rows) ++task.slices_log2;
  const std::size_t shared_bytes =
      2 * sizeof(std::int32_t) * (permute_slice_rows + static_cast<std::size_t>(rows.num_local_experts));
  TESSERA_EXPECTS(shared_bytes <= 48 * 1024, rows.num_local_experts << " local experts are too many for permute");
  const bool vectors = moves_vectors<S>(source.cols, source, expanded);
  task.plan = make_row_plan(source.cols, vectors ? width : 1);
  TESSERA_EXPECTS(task.plan.parts <= 65535, "rows of " << source.cols << " elements are too long for permute");
  const dim3 grid(1u << task.slices_log2, static_cast<unsigned>(task.plan.parts));
  const auto threads = static_cast<unsigned>(task.plan.per_row * task.plan.rows);
  auto* const kernel = vectors ? gather_rows_kernel<S, width> : gather_rows_kernel<S, 1>;
  launch_early(stream, "gather_rows_kernel", kernel, grid, threads, shared_bytes, task);
}

template <class S, class A, class Out>
void combine_on_device(device_stream stream, combine_task<S, A, Out> task) {
  constexpr int width = 16 / sizeof(S);
  const std::int64_t hidden = task.y.cols;
  static_cast<void>(expect_device("combine"));
  if (moves_vectors<S>(hidden, task.rows, task.plus, task.y)) {
    task.plan = make_row_plan(hidden, width);
    launch_rows(stream, combine_kernel<S, A, Out, width>, task, task.y.rows, "combine_kernel");
  } else {
    task.plan = make_row_plan(hidden, 1);
    launch_rows(stream, combine_kernel<S, A, Out, 1>, task, task.y.rows, "combine_kernel");
  }
}

}  // namespace detail

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
