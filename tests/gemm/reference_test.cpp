// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <tessera/gemm/gemm.hpp>

#include "../support/messages.hpp"
#include "gemm_case.hpp"

namespace {

namespace ts = tessera;
using namespace gemm_case;
using tessera_test::message_of;
using ts::matrix_view;
using ts::gemm::group_operand;
using ts::gemm::reference;
using ts::gemm::row_operand;

static_assert(std::is_trivially_copyable_v<row_operand<float>> && std::is_trivially_copyable_v<group_operand<float>>);
static_assert(ts::gemm::host_gemm<reference>);
static_assert(std::is_same_v<ts::gemm::host_backend<ts::gemm::automatic>, reference>);
static_assert(std::is_same_v<ts::gemm::host_backend<reference>, reference>);
static_assert(!ts::gemm::host_gemm<ts::gemm::automatic>, "a policy is not a backend");

// {sums, a, b, bias, c}: every storage type in every place, with the sums it may have.
template <class A, class TA, class TB, class TBias, class TC>
struct types {
  using sum = A;
  using a = TA;
  using b = TB;
  using bias = TBias;
  using c = TC;
};
#define GEMM_TYPES                                                                                          \
  types<float, float, float, float, float>, types<double, double, double, double, double>,                  \
      types<float, bfloat16, bfloat16, bfloat16, bfloat16>, types<float, bfloat16, bfloat16, float, float>, \
      types<float, float, bfloat16, bfloat16, float>, types<float, bfloat16, float, float, bfloat16>,       \
      types<double, bfloat16, double, double, bfloat16>

TEST_CASE_TEMPLATE("variable_m agrees with plain loops in double", T, GEMM_TYPES) {
  random_engine random(1);
  for (int repeat = 0; repeat < 12; ++repeat)
    for (const order layout : orders)
      for (const ts::write mode : modes) {
        const std::int64_t groups = uniform(random, 0, 4);
        const std::int64_t N = uniform(random, 0, 1) == 0 ? uniform(random, 0, 5) : uniform(random, 1, 70);
        const std::int64_t K = uniform(random, 0, 1) == 0 ? uniform(random, 0, 5) : uniform(random, 1, 70);
        check_variable_m<reference, typename T::sum, typename T::a, typename T::b, typename T::bias, typename T::c>(
            random, {random_offsets(random, groups, 30), 0, N, K}, layout, uniform(random, 0, 1) == 0,
            uniform(random, 0, 1) == 0, mode);
      }
}

TEST_CASE_TEMPLATE("variable_k agrees with plain loops in double", T, GEMM_TYPES) {
  random_engine random(2);
  for (int repeat = 0; repeat < 12; ++repeat)
    for (const order layout : orders)
      for (const ts::write mode : modes) {
        const std::int64_t groups = uniform(random, 0, 4);
        const std::int64_t M = uniform(random, 0, 1) == 0 ? uniform(random, 0, 5) : uniform(random, 1, 50);
        const std::int64_t N = uniform(random, 0, 1) == 0 ? uniform(random, 0, 5) : uniform(random, 1, 70);
        check_variable_k<reference, typename T::sum, typename T::a, typename T::b, typename T::c>(
            random, {random_offsets(random, groups, 40), M, N, 0}, layout, uniform(random, 0, 1) == 0, mode);
      }
}

TEST_CASE("products larger than every block agree with plain loops in double") {
  random_engine random(3);
  for (const order layout : orders) {
    check_variable_m<reference, float, bfloat16, float, float, float>(
        random, {offsets_of({151, 0, 13}, 2), 0, 133, 517}, layout, true, true, ts::write::accumulate);
    check_variable_m<reference, double, double, double, double, double>(random, {offsets_of({145}), 0, 70, 260}, layout,
                                                                        false, true, ts::write::overwrite);
    check_variable_m<reference, float, float, float, float, bfloat16>(random, {offsets_of({300}), 0, 40, 256}, layout,
                                                                      false, true, ts::write::overwrite);
    check_variable_k<reference, float, float, bfloat16, float>(random, {offsets_of({517, 3}, 1), 149, 133, 0}, layout,
                                                               true, ts::write::accumulate);
    check_variable_k<reference, double, double, double, double>(random, {offsets_of({257}), 150, 66, 0}, layout, false,
                                                                ts::write::overwrite);
    // Whole tiles of sums that need no conversion are kept in the result itself.
    check_variable_m<reference, float, float, float, float, float>(random, {offsets_of({300, 1}), 0, 64, 517}, layout,
                                                                   true, false, ts::write::overwrite);
    check_variable_k<reference, float, float, float, float>(random, {offsets_of({300, 1}), 150, 160, 0}, layout, false,
                                                            ts::write::overwrite);
  }
}

TEST_CASE_TEMPLATE("overwriting has the bits of adding to zeros", A, float, double) {
  random_engine random(8);
  for (const std::int64_t length : {9, 600})
    for (const std::int64_t N : {64, 75}) {
      const std::int64_t rows = 150;
      const auto x = normal<A>(random, std::max(rows, length) * std::max(rows, length));
      const auto w = normal<A>(random, std::max(N, length) * length);
      std::vector<A> overwritten(static_cast<std::size_t>(rows * N)), added(overwritten);
      for (const bool overwrite : {true, false}) {
        auto& c = overwrite ? overwritten : added;
        reference::variable_m<A>(offsets_of({rows}), N, length, row_operand<A>{x.data(), length},
                                 group_operand<const A>{w.data(), 0, length, 1}, nullptr,
                                 matrix_view<A>(c.data(), rows, N),
                                 overwrite ? ts::write::overwrite : ts::write::accumulate);
      }
      CHECK(same_bits(overwritten.data(), added.data(), rows * N));
      std::fill(added.begin(), added.end(), A{0});
      for (const bool overwrite : {true, false}) {
        auto& c = overwrite ? overwritten : added;
        reference::variable_k<A>(offsets_of({length}), rows, N, row_operand<A>{x.data(), rows},
                                 row_operand<A>{w.data(), N}, group_operand<A>{c.data(), 0, N, 1},
                                 overwrite ? ts::write::overwrite : ts::write::accumulate);
      }
      CHECK(same_bits(overwritten.data(), added.data(), rows * N));
    }
}

// Bits of c for rows of one group, each row multiplied within a group of the given size.
template <class A, class S>
struct one_group {
  std::int64_t N, K;
  std::vector<S> x;  // [rows, K]
  std::vector<S> w;  // [N, K]
  std::vector<S> w_transposed;
  std::vector<S> bias;

  one_group(random_engine& random, std::int64_t rows, std::int64_t N_, std::int64_t K_)
      : N(N_),
        K(K_),
        x(normal<S>(random, rows * K)),
        w(normal<S>(random, N * K)),
        w_transposed(w),
        bias(normal<S>(random, N)) {
    for (std::int64_t n = 0; n < N; ++n)
      for (std::int64_t k = 0; k < K; ++k)
        w_transposed[static_cast<std::size_t>(k * N + n)] = w[static_cast<std::size_t>(n * K + k)];
  }

  std::vector<A> operator()(const std::vector<std::int32_t>& gather, const std::vector<std::int64_t>& group_rows,
                            bool transposed) const {
    std::vector<A> c(gather.size() * static_cast<std::size_t>(N));
    const group_operand<const S> b =
        transposed ? group_operand<const S>{w_transposed.data(), 0, 1, N} : group_operand<const S>{w.data(), 0, K, 1};
    std::vector<S> biases;
    for (std::size_t g = 0; g < group_rows.size(); ++g) biases.insert(biases.end(), bias.begin(), bias.end());
    reference::variable_m<A>(offsets_of(group_rows), N, K, row_operand<S>{x.data(), K, gather.data()}, b, biases.data(),
                             matrix_view<A>(c.data(), static_cast<std::int64_t>(gather.size()), N));
    return c;
  }
};

TEST_CASE_TEMPLATE("a row's bits do not depend on the other rows, on groups, or on the layout of the weights", Types,
                   std::tuple<float, float>, std::tuple<double, double>, std::tuple<float, bfloat16>) {
  using A = std::tuple_element_t<0, Types>;
  using S = std::tuple_element_t<1, Types>;
  random_engine random(4);
  const std::int64_t rows = 40;
  for (const auto& extents :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{64, 64}, {37, 300}, {1, 9}, {33, 600}, {150, 17}}) {
    const std::int64_t N = extents.first, K = extents.second;
    const one_group<A, S> product(random, rows, N, K);
    std::vector<std::int32_t> all(static_cast<std::size_t>(rows));
    std::iota(all.begin(), all.end(), 0);
    const auto expected = product(all, {rows}, false);
    const auto check = [&](const std::vector<std::int32_t>& gather, const std::vector<std::int64_t>& group_rows) {
      for (const bool transposed : {false, true}) {
        const auto c = product(gather, group_rows, transposed);
        bool same = true;
        for (std::size_t i = 0; i < gather.size(); ++i)
          same &= same_bits(&c[i * static_cast<std::size_t>(N)],
                            &expected[static_cast<std::size_t>(gather[i]) * static_cast<std::size_t>(N)], N);
        CHECK(same);
      }
    };
    check(all, {rows});
    for (std::int64_t size = 1; size <= 25; ++size) {  // every height of a tile, with and without a copy of the weights
      std::vector<std::int32_t> some(static_cast<std::size_t>(size));
      for (auto& row : some) row = static_cast<std::int32_t>(uniform(random, 0, rows - 1));
      check(some, {size});
    }
    std::shuffle(all.begin(), all.end(), random);
    check(all, {1, 0, 7, 13, 2, 17});
    std::vector<std::int32_t> many(331);
    for (auto& row : many) row = static_cast<std::int32_t>(uniform(random, 0, rows - 1));
    check(many, {331});
  }
}

TEST_CASE("a column's bits do not depend on the other columns") {
  random_engine random(5);
  const std::int64_t rows = 14, N = 70, K = 301;
  const one_group<float, float> product(random, rows, N, K);
  std::vector<std::int32_t> all(static_cast<std::size_t>(rows));
  std::iota(all.begin(), all.end(), 0);
  const auto expected = product(all, {rows}, false);
  for (const std::int64_t first : {0, 1, 31, 32, 69})
    for (const std::int64_t count : {1, 2, 33}) {
      if (first + count > N) continue;
      std::vector<float> c(static_cast<std::size_t>(rows * count));
      reference::variable_m<float>(offsets_of({rows}), count, K, row_operand<float>{product.x.data(), K},
                                   group_operand<const float>{product.w.data() + first * K, 0, K, 1},
                                   product.bias.data() + first, matrix_view<float>(c.data(), rows, count));
      bool same = true;
      for (std::int64_t i = 0; i < rows; ++i)
        same &= same_bits(&c[static_cast<std::size_t>(i * count)], &expected[static_cast<std::size_t>(i * N + first)],
                          count);
      CHECK(same);
    }
}

TEST_CASE_TEMPLATE("a group's product over its rows has the same bits wherever the rows lie", S, float, bfloat16) {
  random_engine random(6);
  for (const std::int64_t rows : {1, 5, 64, 300, 600}) {
    const std::int64_t M = 29, N = 45;
    const auto x = normal<S>(random, rows * M);
    const auto y = normal<S>(random, rows * N);
    std::vector<float> alone(static_cast<std::size_t>(M * N)), transposed(alone);
    reference::variable_k<float>(offsets_of({rows}), M, N, row_operand<S>{x.data(), M}, row_operand<S>{y.data(), N},
                                 group_operand<float>{alone.data(), 0, N, 1}, ts::write::overwrite);
    reference::variable_k<float>(offsets_of({rows}), M, N, row_operand<S>{x.data(), M}, row_operand<S>{y.data(), N},
                                 group_operand<float>{transposed.data(), 0, 1, M}, ts::write::overwrite);
    bool same = true;
    for (std::int64_t m = 0; m < M; ++m)
      for (std::int64_t n = 0; n < N; ++n)
        same &=
            same_bits(&alone[static_cast<std::size_t>(m * N + n)], &transposed[static_cast<std::size_t>(n * M + m)], 1);
    CHECK(same);

    // The same rows, between other groups, in other places of memory, and first or last of a call's columns.
    const std::int64_t before = 7, after = 11, all = before + rows + after;
    auto wide_x = normal<S>(random, all * (M + 3));
    auto wide_y = normal<S>(random, all * (N + 40));
    std::vector<std::int32_t> gather(static_cast<std::size_t>(all));
    std::iota(gather.begin(), gather.end(), 0);
    std::shuffle(gather.begin(), gather.end(), random);
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t source = gather[static_cast<std::size_t>(before + i)];
      std::copy_n(&x[static_cast<std::size_t>(i * M)], M, &wide_x[static_cast<std::size_t>(source * (M + 3))]);
      std::copy_n(&y[static_cast<std::size_t>(i * N)], N, &wide_y[static_cast<std::size_t>(source * (N + 40) + 40)]);
    }
    std::vector<float> among(static_cast<std::size_t>(3 * (M + 3) * (N + 40)));
    reference::variable_k<float>(
        offsets_of({before, rows, after}), M + 3, N + 40, row_operand<S>{wide_x.data(), M + 3, gather.data()},
        row_operand<S>{wide_y.data(), N + 40, gather.data()},
        group_operand<float>{among.data(), (M + 3) * (N + 40), N + 40, 1}, ts::write::overwrite);
    for (std::int64_t m = 0; m < M; ++m)
      CHECK(same_bits(&alone[static_cast<std::size_t>(m * N)],
                      &among[static_cast<std::size_t>((M + 3 + m) * (N + 40) + 40)], N));
  }
}

TEST_CASE("sums go up in order, with one rounding at the end") {
  // 2^24 + 1 + 1 + ... in order stays 2^24 in fp32; any partial sum of the ones would be seen.
  const std::int64_t K = 700;
  std::vector<float> x(static_cast<std::size_t>(K), 1.0f), w(static_cast<std::size_t>(K), 1.0f);
  x[0] = 0x1p24f;
  float c = 0;
  reference::variable_m<float>(offsets_of({1}), 1, K, row_operand<float>{x.data(), K},
                               group_operand<const float>{w.data(), K, K, 1}, nullptr, matrix_view<float>(&c, 1, 1));
  CHECK(c == 0x1p24f);
  reference::variable_k<float>(offsets_of({K}), 1, 1, row_operand<float>{x.data(), 1}, row_operand<float>{w.data(), 1},
                               group_operand<float>{&c, 1, 1, 1}, ts::write::overwrite);
  CHECK(c == 0x1p24f);

  // 700 ones are 700 in a bf16 result: a sum kept in bf16 between blocks would stick at 256.
  std::vector<bfloat16> ones(static_cast<std::size_t>(K), bfloat16(1.0f));
  bfloat16 narrow(3.0f);
  reference::variable_m<float>(offsets_of({1}), 1, K, row_operand<bfloat16>{ones.data(), K},
                               group_operand<const bfloat16>{ones.data(), K, K, 1}, nullptr,
                               matrix_view<bfloat16>(&narrow, 1, 1));
  CHECK(static_cast<float>(narrow) == static_cast<float>(bfloat16(700.0f)));
  reference::variable_k<float>(offsets_of({K}), 1, 1, row_operand<bfloat16>{ones.data(), 1},
                               row_operand<bfloat16>{ones.data(), 1}, group_operand<bfloat16>{&narrow, 1, 1, 1},
                               ts::write::accumulate);
  CHECK(static_cast<float>(narrow) == static_cast<float>(bfloat16(700.0f + static_cast<float>(bfloat16(700.0f)))));

  // The bias comes after the sum: with the bias first, 2^24 + 1 + 1 would stay 2^24.
  const std::vector<float> two_ones(2, 1.0f);
  const float bias = 0x1p24f;
  const auto with_bias = [&](std::int64_t length, ts::write mode) {
    reference::variable_m<float>(offsets_of({1}), 1, length, row_operand<float>{two_ones.data(), length},
                                 group_operand<const float>{two_ones.data(), length, length, 1}, &bias,
                                 matrix_view<float>(&c, 1, 1), mode);
    return c;
  };
  CHECK(with_bias(2, ts::write::overwrite) == 0x1p24f + 2);
  // Old content comes last: 1 + 2^24 is 2^24; with the old content before the bias, the 1 would be left.
  c = -0x1p24f;
  CHECK(with_bias(1, ts::write::accumulate) == 0);
}

TEST_CASE_TEMPLATE("small integers give exact results", A, float, double) {
  random_engine random(7);
  const std::int64_t rows = 50, N = 77, K = 301;
  std::vector<bfloat16> x, w;
  for (std::int64_t i = 0; i < rows * K; ++i) x.push_back(bfloat16(static_cast<float>(uniform(random, -16, 16))));
  for (std::int64_t i = 0; i < N * K; ++i) w.push_back(bfloat16(static_cast<float>(uniform(random, -16, 16))));
  std::vector<A> c(static_cast<std::size_t>(rows * N));
  reference::variable_m<A>(offsets_of({rows}), N, K, row_operand<bfloat16>{x.data(), K},
                           group_operand<const bfloat16>{w.data(), 0, K, 1}, nullptr,
                           matrix_view<A>(c.data(), rows, N));
  bool exact = true;
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < N; ++j) {
      long sum = 0;
      for (std::int64_t k = 0; k < K; ++k)
        sum += static_cast<long>(from(x[static_cast<std::size_t>(i * K + k)]) *
                                 from(w[static_cast<std::size_t>(j * K + k)]));
      exact &= c[static_cast<std::size_t>(i * N + j)] == static_cast<A>(sum);
    }
  CHECK(exact);
}

TEST_CASE("empty groups write zeros or nothing, and rows of no group are not read") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::int64_t M = 5, N = 37;
  for (const ts::write mode : modes) {
    std::vector<float> c(static_cast<std::size_t>(3 * M * N), mode == ts::write::overwrite ? nan : 2.0f);
    std::vector<float> x(static_cast<std::size_t>(9 * M), nan), y(static_cast<std::size_t>(9 * N), nan);
    std::fill_n(x.begin() + 4 * M, 2 * M, 1.0f);  // rows 4 and 5 are the middle group's
    std::fill_n(y.begin() + 4 * N, 2 * N, 1.0f);
    reference::variable_k<float>(std::vector<std::int32_t>{4, 4, 6, 6}, M, N, row_operand<float>{x.data(), M},
                                 row_operand<float>{y.data(), N}, group_operand<float>{c.data(), M * N, N, 1}, mode);
    const float old = mode == ts::write::overwrite ? 0.0f : 2.0f;
    for (std::size_t i = 0; i < c.size(); ++i) {
      const bool middle = i >= static_cast<std::size_t>(M * N) && i < static_cast<std::size_t>(2 * M * N);
      REQUIRE(c[i] == (middle ? old + 2.0f : old));
    }
  }
}

TEST_CASE("NaN and infinity stay in their rows and columns") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const std::int64_t rows = 15, N = 35, K = 20;
  for (const bool transposed : {false, true}) {
    std::vector<float> x(static_cast<std::size_t>(rows * K), 1.0f), w(static_cast<std::size_t>(2 * N * K), 1.0f);
    x[static_cast<std::size_t>(3 * K + 7)] = nan;
    x[static_cast<std::size_t>(9 * K)] = infinity;
    const group_operand<float> b =
        transposed ? group_operand<float>{w.data(), N * K, 1, N} : group_operand<float>{w.data(), N * K, K, 1};
    b(0, 33, 4) = nan;
    for (std::int64_t j = 0; j < N; ++j) b(1, j, 0) = nan;  // a group without rows
    std::vector<float> c(static_cast<std::size_t>(rows * N));
    reference::variable_m<float>(offsets_of({rows, 0}), N, K, row_operand<float>{x.data(), K},
                                 group_operand<const float>{b.data, b.group_stride, b.row_stride, b.col_stride},
                                 nullptr, matrix_view<float>(c.data(), rows, N));
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < N; ++j) {
        const float value = c[static_cast<std::size_t>(i * N + j)];
        if (i == 3 || j == 33) {
          REQUIRE(std::isnan(value));
        } else {
          REQUIRE(value == (i == 9 ? infinity : static_cast<float>(K)));
        }
      }
  }
}

TEST_CASE("overwriting does not read what was there") {
  std::vector<float> x{1, 2}, w{3, 4}, c{std::numeric_limits<float>::quiet_NaN()};
  reference::variable_m<float>(offsets_of({1}), 1, 2, row_operand<float>{x.data(), 2},
                               group_operand<const float>{w.data(), 2, 2, 1}, nullptr,
                               matrix_view<float>(c.data(), 1, 1));
  CHECK(c[0] == 11);
}

TEST_CASE("a length of zero gives the bias, and nothing needs no data") {
  const std::vector<float> bias{1, 2, 3};
  std::vector<float> c(6, 9.0f);
  reference::variable_m<float>(offsets_of({2}), 3, 0, row_operand<float>{}, group_operand<const float>{}, bias.data(),
                               matrix_view<float>(c.data(), 2, 3));
  CHECK(c == std::vector<float>{1, 2, 3, 1, 2, 3});
  reference::variable_m<float>(offsets_of({2}), 3, 0, row_operand<float>{}, group_operand<const float>{}, nullptr,
                               matrix_view<float>(c.data(), 2, 3));
  CHECK(c == std::vector<float>(6, 0.0f));
  const matrix_view<float> nothing(nullptr, 0, 3);
  reference::variable_m<float>(offsets_of({0, 0}), 3, 4, row_operand<float>{}, group_operand<const float>{}, nullptr,
                               nothing);
  reference::variable_m<float>(std::vector<std::int32_t>{0}, 3, 4, row_operand<float>{}, group_operand<const float>{},
                               nullptr, nothing);
  reference::variable_k<float>(offsets_of({2}), 0, 3, row_operand<float>{}, row_operand<float>{},
                               group_operand<float>{}, ts::write::overwrite);
}

TEST_CASE("bad arguments are told with their values, and nothing is written") {
  std::vector<float> x(40, 1.0f), w(40, 1.0f), c(40, 7.0f);
  const auto m = [&](std::vector<std::int32_t> offsets, std::int64_t N, std::int64_t K, row_operand<float> a,
                     group_operand<const float> b, matrix_view<float> out) {
    return message_of([&] { reference::variable_m<float>(offsets, N, K, a, b, nullptr, out); });
  };
  const row_operand<float> a{x.data(), 4};
  const group_operand<const float> b{w.data(), 8, 4, 1};
  const matrix_view<float> out(c.data(), 3, 2);
  const auto has = [](const std::string& text, const char* part) {
    CHECK_MESSAGE(text.find(part) != std::string::npos, text);
  };
  has(m({}, 2, 4, a, b, out), "row_offsets is empty");
  has(m({0, 3, 1}, 2, 4, a, b, out), "row_offsets[2] = 1 is below row_offsets[1] = 3");
  has(m({-1, 3}, 2, 4, a, b, out), "row_offsets[0] is -1");
  has(m({0, 3}, 2, -4, a, b, out), "N = 2 and K = -4");
  has(m({0, 3}, 2, 4, {nullptr, 4}, b, out), "a has no data");
  has(m({0, 3}, 2, 4, {x.data(), -4}, b, out), "a has row stride -4");
  has(m({0, 3}, 2, 4, a, {nullptr, 8, 4, 1}, out), "b has no data");
  has(m({0, 3}, 5, 4, a, b, out), "c is [3, 2], expected [3, 5]");
  has(m({0, 4}, 2, 4, a, b, out), "c has 3 rows, row_offsets end at 4");
  has(m({0, 3}, 2, 4, {reinterpret_cast<const float*>(reinterpret_cast<const char*>(x.data()) + 2), 4}, b, out),
      "not aligned to 4");
  has(message_of([&] {
        reference::variable_k<float>(std::vector<std::int32_t>{0, 3}, 2, 2, a, row_operand<float>{nullptr, 2},
                                     group_operand<float>{c.data(), 4, 2, 1}, ts::write::overwrite);
      }),
      "b has no data");
  has(message_of([&] {
        reference::variable_k<float>(std::vector<std::int32_t>{0, 3}, 2, 2, a, a,
                                     group_operand<float>{nullptr, 4, 2, 1}, ts::write::overwrite);
      }),
      "c has no data");
  CHECK(c == std::vector<float>(40, 7.0f));
}

}  // namespace
