// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Dispatch and combine between GPUs over and over: routings, outputs of experts and checks are made by kernels from the
// number of the round, so that thousands of rounds run as graphs without the host. All numbers are small integers, and
// sums of them exact in any order. Then ranks that stop at every phase of a round, half-way through it too, and the way
// back. Ranks share a GPU where there are fewer GPUs than ranks.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <tessera/comm/load_kernels.cuh>
#include <tessera/core/dtype.hpp>
#include <tessera/dispatch/expanded.cuh>
#include <tessera/dispatch/symmetric.cuh>
#include <tessera/layout/block.hpp>

#include "peer_ranks.cuh"

namespace {

namespace ts = tessera;
namespace flags = tessera::detail::symmetric;
using bf16 = ts::bfloat16;
using device_test::has_gpus;
using device_test::peer_rank;
using device_test::peer_ranks;
using device_test::require;
using device_test::text_of;
using ts::comm::symmetric_channel;
using ts::comm::symmetric_step;

// Streams of ranks that share a GPU must not wait for each other by chance.
const int connections = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
// Kernels are loaded by `load_kernels` alone, unless the environment says otherwise.
const int loading = setenv("CUDA_MODULE_LOADING", "LAZY", 0);

constexpr int num_experts = 16;  // a power of two, so that steps of odd length visit different experts
constexpr int top_k = 4;
constexpr int hidden = 136;
constexpr int max_tokens = 288;  // sorted by more blocks than wait by themselves

__host__ __device__ constexpr std::uint32_t mix(std::uint32_t round, int a, int b) {
  std::uint32_t x = round * 0x9e3779b9u + static_cast<std::uint32_t>(a) * 0x85ebca6bu + static_cast<std::uint32_t>(b);
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The numbers of a round. Some rounds are uniform, in some most tokens choose few experts, in some pairs are missing.
__host__ __device__ constexpr int expert_of(std::uint32_t round, int rank, int token, int k) {
  const std::uint32_t chance = mix(round, rank * max_tokens + token, 1);
  const auto kind = round % 4;
  if (kind == 2 && mix(round, rank * max_tokens + token, 10 + k) % 3 == 0) return -1;
  const std::uint32_t first = kind == 3 ? round % num_experts : chance % num_experts;
  const std::uint32_t step = kind == 3 ? 1 : (chance >> 8) % (num_experts / 2) * 2 + 1;
  return static_cast<int>((first + static_cast<std::uint32_t>(k) * step) % num_experts);
}
__host__ __device__ constexpr int weight_of(std::uint32_t round, int rank, int token, int k) {
  return 1 + static_cast<int>(mix(round, rank * max_tokens + token, 30 + k) % 2);
}
__host__ __device__ constexpr int x_of(std::uint32_t round, int rank, int token, int column) {
  return static_cast<int>(mix(round, rank * max_tokens + token, 100 + column) % 4);
}
__host__ __device__ constexpr int factor_of(int expert) { return 1 + expert % 4; }
// What an expert says of a pair, on its way home.
__host__ __device__ constexpr int value_of(std::uint32_t round, int row, int expert) {
  return row * num_experts + expert + static_cast<int>(round % 1000);
}
__host__ __device__ constexpr int tokens_of_rank(int rank) { return rank == 3 ? 0 : max_tokens - 7 * rank; }

struct chain_words {
  std::uint32_t round;
  std::uint32_t wrong;        // sums and values that are not as they should be
  std::uint32_t first_wrong;  // the round of the first, and 1
};

struct chain_arrays {
  int rank;
  int ranks;
  chain_words* words;
  std::int32_t* ids;
  float* weights;
  bf16* x;
  const bf16* received;
  bf16* expanded;
  bf16* pairs;
  float* values;
  bf16* y;
  const float* home_values;
  ts::layout::block layout;
  ts::dispatch_handle<float> handle;
};

__global__ void begin_round_kernel(const __grid_constant__ chain_arrays a) {
  const std::uint32_t round = a.words->round;
  // ranks are late at random, by up to some 20 microseconds
  const std::uint32_t chance = mix(round, a.rank, 7);
  if (chance % 4 == 0) {
    const long long start = clock64();
    while (clock64() - start < static_cast<long long>((chance >> 2) % 40000)) {
    }
  }
  const int tokens = tokens_of_rank(a.rank);
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int threads = static_cast<int>(gridDim.x * blockDim.x);
  for (int pair = index; pair < tokens * top_k; pair += threads) {
    a.ids[pair] = expert_of(round, a.rank, pair / top_k, pair % top_k);
    a.weights[pair] = static_cast<float>(weight_of(round, a.rank, pair / top_k, pair % top_k));
  }
  for (int i = index; i < tokens * hidden; i += threads) {
    a.x[i] = bf16(static_cast<float>(x_of(round, a.rank, i / hidden, i % hidden)));
  }
}

// One block a row of experts, as many as there may be. @param in_order Whether rows stand in the order of experts.
__global__ void experts_kernel(const __grid_constant__ chain_arrays a, bool in_order) {
  const std::uint32_t round = a.words->round;
  const auto i = static_cast<int>(blockIdx.x);
  const std::int32_t* const offsets = a.handle.expert_offsets;
  if (i >= offsets[a.handle.num_local_experts]) return;
  int slot = 0;
  while (i >= offsets[slot + 1]) ++slot;
  const int expert = a.layout.expert_at(a.rank, slot);
  const int row = a.handle.gather[i];
  const bf16* const x = in_order ? a.expanded + i * hidden : a.received + row * hidden;
  for (int j = static_cast<int>(threadIdx.x); j < hidden; j += static_cast<int>(blockDim.x))
    a.pairs[i * hidden + j] = bf16(static_cast<float>(x[j]) * static_cast<float>(factor_of(expert)));
  if (threadIdx.x == 0) a.values[i] = static_cast<float>(value_of(round, row, expert));
}

// One block a token.
__global__ void check_kernel(const __grid_constant__ chain_arrays a) {
  const std::uint32_t round = a.words->round;
  const auto t = static_cast<int>(blockIdx.x);
  const auto expect = [&](float found, int expected) {
    if (found == static_cast<float>(expected)) return;
    atomicAdd(&a.words->wrong, 1u);
    atomicCAS(&a.words->first_wrong, 0u, round + 1);
  };
  for (int j = static_cast<int>(threadIdx.x); j < hidden; j += static_cast<int>(blockDim.x)) {
    int sum = 0;
    for (int k = 0; k < top_k; ++k) {
      const int expert = expert_of(round, a.rank, t, k);
      if (expert < 0) continue;
      sum += weight_of(round, a.rank, t, k) * factor_of(expert) * x_of(round, a.rank, t, j);
    }
    expect(static_cast<float>(a.y[t * hidden + j]), sum);
  }
  const auto k = static_cast<int>(threadIdx.x);
  if (k >= top_k) return;
  const int expert = expert_of(round, a.rank, t, k);
  expect(a.home_values[t * top_k + k], expert < 0 ? 0 : value_of(round, a.rank * max_tokens + t, expert));
}

__global__ void end_round_kernel(chain_words* words) { ++words->round; }

// Comes to an operation, perhaps says that a few of its parts are there, and is never heard of again.
__global__ void half_operation_kernel(const __grid_constant__ ts::comm::symmetric_view view, int chunks) {
  const std::uint32_t generation = flags::next_generation(view);
  flags::announce(view, generation);
  for (int i = 0; i < chunks; ++i) {
    const int r = static_cast<int>(threadIdx.x);
    if (r >= view.size) continue;
    flags::post(flags::at_peer(view, view.chunks + view.rank * ts::comm::max_symmetric_chunks + i, r), generation);
  }
}

// What a round does, in this order: rows or parts, sums or pairs. The two kinds of combine use one channel.
enum class phase { tables, rows, parts, sums, pairs, values, none };

// How rows come to experts: where they arrive, or in the order of experts, put there as they come or behind them all.
enum class rows_in { arrival, order, order_behind };
struct round_kind {
  rows_in rows;
  bool ordered;  // combine_pairs
};
constexpr round_kind kind_of(int round) { return {static_cast<rows_in>(round % 3), round % 2 != 0}; }

symmetric_channel channel_of(phase p) {
  switch (p) {
    case phase::tables:
      return symmetric_channel::tables;
    case phase::rows:
      return symmetric_channel::rows;
    case phase::parts:
      return symmetric_channel::parts;
    case phase::values:
      return symmetric_channel::values;
    default:
      return symmetric_channel::sums;
  }
}

// One rank's memory and work.
class rank_chain {
 public:
  explicit rank_chain(peer_rank& rank)
      : rank_(rank), options_{}, layout_(num_experts, rank.size()), tokens_(tokens_of_rank(rank.rank())) {
    options_.row_bound = ts::dispatch_options::full_row_bound;
    bounds_ = bounds_with(options_);
    rank.release_all();
    const std::int64_t rows = bounds_.addressed_rows();
    workspace_.tables.slots = rank.take<std::int32_t>(rows * top_k);
    workspace_.tables.weights = rank.take<float>(rows * top_k);
    workspace_.tables.counts = rank.take<std::int32_t>(rank.size() * rank.size());
    received_ = {rank.take<bf16>(rows * hidden), rows, hidden};
    returned_ = {rank.take<bf16>(rows * hidden), rows, hidden};
    returned_pairs_ = {rank.take<bf16>(max_tokens * top_k * hidden), rank.take<std::int32_t>(max_tokens * top_k)};
    home_values_ = {rank.take<float>(max_tokens * top_k), max_tokens, top_k};
    workspace_.tables.block_counts =
        rank.take<std::int32_t>(ts::routing_tables<float>::max_blocks * ts::comm::max_symmetric_ranks);
    workspace_.sort.block_counts =
        rank.take<std::uint8_t>(ts::router_workspace::block_count_bytes(layout_.num_slots(rank.rank())));
    workspace_.sort.barrier = rank.take<std::uint32_t>(1);
    auto& handle = a_.handle;
    handle.total = rank.take<ts::dispatch_handle<float>::totals>(1);
    handle.destinations = rank.take<std::uint32_t>(max_tokens);
    handle.expert_row_of = rank.take<std::int32_t>(rows * top_k);
    handle.expert_offsets = rank.take<std::int32_t>(layout_.num_slots(rank.rank()) + 1);
    handle.gather = rank.take<std::int32_t>(bounds_.max_pairs);
    handle.pair_weights = rank.take<float>(bounds_.max_pairs);
    handle.set_sizes(bounds_);
    a_.rank = rank.rank();
    a_.ranks = rank.size();
    a_.words = rank.take<chain_words>(1);
    a_.ids = rank.take<std::int32_t>(max_tokens * top_k);
    a_.weights = rank.take<float>(max_tokens * top_k);
    a_.x = rank.take<bf16>(max_tokens * hidden);
    a_.received = received_.data;
    a_.expanded = rank.take<bf16>(bounds_.max_pairs * hidden);
    a_.pairs = rank.take<bf16>(bounds_.max_pairs * hidden);
    a_.values = rank.take<float>(bounds_.max_pairs);
    a_.y = rank.take<bf16>(max_tokens * hidden);
    a_.home_values = home_values_.data;
    a_.layout = layout_;
    require(cudaMemsetAsync(workspace_.sort.barrier, 0, sizeof(std::uint32_t), raw()), "cudaMemsetAsync");
    require(cudaMemsetAsync(a_.words, 0, sizeof(chain_words), raw()), "cudaMemsetAsync");
    synchronize();
  }

  ts::dispatch_bounds bounds_with(const ts::dispatch_options& options) const {
    return ts::dispatch_bounds::make(rank_.size(), num_experts, layout_.num_slots(rank_.rank()), top_k, max_tokens,
                                     options);
  }

  // A round, up to and without the phase `until`.
  void round(round_kind kind, phase until = phase::none) { round(kind, until, bounds_, options_); }
  void round(round_kind kind, phase until, const ts::dispatch_bounds& bounds, const ts::dispatch_options& options) {
    const auto stream = rank_.stream();
    begin_round_kernel<<<4, 256, 0, raw()>>>(a_);
    if (until == phase::tables) return;
    const ts::routing<float> chosen{{a_.ids, tokens_, top_k}, {a_.weights, tokens_, top_k}};
    ts::exchange_routing_begin(stream, rank_, layout_, bounds, options, chosen, a_.handle, workspace_);
    const bool stops = until == phase::rows || until == phase::parts;
    const bool in_order = kind.rows != rows_in::arrival;
    const ts::matrix_view<const bf16> x{a_.x, tokens_, hidden};
    if (!stops && in_order)
      flags::begin_expanded(stream, rank_, a_.handle, x, received_,
                            ts::matrix_view<bf16>{a_.expanded, bounds_.max_pairs, hidden}, kind.rows == rows_in::order);
    else if (!stops)
      ts::dispatch_begin(stream, rank_, a_.handle, x, received_);
    ts::exchange_routing_end(stream, rank_);
    if (stops) return;
    if (!in_order) ts::dispatch_end(stream, rank_, received_);
    experts_kernel<<<static_cast<unsigned>(bounds_.max_pairs), 64, 0, raw()>>>(a_, in_order);
    if (until == phase::sums || until == phase::pairs) return;
    const ts::matrix_view<const bf16> pairs{a_.pairs, bounds_.max_pairs, hidden};
    const ts::matrix_view<bf16> y{a_.y, tokens_, hidden};
    const ts::matrix_view<const bf16> nothing{};
    if (kind.ordered) {
      ts::combine_pairs(stream, rank_, a_.handle, pairs, returned_pairs_, chosen.weights, nothing, y);
    } else {
      ts::combine_rows(stream, rank_, a_.handle, ts::combine_weights::routing, ts::combine_source::expert_rows, pairs,
                       returned_, nothing, y);
    }
    if (until == phase::values) return;
    ts::return_pair_values(stream, rank_, a_.handle, a_.values, home_values_);
    if (tokens_ > 0) check_kernel<<<static_cast<unsigned>(tokens_), 64, 0, raw()>>>(a_);
    end_round_kernel<<<1, 1, 0, raw()>>>(a_.words);
    require(cudaGetLastError(), "kernels of a round");
  }
  void half_of(phase p) {
    if (p == phase::parts) half_operation_kernel<<<1, 32, 0, raw()>>>(rank_.view(symmetric_channel::rows), 0);
    const int chunks = p == phase::sums || p == phase::parts ? 3 : 0;
    half_operation_kernel<<<1, 32, 0, raw()>>>(rank_.view(channel_of(p)), chunks);
    require(cudaGetLastError(), "half_operation_kernel");
  }

  void synchronize() { require(cudaStreamSynchronize(raw()), "cudaStreamSynchronize"); }
  chain_words words() {
    chain_words found{};
    synchronize();
    require(cudaMemcpyAsync(&found, a_.words, sizeof(found), cudaMemcpyDeviceToHost, raw()), "copy");
    synchronize();
    return found;
  }
  // Starts counting rounds anew. No rank is at work.
  void rewind() {
    require(cudaMemsetAsync(a_.words, 0, sizeof(chain_words), raw()), "cudaMemsetAsync");
    synchronize();
  }
  std::vector<std::int32_t> offsets() {
    std::vector<std::int32_t> found(static_cast<std::size_t>(a_.handle.num_local_experts) + 1);
    synchronize();
    require(cudaMemcpyAsync(found.data(), a_.handle.expert_offsets, found.size() * 4, cudaMemcpyDeviceToHost, raw()),
            "copy");
    synchronize();
    return found;
  }
  cudaStream_t raw() const { return rank_.stream().get(); }

 private:
  peer_rank& rank_;
  ts::dispatch_options options_;
  ts::dispatch_bounds bounds_;
  ts::layout::block layout_;
  int tokens_;
  ts::symmetric_routing_workspace<float> workspace_;
  ts::matrix_view<bf16> received_;
  ts::matrix_view<bf16> returned_;
  ts::returned_rows<bf16> returned_pairs_;
  ts::matrix_view<float> home_values_;
  chain_arrays a_{0,
                  0,
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  ts::layout::block(num_experts, 1),
                  {}};
};

constexpr std::size_t window_bytes = std::size_t{16} << 20;

std::vector<std::unique_ptr<rank_chain>> make_chains(peer_ranks& ranks) {
  std::vector<std::unique_ptr<rank_chain>> chains(static_cast<std::size_t>(ranks.size()));
  ranks.run([&](peer_rank& rank) {
    CHECK(ts::load_kernels() > 8);
    chains[static_cast<std::size_t>(rank.rank())] = std::make_unique<rank_chain>(rank);
  });
  return chains;
}

// A few rounds of all ranks, which must be right.
void expect_rounds(peer_ranks& ranks, std::vector<std::unique_ptr<rank_chain>>& chains, int rounds) {
  ranks.run([&](peer_rank& rank) {
    rank_chain& chain = *chains[static_cast<std::size_t>(rank.rank())];
    for (int i = 0; i < rounds; ++i) chain.round(kind_of(i));
    chain.synchronize();
  });
  for (int r = 0; r < ranks.size(); ++r) {
    CAPTURE(r);
    const auto words = chains[static_cast<std::size_t>(r)]->words();
    CHECK(words.wrong == 0);
    CHECK(words.first_wrong == 0);
    CHECK(text_of(ranks[r].failure()) == "");
  }
}

const char* name_of(phase p) {
  constexpr const char* names[] = {"tables", "rows", "parts", "sums", "pairs", "values", "none"};
  return names[static_cast<int>(p)];
}

}  // namespace

TEST_CASE("10000 rounds as replays of graphs, with another routing in each, and ranks that are late at random") {
  constexpr int rounds_of_graph = 24;
  constexpr int replays = 420;
  for (const int size : {2, 3, 4}) {
    CAPTURE(size);
    if (!has_gpus(size, size / 2)) continue;
    peer_ranks ranks(size, window_bytes);
    auto chains = make_chains(ranks);
    std::mutex mutex;
    std::vector<std::string> wrong;
    ranks.run([&](peer_rank& rank) {
      rank_chain& chain = *chains[static_cast<std::size_t>(rank.rank())];
      cudaGraphExec_t graph = device_test::capture(chain.raw(), [&] {
        for (int i = 0; i < rounds_of_graph; ++i) chain.round(kind_of(i));
      });
      require(cudaGraphUpload(graph, chain.raw()), "cudaGraphUpload");
      chain.synchronize();
      // all at full length with two ranks, a part of it with more
      const int launches = size == 2 ? replays : replays / 4;
      for (int i = 0; i < launches; ++i) {
        ranks.wait_for_all();
        require(cudaGraphLaunch(graph, chain.raw()), "cudaGraphLaunch");
        if (i % 50 != 49 && i + 1 != launches) continue;
        const chain_words words = chain.words();
        const auto expected = static_cast<std::uint32_t>((i + 1) * rounds_of_graph);
        const std::lock_guard lock(mutex);
        if (words.wrong != 0 || words.round != expected) {
          wrong.push_back("rank " + std::to_string(rank.rank()) + " after round " + std::to_string(words.round) +
                          " of " + std::to_string(expected) + ": " + std::to_string(words.wrong) +
                          " numbers are wrong, the first in round " + std::to_string(words.first_wrong) + " - 1");
        }
      }
      chain.synchronize();
      require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
    });
    for (const std::string& what : wrong) FAIL_CHECK(what);
    for (int r = 0; r < size; ++r) CHECK(text_of(ranks[r].failure()) == "");
  }
}

TEST_CASE("a rank that stops at any phase, or half-way through it, is named by all others, and all go on after reset") {
  constexpr int stopped = 1;
  for (const int size : {2, 3}) {
    CAPTURE(size);
    if (!has_gpus(size, size / 2)) continue;
    peer_ranks ranks(size, window_bytes);
    auto chains = make_chains(ranks);
    for (int r = 0; r < size; ++r) ranks[r].timeout_ns = 300'000'000;
    for (const phase p : {phase::tables, phase::rows, phase::parts, phase::sums, phase::pairs, phase::values}) {
      for (const bool half : {false, true}) {
        const std::string name = name_of(p);
        CAPTURE(name);
        CAPTURE(half);
        expect_rounds(ranks, chains, 6);
        std::vector<double> milliseconds(static_cast<std::size_t>(size));
        ranks.run([&](peer_rank& rank) {
          rank_chain& chain = *chains[static_cast<std::size_t>(rank.rank())];
          const auto start = std::chrono::steady_clock::now();
          const round_kind kind{p == phase::parts ? rows_in::order : rows_in::arrival, p == phase::pairs};
          if (rank.rank() == stopped) {
            chain.round(kind, p);
            if (half) chain.half_of(p);
          } else {
            // The later ones do nothing. Where tables are missing, rows would wait for them at the same time.
            const phase until = p == phase::tables && half ? phase::rows : phase::none;
            for (int i = 0; i < 3; ++i) chain.round(kind, until);
          }
          chain.synchronize();
          const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
          milliseconds[static_cast<std::size_t>(rank.rank())] = took.count();
        });
        for (int r = 0; r < size; ++r) {
          CAPTURE(r);
          const auto failure = ranks[r].failure();
          if (r == stopped) {
            CHECK(failure.state == 0);
            continue;
          }
          CHECK(failure.state == 2);
          CHECK(failure.rank == r);
          CHECK(failure.peer == stopped);
          CHECK(failure.channel == channel_of(p == phase::parts && !half ? phase::rows : p));
          const bool of_chunks = p == phase::sums || p == phase::parts;
          CHECK(failure.step == (!half       ? symmetric_step::entry
                                 : of_chunks ? symmetric_step::chunk
                                             : symmetric_step::arrival));
          CHECK(milliseconds[static_cast<std::size_t>(r)] > 250);
          CHECK(milliseconds[static_cast<std::size_t>(r)] < 3000);
          if (p == phase::tables) {
            for (const std::int32_t offset : chains[static_cast<std::size_t>(r)]->offsets()) CHECK(offset == 0);
          }
        }
        ranks.reset();
        for (auto& chain : chains) chain->rewind();
      }
    }
    expect_rounds(ranks, chains, 20);
  }
}

TEST_CASE("a bound that is too small names the rank and its need, and after reset the need is enough") {
  for (const int size : {2, 3}) {
    CAPTURE(size);
    if (!has_gpus(size, size / 2)) continue;
    peer_ranks ranks(size, window_bytes);
    auto chains = make_chains(ranks);
    // of round 0
    const ts::layout::block layout(num_experts, size);
    std::vector<int> pairs(static_cast<std::size_t>(size));
    for (int rank = 0; rank < size; ++rank) {
      for (int t = 0; t < tokens_of_rank(rank); ++t) {
        for (int k = 0; k < top_k; ++k) ++pairs[static_cast<std::size_t>(layout.owner(expert_of(0, rank, t, k)).rank)];
      }
    }
    const int most = *std::max_element(pairs.begin(), pairs.end());
    const auto fullest = static_cast<int>(std::max_element(pairs.begin(), pairs.end()) - pairs.begin());
    REQUIRE(std::count(pairs.begin(), pairs.end(), most) == 1);
    for (const int bound : {most - 1, most}) {
      CAPTURE(bound);
      ranks.run([&](peer_rank& rank) {
        rank_chain& chain = *chains[static_cast<std::size_t>(rank.rank())];
        ts::dispatch_options options;
        options.row_bound = bound;
        for (int i = 0; i < 6; ++i) {
          chain.round(kind_of(i), phase::none, chain.bounds_with(options), options);
          chain.synchronize();
          if (bound == most) break;  // another round may need more
        }
      });
      for (int r = 0; r < size; ++r) {
        CAPTURE(r);
        const auto failure = ranks[r].failure();
        if (bound == most) {
          CHECK(failure.state == 0);
          CHECK(chains[static_cast<std::size_t>(r)]->words().wrong == 0);
          continue;
        }
        CHECK(failure.state == 2);
        CHECK(failure.rank == r);
        CHECK(failure.peer == fullest);
        CHECK(failure.step == symmetric_step::overflow);
        CHECK(failure.generation == static_cast<std::uint32_t>(most));
      }
      ranks.reset();
      for (auto& chain : chains) chain->rewind();
    }
  }
}
