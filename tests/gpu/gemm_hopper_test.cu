// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Grouped products on sm_90a, all kernels of them. Without such a GPU it says so and exits with 77.

#include <chrono>
#include <cstdint>
#include <thread>

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "grouped_products.cuh"
#include "stay.cuh"

namespace {

using namespace grouped_test;

struct hopper {
  using device = hp::device;
  using launch_options = hp::all_kernels_options;

  // All kernels, or the one that an epilogue with steps has, on several blocks and on one.
  static std::vector<hp::config> variants(bool all) {
    if (!all) return {{hp::schedule::cooperative, 128, 256, 1, 7}, {hp::schedule::cooperative, 128, 256, 1, 1}};
    return {{hp::schedule::cooperative, 128, 256, 1, 7},
            {hp::schedule::ping_pong, 128, 128, 1, 5},
            {hp::schedule::cooperative, 128, 256, 2, 6}};
  }
  static launch_options options(const hp::config& variant) {
    launch_options result;
    result.forced = &variant;
    return result;
  }
  static std::string describe(const hp::config& variant) { return hp::to_string(variant); }

  template <contiguous Order, gathered Rows, class... Arguments>
  static void variable_m(const Arguments&... arguments) {
    hp::variable_m<Order, Rows>(arguments...);
  }
  template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class... Arguments>
  static void variable_m_activation(const Arguments&... arguments) {
    hp::variable_m_activation<Order, Rows, Activation, Interleaved>(arguments...);
  }
  template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class... Arguments>
  static void variable_m_activation_backward(const Arguments&... arguments) {
    hp::variable_m_activation_backward<Order, Rows, Activation, Interleaved>(arguments...);
  }
  template <gathered Rows, class... Arguments>
  static void variable_k(const Arguments&... arguments) {
    hp::variable_k<Rows>(arguments...);
  }
};

// The same products with tiles handed out by a counter. @tparam Shared Whether kernels of other streams are expected.
template <bool Shared>
struct counting : hopper {
  struct device : hp::device {
    static device current() {
      static const auto& counter = *new buffer<std::int32_t>({0, 0});  // as long as the program
      device d{hp::device::current()};
      d.tile_counter = counter.device;
      d.shared = Shared;
      return d;
    }
  };
};

// More shared memory than a product's block leaves of a multiprocessor.
constexpr int visitor_bytes = 64 * 1024;
__global__ void visitor_kernel() {}

}  // namespace

TEST_CASE("variable_m multiplies every group's rows, whatever the kernel") { check_multiplies<hopper>(); }

TEST_CASE("variable_m gathers rows") { check_gathers<hopper>(); }

TEST_CASE("the up-projection saves H and applies the activation") { check_up_projection<hopper>(); }

TEST_CASE("the activation's gradient takes the place of H") { check_gradient_in_place<hopper>(); }

TEST_CASE("variable_k sums over every group's rows, and empty groups get zeros") { check_weight_gradients<hopper>(); }

TEST_CASE("a row's bits depend neither on its neighbours nor on the order of tiles") { check_independence<hopper>(); }

TEST_CASE("a captured product is right when the rows have changed") { check_capture<hopper>(); }

TEST_CASE("what the kernels cannot do is refused with a sentence") { check_refusals<hopper>(); }

TEST_CASE("a kernel that cannot read what it adds to is refused, not run without adding") {
  const buffer<std::int32_t> offsets({0, 8});
  const buffer<bfloat16> memory(std::vector<bfloat16>(64 * 64));
  for (const hp::config& c :
       {hp::config{hp::schedule::cooperative, 128, 256, 2, 2}, hp::config{hp::schedule::ping_pong, 128, 128, 1, 1}}) {
    CHECK_THROWS_AS((hp::variable_m<contiguous::k, gathered::none>(
                        cudaStreamPerThread, hp::device::current(), row_groups{offsets.device, 1, 8}, 64, 64,
                        {memory.device, 64, nullptr}, {memory.device, 64 * 64, 64, 1}, nullptr,
                        bf16_matrix(memory.device, 8, 64), ts::write::accumulate, hopper::options(c))),
                    ts::invalid_argument);
  }
}

TEST_CASE_TEMPLATE("products whose blocks, or clusters, ask for their tiles", backend, counting<false>,
                   counting<true>) {
  check_multiplies<backend>();
  check_gathers<backend>();
  check_up_projection<backend>();
  check_gradient_in_place<backend>();
  check_weight_gradients<backend>();
}

TEST_CASE("where other streams' kernels are expected, tiles do not wait for blocks that cannot begin") {
  constexpr std::int64_t M = 256, N = 512;  // of each group: 4 tiles
  constexpr int room = 8, tiles = 4;
  constexpr std::int32_t short_sum = 512, long_sum = 12 * short_sum;
  hp::device d = hp::device::current();
  // Blocks that cannot begin are the last. The long sums are the first tiles of the last four, with enough short ones
  // behind them that the others are busy for about as long.
  const int long_group = (d.num_multiprocessors - 1) / tiles;
  const int groups = long_group + 1 + 16 * d.num_multiprocessors / tiles;
  std::vector<std::int32_t> begin_of(static_cast<std::size_t>(groups) + 1, 0);
  for (int g = 0; g < groups; ++g) {
    const auto at = static_cast<std::size_t>(g);
    begin_of[at + 1] = begin_of[at] + (g == long_group ? long_sum : short_sum);
  }
  const std::int64_t rows = begin_of.back();
  const buffer<bfloat16> a(std::vector<bfloat16>(static_cast<std::size_t>(rows * M)));
  const buffer<bfloat16> b(std::vector<bfloat16>(static_cast<std::size_t>(rows * N)));
  const buffer<bfloat16> c(std::vector<bfloat16>(static_cast<std::size_t>(groups * M * N)));
  const buffer<std::int32_t> offsets(begin_of), counter({0, 0});
  const hp::config whole_device{hp::schedule::cooperative, 128, 256, 1, d.num_multiprocessors};
  require(cudaFuncSetAttribute(stay_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, visitor_bytes),
          "cudaFuncSetAttribute");
  cudaStream_t own, other;
  cudaEvent_t begin, end;
  for (cudaStream_t* stream : {&own, &other})
    require(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "cudaStreamCreate");
  for (cudaEvent_t* event : {&begin, &end}) require(cudaEventCreate(event), "cudaEventCreate");
  // @return the product's time, beside a kernel that stays on some multiprocessors for several times as long.
  const auto product_ms = [&](bool shared, std::uint64_t stays_ns) {
    d.tile_counter = counter.device;
    d.shared = shared;
    stay_kernel<<<room, 32, visitor_bytes, other>>>(stays_ns);
    require(cudaGetLastError(), "stay_kernel");
    std::this_thread::sleep_for(std::chrono::milliseconds(stays_ns > 0 ? 2 : 0));  // until it stands
    require(cudaEventRecord(begin, own), "cudaEventRecord");
    hp::variable_k<gathered::none>(own, d, row_groups{offsets.device, groups, rows}, M, N, {a.device, M, nullptr},
                                   {b.device, N, nullptr}, ts::gemm::group_operand<bfloat16>{c.device, M * N, N, 1},
                                   ts::write::overwrite, hopper::options(whole_device));
    require(cudaEventRecord(end, own), "cudaEventRecord");
    require(cudaDeviceSynchronize(), "the product");
    float ms = 0;
    require(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    return ms;
  };
  for (const bool shared : {false, true}) product_ms(shared, 0);  // kernels are loaded when they first run
  constexpr std::uint64_t stays_ns = 10'000'000;
  const float waits = product_ms(false, stays_ns), shares = product_ms(true, stays_ns);
  MESSAGE("late blocks keep their first tiles: ", waits, " ms, ask for them: ", shares, " ms");
  // 0.77 on H100 and H200, where 1 would mean that late blocks did not ask
  CHECK(shares < 0.9f * waits);
  for (cudaEvent_t event : {begin, end}) require(cudaEventDestroy(event), "cudaEventDestroy");
  for (cudaStream_t stream : {own, other}) require(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

TEST_CASE("what a product leaves free stays free for other streams, whatever its own stream has next") {
  constexpr std::int64_t rows = 16384, N = 4096, K = 4096, room = 8;
  const hp::device d = hp::device::current();
  buffer<bfloat16> a(std::vector<bfloat16>(rows * K)), b(std::vector<bfloat16>(N * K)), c(poison<bfloat16>(rows * N));
  const buffer<std::int32_t> offsets({0, rows});
  require(cudaFuncSetAttribute(visitor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, visitor_bytes),
          "cudaFuncSetAttribute");
  cudaStream_t own, other;
  cudaEvent_t begin, visited, end;
  for (cudaStream_t* stream : {&own, &other})
    require(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "cudaStreamCreate");
  for (cudaEvent_t* event : {&begin, &visited, &end}) require(cudaEventCreate(event), "cudaEventCreate");
  const auto product = [&](int sm_budget) {
    hp::launch_options options;
    options.sm_budget = sm_budget;
    hp::variable_m<contiguous::k, gathered::none>(own, d, {offsets.device, 1, rows}, N, K, {a.device, K, nullptr},
                                                  {b.device, N * K, K, 1}, nullptr, bf16_matrix(c.device, rows, N),
                                                  ts::write::overwrite, options);
  };
  const auto visit = [&] {
    visitor_kernel<<<room, 32, visitor_bytes, other>>>();
    require(cudaGetLastError(), "visitor_kernel");
  };
  // kernels are loaded when they first run, which waits for the device
  product(0);
  visit();
  require(cudaDeviceSynchronize(), "the first products");

  // The visitor is enqueued last, a few tens of microseconds after the first product has begun; each takes about 900.
  require(cudaEventRecord(begin, own), "cudaEventRecord");
  product(d.num_multiprocessors - room);
  product(0);
  require(cudaEventRecord(end, own), "cudaEventRecord");
  visit();
  require(cudaEventRecord(visited, other), "cudaEventRecord");
  require(cudaDeviceSynchronize(), "the products");
  float both_ms = 0, visit_ms = 0;
  require(cudaEventElapsedTime(&both_ms, begin, end), "cudaEventElapsedTime");
  require(cudaEventElapsedTime(&visit_ms, begin, visited), "cudaEventElapsedTime");
  INFO("both products ", both_ms, " ms, the visitor was done after ", visit_ms);
  CHECK(visit_ms < 0.4f * both_ms);
  for (cudaEvent_t event : {begin, visited, end}) cudaEventDestroy(event);
  for (cudaStream_t stream : {own, other}) cudaStreamDestroy(stream);
}

int main(int argc, char** argv) { return run_tests<hopper>(argc, argv); }
