// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// A layer over a global batch on any number of ranks: the same problem, cut differently, must give the same answer.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include <tessera/comm/comm.hpp>
#include <tessera/layout/layout.hpp>
#include <tessera/moe/moe.hpp>

#include "cast.hpp"

namespace tessera_test {

namespace ts = tessera;

// Everything about a problem that does not depend on ranks. Values are doubles that the storage type holds exactly.
struct layer_problem {
  ts::shape sizes;  // max_tokens is set by the split
  std::int64_t num_tokens = 0;
  std::int64_t chunk_tokens = 0;
  std::vector<std::int32_t>
      sequence_offsets;  // of the global batch; ranks are split at sequence borders where it matters
  std::vector<std::int32_t> token_ids;
  std::vector<std::int32_t> expert_ids;
  std::vector<double> x, dy;                         // [T, d]
  std::vector<double> residual;                      // [T, d]; empty: none
  std::vector<double> gate, gate_bias;               // [E, d], [E]
  std::vector<double> up, down, up_bias, down_bias;  // [E, ...]
  std::vector<double> shared_up, shared_down, shared_up_bias, shared_down_bias;
  std::vector<double> bias;  // of balance::bias
};

// What a forward and backward over the global batch gave, in global order.
struct layer_result {
  std::vector<double> y, dx;
  std::vector<double> gate, gate_bias;
  std::vector<double> up, down, up_bias, down_bias;
  std::vector<double> shared_up, shared_down, shared_up_bias, shared_down_bias;
  std::vector<double> losses;      // [num_losses], summed in the order of chunks
  std::vector<std::int64_t> load;  // [E] of all ranks
  std::vector<double> bias;        // after end_step
  std::int64_t dropped_by_capacity = 0;
};

// Random values that are exact in bf16 if `coarse`.
inline std::vector<double> random_values(std::int64_t count, double scale, std::uint32_t seed, bool coarse = false) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<double> values(static_cast<std::size_t>(count));
  for (double& v : values) {
    v = scale * normal(engine);
    if (coarse) v = widen(to_storage<ts::bfloat16>(v));
  }
  return values;
}

// Fills a problem with random numbers. `gated`: the up-projection has two outputs per unit.
inline layer_problem make_problem(ts::shape sizes, std::int64_t num_tokens, bool gated, std::uint32_t seed,
                                  bool coarse = false) {
  layer_problem p;
  p.sizes = sizes;
  p.num_tokens = num_tokens;
  const std::int64_t d = sizes.hidden, n = sizes.intermediate, e = sizes.num_experts;
  const std::int64_t u = (gated ? 2 : 1) * n, ns = n * sizes.num_shared_experts, us = u * sizes.num_shared_experts;
  const auto fill = [&](std::int64_t count, double scale) { return random_values(count, scale, seed++, coarse); };
  p.x = fill(num_tokens * d, 1);
  p.dy = fill(num_tokens * d, 1);
  p.gate = fill(e * d, 0.5);
  if (sizes.gate_bias) p.gate_bias = fill(e, 0.3);
  p.up = fill(e * u * d, 0.4);
  p.down = fill(e * d * n, 0.4);
  p.shared_up = fill(us * d, 0.4);
  p.shared_down = fill(d * ns, 0.4);
  if (sizes.expert_bias) {
    p.up_bias = fill(e * u, 0.3);
    p.down_bias = fill(e * d, 0.3);
    p.shared_up_bias = fill(us, 0.3);
    p.shared_down_bias = fill(sizes.num_shared_experts > 0 ? d : 0, 0.3);
  }
  p.bias = random_values(e, 0.05, seed++, true);
  p.sequence_offsets = {0, static_cast<std::int32_t>(num_tokens)};
  std::mt19937 engine(seed++);
  std::vector<std::int32_t> order(static_cast<std::size_t>(e));
  for (std::int32_t i = 0; i < e; ++i) order[std::size_t(i)] = i;
  for (std::int64_t t = 0; t < num_tokens; ++t) {
    p.token_ids.push_back(static_cast<std::int32_t>(engine() % 5));
    std::shuffle(order.begin(), order.end(), engine);
    p.expert_ids.insert(p.expert_ids.end(), order.begin(), order.begin() + sizes.top_k);
  }
  return p;
}

// Per-expert arrays [E, width] of which a rank takes the rows of its slots, and puts them back.
template <class T, class Layout>
std::vector<T> local_rows(const std::vector<double>& global, std::int64_t width, const Layout& placement, int rank) {
  std::vector<T> out;
  if (global.empty()) return out;
  for (int slot = 0; slot < placement.num_slots(rank); ++slot) {
    const double* row = global.data() + placement.expert_at(rank, slot) * width;
    for (std::int64_t j = 0; j < width; ++j) out.push_back(to_storage<T>(row[j]));
  }
  return out;
}

template <class T, class Layout>
void put_rows(std::vector<double>& global, const std::vector<T>& local, std::int64_t width, const Layout& placement,
              int rank) {
  for (int slot = 0; slot < placement.num_slots(rank) && !local.empty(); ++slot)
    for (std::int64_t j = 0; j < width; ++j)
      global[std::size_t(placement.expert_at(rank, slot) * width + j)] = widen(local[std::size_t(slot * width + j)]);
}

template <class T>
T* data_or_null(std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

// One rank of a problem: its part of the batch, its experts, the layer and all memory.
template <class Layer>
struct layer_rank {
  using S = typename Layer::storage;
  using A = typename Layer::accumulate;
  using G = typename Layer::experts_type::gradient;
  using Comm = typename Layer::communicator_type;
  using Layout = typename Layer::layout_type;

  layer_rank(const layer_problem& p_, const Layout& placement_, Comm& comm_, std::int64_t first_, std::int64_t count_,
             std::int64_t max_tokens, typename Layer::router_options routing, typename Layer::options chosen)
      : p(p_), placement(placement_), comm(comm_), first(first_), count(count_), sizes(p_.sizes) {
    sizes.max_tokens = max_tokens;
    chosen.chunk_tokens = p.chunk_tokens;
    const auto bytes = Layer::sizes(sizes, placement, comm.rank(), chosen);
    state = ts::host_buffer(bytes.state_bytes);
    saved = ts::host_buffer(bytes.saved_bytes);
    deferred = ts::host_buffer(bytes.deferred_bytes);
    workspace = ts::host_buffer(std::max(bytes.workspace_bytes, bytes.eval_workspace_bytes));
    poison(saved);
    poison(deferred);
    poison(workspace);
    layer.emplace(sizes, routing, placement, comm, state, chosen);
    layer->reset_state({});
    if (layer->state().bias != nullptr)
      for (int e = 0; e < sizes.num_experts; ++e) layer->state().bias[e] = static_cast<float>(p.bias[std::size_t(e)]);

    const std::int64_t d = sizes.hidden, n = sizes.intermediate;
    u = Layer::experts_type::gated ? 2 * n : n;
    x = cast<S>(std::span(p.x).subspan(std::size_t(first * d), std::size_t(count * d)));
    dy = cast<S>(std::span(p.dy).subspan(std::size_t(first * d), std::size_t(count * d)));
    if (!p.residual.empty())
      residual = cast<S>(std::span(p.residual).subspan(std::size_t(first * d), std::size_t(count * d)));
    y.resize(x.size());
    dx.resize(x.size());
    gate = cast<A>(p.gate);
    gate_bias = cast<A>(p.gate_bias);
    up = local_rows<S>(p.up, u * d, placement, comm.rank());
    down = local_rows<S>(p.down, d * n, placement, comm.rank());
    up_bias = local_rows<S>(p.up_bias, u, placement, comm.rank());
    down_bias = local_rows<S>(p.down_bias, d, placement, comm.rank());
    shared_up = cast<S>(p.shared_up);
    shared_down = cast<S>(p.shared_down);
    shared_up_bias = cast<S>(p.shared_up_bias);
    shared_down_bias = cast<S>(p.shared_down_bias);
    // Sequences of this rank, as its own offsets.
    sequences = {0};
    for (const auto end : p.sequence_offsets)
      if (end > first && end < first + count) sequences.push_back(static_cast<std::int32_t>(end - first));
    if (count > 0) sequences.push_back(static_cast<std::int32_t>(count));

    chunks = ts::num_chunks(count, p.chunk_tokens);
    gate_grad.assign(std::size_t(chunks) * gate.size(), A{99});
    gate_bias_grad.assign(std::size_t(chunks) * gate_bias.size(), A{99});
    up_grad.assign(up.size(), to_storage<G>(99));
    down_grad.assign(down.size(), to_storage<G>(99));
    up_bias_grad.assign(up_bias.size(), to_storage<G>(99));
    down_bias_grad.assign(down_bias.size(), to_storage<G>(99));
    shared_up_grad.assign(std::size_t(chunks) * shared_up.size(), A{99});
    shared_down_grad.assign(std::size_t(chunks) * shared_down.size(), A{99});
    shared_up_bias_grad.assign(std::size_t(chunks) * shared_up_bias.size(), A{99});
    shared_down_bias_grad.assign(std::size_t(chunks) * shared_down_bias.size(), A{99});
  }

  static void poison(ts::host_buffer& buffer) {
    if (buffer.size() > 0) std::memset(buffer.data(), 0xff, buffer.size());  // NaN in every floating type
  }

  typename Layer::inputs inputs() const {
    return {.x = {x.data(), count, sizes.hidden},
            .token_ids = std::span(p.token_ids).subspan(std::size_t(first), std::size_t(count)),
            .expert_ids = {p.expert_ids.data() + first * sizes.top_k, count, sizes.top_k},
            .sequence_offsets = sequences,
            .residual = {residual.data(), count, sizes.hidden}};
  }
  typename Layer::weights weights() {
    return {.gate = {gate.data(), sizes.num_experts, sizes.hidden},
            .gate_bias = data_or_null(gate_bias),
            .experts = {up.data(), down.data(), data_or_null(up_bias), data_or_null(down_bias)},
            .shared = {data_or_null(shared_up), data_or_null(shared_down), data_or_null(shared_up_bias),
                       data_or_null(shared_down_bias)}};
  }
  typename Layer::gradients gradients() {
    return {.gate = gate_grad.data(),
            .gate_bias = data_or_null(gate_bias_grad),
            .experts = {up_grad.data(), down_grad.data(), data_or_null(up_bias_grad), data_or_null(down_bias_grad)},
            .shared = {data_or_null(shared_up_grad), data_or_null(shared_down_grad), data_or_null(shared_up_bias_grad),
                       data_or_null(shared_down_bias_grad)}};
  }
  ts::matrix_view<S> y_view() { return {y.data(), count, sizes.hidden}; }
  ts::matrix_view<const S> dy_view() const { return {dy.data(), count, sizes.hidden}; }
  ts::matrix_view<S> dx_view() { return {dx.data(), count, sizes.hidden}; }

  void forward(ts::pass mode) { layer->forward({}, mode, inputs(), weights(), y_view(), saved, workspace); }
  void backward_input() {
    layer->backward_input({}, inputs(), dy_view(), weights(), saved, dx_view(), deferred, workspace);
  }
  void backward_weights(ts::write mode = ts::write::overwrite) {
    layer->backward_weights({}, inputs(), dy_view(), saved, deferred, gradients(), mode);
  }

  const layer_problem& p;
  Layout placement;
  Comm& comm;
  std::int64_t first, count, u = 0, chunks = 0;
  ts::shape sizes;
  ts::host_buffer state, saved, deferred, workspace;
  std::optional<Layer> layer;
  std::vector<std::int32_t> sequences;
  std::vector<S> x, dy, residual, y, dx, up, down, up_bias, down_bias, shared_up, shared_down, shared_up_bias,
      shared_down_bias;
  std::vector<A> gate, gate_bias, gate_grad, gate_bias_grad;
  std::vector<G> up_grad, down_grad, up_bias_grad, down_bias_grad;
  std::vector<A> shared_up_grad, shared_down_grad, shared_up_bias_grad, shared_down_bias_grad;
};

// Sums `local [chunks, width]` of all ranks in the order of chunks, into rank 0's `out`; a plain loop, not the
// library's reduction.
template <class Comm, class A>
void sum_chunks(Comm& comm, const std::vector<A>& local, std::int64_t chunks, std::vector<double>& out) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(comm.size()));
  comm.all_gather(ts::host_stream{}, &chunks, all.data(), 1);
  const std::int64_t width = chunks == 0 ? 0 : static_cast<std::int64_t>(local.size()) / chunks;
  std::int64_t most = 0, widest = width;
  for (const auto c : all) most = std::max(most, c);
  comm.all_reduce(ts::host_stream{}, &width, &widest, 1, ts::reduce_op::max);
  std::vector<A> mine(std::size_t(most * widest)), gathered(std::size_t(most * widest) * std::size_t(comm.size()));
  std::copy(local.begin(), local.end(), mine.begin());
  comm.all_gather(ts::host_stream{}, mine.data(), gathered.data(), most * widest);
  if (comm.rank() != 0) return;
  std::vector<A> sum(std::size_t(widest), A{0});
  for (int r = 0; r < comm.size(); ++r)
    for (std::int64_t c = 0; c < all[std::size_t(r)]; ++c)
      for (std::int64_t j = 0; j < widest; ++j)
        sum[std::size_t(j)] += gathered[std::size_t((r * most + c) * widest + j)];
  out.assign(sum.begin(), sum.end());
}

// Forward, backward and end_step of the global batch on `placement.num_ranks()` ranks, tokens split at `offsets`.
template <class Layer>
layer_result run_problem(const layer_problem& p, const typename Layer::layout_type& placement,
                         const std::vector<std::int64_t>& offsets, typename Layer::router_options routing,
                         typename Layer::options chosen) {
  using A = typename Layer::accumulate;
  std::int64_t most = 1;
  for (std::size_t r = 1; r < offsets.size(); ++r) most = std::max(most, offsets[r] - offsets[r - 1]);
  layer_result result;
  result.y.resize(p.x.size());
  result.dx.resize(p.x.size());
  result.up.resize(p.up.size());
  result.down.resize(p.down.size());
  result.up_bias.resize(p.up_bias.size());
  result.down_bias.resize(p.down_bias.size());
  ts::comm::threads::run(placement.num_ranks(), [&](ts::comm::threads& comm) {
    const auto me = static_cast<std::size_t>(comm.rank());
    layer_rank<Layer> rank(p, placement, comm, offsets[me], offsets[me + 1] - offsets[me], most, routing, chosen);
    rank.forward(ts::pass::train);
    rank.backward_input();
    rank.backward_weights();
    const std::int64_t d = p.sizes.hidden, n = p.sizes.intermediate;
    for (std::size_t i = 0; i < rank.y.size(); ++i) {
      result.y[std::size_t(rank.first * d) + i] = widen(rank.y[i]);
      result.dx[std::size_t(rank.first * d) + i] = widen(rank.dx[i]);
    }
    // Copies of replicated experts see different tokens.
    const auto sum_replicas = [&](auto& grads, std::int64_t width) {
      auto scratch = grads;
      scratch.resize(std::size_t(ts::replica_workspace_elements(placement, width)));
      ts::sum_replica_gradients<A>({}, comm, placement, grads.data(), width, scratch.data());
    };
    sum_replicas(rank.up_grad, rank.u * d);
    sum_replicas(rank.down_grad, d * n);
    if (!p.up_bias.empty()) {
      sum_replicas(rank.up_bias_grad, rank.u);
      sum_replicas(rank.down_bias_grad, d);
    }
    comm.barrier(ts::host_stream{});
    for (int r = 0; r < comm.size(); ++r) {  // one after another: replicas write the same rows
      if (r == comm.rank()) {
        result.dropped_by_capacity += *rank.layer->state().dropped_by_capacity;
        put_rows(result.up, rank.up_grad, rank.u * d, placement, r);
        put_rows(result.down, rank.down_grad, d * n, placement, r);
        put_rows(result.up_bias, rank.up_bias_grad, rank.u, placement, r);
        put_rows(result.down_bias, rank.down_bias_grad, d, placement, r);
      }
      comm.barrier(ts::host_stream{});
    }
    sum_chunks(comm, rank.gate_grad, rank.chunks, result.gate);
    sum_chunks(comm, rank.gate_bias_grad, rank.chunks, result.gate_bias);
    sum_chunks(comm, rank.shared_up_grad, rank.chunks, result.shared_up);
    sum_chunks(comm, rank.shared_down_grad, rank.chunks, result.shared_down);
    sum_chunks(comm, rank.shared_up_bias_grad, rank.chunks, result.shared_up_bias);
    sum_chunks(comm, rank.shared_down_bias_grad, rank.chunks, result.shared_down_bias);
    const auto& state = rank.layer->state();
    sum_chunks(comm, std::vector<A>(state.losses, state.losses + rank.chunks * Layer::num_losses), rank.chunks,
               result.losses);
    rank.layer->end_step({}, comm);
    if (comm.rank() != 0) return;
    result.load.assign(state.global_load, state.global_load + p.sizes.num_experts);
    if (state.bias != nullptr) result.bias.assign(state.bias, state.bias + p.sizes.num_experts);
  });
  return result;
}

}  // namespace tessera_test
