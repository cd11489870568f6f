// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// One rank's dispatch and combine that are sized on the host, over any communicator, against lists and sums made on the
// host.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <tessera/core/memory.hpp>
#include <tessera/dispatch/host_sized.cuh>

#include "device_fixture.cuh"
#include "exchange_cases.cuh"

namespace exchange_cases {

/// Where ranks stand, for sums that are made host by host.
struct expected_sums {
  const routing_case& c;
  const std::vector<expected_lists>& lists;
  const std::vector<std::vector<bf16>>& outputs;
  int ranks_per_host;

  bool arrives(int rank, int row) const {
    return lists[static_cast<std::size_t>(rank)].arrives[static_cast<std::size_t>(row)];
  }
  float of_owner(int rank, int row, int column, bool weighted) const {
    const auto r = static_cast<std::size_t>(rank);
    return owner_sum(c, lists[r], outputs[r], row, column, weighted);
  }
  bool arrives_on(int host, int row) const {
    for (int j = 0; j < ranks_per_host; ++j) {
      if (arrives(host * ranks_per_host + j, row)) return true;
    }
    return false;
  }
  /// What the rank of number `place` makes of one host's rows.
  float of_host(int host, int place, int row, int column, bool weighted) const {
    const int own = host * ranks_per_host + place;
    float sum = of_owner(own, row, column, weighted);
    for (int r = host * ranks_per_host; r < (host + 1) * ranks_per_host; ++r) {
      if (r != own && arrives(r, row)) sum += as_float(bf16(of_owner(r, row, column, weighted)));
    }
    return sum;
  }
  float at_home(int rank, int row, int column, bool weighted) const {
    const int hosts = static_cast<int>(c.tokens.size()) / ranks_per_host;
    const int place = rank % ranks_per_host;
    float sum = of_host(rank / ranks_per_host, place, row, column, weighted);
    for (int h = 0; h < hosts; ++h) {
      if (h == rank / ranks_per_host || !arrives_on(h, row)) continue;
      sum += as_float(bf16(of_host(h, place, row, column, weighted)));
    }
    return sum;
  }
};

/// Memory and operations of one rank.
template <class Comm, class Layout>
class host_sized_rank {
 public:
  host_sized_rank(Comm& comm, const routing_case& c, const Layout& layout, const ts::dispatch_options& options)
      : host_sized_rank(comm, c, layout, layout.num_slots(comm.rank()), options) {}
  /// @param num_slots Of this rank, where the layout reads memory that only the device sees. @param ordered Whether
  /// memory is laid out for `combine::ordered`, too.
  host_sized_rank(Comm& comm, const routing_case& c, const Layout& layout, int num_slots,
                  const ts::dispatch_options& options, bool ordered = true)
      : comm_(comm),
        c_(c),
        layout_(layout),
        options_(options),
        ordered_(ordered),
        grid_(ts::grid_of(comm)),
        bounds_(ts::dispatch_bounds::make(comm.size(), c.num_experts, num_slots, c.top_k, c.max_tokens, options)),
        stream_(device_test::make_stream()) {
    ts::memory_builder counting;
    carve(counting);
    memory_.emplace(counting.bytes());
    ts::memory_builder builder(ts::workspace_memory(memory_->data(), counting.bytes()), "the test's memory");
    carve(builder);
    device_test::require(cudaMemset(barrier_, 0, sizeof(*barrier_)), "cudaMemset");
    device_test::synchronize();
  }
  ~host_sized_rank() { cudaStreamDestroy(stream_); }
  host_sized_rank(const host_sized_rank&) = delete;
  host_sized_rank& operator=(const host_sized_rank&) = delete;

  cudaStream_t stream() const { return stream_; }

  void set_routing(const world_data& data) {
    const auto me = static_cast<std::size_t>(comm_.rank());
    put(ids_, data.ids[me]);
    put(weights_, data.weights[me]);
    put(x_, data.x[me]);
    put(plus_, data.plus[me]);
  }
  ts::host_sized_counts exchange() { return exchange(options_); }
  ts::host_sized_counts exchange(const ts::dispatch_options& options) {
    const ts::routing<float> chosen{{ids_, tokens(), c_.top_k}, {weights_, tokens(), c_.top_k}};
    return ts::exchange_routing(stream_, comm_, layout_, bounds_, options, chosen, handle_, lists_, tables_);
  }
  void dispatch(const ts::host_sized_counts& counts) {
    ts::dispatch_rows(stream_, comm_, counts, lists_, ts::matrix_view<const bf16>{x_, tokens(), c_.hidden}, received(),
                      buffers_);
  }
  void combine(const ts::host_sized_counts& counts, ts::combine_weights weights, bool with_plus) {
    const ts::matrix_view<const bf16> plus{with_plus ? plus_ : nullptr, tokens(), c_.hidden};
    ts::combine_rows(stream_, comm_, counts, lists_, handle_, weights,
                     ts::matrix_view<const bf16>{pairs_, bounds_.max_pairs, c_.hidden}, plus,
                     ts::matrix_view<bf16>{y_, tokens(), c_.hidden}, buffers_);
  }
  void combine_at_home(const ts::host_sized_counts& counts, bool weighted, bool with_plus) {
    const ts::matrix_view<const bf16> plus{with_plus ? plus_ : nullptr, tokens(), c_.hidden};
    ts::combine_pairs(stream_, comm_, counts, lists_, bounds_,
                      ts::matrix_view<const bf16>{pairs_, bounds_.max_pairs, c_.hidden},
                      ts::matrix_view<const float>{weighted ? weights_ : nullptr, tokens(), c_.top_k}, plus,
                      ts::matrix_view<bf16>{y_, tokens(), c_.hidden}, buffers_);
  }
  void wait() { comm_.wait(stream_); }

  /// Everything, twice over the same handle: with the counts of the exchange, and with those that are read again.
  void check(const world_data& data, const std::vector<expected_lists>& lists,
             const std::vector<std::vector<bf16>>& outputs, findings& found) {
    const int me = comm_.rank();
    const auto at = static_cast<std::size_t>(me);
    const expected_lists& own = lists[at];
    const expected_sums sums{c_, lists, outputs, grid_.ranks_per_host};
    set_routing(data);
    put(pairs_, outputs[at]);
    const ts::host_sized_counts counts = exchange();

    const std::size_t count = own.gather.size();
    if (get(handle_.expert_offsets, own.offsets.size()) != own.offsets) found.add(me, "row offsets");
    if (get(handle_.pair_weights, count) != own.pair_weights) found.add(me, "pair weights");
    if (get(handle_.expert_row_of, own.expert_row_of.size()) != own.expert_row_of) {
      found.add(me, "expert rows of pairs");
    }
    const auto total = get(handle_.total, 1)[0];
    if (total.overflow_drops != own.dropped) found.add(me, "drops");
    if (total.capacity_drops != data.capacity_drops[at]) found.add(me, "drops of the capacity");
    if (total.received_pairs != static_cast<std::int64_t>(count)) found.add(me, "received pairs");
    check_counts(counts, sums, found);

    const ts::host_sized_counts again = ts::read_counts(stream_, comm_, lists_);
    for (const ts::host_sized_counts* use : {&counts, &again}) {
      device_test::require(
          cudaMemsetAsync(received_, 0xff, static_cast<std::size_t>(bounds_.addressed_rows() * c_.hidden) * 2, stream_),
          "cudaMemsetAsync");
      dispatch(*use);
      check_rows(data, own, found);
      for (const bool weighted : {true, false}) {
        device_test::require(cudaMemsetAsync(y_, 0xff, static_cast<std::size_t>(tokens() * c_.hidden) * 2, stream_),
                             "cudaMemsetAsync");
        combine(*use, weighted ? ts::combine_weights::routing : ts::combine_weights::none, weighted);
        check_sums(data, weighted, weighted ? "weighted sum" : "plain sum", found,
                   [&](int t, int j) { return sums.at_home(me, me * c_.max_tokens + t, j, weighted); });
        if (!ordered_) continue;
        device_test::require(cudaMemsetAsync(y_, 0xff, static_cast<std::size_t>(tokens() * c_.hidden) * 2, stream_),
                             "cudaMemsetAsync");
        combine_at_home(*use, weighted, weighted);
        check_sums(data, weighted, weighted ? "weighted sum of pairs" : "plain sum of pairs", found,
                   [&](int t, int j) { return home_sum(c_, data, lists, outputs, me, t, j, weighted); });
      }
      check_values(*use, lists, found);
    }
  }

 private:
  std::int64_t tokens() const { return c_.tokens[static_cast<std::size_t>(comm_.rank())]; }
  ts::matrix_view<bf16> received() const { return {received_, bounds_.addressed_rows(), c_.hidden}; }

  void carve(ts::memory_builder& b) {
    const std::int64_t rows = bounds_.addressed_rows();
    barrier_ = b.take<std::uint32_t>("barrier", 1);
    const auto sort = ts::router_workspace::layout(b, bounds_.num_experts, barrier_);
    const auto carve_for = [&](auto combine) {
      tables_ = ts::host_sized_tables<float>::layout(b, bounds_, grid_, sort, combine);
      lists_ = ts::host_sized_lists::layout(b, bounds_, grid_, combine);
      buffers_ = ts::host_sized_buffers::layout(
          b, bounds_, grid_, ts::host_sized_buffers::row_bytes<bf16, float>(c_.hidden, c_.top_k), combine);
    };
    if (ordered_) {
      carve_for(ts::combine::ordered{});
    } else {
      carve_for(ts::combine::reduced{});
    }
    tables_.capacity = ts::capacity_workspace<float>::layout(b, bounds_, options_);
    handle_ = ts::dispatch_handle<float>::layout_device(b, bounds_, true);
    received_ = b.take<bf16>("received", rows * c_.hidden);
    ids_ = b.take<std::int32_t>("ids", c_.max_tokens * c_.top_k);
    weights_ = b.take<float>("weights", c_.max_tokens * c_.top_k);
    x_ = b.take<bf16>("x", c_.max_tokens * c_.hidden);
    plus_ = b.take<bf16>("plus", c_.max_tokens * c_.hidden);
    y_ = b.take<bf16>("y", c_.max_tokens * c_.hidden);
    pairs_ = b.take<bf16>("pairs", bounds_.max_pairs * c_.hidden);
    values_ = b.take<float>("values", bounds_.max_pairs);
    home_ = b.take<float>("values at home", c_.max_tokens * c_.top_k);
  }

  void check_counts(const ts::host_sized_counts& counts, const expected_sums& sums, findings& found) const {
    const int me = comm_.rank();
    const int host = grid_.host_of(me);
    const int place = grid_.place_of(me);
    std::int64_t within = 0, across = 0, arrived = 0;
    for (int h = 0; h < grid_.hosts(); ++h) {
      for (int t = 0; t < c_.max_tokens; ++t) {
        const int row = (h * grid_.ranks_per_host + place) * c_.max_tokens + t;
        for (int j = 0; j < grid_.ranks_per_host; ++j) {
          within += j != place && sums.arrives(host * grid_.ranks_per_host + j, row);
        }
        across += h != host && sums.arrives_on(h, me * c_.max_tokens + t);
      }
    }
    for (const bool a : sums.lists[static_cast<std::size_t>(me)].arrives) arrived += a;
    if (counts.rows_within() != within) found.add(me, "rows inside the host");
    if (counts.rows_across() != across) found.add(me, "rows between hosts");
    if (counts.received_rows() != arrived) found.add(me, "received rows");
  }

  void check_rows(const world_data& data, const expected_lists& own, findings& found) {
    const auto width = static_cast<std::size_t>(c_.hidden);
    const auto gather = get(handle_.gather, own.gather.size());
    const auto rows = get(received_, static_cast<std::size_t>(bounds_.addressed_rows()) * width);
    for (std::size_t i = 0; i < gather.size(); ++i) {
      const auto s = static_cast<std::size_t>(own.gather[i] / c_.max_tokens);
      const auto t = static_cast<std::size_t>(own.gather[i] % c_.max_tokens);
      if (gather[i] < 0 || gather[i] >= bounds_.addressed_rows()) {
        return found.add(comm_.rank(), "the gather list names row " + std::to_string(gather[i]));
      }
      const auto* row = rows.data() + static_cast<std::size_t>(gather[i]) * width;
      if (std::memcmp(row, data.x[s].data() + t * width, width * sizeof(bf16)) != 0) {
        return found.add(comm_.rank(), "row of token " + std::to_string(t) + " of rank " + std::to_string(s));
      }
    }
  }

  // @param expected Sum of a token's column, before anything is added.
  template <class Expected>
  void check_sums(const world_data& data, bool with_plus, const char* what, findings& found, Expected expected) {
    const int me = comm_.rank();
    const auto y = get(y_, static_cast<std::size_t>(tokens() * c_.hidden));
    for (int t = 0; t < static_cast<int>(tokens()); ++t) {
      for (int j = 0; j < c_.hidden; ++j) {
        const auto at = static_cast<std::size_t>(t * c_.hidden + j);
        float sum = expected(t, j);
        if (with_plus) sum += as_float(data.plus[static_cast<std::size_t>(me)][at]);
        if (same_bits(y[at], bf16(sum))) continue;
        return found.add(me, std::string(what) + " of token " + std::to_string(t) + " column " + std::to_string(j) +
                                 ": " + std::to_string(as_float(y[at])) + " for " + std::to_string(sum));
      }
    }
  }

  void check_values(const ts::host_sized_counts& counts, const std::vector<expected_lists>& lists, findings& found) {
    const int me = comm_.rank();
    const auto value = [](int rank, std::int32_t place) {
      return static_cast<float>(1000000 * (rank + 1)) + static_cast<float>(place);
    };
    std::vector<float> values;
    for (std::size_t i = 0; i < lists[static_cast<std::size_t>(me)].gather.size(); ++i) {
      values.push_back(value(me, static_cast<std::int32_t>(i)));
    }
    put(values_, values);
    ts::return_pair_values(stream_, comm_, counts, lists_, handle_, values_,
                           ts::matrix_view<float>{home_, tokens(), c_.top_k}, buffers_);
    const auto home = get(home_, static_cast<std::size_t>(tokens() * c_.top_k));
    for (std::size_t pair = 0; pair < home.size(); ++pair) {
      float expected = 0;
      for (int r = 0; r < comm_.size(); ++r) {
        const auto from = static_cast<std::size_t>(me * c_.max_tokens * c_.top_k) + pair;
        const std::int32_t place = lists[static_cast<std::size_t>(r)].expert_row_of[from];
        if (place >= 0) expected = value(r, place);
      }
      if (home[pair] != expected) return found.add(me, "value of pair " + std::to_string(pair));
    }
  }

  template <class T>
  std::vector<T> get(const T* from, std::size_t count) {
    std::vector<T> values(count);
    comm_.wait(stream_);  // bounded, before a copy that would not be
    if (count > 0) {
      device_test::require(cudaMemcpyAsync(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream_),
                           "copy");
      comm_.wait(stream_);
    }
    return values;
  }
  template <class T>
  void put(T* to, const std::vector<T>& values) {
    comm_.wait(stream_);
    if (values.empty()) return;
    device_test::require(cudaMemcpyAsync(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, stream_),
                         "copy");
    comm_.wait(stream_);
  }

  Comm& comm_;
  const routing_case& c_;
  Layout layout_;
  ts::dispatch_options options_;
  bool ordered_;
  ts::host_grid grid_;
  ts::dispatch_bounds bounds_;
  cudaStream_t stream_;
  std::optional<device_test::buffer<std::byte>> memory_;
  std::uint32_t* barrier_ = nullptr;
  ts::host_sized_tables<float> tables_;
  ts::dispatch_handle<float> handle_;
  ts::host_sized_lists lists_;
  ts::host_sized_buffers buffers_;
  bf16 *received_ = nullptr, *x_ = nullptr, *plus_ = nullptr, *y_ = nullptr, *pairs_ = nullptr;
  std::int32_t* ids_ = nullptr;
  float *weights_ = nullptr, *values_ = nullptr, *home_ = nullptr;
};

/// The lists and expert outputs of all ranks.
struct expected_world {
  world_data data;
  std::vector<expected_lists> lists;
  std::vector<std::vector<bf16>> outputs;

  template <class Layout>
  expected_world(const routing_case& c, const Layout& layout, const ts::dispatch_options& options, unsigned seed)
      : data(c, seed) {
    const int ranks = static_cast<int>(c.tokens.size());
    for (int r = 0; r < ranks; ++r) {
      const auto bounds =
          ts::dispatch_bounds::make(ranks, c.num_experts, layout.num_slots(r), c.top_k, c.max_tokens, options);
      outputs.push_back(expert_rows(c, data, lists.emplace_back(c, data, layout, r, bounds.max_pairs)));
    }
  }
};

}  // namespace exchange_cases
