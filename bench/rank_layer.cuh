// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// The layer that is timed between GPUs: shapes, and one rank's part of it.

#include <cmath>
#include <cstdint>

#include <tessera/comm/symmetric.cuh>
#include <tessera/layout/block.hpp>
#include <tessera/moe/moe_layer.cuh>

#include "gpu_timing.cuh"
#include "layer_shape.hpp"

namespace tessera_bench {

using spread_layer =
    tessera::moe_layer<tessera::router<tessera::score::softmax, tessera::select::top_k, tessera::weigh::normalized>,
                       tessera::experts<tessera::activation::swiglu, tessera::precision::bf16_gradients>,
                       tessera::layout::block, tessera::comm::symmetric>;

// One rank's layer with its state, parameters and their gradients.
struct rank_layer {
  using bfloat16 = tessera::bfloat16;

  rank_layer(tessera::comm::symmetric& comm, const layer_shape& s, const spread_layer::options& options = {})
      : tokens(s.T),
        sizes{.num_experts = s.E,
              .top_k = s.K,
              .hidden = static_cast<int>(s.d),
              .intermediate = static_cast<int>(s.n),
              .max_tokens = s.T},
        placement(s.E, comm.size()),
        bytes(spread_layer::sizes(sizes, placement, comm.rank(), options)),
        state(static_cast<std::int64_t>(bytes.state_bytes)),
        up(placement.num_slots(comm.rank()) * 2 * s.n * s.d, static_cast<unsigned>(comm.rank()) + 31,
           1 / std::sqrt(static_cast<float>(s.d))),
        down(placement.num_slots(comm.rank()) * s.d * s.n, static_cast<unsigned>(comm.rank()) + 41,
             1 / std::sqrt(static_cast<float>(s.n))),
        gate(s.E * s.d, 5, 1 / std::sqrt(static_cast<float>(s.d))),
        dgate(gate.size()),
        dup(up.size()),
        ddown(down.size()),
        moe(sizes, {}, placement, comm, tessera::state_memory(state.data(), bytes.state_bytes), options) {
    moe.reset_state(cudaStreamLegacy);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  spread_layer::weights weights() const {
    spread_layer::weights w{};
    w.gate = {gate.data(), sizes.num_experts, sizes.hidden};
    w.experts.up = up.data();
    w.experts.down = down.data();
    return w;
  }
  spread_layer::gradients gradients() {
    spread_layer::gradients g{};
    g.gate = dgate.data();
    g.experts.up = dup.data();
    g.experts.down = ddown.data();
    return g;
  }

  std::int64_t tokens;
  tessera::shape sizes;
  tessera::layout::block placement;
  tessera::layer_sizes bytes;
  device_array<std::byte> state;
  device_array<bfloat16> up, down;
  device_array<float> gate, dgate;
  device_array<bfloat16> dup, ddown;
  spread_layer moe;
};

}  // namespace tessera_bench
