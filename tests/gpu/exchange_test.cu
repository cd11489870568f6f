// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Dispatch and combine between GPUs, against lists and sums made on the host: every layout and number of ranks, with
// uniform, skewed and lopsided routings; pairs beyond the bound; a rank that does not come. Ranks share a GPU where
// there are fewer GPUs than ranks.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <tessera/core/dtype.hpp>
#include <tessera/dispatch/expanded.cuh>
#include <tessera/dispatch/symmetric.cuh>
#include <tessera/layout/block.hpp>
#include <tessera/layout/round_robin.hpp>
#include <tessera/layout/table.hpp>

#include "exchange_cases.cuh"
#include "peer_ranks.cuh"

namespace {

namespace ts = tessera;
using namespace exchange_cases;
using device_test::peer_rank;
using device_test::peer_ranks;
using device_test::require;

// Streams of ranks that share a GPU must not wait for each other by chance.
const int connections = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
// Loading a kernel when it is first launched may wait for kernels that wait for other ranks of the same GPU.
const int loading = setenv("CUDA_MODULE_LOADING", "EAGER", 1);

template <class T>
std::vector<T> get(const peer_rank& rank, const T* from, std::size_t count) {
  std::vector<T> values(count);
  // A copy to pageable memory that waits for kernels may keep other ranks of the same GPU from launching theirs.
  require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
  if (count > 0) {
    require(cudaMemcpyAsync(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, rank.stream().get()),
            "copy");
  }
  require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
  return values;
}
template <class T>
void put(const peer_rank& rank, T* to, const std::vector<T>& values) {
  if (values.empty()) return;
  require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
  require(cudaMemcpyAsync(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, rank.stream().get()),
          "copy");
  require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
}

// Memory of one rank.
struct rank_memory {
  ts::dispatch_bounds bounds;
  ts::symmetric_routing_workspace<float> workspace;
  bf16* received;
  bf16* returned;
  ts::returned_rows<bf16> returned_pairs;
  float* home_values;
  ts::dispatch_handle<float> handle;
  std::int32_t* ids;
  float* weights;
  bf16* x;
  bf16* plus;
  bf16* pairs;
  bf16* summed;
  bf16* expanded;
  bf16* y;
  float* values;
  std::uint32_t* barrier;
  std::int32_t* table = nullptr;

  rank_memory(peer_rank& rank, const routing_case& c, const ts::dispatch_options& options, int slots)
      : bounds(ts::dispatch_bounds::make(rank.size(), c.num_experts, slots, c.top_k, c.max_tokens, options)) {
    rank.release_all();
    const std::int64_t rows = bounds.addressed_rows();
    const std::int64_t tokens = c.max_tokens;
    workspace.tables.slots = rank.take<std::int32_t>(rows * c.top_k);
    workspace.tables.weights = rank.take<float>(rows * c.top_k);
    workspace.tables.counts = rank.take<std::int32_t>(rank.size() * rank.size());
    received = rank.take<bf16>(rows * c.hidden);
    returned = rank.take<bf16>(rows * c.hidden);
    returned_pairs = {rank.take<bf16>(tokens * c.top_k * c.hidden), rank.take<std::int32_t>(tokens * c.top_k)};
    home_values = rank.take<float>(tokens * c.top_k);
    // from here on sizes differ by rank
    workspace.tables.block_counts = rank.take<std::int32_t>(32 * 8);
    workspace.sort.block_counts = rank.take<std::uint8_t>(ts::router_workspace::block_count_bytes(c.num_experts));
    ts::memory_builder counting;
    static_cast<void>(ts::capacity_workspace<float>::layout(counting, bounds, options));
    ts::memory_builder builder(
        ts::workspace_memory(rank.take<std::byte>(static_cast<std::int64_t>(counting.bytes())), counting.bytes()),
        "memory for a capacity");
    workspace.capacity = ts::capacity_workspace<float>::layout(builder, bounds, options);
    barrier = rank.take<std::uint32_t>(1);
    workspace.sort.barrier = barrier;
    handle.total = rank.take<ts::dispatch_handle<float>::totals>(1);
    handle.destinations = rank.take<std::uint32_t>(tokens);
    handle.expert_row_of = rank.take<std::int32_t>(rows * c.top_k);
    handle.expert_offsets = rank.take<std::int32_t>(std::max(slots, 1) + 1);
    handle.gather = rank.take<std::int32_t>(bounds.max_pairs);
    handle.pair_weights = rank.take<float>(bounds.max_pairs);
    handle.set_sizes(bounds);
    ids = rank.take<std::int32_t>(tokens * c.top_k);
    weights = rank.take<float>(tokens * c.top_k);
    x = rank.take<bf16>(tokens * c.hidden);
    plus = rank.take<bf16>(tokens * c.hidden);
    pairs = rank.take<bf16>(bounds.max_pairs * c.hidden);
    summed = rank.take<bf16>(rows * c.hidden);
    expanded = rank.take<bf16>((bounds.max_pairs + 1) * c.hidden);
    y = rank.take<bf16>(tokens * c.hidden);
    values = rank.take<float>(bounds.max_pairs);
    require(cudaMemsetAsync(barrier, 0, sizeof(*barrier), rank.stream().get()), "cudaMemsetAsync");
  }
};

// One round on one rank: rows go out, sums and values come back, and all of it is what the host makes. Ranks call the
// members in one order, whatever they find.
template <class Layout>
struct round_check {
  peer_rank& rank;
  rank_memory& m;
  const routing_case& c;
  const world_data& data;
  const std::vector<expected_lists>& lists;
  const std::vector<std::vector<bf16>>& outputs;
  const Layout& layout;
  const ts::dispatch_options& options;
  findings& found;

  std::size_t me = static_cast<std::size_t>(rank.rank());
  const expected_lists& own = lists[me];
  std::size_t count = own.gather.size();
  std::size_t width = static_cast<std::size_t>(c.hidden);
  int tokens = c.tokens[me];
  std::int64_t rows = m.bounds.addressed_rows();
  ts::device_stream stream = rank.stream();
  ts::routing<float> chosen{{m.ids, tokens, c.top_k}, {m.weights, tokens, c.top_k}};
  ts::matrix_view<const bf16> x{m.x, tokens, c.hidden};
  ts::matrix_view<const bf16> plus{m.plus, tokens, c.hidden};
  ts::matrix_view<const bf16> nothing{};
  ts::matrix_view<const bf16> pairs{m.pairs, m.bounds.max_pairs, c.hidden};
  ts::matrix_view<bf16> received{m.received, rows, c.hidden};
  ts::matrix_view<bf16> returned{m.returned, rows, c.hidden};
  ts::matrix_view<bf16> y{m.y, tokens, c.hidden};

  void run() {
    put(rank, m.ids, data.ids[me]);
    put(rank, m.weights, data.weights[me]);
    put(rank, m.x, data.x[me]);
    put(rank, m.plus, data.plus[me]);
    put(rank, m.pairs, outputs[me]);
    ts::exchange_routing_begin(stream, rank, layout, m.bounds, options, chosen, m.handle, m.workspace);
    ts::dispatch_begin(stream, rank, m.handle, x, received);
    ts::exchange_routing_end(stream, rank);
    ts::dispatch_end(stream, rank, received);
    check_lists();
    check_rows();
    for (const int way : {0, 1, 2, 3, 4}) check_expanded(way);
    check_sums();
    check_pairs();
    check_summed_rows();
    check_values();
  }

  void wrong(const std::string& what) { found.add(rank.rank(), what); }

  void check_lists() {
    if (get(rank, m.handle.expert_offsets, own.offsets.size()) != own.offsets) wrong("row offsets");
    if (get(rank, m.handle.gather, count) != own.gather) wrong("gather list");
    if (get(rank, m.handle.pair_weights, count) != own.pair_weights) wrong("pair weights");
    if (get(rank, m.handle.expert_row_of, own.expert_row_of.size()) != own.expert_row_of) wrong("expert rows of pairs");
    const auto total = get(rank, m.handle.total, 1)[0];
    if (total.overflow_drops != own.dropped) wrong("drops");
    if (total.capacity_drops != data.capacity_drops[me]) wrong("drops of the capacity");
    if (total.received_pairs != static_cast<std::int64_t>(count)) wrong("received pairs");
  }

  // Whether `row` is token `t` of rank `s`.
  bool is_token(const bf16* row, std::size_t s, std::size_t t) const {
    return std::memcmp(row, data.x[s].data() + t * width, width * sizeof(bf16)) == 0;
  }

  void check_rows() {
    const auto arrived = get(rank, m.received, static_cast<std::size_t>(rows * c.hidden));
    for (std::size_t row = 0; row < own.arrives.size(); ++row) {
      if (!own.arrives[row]) continue;
      const std::size_t s = row / static_cast<std::size_t>(c.max_tokens);
      const std::size_t t = row % static_cast<std::size_t>(c.max_tokens);
      if (is_token(arrived.data() + row * width, s, t)) continue;
      wrong("row of token " + std::to_string(t) + " of rank " + std::to_string(s));
      return;
    }
  }

  // The same rows in the order of experts, as they come, behind them all, or as the library chooses: with lists that
  // are under way, and with those of before.
  void check_expanded(int way) {
    const bool lists_too = way % 2 == 0, as_they_come = way < 2;
    const auto poison = [&](bf16* where, std::int64_t rows_there) {
      require(
          cudaMemsetAsync(where, 0xff, static_cast<std::size_t>(rows_there * c.hidden) * sizeof(bf16), stream.get()),
          "cudaMemsetAsync");
    };
    poison(m.received, rows);
    poison(m.expanded, m.bounds.max_pairs + 1);
    const ts::matrix_view<bf16> expanded{m.expanded, m.bounds.max_pairs, c.hidden};
    if (lists_too) ts::exchange_routing_begin(stream, rank, layout, m.bounds, options, chosen, m.handle, m.workspace);
    if (way == 4)
      ts::dispatch_expanded_begin(stream, rank, m.handle, x, received, expanded);
    else
      ts::detail::symmetric::begin_expanded(stream, rank, m.handle, x, received, expanded, as_they_come);
    // Few rows are not awaited at the end, where the library would not have sent them so.
    if (way != 4 && as_they_come)
      ts::detail::symmetric::launch_await(stream, rank.view(ts::comm::symmetric_channel::rows));
    ts::dispatch_expanded_end(stream, rank, received);
    const auto got = get(rank, m.expanded, static_cast<std::size_t>(m.bounds.max_pairs + 1) * width);
    for (std::size_t row = 0; row < count; ++row) {
      const std::size_t s = static_cast<std::size_t>(own.gather[row] / c.max_tokens);
      const std::size_t t = static_cast<std::size_t>(own.gather[row] % c.max_tokens);
      if (is_token(got.data() + row * width, s, t)) continue;
      wrong("expanded row " + std::to_string(row) + " of token " + std::to_string(t) + " of rank " + std::to_string(s));
      break;
    }
    const std::vector<bf16> untouched(got.begin() + static_cast<std::ptrdiff_t>(count * width), got.end());
    const std::vector<unsigned char> poisoned(untouched.size() * sizeof(bf16), 0xff);
    if (std::memcmp(untouched.data(), poisoned.data(), poisoned.size()) != 0) wrong("expanded rows beyond the last");
  }

  // y has the bits of `sum(t, j)`, with `plus` if that was to be added.
  template <class F>
  void check_y(const char* what, bool with_plus, const F& sum) {
    const auto got = get(rank, m.y, static_cast<std::size_t>(tokens * c.hidden));
    for (int t = 0; t < tokens; ++t) {
      for (int j = 0; j < c.hidden; ++j) {
        float expected = sum(t, j);
        const auto at = static_cast<std::size_t>(t * c.hidden + j);
        if (with_plus) expected += as_float(data.plus[me][at]);
        if (same_bits(got[at], bf16(expected))) continue;
        wrong(std::string(what) + " of token " + std::to_string(t) + " column " + std::to_string(j) + ": " +
              std::to_string(as_float(got[at])) + " for " + std::to_string(expected));
        return;
      }
    }
  }

  // y is the sum of what owners have summed; `rounded`: this rank's own part, too, was rounded before.
  void check_owner_sums(const char* what, bool weighted, bool rounded, bool with_plus) {
    check_y(what, with_plus, [&](int t, int j) {
      const int row = rank.rank() * c.max_tokens + t;
      float sum = owner_sum(c, own, outputs[me], row, j, weighted);
      if (rounded) sum = as_float(bf16(sum));
      for (int r = 0; r < rank.size(); ++r) {
        const auto other = static_cast<std::size_t>(r);
        if (r == rank.rank() || !lists[other].arrives[static_cast<std::size_t>(row)]) continue;
        sum += as_float(bf16(owner_sum(c, lists[other], outputs[other], row, j, weighted)));
      }
      return sum;
    });
  }

  void check_sums() {
    ts::combine_rows(stream, rank, m.handle, ts::combine_weights::routing, ts::combine_source::expert_rows, pairs,
                     returned, plus, y);
    check_owner_sums("weighted sum", true, false, true);
    ts::combine_rows(stream, rank, m.handle, ts::combine_weights::none, ts::combine_source::expert_rows, pairs,
                     returned, nothing, y);
    check_owner_sums("plain sum", false, false, false);
    ts::combine_rows(stream, rank, m.handle, ts::combine_weights::routing, ts::combine_source::expert_rows, pairs,
                     received, plus, y);
    check_owner_sums("weighted sum where rows had arrived", true, false, true);
  }

  // Pairs that are added at home, in the order of k.
  void check_pairs() {
    const auto check = [&](const char* what, bool weighted, bool with_plus) {
      check_y(what, with_plus,
              [&](int t, int j) { return home_sum(c, data, lists, outputs, rank.rank(), t, j, weighted); });
    };
    ts::combine_pairs(stream, rank, m.handle, pairs, m.returned_pairs,
                      ts::matrix_view<const float>{m.weights, tokens, c.top_k}, plus, y);
    check("weighted sum of pairs", true, true);
    ts::combine_pairs(stream, rank, m.handle, pairs, m.returned_pairs,
                      ts::matrix_view<const float>{nullptr, tokens, c.top_k}, nothing, y);
    check("plain sum of pairs", false, false);
  }

  // Rows that an engine has summed.
  void check_summed_rows() {
    std::vector<bf16> sums(static_cast<std::size_t>(rows * c.hidden), bf16(99.0f));
    for (std::size_t row = 0; row < own.arrives.size(); ++row) {
      if (!own.arrives[row]) continue;
      for (int j = 0; j < c.hidden; ++j) {
        sums[row * width + static_cast<std::size_t>(j)] =
            bf16(owner_sum(c, own, outputs[me], static_cast<int>(row), j, true));
      }
    }
    put(rank, m.summed, sums);
    ts::combine_rows(stream, rank, m.handle, ts::combine_weights::none, ts::combine_source::summed_rows,
                     ts::matrix_view<const bf16>{m.summed, rows, c.hidden}, returned, plus, y);
    check_owner_sums("sum of sums", true, true, true);
  }

  // One number for each pair, which comes home.
  void check_values() {
    const auto value = [](int owner, std::int64_t place) {
      return static_cast<float>(1000 * owner) + static_cast<float>(place);
    };
    std::vector<float> values;
    for (std::size_t i = 0; i < count; ++i) values.push_back(value(rank.rank(), static_cast<std::int64_t>(i)));
    put(rank, m.values, values);
    ts::return_pair_values(stream, rank, m.handle, m.values,
                           ts::matrix_view<float>{m.home_values, c.max_tokens, c.top_k});
    const auto home = get(rank, m.home_values, static_cast<std::size_t>(c.max_tokens * c.top_k));
    for (int t = 0; t < c.max_tokens; ++t) {
      for (int k = 0; k < c.top_k; ++k) {
        float expected = 0;
        for (int r = 0; r < rank.size(); ++r) {
          const std::int32_t place =
              lists[static_cast<std::size_t>(r)]
                  .expert_row_of[static_cast<std::size_t>((rank.rank() * c.max_tokens + t) * c.top_k + k)];
          if (place >= 0) expected = value(r, place);
        }
        if (home[static_cast<std::size_t>(t * c.top_k + k)] == expected) continue;
        wrong("value of pair " + std::to_string(t) + ", " + std::to_string(k));
        return;
      }
    }
  }
};

// `make_layout(rank)` on the device of a rank; `host_layout` reads host memory.
template <class HostLayout, class MakeLayout>
void check_case(peer_ranks& ranks, const routing_case& c, const HostLayout& host_layout, MakeLayout make_layout,
                int rounds = 2) {
  const ts::dispatch_options options = options_of(c);
  findings found;
  std::vector<world_data> data;
  std::vector<std::vector<expected_lists>> lists(static_cast<std::size_t>(rounds));
  std::vector<std::vector<std::vector<bf16>>> outputs(static_cast<std::size_t>(rounds));
  for (int round = 0; round < rounds; ++round) {
    const auto& d = data.emplace_back(c, 17u + static_cast<unsigned>(round));
    for (int r = 0; r < ranks.size(); ++r) {
      const auto bounds = ts::dispatch_bounds::make(ranks.size(), c.num_experts, host_layout.num_slots(r), c.top_k,
                                                    c.max_tokens, options);
      auto& l = lists[static_cast<std::size_t>(round)].emplace_back(c, d, host_layout, r, bounds.max_pairs);
      outputs[static_cast<std::size_t>(round)].push_back(expert_rows(c, d, l));
    }
  }
  ranks.run([&](peer_rank& rank) {
    const auto layout = make_layout(rank);
    rank_memory memory(rank, c, options, host_layout.num_slots(rank.rank()));
    for (std::size_t round = 0; round < static_cast<std::size_t>(rounds); ++round) {
      round_check<decltype(layout)>{rank, memory, c, data[round], lists[round], outputs[round], layout, options, found}
          .run();
    }
    const auto failure = rank.failure();
    if (failure.state != 0)
      found.add(rank.rank(), "failure in channel " + std::to_string(static_cast<int>(failure.channel)) + " step " +
                                 std::to_string(static_cast<int>(failure.step)) + " peer " +
                                 std::to_string(failure.peer));
  });
  for (const std::string& what : found.wrong) FAIL_CHECK(what);
}

constexpr std::size_t window_bytes = std::size_t{96} << 20;

// The table's numbers on the current GPU, as long as the program.
const std::int32_t* on_device(const ts::layout::table_storage& storage) {
  std::int32_t* copy = nullptr;
  require(cudaMalloc(&copy, storage.packed().size_bytes()), "cudaMalloc");
  require(cudaMemcpy(copy, storage.packed().data(), storage.packed().size_bytes(), cudaMemcpyHostToDevice), "copy");
  return copy;
}

template <class Layout>
auto by_value(Layout layout) {
  return [layout](peer_rank&) { return layout; };
}

}  // namespace

TEST_CASE("rows and sums reach every rank of block layouts with every routing") {
  for (const int size : {2, 3, 4}) {
    CAPTURE(size);
    peer_ranks ranks(size, window_bytes);
    std::vector<int> tokens;
    for (int r = 0; r < size; ++r) tokens.push_back(61 - 7 * r);
    for (const auto kind :
         {routing_kind::uniform, routing_kind::skewed, routing_kind::one_expert, routing_kind::gaps}) {
      const ts::layout::block layout(18, size);
      check_case(ranks, {tokens, 64, 192, 18, 4, kind}, layout, by_value(layout));
    }
  }
}

TEST_CASE("many tokens, wide rows, many experts for one token, and ranks without tokens or experts") {
  peer_ranks ranks(3, window_bytes);
  const ts::layout::block wide(64, 3);
  check_case(ranks, {{1500, 1300, 1111}, 1500, 64, 64, 8, routing_kind::uniform}, wide, by_value(wide), 1);
  check_case(ranks, {{20, 9, 13}, 20, 17 * 1024, 64, 2, routing_kind::uniform}, wide, by_value(wide), 1);
  check_case(ranks, {{50, 0, 31}, 50, 8, 64, 32, routing_kind::uniform}, wide, by_value(wide));
  const ts::layout::block few(2, 3);  // nothing on the last rank
  check_case(ranks, {{50, 40, 31}, 50, 72, 2, 2, routing_kind::uniform}, few, by_value(few));
  const ts::layout::round_robin turns(10, 3);
  check_case(ranks, {{50, 40, 31}, 50, 72, 10, 3, routing_kind::uniform}, turns, by_value(turns));
}

TEST_CASE("flags for several tokens and for parts of rows") {
  peer_ranks ranks(2, 2 * window_bytes);
  const ts::layout::block layout(16, 2);
  check_case(ranks, {{1100, 1030}, 1100, 4096, 16, 2, routing_kind::uniform}, layout, by_value(layout), 1);
}

TEST_CASE("an uneven table with replicas") {
  peer_ranks ranks(4, window_bytes);
  const ts::layout::table_storage storage(6, {{0, 1, 2, 3}, {3, 4}, {5, 0, 3}, {}});
  check_case(ranks, {{40, 33, 64, 5}, 64, 136, 6, 3, routing_kind::uniform}, storage.view(),
             [&](peer_rank&) { return storage.view_at(on_device(storage)); });
}

TEST_CASE("a capacity drops each rank's own pairs before they travel, by position and by weight, as on the host") {
  for (const int size : {1, 2, 4}) {
    CAPTURE(size);
    peer_ranks ranks(size, window_bytes);
    const ts::layout::block layout(18, size);
    std::vector<int> tokens;
    for (int r = 0; r < size; ++r) tokens.push_back(r == 1 ? 0 : 61 - 7 * r);
    for (const auto order : {ts::drop_order::position, ts::drop_order::weight}) {
      for (const double factor : {0.4, 1.0, 1.7, 40.0}) {
        for (const auto kind : {routing_kind::skewed, routing_kind::gaps}) {
          CAPTURE(factor);
          routing_case c{tokens, 64, 72, 18, 4, kind};
          c.capacity_factor = factor;
          c.order = order;
          check_case(ranks, c, layout, by_value(layout), factor == 1.0 ? 2 : 1);
        }
      }
    }
  }
}

TEST_CASE("a capacity of many tokens and experts, of replicas, and ahead of a bound") {
  for (const auto order : {ts::drop_order::position, ts::drop_order::weight}) {
    {
      peer_ranks ranks(2, window_bytes);
      const ts::layout::block many(1024, 2);
      routing_case c{{1500, 1111}, 1500, 64, 1024, 8, routing_kind::uniform};
      c.capacity_factor = 0.9;
      c.order = order;
      check_case(ranks, c, many, by_value(many), 1);
      const ts::layout::block few(8, 2);
      c = {{300, 280}, 300, 64, 8, 4, routing_kind::skewed};
      c.capacity_factor = 1.1;
      c.order = order;
      c.row_bound = 500;
      c.overflow = ts::overflow_policy::drop;
      check_case(ranks, c, few, by_value(few));
    }
    peer_ranks ranks(4, window_bytes);
    const ts::layout::table_storage storage(6, {{0, 1, 2, 3}, {3, 4}, {5, 0, 3}, {}});
    routing_case c{{40, 33, 64, 5}, 64, 136, 6, 3, routing_kind::uniform};
    c.capacity_factor = 0.8;
    c.order = order;
    check_case(ranks, c, storage.view(), [&](peer_rank&) { return storage.view_at(on_device(storage)); });
  }
}

TEST_CASE("arrays that are not of the handle's sizes are refused with both numbers, and nothing is enqueued") {
  peer_ranks ranks(2, window_bytes);
  const ts::layout::block layout(8, 2);
  const routing_case c{{30, 28}, 30, 64, 8, 4, routing_kind::uniform};
  peer_rank& rank = ranks[0];
  require(cudaSetDevice(rank.device()), "cudaSetDevice");
  const ts::dispatch_options options;
  rank_memory m(rank, c, options, 4);
  const auto stream = rank.stream();
  const auto refused = [](const std::string& part, const auto& f) {
    try {
      f();
      FAIL_CHECK("nothing was thrown: " << part);
    } catch (const ts::invalid_argument& e) {
      const std::string text = e.what();
      INFO(text);
      CHECK(text.find(part) != std::string::npos);
    }
  };
  const ts::matrix_view<const bf16> x{m.x, 28, c.hidden};
  const ts::matrix_view<const bf16> pairs{m.pairs, m.bounds.max_pairs, c.hidden};
  const ts::matrix_view<bf16> y{m.y, 28, c.hidden};
  const ts::matrix_view<const bf16> nothing{};
  const ts::matrix_view<bf16> fewer{m.received, 58, c.hidden};
  refused("received has room for 29 tokens of a rank, the handle is of max_tokens = 30",
          [&] { ts::dispatch_begin(stream, rank, m.handle, x, fewer); });
  const auto expand = [&](ts::matrix_view<bf16> received, ts::matrix_view<bf16> expanded) {
    ts::dispatch_expanded_begin(stream, rank, m.handle, x, received, expanded);
  };
  refused("received has room for 29 tokens of a rank, the handle is of max_tokens = 30", [&] {
    expand(fewer, {m.expanded, m.bounds.max_pairs, c.hidden});
  });
  refused("expanded rows", [&] { expand({m.received, 60, c.hidden}, {m.expanded, m.bounds.max_pairs, 56}); });
  refused("expanded rows", [&] { expand({m.received, 60, c.hidden}, {m.expanded + 1, 10, c.hidden}); });
  const auto combine = [&](ts::matrix_view<bf16> returned) {
    ts::combine_rows(stream, rank, m.handle, ts::combine_weights::none, ts::combine_source::expert_rows, pairs,
                     returned, nothing, y);
  };
  refused("returned has room for 29 tokens", [&] { combine(fewer); });
  refused("top_k = 5, the handle is of top_k = 4", [&] {
    ts::combine_pairs(stream, rank, m.handle, pairs, m.returned_pairs, ts::matrix_view<const float>{nullptr, 28, 5},
                      nothing, y);
  });
  refused("31 tokens, the handle is of max_tokens = 30", [&] {
    ts::combine_pairs(stream, rank, m.handle, pairs, m.returned_pairs, ts::matrix_view<const float>{nullptr, 31, 4},
                      nothing, ts::matrix_view<bf16>{m.y, 31, c.hidden});
  });
  refused("home has room for 28 tokens", [&] {
    ts::return_pair_values(stream, rank, m.handle, m.values, ts::matrix_view<float>{m.home_values, 28, c.top_k});
  });
  refused("top_k = 2, the handle is of top_k = 4", [&] {
    ts::return_pair_values(stream, rank, m.handle, m.values, ts::matrix_view<float>{m.home_values, c.max_tokens, 2});
  });
  auto capped = options;
  capped.capacity_factor = 1.5;
  refused("capacity_factor = 1.5 needs a capacity_workspace", [&] {
    ts::exchange_routing(stream, rank, layout, m.bounds, capped,
                         ts::routing<float>{{m.ids, 28, c.top_k}, {m.weights, 28, c.top_k}}, m.handle, m.workspace);
  });
  auto other = m.bounds;
  other.max_tokens = 29;
  refused("the routing of these bounds has room for 29 tokens", [&] {
    ts::exchange_routing(stream, rank, layout, other, options,
                         ts::routing<float>{{m.ids, 28, c.top_k}, {m.weights, 28, c.top_k}}, m.handle, m.workspace);
  });
  require(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  CHECK(rank.failure().state == 0);
}

TEST_CASE("pairs beyond the bound are dropped in the order of source, token and slot") {
  peer_ranks ranks(2, window_bytes);
  const ts::layout::block layout(8, 2);
  routing_case c{{300, 280}, 300, 64, 8, 4, routing_kind::skewed};
  c.row_bound = 700;
  c.overflow = ts::overflow_policy::drop;
  check_case(ranks, c, layout, by_value(layout));
}

TEST_CASE("pairs beyond the bound are a failure of all ranks that names the one and its need") {
  peer_ranks ranks(2, window_bytes);
  const ts::layout::block layout(8, 2);
  routing_case c{{300, 280}, 300, 64, 8, 4, routing_kind::skewed};
  ts::dispatch_options options;
  options.row_bound = 700;
  const world_data data(c, 5);
  const expected_lists all(c, data, layout, 0, 1 << 20);
  ranks.run([&](peer_rank& rank) {
    rank_memory m(rank, c, options, 4);
    const auto me = static_cast<std::size_t>(rank.rank());
    put(rank, m.ids, data.ids[me]);
    put(rank, m.weights, data.weights[me]);
    const ts::routing<float> chosen{{m.ids, c.tokens[me], c.top_k}, {m.weights, c.tokens[me], c.top_k}};
    ts::exchange_routing(rank.stream(), rank, layout, m.bounds, options, chosen, m.handle, m.workspace);
    require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
  });
  for (int r = 0; r < 2; ++r) {
    const auto failure = ranks[r].failure();
    CHECK(failure.state != 0);
    CHECK(failure.rank == r);
    CHECK(failure.peer == 0);
    CHECK(failure.step == ts::comm::symmetric_step::overflow);
    CHECK(failure.generation == static_cast<std::uint32_t>(all.gather.size()));
  }
}

TEST_CASE("a rank that does not come is an error of the others within the timeout, and operations end") {
  enum class kind { rows, expanded, expanded_behind };
  for (const kind of : {kind::rows, kind::expanded, kind::expanded_behind}) {
    CAPTURE(static_cast<int>(of));
    peer_ranks ranks(3, window_bytes);
    const ts::layout::block layout(8, 3);
    routing_case c{{30, 28, 20}, 30, 64, 8, 4, routing_kind::uniform};
    const ts::dispatch_options options;
    const world_data data(c, 5);
    ranks.run([&](peer_rank& rank) {
      rank.timeout_ns = 300'000'000;
      rank_memory m(rank, c, options, layout.num_slots(rank.rank()));
      const auto me = static_cast<std::size_t>(rank.rank());
      put(rank, m.ids, data.ids[me]);
      put(rank, m.weights, data.weights[me]);
      put(rank, m.x, data.x[me]);
      if (rank.rank() == 1) return;
      const auto rows = m.bounds.addressed_rows();
      const ts::routing<float> chosen{{m.ids, c.tokens[me], c.top_k}, {m.weights, c.tokens[me], c.top_k}};
      const ts::matrix_view<bf16> received{m.received, rows, c.hidden};
      ts::exchange_routing_begin(rank.stream(), rank, layout, m.bounds, options, chosen, m.handle, m.workspace);
      const ts::matrix_view<const bf16> x{m.x, c.tokens[me], c.hidden};
      if (of != kind::rows) {
        ts::detail::symmetric::begin_expanded(rank.stream(), rank, m.handle, x, received,
                                              ts::matrix_view<bf16>{m.expanded, m.bounds.max_pairs, c.hidden},
                                              of == kind::expanded);
        ts::dispatch_expanded_end(rank.stream(), rank, received);
      } else {
        ts::dispatch_begin(rank.stream(), rank, m.handle, x, received);
        ts::exchange_routing_end(rank.stream(), rank);
        ts::dispatch_end(rank.stream(), rank, received);
      }
      ts::combine_rows(rank.stream(), rank, m.handle, ts::combine_weights::none, ts::combine_source::expert_rows,
                       ts::matrix_view<const bf16>{m.pairs, m.bounds.max_pairs, c.hidden},
                       ts::matrix_view<bf16>{m.returned, rows, c.hidden}, ts::matrix_view<const bf16>{},
                       ts::matrix_view<bf16>{m.y, c.tokens[me], c.hidden});
      require(cudaStreamSynchronize(rank.stream().get()), "cudaStreamSynchronize");
      const auto offsets =
          get(rank, m.handle.expert_offsets, static_cast<std::size_t>(layout.num_slots(rank.rank())) + 1);
      for (const std::int32_t offset : offsets) CHECK(offset == 0);
    });
    for (const int r : {0, 2}) {
      const auto failure = ranks[r].failure();
      CHECK(failure.state != 0);
      CHECK(failure.rank == r);
      CHECK(failure.peer == 1);
      CHECK(failure.channel == ts::comm::symmetric_channel::tables);  // rows wait a little longer
      CHECK(failure.step == ts::comm::symmetric_step::entry);
    }
    CHECK(ranks[1].failure().state == 0);
  }
}
