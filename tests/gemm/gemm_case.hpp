// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random grouped products, and the same products by three plain loops in double.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <tessera/gemm/gemm.hpp>

namespace gemm_case {

namespace ts = tessera;
using ts::bfloat16;

using random_engine = std::mt19937_64;

inline std::int64_t uniform(random_engine& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

template <class T>
T to(double value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return bfloat16(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class T>
double from(T value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return static_cast<double>(static_cast<float>(value));
  } else {
    return static_cast<double>(value);
  }
}

template <class T>
std::vector<T> normal(random_engine& random, std::int64_t count) {
  std::normal_distribution<double> distribution;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = to<T>(distribution(random));
  return values;
}

template <class T>
constexpr double unit_roundoff() {
  if constexpr (std::is_same_v<T, bfloat16>) return 0x1p-8;
  if constexpr (std::is_same_v<T, float>) return 0x1p-24;
  return 0x1p-53;
}

template <class T>
bool same_bits(const T* x, const T* y, std::int64_t count) {
  return std::memcmp(x, y, static_cast<std::size_t>(count) * sizeof(T)) == 0;
}

// A sum of `terms` products in type A, then stored as TC, may differ from the exact one by this much; `magnitude` is
// the sum of the absolute terms.
template <class A, class TC>
double tolerance(std::int64_t terms, double magnitude) {
  return (static_cast<double>(terms) + 4) * unit_roundoff<A>() * magnitude * 1.01 +
         1.01 * unit_roundoff<TC>() * magnitude;
}

// Where a group's matrix has its contiguous dimension; `neither` has gaps everywhere.
enum class order { rows, columns, neither };

template <class T>
struct grouped_matrix {
  std::vector<T> values;
  ts::gemm::group_operand<T> operand;

  // [groups, rows, cols] of `fill` (a generator of values), with gaps of `pad` elements.
  template <class Fill>
  grouped_matrix(order layout, std::int64_t groups, std::int64_t rows, std::int64_t cols, std::int64_t pad, Fill fill) {
    const std::int64_t inner = layout == order::neither ? 2 : 1;
    if (layout == order::columns) {
      operand.row_stride = 1;
      operand.col_stride = rows + pad;
      operand.group_stride = cols * operand.col_stride + pad;
    } else {
      operand.col_stride = inner;
      operand.row_stride = cols * inner + pad;
      operand.group_stride = rows * operand.row_stride + pad;
    }
    values = fill(groups * operand.group_stride + 1);
    operand.data = values.data();
  }
  grouped_matrix(const grouped_matrix&) = delete;

  ts::gemm::group_operand<const T> view() const {
    return {operand.data, operand.group_stride, operand.row_stride, operand.col_stride};
  }
};

// Rows of `cols` elements with a gap, read in place or through a gather list with repeats and unread rows.
template <class T>
struct rows_matrix {
  std::vector<T> values;
  std::vector<std::int32_t> gather;
  ts::gemm::row_operand<T> operand;

  rows_matrix(random_engine& random, std::int64_t rows, std::int64_t cols, bool gathered, std::int64_t pad) {
    const std::int64_t source_rows = gathered ? std::max<std::int64_t>(1, rows / 2 + 3) : rows;
    values = normal<T>(random, source_rows * (cols + pad) + 1);
    operand = {values.data(), cols + pad, nullptr};
    if (gathered) {
      for (std::int64_t i = 0; i < rows; ++i)
        gather.push_back(static_cast<std::int32_t>(uniform(random, 0, source_rows - 1)));
      gather.push_back(0);  // so that the list has an address even without rows
      operand.gather = gather.data();
    }
  }
  rows_matrix(const rows_matrix&) = delete;
};

inline std::vector<std::int32_t> offsets_of(const std::vector<std::int64_t>& rows_per_group, std::int64_t first = 0) {
  std::vector<std::int32_t> offsets{static_cast<std::int32_t>(first)};
  for (const std::int64_t rows : rows_per_group) offsets.push_back(static_cast<std::int32_t>(offsets.back() + rows));
  return offsets;
}

inline std::vector<std::int32_t> random_offsets(random_engine& random, std::int64_t groups, std::int64_t max_rows) {
  std::vector<std::int64_t> rows;
  for (std::int64_t g = 0; g < groups; ++g)
    rows.push_back(uniform(random, 0, 2) == 0 ? uniform(random, 0, 1) : uniform(random, 0, max_rows));
  return offsets_of(rows, uniform(random, 0, 1) == 0 ? 0 : uniform(random, 1, 5));
}

struct sizes {
  std::vector<std::int32_t> offsets;
  std::int64_t M;  // variable_k only
  std::int64_t N;
  std::int64_t K;  // variable_m only
};

// Checks Gemm::variable_m against plain loops; also that nothing but the result's elements is written.
template <class Gemm, class A, class TA, class TB, class TBias, class TC>
void check_variable_m(random_engine& random, const sizes& s, order layout, bool gathered, bool biased, ts::write mode) {
  const auto groups = static_cast<std::int64_t>(s.offsets.size()) - 1;
  const std::int64_t first = s.offsets.front();
  const std::int64_t end = s.offsets.back();
  const std::int64_t pad = uniform(random, 0, 1) * uniform(random, 0, 7);
  const rows_matrix<TA> a(random, end, s.K, gathered, pad);
  const grouped_matrix<TB> b(layout, groups, s.N, s.K, pad, [&](std::int64_t n) { return normal<TB>(random, n); });
  const auto bias = normal<TBias>(random, groups * s.N + 1);
  auto c = normal<TC>(random, (end + 1) * (s.N + pad) + 1);
  const auto old = c;
  const ts::matrix_view<TC> view(c.data(), end + 1, s.N, s.N + pad);
  Gemm::template variable_m<A>(s.offsets, s.N, s.K, a.operand, b.view(), biased ? bias.data() : nullptr, view, mode);

  double worst = 0;
  for (std::int64_t g = 0; g < groups; ++g)
    for (std::int64_t i = s.offsets[static_cast<std::size_t>(g)]; i < s.offsets[static_cast<std::size_t>(g) + 1]; ++i)
      for (std::int64_t j = 0; j < s.N; ++j) {
        double sum = 0, magnitude = 0;
        const auto add = [&](double term) {
          sum += term;
          magnitude += std::abs(term);
        };
        for (std::int64_t k = 0; k < s.K; ++k) add(from(a.operand.row(i)[k]) * from(b.operand(g, j, k)));
        if (biased) add(from(bias[static_cast<std::size_t>(g * s.N + j)]));
        if (mode == ts::write::accumulate) add(from(old[static_cast<std::size_t>(i * view.stride + j)]));
        const double error = std::abs(from(view(i, j)) - sum);
        worst = std::max(worst, error / (tolerance<A, TC>(s.K, magnitude) + std::numeric_limits<double>::min()));
      }
  CHECK_MESSAGE(worst <= 1, "error is " << worst << " times the bound for N = " << s.N << ", K = " << s.K);
  bool untouched = true;
  for (std::int64_t i = 0; i <= end; ++i)
    for (std::int64_t j = 0; j < view.stride; ++j)
      if (i < first || i >= end || j >= s.N) untouched &= same_bits(view.row(i) + j, &old[0] + i * view.stride + j, 1);
  CHECK(untouched);
}

// The same for Gemm::variable_k.
template <class Gemm, class A, class TA, class TB, class TC>
void check_variable_k(random_engine& random, const sizes& s, order layout, bool gathered, ts::write mode) {
  const auto groups = static_cast<std::int64_t>(s.offsets.size()) - 1;
  const std::int64_t pad = uniform(random, 0, 1) * uniform(random, 0, 7);
  const rows_matrix<TA> a(random, s.offsets.back(), s.M, gathered && uniform(random, 0, 2) != 0, pad);
  const rows_matrix<TB> b(random, s.offsets.back(), s.N, gathered, pad);
  grouped_matrix<TC> c(layout, groups, s.M, s.N, pad, [&](std::int64_t n) { return normal<TC>(random, n); });
  const auto old = c.values;
  Gemm::template variable_k<A>(s.offsets, s.M, s.N, a.operand, b.operand, c.operand, mode);

  double worst = 0;
  std::vector<bool> written(old.size(), false);
  for (std::int64_t g = 0; g < groups; ++g)
    for (std::int64_t m = 0; m < s.M; ++m)
      for (std::int64_t n = 0; n < s.N; ++n) {
        double sum = 0, magnitude = 0;
        const auto add = [&](double term) {
          sum += term;
          magnitude += std::abs(term);
        };
        const std::int32_t begin = s.offsets[static_cast<std::size_t>(g)];
        const std::int32_t end = s.offsets[static_cast<std::size_t>(g) + 1];
        for (std::int64_t i = begin; i < end; ++i) add(from(a.operand.row(i)[m]) * from(b.operand.row(i)[n]));
        const auto index = static_cast<std::size_t>(&c.operand(g, m, n) - c.operand.data);
        written[index] = true;
        if (mode == ts::write::accumulate) add(from(old[index]));
        const double error = std::abs(from(c.values[index]) - sum);
        worst =
            std::max(worst, error / (tolerance<A, TC>(end - begin, magnitude) + std::numeric_limits<double>::min()));
      }
  CHECK_MESSAGE(worst <= 1, "error is " << worst << " times the bound for M = " << s.M << ", N = " << s.N);
  bool untouched = true;
  for (std::size_t i = 0; i < old.size(); ++i)
    if (!written[i]) untouched &= same_bits(&c.values[i], &old[i], 1);
  CHECK(untouched);
}

inline constexpr order orders[] = {order::rows, order::columns, order::neither};
inline constexpr ts::write modes[] = {ts::write::overwrite, ts::write::accumulate};

}  // namespace gemm_case
