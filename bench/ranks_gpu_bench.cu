// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Dispatch, combine and the layer over the GPUs of this machine, one thread a GPU, or under mpirun one process a GPU. A
// figure is the median over repeats
// of the slowest rank's time, from events around a graph of several operations in a row, without the host between
// them; ranks are aligned before. `wire` counts the bytes that one rank sends to others, `logical` those that it would
// send with its own part among them. NCCL's collectives and peer copies move the same rows for comparison.

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <nccl.h>

#include <tessera/comm/symmetric.cuh>
#include <tessera/comm/threads.hpp>
#include <tessera/dispatch/expanded.cuh>
#include <tessera/dispatch/host_sized.cuh>
#include <tessera/dispatch/transport.cuh>
#include <tessera/layout/block.hpp>
#include <tessera/moe/moe_layer.cuh>

#include "rank_layer.cuh"
#include "rank_timing.cuh"

namespace {

namespace ts = tessera;
using namespace tessera_bench;
using ts::bfloat16;

// ---------------------------------------------------------------------------------------------------------------------
// Dispatch and combine

struct exchange_shape {
  std::int64_t T, d;
  int E, K;
  bool ordered = false;               // rows are added with combine::ordered
  ts::dispatch_options options = {};  // such as a capacity
  bool in_place = false;              // rows come home to where others have arrived
};

// One rank's memory, with uniform random routing.
struct exchange_case {
  exchange_case(ts::comm::symmetric& c, const exchange_shape& s, const ts::transport::automatic& t = {})
      : comm(c),
        shape(s),
        how(t),
        options(s.options),
        layout(s.E, c.size()),
        bounds(ts::dispatch_bounds::make(c.size(), s.E, layout.num_slots(c.rank()), s.K, s.T, options)),
        pairs(bounds.max_pairs * s.d),
        x(s.T * s.d, 7, 1),
        y(s.T * s.d),
        ids(s.T * s.K),
        weights(s.T * s.K) {
    ts::memory_builder counting;
    carve(counting);
    window_used = counting.bytes();
    const ts::workspace_memory memory(comm.allocate(window_used), window_used);
    ts::memory_builder builder(memory, "bench");
    carve(builder);
    require(cudaMemset(sort_barrier, 0, sizeof(*sort_barrier)), "cudaMemset");
    pairs.fill(8);
    std::mt19937 generator(static_cast<unsigned>(comm.rank()) + 1);
    std::vector<std::int32_t> chosen;
    std::vector<float> w;
    for (std::int64_t token = 0; token < s.T; ++token) {
      const std::size_t begin = chosen.size();
      std::uint32_t remote = 0;
      while (chosen.size() < begin + static_cast<std::size_t>(s.K)) {
        const auto id = static_cast<std::int32_t>(generator() % static_cast<unsigned>(s.E));
        if (std::find(chosen.begin() + static_cast<std::ptrdiff_t>(begin), chosen.end(), id) != chosen.end()) continue;
        chosen.push_back(id);
        w.push_back(1.0f / static_cast<float>(s.K));
        const int owner = layout.owner(id).rank;
        if (s.ordered) {
          ++rows_sent;
          rows_to_others += owner != comm.rank();
        } else {
          remote |= 1u << owner;
        }
      }
      for (int r = 0; r < comm.size(); ++r) {
        if (((remote >> r) & 1u) == 0) continue;
        ++rows_sent;
        rows_to_others += r != comm.rank();
      }
    }
    ids.set(chosen);
    weights.set(w);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  void carve(ts::memory_builder& b) {
    const std::int64_t rows = bounds.addressed_rows();
    workspace.tables = ts::routing_tables<float>::layout(b, bounds);
    received = {b.take<bfloat16>("received", rows * shape.d), rows, shape.d};
    returned = {b.take<bfloat16>("returned", shape.ordered || shape.in_place ? 0 : rows * shape.d), rows, shape.d};
    if (shape.in_place) returned = received;
    if (shape.ordered) {
      returned_pairs = ts::returned_rows<bfloat16>::layout(b, bounds, shape.d, ts::combine::ordered{});
    }
    const std::int64_t leaving = ts::outgoing_rows(how, bounds);
    outgoing = {b.take<bfloat16>("outgoing", leaving * shape.d), leaving, shape.d};
    handle = ts::dispatch_handle<float>::layout_device(b, bounds, true);
    workspace.capacity = ts::capacity_workspace<float>::layout(b, bounds, options);
    sort_barrier = b.take<std::uint32_t>("barrier", 1);
    workspace.sort = ts::router_workspace::layout(b, shape.E, sort_barrier);
  }

  void begin_lists(cudaStream_t stream) {
    const ts::routing<float> chosen{{ids.data(), shape.T, shape.K}, {weights.data(), shape.T, shape.K}};
    ts::exchange_routing_begin(stream, comm, layout, bounds, options, chosen, handle, workspace);
  }
  void rows(cudaStream_t stream) {
    ts::dispatch_begin(stream, comm, handle, tokens(), received, how);
    ts::dispatch_end(stream, comm, received, how);
  }
  void dispatch(cudaStream_t stream) {
    begin_lists(stream);
    ts::dispatch_begin(stream, comm, handle, tokens(), received, how);
    ts::exchange_routing_end(stream, comm);
    ts::dispatch_end(stream, comm, received, how);
  }
  // Rows in the order of experts, as they come, or by a kernel behind them.
  void dispatch_expanded(cudaStream_t stream) {
    begin_lists(stream);
    ts::dispatch_expanded_begin(stream, comm, handle, tokens(), received, expert_rows());
    ts::dispatch_expanded_end(stream, comm, received);
  }
  void dispatch_and_expand(cudaStream_t stream) {
    dispatch(stream);
    ts::expand_rows(stream, ts::matrix_view<const bfloat16>(received), handle.expert_row_of, shape.K, expert_rows());
  }
  ts::matrix_view<bfloat16> expert_rows() const { return {pairs.data(), bounds.max_pairs, shape.d}; }
  ts::matrix_view<const bfloat16> tokens() const { return {x.data(), shape.T, shape.d}; }
  void combine(cudaStream_t stream, ts::combine_source source) {
    if (shape.ordered) {
      ts::combine_pairs(stream, comm, handle, ts::matrix_view<const bfloat16>{pairs.data(), bounds.max_pairs, shape.d},
                        returned_pairs, ts::matrix_view<const float>{weights.data(), shape.T, shape.K},
                        ts::matrix_view<const bfloat16>{}, ts::matrix_view<bfloat16>{y.data(), shape.T, shape.d});
      return;
    }
    const auto from = source == ts::combine_source::expert_rows
                          ? ts::matrix_view<const bfloat16>{pairs.data(), bounds.max_pairs, shape.d}
                          : ts::matrix_view<const bfloat16>(received);
    ts::combine_rows(stream, comm, handle, ts::combine_weights::routing, source, from, returned,
                     ts::matrix_view<const bfloat16>{}, ts::matrix_view<bfloat16>{y.data(), shape.T, shape.d}, how,
                     outgoing);
  }

  ts::comm::symmetric& comm;
  exchange_shape shape;
  ts::transport::automatic how;
  ts::dispatch_options options;
  ts::layout::block layout;
  ts::dispatch_bounds bounds;
  ts::symmetric_routing_workspace<float> workspace;
  ts::matrix_view<bfloat16> received, returned, outgoing;
  ts::returned_rows<bfloat16> returned_pairs;
  ts::dispatch_handle<float> handle;
  std::uint32_t* sort_barrier = nullptr;
  device_array<bfloat16> pairs, x, y;
  device_array<std::int32_t> ids;
  device_array<float> weights;
  std::size_t window_used = 0;
  std::int64_t rows_sent = 0;
  std::int64_t rows_to_others = 0;
};

enum class operation { dispatch, rows, combine_rows, combine_sums, pair, lists, expanded, then_expanded };

void measure_exchange(benchmark::State& state, const exchange_shape& s, operation op, int sms,
                      const ts::transport::automatic& how) {
  double wire = 0, logical = 0, memory = 0;
  const double us = slowest_median_us(op == operation::pair ? 128 : 20, [&](ts::comm::symmetric& comm) {
    comm.set_num_sms(sms);
    auto c = std::make_shared<exchange_case>(comm, s, how);
    if (comm.rank() == 0) {
      const auto row_bytes = static_cast<double>(s.d * 2);
      const double all = static_cast<double>((comm.size() - 1) * s.T) * row_bytes;
      const double needed = static_cast<double>(c->rows_to_others) * row_bytes;
      const double there = how.dispatch() == ts::transport_kind::all_to_all ? needed : all;
      const double home = how.combine() == ts::transport_kind::copy_engines ? all : needed;
      const bool goes_home = op == operation::combine_rows || op == operation::combine_sums;
      wire = op == operation::pair ? there + home : (goes_home ? home : there);
      logical = static_cast<double>(c->rows_sent) * row_bytes * (op == operation::pair ? 2 : 1);
      memory = static_cast<double>(c->window_used);
      if (op == operation::expanded) memory += static_cast<double>(c->pairs.size() * 2);
    }
    return rank_work{[c](cudaStream_t stream) { c->dispatch(stream); },
                     [c, op](cudaStream_t stream) {
                       if (op == operation::lists) {
                         c->begin_lists(stream);
                         ts::exchange_routing_end(stream, c->comm);
                       }
                       if (op == operation::dispatch || op == operation::pair) c->dispatch(stream);
                       if (op == operation::rows) c->rows(stream);
                       if (op == operation::expanded) c->dispatch_expanded(stream);
                       if (op == operation::then_expanded) c->dispatch_and_expand(stream);
                       if (op == operation::combine_rows || op == operation::pair)
                         c->combine(stream, ts::combine_source::expert_rows);
                       if (op == operation::combine_sums) c->combine(stream, ts::combine_source::summed_rows);
                     }};
  });
  report_time(state, us, 0);
  if (op == operation::lists) return;
  state.counters["wire_gb_per_s"] = wire / us * 1e-3;
  state.counters["logical_gb_per_s"] = logical / us * 1e-3;
  state.counters[op == operation::expanded ? "memory_bytes" : "window_bytes"] = memory;
}

// ---------------------------------------------------------------------------------------------------------------------
// Dispatch and combine by NCCL's sends and receives, with permutes and counts that the host waits for

// One rank's memory, beside that of an exchange with its routing.
struct host_sized_case : exchange_case {
  host_sized_case(ts::comm::symmetric& c, const exchange_shape& s) : exchange_case(c, s), grid(ts::grid_of(c.over())) {
    ts::memory_builder counting;
    carve_lists(counting);
    memory = std::make_unique<device_array<std::byte>>(static_cast<std::int64_t>(counting.bytes()));
    ts::memory_builder builder(ts::workspace_memory(memory->data(), counting.bytes()), "bench");
    carve_lists(builder);
  }
  void carve_lists(ts::memory_builder& b) {
    if (shape.ordered)
      carve_lists(b, ts::combine::ordered{});
    else
      carve_lists(b, ts::combine::reduced{});
  }
  template <class Combine>
  void carve_lists(ts::memory_builder& b, Combine where) {
    lists = ts::host_sized_lists::layout(b, bounds, grid, where);
    tables = ts::host_sized_tables<float>::layout(b, bounds, grid, workspace.sort, where);
    buffers = ts::host_sized_buffers::layout(b, bounds, grid, shape.d * 2, where);
  }
  void exchange(cudaStream_t stream) {
    const ts::routing<float> chosen{{ids.data(), shape.T, shape.K}, {weights.data(), shape.T, shape.K}};
    counts = ts::exchange_routing(stream, comm.over(), layout, bounds, options, chosen, handle, lists, tables);
  }
  void send(cudaStream_t stream) {
    ts::dispatch_rows(stream, comm.over(), counts, lists, ts::matrix_view<const bfloat16>{x.data(), shape.T, shape.d},
                      received, buffers);
  }
  void bring_home(cudaStream_t stream) {
    const ts::matrix_view<const bfloat16> outputs{pairs.data(), bounds.max_pairs, shape.d};
    const ts::matrix_view<bfloat16> sums{y.data(), shape.T, shape.d};
    if (shape.ordered)
      ts::combine_pairs(stream, comm.over(), counts, lists, bounds, outputs,
                        ts::matrix_view<const float>{weights.data(), shape.T, shape.K}, {}, sums, buffers);
    else
      ts::combine_rows(stream, comm.over(), counts, lists, handle, ts::combine_weights::routing, outputs,
                       ts::matrix_view<const bfloat16>{}, sums, buffers);
  }

  ts::host_grid grid;
  std::unique_ptr<device_array<std::byte>> memory;
  ts::host_sized_lists lists;
  ts::host_sized_tables<float> tables;
  ts::host_sized_buffers buffers;
  ts::host_sized_counts counts;
};

void measure_host_sized(benchmark::State& state, const exchange_shape& s, operation op) {
  double wire = 0, memory = 0;
  const double us = slowest_median_us(20, [&](ts::comm::symmetric& comm) {
    auto c = std::make_shared<host_sized_case>(comm, s);
    if (comm.rank() == 0) {
      wire = static_cast<double>(c->rows_to_others * s.d * 2);
      memory = static_cast<double>(c->memory->size());
    }
    const cudaStream_t once = make_stream();  // NCCL's threads would take the streams of threads for their own
    c->exchange(once);
    cudaStreamDestroy(once);
    return rank_work{{},
                     [c, op](cudaStream_t stream) {
                       if (op == operation::dispatch || op == operation::pair) c->exchange(stream);
                       if (op != operation::combine_rows) c->send(stream);
                       if (op == operation::combine_rows || op == operation::pair) c->bring_home(stream);
                     },
                     false};
  });
  report_time(state, us, 0);
  state.counters["wire_gb_per_s"] = (op == operation::pair ? 2 : 1) * wire / us * 1e-3;
  state.counters["memory_bytes"] = memory;
}

// ---------------------------------------------------------------------------------------------------------------------
// What else moves rows

enum class baseline { all_gather, reduce_scatter, send_receive, copy_engines, copy_own };

// @param streams Of copies to peers. @param captured Whether a graph is timed; copies in one may be others.
void measure_baseline(benchmark::State& state, const exchange_shape& s, baseline which, int streams, bool captured) {
  const int ranks = gpu_ranks::all().size();
  const std::int64_t count = s.T * s.d;
  const double us = slowest_median_us(10, [&](ts::comm::symmetric& comm) {
    auto rows = std::make_shared<device_array<bfloat16>>(count, 3, 1.0f);
    auto all = std::make_shared<device_array<bfloat16>>(ranks * count, 4, 1.0f);
    // Copy engines write to the window, where peers have an address for it.
    auto* const target = which == baseline::copy_engines
                             ? reinterpret_cast<bfloat16*>(comm.allocate(static_cast<std::size_t>(ranks * count) * 2))
                             : all->data();
    return rank_work{
        {},
        [&comm, rows, all, target, count, which, streams](cudaStream_t stream) {
          const int size = comm.size();
          const int rank = comm.rank();
          const auto bytes = static_cast<std::size_t>(count) * 2;
          if (which == baseline::all_gather) comm.all_gather(stream, rows->data(), target, count);
          if (which == baseline::reduce_scatter) {
            comm.call("bench", "ncclReduceScatter", [&](ncclComm_t c) {
              return static_cast<int>(ncclReduceScatter(target, rows->data(), static_cast<std::size_t>(count),
                                                        ncclBfloat16, ncclSum, c, stream));
            });
          }
          if (which == baseline::send_receive) {
            std::vector<ts::transfer> sends, receives;
            for (int r = 0; r < size; ++r) {
              if (r == rank) continue;
              sends.push_back({r, rows->data(), static_cast<std::int64_t>(bytes)});
              receives.push_back({r, target + r * count, static_cast<std::int64_t>(bytes)});
            }
            comm.exchange(stream, sends, receives);
          }
          if (which == baseline::copy_engines) {
            using ts::detail::symmetric::follow;
            const auto view = comm.view(ts::comm::symmetric_channel::rows);
            const auto lane = [&](int i) { return i == 0 ? ts::device_stream(stream) : comm.copy_stream(i); };
            for (int i = 1; i < streams; ++i) follow(comm, stream, lane(i));
            for (int step = 1; step < size; ++step) {
              const int r = (rank + step) % size;
              auto* const own = reinterpret_cast<std::byte*>(target + rank * count);
              require(cudaMemcpyAsync(view.peer[r] + (own - view.peer[rank]), rows->data(), bytes,
                                      cudaMemcpyDeviceToDevice, lane((step - 1) % streams).get()),
                      "cudaMemcpyAsync");
            }
            for (int i = 1; i < streams; ++i) follow(comm, lane(i), stream);
          }
          if (which == baseline::copy_own) {
            require(cudaMemcpyAsync(target, rows->data(), bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
          }
        },
        captured};
  });
  report_time(state, us, 0);
  if (which == baseline::copy_own) {
    report_bytes(state, us, static_cast<double>(2 * count * 2));
    return;
  }
  state.counters["wire_gb_per_s"] = static_cast<double>((ranks - 1) * count * 2) / us * 1e-3;
}

// ---------------------------------------------------------------------------------------------------------------------
// The layer

// A rank's layer with the memory of a micro-batch and tokens.
struct layer_case : rank_layer {
  layer_case(ts::comm::symmetric& comm, const layer_shape& s)
      : rank_layer(comm, s),
        saved(comm.allocate(bytes.saved_bytes), bytes.saved_bytes),
        deferred(comm.allocate(bytes.deferred_bytes), bytes.deferred_bytes),
        workspace(comm.allocate(bytes.workspace_bytes), bytes.workspace_bytes),
        x(s.T * s.d, static_cast<unsigned>(comm.rank()) + 11, 1),
        dy(s.T * s.d, static_cast<unsigned>(comm.rank()) + 21, 1),
        y(s.T * s.d),
        dx(s.T * s.d) {
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  spread_layer::inputs inputs() const { return {.x = ts::matrix_view<const bfloat16>(x.data(), tokens, sizes.hidden)}; }
  void forward(cudaStream_t stream) {
    moe.forward(stream, ts::pass::train, inputs(), weights(), {y.data(), tokens, sizes.hidden}, saved, workspace);
  }
  void backward(cudaStream_t stream) {
    const ts::matrix_view<const bfloat16> gradient{dy.data(), tokens, sizes.hidden};
    moe.backward_input(stream, inputs(), gradient, weights(), saved, {dx.data(), tokens, sizes.hidden}, deferred,
                       workspace);
    moe.backward_weights(stream, inputs(), gradient, saved, deferred, gradients(), ts::write::overwrite);
  }

  ts::saved_memory saved;
  ts::deferred_memory deferred;
  ts::workspace_memory workspace;
  device_array<bfloat16> x, dy, y, dx;
};

void measure_layer(benchmark::State& state, const layer_shape& s, bool backward) {
  const double unit = 2.0 * static_cast<double>(s.T) * s.K * static_cast<double>(s.n) * static_cast<double>(s.d);
  ts::layer_sizes bytes{};
  const double us = slowest_median_us(1, [&](ts::comm::symmetric& comm) {
    comm.set_num_sms(0);
    auto c = std::make_shared<layer_case>(comm, s);
    if (comm.rank() == 0) bytes = c->bytes;
    if (!backward) return rank_work{{}, [c](cudaStream_t stream) { c->forward(stream); }};
    // Backward consumes the saved H.
    return rank_work{[c](cudaStream_t stream) { c->forward(stream); },
                     [c](cudaStream_t stream) { c->backward(stream); }};
  });
  report_time(state, us, (backward ? 6 : 3) * unit);
  state.counters["saved_bytes"] = static_cast<double>(bytes.saved_bytes);
  state.counters["workspace_bytes"] = static_cast<double>(bytes.workspace_bytes);
  state.counters["deferred_bytes"] = static_cast<double>(bytes.deferred_bytes);
}

}  // namespace

int main(int argc, char** argv) {
  const auto exchange = [](const std::string& name, exchange_shape s, operation op, int sms,
                           const ts::transport::automatic& how = {}) {
    add_case(name + "/T:" + std::to_string(s.T) + (sms > 0 ? "/sms:" + std::to_string(sms) : ""),
             [=](benchmark::State& state) { measure_exchange(state, s, op, sms, how); });
  };
  const auto at = [](std::int64_t tokens) { return exchange_shape{.T = tokens, .d = 7168, .E = 256, .K = 8}; };
  for (const std::int64_t T : {128, 512, 1024, 2048, 4096, 8192}) {
    exchange("dispatch", at(T), operation::dispatch, 0);
    exchange("dispatch_cached", at(T), operation::rows, 0);
    exchange("combine_expert_rows", at(T), operation::combine_rows, 0);
    exchange("combine_summed_rows", at(T), operation::combine_sums, 0);
    exchange("pair", at(T), operation::pair, 0);
  }
  exchange("pair_in_place", {.T = 4096, .d = 7168, .E = 256, .K = 8, .in_place = true}, operation::pair, 0);
  // Rows of Qwen3-30B.
  const exchange_shape narrow{.T = 8192, .d = 2048, .E = 128, .K = 8};
  exchange("dispatch_d2048", narrow, operation::dispatch, 0);
  exchange("combine_expert_rows_d2048", narrow, operation::combine_rows, 0);
  exchange("combine_summed_rows_d2048", narrow, operation::combine_sums, 0);
  // For engines with products of their own; what arrives is bounded by twice an even share.
  for (const std::int64_t T : {128, 512, 1024, 2048, 4096, 8192}) {
    exchange("dispatch_expanded", {.T = T, .d = 7168, .E = 256, .K = 8, .in_place = true}, operation::expanded, 0);
    exchange("dispatch_then_expanded", at(T), operation::then_expanded, 0);
  }
  for (const std::int64_t T : {128, 4096}) {
    exchange("combine_ordered", {.T = T, .d = 7168, .E = 256, .K = 8, .ordered = true}, operation::combine_rows, 0);
  }
  for (const std::int64_t T : {128, 4096}) {
    exchange("lists", at(T), operation::lists, 0);
    exchange("lists_capacity", {.T = T, .d = 7168, .E = 256, .K = 8, .options = {.capacity_factor = 1}},
             operation::lists, 0);
    exchange("lists_capacity_by_weight",
             {.T = T, .d = 7168, .E = 256, .K = 8, .options = {.capacity_factor = 1, .order = ts::drop_order::weight}},
             operation::lists, 0);
  }
  for (const int sms : {4, 8, 12, 16, 24, 32, 48, 64, 96, 132}) {
    exchange("dispatch", at(4096), operation::dispatch, sms);
    exchange("combine_expert_rows", at(4096), operation::combine_rows, sms);
    exchange("combine_summed_rows", at(4096), operation::combine_sums, sms);
  }
  const auto host_sized = [&](const std::string& name, std::int64_t tokens, operation op, bool ordered = false) {
    exchange_shape s = at(tokens);
    s.ordered = ordered;
    add_case(name + "/T:" + std::to_string(tokens), [=](benchmark::State& state) { measure_host_sized(state, s, op); });
  };
  for (const std::int64_t T : {128, 1024, 4096}) {
    host_sized("nccl_dispatch", T, operation::dispatch);
    host_sized("nccl_dispatch_cached", T, operation::rows);
    host_sized("nccl_combine_expert_rows", T, operation::combine_rows);
    host_sized("nccl_pair", T, operation::pair);
    host_sized("nccl_combine_ordered", T, operation::combine_rows, true);
  }
  // Rows alone, by budget of SMs: with and without a copy of own rows beside the kernel.
  for (const int sms : {4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 132}) {
    exchange("dispatch_cached", at(4096), operation::rows, sms);
    exchange("dispatch_cached_own_copied", at(4096), operation::rows, sms,
             ts::transport::all_to_all{.copies_own_rows = true});
  }
  const int peers = std::max(gpu_ranks::count() - 1, 1);
  const auto transports = [&](const std::string& name, std::int64_t tokens, const ts::transport::automatic& how) {
    exchange(name + "/dispatch", at(tokens), operation::dispatch, 0, how);
    exchange(name + "/dispatch_cached", at(tokens), operation::rows, 0, how);
    exchange(name + "/combine_expert_rows", at(tokens), operation::combine_rows, 0, how);
    exchange(name + "/combine_summed_rows", at(tokens), operation::combine_sums, 0, how);
    exchange(name + "/pair", at(tokens), operation::pair, 0, how);
  };
  for (const std::int64_t T : {128, 512, 1024, 2048, 4096, 8192}) {
    exchange("all_gather/dispatch", at(T), operation::dispatch, 0, ts::transport::all_gather{});
    exchange("all_gather/dispatch_cached", at(T), operation::rows, 0, ts::transport::all_gather{});
    for (int streams = 1; streams <= peers; streams += std::max(peers - 1, 1)) {
      transports("copy_engines/streams:" + std::to_string(streams), T, ts::transport::copy_engines{.streams = streams});
    }
  }
  for (const int chunks : {1, 2, 3, 6, 8, 16}) {
    for (int streams = 1; streams <= peers; streams += std::max(peers - 1, 1)) {
      exchange("copy_engines/streams:" + std::to_string(streams) + "/chunks:" + std::to_string(chunks) +
                   "/combine_expert_rows",
               at(4096), operation::combine_rows, 0, ts::transport::copy_engines{.streams = streams, .chunks = chunks});
    }
  }
  const auto other = [&](const std::string& name, std::int64_t tokens, baseline which, int streams = 1,
                         bool captured = true) {
    add_case(name + "/T:" + std::to_string(tokens),
             [=](benchmark::State& state) { measure_baseline(state, at(tokens), which, streams, captured); });
  };
  for (const std::int64_t T : {128, 4096}) {
    other("nccl_all_gather", T, baseline::all_gather);
    other("nccl_reduce_scatter", T, baseline::reduce_scatter);
    other("nccl_send_receive", T, baseline::send_receive);
    other("copy_engines", T, baseline::copy_engines);
    if (peers > 1) other("copy_engines_beside_each_other", T, baseline::copy_engines, peers);
    other("copy_own_rows", T, baseline::copy_own);
    other("copy_own_rows_without_graph", T, baseline::copy_own, 1, false);
  }
  for (const layer_shape& s :
       {layer_shape{"Qwen3_30B_T8192", 8192, 2048, 768, 128, 8},
        layer_shape{"30B_n1024_T8192", 8192, 4096, 1024, 64, 4},
        layer_shape{"DeepSeek_V3_64_experts_a_GPU_T4096", 4096, 7168, 2048, 64 * std::max(gpu_ranks::count(), 1), 8}}) {
    for (const bool backward : {false, true}) {
      add_case(std::string("layer/") + s.name + (backward ? "/backward" : "/forward"),
               [=](benchmark::State& state) { measure_layer(state, s, backward); });
    }
  }
  return run_on_ranks(argc, argv);
}
