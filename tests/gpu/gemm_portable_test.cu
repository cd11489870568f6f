// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Grouped products on sm_80 and later: the cases of gemm_hopper_test, on whatever device there is; experts that are
// told to use them; and what the program says of its own code. Without such a GPU it says so and exits with 77.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "../support/cast.hpp"
#include "grouped_products.cuh"

#include <string>

#include <tessera/experts/expert_mlp.cuh>
#include <tessera/gemm/portable.cuh>

namespace {

using namespace grouped_test;
using tessera_test::widened;
namespace pp = ts::gemm::portable;

struct portable {
  using device = pp::device;
  using launch_options = pp::launch_options;

  // Multiprocessors that may be used: all, few, one.
  static std::vector<int> variants(bool) { return {0, 7, 1}; }
  static launch_options options(int variant) { return {.sm_budget = variant}; }
  static std::string describe(int variant) { return "at most " + std::to_string(variant) + " multiprocessors"; }

  template <contiguous Order, gathered Rows, class... Arguments>
  static void variable_m(const Arguments&... arguments) {
    pp::variable_m<Order, Rows>(arguments...);
  }
  template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class... Arguments>
  static void variable_m_activation(const Arguments&... arguments) {
    pp::variable_m_activation<Order, Rows, Activation, Interleaved>(arguments...);
  }
  template <contiguous Order, gathered Rows, class Activation, bool Interleaved, class... Arguments>
  static void variable_m_activation_backward(const Arguments&... arguments) {
    pp::variable_m_activation_backward<Order, Rows, Activation, Interleaved>(arguments...);
  }
  template <gathered Rows, class... Arguments>
  static void variable_k(const Arguments&... arguments) {
    pp::variable_k<Rows>(arguments...);
  }
};

// Forward and backward of experts on the device, and of the same experts on the host in double.
template <class Activation, class WeightLayout>
void check_experts(ts::weight_on applied, bool with_bias) {
  using device_experts = ts::experts<Activation, ts::precision::bf16, WeightLayout, pp::backend>;
  using host_experts = ts::experts<Activation, ts::precision::fp64, WeightLayout>;
  using gradient = typename device_experts::gradient;
  constexpr int d = 136, n = 200;
  const rows_case rows = of_counts({40, 0, 150, 1});
  const auto L = static_cast<int>(rows.groups());
  const ts::expert_dims sizes{L, d, n, with_bias};
  const device_experts on_device(sizes);
  const host_experts on_host(sizes);
  const std::int64_t U = on_device.up_width(), P = rows.last(), T = rows.num_tokens;

  random_engine random(5);
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  const buffer<bfloat16> x(normal<bfloat16>(random, T * d)), dy(normal<bfloat16>(random, T * d)),
      up(normal<bfloat16>(random, L * U * d, scale)), down(normal<bfloat16>(random, L * d * n, scale)),
      up_bias(normal<bfloat16>(random, L * U)), down_bias(normal<bfloat16>(random, L * d));
  const buffer<float> pair_weights(normal<float>(random, P));
  const buffer<std::int32_t> offsets(rows.offsets), list(operand_rows::make_list(random, rows));

  const auto widened_weights = widened(pair_weights.host), x64 = widened(x.host), dy64 = widened(dy.host),
             up64 = widened(up.host), down64 = widened(down.host), up_bias64 = widened(up_bias.host),
             down_bias64 = widened(down_bias.host);
  const auto count = [](std::int64_t elements) { return static_cast<std::size_t>(elements); };
  std::vector<double> y64(count(P * d)), dx64(count(P * d)), dw64(count(P)), dup64(up64.size()), ddown64(down64.size()),
      dup_bias64(up_bias64.size()), ddown_bias64(down_bias64.size());
  buffer<bfloat16> y(poison<bfloat16>(P * d)), dx(poison<bfloat16>(P * d));
  buffer<float> dw(poison<float>(P));
  buffer<gradient> dup(poison<gradient>(L * U * d)), ddown(poison<gradient>(L * d * n)),
      dup_bias(poison<gradient>(L * U)), ddown_bias(poison<gradient>(L * d));

  // Both halves by the same steps. `memory` carves from that half's memory.
  const auto run = [&](const auto& experts, auto stream, ts::memory_builder memory, const ts::expert_rows& e,
                       const auto* inputs, const auto* doutputs, const auto* pair, const auto& w, auto* outputs,
                       auto* dinputs, auto* dpair, const auto& g) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(inputs)>>;
    const auto saved = experts.carve_saved(memory, P);
    const auto deferred = experts.carve_deferred(memory, P);
    const auto forward = experts.carve_forward(memory, P, applied);
    const auto backward = experts.carve_backward_input(memory, P, applied);
    const auto gradients = experts.carve_backward_weights(memory, P, applied);
    if (memory.counting()) return memory.bytes();
    const ts::matrix_view<const S> tokens(inputs, T, d), doutput(doutputs, T, d);
    const ts::pair_weights<std::remove_const_t<std::remove_pointer_t<decltype(pair)>>> weighting{pair, applied};
    experts.forward(stream, e, tokens, weighting, w, saved, {outputs, P, d}, forward);
    experts.backward_input(stream, e, tokens, doutput, weighting, w, saved, deferred, {dinputs, P, d}, dpair, backward);
    experts.backward_weights(stream, e, tokens, doutput, weighting, saved, deferred, g, ts::write::overwrite,
                             gradients);
    return memory.bytes();
  };
  const auto device_run = [&](ts::memory_builder memory) {
    return run(on_device, ts::device_stream(cudaStreamPerThread), memory,
               ts::expert_rows{L, offsets.device, list.device}, static_cast<const bfloat16*>(x.device),
               static_cast<const bfloat16*>(dy.device), static_cast<const float*>(pair_weights.device),
               typename device_experts::weights{up.device, down.device, with_bias ? up_bias.device : nullptr,
                                                with_bias ? down_bias.device : nullptr},
               y.device, dx.device, dw.device,
               typename device_experts::gradients{dup.device, ddown.device, with_bias ? dup_bias.device : nullptr,
                                                  with_bias ? ddown_bias.device : nullptr});
  };
  const auto host_run = [&](ts::memory_builder memory) {
    return run(on_host, ts::host_stream(), memory, ts::expert_rows{L, offsets.host.data(), list.host.data()},
               x64.data(), dy64.data(), widened_weights.data(),
               typename host_experts::weights{up64.data(), down64.data(), with_bias ? up_bias64.data() : nullptr,
                                              with_bias ? down_bias64.data() : nullptr},
               y64.data(), dx64.data(), dw64.data(),
               typename host_experts::gradients{dup64.data(), ddown64.data(), with_bias ? dup_bias64.data() : nullptr,
                                                with_bias ? ddown_bias64.data() : nullptr});
  };
  ts::host_buffer host_memory(host_run(ts::memory_builder()));
  host_run(ts::memory_builder(ts::workspace_memory(host_memory), "the host's memory"));
  const std::size_t bytes = device_run(ts::memory_builder());
  const buffer<unsigned char> device_memory(poison<unsigned char>(static_cast<std::int64_t>(bytes)));
  device_run(ts::memory_builder(ts::workspace_memory(device_memory.device, bytes), "the device's memory"));

  const auto compare = [](const char* what, const auto& found, const std::vector<double>& expected) {
    INFO(what);
    const auto values = found.download();
    CHECK(relative_error(std::span(values), expected) < 1e-2);
  };
  compare("y", y, y64);
  compare("dx", dx, dx64);
  compare("the pair weights' gradients", dw, dw64);
  compare("the up-projections' gradients", dup, dup64);
  compare("the down-projections' gradients", ddown, ddown64);
  if (!with_bias) return;
  compare("the up biases' gradients", dup_bias, dup_bias64);
  compare("the down biases' gradients", ddown_bias, ddown_bias64);
}

__global__ void report_code_kernel(int* has_warpgroup_code) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  *has_warpgroup_code = 1;
#else
  *has_warpgroup_code = 0;
#endif
}

}  // namespace

TEST_CASE("variable_m multiplies every group's rows, whatever the grid") { check_multiplies<portable>(); }

TEST_CASE("variable_m gathers rows") { check_gathers<portable>(); }

TEST_CASE("the up-projection saves H and applies the activation") { check_up_projection<portable>(); }

TEST_CASE("the activation's gradient takes the place of H") { check_gradient_in_place<portable>(); }

TEST_CASE("variable_k sums over every group's rows, and empty groups get zeros") { check_weight_gradients<portable>(); }

TEST_CASE("a row's bits depend neither on its neighbours nor on the order of tiles") { check_independence<portable>(); }

TEST_CASE("a captured product is right when the rows have changed") { check_capture<portable>(); }

TEST_CASE("what the kernels cannot do is refused with a sentence") { check_refusals<portable>(); }

TEST_CASE("experts that ask for these products follow the host in double") {
  check_experts<ts::activation::swiglu, ts::weight_layout::out_in_concatenated>(ts::weight_on::output, false);
  check_experts<ts::activation::geglu, ts::weight_layout::in_out_interleaved>(ts::weight_on::output, true);
  check_experts<ts::activation::relu2, ts::weight_layout::in_out_concatenated>(ts::weight_on::input, false);
}

TEST_CASE("a program knows whether it has code for warpgroups") {
  const buffer<int> answer({-1});
  report_code_kernel<<<1, 1, 0, cudaStreamPerThread>>>(answer.device);
  CHECK(ts::detail::has_warpgroup_code() == (answer.download()[0] == 1));
}

int main(int argc, char** argv) { return run_tests<portable>(argc, argv); }
