// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The gradient norm on the device: exact sums of squares, whose bits no order of additions can change, so atomic
/// additions may make them.

#include <cmath>
#include <cstdint>

#include <cuda_runtime.h>

#include <tessera/core/stream.hpp>
#include <tessera/shard/adamw.hpp>
#include <tessera/shard/detail/device/checks.cuh>
#include <tessera/shard/detail/device/move_parts.cuh>
#include <tessera/shard/detail/part_tables.hpp>
#include <tessera/shard/exact_sum.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

inline constexpr int exact_words = exact_sum::num_digits + 1;  // digits, and the number of what is not finite
static_assert(sizeof(exact_sum) == sizeof(std::int64_t) * exact_words);

using exact_word = unsigned long long;

/// Four neighbouring digits of a thread: most squares of a tensor fall into them, the others into shared memory.
class exact_window {
 public:
  __device__ __forceinline__ explicit exact_window(exact_word* shared) : shared_(shared) {}

  /// Adds `x * x`. The same cut into digits as `exact_sum::add_squares`.
  __device__ __forceinline__ void add_square(double x) {
    const auto bits = static_cast<exact_word>(__double_as_longlong(__dmul_rn(x, x)));
    const auto exponent = static_cast<int>(bits >> 52);
    if (bits == 0) return;
    if (exponent >= 2047) {  // also a NaN with its sign set
      atomicAdd(shared_ + exact_sum::num_digits, exact_word{1});
      return;
    }
    const exact_word fraction = bits & ((exact_word{1} << 52) - 1);
    const exact_word mantissa = exponent == 0 ? fraction : fraction | (exact_word{1} << 52);
    const int position = exponent == 0 ? 0 : exponent - 1;
    const int shift = position & 31;
    const exact_word low = mantissa << shift;
    const int digit = position >> 5;
    const exact_word d0 = low & 0xffffffffULL;
    const exact_word d1 = low >> 32;
    const exact_word d2 = (mantissa >> 1) >> (63 - shift);
    if (digit != first_ && digit != first_ + 1 && (first_ < 0 || ++misses_ == 8)) {
      flush();
      first_ = digit;
    }
    if (digit == first_) {
      sum0_ += d0;
      sum1_ += d1;
      sum2_ += d2;
    } else if (digit == first_ + 1) {
      sum1_ += d0;
      sum2_ += d1;
      sum3_ += d2;
    } else {
      atomicAdd(shared_ + digit, d0);
      atomicAdd(shared_ + digit + 1, d1);
      atomicAdd(shared_ + digit + 2, d2);
    }
  }

  /// Moves everything to shared memory.
  __device__ __forceinline__ void flush() {
    if (first_ < 0) return;
    if (sum0_ != 0) atomicAdd(shared_ + first_, sum0_);
    if (sum1_ != 0) atomicAdd(shared_ + first_ + 1, sum1_);
    if (sum2_ != 0) atomicAdd(shared_ + first_ + 2, sum2_);
    if (sum3_ != 0) atomicAdd(shared_ + first_ + 3, sum3_);  // only where digit first_ + 1 exists with its two above
    sum0_ = sum1_ = sum2_ = sum3_ = 0;
    misses_ = 0;
  }

 private:
  exact_word* shared_;
  exact_word sum0_ = 0, sum1_ = 0, sum2_ = 0, sum3_ = 0;
  int first_ = -4;  // no digit is near
  int misses_ = 0;
};

/// Carries an array of digits in place, by one thread.
__device__ __forceinline__ void carry_digits(exact_word* digits) {
  std::int64_t over = 0;
  for (int i = 0; i < exact_sum::num_digits; ++i) {
    const std::int64_t digit = static_cast<std::int64_t>(digits[i]) + over;
    digits[i] = static_cast<exact_word>(digit & 0xffffffff);
    over = digit >> 32;
  }
}

/// Adds the squares of group `blockIdx.y`'s gradients to its sum.
template <class List>
__global__ void __launch_bounds__(part_threads)
    squares_kernel(List list, const norm_range* ranges, exact_sum* squares) {
  __shared__ exact_word digits[exact_words];
  for (int i = static_cast<int>(threadIdx.x); i < exact_words; i += part_threads) digits[i] = 0;
  __syncthreads();
  const norm_range range = ranges[blockIdx.y];
  exact_window window(digits);
  for (std::int64_t tile = range.first_tile + blockIdx.x; tile < range.last_tile; tile += gridDim.x) {
    const auto& described =
        list.tensors[entry_of_tile(list.num_tensors, tile, [&](int i) { return list.tensors[i].first_tile; })];
    const auto tensor = described.tensor;
    const std::int64_t begin = (tile - described.first_tile) * part_tile;
    const std::int64_t end = begin + part_tile < tensor.count ? begin + part_tile : tensor.count;
    for (std::int64_t i = begin + threadIdx.x; i < end; i += part_threads) {
      window.add_square(static_cast<double>(tensor.gradient[i]));
    }
  }
  window.flush();
  __syncthreads();
  if (threadIdx.x == 0) carry_digits(digits);  // then sums of 2^30 blocks do not overflow
  __syncthreads();
  auto* const sum = reinterpret_cast<exact_word*>(squares + blockIdx.y);
  for (int i = static_cast<int>(threadIdx.x); i < exact_words; i += part_threads) {
    if (digits[i] != 0) atomicAdd(sum + i, digits[i]);
  }
}

/// Adds the sums of all groups up.
static __global__ void __launch_bounds__(128)
    add_squares_kernel(const exact_sum* squares, int count, exact_sum* total) {
  __shared__ exact_word digits[exact_words];
  const auto word = static_cast<int>(threadIdx.x);
  if (word < exact_words) {
    exact_word sum = 0;
    for (int k = 0; k < count; ++k) sum += reinterpret_cast<const exact_word*>(squares + k)[word];
    digits[word] = sum;
  }
  __syncthreads();
  if (word == 0) carry_digits(digits);
  __syncthreads();
  if (word < exact_words) reinterpret_cast<exact_word*>(total)[word] = digits[word];
}

/// From the sum to norm and factor.
static __global__ void norm_kernel(exact_sum* total, double max_norm, norm_result* result, adamw_control* control) {
  total->carry();
  const double norm = total->not_finite > 0 ? nan("") : sqrt(total->value());
  result->norm = norm;
  result->not_finite = total->not_finite;
  // A sum beyond the largest double is no norm to divide by: the factor is then not finite either, and nothing moves.
  control->scale = isfinite(norm) ? clip_factor(norm, max_norm) : nan("");
}

/// Number, rate and factor of a step.
static __global__ void control_kernel(adamw_control* control, std::int64_t last_step, double rate, bool counted,
                                      bool unscaled) {
  if (counted) {
    control->step = last_step;
    control->rate = rate;
  }
  if (unscaled) control->scale = 1.0;
}

}  // namespace shard::detail
TESSERA_NAMESPACE_END
