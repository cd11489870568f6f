// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The three products with the gate against sums in double. Their fp32 factors are split into bf16 parts, so a wrong
// kernel can be nearly right. A part holds 8 bits, so leaving out the second costs 1.5e-3 of a result in the norm and
// leaving out the third 2.4e-6, or up to 2^-17 = 7.6e-6 where a weight is worst. Every bound is shown here to be below
// what the least part is worth: the sums without it are computed too, and have to miss the bound.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <tessera/core/chunks.hpp>
#include <tessera/moe/detail/device/gate_product.cuh>

#include "../support/cast.hpp"
#include "device_fixture.cuh"

namespace {

namespace ts = tessera;
using device_test::buffer;
using device_test::normal;
using device_test::relative_error;
using tessera_test::widened;
using ts::bfloat16;

constexpr double logit_bound = 2e-6, weight_gradient_bound = 1e-5;
// Input gradients are rounded to bf16, an error that a lost part hides behind. But the sums are exact to 1e-5, so
// nearly all are rounded to the neighbour that the exact sum is rounded to.
constexpr double least_equal = 0.98;

// `parts` bf16 numbers that add up to nearly `value`, added up.
double in_parts(float value, int parts) {
  float rest = value;
  double sum = 0;
  for (int p = 0; p < parts; ++p) {
    const auto part = static_cast<float>(bfloat16(rest));
    rest -= part;
    sum += static_cast<double>(part);
  }
  return sum;
}

std::vector<double> in_parts(const std::vector<float>& values, int parts) {
  std::vector<double> sums;
  for (const float v : values) sums.push_back(in_parts(v, parts));
  return sums;
}

struct gate_case {
  int num_experts;
  std::int64_t num_tokens, hidden;
};

// Tails in all extents: rows of a tile are 128, its columns 64 or 256, a step of a sum 64. 20 experts are no unit of
// the tensor cores: plain products.
constexpr gate_case cases[] = {{48, 300, 200}, {136, 130, 1048}, {48, 1, 568}, {136, 257, 328}, {20, 77, 200}};

struct problem {
  explicit problem(const gate_case& c)
      : E(c.num_experts),
        T(c.num_tokens),
        d(c.hidden),
        x(normal(static_cast<std::size_t>(T * d), 1)),
        gate(normal(static_cast<std::size_t>(E * d), 2, 1 / std::sqrt(static_cast<double>(d)))),
        bias(normal(static_cast<std::size_t>(E), 3)),
        dlogits(normal(static_cast<std::size_t>(T * E), 4, 1e-3)) {
    for (float& value : x) value = static_cast<float>(bfloat16(value));
  }

  // Each weight a power of two plus 2^-9 and three quarters to all of 2^-17 of it: the parts are these three summands,
  // and the third is as large as it can be.
  void make_third_part_large() {
    std::mt19937 random(5);
    std::uniform_real_distribution<double> share(0.75, 1.0);
    for (float& w : gate) {
      const double magnitude = std::ldexp(1 + 0x1p-9 + 0x1p-17 * share(random), -static_cast<int>(random() % 3));
      w = static_cast<float>(random() % 2 == 0 ? magnitude : -magnitude);
    }
  }

  std::vector<double> logits_with(const std::vector<double>& weights, bool with_bias) const {
    std::vector<double> sums;
    for (std::int64_t t = 0; t < T; ++t) {
      for (std::int64_t e = 0; e < E; ++e) {
        double sum = with_bias ? static_cast<double>(bias[e]) : 0;
        for (std::int64_t j = 0; j < d; ++j) sum += static_cast<double>(x[t * d + j]) * weights[e * d + j];
        sums.push_back(sum);
      }
    }
    return sums;
  }
  std::vector<double> dx_with(const std::vector<double>& gradients, const std::vector<double>& weights) const {
    std::vector<double> sums(static_cast<std::size_t>(T * d), 0.0);
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t e = 0; e < E; ++e)
        for (std::int64_t j = 0; j < d; ++j) sums[t * d + j] += gradients[t * E + e] * weights[e * d + j];
    return sums;
  }
  // One matrix for each chunk.
  std::vector<double> weight_gradients_with(const std::vector<double>& gradients, std::int64_t chunk_tokens) const {
    std::vector<double> sums(static_cast<std::size_t>(ts::num_chunks(T, chunk_tokens) * E * d), 0.0);
    for (std::int64_t t = 0; t < T; ++t) {
      const std::int64_t chunk = chunk_tokens == 0 ? 0 : t / chunk_tokens;
      for (std::int64_t e = 0; e < E; ++e)
        for (std::int64_t j = 0; j < d; ++j)
          sums[(chunk * E + e) * d + j] += gradients[t * E + e] * static_cast<double>(x[t * d + j]);
    }
    return sums;
  }

  std::int64_t E, T, d;
  std::vector<float> x, gate, bias, dlogits;
};

// Rows of `cols` elements, each followed by `padding` NaNs.
template <class To>
std::vector<To> padded(const std::vector<float>& packed, std::int64_t cols, std::int64_t padding) {
  std::vector<To> rows;
  for (std::size_t i = 0; i < packed.size(); ++i) {
    rows.push_back(static_cast<To>(packed[i]));
    if ((static_cast<std::int64_t>(i) + 1) % cols == 0) rows.insert(rows.end(), padding, static_cast<To>(NAN));
  }
  return rows;
}

// The problem in device memory. Rows of x and of the gate are further apart than they are long, and results have rows
// that must not be written.
struct device_case {
  static constexpr std::int64_t x_padding = 8, gate_padding = 4, rows_behind = 3;

  explicit device_case(const problem& p)
      : E(p.E),
        T(p.T),
        d(p.d),
        x_data(padded<bfloat16>(p.x, d, x_padding)),
        gate_data(padded<float>(p.gate, d, gate_padding)),
        bias(p.bias),
        dlogit_data(p.dlogits),
        logits(static_cast<std::size_t>((T + rows_behind) * E)),
        parts(static_cast<std::size_t>(3 * E * d)),
        dlogit_parts(static_cast<std::size_t>(3 * T * E)),
        one_group(2) {}

  ts::matrix_view<const bfloat16> x() const { return {x_data.data(), T, d, d + x_padding}; }
  ts::matrix_view<const float> gate() const { return {gate_data.data(), E, d, d + gate_padding}; }
  ts::matrix_view<const float> dlogits() const { return {dlogit_data.data(), T, E}; }

  std::vector<float> forward(bool with_bias) {
    ts::detail::gate_forward(cudaStreamLegacy, x(), gate(), with_bias ? bias.data() : nullptr, {logits.data(), T, E},
                             parts.data(), one_group.data());
    return first_rows(logits, E);
  }

  // Over `old` where it is not empty.
  std::vector<float> backward_input(const std::vector<bfloat16>& old) {
    std::vector<bfloat16> rows = old;
    rows.resize(static_cast<std::size_t>((T + rows_behind) * d), bfloat16(NAN));
    buffer<bfloat16> dx(rows);
    ts::detail::gate_backward_input(cudaStreamLegacy, x(), dlogits(), gate(), {dx.data(), T, d},
                                    old.empty() ? ts::write::overwrite : ts::write::accumulate, parts.data(),
                                    dlogit_parts.data(), one_group.data());
    return first_rows(dx, d);
  }

  // After `backward_input`, which writes the parts; over `old` where it is not empty.
  std::vector<float> backward_weights(std::int64_t chunk_tokens, const std::vector<float>& old) {
    const std::int64_t chunks = ts::num_chunks(T, chunk_tokens);
    const auto splits = ts::detail::gate_splits::make(T, chunk_tokens, static_cast<int>(E), d);
    buffer<std::int32_t> offsets(static_cast<std::size_t>(chunks * splits.per_chunk + 1));
    buffer<float> partial(static_cast<std::size_t>(chunks * splits.per_chunk * 2 * E * d));
    buffer<float> gradient(static_cast<std::size_t>(chunks * E * d));
    if (!old.empty()) gradient.set(old);
    ts::detail::gate_backward_weights(cudaStreamLegacy, x(), dlogits(), dlogit_parts.data(), gradient.data(),
                                      old.empty() ? ts::write::overwrite : ts::write::accumulate, chunks, chunk_tokens,
                                      splits, offsets.data(), partial.data());
    device_test::synchronize();
    return gradient.get();
  }

  std::int64_t E, T, d;
  buffer<bfloat16> x_data;
  buffer<float> gate_data, bias, dlogit_data, logits;
  buffer<bfloat16> parts, dlogit_parts;
  buffer<std::int32_t> one_group;

 private:
  // The T rows of a result; those behind them are as they were.
  template <class S>
  std::vector<float> first_rows(const buffer<S>& result, std::int64_t cols) const {
    device_test::synchronize();
    std::vector<float> values;
    for (const S v : result.get()) values.push_back(static_cast<float>(v));
    bool untouched = true;
    for (std::size_t i = static_cast<std::size_t>(T * cols); i < values.size(); ++i)
      untouched = untouched && std::isnan(values[i]);
    CHECK(untouched);
    values.resize(static_cast<std::size_t>(T * cols));
    return values;
  }
};

std::string name_of(const gate_case& c) {
  return "E " + std::to_string(c.num_experts) + ", T " + std::to_string(c.num_tokens) + ", d " +
         std::to_string(c.hidden);
}

// Share of elements that are what `exact` is rounded to.
double share_equal(const std::vector<float>& got, const std::vector<double>& exact) {
  REQUIRE(got.size() == exact.size());
  std::size_t equal = 0;
  for (std::size_t i = 0; i < got.size(); ++i)
    if (got[i] == static_cast<float>(bfloat16(static_cast<float>(exact[i])))) ++equal;
  return static_cast<double>(equal) / static_cast<double>(got.size());
}

std::vector<float> rounded(const std::vector<double>& values) {
  std::vector<float> result;
  for (const double v : values) result.push_back(static_cast<float>(bfloat16(static_cast<float>(v))));
  return result;
}

}  // namespace

TEST_CASE("the gate's products are on tensor cores where there are some for them") {
  for (const gate_case& c : cases) {
    CAPTURE(name_of(c));
    const device_case on_device{problem(c)};
    CHECK(ts::detail::gate_on_tensor_cores(c.num_experts, on_device.x()) ==
          (ts::detail::has_hopper() && c.num_experts % 8 == 0));
  }
}

TEST_CASE("logits are as exact as sums in fp32") {
  for (const gate_case& c : cases) {
    CAPTURE(name_of(c));
    const problem p(c);
    device_case on_device(p);
    for (const bool with_bias : {false, true}) {
      const double error = relative_error(on_device.forward(with_bias), p.logits_with(widened(p.gate), with_bias));
      MESSAGE(name_of(c), ": logits differ by ", error);
      CHECK(error <= logit_bound);
    }
  }
}

TEST_CASE("logits use all three parts of the gate's weights") {
  for (const gate_case& c : cases) {
    CAPTURE(name_of(c));
    problem p(c);
    p.make_third_part_large();
    const auto exact = p.logits_with(widened(p.gate), false);
    CHECK(relative_error(p.logits_with(in_parts(p.gate, 3), false), exact) == 0);
    CHECK(relative_error(p.logits_with(in_parts(p.gate, 2), false), exact) > 3 * logit_bound);
    CHECK(relative_error(device_case(p).forward(false), exact) <= logit_bound);
  }
}

TEST_CASE("the gate's weight gradients use both parts of the logits' gradients, in each chunk") {
  for (const gate_case& c : cases) {
    const problem p(c);
    device_case on_device(p);
    on_device.backward_input({});
    for (const std::int64_t chunk_tokens : {std::int64_t{0}, std::int64_t{96}}) {
      CAPTURE(name_of(c));
      CAPTURE(chunk_tokens);
      auto exact = p.weight_gradients_with(widened(p.dlogits), chunk_tokens);
      const auto without = p.weight_gradients_with(in_parts(p.dlogits, 1), chunk_tokens);
      CHECK(relative_error(without, exact) > 30 * weight_gradient_bound);
      const double error = relative_error(on_device.backward_weights(chunk_tokens, {}), exact);
      MESSAGE(name_of(c), ": weight gradients differ by ", error);
      CHECK(error <= weight_gradient_bound);

      const auto old = normal(exact.size(), 6, 1e-3);
      for (std::size_t i = 0; i < exact.size(); ++i) exact[i] += static_cast<double>(old[i]);
      CHECK(relative_error(on_device.backward_weights(chunk_tokens, old), exact) <= weight_gradient_bound);
    }
  }
}

TEST_CASE("the input's gradients use two parts of both factors, and are rounded once") {
  for (const gate_case& c : cases) {
    CAPTURE(name_of(c));
    const problem p(c);
    device_case on_device(p);
    auto exact = p.dx_with(widened(p.dlogits), widened(p.gate));
    const auto part_of_gate = rounded(p.dx_with(widened(p.dlogits), in_parts(p.gate, 1)));
    const auto part_of_gradients = rounded(p.dx_with(in_parts(p.dlogits, 1), widened(p.gate)));
    CHECK(share_equal(part_of_gate, exact) < 0.9);
    CHECK(share_equal(part_of_gradients, exact) < 0.9);
    const auto got = on_device.backward_input({});
    MESSAGE(name_of(c), ": share of input gradients rounded alike ", share_equal(got, exact));
    CHECK(share_equal(got, exact) >= least_equal);
    CHECK(relative_error(got, exact) <= 0x1p-8);

    std::vector<bfloat16> old;
    for (const float v : normal(exact.size(), 7, 1e-3)) old.push_back(bfloat16(v));
    for (std::size_t i = 0; i < exact.size(); ++i) exact[i] += static_cast<double>(static_cast<float>(old[i]));
    CHECK(share_equal(on_device.backward_input(old), exact) >= least_equal);
  }
}

// Tensor cores cut sums off instead of rounding them, by at most 2^-23 of the sum in each step of 16.
TEST_CASE("the error of logits grows with the length of their sums alone") {
  const problem p({136, 130, 4104});
  const double error = relative_error(device_case(p).forward(false), p.logits_with(widened(p.gate), false));
  MESSAGE("d 4104: logits differ by ", error);
  CHECK(error <= 4104 / 16 * 0x1p-23);
}
