// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <tessera/core/memory.hpp>

#include "../support/messages.hpp"

namespace ts = tessera;

namespace {

using tessera_test::contains;
using tessera_test::message_of;

struct slices {
  float* a;
  std::int32_t* b;
  double* c;
  std::byte* d;
};

// One description of a layout: with a counting builder it gives sizes, with a carving one pointers.
slices lay_out(ts::memory_builder& builder, std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
  slices s{};
  s.a = builder.take<float>("a", a);
  s.b = builder.take<std::int32_t>("b", b);
  s.c = builder.take<double>("c", c);
  s.d = builder.take<std::byte>("d", d);
  return s;
}

}  // namespace

TEST_CASE("counting and carving agree: exactly the counted bytes are enough, one less is not") {
  std::mt19937 random(7);
  std::uniform_int_distribution<std::int64_t> size(0, 700);
  for (int round = 0; round < 200; ++round) {
    const std::int64_t a = size(random), b = size(random), c = size(random), d = 1 + size(random);
    ts::memory_builder counter;
    const slices nothing = lay_out(counter, a, b, c, d);
    CHECK(counter.counting());
    CHECK((nothing.a == nullptr && nothing.b == nullptr && nothing.c == nullptr && nothing.d == nullptr));

    ts::host_buffer buffer(counter.bytes());
    ts::memory_builder carver(ts::workspace_memory(buffer), "workspace");
    lay_out(carver, a, b, c, d);
    CHECK_FALSE(carver.counting());
    CHECK_EQ(carver.bytes(), counter.bytes());

    ts::memory_builder short_one(ts::workspace_memory(buffer.data(), buffer.size() - 1), "workspace");
    CHECK_THROWS_AS(lay_out(short_one, a, b, c, d), ts::invalid_argument);
  }
}

TEST_CASE("slices are aligned, in order, inside the buffer and disjoint") {
  ts::memory_builder counter;
  lay_out(counter, 3, 65, 1, 513);
  ts::host_buffer buffer(counter.bytes());
  ts::memory_builder carver(ts::saved_memory(buffer), "saved");
  const slices s = lay_out(carver, 3, 65, 1, 513);
  const std::vector<const std::byte*> begins{reinterpret_cast<std::byte*>(s.a), reinterpret_cast<std::byte*>(s.b),
                                             reinterpret_cast<std::byte*>(s.c), s.d};
  const std::vector<std::size_t> bytes{3 * 4, 65 * 4, 1 * 8, 513};
  for (std::size_t i = 0; i < begins.size(); ++i) {
    CHECK_EQ(reinterpret_cast<std::uintptr_t>(begins[i]) % ts::memory_alignment, 0u);
    CHECK_GE(begins[i], buffer.data());
    CHECK_LE(begins[i] + bytes[i], buffer.data() + buffer.size());
    if (i > 0) CHECK_GE(begins[i], begins[i - 1] + bytes[i - 1]);
  }
}

TEST_CASE("an empty slice is null and takes no byte of its own") {
  ts::host_buffer buffer(1024);
  ts::memory_builder carver(ts::workspace_memory(buffer), "workspace");
  carver.take<float>("first", 64);
  CHECK_EQ(carver.take<float>("empty", 0), nullptr);
  CHECK_EQ(carver.bytes(), 256u);
}

TEST_CASE("an overflow names the buffer, the slice and the bytes") {
  ts::host_buffer buffer(512);
  ts::memory_builder carver(ts::workspace_memory(buffer), "workspace");
  carver.take<float>("logits", 100);
  const std::string text = message_of([&] { carver.take<float>("rows", 1); });
  CAPTURE(text);
  CHECK(contains(text, "workspace is too small"));
  CHECK(contains(text, "'rows'"));
  CHECK(contains(text, "[512, 516)"));
  CHECK(contains(text, "512 bytes were given"));
}

TEST_CASE("a negative count, a misaligned buffer and a missing buffer are refused with their values") {
  ts::memory_builder counter;
  CHECK(contains(message_of([&] { counter.take<int>("rows", -3); }), "'rows'"));
  CHECK(contains(message_of([&] { counter.take<int>("rows", -3); }), "-3 elements"));

  ts::host_buffer buffer(1024);
  const ts::saved_memory shifted(buffer.data() + 8, 512);
  const std::string text = message_of([&] { ts::memory_builder carver(shifted, "saved memory"); });
  CHECK(contains(text, "saved memory starts at"));
  CHECK(contains(text, "not aligned to 256 bytes"));

  ts::memory_builder none(ts::saved_memory{}, "saved memory");
  CHECK_EQ(none.take<int>("nothing", 0), nullptr);
  CHECK(contains(message_of([&] { none.take<int>("rows", 1); }), "0 bytes were given"));
}

TEST_CASE("more bytes than can be addressed are refused while counting too") {
  ts::memory_builder counting;
  counting.take<char>("head", 3);
  CHECK(message_of([&] { counting.take<double>("rows", std::int64_t{1} << 61); }) ==
        "slice 'rows' of a buffer being counted would have 2305843009213693952 elements of 8 bytes behind byte 256: "
        "more than there are addresses");
  counting.take<char>("the longest", std::int64_t{1} << 62);
  counting.take<char>("the rest", (std::int64_t{1} << 62) - 1024);
  CHECK(counting.bytes() == (std::size_t{1} << 63) - 768);
  CHECK_THROWS_AS(counting.take<char>("more", 513), ts::invalid_argument);
}

TEST_CASE("memory of one lifetime does not pass for memory of another") {
  static_assert(!std::is_convertible_v<ts::saved_memory, ts::workspace_memory>);
  static_assert(!std::is_convertible_v<ts::deferred_memory, ts::saved_memory>);
  static_assert(std::is_trivially_copyable_v<ts::saved_memory>);
  static_assert(std::is_convertible_v<ts::host_buffer&, ts::saved_memory>);
  static_assert(std::is_convertible_v<std::vector<std::byte>&, ts::saved_memory>);
  static_assert(!std::is_constructible_v<ts::saved_memory, std::vector<float>&>);
  std::vector<std::byte> bytes(256);
  const ts::state_memory state = bytes;
  CHECK_EQ(state.data, bytes.data());
  CHECK_EQ(state.bytes, 256u);
}

TEST_CASE("a host buffer is aligned, zero, movable, and may be empty") {
  ts::host_buffer buffer(1000);
  CHECK_EQ(buffer.size(), 1000u);
  CHECK_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % ts::memory_alignment, 0u);
  bool all_zero = true;
  for (std::size_t i = 0; i < buffer.size(); ++i) all_zero = all_zero && buffer.data()[i] == std::byte{0};
  CHECK(all_zero);
  std::byte* const data = buffer.data();
  ts::host_buffer moved = std::move(buffer);
  CHECK_EQ(moved.data(), data);
  CHECK_EQ(buffer.data(), nullptr);  // NOLINT: what a move leaves behind
  moved = ts::host_buffer(10);
  CHECK_NE(moved.data(), data);
  CHECK_EQ(moved.size(), 10u);
  CHECK_EQ(ts::host_buffer(0).data(), nullptr);
  CHECK_EQ(ts::host_buffer().size(), 0u);
}
