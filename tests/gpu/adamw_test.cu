// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// AdamW in device memory against the host half in double. Without a GPU it says so and exits with 77, which CTest
// reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "device_fixture.cuh"

#include <tessera/shard/adamw.cuh>

#include "../support/bits.hpp"

namespace {

namespace ts = tessera;
namespace sh = tessera::shard;
using device_test::buffer;
using tessera_test::same_bits;

constexpr sh::adamw_options options{.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1};

// Where a tensor starts in one array of all, in elements, and how many it has.
struct piece {
  std::int64_t first, count;
  bool decays = true;
};

// Sizes around the width of a vector and of a tile; the second list starts at addresses that 16 bytes do not divide.
const std::vector<piece> aligned_pieces{{0, 4096}, {4096, 1},    {4112, 0},           {4112, 7, false},
                                        {4128, 8}, {4144, 2047}, {6192, 2049, false}, {8256, 100003}};
const std::vector<piece> odd_pieces{{1, 4096}, {4099, 2049}, {6149, 1}, {6151, 5000, false}};

// All arrays, on the device, and the same in double on the host.
template <class S, class A, class M>
struct fixture {
  std::vector<piece> pieces;
  std::size_t size;
  buffer<S> parameter;
  buffer<A> master, gradient;
  buffer<M> exp_avg, exp_avg_sq;
  buffer<sh::adamw_control> control{1};
  buffer<std::byte> described;
  sh::adamw_device_list<S, A, M> list;
  std::vector<double> host_master, host_gradient, host_m, host_v;

  explicit fixture(const std::vector<piece>& pieces_)
      : pieces(pieces_),
        size(static_cast<std::size_t>(pieces.back().first + pieces.back().count + 16)),
        parameter(size),
        master(size),
        gradient(size),
        exp_avg(size),
        exp_avg_sq(size),
        described(pieces.size() * sizeof(sh::adamw_device_tensor<S, A, M>)) {
    const auto start = device_test::normal(size, 1);
    host_master.assign(start.begin(), start.end());
    host_m.assign(size, 0.0);
    host_v.assign(size, 0.0);
    master.set(std::vector<A>(start.begin(), start.end()));
    exp_avg.fill(0);
    exp_avg_sq.fill(0);
    std::vector<sh::adamw_tensor<S, A, M>> tensors;
    for (const piece& p : pieces) {
      tensors.push_back({parameter.data() + p.first, master.data() + p.first, gradient.data() + p.first,
                         exp_avg.data() + p.first, exp_avg_sq.data() + p.first, p.count, p.decays});
    }
    std::vector<std::byte> bytes(described.size());
    auto* out = reinterpret_cast<sh::adamw_device_tensor<S, A, M>*>(bytes.data());
    const std::int64_t tiles = sh::describe_adamw<S, A, M>(std::span<const sh::adamw_tensor<S, A, M>>(tensors), out);
    described.set(bytes);
    list = {reinterpret_cast<const sh::adamw_device_tensor<S, A, M>*>(described.data()),
            static_cast<int>(tensors.size()), tiles};
    set_control(0, 1e-2, 0.5);
  }
  void set_control(std::int64_t step, double rate, double scale) { control.set({{step, rate, scale, 0}}); }
  void set_gradient(unsigned seed) {
    const auto g = device_test::normal(size, seed);
    host_gradient.assign(g.begin(), g.end());
    gradient.set(std::vector<A>(g.begin(), g.end()));
  }
  void run(cudaStream_t stream = nullptr) { sh::adamw(ts::device_stream(stream), options, control.data(), list); }
  void run_on_host(std::int64_t step, double rate, double scale) {
    for (const piece& p : pieces) {
      const sh::adamw_tensor<double, double, double> t{nullptr,
                                                       host_master.data() + p.first,
                                                       host_gradient.data() + p.first,
                                                       host_m.data() + p.first,
                                                       host_v.data() + p.first,
                                                       p.count,
                                                       p.decays};
      sh::adamw({}, options, step, rate, scale, std::span<const sh::adamw_tensor<double, double, double>>(&t, 1));
    }
  }
  bool belongs(std::size_t i) const {
    for (const piece& p : pieces) {
      if (static_cast<std::int64_t>(i) >= p.first && static_cast<std::int64_t>(i) < p.first + p.count) return true;
    }
    return false;
  }
};

template <class S, class A, class M>
void check_against_host(const std::vector<piece>& pieces, double tolerance) {
  fixture<S, A, M> f(pieces);
  const auto untouched = f.parameter.get();
  for (int t = 1; t <= 5; ++t) {
    f.set_gradient(static_cast<unsigned>(t + 10));
    f.run();
    f.run_on_host(t, 1e-2, 0.5);
  }
  device_test::synchronize();
  CHECK(f.control.get()[0].step == 5);
  CHECK(f.control.get()[0].done == 0);
  const auto master = f.master.get();
  const auto parameter = f.parameter.get();
  double worst = 0;
  bool rounded = true, stayed = true;
  for (std::size_t i = 0; i < f.size; ++i) {
    if (f.belongs(i)) {
      const double error = std::abs(static_cast<double>(master[i]) - f.host_master[i]);
      if (!(error <= worst)) worst = error;
      const S expected = sh::detail::to_element<S>(master[i]);
      rounded = rounded && std::memcmp(&expected, &parameter[i], sizeof(S)) == 0;
    } else {
      stayed = stayed && std::memcmp(&untouched[i], &parameter[i], sizeof(S)) == 0;
    }
  }
  CHECK(worst < tolerance);
  CHECK(rounded);
  CHECK(stayed);
}

TEST_CASE("one launch updates tensors of all sizes and alignments as the host does in double") {
  for (const auto& pieces : {aligned_pieces, odd_pieces}) {
    check_against_host<ts::bfloat16, float, float>(pieces, 5e-6);
    check_against_host<float, float, float>(pieces, 5e-6);
    check_against_host<ts::bfloat16, float, ts::bfloat16>(pieces, 2e-3);
    check_against_host<double, double, double>(pieces, 1e-13);
  }
}

TEST_CASE("an update has the same bits run after run and however tensors are cut") {
  using fixture_type = fixture<ts::bfloat16, float, ts::bfloat16>;
  const std::int64_t count = 20000;
  std::vector<piece> cut;
  for (std::int64_t first = 0, length = 1; first < count; first += length, length = (length * 5 + 3) % 3001 + 1) {
    cut.push_back({first, std::min(length, count - first)});
  }
  fixture_type whole({{0, count}}), again({{0, count}}), parts(cut);
  for (unsigned t = 1; t <= 3; ++t) {
    for (fixture_type* f : {&whole, &again, &parts}) {
      f->set_gradient(t);
      f->run();
    }
  }
  device_test::synchronize();
  const auto first = [&](auto values) {
    values.resize(static_cast<std::size_t>(count));
    return values;
  };
  CHECK(same_bits(first(whole.master.get()), first(again.master.get())));
  CHECK(same_bits(first(whole.master.get()), first(parts.master.get())));
  CHECK(same_bits(first(whole.exp_avg.get()), first(parts.exp_avg.get())));
  CHECK(same_bits(first(whole.exp_avg_sq.get()), first(parts.exp_avg_sq.get())));
  CHECK(same_bits(first(whole.parameter.get()), first(parts.parameter.get())));
}

TEST_CASE("a captured update sees new gradients, rates and factors, and counts its steps") {
  fixture<ts::bfloat16, float, float> plain(aligned_pieces), captured(aligned_pieces);
  cudaStream_t stream = device_test::make_stream();
  const cudaGraphExec_t graph = device_test::capture(stream, [&] { captured.run(stream); });
  for (unsigned t = 1; t <= 4; ++t) {
    const double rate = 1e-2 / t, scale = 0.25 * t;
    plain.set_gradient(t);
    plain.set_control(t - 1, rate, scale);
    plain.run();
    captured.set_gradient(t);
    auto control = captured.control.get();
    control[0].rate = rate;
    control[0].scale = scale;
    captured.control.set(control);
    device_test::require(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
    device_test::synchronize();
  }
  CHECK(same_bits(plain.master.get(), captured.master.get()));
  CHECK(captured.control.get()[0].step == 4);
  device_test::require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
  device_test::require(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

TEST_CASE("a factor that is not finite skips the update; wrong arguments are refused before the launch") {
  fixture<float, float, float> f(odd_pieces);
  f.set_gradient(1);
  const auto before = f.master.get();
  f.set_control(6, 1e-2, std::numeric_limits<double>::quiet_NaN());
  f.run();
  f.set_control(6, 1e-2, std::numeric_limits<double>::infinity());
  f.run();
  device_test::synchronize();
  CHECK(same_bits(before, f.master.get()));
  CHECK(f.control.get()[0].step == 6);
  CHECK(f.control.get()[0].done == 0);

  const ts::device_stream stream(cudaStream_t{});
  CHECK_THROWS_AS(sh::adamw(stream, {.beta1 = 1.0}, f.control.data(), f.list), ts::invalid_argument);
  CHECK_THROWS_AS(sh::adamw(stream, options, static_cast<sh::adamw_control*>(nullptr), f.list), ts::invalid_argument);
  sh::adamw_tensor<float, float, float> broken{};
  broken.count = 3;
  sh::adamw_device_tensor<float, float, float> out{};
  CHECK_THROWS_AS((sh::describe_adamw<float, float, float>(
                      std::span<const sh::adamw_tensor<float, float, float>>(&broken, 1), &out)),
                  ts::invalid_argument);
  const sh::adamw_device_list<float, float, float> nothing;
  sh::adamw(stream, options, f.control.data(), nothing);
  device_test::synchronize();
  CHECK(f.control.get()[0].step == 6);  // the factor is still infinite
}

}  // namespace
