// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Dispatch, combine and the layer over NCCL, over hosts and over comm::symmetric, against the host half in double and
// against each other, with one thread a GPU or one process a GPU:
//
//   layer_nccl_test                            threads
//   layer_nccl_test --processes 4              processes that it starts itself
//   layer_nccl_test --processes 4 --hosts 2    ... of which NCCL thinks that two each are on one host
//   mpirun -n 4 layer_nccl_test [--hosts 2]    processes of mpirun, where it was compiled with MPI
//
// Without enough GPUs or without NCCL it exits with 77, which CTest reports as skipped.

#include <cstdio>

#if !__has_include(<nccl.h>)
int main() {
  std::printf("skipped: NCCL's header was not found\n");
  return 77;
}
#else

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#undef DOCTEST_CONFIG_IMPLEMENT  // the main function is the last one below

#include <chrono>
#include <string>
#include <type_traits>
#include <vector>

#include <tessera/comm/hosts.hpp>
#include <tessera/comm/nccl.cuh>
#include <tessera/comm/symmetric.cuh>
#include <tessera/layout/block.hpp>

#include "host_sized_checks.cuh"
#include "layer_ranks.cuh"
#include "process_ranks.cuh"

namespace {

using namespace layer_ranks;
using device_test::bootstrap;
using device_test::rank_launcher;
using two_hosts = ts::comm::hosts<ts::comm::nccl>;

// Kernels are loaded before GPUs wait for each other.
const int loading = setenv("CUDA_MODULE_LOADING", "EAGER", 1);

using router = ts::router<ts::score::sigmoid, ts::select::group_limited<>, ts::weigh::normalized, ts::balance::bias,
                          ts::balance::sequence_loss, ts::balance::z_loss>;
using weight_layout = ts::weight_layout::out_in_interleaved;
template <class Comm, class Combine = ts::combine::reduced>
using layer_over = ts::moe_layer<router, ts::experts<ts::activation::swiglu, ts::precision::bf16, weight_layout>,
                                 ts::layout::block, Comm, Combine>;
using host_layer = ts::moe_layer<router, ts::experts<ts::activation::swiglu, ts::precision::fp64, weight_layout>,
                                 ts::layout::block, ts::comm::threads, ts::combine::ordered>;

ts::comm::nccl make_nccl(const bootstrap& b) { return ts::comm::nccl::create(b.rank, b.size, b.gather); }

ts::comm::symmetric make_symmetric(const bootstrap& b, bool allow_direct) {
  ts::comm::symmetric_options options;
  options.window_bytes = std::size_t{96} << 20;
  options.timeout = std::chrono::milliseconds(20000);
  options.allow_direct = allow_direct;
  return ts::comm::symmetric::create(make_nccl(b), options);
}

router::options router_options() {
  router::options routing;
  routing.weigh.scale = 1.5f;
  routing.select = {.groups = 4, .kept_groups = 2};
  return routing;
}

// What all ranks have together, on all ranks.
outcome join_over(const bootstrap& b, const outcome& own) {
  outcome all;
  all.y = b.join(own.y);
  all.dx = b.join(own.dx);
  all.up = b.join(own.up);
  all.down = b.join(own.down);
  const auto sum = [&](const std::vector<float>& part) {
    const std::vector<float> parts = b.join(part);
    std::vector<float> sums(part.size());
    for (std::size_t i = 0; i < parts.size(); ++i) sums[i % part.size()] += parts[i];
    return sums;
  };
  all.gate = sum(own.gate);
  all.shared_up = sum(own.shared_up);
  all.losses = sum(own.losses);
  all.load = own.load;
  all.bias = own.bias;
  return all;
}

template <class Combine = ts::combine::reduced, class Comm>
outcome run_layer(const bootstrap& b, Comm& comm, const layer_problem& p, const std::vector<std::int64_t>& offsets) {
  using layer_type = layer_over<Comm, Combine>;
  auto options = full_bound<layer_type>();
  if constexpr (requires { comm.direct(); }) options.dispatch.host_sized = !comm.direct();
  if constexpr (requires { comm.ranks_per_host(); }) options.dispatch.ranks_per_host = comm.ranks_per_host();
  const auto r = static_cast<std::size_t>(b.rank);
  b.barrier();  // allocations are done before GPUs wait for one another
  rank_layer<layer_type> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / b.size,
                               ts::layout::block(p.sizes.num_experts, b.size), options);
  b.barrier();
  layer.step(ts::pass::train);
  layer.sync();
  outcome own = layer.results();
  layer.poison();
  layer.step(ts::pass::recompute);
  layer.sync();
  const outcome again = layer.results();
  CHECK(same_bits(again.y, own.y));
  CHECK(same_bits(again.dx, own.dx));
  CHECK(again.up == own.up);
  CHECK(again.down == own.down);
  CHECK(again.gate == own.gate);
  layer.poison();
  layer.step(ts::pass::eval);
  layer.sync();
  CHECK(same_bits(layer.results().y, own.y));
  layer.end_step();
  layer.sync();
  own.load = layer.results().load;
  own.bias = layer.results().bias;
  b.barrier();
  return join_over(b, own);
}

void expect_same(const outcome& a, const outcome& b) {
  check_same(a, b);
  CHECK(a.losses == b.losses);
  CHECK(a.load == b.load);
  CHECK(a.bias == b.bias);
}

}  // namespace

TEST_CASE("dispatch and combine between processes, and between hosts one row for each of them") {
  using namespace exchange_cases;
  rank_launcher::instance().run([](const bootstrap& b) {
    findings found;
    std::vector<int> tokens;
    for (int r = 0; r < b.size; ++r) tokens.push_back(r == 1 ? 0 : 500 - 7 * r);
    const ts::layout::block layout(64, b.size);
    const auto check = [&](auto& comm, const routing_case& c, bool print) {
      const expected_world e(c, layout, options_of(c), 5);
      b.barrier();
      host_sized_rank rank(comm, c, layout, options_of(c));
      b.barrier();
      rank.check(e.data, e.lists, e.outputs, found);
      if (!print) return;
      const auto counts = rank.exchange();
      const std::int64_t row_bytes = c.hidden * 2;
      std::printf("rank %d: %d ranks a host, %lld bytes to other hosts, %lld inside the host\n", b.rank,
                  counts.grid.ranks_per_host, static_cast<long long>(counts.rows_across() * row_bytes),
                  static_cast<long long>(counts.rows_within() * row_bytes));
    };
    for (const auto kind : {routing_kind::uniform, routing_kind::skewed, routing_kind::gaps}) {
      const routing_case c{tokens, 500, 256, 64, 8, kind};
      auto flat = make_nccl(b);
      check(flat, c, kind == routing_kind::uniform);
      if (b.size % 2 == 0 && b.size >= 4) {
        auto comm = two_hosts::create(flat, b.size / 2);
        check(comm, c, kind == routing_kind::uniform);
      }
      b.barrier();
    }
    for (const std::string& what : found.wrong) FAIL_CHECK(what);
  });
}

TEST_CASE("the layer over NCCL follows the host in double, and every way there gives the same bits") {
  rank_launcher::instance().run([](const bootstrap& b) {
    auto p = make_problem({.num_experts = 32, .top_k = 6, .hidden = 192, .intermediate = 64, .num_shared_experts = 1},
                          500, true, 17, true);
    const auto offsets = split_of(p.num_tokens, b.size);
    p.sequence_offsets.assign(offsets.begin(), offsets.end());
    outcome flat;
    {
      auto comm = make_nccl(b);
      flat = run_layer(b, comm, p, offsets);
      if (b.rank == 0) {
        check_step(flat, run_problem<host_layer>(p, ts::layout::block(p.sizes.num_experts, 1), {0, p.num_tokens},
                                                 router_options(), {}));
      }
      b.barrier();
      if (b.size % 2 == 0 && b.size >= 4) {
        auto hosts = two_hosts::create(comm, b.size / 2);
        const outcome by_host = run_layer(b, hosts, p, offsets);
        CHECK(by_host.up == flat.up);  // rows and lists are the same, and so are the products
        CHECK(by_host.down == flat.down);
        CHECK(by_host.gate == flat.gate);
        CHECK(device_test::relative_error(widened(by_host.y), widened(flat.y)) <= 5e-3);
        CHECK(device_test::relative_error(widened(by_host.dx), widened(flat.dx)) <= 5e-3);
      }
      b.barrier();
    }
    for (const bool allow_direct : {true, false}) {
      CAPTURE(allow_direct);
      auto comm = make_symmetric(b, allow_direct);
      if (b.rank == 0) std::printf("direct: %d %s\n", comm.direct() ? 1 : 0, comm.reason().c_str());
      if (!allow_direct) CHECK_FALSE(comm.direct());
      CHECK(comm.direct() == comm.reason().empty());
      if (rank_launcher::instance().hosts() > 1) CHECK_FALSE(comm.direct());
      expect_same(run_layer(b, comm, p, offsets), flat);
      b.barrier();
    }
  });
}

TEST_CASE("with combine::ordered the layer computes the bits of one GPU over NCCL, and over hosts") {
  rank_launcher::instance().run([](const bootstrap& b) {
    using combine = ts::combine::ordered;
    auto p = make_problem({.num_experts = 32, .top_k = 6, .hidden = 192, .intermediate = 64, .num_shared_experts = 1},
                          500, true, 19, true);
    const auto offsets = split_of(p.num_tokens, b.size);
    p.sequence_offsets.assign(offsets.begin(), offsets.end());  // a sequence stays whole on one rank
    ts::comm::self<ts::space::device> self;
    rank_layer<layer_over<ts::comm::self<ts::space::device>>> one(self, p, router_options(), 0, p.num_tokens,
                                                                  p.num_tokens);
    one.step(ts::pass::train);
    one.sync();
    const outcome alone = one.results();
    const auto check = [&](const outcome& got) {
      CHECK(same_bits(got.y, alone.y));
      CHECK(same_bits(got.dx, alone.dx));
      CHECK(got.up == alone.up);
      CHECK(got.down == alone.down);
    };
    auto comm = make_nccl(b);
    check(run_layer<combine>(b, comm, p, offsets));
    b.barrier();
    if (b.size % 2 == 0 && b.size >= 4) {
      auto hosts = two_hosts::create(comm, b.size / 2);
      check(run_layer<combine>(b, hosts, p, offsets));
    }
    b.barrier();
  });
}

TEST_CASE("a layer says what its communicator cannot do before anything is enqueued") {
  rank_launcher::instance().run([](const bootstrap& b) {
    using layer_type = layer_over<ts::comm::symmetric>;
    auto comm = make_symmetric(b, false);
    const ts::shape sizes{.num_experts = 32, .top_k = 6, .hidden = 192, .intermediate = 64, .max_tokens = 64};
    const ts::layout::block placement(32, b.size);
    device_test::buffer<std::byte> state(layer_type::sizes(sizes, placement, b.rank).state_bytes);
    std::string text;
    try {
      layer_type layer(sizes, router_options(), placement, comm, ts::state_memory(state.data(), state.size()));
    } catch (const ts::invalid_argument& e) {
      text = e.what();
    }
    CHECK_MESSAGE(text.find("its options do not allow it") != std::string::npos, text);
    CHECK_MESSAGE(text.find("host_sized") != std::string::npos, text);
    b.barrier();
  });
}

int main(int argc, char** argv) {
  if (const int code = rank_launcher::instance().parse(argc, argv); code >= 0) return code;
  using device_test::skips;
  if (skips(device_test::no_device()) || skips(tessera::detail::nccl::version_problem()))
    return device_test::skip_return_code;
  return doctest::Context(argc, argv).run();
}

#endif
