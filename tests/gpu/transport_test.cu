// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Transports between GPUs: each brings the rows that have a destination, and sums of the same bits as
// transport::all_to_all, which exchange_test.cu compares with the host's. Ranks share a GPU where there are fewer GPUs
// than ranks.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include <tessera/core/dtype.hpp>
#include <tessera/dispatch/transport.cuh>
#include <tessera/layout/block.hpp>

#include "../support/bits.hpp"
#include "peer_ranks.cuh"

namespace {

namespace ts = tessera;
namespace transport = tessera::transport;
using bf16 = ts::bfloat16;
using device_test::has_gpus;
using device_test::peer_rank;
using device_test::peer_ranks;
using device_test::require;
using device_test::text_of;
using tessera_test::same_bits;

// Streams of ranks that share a GPU must not wait for each other by chance.
const int connections = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
// Loading a kernel when it is first launched may wait for kernels that wait for other ranks of the same GPU.
const int loading = setenv("CUDA_MODULE_LOADING", "EAGER", 1);

constexpr std::size_t window_bytes = std::size_t{128} << 20;  // the largest problem takes 117 MiB of each rank

struct problem {
  std::vector<int> tokens;  // of each rank
  int max_tokens;
  int hidden;
  int num_experts;
  int top_k;
  std::int64_t row_bound = ts::dispatch_options::full_row_bound;
  int padding = 0;  // columns between rows of x

  int ranks() const { return static_cast<int>(tokens.size()); }
};

// One rank's tokens and routing; some pairs have no expert.
struct rank_data {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  std::vector<bf16> x;

  rank_data(const problem& p, int rank, unsigned seed) {
    std::mt19937 generator(seed * 97u + static_cast<unsigned>(rank));
    const int tokens = p.tokens[static_cast<std::size_t>(rank)];
    for (int t = 0; t < tokens; ++t) {
      std::vector<std::int32_t> all(static_cast<std::size_t>(p.num_experts));
      for (int e = 0; e < p.num_experts; ++e) all[static_cast<std::size_t>(e)] = e;
      std::shuffle(all.begin(), all.end(), generator);
      const bool alone = generator() % 8 == 0;  // a token without any expert
      for (int k = 0; k < p.top_k; ++k) {
        ids.push_back(alone || generator() % 5 == 0 ? -1 : all[static_cast<std::size_t>(k)]);
        weights.push_back(static_cast<float>(generator() % 1000) / 1000.0f);
      }
    }
    for (int i = 0; i < tokens * (p.hidden + p.padding); ++i) {
      x.push_back(bf16(static_cast<float>(static_cast<int>(generator() % 2001) - 1000) / 256.0f));
    }
  }
};

template <class T>
std::vector<T> get(const peer_rank& rank, const T* from, std::int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  // A copy to pageable memory that waits for kernels may keep other ranks of the same GPU from launching theirs.
  require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
  if (count > 0) {
    require(
        cudaMemcpyAsync(values.data(), from, values.size() * sizeof(T), cudaMemcpyDeviceToHost, rank.stream().get()),
        "copy");
  }
  require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
  return values;
}
template <class T>
void put(const peer_rank& rank, T* to, const std::vector<T>& values) {
  require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
  if (!values.empty()) {
    require(cudaMemcpyAsync(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, rank.stream().get()),
            "copy");
  }
  require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
}

// What arrived and what came home.
struct outcome {
  std::vector<bf16> received, weighted, plain, summed;
};

// One rank's memory and work.
class rank_case {
 public:
  rank_case(peer_rank& rank, const problem& p)
      : rank_(rank),
        p_(p),
        layout_(p.num_experts, rank.size()),
        tokens_(p.tokens[static_cast<std::size_t>(rank.rank())]) {
    options_.row_bound = p.row_bound;
    if (p.row_bound > 0) options_.overflow = ts::overflow_policy::drop;
    bounds_ = ts::dispatch_bounds::make(rank.size(), p.num_experts, layout_.num_slots(rank.rank()), p.top_k,
                                        p.max_tokens, options_);
    rank.release_all();
    ts::memory_builder counting;
    carve(counting);
    const ts::workspace_memory memory(rank.take<std::byte>(static_cast<std::int64_t>(counting.bytes())),
                                      counting.bytes());
    ts::memory_builder builder(memory, "transport_test");
    carve(builder);
    require(cudaMemsetAsync(barrier_, 0, sizeof(*barrier_), rank.stream().get()), "cudaMemsetAsync");
    std::mt19937 generator(static_cast<unsigned>(rank.rank()) + 7u);
    for (auto [rows, count] : {std::pair{pairs_, bounds_.max_pairs},
                               {sums_, bounds_.addressed_rows()},
                               {plus_, std::int64_t{p.max_tokens}}}) {
      std::vector<bf16> values;
      for (std::int64_t i = 0; i < count * p.hidden; ++i) {
        values.push_back(bf16(static_cast<float>(static_cast<int>(generator() % 2001) - 1000) / 300.0f));
      }
      put(rank_, rows, values);
    }
  }

  void set(const rank_data& data) {
    put(rank_, ids_, data.ids);
    put(rank_, weights_, data.weights);
    put(rank_, x_, data.x);
  }

  // NaN wherever an operation should write.
  void poison() {
    const std::int64_t rows = bounds_.addressed_rows();
    for (auto [data, count] : {std::pair{received_, rows},
                               {returned_, rows},
                               {outgoing_, rows},
                               {y_[0], std::int64_t{p_.max_tokens}},
                               {y_[1], std::int64_t{p_.max_tokens}},
                               {y_[2], std::int64_t{p_.max_tokens}}}) {
      require(
          cudaMemsetAsync(data, 0xff, static_cast<std::size_t>(count * p_.hidden) * sizeof(bf16), rank_.stream().get()),
          "cudaMemsetAsync");
    }
  }

  // Routing, rows and three ways home. @param early Whether rows leave before there is a routing.
  template <class Transport>
  void run(const Transport& how, bool early = false) {
    const auto stream = rank_.stream();
    const ts::routing<float> chosen{{ids_, tokens_, p_.top_k}, {weights_, tokens_, p_.top_k}};
    const std::int64_t rows = bounds_.addressed_rows();
    const ts::matrix_view<bf16> received{received_, rows, p_.hidden};
    if (early) ts::dispatch_begin(stream, rank_, x(), received, how);
    ts::exchange_routing_begin(stream, rank_, layout_, bounds_, options_, chosen, handle_, workspace_);
    if (!early) ts::dispatch_begin(stream, rank_, handle_, x(), received, how);
    ts::exchange_routing_end(stream, rank_);
    ts::dispatch_end(stream, rank_, received, how);
    const ts::matrix_view<const bf16> pairs{pairs_, bounds_.max_pairs, p_.hidden};
    combine(how, ts::combine_weights::routing, ts::combine_source::expert_rows, pairs, plus(), y_[0]);
    combine(how, ts::combine_weights::none, ts::combine_source::expert_rows, pairs, {}, y_[1]);
    combine(how, ts::combine_weights::none, ts::combine_source::summed_rows,
            ts::matrix_view<const bf16>{sums_, rows, p_.hidden}, plus(), y_[2]);
  }

  // Parts of it, for ranks that others do not follow.
  template <class Transport>
  void begin_rows_alone(const Transport& how) {
    ts::dispatch_begin(rank_.stream(), rank_, handle_, x(), received(), how);
    ts::dispatch_end(rank_.stream(), rank_, received(), how);
  }
  template <class Transport>
  void combine_alone(const Transport& how) {
    combine(how, ts::combine_weights::routing, ts::combine_source::expert_rows,
            ts::matrix_view<const bf16>{pairs_, bounds_.max_pairs, p_.hidden}, plus(), y_[0]);
  }

  outcome results() const {
    const std::int64_t count = std::int64_t{tokens_} * p_.hidden;
    return {get(rank_, received_, bounds_.addressed_rows() * p_.hidden), get(rank_, y_[0], count),
            get(rank_, y_[1], count), get(rank_, y_[2], count)};
  }

  const ts::layout::block& layout() const { return layout_; }
  peer_rank& rank() const { return rank_; }
  ts::matrix_view<const bf16> x() const { return {x_, tokens_, p_.hidden, p_.hidden + p_.padding}; }
  ts::matrix_view<bf16> received() const { return {received_, bounds_.addressed_rows(), p_.hidden}; }

 private:
  void carve(ts::memory_builder& b) {
    const std::int64_t rows = bounds_.addressed_rows();
    const std::int64_t max_tokens = p_.max_tokens;
    workspace_.tables = ts::routing_tables<float>::layout(b, bounds_);
    received_ = b.take<bf16>("received", rows * p_.hidden);
    returned_ = b.take<bf16>("returned", rows * p_.hidden);
    outgoing_ = b.take<bf16>("outgoing", rows * p_.hidden);
    handle_ = ts::dispatch_handle<float>::layout_device(b, bounds_, true);
    barrier_ = b.take<std::uint32_t>("barrier", 1);
    workspace_.sort = ts::router_workspace::layout(b, p_.num_experts, barrier_);
    ids_ = b.take<std::int32_t>("ids", max_tokens * p_.top_k);
    weights_ = b.take<float>("weights", max_tokens * p_.top_k);
    x_ = b.take<bf16>("x", max_tokens * (p_.hidden + p_.padding));
    pairs_ = b.take<bf16>("pairs", bounds_.max_pairs * p_.hidden);
    sums_ = b.take<bf16>("sums", rows * p_.hidden);
    plus_ = b.take<bf16>("plus", max_tokens * p_.hidden);
    for (bf16*& y : y_) y = b.take<bf16>("y", max_tokens * p_.hidden);
  }
  template <class Transport>
  void combine(const Transport& how, ts::combine_weights weights, ts::combine_source source,
               ts::matrix_view<const bf16> rows, ts::matrix_view<const bf16> plus, bf16* y) {
    const ts::matrix_view<bf16> returned{returned_, bounds_.addressed_rows(), p_.hidden};
    const ts::matrix_view<bf16> outgoing{outgoing_, ts::outgoing_rows(how, bounds_), p_.hidden};
    ts::combine_rows(rank_.stream(), rank_, handle_, weights, source, rows, returned, plus,
                     ts::matrix_view<bf16>{y, tokens_, p_.hidden}, how, outgoing);
  }
  ts::matrix_view<const bf16> plus() const { return {plus_, tokens_, p_.hidden}; }

  peer_rank& rank_;
  problem p_;
  ts::layout::block layout_;
  int tokens_;
  ts::dispatch_options options_{};
  ts::dispatch_bounds bounds_{};
  ts::symmetric_routing_workspace<float> workspace_{};
  ts::dispatch_handle<float> handle_{};
  std::uint32_t* barrier_ = nullptr;
  std::int32_t* ids_ = nullptr;
  float* weights_ = nullptr;
  bf16 *received_ = nullptr, *returned_ = nullptr, *outgoing_ = nullptr;
  bf16 *x_ = nullptr, *pairs_ = nullptr, *sums_ = nullptr, *plus_ = nullptr;
  bf16* y_[3] = {};
};

class findings {
 public:
  void add(int rank, const std::string& what) {
    const std::lock_guard lock(mutex_);
    if (wrong_.size() < 20) wrong_.push_back("rank " + std::to_string(rank) + ": " + what);
  }
  void report() const {
    for (const std::string& what : wrong_) FAIL_CHECK(what);
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> wrong_;
};

// Rows with an expert on this rank are what their ranks sent. @return how many there are.
int check_rows(const rank_case& c, const problem& p, const std::vector<rank_data>& data,
               const std::vector<bf16>& received, const std::string& what, findings& found) {
  int arrived = 0;
  const auto width = static_cast<std::size_t>(p.hidden);
  for (int s = 0; s < p.ranks(); ++s) {
    const rank_data& from = data[static_cast<std::size_t>(s)];
    for (int t = 0; t < p.tokens[static_cast<std::size_t>(s)]; ++t) {
      bool here = false;
      for (int k = 0; k < p.top_k; ++k) {
        const std::int32_t id = from.ids[static_cast<std::size_t>(t * p.top_k + k)];
        here = here || (id >= 0 && c.layout().owner(id).rank == c.rank().rank());
      }
      if (!here) continue;
      ++arrived;
      const auto row = static_cast<std::size_t>(s * p.max_tokens + t);
      if (std::memcmp(received.data() + row * width,
                      from.x.data() + static_cast<std::size_t>(t) * (width + static_cast<std::size_t>(p.padding)),
                      width * sizeof(bf16)) != 0) {
        found.add(c.rank().rank(), what + ": token " + std::to_string(t) + " of rank " + std::to_string(s));
        return arrived;
      }
    }
  }
  return arrived;
}

void compare(int rank, const outcome& got, const outcome& expected, const std::string& what, findings& found) {
  if (!same_bits(got.weighted, expected.weighted)) found.add(rank, what + ": weighted sums");
  if (!same_bits(got.plain, expected.plain)) found.add(rank, what + ": plain sums");
  if (!same_bits(got.summed, expected.summed)) found.add(rank, what + ": sums of sums");
}

// `f(name, transport, early)` for every transport between `ranks` ranks.
template <class F>
void for_each_transport(int ranks, F f) {
  f("all_to_all", transport::all_to_all{}, false);
  f("all_to_all, own rows copied", transport::all_to_all{.copies_own_rows = true}, false);
  f("all_gather", transport::all_gather{}, false);
  f("all_gather before the routing", transport::all_gather{}, true);
  f("copy_engines", transport::copy_engines{}, false);
  f("copy_engines before the routing", transport::copy_engines{.streams = 1, .chunks = 1}, true);
  f("copy_engines, a stream for each peer", transport::copy_engines{.streams = std::max(ranks - 1, 1), .chunks = 3},
    false);
  f("copy_engines, two streams and many chunks", transport::copy_engines{.streams = 2, .chunks = 20}, false);
  f("automatic: all_gather", transport::automatic(transport::all_gather{}), false);
  f("automatic: copy_engines", transport::automatic(transport::copy_engines{.streams = 2, .chunks = 2}), false);
  ts::transport_case sizes;
  sizes.num_ranks = ranks;
  sizes.num_experts = 256;
  sizes.top_k = 8;
  sizes.num_tokens = 8192;
  sizes.row_bytes = 14336;
  sizes.copy_streams = 1;
  f("automatic", transport::automatic(sizes), false);
  sizes.compute_us = 1e4;   // hides copies there, and those home cost more than that: each way another transport
  sizes.dispatch_sms = 64;  // with fewer the kernel costs less than a copy of own rows
  ts::transport_machine slow_home;
  slow_home.copied_sums_us = 1e6;
  const transport::automatic mixed(sizes, slow_home);
  if (ranks > 1) CHECK(mixed.dispatch() == ts::transport_kind::copy_engines);
  CHECK(mixed.combine() == ts::transport_kind::all_to_all);
  f("automatic: copies there, all_to_all home", mixed, false);
}

void check_problem(const problem& p) {
  CAPTURE(p.ranks());
  CAPTURE(p.max_tokens);
  if (!has_gpus(p.ranks(), 1)) return;
  peer_ranks ranks(p.ranks(), window_bytes, std::max(p.ranks(), 3));
  findings found;
  std::vector<rank_data> data;
  for (int r = 0; r < p.ranks(); ++r) data.emplace_back(p, r, 11);
  ranks.run([&](peer_rank& rank) {
    rank_case c(rank, p);
    c.set(data[static_cast<std::size_t>(rank.rank())]);
    outcome expected;
    for_each_transport(p.ranks(), [&](const std::string& name, const auto& how, bool early) {
      for (int round = 0; round < 2; ++round) {
        c.poison();
        c.run(how, early);
        const outcome got = c.results();
        if (name == "all_to_all" && round == 0) expected = got;
        check_rows(c, p, data, got.received, name, found);
        compare(rank.rank(), got, expected, name, found);
      }
    });
    // a sum with a NaN would be one of memory that nobody wrote
    for (const auto* sums : {&expected.weighted, &expected.plain, &expected.summed}) {
      if (std::any_of(sums->begin(), sums->end(),
                      [](bf16 v) { return static_cast<float>(v) != static_cast<float>(v); }))
        found.add(rank.rank(), "NaN in sums");
    }
    if (rank.failure().state != 0) found.add(rank.rank(), text_of(rank.failure()));
  });
  found.report();
}

}  // namespace

TEST_CASE("every transport brings the same rows, and sums of the same bits") {
  check_problem({{61, 54}, 64, 192, 16, 4});
  check_problem({{200, 3, 120}, 256, 1024, 18, 5});
  check_problem({{61, 54, 47, 40}, 64, 264, 32, 8});
  check_problem({{777, 1024, 1000, 513}, 1024, 2048, 32, 2});
}

TEST_CASE("a rank without tokens, one token, ranks without experts, rows with gaps between them") {
  check_problem({{50, 0, 31}, 50, 72, 24, 6});
  check_problem({{0, 1}, 3, 8, 4, 2});
  check_problem({{50, 40, 31}, 50, 136, 2, 2});
  problem gaps{{90, 33}, 100, 256, 16, 4};
  gaps.padding = 24;
  check_problem(gaps);
}

TEST_CASE("rows of which a bound has dropped pairs, or all of them") {
  problem dropping{{300, 280}, 300, 64, 8, 3};
  dropping.row_bound = 400;
  check_problem(dropping);
}

TEST_CASE("a graph with each transport is replayed with other tokens") {
  const problem p{{120, 77, 100}, 128, 512, 24, 4};
  if (!has_gpus(p.ranks(), 1)) return;
  std::vector<std::vector<rank_data>> data(2);
  for (int r = 0; r < p.ranks(); ++r) {
    data[0].emplace_back(p, r, 21);
    data[1].emplace_back(p, r, 22);
  }
  for_each_transport(p.ranks(), [&](const std::string& name, const auto& how, bool early) {
    CAPTURE(name);
    peer_ranks ranks(p.ranks(), window_bytes, 4);
    findings found;
    std::vector<std::unique_ptr<rank_case>> cases(3);
    std::vector<cudaGraphExec_t> graphs(3);
    // Nobody waits for a rank that instantiates a graph.
    ranks.run([&](peer_rank& rank) {
      const auto r = static_cast<std::size_t>(rank.rank());
      cases[r] = std::make_unique<rank_case>(rank, p);
      graphs[r] = device_test::capture(rank.stream().get(), [&] { cases[r]->run(how, early); });
      require(cudaGraphUpload(graphs[r], rank.stream().get()), "cudaGraphUpload");
      require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
    });
    ranks.run([&](peer_rank& rank) {
      const auto r = static_cast<std::size_t>(rank.rank());
      rank_case& c = *cases[r];
      for (const auto& tokens : data) {
        c.set(tokens[r]);
        c.poison();
        c.run(transport::all_to_all{});
        const outcome expected = c.results();
        c.poison();
        for (int times = 0; times < 3; ++times) {
          ranks.wait_for_all();
          require(cudaGraphLaunch(graphs[r], rank.stream().get()), "cudaGraphLaunch");
        }
        const outcome got = c.results();
        if (check_rows(c, p, tokens, got.received, name, found) == 0) found.add(rank.rank(), "no rows");
        compare(rank.rank(), got, expected, name, found);
      }
      if (rank.failure().state != 0) found.add(rank.rank(), text_of(rank.failure()));
      require(cudaGraphExecDestroy(graphs[r]), "cudaGraphExecDestroy");
    });
    found.report();
  });
}

TEST_CASE("a rank that does not come is named by the others within the timeout, and every stream ends") {
  const problem p{{30, 28, 20}, 30, 64, 9, 4};
  if (!has_gpus(p.ranks(), 1)) return;
  enum class missing { rows, sums };
  for_each_transport(p.ranks(), [&](const std::string& name, const auto& how, bool early) {
    if (early) return;
    for (const missing what : {missing::rows, missing::sums}) {
      CAPTURE(name);
      CAPTURE(static_cast<int>(what));
      peer_ranks ranks(p.ranks(), window_bytes, 4);
      std::vector<rank_data> data;
      for (int r = 0; r < p.ranks(); ++r) data.emplace_back(p, r, 5);
      std::vector<std::unique_ptr<rank_case>> cases(3);
      ranks.run([&](peer_rank& rank) {
        rank.timeout_ns = 300'000'000;
        const auto r = static_cast<std::size_t>(rank.rank());
        cases[r] = std::make_unique<rank_case>(rank, p);
        cases[r]->set(data[r]);
        cases[r]->run(transport::all_to_all{});
        require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
      });
      ranks.run([&](peer_rank& rank) {
        if (rank.rank() == 1) return;
        rank_case& c = *cases[static_cast<std::size_t>(rank.rank())];
        if (what == missing::rows) {
          c.begin_rows_alone(how);
        } else {
          c.combine_alone(how);
        }
        require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
      });
      for (const int r : {0, 2}) {
        const auto failure = ranks[r].failure();
        CHECK(failure.state != 0);
        CHECK(failure.rank == r);
        CHECK(failure.peer == 1);
        CHECK(failure.channel ==
              (what == missing::rows ? ts::comm::symmetric_channel::rows : ts::comm::symmetric_channel::sums));
        CHECK(failure.step == ts::comm::symmetric_step::entry);
      }
      CHECK(ranks[1].failure().state == 0);
    }
  });
}

TEST_CASE("what does not fit is refused before anything is enqueued") {
  const problem p{{30, 28}, 30, 64, 8, 4};
  peer_ranks ranks(2, window_bytes, 1);
  ranks.run([&](peer_rank& rank) {
    rank_case c(rank, p);
    const auto begin = [&](const auto& how) { ts::dispatch_begin(rank.stream(), rank, c.x(), c.received(), how); };
    CHECK_THROWS_AS(begin(transport::all_to_all{}), ts::invalid_argument);    // without a routing
    CHECK_THROWS_AS(begin(transport::automatic{}), ts::invalid_argument);     // the same
    CHECK_THROWS_AS(begin(transport::copy_engines{}), ts::invalid_argument);  // needs two streams of copies
    CHECK_THROWS_AS(begin(transport::copy_engines{0}), ts::invalid_argument);
    CHECK_THROWS_AS(c.combine_alone(transport::copy_engines{.streams = 2}), ts::invalid_argument);
    CHECK_THROWS_AS(c.combine_alone(transport::copy_engines{.streams = 1, .chunks = 0}), ts::invalid_argument);
    CHECK_THROWS_AS(c.combine_alone(transport::copy_engines{.streams = 1, .chunks = 5000}), ts::invalid_argument);
  });
}
