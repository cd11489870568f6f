// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the backends of grouped products on a GPU have to do, against the host's, summed in double over the same bf16
// inputs. Outputs are poisoned with NaN first, and so are all rows that no group owns.
//
// A backend is a struct of static functions that forward to its namespace (`variable_m`, `variable_m_activation`,
// `variable_m_activation_backward`, `variable_k`), the types `device` and `launch_options`, and its kernels:
// `variants(all)`, `options(variant)`, `describe(variant)`. Define DOCTEST_CONFIG_IMPLEMENT before including this.

#include <doctest/doctest.h>
#undef DOCTEST_CONFIG_IMPLEMENT  // the main function is that of the backend's test

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <vector>

#include <cuda_runtime.h>

#include <tessera/experts/activation.hpp>
#include <tessera/gemm/gemm.hpp>
#include <tessera/gemm/hopper.cuh>

#include "../support/bits.hpp"
#include "../support/messages.hpp"
#include "device_fixture.cuh"

namespace grouped_test {

namespace ts = tessera;
namespace hp = ts::gemm::hopper;
using device_test::require;
using hp::contiguous;
using hp::gathered;
using hp::row_groups;
using tessera_test::same_bits;
using ts::bfloat16;
using bf16_matrix = ts::matrix_view<bfloat16>;

// Device memory with the host's copy of it.
template <class T>
struct buffer {
  std::vector<T> host;
  T* device = nullptr;

  explicit buffer(std::vector<T> values) : host(std::move(values)) {
    require(cudaMalloc(&device, host.size() * sizeof(T) + 16), "cudaMalloc");
    upload();
  }
  ~buffer() { cudaFree(device); }
  buffer(const buffer&) = delete;
  buffer& operator=(const buffer&) = delete;

  void upload() { require(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload"); }
  std::vector<T> download() const {
    std::vector<T> values(host.size());
    require(cudaDeviceSynchronize(), "the kernel");
    require(cudaMemcpy(values.data(), device, values.size() * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return values;
  }
};

using random_engine = std::mt19937_64;

template <class T>
std::vector<T> normal(random_engine& random, std::int64_t count, float deviation = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, deviation);
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = T(distribution(random));
  return values;
}

template <class T>
std::vector<T> poison(std::int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  std::memset(values.data(), 0xff, values.size() * sizeof(T));
  return values;
}

// ||x - y|| / ||y||; NaN if x has one.
template <class T>
double relative_error(std::span<const T> x, std::span<const double> y) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double d = static_cast<double>(static_cast<float>(x[i])) - y[i];
    difference += d * d;
    norm += y[i] * y[i];
  }
  return norm == 0 ? (difference == 0 ? 0 : 1) : std::sqrt(difference / norm);
}

// Rounding the result is an error of 2^-9 at most, 0.0017 in the norm; sums in float add far less.
inline constexpr double tolerance = 3e-3;

// The rows that groups own lie in [offsets.front(), offsets.back()); memory is for max_rows.
struct rows_case {
  std::vector<std::int32_t> offsets;
  std::int64_t max_rows;
  std::int64_t num_tokens;

  std::int64_t groups() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
  std::int64_t first() const { return offsets.front(); }
  std::int64_t last() const { return offsets.back(); }
};

inline rows_case of_counts(const std::vector<int>& counts, int first = 0, int spare = 37) {
  rows_case rows{{first}, 0, 0};
  for (const int count : counts) rows.offsets.push_back(rows.offsets.back() + count);
  rows.max_rows = rows.offsets.back() + spare;
  rows.num_tokens = 1 + rows.offsets.back() / 2;
  return rows;
}

// Tails, whole and half tiles, empty groups at the ends and in between, one group with all rows, one row.
inline std::vector<rows_case> all_rows() {
  return {of_counts({0, 130, 64, 0, 1, 257, 63, 0}, 5), of_counts({300}), of_counts({0, 0, 1}),
          of_counts(std::vector<int>(70, 3))};
}

// Rows of an operand: values for tokens through a gather list, or one packed row each; NaN where no group owns a row.
struct operand_rows {
  std::int64_t stride;
  buffer<bfloat16> values;
  buffer<std::int32_t> list;
  bool through_list;

  operand_rows(random_engine& random, const rows_case& rows, std::int64_t columns, bool gather)
      : stride(columns + 8),
        values(make(random, rows, columns, stride, gather)),
        list(make_list(random, rows)),
        through_list(gather) {}

  static std::vector<bfloat16> make(random_engine& random, const rows_case& rows, std::int64_t columns,
                                    std::int64_t stride, bool gather) {
    const std::int64_t count = gather ? rows.num_tokens : rows.max_rows;
    std::vector<bfloat16> v = poison<bfloat16>(count * stride);
    std::normal_distribution<float> distribution;
    for (std::int64_t i = gather ? 0 : rows.first(); i < (gather ? count : rows.last()); ++i)
      for (std::int64_t j = 0; j < columns; ++j)
        v[static_cast<std::size_t>(i * stride + j)] = bfloat16(distribution(random));
    return v;
  }
  static std::vector<std::int32_t> make_list(random_engine& random, const rows_case& rows) {
    std::vector<std::int32_t> v(static_cast<std::size_t>(rows.max_rows), 1 << 30);  // out of range where nobody looks
    for (std::int64_t i = rows.first(); i < rows.last(); ++i)
      v[static_cast<std::size_t>(i)] =
          static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(rows.num_tokens));
    return v;
  }

  ts::gemm::row_operand<bfloat16> on_device() const {
    return {values.device, stride, through_list ? list.device : nullptr};
  }
  ts::gemm::row_operand<bfloat16> on_host() const {
    return {values.host.data(), stride, through_list ? list.host.data() : nullptr};
  }
};

// [G] matrices, logically [N, K].
struct matrices {
  ts::gemm::group_operand<const bfloat16> shape;
  buffer<bfloat16> values;

  matrices(random_engine& random, std::int64_t groups, std::int64_t N, std::int64_t K, contiguous order)
      : shape(order == contiguous::k ? ts::gemm::group_operand<const bfloat16>{nullptr, N * K + 8, K, 1}
                                     : ts::gemm::group_operand<const bfloat16>{nullptr, N * K + 8, 1, N}),
        values(normal<bfloat16>(random, groups * shape.group_stride, 1.0f / std::sqrt(static_cast<float>(K)))) {}

  ts::gemm::group_operand<const bfloat16> on_device() const { return at(values.device); }
  ts::gemm::group_operand<const bfloat16> on_host() const { return at(values.host.data()); }
  ts::gemm::group_operand<const bfloat16> at(const bfloat16* data) const {
    return {data, shape.group_stride, shape.row_stride, shape.col_stride};
  }
};

inline std::vector<double> host_variable_m(const rows_case& rows, std::int64_t N, std::int64_t K, const operand_rows& a,
                                           const matrices& b, const bfloat16* bias) {
  std::vector<double> c(static_cast<std::size_t>(rows.max_rows * N));
  const ts::matrix_view<double> view(c.data(), rows.max_rows, N);
  ts::gemm::reference::variable_m<double>(rows.offsets, N, K, a.on_host(), b.on_host(), bias, view);
  return c;
}

// Owned rows near `expected`, all others as they were.
template <class T>
void check_rows(const rows_case& rows, std::int64_t columns, const std::vector<T>& found,
                const std::vector<double>& expected, const char* what, double bound = tolerance) {
  INFO(what);
  const auto begin = static_cast<std::size_t>(rows.first() * columns),
             end = static_cast<std::size_t>(rows.last() * columns);
  CHECK(relative_error<T>({found.data() + begin, end - begin}, {expected.data() + begin, end - begin}) < bound);
  const std::vector<T> untouched = poison<T>(static_cast<std::int64_t>(found.size()));
  CHECK(std::memcmp(found.data(), untouched.data(), begin * sizeof(T)) == 0);
  CHECK(std::memcmp(found.data() + end, untouched.data() + end, (found.size() - end) * sizeof(T)) == 0);
}

template <class Backend, contiguous Order, gathered Rows, class TC>
void check_variable_m(std::int64_t N, std::int64_t K, bool with_bias, ts::write mode) {
  random_engine random(static_cast<std::uint64_t>(N * 1000 + K));
  const typename Backend::device d = Backend::device::current();
  for (const rows_case& rows : all_rows()) {
    const operand_rows a(random, rows, K, Rows == gathered::a);
    const matrices b(random, rows.groups(), N, K, Order);
    const buffer<bfloat16> bias(normal<bfloat16>(random, rows.groups() * N));
    const buffer<std::int32_t> offsets(rows.offsets);
    const bfloat16* host_bias = with_bias ? bias.host.data() : nullptr;
    std::vector<double> expected = host_variable_m(rows, N, K, a, b, host_bias);
    std::vector<TC> old = poison<TC>(rows.max_rows * N);
    if (mode == ts::write::accumulate) {
      const std::vector<TC> values = normal<TC>(random, rows.max_rows * N);
      for (std::int64_t i = rows.first() * N; i < rows.last() * N; ++i) {
        const auto at = static_cast<std::size_t>(i);
        old[at] = values[at];
        expected[at] += static_cast<double>(static_cast<float>(old[at]));
      }
    }
    std::vector<TC> first;
    for (const auto& variant : Backend::variants(mode == ts::write::overwrite || sizeof(TC) == 4)) {
      INFO("N ", N, " K ", K, " groups ", rows.groups(), " ", Backend::describe(variant));
      buffer<TC> c(old);
      const auto options = Backend::options(variant);
      Backend::template variable_m<Order, Rows>(cudaStreamPerThread, d,
                                                row_groups{offsets.device, rows.groups(), rows.max_rows}, N, K,
                                                a.on_device(), b.on_device(), with_bias ? bias.device : nullptr,
                                                ts::matrix_view<TC>(c.device, rows.max_rows, N), mode, options);
      const std::vector<TC> found = c.download();
      check_rows(rows, N, found, expected, "c", sizeof(TC) == 4 ? 1e-5 : tolerance);
      if (first.empty()) first = found;
      CHECK(same_bits(found, first));
    }
  }
}

template <class Activation, bool Interleaved>
struct columns_of {
  static std::int64_t gate(std::int64_t i, std::int64_t) { return Activation::gated && Interleaved ? 2 * i : i; }
  static std::int64_t up(std::int64_t i, std::int64_t n) { return Interleaved ? 2 * i + 1 : n + i; }
};

template <class Backend, contiguous Order, gathered Rows, class Activation, bool Interleaved>
void check_activation(std::int64_t n, std::int64_t K, bool with_bias) {
  using columns = columns_of<Activation, Interleaved>;
  random_engine random(static_cast<std::uint64_t>(n * 1000 + K));
  const typename Backend::device d = Backend::device::current();
  const typename Activation::options settings{};
  const std::int64_t U = Activation::gated ? 2 * n : n;
  for (const rows_case& rows : all_rows()) {
    const operand_rows a(random, rows, K, Rows == gathered::a);
    const matrices b(random, rows.groups(), U, K, Order);
    const buffer<bfloat16> bias(normal<bfloat16>(random, rows.groups() * U));
    const buffer<std::int32_t> offsets(rows.offsets);
    const std::vector<double> expected_h = host_variable_m(rows, U, K, a, b, with_bias ? bias.host.data() : nullptr);
    std::vector<bfloat16> first;
    for (const auto& variant : Backend::variants(true)) {
      INFO("n ", n, " K ", K, " groups ", rows.groups(), " ", Backend::describe(variant));
      buffer<bfloat16> h(poison<bfloat16>(rows.max_rows * U)), out(poison<bfloat16>(rows.max_rows * n));
      const auto options = Backend::options(variant);
      Backend::template variable_m_activation<Order, Rows, Activation, Interleaved>(
          cudaStreamPerThread, d, row_groups{offsets.device, rows.groups(), rows.max_rows}, n, K, a.on_device(),
          b.on_device(), with_bias ? bias.device : nullptr, bf16_matrix(h.device, rows.max_rows, U),
          bf16_matrix(out.device, rows.max_rows, n), settings, options);
      const std::vector<bfloat16> found_h = h.download(), found = out.download();
      check_rows(rows, U, found_h, expected_h, "h");
      std::vector<double> expected(static_cast<std::size_t>(rows.max_rows * n));  // of the rounded h, as it is saved
      for (std::int64_t i = rows.first(); i < rows.last(); ++i)
        for (std::int64_t j = 0; j < n; ++j) {
          const auto value = [&](std::int64_t column) {
            return static_cast<double>(static_cast<float>(found_h[static_cast<std::size_t>(i * U + column)]));
          };
          double& result = expected[static_cast<std::size_t>(i * n + j)];
          if constexpr (Activation::gated)
            result = Activation::forward(value(columns::gate(j, n)), value(columns::up(j, n)), settings);
          else
            result = Activation::forward(value(j), settings);
        }
      check_rows(rows, n, found, expected, "the activation");
      if (first.empty()) first = found;
      CHECK(same_bits(found, first));
    }
  }
}

template <class Backend, contiguous Order, gathered Rows, class Activation, bool Interleaved>
void check_activation_backward(std::int64_t n, std::int64_t K, bool with_weights) {
  using columns = columns_of<Activation, Interleaved>;
  random_engine random(static_cast<std::uint64_t>(n * 1000 + K));
  const typename Backend::device d = Backend::device::current();
  const typename Activation::options settings{};
  const std::int64_t U = Activation::gated ? 2 * n : n;
  for (const rows_case& rows : all_rows()) {
    const operand_rows a(random, rows, K, Rows == gathered::a);
    const matrices b(random, rows.groups(), n, K, Order);
    const buffer<std::int32_t> offsets(rows.offsets);
    const buffer<float> weights(normal<float>(random, rows.max_rows));
    const operand_rows h_rows(random, rows, U, false);
    std::vector<bfloat16> h_values = poison<bfloat16>(rows.max_rows * U);
    for (std::int64_t i = rows.first(); i < rows.last(); ++i)
      std::memcpy(&h_values[static_cast<std::size_t>(i * U)], h_rows.on_host().row(i),
                  static_cast<std::size_t>(U) * sizeof(bfloat16));
    const std::vector<double> da = host_variable_m(rows, n, K, a, b, nullptr);
    std::vector<double> dh(h_values.size()), out_expected(static_cast<std::size_t>(rows.max_rows * n)),
        dw(static_cast<std::size_t>(rows.max_rows));
    for (std::int64_t i = rows.first(); i < rows.last(); ++i) {
      const double w = with_weights ? static_cast<double>(weights.host[static_cast<std::size_t>(i)]) : 1.0;
      for (std::int64_t j = 0; j < n; ++j) {
        const auto at = [&](std::int64_t column) { return static_cast<std::size_t>(i * U + column); };
        const auto value = [&](std::int64_t column) {
          return static_cast<double>(static_cast<float>(h_values[at(column)]));
        };
        const double g = da[static_cast<std::size_t>(i * n + j)];
        double activation;
        if constexpr (Activation::gated) {
          const double gate = value(columns::gate(j, n)), up = value(columns::up(j, n));
          activation = Activation::forward(gate, up, settings);
          Activation::backward(gate, up, w * g, dh[at(columns::gate(j, n))], dh[at(columns::up(j, n))], settings);
        } else {
          activation = Activation::forward(value(j), settings);
          dh[at(j)] = Activation::backward(value(j), w * g, settings);
        }
        out_expected[static_cast<std::size_t>(i * n + j)] = w * activation;
        dw[static_cast<std::size_t>(i)] += g * activation;
      }
    }
    const std::int64_t num_parts = hp::num_weight_parts(n);
    const row_groups groups{offsets.device, rows.groups(), rows.max_rows};
    std::vector<float> first;
    for (const auto& variant : Backend::variants(false)) {
      INFO("n ", n, " K ", K, " groups ", rows.groups(), " ", Backend::describe(variant));
      buffer<bfloat16> h(h_values), out(poison<bfloat16>(rows.max_rows * n));
      buffer<float> parts(poison<float>(num_parts * rows.max_rows)), dweights(poison<float>(rows.max_rows));
      const auto options = Backend::options(variant);
      Backend::template variable_m_activation_backward<Order, Rows, Activation, Interleaved>(
          cudaStreamPerThread, d, groups, n, K, a.on_device(), b.on_device(), with_weights ? weights.device : nullptr,
          bf16_matrix(h.device, rows.max_rows, U), bf16_matrix(out.device, rows.max_rows, n), parts.device, settings,
          options);
      hp::sum_weight_parts(cudaStreamPerThread, groups, num_parts, parts.device, dweights.device);
      check_rows(rows, U, h.download(), dh, "dh");
      check_rows(rows, n, out.download(), out_expected, "the weighted activation");
      const std::vector<float> found = dweights.download();
      check_rows(rows, 1, found, dw, "the weights' gradients", 1e-5);
      if (first.empty()) first = found;
      CHECK(same_bits(found, first));
    }
  }
}

template <class Backend, gathered Rows, class TC>
void check_variable_k(std::int64_t M, std::int64_t N, ts::write mode) {
  random_engine random(static_cast<std::uint64_t>(M * 1000 + N));
  const typename Backend::device d = Backend::device::current();
  std::vector<rows_case> cases = all_rows();
  cases.push_back(of_counts({0, 0}, 0, 0));
  for (const rows_case& rows : cases) {
    const operand_rows a(random, rows, M, Rows == gathered::a), b(random, rows, N, Rows == gathered::b);
    const buffer<std::int32_t> offsets(rows.offsets);
    const std::int64_t G = rows.groups();
    std::vector<TC> old = mode == ts::write::accumulate ? normal<TC>(random, G * M * N) : poison<TC>(G * M * N);
    std::vector<double> expected(old.size());
    if (mode == ts::write::accumulate)
      for (std::size_t i = 0; i < old.size(); ++i) expected[i] = static_cast<double>(static_cast<float>(old[i]));
    ts::gemm::reference::variable_k<double>(rows.offsets, M, N, a.on_host(), b.on_host(),
                                            ts::gemm::group_operand<double>{expected.data(), M * N, N, 1}, mode);
    std::vector<TC> first;
    for (const auto& variant : Backend::variants(mode == ts::write::overwrite || sizeof(TC) == 4)) {
      INFO("M ", M, " N ", N, " groups ", G, " ", Backend::describe(variant));
      buffer<TC> c(old);
      const auto options = Backend::options(variant);
      Backend::template variable_k<Rows>(cudaStreamPerThread, d, row_groups{offsets.device, G, rows.max_rows}, M, N,
                                         a.on_device(), b.on_device(),
                                         ts::gemm::group_operand<TC>{c.device, M * N, N, 1}, mode, options);
      const std::vector<TC> found = c.download();
      CHECK(relative_error<TC>(found, expected) < (sizeof(TC) == 4 ? 1e-5 : tolerance));
      if (first.empty()) first = found;
      CHECK(same_bits(found, first));
    }
  }
}

// variable_m multiplies every group's rows, whatever the kernel.
template <class Backend>
void check_multiplies() {
  check_variable_m<Backend, contiguous::k, gathered::none, bfloat16>(264, 136, false, ts::write::overwrite);
  check_variable_m<Backend, contiguous::k, gathered::none, bfloat16>(512, 512, true, ts::write::accumulate);
  check_variable_m<Backend, contiguous::mn, gathered::none, bfloat16>(264, 136, true, ts::write::overwrite);
  check_variable_m<Backend, contiguous::mn, gathered::none, bfloat16>(264, 136, true, ts::write::accumulate);
  check_variable_m<Backend, contiguous::k, gathered::none, float>(200, 72, true, ts::write::accumulate);
}

// variable_m gathers rows.
template <class Backend>
void check_gathers() {
  check_variable_m<Backend, contiguous::k, gathered::a, bfloat16>(264, 328, false, ts::write::overwrite);
  check_variable_m<Backend, contiguous::mn, gathered::a, bfloat16>(64, 64, true, ts::write::overwrite);
}

// The up-projection saves H and applies the activation.
template <class Backend>
void check_up_projection() {
  check_activation<Backend, contiguous::k, gathered::a, ts::activation::swiglu, false>(200, 136, false);
  check_activation<Backend, contiguous::mn, gathered::none, ts::activation::swiglu, false>(256, 64, true);
  check_activation<Backend, contiguous::k, gathered::none, ts::activation::swiglu, true>(200, 136, true);
  check_activation<Backend, contiguous::mn, gathered::a, ts::activation::clamped_swiglu, true>(72, 72, true);
  check_activation<Backend, contiguous::k, gathered::none, ts::activation::relu2, false>(264, 136, true);
}

// The activation's gradient takes the place of H.
template <class Backend>
void check_gradient_in_place() {
  check_activation_backward<Backend, contiguous::mn, gathered::a, ts::activation::swiglu, false>(200, 136, true);
  check_activation_backward<Backend, contiguous::k, gathered::none, ts::activation::swiglu, true>(264, 72, false);
  check_activation_backward<Backend, contiguous::mn, gathered::none, ts::activation::relu2, false>(136, 64, true);
  // sums of one to six stages of 64, with one to four times 64 columns in the last tile
  check_activation_backward<Backend, contiguous::mn, gathered::a, ts::activation::swiglu, false>(64, 328, true);
  check_activation_backward<Backend, contiguous::mn, gathered::a, ts::activation::swiglu, false>(320, 8, true);
  check_activation_backward<Backend, contiguous::k, gathered::none, ts::activation::swiglu, true>(128, 256, true);
  check_activation_backward<Backend, contiguous::mn, gathered::none, ts::activation::relu2, false>(520, 24, false);
}

// variable_k sums over every group's rows, and empty groups get zeros.
template <class Backend>
void check_weight_gradients() {
  check_variable_k<Backend, gathered::none, bfloat16>(136, 264, ts::write::overwrite);
  check_variable_k<Backend, gathered::a, bfloat16>(264, 136, ts::write::overwrite);
  check_variable_k<Backend, gathered::a, bfloat16>(136, 264, ts::write::accumulate);
  check_variable_k<Backend, gathered::b, bfloat16>(200, 328, ts::write::accumulate);
  check_variable_k<Backend, gathered::b, bfloat16>(328, 520, ts::write::overwrite);
  check_variable_k<Backend, gathered::b, float>(296, 104, ts::write::accumulate);
  check_variable_k<Backend, gathered::b, float>(40, 72, ts::write::overwrite);
  check_variable_k<Backend, gathered::b, float>(328, 520, ts::write::accumulate);
  check_variable_k<Backend, gathered::a, float>(72, 264, ts::write::overwrite);
  check_variable_k<Backend, gathered::a, float>(256, 512, ts::write::accumulate);
}

// A row's bits depend neither on its neighbours nor on the order of tiles.
template <class Backend>
void check_independence() {
  constexpr std::int64_t N = 264, K = 456;
  random_engine random(7);
  const typename Backend::device d = Backend::device::current();
  const rows_case rows = of_counts({77, 300, 5});
  const operand_rows a(random, rows, K, false);
  const matrices b(random, 3, N, K, contiguous::k);
  const buffer<std::int32_t> all(rows.offsets), one({200, 200, 201, 201}), counter({0, 0});
  buffer<bfloat16> together(poison<bfloat16>(rows.max_rows * N)), alone(poison<bfloat16>(rows.max_rows * N));
  buffer<bfloat16> asked(poison<bfloat16>(rows.max_rows * N));
  using launch_options = typename Backend::launch_options;
  const auto run = [&](const buffer<std::int32_t>& offsets, buffer<bfloat16>& c, const launch_options& options) {
    Backend::template variable_m<contiguous::k, gathered::none>(
        cudaStreamPerThread, d, row_groups{offsets.device, 3, rows.max_rows}, N, K, a.on_device(), b.on_device(),
        nullptr, bf16_matrix(c.device, rows.max_rows, N), ts::write::overwrite, options);
  };
  run(all, together, {});
  run(one, alone, {});
  const auto x = together.download(), y = alone.download();
  CHECK(std::memcmp(&x[200 * N], &y[200 * N], N * sizeof(bfloat16)) == 0);
  launch_options dynamic;
  dynamic.sm_budget = 3;
  if constexpr (requires { dynamic.tile_counter; }) dynamic.tile_counter = counter.device;
  for (int repeat = 0; repeat < 3; ++repeat) {
    asked.upload();
    run(all, asked, dynamic);
    CHECK(same_bits(asked.download(), x));
    CHECK(counter.download() == counter.host);
  }
}

// A captured product is right when the rows have changed.
template <class Backend>
void check_capture() {
  constexpr std::int64_t N = 256, K = 128;
  random_engine random(11);
  const typename Backend::device d = Backend::device::current();
  rows_case rows = of_counts({100, 0, 200});
  const operand_rows a(random, rows, K, true);
  const matrices b(random, 3, N, K, contiguous::mn);
  buffer<std::int32_t> offsets(rows.offsets);
  buffer<bfloat16> c(poison<bfloat16>(rows.max_rows * N));
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  require(cudaStreamCreate(&stream), "cudaStreamCreate");
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  Backend::template variable_m<contiguous::mn, gathered::a>(stream, d, row_groups{offsets.device, 3, rows.max_rows}, N,
                                                            K, a.on_device(), b.on_device(), nullptr,
                                                            bf16_matrix(c.device, rows.max_rows, N));
  require(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  require(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  for (const std::vector<std::int32_t>& counts :
       {std::vector<std::int32_t>{0, 100, 100, 300}, {0, 0, 290, 300}, {0, 0, 0, 0}}) {
    rows.offsets = offsets.host = counts;
    offsets.upload();
    c.upload();
    require(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    require(cudaStreamSynchronize(stream), "the graph");
    check_rows(rows, N, c.download(), host_variable_m(rows, N, K, a, b, nullptr), "c");
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// What the kernels cannot do is refused with a sentence.
template <class Backend>
void check_refusals() {
  const typename Backend::device d = Backend::device::current();
  const buffer<std::int32_t> offsets({0, 8});
  const buffer<bfloat16> memory(std::vector<bfloat16>(64 * 64));
  const ts::gemm::row_operand<bfloat16> a{memory.device, 64, nullptr};
  const auto run = [&](std::int64_t N, std::int64_t K, const ts::gemm::row_operand<bfloat16>& rows,
                       const ts::gemm::group_operand<const bfloat16>& b) {
    Backend::template variable_m<contiguous::k, gathered::none>(cudaStreamPerThread, d,
                                                                row_groups{offsets.device, 1, 8}, N, K, rows, b,
                                                                nullptr, bf16_matrix(memory.device, 8, N));
  };
  const ts::gemm::group_operand<const bfloat16> b{memory.device, 64 * 64, 64, 1};
  CHECK_THROWS_WITH_AS(run(64, 60, a, b), "the length of the sums is 60, a positive multiple of 8 is needed",
                       ts::invalid_argument);
  CHECK_THROWS_AS(run(64, 64, {memory.device, 60, nullptr}, b), ts::invalid_argument);
  CHECK_THROWS_AS(run(64, 64, {memory.device + 1, 64, nullptr}, b), ts::invalid_argument);
  CHECK_THROWS_AS(run(64, 64, {memory.device, 64, offsets.device}, b), ts::invalid_argument);
  CHECK_THROWS_AS(run(64, 64, a, {memory.device, 64 * 64, 1, 64}), ts::invalid_argument);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
}

// The main function of a test of `Backend`.
template <class Backend>
int run_tests(int argc, char** argv) {
  using device_test::skips;
  if (skips(device_test::no_device()) || skips(tessera_test::message_of<ts::error>([] { Backend::device::current(); })))
    return device_test::skip_return_code;
  return doctest::Context(argc, argv).run();
}

}  // namespace grouped_test
