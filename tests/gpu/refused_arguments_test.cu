// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// What the device halves refuse before their first call of CUDA: runs without a GPU, too.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cuda_runtime.h>

#include <tessera/tessera.cuh>

#include "../support/messages.hpp"

namespace ts = tessera;
using tessera_test::contains;
using tessera_test::message_of;

TEST_CASE("experts refuse weights and gradients that are not those of their sizes") {
  using experts = ts::experts<ts::activation::swiglu, ts::precision::bf16>;
  const experts of({.num_local_experts = 2, .hidden = 16, .intermediate = 8});
  const ts::expert_rows rows{.num_local_experts = 2};
  const ts::pair_weights<float> weighting{};
  const ts::device_stream stream(cudaStream_t{});
  ts::bfloat16 some{};  // nobody reads it
  experts::weights w{};
  w.up = w.down = &some;
  const auto forward = [&] { return message_of([&] { of.forward(stream, rows, {}, weighting, w, {}, {}, {}); }); };
  const auto backward = [&] {
    return message_of([&] { of.backward_input(stream, rows, {}, {}, weighting, w, {}, {}, {}, nullptr, {}); });
  };
  w.up_stride = 255;
  CHECK(contains(forward(), "weights have up_stride = 255, it must be 0 or at least 256"));
  CHECK(contains(backward(), "weights have up_stride = 255, it must be 0 or at least 256"));
  w.up_stride = 0;
  w.down_bias = &some;
  CHECK(contains(forward(), "have no biases by their dims"));
  CHECK(contains(backward(), "have no biases by their dims"));
  experts::gradient grad{};
  experts::gradients g{};
  g.up = g.down = &grad;
  g.down_stride = 1;
  const auto overwrite = [&] {
    of.backward_weights(stream, rows, {}, {}, weighting, {}, {}, g, ts::write::overwrite, {});
  };
  CHECK(contains(message_of(overwrite), "gradients have down_stride = 1, it must be 0 or at least 128"));
}

TEST_CASE("a router refuses a loss scale that is a null pointer, which a literal 0 is") {
  using router = ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::raw>;
  const router of({.num_experts = 8, .top_k = 2});
  const ts::device_stream stream(cudaStream_t{});
  const auto backward = [&] {
    of.backward(stream, ts::router_inputs<float>{}, ts::routing<float>{}, ts::matrix_view<const float>{}, {}, nullptr,
                0, ts::matrix_view<float>{});
  };
  CHECK(contains(message_of(backward), "loss_scale is null"));
}
