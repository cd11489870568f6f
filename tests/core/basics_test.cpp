// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <tessera/core/chunks.hpp>
#include <tessera/core/core.hpp>

namespace ts = tessera;

namespace {

template <class Stream>
concept made_from_literal_zero = requires {
  Stream(0);
};  // a null pointer constant, which no int variable is

struct point {
  int x, y;
  friend std::ostream& operator<<(std::ostream& out, const point& p) { return out << p.x << '/' << p.y; }
};
enum plain { third = 3 };

// What a message makes of a value, and a stream.
template <class... Values>
std::string message_of(const Values&... values) {
  return (ts::detail::message() << ... << values).text();
}
template <class... Values>
std::string stream_of(const Values&... values) {
  std::ostringstream text;
  (text << ... << values);
  return text.str();
}

}  // namespace

TEST_CASE("all exceptions are tessera::error, and tessera::error is a runtime_error") {
  static_assert(std::derived_from<ts::error, std::runtime_error>);
  static_assert(std::derived_from<ts::invalid_argument, ts::error> && std::derived_from<ts::cuda_error, ts::error>);
  static_assert(std::derived_from<ts::nccl_error, ts::error> && std::derived_from<ts::comm_error, ts::error>);
  static_assert(std::derived_from<ts::checkpoint_error, ts::error>);
  const ts::comm_error e("rank 2 did not arrive", 0, 2, "barrier");
  CHECK_EQ(e.rank(), 0);
  CHECK_EQ(e.peer(), 2);
  CHECK_EQ(e.phase(), "barrier");
  CHECK_EQ(std::string_view(e.what()), "rank 2 did not arrive");
}

TEST_CASE("TESSERA_EXPECTS throws its sentence with the values, and evaluates it only then") {
  int evaluated = 0;
  const auto count = [&] { return ++evaluated; };
  TESSERA_EXPECTS(true, "seen " << count());
  CHECK_EQ(evaluated, 0);
  CHECK_THROWS_WITH_AS(TESSERA_EXPECTS(false, "top_k = " << 9 << " exceeds num_experts = " << 8),
                       "top_k = 9 exceeds num_experts = 8", ts::invalid_argument);
  CHECK_THROWS_AS(TESSERA_EXPECTS_AS(ts::checkpoint_error, 1 > 2, "a, b"), ts::checkpoint_error);
  if (evaluated == 0)  // the macro is one statement: an else belongs to this if
    TESSERA_EXPECTS(true, "");
  else
    FAIL("unreachable");
}

TEST_CASE("messages read as a stream would have written them") {
  const auto same = [](const auto&... values) { CHECK_EQ(message_of(values...), stream_of(values...)); };
  same(0, -7, 7u, std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::uint64_t>::max());
  same(std::int16_t{-3}, std::uint16_t{65535}, std::size_t{4}, true, false, 'x');
  same(1.0, 0.1f, 1e300, -2.5e-7, 123456789.0, 1.0 / 3);
  same(std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN());
  same("text", std::string("string"), std::string_view("a view").substr(2), static_cast<const char*>("pointer"));
  const int target = 0;
  same(static_cast<const void*>(&target), &target, static_cast<const void*>(nullptr), static_cast<float*>(nullptr));
  same(point{1, 2}, third, std::int8_t{65}, std::uint8_t{66}, 2.5L);
  CHECK_EQ(message_of(), "");
}

TEST_CASE("a message holds temporaries of its expression, and says where it leaves values out") {
  CHECK_THROWS_WITH_AS(
      TESSERA_EXPECTS(false, "between " << std::string(100, 'a') << " and " << std::to_string(7) + std::string(3, '!')),
      ("between " + std::string(100, 'a') + " and 7!!!").c_str(), ts::invalid_argument);
  ts::detail::message full;
  std::string expected;
  for (int i = 0; i < 32; ++i) {
    full << i;
    expected += std::to_string(i);
  }
  CHECK_EQ(full.text(), expected);
  CHECK_EQ((full << "more" << 5).text(), expected + "...");
}

TEST_CASE("a device stream is made from a stream, never from a literal 0, NULL or nullptr") {
  static_assert(std::is_convertible_v<CUstream_st*, ts::device_stream>);
  static_assert(!made_from_literal_zero<ts::device_stream> && made_from_literal_zero<CUstream_st*>);
  static_assert(!std::is_constructible_v<ts::device_stream, int>);
  static_assert(!std::is_constructible_v<ts::device_stream, std::nullptr_t>);
  static_assert(!std::is_constructible_v<ts::device_stream, long>);
  static_assert(!std::is_default_constructible_v<ts::device_stream>);
  static_assert(std::is_trivially_copyable_v<ts::device_stream> && sizeof(ts::device_stream) == sizeof(void*));
  static_assert(std::is_default_constructible_v<ts::host_stream> && std::is_empty_v<ts::host_stream>);
  static_assert(!std::is_convertible_v<ts::host_stream, ts::device_stream>);
  static_assert(ts::memory_space<ts::space::host> && ts::memory_space<ts::space::device> && !ts::memory_space<int>);
  auto* const stream = reinterpret_cast<CUstream_st*>(0x40);
  CHECK_EQ(ts::device_stream(stream).get(), stream);
}

TEST_CASE("the version is one number, and the namespace carries major and minor") {
  static_assert(TESSERA_VERSION == TESSERA_VERSION_MAJOR * 10000 + TESSERA_VERSION_MINOR * 100 + TESSERA_VERSION_PATCH);
  static_assert(TESSERA_VERSION_MINOR < 100 && TESSERA_VERSION_PATCH < 100);
#define TESSERA_TEST_JOIN(major_number, minor_number) v##major_number##_##minor_number
#define TESSERA_TEST_NAMESPACE(major_number, minor_number) TESSERA_TEST_JOIN(major_number, minor_number)
  static_assert(
      std::is_same_v<ts::TESSERA_TEST_NAMESPACE(TESSERA_VERSION_MAJOR, TESSERA_VERSION_MINOR)::error, ts::error>);
}

TEST_CASE("a default log sink is silent, and null makes a silent one") {
  CHECK_FALSE(ts::log_sink().wants(ts::log_level::warning));
  CHECK_FALSE(ts::log_sink(nullptr, nullptr, ts::log_level::debug).wants(ts::log_level::warning));
  ts::log_sink()(ts::log_level::warning, "nobody hears this");
}

TEST_CASE("a log sink writes what it wants, with its context, and formats nothing else") {
  struct line {
    ts::log_level level;
    std::string text;
  };
  std::vector<line> lines;
  const ts::log_sink log(
      [](void* context, ts::log_level level, std::string_view message) {
        static_cast<std::vector<line>*>(context)->push_back({level, std::string(message)});
      },
      &lines, ts::log_level::info);
  CHECK(log.wants(ts::log_level::info));
  CHECK(log.wants(ts::log_level::warning));
  CHECK_FALSE(log.wants(ts::log_level::debug));
  CHECK_FALSE(log.wants(ts::log_level::silent));
  log(ts::log_level::debug, "not this");
  log(ts::log_level::silent, "nor this");
  log(ts::log_level::info, "row_bound = ", 512, " pairs");
  log(ts::log_level::warning, "slow");
  REQUIRE_EQ(lines.size(), 2u);
  CHECK_EQ(lines[0].text, "row_bound = 512 pairs");
  CHECK(lines[0].level == ts::log_level::info);
  CHECK_EQ(lines[1].text, "slow");
}

TEST_CASE("tokens are cut into chunks, the last one shorter, however long they are") {
  CHECK(ts::num_chunks(0, 4) == 0);
  CHECK(ts::num_chunks(8, 4) == 2);
  CHECK(ts::num_chunks(9, 4) == 3);
  CHECK(ts::num_chunks(9, 0) == 1);
  CHECK(ts::num_chunks(9, INT64_MAX) == 1);
}

TEST_CASE("an NVTX range is an empty object while NVTX is off") {
  static_assert(std::is_empty_v<ts::nvtx_range>);
  static_assert(!std::is_convertible_v<const char*, ts::nvtx_range>);
  const ts::nvtx_range range("dispatch");
  static_cast<void>(range);
}
