// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The router, its backward, combine and permute on one GPU, on N(0, 1) logits and rows. A figure is the median over
// replays of a graph with several launches, divided by their number; `alone_us` is the median of single launches on an
// idle stream. Logits stay in L2 between launches where they fit. GB/s count the bytes that must be moved, and the
// share is that of a device-to-device copy in the same run.

#include <tessera/dispatch/dispatch.cuh>
#include <tessera/router/router.cuh>

#include "gpu_timing.cuh"

namespace {

namespace ts = tessera;
namespace score = ts::score;
namespace select = ts::select;
namespace weigh = ts::weigh;
namespace balance = ts::balance;
using namespace tessera_bench;

struct size {
  int tokens, experts, k;
};

std::string name_of(const char* what, const size& s) {
  return std::string(what) + "/T" + std::to_string(s.tokens) + "/E" + std::to_string(s.experts) + "/K" +
         std::to_string(s.k);
}

// Measures `work(stream)`, which moves `bytes`.
template <class F>
void measure(benchmark::State& state, double bytes, int launches, F&& work) {
  const double guess_us = std::max(bytes / 1e6, 10.0);
  const double us = median_us(
                        [&](cudaStream_t stream) {
                          for (int i = 0; i < launches; ++i) work(stream);
                        },
                        guess_us * launches) /
                    launches;
  report_time(state, us, 0);
  state.counters["alone_us"] = median_alone_us(work, guess_us);
  report_bytes(state, us, bytes);
}

// Everything a router reads and writes.
struct routing_memory {
  size s;
  device_array<float> logits, bias, weights, pair_weights, dweights, dlogits, losses, coefficients;
  device_array<std::int32_t> ids, row_offsets, gather, row_of;
  device_array<std::int64_t> counts;
  device_array<std::uint32_t> barrier;
  device_array<std::uint8_t> block_counts;

  explicit routing_memory(const size& s_)
      : s(s_),
        logits(elements(), 7, 1),
        bias(s.experts),
        weights(pairs()),
        pair_weights(pairs()),
        dweights(pairs(), 8, 1),
        dlogits(elements()),
        losses(8),
        coefficients(8),
        ids(pairs()),
        row_offsets(s.experts + 1),
        gather(pairs()),
        row_of(pairs()),
        counts(ts::balance_counts::size(s.experts)),
        barrier(1),
        block_counts(ts::router_workspace::block_count_bytes(s.experts)) {
    bias.set_bytes(0);
    barrier.set_bytes(0);
    coefficients.set(std::vector<float>(8, 0.01f));
  }
  std::int64_t elements() const { return std::int64_t{s.tokens} * s.experts; }
  std::int64_t pairs() const { return std::int64_t{s.tokens} * s.k; }
  ts::router_inputs<float> inputs(bool with_bias) const {
    ts::router_inputs<float> in;
    in.logits = {logits.data(), s.tokens, s.experts};
    if (with_bias) in.bias = bias.data();
    return in;
  }
  ts::routing<float> out() const { return {{ids.data(), s.tokens, s.k}, {weights.data(), s.tokens, s.k}}; }
  ts::balance_counts local() const { return {counts.data(), s.experts}; }
  ts::router_lists<float> lists() const {
    return {row_offsets.data(), gather.data(), row_of.data(), pair_weights.data()};
  }
  ts::router_workspace workspace() const { return {barrier.data(), block_counts.data()}; }
};

template <class Router>
Router make_router(const size& s) {
  typename Router::options options;
  options.num_experts = s.experts;
  options.top_k = s.k;
  if constexpr (Router::select_type::by == ts::select_by::group) options.select = {.groups = 8, .kept_groups = 4};
  return Router(options);
}

template <class Router>
void add_router(const char* name, const size& s) {
  add_case(name_of(name, s), [=](benchmark::State& state) {
    const routing_memory m(s);
    const Router router = make_router<Router>(s);
    const double bytes = 4.0 * static_cast<double>(m.elements()) + 20.0 * static_cast<double>(m.pairs());
    measure(state, bytes, 20, [&](cudaStream_t stream) {
      ts::route_sorted(stream, router, m.inputs(Router::has_bias), m.out(), m.local(), m.lists(), m.workspace());
    });
  });
}

// A router's gradient and its losses, after a forward pass.
template <class Router>
struct trained {
  explicit trained(const size& s) : m(s), router(make_router<Router>(s)), counts(m.local()) {
    router.route(ts::device_stream(cudaStreamLegacy), m.inputs(false), m.out(), m.local());
  }
  routing_memory m;
  Router router;
  ts::const_balance_counts counts;
};

template <class Router>
void add_backward(const std::string& name, const size& s) {
  add_case(name_of((name + "_backward").c_str(), s), [=](benchmark::State& state) {
    const trained<Router> t(s);
    const routing_memory& m = t.m;
    const double bytes = 8.0 * static_cast<double>(m.elements()) + 8.0 * static_cast<double>(m.pairs());
    measure(state, bytes, 20, [&](cudaStream_t stream) {
      t.router.backward(ts::device_stream(stream), m.inputs(false), m.out(),
                        ts::matrix_view<const float>(m.dweights.data(), s.tokens, s.k), t.counts, m.coefficients.data(),
                        1.0f, ts::matrix_view<float>(m.dlogits.data(), s.tokens, s.experts));
    });
  });
  if constexpr (Router::num_losses > 0) {
    add_case(name_of((name + "_losses_with_scratch").c_str(), s), [=](benchmark::State& state) {
      const trained<Router> t(s);
      const device_array<float> token_losses(std::int64_t{s.tokens} * Router::num_losses);
      measure(state, 4.0 * static_cast<double>(t.m.elements()), 20, [&](cudaStream_t stream) {
        t.router.losses(ts::device_stream(stream), t.m.inputs(false), t.counts, t.m.coefficients.data(), 0,
                        ts::matrix_view<float>(t.m.losses.data(), 1, Router::num_losses), token_losses.data());
      });
    });
    add_case(name_of((name + "_losses").c_str(), s), [=](benchmark::State& state) {
      const trained<Router> t(s);
      measure(state, 4.0 * static_cast<double>(t.m.elements()), 20, [&](cudaStream_t stream) {
        t.router.losses(ts::device_stream(stream), t.m.inputs(false), t.counts, t.m.coefficients.data(), 0,
                        ts::matrix_view<float>(t.m.losses.data(), 1, Router::num_losses));
      });
    });
  }
}

// Tokens, and a row for each pair of theirs.
template <class S>
struct row_case {
  row_case(const size& size_, int hidden_)
      : s(size_), hidden(hidden_), m(s), rows(m.pairs() * hidden, 9, 1), x(std::int64_t{s.tokens} * hidden, 10, 1) {
    using router_type = ts::router<score::softmax, select::top_k, weigh::normalized>;
    ts::route_sorted(cudaStreamLegacy, make_router<router_type>(s), m.inputs(false), m.out(), m.local(), m.lists(),
                     m.workspace());
  }
  double bytes() const { return static_cast<double>(x.size()) * sizeof(S) * (1 + s.k); }
  ts::matrix_view<S> pair_rows() const { return {rows.data(), m.pairs(), hidden}; }
  ts::matrix_view<S> token_rows() const { return {x.data(), s.tokens, hidden}; }

  size s;
  int hidden;
  routing_memory m;
  device_array<S> rows, x;
};

template <class S>
void add_rows(const char* type, const size& s, int hidden) {
  // `work(stream, c)`
  const auto add = [=](const char* what, auto work) {
    add_case(name_of((std::string(what) + "<" + type + ">").c_str(), s) + "/d" + std::to_string(hidden),
             [=](benchmark::State& state) {
               const row_case<S> c(s, hidden);
               measure(state, c.bytes(), 4, [&](cudaStream_t stream) { work(stream, c); });
             });
  };
  const auto combine = [=](cudaStream_t stream, const row_case<S>& c, const float* weights) {
    ts::combine_rows(stream, ts::matrix_view<const S>(c.pair_rows()), c.m.row_of.data(),
                     ts::matrix_view<const float>(weights, s.tokens, s.k), ts::matrix_view<const S>{}, c.token_rows());
  };
  add("combine", [=](cudaStream_t stream, const row_case<S>& c) { combine(stream, c, c.m.weights.data()); });
  add("combine_unweighted", [=](cudaStream_t stream, const row_case<S>& c) { combine(stream, c, nullptr); });
  add("expand_rows", [=](cudaStream_t stream, const row_case<S>& c) {
    ts::expand_rows(stream, ts::matrix_view<const S>(c.token_rows()), c.m.row_of.data(), s.k, c.pair_rows());
  });
  add("permute", [=](cudaStream_t stream, const row_case<S>& c) {
    ts::permute(stream, ts::matrix_view<const S>(c.token_rows()), c.m.lists().rows(s.experts), c.pair_rows());
  });
}

}  // namespace

int main(int argc, char** argv) {
  add_case("copy_1GiB", [](benchmark::State& state) {
    constexpr double bytes = 2.0 * (std::int64_t{1} << 30);
    report_time(state, bytes / copy_gbs() * 1e-3, 0);
    report_bytes(state, state.counters["us"], bytes);
  });
  using softmax = ts::router<score::softmax, select::top_k, weigh::normalized>;
  using sigmoid = ts::router<score::sigmoid, select::top_k, weigh::normalized, balance::bias>;
  using grouped = ts::router<score::sigmoid, select::group_limited<>, weigh::normalized, balance::bias>;
  using lossy = ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss, balance::z_loss>;
  for (const size& s : {size{8192, 256, 8}, size{8192, 128, 8}, size{32768, 256, 16}})
    add_router<softmax>("softmax", s);
  for (const size& s :
       {size{128, 256, 8}, size{8192, 256, 8}, size{32768, 256, 8}, size{8192, 512, 8}, size{8192, 1024, 32}})
    add_router<sigmoid>("sigmoid_bias", s);
  add_router<grouped>("sigmoid_bias_group_limited", {8192, 256, 8});
  add_backward<softmax>("softmax", {8192, 256, 8});
  add_backward<lossy>("softmax_switch_z", {8192, 256, 8});
  add_rows<ts::bfloat16>("bf16", {8192, 128, 8}, 2048);
  add_rows<ts::bfloat16>("bf16", {24576, 128, 8}, 1536);
  add_rows<ts::bfloat16>("bf16", {8192, 256, 8}, 7168);
  add_rows<float>("fp32", {8192, 128, 8}, 2048);
  return run_on_gpu(argc, argv);
}
