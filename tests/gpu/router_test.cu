// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The router's device half against its host half in double, and its lists against a sort of the ids it chose. Without a
// GPU it says so and exits with 77, which CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "../support/cast.hpp"
#include "device_fixture.cuh"

#include <tessera/router/router.cuh>

namespace {

namespace ts = tessera;
namespace score = ts::score;
namespace select = ts::select;
namespace weigh = ts::weigh;
namespace balance = ts::balance;
using device_test::buffer;
using device_test::relative_error;
using tessera_test::widened;

// Policies as a user writes them.
struct slow_tanh {
  struct options {
    float slope = 0.5f;
  };
  static constexpr ts::score_over over = ts::score_over::each;
  template <class A>
  TESSERA_HD static A value(A logit, const options& o) {
    return std::tanh(A(o.slope) * logit) + A(1.5);
  }
  template <class A>
  TESSERA_HD static A derivative(A, A value, const options& o) {
    const A h = value - A(1.5);
    return A(o.slope) * (A(1) - h * h);
  }
};
struct mean_of_group {
  template <class A>
  struct accumulator {
    A sum = A(0);
    A count = A(0);
    TESSERA_HD void add(A key) {
      sum += key;
      count += A(1);
    }
    TESSERA_HD A value() const { return sum / count; }
  };
};

struct shape {
  int tokens, experts, k, groups = 4, kept = 2;
};

template <class Select>
inline constexpr bool is_grouped = Select::by == ts::select_by::group;

// Device and host copies of what a router reads and writes.
template <class Router, class A = float>
struct problem {
  shape s;
  typename Router::options options;
  std::vector<A> logits;
  std::vector<float> bias;
  std::vector<std::int32_t> table, token_ids, given, offsets;
  std::vector<float> coefficients;
  buffer<A> d_logits, d_weights, d_pair_weights, d_dlogits, d_losses;
  buffer<float> d_bias, d_coefficients;
  buffer<std::int32_t> d_table, d_token_ids, d_given, d_offsets, d_ids, d_row_offsets, d_gather, d_row_of;
  buffer<std::int64_t> d_counts;
  buffer<std::uint32_t> d_barrier;
  buffer<std::uint8_t> d_block_counts;
  buffer<ts::device_status> d_status;

  static std::vector<std::int32_t> distinct(std::size_t rows, int experts, int k, bool holes) {
    std::vector<std::int32_t> ids;
    for (std::size_t r = 0; r < rows; ++r) {
      for (int i = 0; i < k; ++i)
        ids.push_back(
            static_cast<std::int32_t>((r * 7 + static_cast<std::size_t>(i)) % static_cast<std::size_t>(experts)));
      if (holes && r % 3 == 1) ids[r * static_cast<std::size_t>(k)] = ts::no_expert;
      if (holes && r % 11 == 5) std::fill(ids.end() - k, ids.end(), ts::no_expert);
    }
    return ids;
  }
  static std::vector<float> some_bias(int experts) {
    std::vector<float> b;
    for (int e = 0; e < experts; ++e) b.push_back(0.02f * static_cast<float>((e * 5) % 7) - 0.06f);
    return b;
  }
  static std::vector<std::int32_t> some_offsets(int tokens) {
    std::vector<std::int32_t> o = {0, tokens / 3, tokens / 3, tokens / 2, tokens};
    return o;
  }

  problem(const shape& shape_, unsigned seed, double spread = 2.0)
      : s(shape_),
        logits(static_cast<std::size_t>(s.tokens) * s.experts),
        bias(some_bias(s.experts)),
        table(distinct(5, s.experts, s.k, false)),
        given(distinct(static_cast<std::size_t>(s.tokens), s.experts, s.k, true)),
        offsets(some_offsets(s.tokens)),
        d_logits(logits.size()),
        d_weights(pairs()),
        d_pair_weights(pairs()),
        d_dlogits(logits.size()),
        d_losses(64),
        d_bias(bias),
        d_coefficients(8),
        d_table(table),
        d_token_ids(static_cast<std::size_t>(s.tokens)),
        d_given(given),
        d_offsets(offsets),
        d_ids(pairs()),
        d_row_offsets(static_cast<std::size_t>(s.experts) + 1),
        d_gather(pairs()),
        d_row_of(pairs()),
        d_counts(static_cast<std::size_t>(s.experts) + 2),
        d_barrier(1),
        d_block_counts(static_cast<std::size_t>(ts::router_workspace::block_count_bytes(s.experts))),
        d_status(1) {
    d_barrier.fill(0);
    d_status.fill(0);
    randomize(seed, spread);
    for (int t = 0; t < s.tokens; ++t) token_ids.push_back((t * 3) % 5);
    d_token_ids.set(token_ids);
    for (int i = 0; i < Router::num_losses; ++i) coefficients.push_back(0.5f + 0.25f * static_cast<float>(i));
    coefficients.resize(8);
    d_coefficients.set(coefficients);
    options = host_options();
    if constexpr (Router::needs_token_ids) options.select.table = d_table.data();
  }
  std::size_t pairs() const { return static_cast<std::size_t>(s.tokens) * static_cast<std::size_t>(s.k); }
  void randomize(unsigned seed, double spread = 2.0) {
    const std::vector<float> values = device_test::normal(logits.size(), seed, spread);
    logits.assign(values.begin(), values.end());
    d_logits.set(logits);
  }
  typename Router::options host_options() const {
    typename Router::options o;
    o.num_experts = s.experts;
    o.top_k = s.k;
    o.weigh.scale = 2.5f;
    if constexpr (is_grouped<typename Router::select_type>) o.select = {.groups = s.groups, .kept_groups = s.kept};
    if constexpr (Router::needs_token_ids) o.select = {.table = table.data(), .vocab = 5};
    return o;
  }
  static std::span<const std::int32_t> used(bool use, const std::int32_t* data, std::size_t size) {
    return use ? std::span<const std::int32_t>(data, size) : std::span<const std::int32_t>();
  }
  template <class B>
  ts::router_inputs<B> inputs(const B* l, const float* b, const std::int32_t* ids, const std::int32_t* g,
                              const std::int32_t* o) const {
    ts::router_inputs<B> in;
    in.logits = {l, s.tokens, s.experts};
    if (Router::has_bias) in.bias = b;
    in.token_ids = used(Router::needs_token_ids, ids, token_ids.size());
    if (Router::needs_expert_ids) in.expert_ids = {g, s.tokens, s.k};
    in.sequence_offsets = {o, offsets.size()};
    return in;
  }
  ts::router_inputs<A> device_inputs() const {
    return inputs<A>(d_logits.data(), d_bias.data(), d_token_ids.data(), d_given.data(), d_offsets.data());
  }
  ts::routing<A> out() const { return {{d_ids.data(), s.tokens, s.k}, {d_weights.data(), s.tokens, s.k}}; }
  ts::router_lists<A> lists() const {
    return {d_row_offsets.data(), d_gather.data(), d_row_of.data(), d_pair_weights.data()};
  }
  ts::router_workspace workspace() const { return {d_barrier.data(), d_block_counts.data()}; }
  void sorted(cudaStream_t stream = nullptr) {
    ts::route_sorted(stream, Router(options), device_inputs(), out(), ts::balance_counts(d_counts.data(), s.experts),
                     lists(), workspace(), d_status.data());
  }
};

// Each block writes its part late.
__global__ void copy_slowly_kernel(float* to, const float* from, std::size_t count) {
  const long long begin = clock64();
  while (clock64() - begin < 20000) {
  }
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    to[i] = from[i];
  }
}

std::string name_of(const shape& s) {
  std::string name = "T";
  name += std::to_string(s.tokens);
  name += " E";
  name += std::to_string(s.experts);
  name += " K";
  name += std::to_string(s.k);
  return name;
}

// Lists follow from the ids and weights that the device itself chose.
template <class Problem>
void check_lists(const Problem& p) {
  const auto ids = p.d_ids.get();
  const auto weights = p.d_weights.get();
  std::vector<std::int32_t> offsets(static_cast<std::size_t>(p.s.experts) + 1, 0);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(p.s.experts) + 2, 0);
  for (std::int32_t id : ids) {
    if (id >= 0) ++offsets[static_cast<std::size_t>(id) + 1];
  }
  for (int e = 0; e < p.s.experts; ++e) {
    counts[static_cast<std::size_t>(e)] = offsets[static_cast<std::size_t>(e) + 1];
    offsets[static_cast<std::size_t>(e) + 1] += offsets[static_cast<std::size_t>(e)];
  }
  counts[static_cast<std::size_t>(p.s.experts)] = p.s.tokens;
  counts[static_cast<std::size_t>(p.s.experts) + 1] =
      (p.offsets[1] > 0) + (p.offsets[3] > p.offsets[2]) + (p.offsets[4] > p.offsets[3]);
  CHECK(p.d_row_offsets.get() == offsets);
  CHECK(p.d_counts.get() == counts);
  std::vector<std::int32_t> next = offsets, gather = p.d_gather.get(), row_of(ids.size(), -1);
  auto pair_weights = p.d_pair_weights.get();
  const auto device_gather = gather;
  const auto device_pair_weights = pair_weights;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0) continue;
    const auto row = static_cast<std::size_t>(next[static_cast<std::size_t>(ids[i])]++);
    row_of[i] = static_cast<std::int32_t>(row);
    gather[row] = static_cast<std::int32_t>(i / static_cast<std::size_t>(p.s.k));
    pair_weights[row] = weights[i];
  }
  CHECK(p.d_row_of.get() == row_of);
  CHECK(device_gather == gather);
  CHECK(std::memcmp(device_pair_weights.data(), pair_weights.data(), pair_weights.size() * sizeof(weights[0])) == 0);
}

// Keys of a token as the host makes them, in double.
template <class Router>
std::vector<double> keys_of(const Router& r, const std::vector<double>& logits, const float* bias) {
  using score_type = typename Router::score_type;
  std::vector<double> keys = logits;
  if constexpr (!ts::score_selects_on_logits<score_type>) {
    ts::detail::all_scores<score_type>(r.get_options().score, logits.data(), r.num_experts(), keys.data());
  }
  if (Router::has_bias) {
    for (std::size_t e = 0; e < keys.size(); ++e) keys[e] += static_cast<double>(bias[e]);
  }
  return keys;
}

// Routing, losses and backward of one shape.
template <class Router>
void check(const shape& s, unsigned seed) {
  CAPTURE(name_of(s));
  problem<Router> p(s, seed);
  p.sorted();
  device_test::synchronize();
  check_lists(p);
  CHECK(p.d_status.get()[0].fault == ts::device_fault::none);
  const auto ids = p.d_ids.get();
  const auto weights = p.d_weights.get();
  const auto counts = p.d_counts.get();

  // the same without lists
  buffer<std::int32_t> plain_ids(p.pairs());
  buffer<float> plain_weights(p.pairs());
  buffer<std::int64_t> plain_counts(counts.size());
  const Router device_router(p.options);
  device_router.route(ts::device_stream(cudaStream_t{}), p.device_inputs(),
                      ts::routing<float>{{plain_ids.data(), s.tokens, s.k}, {plain_weights.data(), s.tokens, s.k}},
                      ts::balance_counts(plain_counts.data(), s.experts));
  device_test::synchronize();
  CHECK(plain_ids.get() == ids);
  CHECK(plain_weights.get() == weights);
  CHECK(plain_counts.get() == counts);

  const Router host(p.host_options());
  const std::vector<double> logits = widened(p.logits);
  std::vector<std::int32_t> host_ids(p.pairs());
  std::vector<double> host_weights(p.pairs());
  std::vector<std::int64_t> host_counts(counts.size());
  const auto in =
      p.template inputs<double>(logits.data(), p.bias.data(), p.token_ids.data(), p.given.data(), p.offsets.data());
  host.route(ts::host_stream{}, in,
             ts::routing<double>{{host_ids.data(), s.tokens, s.k}, {host_weights.data(), s.tokens, s.k}},
             ts::balance_counts(host_counts.data(), s.experts));
  int differ = 0;
  for (int t = 0; t < s.tokens; ++t) {
    const auto at = static_cast<std::size_t>(t) * static_cast<std::size_t>(s.k);
    bool same = true;
    for (std::size_t i = at; i < at + static_cast<std::size_t>(s.k); ++i) {
      if (ids[i] == host_ids[i]) continue;
      same = false;
      REQUIRE(ids[i] >= 0);
      REQUIRE(ids[i] < s.experts);
      const auto row = logits.begin() + std::ptrdiff_t{t} * s.experts;
      const auto keys = keys_of(host, {row, row + s.experts}, p.bias.data());
      const double a = keys[static_cast<std::size_t>(ids[i])];
      const double b = keys[static_cast<std::size_t>(host_ids[i])];
      CHECK(std::abs(a - b) <= 1e-6);
    }
    if (same) continue;
    ++differ;
    for (std::size_t i = at; i < at + static_cast<std::size_t>(s.k); ++i)
      host_weights[i] = static_cast<double>(weights[i]);
  }
  CHECK(differ <= s.tokens / 50);
  CHECK(relative_error(weights, host_weights) <= 1e-5);
  if (s.tokens == 0) return;

  // losses and backward, from the device's ids, with the counts of more ranks than this one
  std::vector<std::int64_t> global = counts;
  for (int e = 0; e < s.experts; ++e) global[static_cast<std::size_t>(e)] += (3 * e) % 5;
  global[static_cast<std::size_t>(s.experts)] += 9;
  global[static_cast<std::size_t>(s.experts) + 1] += 2;
  buffer<std::int64_t> d_global(global);
  const ts::const_balance_counts device_counts(d_global.data(), s.experts);
  const ts::const_balance_counts counts_view(global.data(), s.experts);
  for (const std::int64_t chunk : {std::int64_t{0}, std::int64_t{(s.tokens + 2) / 3}}) {
    const std::int64_t rows = ts::num_chunks(s.tokens, chunk);
    const auto values = static_cast<std::size_t>(rows * Router::num_losses);
    device_router.losses(ts::device_stream(cudaStream_t{}), p.device_inputs(), device_counts, p.d_coefficients.data(),
                         chunk, ts::matrix_view<float>(p.d_losses.data(), rows, Router::num_losses));
    std::vector<double> expected(values);
    host.losses(ts::host_stream{}, in, counts_view, p.coefficients.data(), chunk,
                ts::matrix_view<double>(expected.data(), rows, Router::num_losses));
    device_test::synchronize();
    auto losses = p.d_losses.get();
    losses.resize(values);
    CHECK(relative_error(losses, expected) <= 1e-5);
    p.d_losses.fill(0xff);
    buffer<float> token_losses(static_cast<std::size_t>(s.tokens * Router::num_losses));
    device_router.losses(ts::device_stream(cudaStream_t{}), p.device_inputs(), device_counts, p.d_coefficients.data(),
                         chunk, ts::matrix_view<float>(p.d_losses.data(), rows, Router::num_losses),
                         token_losses.data());
    device_test::synchronize();
    losses = p.d_losses.get();
    losses.resize(values);
    CHECK(relative_error(losses, expected) <= 1e-5);
  }
  const auto dweights = device_test::normal(p.pairs(), seed + 1);
  buffer<float> d_dweights(dweights);
  const ts::matrix_view<const float> dweights_view(d_dweights.data(), s.tokens, s.k);
  device_router.backward(ts::device_stream(cudaStream_t{}), p.device_inputs(), p.out(), dweights_view, device_counts,
                         p.d_coefficients.data(), 0.75f,
                         ts::matrix_view<float>(p.d_dlogits.data(), s.tokens, s.experts));
  const auto wide_dweights = widened(dweights);
  std::vector<double> expected(logits.size());
  auto routed_ids = ids;
  std::vector<double> routed_weights = widened(weights);
  host.backward(ts::host_stream{}, in,
                ts::routing<double>{{routed_ids.data(), s.tokens, s.k}, {routed_weights.data(), s.tokens, s.k}},
                ts::matrix_view<const double>(wide_dweights.data(), s.tokens, s.k), counts_view, p.coefficients.data(),
                0.75, ts::matrix_view<double>(expected.data(), s.tokens, s.experts));
  device_test::synchronize();
  const auto dlogits = p.d_dlogits.get();
  CHECK(relative_error(dlogits, expected) <= 1e-5);

  // run to run, and with the scale in device memory
  buffer<float> scale(std::vector<float>{0.75f});
  p.d_dlogits.fill(0xff);
  device_router.backward(ts::device_stream(cudaStream_t{}), p.device_inputs(), p.out(), dweights_view, device_counts,
                         p.d_coefficients.data(), scale.data(),
                         ts::matrix_view<float>(p.d_dlogits.data(), s.tokens, s.experts));
  p.d_ids.fill(0xff);
  p.sorted();
  device_test::synchronize();
  CHECK(p.d_dlogits.get() == dlogits);
  CHECK(p.d_ids.get() == ids);
  CHECK(p.d_weights.get() == weights);
  check_lists(p);
}

template <class Router>
void check_shapes(bool grouped = false) {
  check<Router>({0, 8, 2}, 1);
  check<Router>({1, 8, 2}, 2);
  check<Router>({65, 8, grouped ? 4 : 8}, 3);
  check<Router>({300, 64, 6}, 4);
  check<Router>({1500, 256, 8, 8, 4}, 5);
  check<Router>({90, 160, 6, 8, 3}, 6);
  check<Router>({100, 36, 3, 3, 2}, 7);
  check<Router>({60, 39, 3, 3, 2}, 11);
  check<Router>({130, 896, 32, 8, 3}, 8);
  check<Router>({70, 1024, 16, 16, 4}, 9);
  if (!grouped) check<Router>({37, 1, 1}, 10);
}

using plain = ts::router<score::softmax_selected, select::top_k, weigh::raw>;
using deepseek =
    ts::router<score::sigmoid, select::group_limited<>, weigh::normalized, balance::bias, balance::sequence_loss>;

}  // namespace

TEST_CASE("softmax before selection, with switch and z losses, is the host's") {
  check_shapes<ts::router<score::softmax, select::top_k, weigh::normalized, balance::switch_loss, balance::z_loss>>();
}
TEST_CASE("softmax after selection with a bias is the host's") {
  check_shapes<ts::router<score::softmax_selected, select::top_k, weigh::raw, balance::bias, balance::switch_loss>>();
}
TEST_CASE("softmax before selection with a bias is the host's") {
  using biased = ts::router<score::softmax, select::top_k, weigh::raw, balance::bias>;
  for (const shape& s : {shape{300, 64, 6}, shape{700, 256, 8}, shape{400, 200, 1}}) check<biased>(s, 12);
}
TEST_CASE("group-limited sigmoid with bias and sequence loss is the host's") { check_shapes<deepseek>(true); }
TEST_CASE("sigmoid after selection in groups by their maximum, weighing inputs, is the host's") {
  check_shapes<ts::router<score::sigmoid_selected, select::group_limited<select::group_score::max>,
                          weigh::on_input<weigh::raw>, balance::z_loss>>(true);
}
TEST_CASE("selection by token id is the host's") {
  check_shapes<ts::router<score::sqrt_softplus, select::hash, weigh::normalized, balance::switch_loss>>();
}
TEST_CASE("ids from the caller are the host's, unused slots included") {
  check_shapes<ts::router<score::softmax, select::external, weigh::raw, balance::sequence_loss>>();
}
TEST_CASE("a score and a score of groups from a user's file are the host's") {
  check_shapes<ts::router<slow_tanh, select::group_limited<mean_of_group>, weigh::normalized>>(true);
}

TEST_CASE("double precision chooses as the host does") {
  for (const shape& s : {shape{300, 64, 6}, shape{130, 896, 32}}) {
    problem<plain, double> p(s, 21);
    p.sorted();
    device_test::synchronize();
    check_lists(p);
    std::vector<std::int32_t> ids(p.pairs());
    std::vector<double> weights(p.pairs());
    plain(p.host_options())
        .route(ts::host_stream{}, p.inputs<double>(p.logits.data(), nullptr, nullptr, nullptr, p.offsets.data()),
               ts::routing<double>{{ids.data(), s.tokens, s.k}, {weights.data(), s.tokens, s.k}}, ts::balance_counts{});
    CHECK(p.d_ids.get() == ids);
    CHECK(relative_error(p.d_weights.get(), weights) <= 1e-13);
  }
}

TEST_CASE("equal logits go to the lowest experts, however many there are") {
  for (const shape& s : {shape{200, 256, 8}, shape{90, 640, 20}, shape{40, 64, 32}}) {
    for (const double step : {0.0, 0.25, 1.0}) {
      CAPTURE(name_of(s));
      CAPTURE(step);
      problem<plain> p(s, 31);
      for (float& x : p.logits)
        x = step == 0 ? 0.0f : static_cast<float>(std::round(static_cast<double>(x) / step) * step);
      p.d_logits.set(p.logits);
      p.sorted();
      device_test::synchronize();
      check_lists(p);
      std::vector<std::int32_t> ids(p.pairs());
      std::vector<float> weights(p.pairs());
      plain(p.host_options())
          .route(ts::host_stream{}, p.inputs<float>(p.logits.data(), nullptr, nullptr, nullptr, p.offsets.data()),
                 ts::routing<float>{{ids.data(), s.tokens, s.k}, {weights.data(), s.tokens, s.k}},
                 ts::balance_counts{});
      CHECK(p.d_ids.get() == ids);
    }
  }
}

TEST_CASE("lists of many tokens, in one tile per block and in several") {
  for (const shape& s : {shape{8192, 256, 8}, shape{30000, 16, 4}, shape{70000, 8, 2}, shape{40000, 1024, 2}}) {
    CAPTURE(name_of(s));
    problem<plain> p(s, 41);
    p.sorted();
    device_test::synchronize();
    check_lists(p);
  }
}

TEST_CASE("a graph's replays see changed logits") {
  problem<deepseek> p({500, 64, 6}, 51);
  const cudaStream_t stream = device_test::make_stream();
  p.sorted(stream);
  device_test::synchronize();
  cudaGraphExec_t graph = device_test::capture(stream, [&] { p.sorted(stream); });
  for (unsigned seed = 60; seed < 64; ++seed) {
    p.randomize(seed);
    p.d_ids.fill(0xff);
    device_test::require(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
    device_test::synchronize();
    check_lists(p);
    const auto ids = p.d_ids.get();
    const auto weights = p.d_weights.get();
    p.sorted(stream);
    device_test::synchronize();
    CHECK(p.d_ids.get() == ids);
    CHECK(p.d_weights.get() == weights);
  }
  cudaGraphExecDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_CASE("a kernel that starts early waits for what is ahead of it in its stream") {
  for (const shape& s : {shape{8192, 256, 8}, shape{1500, 896, 8}, shape{20, 64, 8}}) {
    CAPTURE(name_of(s));
    problem<plain> p(s, 53);
    const cudaStream_t stream = device_test::make_stream();
    buffer<float> logits[2] = {buffer<float>(p.logits), buffer<float>(device_test::normal(p.logits.size(), 54))};
    std::vector<std::int32_t> expected[2], expected_rows[2];
    for (int i = 0; i < 2; ++i) {
      p.d_logits.set(logits[i].get());
      p.sorted(stream);
      device_test::synchronize();
      expected[i] = p.d_ids.get();
      expected_rows[i] = p.d_row_of.get();
    }
    CHECK(expected[0] != expected[1]);
    constexpr int runs = 40, pairs_of_runs = 2 * runs;
    buffer<std::int32_t> ids(pairs_of_runs * p.pairs());
    // logits by a kernel or by a copy, ids by a memory set; then the same again, behind the router's own kernel
    const auto run = [&](int i, int kept, bool sets) {
      if (i % 4 < 2) {
        copy_slowly_kernel<<<64, 128, 0, stream>>>(p.d_logits.data(), logits[i % 2].data(), p.logits.size());
      } else {
        device_test::require(cudaMemcpyAsync(p.d_logits.data(), logits[i % 2].data(), p.logits.size() * sizeof(float),
                                             cudaMemcpyDeviceToDevice, stream),
                             "copy");
      }
      if (sets) {
        device_test::require(cudaMemsetAsync(p.d_ids.data(), 0xff, p.pairs() * sizeof(std::int32_t), stream), "set");
        device_test::require(cudaMemsetAsync(p.d_row_of.data(), 0xff, p.pairs() * sizeof(std::int32_t), stream), "set");
      }
      p.sorted(stream);
      p.sorted(stream);
      const auto keep = [&](int at, const buffer<std::int32_t>& from) {
        device_test::require(cudaMemcpyAsync(ids.data() + static_cast<std::size_t>(at) * p.pairs(), from.data(),
                                             p.pairs() * sizeof(std::int32_t), cudaMemcpyDeviceToDevice, stream),
                             "copy");
      };
      keep(2 * kept, p.d_ids);
      keep(2 * kept + 1, p.d_row_of);
    };
    const auto wrong = [&](int count) {
      device_test::synchronize();
      const auto got = ids.get();
      int result = 0;
      for (int i = 0; i < 2 * count; ++i) {
        const auto& want = i % 2 == 0 ? expected[i / 2 % 2] : expected_rows[i / 2 % 2];
        if (!std::equal(want.begin(), want.end(), got.begin() + std::ptrdiff_t{i} * std::ssize(want))) ++result;
      }
      return result;
    };
    for (const bool sets : {true, false}) {
      CAPTURE(sets);
      ids.fill(0xff);
      for (int i = 0; i < runs; ++i) run(i, i, sets);
      CHECK(wrong(runs) == 0);
      cudaGraphExec_t graph = device_test::capture(stream, [&] {
        for (int i = 0; i < 4; ++i) run(i, i, sets);
      });
      ids.fill(0xff);
      for (int i = 0; i < 10; ++i) device_test::require(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
      CHECK(wrong(4) == 0);
      cudaGraphExecDestroy(graph);
    }
    cudaStreamDestroy(stream);
  }
}

TEST_CASE("a token whose logits are not finite gets no experts, and the status names it") {
  for (const float bad :
       {std::nanf(""), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    problem<plain> p({100, 64, 4}, 71);
    p.logits[37 * 64 + 5] = bad;
    p.d_logits.set(p.logits);
    p.sorted();
    device_test::synchronize();
    check_lists(p);
    const auto ids = p.d_ids.get();
    const auto weights = p.d_weights.get();
    for (std::size_t i = 0; i < ids.size(); ++i) {
      CHECK((ids[i] == ts::no_expert) == (i / 4 == 37));
      if (i / 4 == 37) CHECK(weights[i] == 0.0f);
    }
    const auto status = p.d_status.get()[0];
    CHECK(status.token == 37);
    CHECK_THROWS_WITH_AS(ts::expect_ok(status), "router on the device, token 37, expert or id 0: a logit is not finite",
                         ts::invalid_argument);
  }
}

TEST_CASE("bad ids leave their slots unused, and the status tells") {
  using given = ts::router<score::sigmoid, select::external, weigh::raw>;
  struct bad_id {
    int slot;
    std::int32_t id;
    ts::device_fault fault;
  };
  for (const bad_id& bad :
       {bad_id{1, 64, ts::device_fault::expert_out_of_range}, bad_id{2, -2, ts::device_fault::expert_out_of_range},
        bad_id{3, 12, ts::device_fault::expert_repeated}}) {
    problem<given> p({50, 64, 4}, 81);
    for (int i = 0; i < 4; ++i) p.given[static_cast<std::size_t>(9 * 4 + i)] = 12 + i;
    p.given[static_cast<std::size_t>(9 * 4 + bad.slot)] = bad.id;
    p.d_given.set(p.given);
    p.sorted();
    device_test::synchronize();
    check_lists(p);
    CHECK(p.d_ids.get()[static_cast<std::size_t>(9 * 4 + bad.slot)] == ts::no_expert);
    const auto status = p.d_status.get()[0];
    CHECK(status.fault == bad.fault);
    CHECK(status.token == 9);
    CHECK(status.expert == bad.id);
  }
}

TEST_CASE("the bias rule is the host's, its rate in device memory") {
  for (const int experts : {1, 8, 896}) {
    std::vector<float> bias = device_test::normal(static_cast<std::size_t>(experts), 91);
    std::vector<std::int64_t> load;
    for (int e = 0; e < experts; ++e) load.push_back(100'000'000'000 + (e * 7) % 5 - 2);
    buffer<float> d_bias(bias), rate(std::vector<float>{0.25f});
    buffer<std::int64_t> d_load(load);
    balance::update_bias(ts::device_stream(cudaStream_t{}), d_bias.data(), d_load.data(), experts, rate.data());
    balance::update_bias(ts::host_stream{}, bias.data(), load.data(), experts, 0.25f);
    device_test::synchronize();
    CHECK(d_bias.get() == bias);
  }
}

TEST_CASE("shapes that do not fit are refused before anything is launched") {
  problem<deepseek> p({10, 64, 4}, 99);
  auto in = p.device_inputs();
  in.logits.cols = 63;
  CHECK_THROWS_AS(ts::route_sorted(ts::device_stream(cudaStream_t{}), deepseek(p.options), in, p.out(),
                                   ts::balance_counts{}, p.lists(), p.workspace()),
                  ts::invalid_argument);
  CHECK_THROWS_AS(ts::route_sorted(ts::device_stream(cudaStream_t{}), deepseek(p.options), p.device_inputs(), p.out(),
                                   ts::balance_counts{}, p.lists(), ts::router_workspace{}),
                  ts::invalid_argument);
  // more groups than the device half takes, though the host half does
  auto many = p.options;
  many.select = {.groups = 64, .kept_groups = 32};
  many.num_experts = 128;
  buffer<float> logits(10 * 128);
  in.logits = {logits.data(), 10, 128};
  CHECK_THROWS_WITH_AS(ts::route_sorted(ts::device_stream(cudaStream_t{}), deepseek(many), in, p.out(),
                                        ts::balance_counts{}, p.lists(), p.workspace()),
                       "groups = 64, the device half handles at most 32", ts::invalid_argument);
}
