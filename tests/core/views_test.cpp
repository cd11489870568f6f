// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <type_traits>

#include <tessera/core/dtype.hpp>
#include <tessera/core/views.hpp>

#include "../support/messages.hpp"

namespace ts = tessera;

namespace {

using tessera_test::contains;
using tessera_test::message_of;

// What an engine's mdspan looks like, as far as a view can tell.
template <class T, std::size_t Rank>
struct tiny_mdspan {
  T* pointer;
  std::array<long, Rank> extents;
  std::array<long, Rank> strides;
  static constexpr std::size_t rank() { return Rank; }
  T* data_handle() const { return pointer; }
  long extent(std::size_t i) const { return extents[i]; }
  long stride(std::size_t i) const { return strides[i]; }
};

}  // namespace

TEST_CASE("a matrix view is trivially copyable and becomes constant, never mutable again") {
  static_assert(std::is_trivially_copyable_v<ts::matrix_view<float>>);
  static_assert(std::is_convertible_v<ts::matrix_view<float>, ts::matrix_view<const float>>);
  static_assert(!std::is_convertible_v<ts::matrix_view<const float>, ts::matrix_view<float>>);
  static_assert(!std::is_convertible_v<ts::matrix_view<float>, ts::matrix_view<const double>>);
}

TEST_CASE("elements, rows and ranges of rows stand where the stride puts them") {
  std::array<int, 20> data{};
  std::iota(data.begin(), data.end(), 0);
  const ts::matrix_view<int> m(data.data(), 4, 3, 5);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 3; ++j) CHECK_EQ(m(i, j), 5 * i + j);
  }
  CHECK_EQ(*m.row(2), 10);
  const auto part = m.subrows(1, 2);
  CHECK_EQ(part.rows, 2);
  CHECK_EQ(part(1, 2), 12);
  CHECK_EQ(m.span_elements(), 18);  // the gap after the last row is not part of it
  CHECK_EQ(m.subrows(4, 0).span_elements(), 0);
  CHECK_EQ(ts::matrix_view<int>(data.data(), 4, 5).stride, 5);
}

TEST_CASE("an mdspan with contiguous rows is a matrix view") {
  std::array<float, 12> data{};
  const tiny_mdspan<float, 2> m{data.data(), {2, 3}, {6, 1}};
  static_assert(ts::mdspan_like<tiny_mdspan<float, 2>>);
  static_assert(!std::is_convertible_v<tiny_mdspan<const float, 2>, ts::matrix_view<float>>);
  const ts::matrix_view<const float> view = m;
  CHECK_EQ(view.data, data.data());
  CHECK_EQ(view.rows, 2);
  CHECK_EQ(view.cols, 3);
  CHECK_EQ(view.stride, 6);
}

TEST_CASE("an mdspan of another rank or with strided columns is refused with its numbers") {
  std::array<float, 12> data{};
  const tiny_mdspan<float, 3> cube{data.data(), {2, 3, 2}, {6, 2, 1}};
  CHECK(contains(message_of([&] { ts::matrix_view<float> view(cube); }), "this one has rank 3"));
  const tiny_mdspan<float, 2> columns{data.data(), {2, 3}, {1, 2}};
  CHECK(contains(message_of([&] { ts::matrix_view<float> view(columns); }), "stride(1) is 2"));
  const tiny_mdspan<float, 2> column{data.data(), {2, 1}, {1, 2}};  // a single column has no column stride to speak of
  CHECK_EQ(ts::matrix_view<float>(column).stride, 1);
}

TEST_CASE("expect_matrix names what differs: shape, stride, data, alignment") {
  std::array<double, 12> data{};
  const ts::matrix_view<double> m(data.data(), 2, 3, 6);
  CHECK_NOTHROW(ts::expect_matrix(m, 2, 3, "x"));
  CHECK_NOTHROW(ts::expect_matrix(m, -1, 3, "x"));
  CHECK_NOTHROW(ts::expect_matrix(m, -1, -1, "x"));
  CHECK(contains(message_of([&] { ts::expect_matrix(m, 2, 4, "dy"); }), "dy is [2, 3], expected [2, 4]"));
  CHECK(contains(message_of([&] { ts::expect_matrix(m, 7, -1, "dy"); }), "dy is [2, 3], expected [7, 3]"));

  const ts::matrix_view<double> tight(data.data(), 2, 3, 2);
  CHECK(contains(message_of([&] { ts::expect_matrix(tight, 2, 3, "x"); }), "row stride 2, at least 3"));
  CHECK_NOTHROW(ts::expect_matrix(tight.subrows(0, 1), 1, 3, "x"));  // one row has no next one

  const ts::matrix_view<double> missing(nullptr, 2, 3);
  CHECK(contains(message_of([&] { ts::expect_matrix(missing, 2, 3, "x"); }), "x has no data"));
  CHECK_NOTHROW(ts::expect_matrix(ts::matrix_view<double>(nullptr, 0, 3), 0, 3, "x"));

  auto* const shifted = reinterpret_cast<double*>(reinterpret_cast<std::uintptr_t>(data.data()) + 4);
  const std::string text = message_of([&] { ts::expect_matrix(ts::matrix_view<double>(shifted, 1, 3), 1, 3, "x"); });
  CHECK(contains(text, "not aligned to 8 bytes"));
}

TEST_CASE("expect_disjoint finds ranges that share a byte, and lets neighbours and empty ranges be") {
  std::array<float, 32> data{};
  const ts::matrix_view<float> first(data.data(), 2, 8);
  const ts::matrix_view<float> second(data.data() + 16, 2, 8);
  const ts::matrix_view<float> across(data.data() + 15, 1, 2);
  CHECK_NOTHROW(ts::expect_disjoint(first, "x", second, "y"));
  CHECK_NOTHROW(ts::expect_disjoint(first, "x", across.subrows(0, 0), "y"));
  CHECK(contains(message_of([&] { ts::expect_disjoint(first, "x", across, "y"); }), "overlaps y"));
  CHECK(contains(message_of([&] { ts::expect_disjoint(across, "y", second, "dx"); }), "overlaps dx"));
  CHECK(contains(message_of([&] { ts::expect_disjoint(first, "x", first, "itself"); }), "64 bytes"));
}

TEST_CASE("expect_disjoint lets the columns of one matrix be, with the same stride") {
  std::array<float, 64> data{};
  const auto columns = [&](int row, int first, int count, int stride = 8) {
    return ts::matrix_view<float>(data.data() + row * 8 + first, 4, count, stride);
  };
  const auto apart = [](const auto& a, const auto& b) {
    const bool disjoint = message_of([&] { ts::expect_disjoint(a, "a", b, "b"); }).empty();
    CHECK(message_of([&] { ts::expect_disjoint(b, "b", a, "a"); }).empty() == disjoint);
    return disjoint;
  };
  CHECK(apart(columns(0, 0, 4), columns(0, 4, 4)));
  CHECK(apart(columns(0, 0, 4), columns(2, 4, 4)));
  CHECK(apart(columns(0, 4, 4), columns(1, 0, 4)));
  CHECK(apart(columns(0, 4, 4), columns(0, 10, 2)));  // rows 1 to 4 of columns 2 and 3
  CHECK_FALSE(apart(columns(0, 0, 5), columns(0, 4, 4)));
  CHECK_FALSE(apart(columns(0, 0, 4), columns(0, 3, 5)));
  CHECK_FALSE(apart(columns(0, 0, 4), columns(1, 0, 4)));
  CHECK_FALSE(apart(columns(0, 0, 4), columns(0, 6, 4)));  // ends in the next row's columns 0 and 1
  CHECK_FALSE(apart(columns(0, 0, 4), columns(0, 4, 4, 9)));
  const ts::matrix_view<float> no_columns(data.data(), 4, 0, 0);
  CHECK(apart(no_columns, no_columns));
  // elements of another size, with rows as long
  const ts::matrix_view<double> wide(reinterpret_cast<double*>(data.data() + 4), 4, 2, 4);
  CHECK(apart(columns(0, 0, 4), wide));
  CHECK_FALSE(apart(columns(0, 0, 5), wide));
}
