// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The layer with its experts spread over GPUs, one thread a GPU, against the host half in double on the same bf16
// numbers, and against the layer on one GPU; two micro-batches at once; experts and tokens spread unevenly. With one
// GPU the communicator has one rank. Without a GPU or without NCCL it exits with 77, which CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <tessera/comm/symmetric.cuh>
#include <tessera/comm/threads.hpp>
#include <tessera/layout/table.hpp>
#include <tessera/moe/moe_layer.cuh>

#include "layer_ranks.cuh"

namespace {

using namespace layer_ranks;
using device_test::on_ranks;

// Layers load their kernels by themselves, unless the environment says otherwise; and streams do not wait for each
// other by chance.
const int loading = setenv("CUDA_MODULE_LOADING", "LAZY", 0);
const int connections = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);

template <class Router, class WeightLayout, class Comm, class Combine = ts::combine::reduced,
          class Layout = ts::layout::block>
using layer_over = ts::moe_layer<Router, ts::experts<ts::activation::swiglu, ts::precision::bf16, WeightLayout>, Layout,
                                 Comm, Combine>;
template <class Router, class WeightLayout>
struct policies {
  using router = Router;
  using spread = layer_over<Router, WeightLayout, ts::comm::symmetric>;
  using ordered = layer_over<Router, WeightLayout, ts::comm::symmetric, ts::combine::ordered>;
  using uneven = layer_over<Router, WeightLayout, ts::comm::symmetric, ts::combine::ordered, ts::layout::table>;
  using alone = layer_over<Router, WeightLayout, ts::comm::self<ts::space::device>>;
  template <class Layout>
  using host_over = ts::moe_layer<Router, ts::experts<ts::activation::swiglu, ts::precision::fp64, WeightLayout>,
                                  Layout, ts::comm::threads, ts::combine::ordered>;
  using host_layer = host_over<ts::layout::block>;
  using uneven_host_layer = host_over<ts::layout::table>;
};
using deepseek_like = policies<ts::router<ts::score::sigmoid, ts::select::group_limited<>, ts::weigh::normalized,
                                          ts::balance::bias, ts::balance::sequence_loss, ts::balance::z_loss>,
                               ts::weight_layout::out_in_interleaved>;

int num_ranks() { return (std::min)(device_test::num_gpus(), 4); }

ts::comm::symmetric_options window(std::size_t mib) {
  ts::comm::symmetric_options options;
  options.window_bytes = mib << 20;
  options.timeout = std::chrono::milliseconds(20000);
  return options;
}

layer_problem make_ranks_problem(int shared = 1) {
  auto p =
      make_problem({.num_experts = 32, .top_k = 6, .hidden = 192, .intermediate = 64, .num_shared_experts = shared},
                   500, true, 17, true);
  const auto offsets = split_of(500, num_ranks());
  p.sequence_offsets = {0};
  for (std::size_t r = 1; r < offsets.size(); ++r) p.sequence_offsets.push_back(static_cast<std::int32_t>(offsets[r]));
  return p;
}

deepseek_like::router::options router_options() {
  deepseek_like::router::options routing;
  routing.weigh.scale = 1.5f;
  routing.select = {.groups = 4, .kept_groups = 2};
  return routing;
}

}  // namespace

TEST_CASE("the layer spread over GPUs follows the host in double, and has the weight gradients of one GPU bit by bit") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  std::vector<outcome> parts(static_cast<std::size_t>(ranks));
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto comm = ts::comm::symmetric::create(t, window(64));
    const auto r = static_cast<std::size_t>(t.rank());
    rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    layer.step(ts::pass::train);
    layer.sync();
    parts[r] = layer.results();
    // again, and without saving; then the step's end, which moves the bias
    layer.poison();
    layer.step(ts::pass::recompute);
    layer.sync();
    const outcome again = layer.results();
    CHECK(same_bits(again.y, parts[r].y));
    CHECK(same_bits(again.dx, parts[r].dx));
    CHECK(again.up == parts[r].up);
    CHECK(again.gate == parts[r].gate);
    check_eval(layer, parts[r]);
    layer.end_step();
    layer.sync();
    parts[r].load = layer.results().load;
    parts[r].bias = layer.results().bias;
    t.barrier({});
  }));
  const outcome got = join(parts);
  const auto expected = run_problem<deepseek_like::host_layer>(p, ts::layout::block(p.sizes.num_experts, 1),
                                                               {0, p.num_tokens}, router_options(), {});
  check_step(got, expected);

  require(cudaSetDevice(0), "cudaSetDevice");
  ts::comm::self<ts::space::device> self;
  rank_layer<deepseek_like::alone> one(self, p, router_options(), 0, p.num_tokens, p.num_tokens);
  one.step(ts::pass::train);
  one.sync();
  const outcome alone = one.results();
  CHECK(got.up == alone.up);
  CHECK(got.down == alone.down);
}

TEST_CASE("between GPUs a residual is added to the outputs, with shared experts and without, whatever sums rows") {
  const int ranks = num_ranks();
  const auto check_residual = [&]<class Layer>(std::type_identity<Layer>, const layer_problem& p, bool host_sized) {
    const auto offsets = split_of(p.num_tokens, ranks);
    std::vector<outcome> parts(static_cast<std::size_t>(ranks));
    auto chosen = full_bound<Layer>();
    chosen.dispatch.host_sized = host_sized;
    CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
      auto comm = ts::comm::symmetric::create(t, window(96));
      const auto r = static_cast<std::size_t>(t.rank());
      rank_layer<Layer> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks,
                              ts::layout::block(p.sizes.num_experts, ranks), chosen);
      t.barrier({});  // allocations are done before GPUs wait for one another
      layer.step(ts::pass::train);
      layer.sync();
      parts[r] = layer.results();
      check_eval(layer, parts[r]);
      t.barrier({});
    }));
    return join(parts);
  };
  for (const int shared : {0, 1}) {
    auto p = make_ranks_problem(shared);
    p.residual = random_values(500 * 192, 1, 71, true);
    const auto expected = run_problem<deepseek_like::host_layer>(p, ts::layout::block(p.sizes.num_experts, 1),
                                                                 {0, p.num_tokens}, router_options(), {});
    require(cudaSetDevice(0), "cudaSetDevice");
    ts::comm::self<ts::space::device> self;
    rank_layer<deepseek_like::alone> one(self, p, router_options(), 0, p.num_tokens, p.num_tokens);
    one.step(ts::pass::train);
    one.sync();
    const outcome alone = one.results();
    for (const bool host_sized : {false, true}) {
      CAPTURE(shared);
      CAPTURE(host_sized);
      const auto reduced = check_residual(std::type_identity<deepseek_like::spread>(), p, host_sized);
      CHECK(device_test::relative_error(widened(reduced.y), expected.y) <= 1e-2);
      CHECK(device_test::relative_error(widened(reduced.dx), expected.dx) <= 1e-2);
      const auto ordered = check_residual(std::type_identity<deepseek_like::ordered>(), p, host_sized);
      CHECK(same_bits(ordered.y, alone.y));
      CHECK(same_bits(ordered.dx, alone.dx));
    }
  }
}

TEST_CASE("rows that are sent again in backward give the bits of rows that were kept, in a graph too") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto comm = ts::comm::symmetric::create(t, window(64));
    const auto r = static_cast<std::size_t>(t.rank());
    rank_layer<deepseek_like::spread> kept(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    auto resends = full_bound<deepseek_like::spread>();
    resends.rows = ts::saved_rows::resend;
    rank_layer<deepseek_like::spread> again(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks,
                                            ts::layout::block(p.sizes.num_experts, ranks), resends);
    t.barrier({});
    kept.step(ts::pass::train);
    kept.sync();
    const outcome expected = kept.results();
    t.barrier({});
    again.step(ts::pass::train);
    again.sync();
    check_same(again.results(), expected);
    t.barrier({});
    cudaGraphExec_t graph = device_test::capture(again.stream(), [&] { again.step(ts::pass::recompute); });
    again.poison();
    t.barrier({});
    for (int i = 0; i < 20; ++i) require(cudaGraphLaunch(graph, again.stream()), "cudaGraphLaunch");
    again.sync();
    check_same(again.results(), expected);
    t.barrier({});
    require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
  }));
}

TEST_CASE("a token that is not a number is reported by its rank") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto comm = ts::comm::symmetric::create(t, window(64));
    const auto r = static_cast<std::size_t>(t.rank());
    rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    if (t.rank() == ranks - 1) {
      auto tokens = layer.tokens();
      tokens[static_cast<std::size_t>(3 * p.sizes.hidden + 5)] = S(std::nanf(""));
      layer.set_tokens(tokens);
    }
    layer.step(ts::pass::train);
    if (t.rank() == ranks - 1) {
      CHECK_THROWS_AS(layer.sync(), ts::invalid_argument);
    } else {
      layer.sync();
    }
    t.barrier({});
  }));
}

TEST_CASE("a graph of a whole step is replayed, with the same tokens and with others") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto comm = ts::comm::symmetric::create(t, window(64));
    const auto r = static_cast<std::size_t>(t.rank());
    rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    layer.step(ts::pass::recompute);
    layer.sync();
    const outcome plain = layer.results();
    cudaGraphExec_t graph = device_test::capture(layer.stream(), [&] { layer.step(ts::pass::recompute); });
    const auto replay = [&](int times) {
      layer.poison();
      for (int i = 0; i < times; ++i) require(cudaGraphLaunch(graph, layer.stream()), "cudaGraphLaunch");
      layer.sync();
      return layer.results();
    };
    const auto compare = [](const outcome& a, const outcome& b) {
      CHECK(same_bits(a.y, b.y));
      CHECK(same_bits(a.dx, b.dx));
      CHECK(a.gate == b.gate);
      CHECK(a.up == b.up);
      CHECK(a.down == b.down);
    };
    compare(replay(5), plain);
    // other tokens, and so another routing
    auto tokens = layer.tokens();
    std::reverse(tokens.begin(), tokens.end());
    layer.set_tokens(tokens);
    const outcome other = replay(2);
    CHECK(!same_bits(other.y, plain.y));
    layer.poison();
    layer.step(ts::pass::recompute);
    layer.sync();
    compare(other, layer.results());
    require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
    t.barrier({});
  }));
}

TEST_CASE("with combine::ordered every number of GPUs computes the bits of one") {
  auto p = make_ranks_problem();
  const std::vector<std::int64_t> quarters{0, 97, 180, 313, p.num_tokens};
  p.sequence_offsets.assign(quarters.begin(), quarters.end());  // a sequence stays whole on one rank
  require(cudaSetDevice(0), "cudaSetDevice");
  ts::comm::self<ts::space::device> self;
  rank_layer<deepseek_like::alone> one(self, p, router_options(), 0, p.num_tokens, p.num_tokens);
  one.step(ts::pass::train);
  one.sync();
  const outcome alone = one.results();
  for (const auto& [ranks, host_sized] : {std::pair(1, false), std::pair(1, true), std::pair(2, false),
                                          std::pair(2, true), std::pair(4, false), std::pair(4, true)}) {
    if (ranks > num_ranks()) continue;
    CAPTURE(ranks);
    CAPTURE(host_sized);
    std::vector<outcome> parts(static_cast<std::size_t>(ranks));
    auto chosen = full_bound<deepseek_like::ordered>();
    chosen.dispatch.host_sized = host_sized;
    const ts::layout::block placement(p.sizes.num_experts, ranks);
    CHECK_NOTHROW(on_ranks(ranks, [&, width = static_cast<std::size_t>(4 / ranks),
                                   most = ranks == 1 ? p.num_tokens : 330](ts::comm::threads& t) {
      auto comm = ts::comm::symmetric::create(t, window(96));
      const auto r = static_cast<std::size_t>(t.rank());
      rank_layer<deepseek_like::ordered> layer(comm, p, router_options(), quarters[r * width],
                                               quarters[(r + 1) * width], most, placement, chosen);
      t.barrier({});  // allocations are done before GPUs wait for one another
      layer.step(ts::pass::train);
      layer.sync();
      layer.poison();
      layer.step(ts::pass::recompute);  // memory that has been used
      layer.sync();
      parts[r] = layer.results();
      check_eval(layer, parts[r]);
      t.barrier({});
    }));
    const outcome got = join(parts);
    CHECK(same_bits(got.y, alone.y));
    CHECK(same_bits(got.dx, alone.dx));
    CHECK(got.up == alone.up);
    CHECK(got.down == alone.down);
  }
}

TEST_CASE("a capacity drops what the host drops, by position and by weight, directly, in a graph, and by NCCL") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  const ts::layout::block placement(p.sizes.num_experts, ranks);
  for (const auto order : {ts::drop_order::position, ts::drop_order::weight}) {
    const bool by_weight = order == ts::drop_order::weight;
    CAPTURE(by_weight);
    auto chosen = full_bound<deepseek_like::spread>();
    chosen.dispatch.capacity_factor = by_weight ? 0.7 : 1.2;
    chosen.dispatch.order = order;
    std::vector<outcome> parts(static_cast<std::size_t>(ranks));
    CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
      auto comm = ts::comm::symmetric::create(t, window(128));
      const auto r = static_cast<std::size_t>(t.rank());
      rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks,
                                              placement, chosen);
      auto by_host = chosen;
      by_host.dispatch.host_sized = true;
      rank_layer<deepseek_like::spread> other(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks,
                                              placement, by_host);
      t.barrier({});
      layer.step(ts::pass::train);
      layer.sync();
      const outcome plain = layer.results();
      cudaGraphExec_t graph = device_test::capture(layer.stream(), [&] { layer.step(ts::pass::recompute); });
      layer.poison();
      t.barrier({});
      for (int i = 0; i < 5; ++i) require(cudaGraphLaunch(graph, layer.stream()), "cudaGraphLaunch");
      layer.sync();
      check_same(layer.results(), plain);
      require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
      t.barrier({});
      other.step(ts::pass::train);
      other.sync();
      check_same(other.results(), plain);
      layer.end_step();
      layer.sync();
      parts[r] = layer.results();
      t.barrier({});
    }));
    const outcome got = join(parts);
    deepseek_like::host_layer::options options;
    options.dispatch = chosen.dispatch;
    const auto expected = run_problem<deepseek_like::host_layer>(p, placement, offsets, router_options(), options);
    CHECK(got.dropped_by_capacity == expected.dropped_by_capacity);
    CHECK(got.dropped_by_capacity > 0);
    CHECK(got.dropped_by_capacity < p.num_tokens * p.sizes.top_k);
    check_rows_and_gradients(got, expected);
  }
}

TEST_CASE("ranks without tokens, ranks with few experts or none, and pairs beyond the bound, follow the host") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const int experts = p.sizes.num_experts;
  const std::int64_t tokens = p.num_tokens;
  const std::vector<std::int64_t> offsets = ranks == 1   ? std::vector<std::int64_t>{0, tokens}
                                            : ranks == 2 ? std::vector<std::int64_t>{0, 0, tokens}
                                            : ranks == 3 ? std::vector<std::int64_t>{0, 211, 211, tokens}
                                                         : std::vector<std::int64_t>{0, 101, 101, 290, tokens};
  layer_problem q = p;
  q.sequence_offsets.clear();
  for (const std::int64_t o : offsets) {
    if (q.sequence_offsets.empty() || o > q.sequence_offsets.back())
      q.sequence_offsets.push_back(static_cast<std::int32_t>(o));
  }
  // expert e stands on the rank of e's place in this order: most on one rank, none on the last of four
  std::vector<std::vector<std::int32_t>> placed(static_cast<std::size_t>(ranks));
  for (int e = 0; e < experts; ++e) {
    const int rank = e % 8 < 5 ? 0 : (e % 8 < 7 ? 1 : 2);
    placed[static_cast<std::size_t>(std::min(rank, ranks - 1))].push_back(experts - 1 - e);
  }
  const ts::layout::table_storage storage(experts, placed);
  std::int64_t most = 0;
  for (std::size_t r = 1; r < offsets.size(); ++r) most = std::max(most, offsets[r] - offsets[r - 1]);

  for (const bool drops : {false, true}) {
    CAPTURE(drops);
    ts::dispatch_options dispatch;
    dispatch.row_bound = drops ? tokens * q.sizes.top_k / 2 : ts::dispatch_options::full_row_bound;
    dispatch.overflow = drops ? ts::overflow_policy::drop : ts::overflow_policy::error;
    if (drops && ranks == 1) continue;  // one rank keeps all of its pairs
    std::vector<outcome> parts(static_cast<std::size_t>(ranks));
    CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
      auto comm = ts::comm::symmetric::create(t, window(96));
      const auto r = static_cast<std::size_t>(t.rank());
      std::int32_t* both_read = nullptr;
      require(cudaMallocHost(&both_read, storage.packed().size_bytes()), "cudaMallocHost");  // as long as the program
      std::copy(storage.packed().begin(), storage.packed().end(), both_read);
      deepseek_like::uneven::options options;
      options.dispatch = dispatch;
      rank_layer<deepseek_like::uneven> layer(comm, q, router_options(), offsets[r], offsets[r + 1], most,
                                              storage.view_at(both_read), options);
      layer.step(ts::pass::train);
      layer.sync();
      layer.end_step();
      layer.sync();
      parts[r] = layer.results();
      t.barrier({});
    }));
    deepseek_like::uneven_host_layer::options options;
    options.dispatch = dispatch;
    const auto expected =
        run_problem<deepseek_like::uneven_host_layer>(q, storage.view(), offsets, router_options(), options);
    outcome got = parts[0];
    std::vector<double> up(expected.up.size());
    std::vector<double> down(expected.down.size());
    got.y.clear();
    got.dx.clear();
    got.dropped = 0;
    for (int r = 0; r < ranks; ++r) {
      const outcome& part = parts[static_cast<std::size_t>(r)];
      got.y.insert(got.y.end(), part.y.begin(), part.y.end());
      got.dx.insert(got.dx.end(), part.dx.begin(), part.dx.end());
      got.dropped += part.dropped;
      put_rows(up, part.up, static_cast<std::int64_t>(up.size()) / experts, storage.view(), r);
      put_rows(down, part.down, static_cast<std::int64_t>(down.size()) / experts, storage.view(), r);
      CHECK(part.load == expected.load);
    }
    CHECK(device_test::relative_error(widened(got.y), expected.y) <= 1e-2);
    CHECK(device_test::relative_error(widened(got.dx), expected.dx) <= 1e-2);
    CHECK(device_test::relative_error(up, expected.up) <= 1e-2);
    CHECK(device_test::relative_error(down, expected.down) <= 1e-2);
    CHECK((got.dropped > 0) == drops);
  }
}

TEST_CASE("two micro-batches at once on two slots give what each gives alone, and count what both chose") {
  const int ranks = num_ranks();
  const int rounds = 200;
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  auto reversed = p;  // the other micro-batch
  std::reverse(reversed.x.begin(), reversed.x.end());
  std::reverse(reversed.dy.begin(), reversed.dy.end());
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto options = window(128);
    options.slots = 2;
    auto comm = ts::comm::symmetric::create(t, options);
    auto beside = comm.on_slot(1);
    const auto r = static_cast<std::size_t>(t.rank());
    const std::int64_t max_tokens = 300 + 200 / ranks;
    using layer_type = rank_layer<deepseek_like::spread>;
    const ts::layout::block placement(p.sizes.num_experts, ranks);
    const auto bound = full_bound<deepseek_like::spread>();
    layer_type first(comm, p, router_options(), offsets[r], offsets[r + 1], max_tokens, placement, bound);
    layer_type second(beside, reversed, router_options(), offsets[r], offsets[r + 1], max_tokens, placement, bound,
                      first.state());
    std::vector<outcome> alone;
    for (layer_type* layer : {&first, &second}) {
      layer->step(ts::pass::train);
      layer->sync();
      alone.push_back(layer->results());
    }
    first.end_step();
    first.sync();
    const auto load_of_both = first.results().load;
    const auto compare = [](const outcome& a, const outcome& b) {
      CHECK(same_bits(a.y, b.y));
      CHECK(same_bits(a.dx, b.dx));
      CHECK(a.up == b.up);
      CHECK(a.down == b.down);
    };
    // the bias has moved: what each gives alone from here on, without counting
    alone.clear();
    for (layer_type* layer : {&first, &second}) {
      layer->step(ts::pass::recompute);
      layer->sync();
      alone.push_back(layer->results());
    }
    for (int round = 0; round < rounds; ++round) {
      if (round % 50 == 0) {
        first.poison();
        second.poison();
        t.barrier({});
      }
      // each rank begins with another one now and then
      layer_type* order[] = {&first, &second};
      if ((round / 3 + t.rank()) % 2 != 0) std::swap(order[0], order[1]);
      for (layer_type* layer : order) layer->step(ts::pass::train);
      if (round % 50 != 49) continue;
      for (layer_type* layer : order) layer->sync();
      compare(first.results(), alone[0]);
      compare(second.results(), alone[1]);
    }
    first.end_step();
    first.sync();
    // the routing changed with the bias, its number of pairs did not; and every round counts the same
    std::int64_t pairs = 0;
    for (const std::int64_t load : first.results().load) {
      CHECK(load % rounds == 0);
      pairs += load;
    }
    std::int64_t pairs_of_both = 0;
    for (const std::int64_t load : load_of_both) pairs_of_both += load;
    CHECK(pairs == rounds * pairs_of_both);
    t.barrier({});
  }));
}

TEST_CASE("a rank that misses a step is named by the others, which count nothing of it; after reset steps are right") {
  const int ranks = num_ranks();
  if (ranks == 1) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  const int missing = ranks - 1;
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto options = window(64);
    options.timeout = std::chrono::milliseconds(500);
    auto comm = ts::comm::symmetric::create(t, options);
    const auto r = static_cast<std::size_t>(t.rank());
    rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    t.barrier({});
    layer.step(ts::pass::train);
    layer.sync();
    const outcome plain = layer.results();
    t.barrier({});
    if (t.rank() != missing) {
      layer.step(ts::pass::train);
      int peer = -1;
      try {
        layer.sync();
      } catch (const ts::comm_error& e) {
        peer = e.peer();
      }
      CHECK(peer == missing);
    }
    t.barrier({});
    comm.reset(layer.stream());
    layer.poison();
    t.barrier({});
    layer.step(ts::pass::train);
    layer.sync();
    const outcome again = layer.results();
    CHECK(same_bits(again.y, plain.y));
    CHECK(same_bits(again.dx, plain.dx));
    CHECK(again.gate == plain.gate);
    CHECK(again.up == plain.up);
    CHECK(again.down == plain.down);
    layer.end_step();
    layer.sync();
    std::int64_t pairs = 0;
    for (const std::int64_t load : layer.results().load) pairs += load;
    CHECK(pairs == 2 * p.num_tokens * p.sizes.top_k);
    t.barrier({});
  }));
}

TEST_CASE("every transport gives the same bits, in a graph too, and needs its streams of copies") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto options = window(256);
    options.copy_streams = std::max(ranks, 2);
    auto comm = ts::comm::symmetric::create(t, options);
    const auto r = static_cast<std::size_t>(t.rank());
    const ts::layout::block placement(p.sizes.num_experts, ranks);
    std::optional<outcome> expected;
    for (const ts::transport::automatic& how :
         {ts::transport::automatic(), ts::transport::automatic(ts::transport::all_gather{}),
          ts::transport::automatic(ts::transport::all_to_all{.copies_own_rows = true}),
          ts::transport::automatic(ts::transport::copy_engines{}),
          ts::transport::automatic(ts::transport::copy_engines{.streams = std::max(ranks - 1, 1), .chunks = 3})}) {
      auto chosen = full_bound<deepseek_like::spread>();
      chosen.transport = how;
      rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks,
                                              placement, chosen);
      cudaGraphExec_t graph = device_test::capture(layer.stream(), [&] { layer.step(ts::pass::recompute); });
      for (const bool replayed : {false, true}) {
        layer.poison();
        t.barrier({});
        if (replayed) {
          require(cudaGraphLaunch(graph, layer.stream()), "cudaGraphLaunch");
        } else {
          layer.step(ts::pass::recompute);
        }
        layer.sync();
        const outcome got = layer.results();
        if (!expected) expected = got;
        CHECK(same_bits(got.y, expected->y));
        CHECK(same_bits(got.dx, expected->dx));
        CHECK(got.gate == expected->gate);
        CHECK(got.up == expected->up);
        CHECK(got.down == expected->down);
      }
      require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
      t.barrier({});
      comm.release_all();
    }
    auto few = ts::comm::symmetric::create(t, window(64));
    auto chosen = full_bound<deepseek_like::spread>();
    chosen.transport = ts::transport::copy_engines{};
    rank_layer<deepseek_like::spread> layer(few, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks,
                                            placement, chosen);
    CHECK_THROWS_AS(layer.step(ts::pass::recompute), ts::invalid_argument);
    t.barrier({});
  }));
}

#endif
