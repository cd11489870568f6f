// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A layer on one rank of a group of GPUs: its part of a problem, its memory, and what a step leaves behind.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <tessera/moe/moe_layer.cuh>

#include "../support/bits.hpp"
#include "../support/layer_fixture.hpp"
#include "device_fixture.cuh"

namespace layer_ranks {

using namespace tessera_test;
using device_test::buffer;
using device_test::require;
using S = ts::bfloat16;

inline std::vector<std::int64_t> split_of(std::int64_t tokens, int ranks) {
  std::vector<std::int64_t> offsets{0};
  for (int r = 0; r < ranks; ++r)
    offsets.push_back(r + 1 == ranks ? tokens : offsets.back() + tokens / (ranks + 1 + r));
  return offsets;
}

template <class T>
std::vector<T> part(const std::vector<T>& values, std::int64_t first, std::int64_t last) {
  return {values.begin() + first, values.begin() + last};
}

// What a run leaves behind, of all ranks together.
struct outcome {
  std::vector<S> y, dx;
  std::vector<float> gate, up, down, shared_up, losses;
  std::vector<std::int64_t> load;
  std::vector<float> bias;
  std::int64_t dropped = 0;              // by the bound
  std::int64_t dropped_by_capacity = 0;  //
};

template <class Layer>
typename Layer::options full_bound() {
  typename Layer::options options;
  options.dispatch.row_bound = ts::dispatch_options::full_row_bound;
  return options;
}

// One rank's layer and its memory.
template <class Layer>
class rank_layer {
 public:
  using comm_type = typename Layer::communicator_type;
  using layout_type = typename Layer::layout_type;
  using state_buffer = std::shared_ptr<buffer<std::byte>>;
  rank_layer(comm_type& comm, const layer_problem& p, typename Layer::router_options routing, std::int64_t first,
             std::int64_t last, std::int64_t max_tokens)
      : rank_layer(comm, p, routing, first, last, max_tokens, layout_type(p.sizes.num_experts, comm.size()),
                   full_bound<Layer>()) {}
  // @param state Of a layer that this one shares it with; null: its own, reset.
  rank_layer(comm_type& comm, const layer_problem& p, typename Layer::router_options routing, std::int64_t first,
             std::int64_t last, std::int64_t max_tokens, const layout_type& placement,
             const typename Layer::options& options, state_buffer state = nullptr)
      : comm_(comm), sizes_(p.sizes), tokens_(last - first), state_(std::move(state)) {
    sizes_.max_tokens = max_tokens;
    const auto bytes = Layer::sizes(sizes_, placement, comm.rank(), options);
    const auto take = [&](std::size_t n) -> std::byte* {
      if constexpr (requires { comm.allocate(n); }) {
        return comm.allocate(n);
      } else {
        std::byte* data = nullptr;
        require(cudaMalloc(&data, n), "cudaMalloc");  // as long as the program
        return data;
      }
    };
    saved_ = {take(bytes.saved_bytes), bytes.saved_bytes};
    deferred_ = {take(bytes.deferred_bytes), bytes.deferred_bytes};
    const std::size_t scratch = std::max(bytes.workspace_bytes, bytes.eval_workspace_bytes);
    workspace_ = {take(scratch), scratch};
    for (const auto& [data, count] : {std::pair(saved_.data, saved_.bytes), std::pair(deferred_.data, deferred_.bytes),
                                      std::pair(workspace_.data, workspace_.bytes)})
      require(cudaMemset(data, 0xff, count), "cudaMemset");
    const bool own_state = state_ == nullptr;
    if (own_state) state_ = std::make_shared<buffer<std::byte>>(bytes.state_bytes);
    moe_.emplace(sizes_, routing, placement, comm, ts::state_memory(state_->data(), state_->size()), options);
    stream_ = device_test::make_stream();
    if (own_state) {
      require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // cudaMemset is over: nothing else orders the two
      moe_->reset_state(stream_);
      require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
      const auto bias = cast<float>(p.bias);
      require(cudaMemcpy(moe_->state().bias, bias.data(), bias.size() * sizeof(float), cudaMemcpyHostToDevice), "copy");
    }

    const std::int64_t d = sizes_.hidden;
    const auto of_experts = [&](const std::vector<double>& all) {
      return local_rows<S>(all, static_cast<std::int64_t>(all.size()) / sizes_.num_experts, placement, comm.rank());
    };
    x_.emplace(cast<S>(part(p.x, first * d, last * d)));
    dy_.emplace(cast<S>(part(p.dy, first * d, last * d)));
    if (!p.residual.empty()) residual_.emplace(cast<S>(part(p.residual, first * d, last * d)));
    y_.emplace(x_->size());
    dx_.emplace(x_->size());
    gate_.emplace(cast<float>(p.gate));
    up_.emplace(of_experts(p.up));
    down_.emplace(of_experts(p.down));
    shared_up_.emplace(cast<S>(p.shared_up));
    shared_down_.emplace(cast<S>(p.shared_down));
    gate_grad_.emplace(gate_->size());
    up_grad_.emplace(up_->size());
    down_grad_.emplace(down_->size());
    shared_up_grad_.emplace(shared_up_->size());
    shared_down_grad_.emplace(shared_down_->size());
    for (const std::int32_t o : p.sequence_offsets) {
      const auto at = std::clamp<std::int64_t>(o - first, 0, tokens_);
      if (sequences_.empty() || at > sequences_.back()) sequences_.push_back(static_cast<std::int32_t>(at));
    }
    if (sequences_.front() != 0) sequences_.insert(sequences_.begin(), 0);
    sequence_offsets_.emplace(sequences_);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  rank_layer(const rank_layer&) = delete;
  rank_layer& operator=(const rank_layer&) = delete;
  // When a rank throws, kernels may be under way that read what is freed here; their waits end by themselves.
  ~rank_layer() {
    cudaDeviceSynchronize();
    cudaStreamDestroy(stream_);
  }

  void step(ts::pass mode) {
    typename Layer::inputs in{.x = {x_->data(), tokens_, sizes_.hidden},
                              .sequence_offsets = {sequence_offsets_->data(), sequence_offsets_->size()}};
    if (residual_) in.residual = {residual_->data(), tokens_, sizes_.hidden};
    const typename Layer::weights weights{.gate = {gate_->data(), sizes_.num_experts, sizes_.hidden},
                                          .experts = {up_->data(), down_->data()},
                                          .shared = {shared_up_->data(), shared_down_->data()}};
    const ts::matrix_view<const S> dy{dy_->data(), tokens_, sizes_.hidden};
    moe_->forward(stream_, mode, in, weights, {y_->data(), tokens_, sizes_.hidden}, saved_, workspace_);
    look("forward");
    if (mode == ts::pass::eval) return;
    moe_->backward_input(stream_, in, dy, weights, saved_, {dx_->data(), tokens_, sizes_.hidden}, deferred_,
                         workspace_);
    look("backward_input");
    moe_->backward_weights(stream_, in, dy, saved_, deferred_,
                           {.gate = gate_grad_->data(),
                            .experts = {up_grad_->data(), down_grad_->data()},
                            .shared = {shared_up_grad_->data(), shared_down_grad_->data()}},
                           ts::write::overwrite);
    look("backward_weights");
  }
  // Bytes that are no result, wherever a step writes one. Nothing may be under way.
  void poison() {
    for (auto* rows : {&y_, &dx_}) (*rows)->fill(0xff);
    for (auto* sums : {&gate_grad_, &up_grad_, &down_grad_, &shared_up_grad_, &shared_down_grad_}) (*sums)->fill(0xff);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  std::vector<S> tokens() const { return x_->get(); }
  void set_tokens(const std::vector<S>& x) {
    x_->set(x);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // a copy from pageable memory may still be under way
  }
  void end_step() { moe_->end_step(stream_, comm_); }
  void sync() {
    if constexpr (requires { comm_.wait(stream_); }) {
      try {
        comm_.wait(stream_);
      } catch (const ts::cuda_error& e) {
        tell("wait", e.what());
        throw;
      }
    } else {
      require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    }
    ts::device_status status;
    require(cudaMemcpy(&status, moe_->state().status, sizeof(status), cudaMemcpyDeviceToHost), "copy");
    ts::expect_ok(status);
  }
  cudaStream_t stream() const { return stream_; }
  const state_buffer& state() const { return state_; }

  outcome results() const {
    outcome o;
    o.y = y_->get();
    o.dx = dx_->get();
    o.gate = gate_grad_->get();
    o.up = up_grad_->get();
    o.down = down_grad_->get();
    o.shared_up = shared_up_grad_->get();
    o.load.resize(static_cast<std::size_t>(sizes_.num_experts));
    o.bias.resize(o.load.size());
    o.losses.resize(Layer::num_losses);
    const auto& state = moe_->state();
    const auto get = [](auto& to, const auto* from) {
      require(cudaMemcpy(to.data(), from, to.size() * sizeof(to[0]), cudaMemcpyDeviceToHost), "copy");
    };
    get(o.load, state.global_load);
    get(o.bias, state.bias);
    get(o.losses, state.losses);
    require(cudaMemcpy(&o.dropped, state.dropped_by_bound, sizeof(o.dropped), cudaMemcpyDeviceToHost), "copy");
    require(cudaMemcpy(&o.dropped_by_capacity, state.dropped_by_capacity, sizeof(o.dropped_by_capacity),
                       cudaMemcpyDeviceToHost),
            "copy");
    return o;
  }

 private:
  // With TESSERA_TEST_PHASES in the environment, which call of a step a CUDA error belongs to. All ranks wait then, but
  // none in a capture.
  void look(const char* call) const {
    static const bool asked = std::getenv("TESSERA_TEST_PHASES") != nullptr;
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (!asked || cudaStreamIsCapturing(stream_, &capture) != cudaSuccess || capture != cudaStreamCaptureStatusNone)
      return;
    const cudaError_t status = cudaStreamSynchronize(stream_);
    if (status != cudaSuccess) tell(call, cudaGetErrorString(status));
  }
  // What an exception does not say: whose error it is, and whether a kernel had seen a failure before.
  void tell(const char* call, const char* error) const {
    std::fprintf(stderr, "rank %d: %s: %s\n", comm_.rank(), call, error);
    if constexpr (requires { comm_.failure(); }) {
      if (const auto seen = comm_.failure())
        std::fprintf(stderr, "rank %d had seen a failure: peer %d, channel %d, step %d, generation %u\n", comm_.rank(),
                     seen->peer, static_cast<int>(seen->channel), static_cast<int>(seen->step), seen->generation);
    }
  }

  comm_type& comm_;
  ts::shape sizes_;
  std::int64_t tokens_;
  cudaStream_t stream_ = nullptr;
  ts::saved_memory saved_;
  ts::deferred_memory deferred_;
  ts::workspace_memory workspace_;
  state_buffer state_;
  std::optional<Layer> moe_;
  std::optional<buffer<S>> x_, dy_, residual_, y_, dx_, up_, down_, shared_up_, shared_down_;
  std::optional<buffer<float>> gate_, gate_grad_, up_grad_, down_grad_, shared_up_grad_, shared_down_grad_;
  std::vector<std::int32_t> sequences_;
  std::optional<buffer<std::int32_t>> sequence_offsets_;
};

inline outcome join(const std::vector<outcome>& ranks) {
  outcome all = ranks[0];
  for (std::size_t r = 1; r < ranks.size(); ++r) {
    const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
    const auto add = [](auto& to, const auto& from) {
      for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
    };
    append(all.y, ranks[r].y);
    append(all.dx, ranks[r].dx);
    append(all.up, ranks[r].up);
    append(all.down, ranks[r].down);
    add(all.gate, ranks[r].gate);
    add(all.shared_up, ranks[r].shared_up);
    add(all.losses, ranks[r].losses);
    all.dropped += ranks[r].dropped;
    all.dropped_by_capacity += ranks[r].dropped_by_capacity;
    CHECK(all.load == ranks[r].load);
    CHECK(all.bias == ranks[r].bias);
  }
  return all;
}

// That evaluation gives the bits of an earlier pass.
template <class Layer>
void check_eval(rank_layer<Layer>& layer, const outcome& earlier) {
  layer.poison();
  layer.step(ts::pass::eval);
  layer.sync();
  CHECK(same_bits(layer.results().y, earlier.y));
}

// That two ways gave the same bits.
inline void check_same(const outcome& a, const outcome& b) {
  CHECK(same_bits(a.y, b.y));
  CHECK(same_bits(a.dx, b.dx));
  CHECK(a.gate == b.gate);
  CHECK(a.up == b.up);
  CHECK(a.down == b.down);
  CHECK(a.shared_up == b.shared_up);
  CHECK(a.dropped_by_capacity == b.dropped_by_capacity);
}

inline void check_near(const char* name, const std::vector<double>& got, const std::vector<double>& expected,
                       double bound) {
  const std::string which = name;
  CAPTURE(which);
  CHECK(device_test::relative_error(got, expected) <= bound);
}

// That rows and the gradients of what every layer has are the host's, which are in double of the same bf16 numbers.
inline void check_rows_and_gradients(const outcome& got, const layer_result& expected) {
  check_near("y", widened(got.y), expected.y, 1e-2);
  check_near("dx", widened(got.dx), expected.dx, 1e-2);
  check_near("gate", widened(got.gate), expected.gate, 2e-2);
  check_near("up", widened(got.up), expected.up, 1e-2);
  check_near("down", widened(got.down), expected.down, 1e-2);
  CHECK(got.load == expected.load);
}

// The same of all that a step leaves behind.
inline void check_step(const outcome& got, const layer_result& expected) {
  check_rows_and_gradients(got, expected);
  check_near("shared_up", widened(got.shared_up), expected.shared_up, 1e-2);
  check_near("losses", widened(got.losses), expected.losses, 1e-4);
  CHECK(widened(got.bias) == expected.bias);
}

}  // namespace layer_ranks
