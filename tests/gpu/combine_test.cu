// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Lists, combine and permute in device memory against the host half. Without a GPU it says so and exits with 77, which
// CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "device_fixture.cuh"

#include <tessera/dispatch/dispatch.cuh>
#include <tessera/layout/layout.hpp>

namespace {

namespace ts = tessera;
using device_test::buffer;
using device_test::relative_error;
using device_comm = ts::comm::self<ts::space::device>;
using host_comm = ts::comm::self<ts::space::host>;

constexpr ts::dispatch_bounds bounds_of(int tokens, int experts, int k) {
  return {1, experts, experts, k, tokens, std::int64_t{tokens} * k};
}

// A routing with unused slots, and its lists on both sides.
struct sorted_routing {
  int tokens, experts, k;
  ts::dispatch_bounds bounds;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  ts::host_buffer memory, scratch;
  ts::dispatch_handle<float> host;
  buffer<std::int32_t> d_ids;
  buffer<float> d_weights;
  buffer<std::byte> d_memory;
  buffer<std::uint32_t> barrier{1};
  buffer<std::uint8_t> block_counts;
  ts::dispatch_handle<float> device;

  static std::size_t handle_bytes(const ts::dispatch_bounds& bounds) {
    ts::memory_builder counting;
    ts::dispatch_handle<float>::layout(counting, bounds);
    return counting.bytes();
  }
  static std::size_t scratch_bytes(const ts::dispatch_bounds& bounds, const ts::dispatch_options& options) {
    ts::memory_builder counting;
    ts::routing_exchange_workspace<float>::layout(counting, bounds, options);
    return counting.bytes();
  }
  // Skewed: low experts are chosen more often. `holes`: some slots and some tokens have no expert.
  static std::vector<std::int32_t> make_ids(int tokens, int experts, int k, bool holes) {
    std::mt19937 generator(static_cast<unsigned>(tokens + 31 * experts + k));
    std::vector<std::int32_t> ids;
    std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
    for (int t = 0; t < tokens; ++t) {
      for (int e = 0; e < experts; ++e) order[static_cast<std::size_t>(e)] = e;
      for (int i = 0; i < k; ++i) {
        const auto left = static_cast<unsigned>(experts - i);
        const auto draw = static_cast<unsigned>(std::min(generator() % left, generator() % left));
        std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(i) + draw]);
        const bool hole = holes && (t % 9 == 4 || generator() % 6 == 0);
        ids.push_back(hole ? ts::no_expert : order[static_cast<std::size_t>(i)]);
      }
    }
    return ids;
  }

  // A few different weights, so that many are equal, where they decide about pairs.
  static std::vector<float> make_weights(std::size_t count, bool decide) {
    std::vector<float> weights = device_test::normal(count, 3);
    if (decide) {
      for (float& w : weights) w = std::round(2 * w) / 2;
    }
    return weights;
  }
  static ts::dispatch_bounds bounded(ts::dispatch_bounds bounds, const ts::dispatch_options& options) {
    if (options.row_bound > 0) bounds.max_pairs = std::min(bounds.max_pairs, options.row_bound);
    return bounds;
  }
  static std::size_t device_handle_bytes(const ts::dispatch_bounds& bounds) {
    ts::memory_builder counting;
    ts::dispatch_handle<float>::layout_device(counting, bounds, false);
    return counting.bytes();
  }

  sorted_routing(int tokens_, int experts_, int k_, bool holes, const ts::dispatch_options& options = {})
      : tokens(tokens_),
        experts(experts_),
        k(k_),
        bounds(bounded(bounds_of(tokens, experts, k), options)),
        ids(make_ids(tokens, experts, k, holes)),
        weights(make_weights(ids.size(), options.order == ts::drop_order::weight)),
        memory(handle_bytes(bounds)),
        scratch(scratch_bytes(bounds, options)),
        d_ids(ids),
        d_weights(weights),
        d_memory(device_handle_bytes(bounds)),
        block_counts(static_cast<std::size_t>(ts::router_workspace::block_count_bytes(experts))) {
    barrier.fill(0);
    ts::memory_builder host_builder(ts::workspace_memory(memory), "handle");
    host = ts::dispatch_handle<float>::layout(host_builder, bounds);
    ts::memory_builder scratch_builder(ts::workspace_memory(scratch), "scratch");
    const auto workspace = ts::routing_exchange_workspace<float>::layout(scratch_builder, bounds, options);
    host_comm comm;
    const ts::layout::block layout(experts, 1);
    ts::exchange_routing(ts::host_stream{}, comm, layout, bounds, options,
                         ts::routing<float>{{ids.data(), tokens, k}, {weights.data(), tokens, k}}, host, workspace);

    ts::memory_builder device_builder(ts::workspace_memory(d_memory.data(), d_memory.size()), "device handle");
    device = ts::dispatch_handle<float>::layout_device(device_builder, bounds, false);
    device_comm on_device;
    ts::exchange_routing(ts::device_stream(cudaStream_t{}), on_device, layout, bounds, options, device_chosen(), device,
                         ts::router_workspace{barrier.data(), block_counts.data()});
    device_test::synchronize();
  }
  ts::routing<float> device_chosen() const { return {{d_ids.data(), tokens, k}, {d_weights.data(), tokens, k}}; }
  std::int64_t rows() const { return host.total->received_pairs; }
  ts::matrix_view<const float> device_weights() const { return {d_weights.data(), tokens, k}; }
};

template <class T>
std::vector<T> fetch(const T* data, std::size_t count) {
  std::vector<T> values(count);
  if (count > 0)
    device_test::require(cudaMemcpy(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "copy");
  return values;
}

void check_lists(const sorted_routing& r) {
  CAPTURE(r.tokens);
  CAPTURE(r.experts);
  const auto rows = static_cast<std::size_t>(r.rows());
  const auto experts = static_cast<std::size_t>(r.experts);
  CHECK(fetch(r.device.expert_offsets, experts + 1) ==
        std::vector<std::int32_t>(r.host.expert_offsets, r.host.expert_offsets + experts + 1));
  CHECK(fetch(r.device.gather, rows) == std::vector<std::int32_t>(r.host.gather, r.host.gather + rows));
  CHECK(fetch(r.device.pair_weights, rows) == std::vector<float>(r.host.pair_weights, r.host.pair_weights + rows));
  std::vector<std::int32_t> row_of;
  for (std::size_t i = 0; i < r.ids.size(); ++i) {
    row_of.push_back(r.host.pair_slots[i] < 0 ? -1 : r.host.expert_row_of[r.host.pair_slots[i]]);
  }
  CHECK(fetch(r.device.expert_row_of, r.ids.size()) == row_of);
  const auto total = fetch(r.device.total, 1)[0];
  CHECK(total.num_tokens == r.host.total->num_tokens);
  CHECK(total.received_rows == r.host.total->received_rows);
  CHECK(total.received_pairs == r.host.total->received_pairs);
  CHECK(total.capacity_drops == r.host.total->capacity_drops);
  CHECK(total.overflow_drops == r.host.total->overflow_drops);
}

template <class T>
std::vector<T> random_rows(std::size_t count, unsigned seed) {
  std::vector<T> values;
  for (float x : device_test::normal(count, seed)) values.push_back(static_cast<T>(x));
  return values;
}

template <class S>
constexpr double tolerance = std::is_same_v<S, ts::bfloat16> ? 3e-3 : 1e-6;

// combine, permute and the values of pairs for one width; rows `stride` elements apart.
template <class S, class Out>
void check_rows(const sorted_routing& r, int hidden, int stride) {
  CAPTURE(hidden);
  CAPTURE(stride);
  const auto tokens = static_cast<std::size_t>(r.tokens);
  const auto width = static_cast<std::size_t>(stride);
  const std::int64_t pairs = std::int64_t{r.tokens} * r.k;
  std::vector<S> rows = random_rows<S>(static_cast<std::size_t>(r.rows()) * width, 5);
  buffer<S> d_rows(static_cast<std::size_t>(pairs) * width);  // NaN beyond the rows there are
  if (!rows.empty()) {
    device_test::require(cudaMemcpy(d_rows.data(), rows.data(), rows.size() * sizeof(S), cudaMemcpyHostToDevice),
                         "copy");
  }
  buffer<Out> d_y(tokens * width);
  const ts::matrix_view<const S> device_pairs(d_rows.data(), pairs, hidden, stride);
  const ts::matrix_view<const S> host_pairs(rows.data(), r.rows(), hidden, stride);
  const ts::matrix_view<Out> device_y(d_y.data(), r.tokens, hidden, stride);
  device_comm on_device;
  host_comm on_host;
  std::vector<double> sum(static_cast<std::size_t>(hidden));
  ts::combine_workspace<S, double> wide;
  wide.sum = sum.data();
  std::int32_t cursor = 0;
  wide.cursor = &cursor;

  // the host's sums in double, from the same rows
  ts::dispatch_handle<double> host;
  ts::dispatch_handle<double>::totals total{r.host.total->num_tokens, r.host.total->received_rows, r.rows(), 0, 0};
  host.total = &total;
  host.pair_slots = r.host.pair_slots;
  host.expert_row_of = r.host.expert_row_of;
  host.sent_row_offsets = r.host.sent_row_offsets;
  const std::vector<double> weights(r.weights.begin(), r.weights.end());
  for (const auto use : {ts::combine_weights::routing, ts::combine_weights::none}) {
    d_y.fill(0xff);
    ts::combine_begin<ts::combine::ordered>(ts::device_stream(cudaStream_t{}), on_device, r.device, use, device_pairs,
                                            ts::combine_workspace<S, float>{});
    ts::combine_end<ts::combine::ordered>(ts::device_stream(cudaStream_t{}), on_device, r.device, use, device_pairs,
                                          r.device_weights(), device_y, ts::combine_workspace<S, float>{});
    std::vector<double> expected(tokens * static_cast<std::size_t>(hidden));
    ts::combine_end<ts::combine::ordered>(ts::host_stream{}, on_host, host, use, host_pairs,
                                          ts::matrix_view<const double>(weights.data(), r.tokens, r.k),
                                          ts::matrix_view<double>(expected.data(), r.tokens, hidden), wide);
    device_test::synchronize();
    const auto y = d_y.get();
    std::vector<float> packed;
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t j = 0; j < width; ++j) {
        const auto value = static_cast<float>(y[t * width + j]);
        if (j < static_cast<std::size_t>(hidden)) {
          packed.push_back(value);
        } else {
          CHECK(std::isnan(value));  // the gap between rows is not written
        }
      }
    }
    CHECK(relative_error(packed, expected) <= tolerance<Out>);
    d_y.fill(0xff);
    ts::combine_rows(
        ts::device_stream(cudaStream_t{}), device_pairs, r.device.expert_row_of,
        use == ts::combine_weights::none ? ts::matrix_view<const float>(nullptr, r.tokens, r.k) : r.device_weights(),
        ts::matrix_view<const S>{}, device_y);
    device_test::synchronize();
    const auto again = d_y.get();
    CHECK(std::memcmp(again.data(), y.data(), y.size() * sizeof(Out)) == 0);
  }

  // what is added comes last
  if (stride == hidden) {
    const std::vector<S> plus = random_rows<S>(tokens * width, 8);
    buffer<S> d_plus(plus);
    d_y.fill(0xff);
    ts::combine_rows(ts::device_stream(cudaStream_t{}), device_pairs, r.device.expert_row_of, r.device_weights(),
                     ts::matrix_view<const S>(d_plus.data(), r.tokens, hidden), device_y);
    std::vector<double> expected(tokens * width);
    ts::combine_end<ts::combine::ordered>(ts::host_stream{}, on_host, host, ts::combine_weights::routing, host_pairs,
                                          ts::matrix_view<const double>(weights.data(), r.tokens, r.k),
                                          ts::matrix_view<double>(expected.data(), r.tokens, hidden), wide);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      expected[i] += static_cast<double>(static_cast<float>(plus[i]));
    }
    device_test::synchronize();
    CHECK(relative_error(d_y.get(), expected) <= tolerance<Out>);
  }

  // permute by gather list and by its inverse: bits, and nothing beyond the rows
  const std::vector<S> x = random_rows<S>(tokens * width, 6);
  buffer<S> d_x(x);
  const ts::matrix_view<const S> device_x(d_x.data(), r.tokens, hidden, stride);
  std::vector<S> expanded(static_cast<std::size_t>(pairs) * width);
  std::memset(static_cast<void*>(expanded.data()), 0xff, expanded.size() * sizeof(S));
  ts::permute(ts::host_stream{}, ts::matrix_view<const S>(x.data(), r.tokens, hidden, stride), r.host.rows(),
              ts::matrix_view<S>(expanded.data(), pairs, hidden, stride));
  buffer<S> d_expanded(expanded.size());
  const ts::matrix_view<S> device_expanded(d_expanded.data(), pairs, hidden, stride);
  for (const bool inverse : {false, true}) {
    d_expanded.fill(0xff);
    if (inverse) {
      ts::expand_rows(ts::device_stream(cudaStream_t{}), device_x, r.device.expert_row_of, r.k, device_expanded);
    } else {
      ts::permute(ts::device_stream(cudaStream_t{}), device_x, r.device.rows(), device_expanded);
    }
    device_test::synchronize();
    const auto got = d_expanded.get();
    CHECK(std::memcmp(got.data(), expanded.data(), expanded.size() * sizeof(S)) == 0);
  }
}

}  // namespace

TEST_CASE("a routing's lists are the host's, unused slots included") {
  for (const bool holes : {false, true}) {
    check_lists(sorted_routing(0, 4, 2, holes));
    check_lists(sorted_routing(1, 4, 2, holes));
    check_lists(sorted_routing(33, 1, 1, holes));
    check_lists(sorted_routing(700, 8, 8, holes));
    check_lists(sorted_routing(5000, 128, 8, holes));
    check_lists(sorted_routing(300, 896, 32, holes));
    check_lists(sorted_routing(40000, 16, 2, holes));
  }
}

TEST_CASE("a capacity drops the last pairs of each expert, as on the host") {
  for (const double factor : {0.5, 1.0, 1.5}) {
    ts::dispatch_options options;
    options.capacity_factor = factor;
    const sorted_routing r(3000, 16, 4, true, options);
    CHECK((r.host.total->capacity_drops > 0) == (factor < 1.5));
    check_lists(r);
    check_lists(sorted_routing(45000, 8, 2, true, options));
  }
}

TEST_CASE("combine and permute are the host's for every width") {
  const sorted_routing some(150, 12, 3, true);
  const sorted_routing full(70, 40, 8, false);
  const sorted_routing wide(40, 64, 32, true);
  for (const int hidden : {8, 64, 72, 1536, 2880}) {
    check_rows<ts::bfloat16, ts::bfloat16>(some, hidden, hidden);
    check_rows<ts::bfloat16, float>(full, hidden, hidden);
    check_rows<float, float>(some, hidden, hidden);
  }
  check_rows<ts::bfloat16, ts::bfloat16>(wide, 7168, 7168);
  check_rows<ts::bfloat16, ts::bfloat16>(full, 13, 13);
  check_rows<ts::bfloat16, ts::bfloat16>(full, 24, 29);
  check_rows<ts::bfloat16, ts::bfloat16>(some, 24, 32);
  check_rows<float, float>(full, 5, 5);
  check_rows<float, float>(full, 300, 301);
  check_rows<float, ts::bfloat16>(some, 36, 36);
  check_rows<ts::bfloat16, ts::bfloat16>(sorted_routing(0, 4, 2, false), 64, 64);
  check_rows<ts::bfloat16, ts::bfloat16>(sorted_routing(1, 1, 1, false), 64, 64);
}

TEST_CASE("permute takes any gather list, however experts share the rows, and writes no row beyond them") {
  std::mt19937 generator(7);
  for (const int experts : {1, 5, 896}) {
    for (const int most : {0, 40, 3000}) {
      CAPTURE(experts);
      CAPTURE(most);
      // the experts' shares are anything between none and `most`
      std::vector<std::int32_t> offsets{0}, gather;
      for (int e = 0; e < experts; ++e) {
        const auto rows = generator() % 3 == 0 ? 0 : generator() % static_cast<unsigned>(most + 1);
        offsets.push_back(offsets.back() + static_cast<std::int32_t>(experts > 5 ? rows % 50 : rows));
      }
      constexpr int sources = 97, hidden = 24, unused = 33;
      const auto rows = static_cast<std::size_t>(offsets.back());
      for (std::size_t i = 0; i < rows; ++i) gather.push_back(static_cast<std::int32_t>(generator() % sources));
      const auto x = random_rows<ts::bfloat16>(sources * hidden, 10);
      buffer<ts::bfloat16> d_x(x), d_expanded((rows + unused) * hidden);
      buffer<std::int32_t> d_offsets(offsets), d_gather(gather.size() + 1);
      if (rows > 0)
        device_test::require(cudaMemcpy(d_gather.data(), gather.data(), rows * 4, cudaMemcpyDefault), "copy");
      std::vector<ts::bfloat16> expected((rows + unused) * hidden);
      std::memset(static_cast<void*>(expected.data()), 0xff, expected.size() * 2);
      for (std::size_t i = 0; i < rows; ++i)
        std::copy_n(x.begin() + gather[i] * hidden, hidden, expected.begin() + static_cast<std::ptrdiff_t>(i) * hidden);
      d_expanded.fill(0xff);
      ts::permute(ts::device_stream(cudaStream_t{}), ts::matrix_view<const ts::bfloat16>(d_x.data(), sources, hidden),
                  ts::expert_rows{experts, d_offsets.data(), d_gather.data()},
                  ts::matrix_view<ts::bfloat16>(d_expanded.data(), static_cast<std::int64_t>(rows) + unused, hidden));
      device_test::synchronize();
      const auto got = d_expanded.get();
      CHECK(std::memcmp(got.data(), expected.data(), expected.size() * 2) == 0);
    }
  }
}

TEST_CASE("dispatch moves nothing, and values of pairs come home") {
  const sorted_routing r(150, 12, 3, true);
  device_comm comm;
  buffer<float> x(150 * 8);
  const ts::matrix_view<const float> view(x.data(), 150, 8);
  ts::dispatch_begin(ts::device_stream(cudaStream_t{}), comm, r.device, view, ts::matrix_view<float>{},
                     ts::dispatch_workspace<float>{});
  const auto rows = ts::dispatch_end(ts::device_stream(cudaStream_t{}), comm, r.device, view, ts::matrix_view<float>{},
                                     ts::dispatch_workspace<float>{});
  CHECK(rows.data == x.data());
  CHECK(rows.rows == 150);

  const std::vector<float> values = device_test::normal(static_cast<std::size_t>(r.rows()), 4);
  buffer<float> d_values(values), home(150 * 3);
  ts::return_pair_values(ts::device_stream(cudaStream_t{}), comm, r.device, d_values.data(),
                         ts::matrix_view<float>(home.data(), 150, 3), ts::pair_values_workspace<float>{});
  device_test::synchronize();
  std::vector<float> expected;
  for (std::size_t i = 0; i < r.ids.size(); ++i) {
    const std::int32_t slot = r.host.pair_slots[i];
    expected.push_back(slot < 0 ? 0.0f : values[static_cast<std::size_t>(r.host.expert_row_of[slot])]);
  }
  CHECK(home.get() == expected);
}

TEST_CASE("a capacity drops the lightest pairs of each expert, the last among equals, as on the host") {
  for (const double factor : {0.25, 1.0, 1.5}) {
    ts::dispatch_options options;
    options.capacity_factor = factor;
    options.order = ts::drop_order::weight;
    const sorted_routing r(3000, 16, 4, true, options);
    CHECK((r.host.total->capacity_drops > 0) == (factor < 1.5));
    check_lists(r);
    check_lists(sorted_routing(45000, 8, 2, true, options));
    check_lists(sorted_routing(100, 896, 8, false, options));
    check_lists(sorted_routing(0, 4, 2, false, options));
  }
}

TEST_CASE("a bound drops the pairs beyond it, as on the host, after a capacity") {
  for (const std::int64_t bound : {std::int64_t{1}, std::int64_t{5000}, std::int64_t{9000}, std::int64_t{11999}}) {
    for (const double factor : {0.0, 0.9}) {
      CAPTURE(bound);
      ts::dispatch_options options;
      options.row_bound = bound;
      options.capacity_factor = factor;
      options.overflow = ts::overflow_policy::drop;
      const sorted_routing r(3000, 16, 4, factor > 0, options);
      CHECK((r.host.total->overflow_drops > 0) == (bound < 9000 || factor == 0));
      check_lists(r);
    }
  }
}

TEST_CASE("a bound that is exceeded is a fault where nothing may be dropped, and a status says by how much") {
  ts::dispatch_options options;
  options.row_bound = 39;
  options.overflow = ts::overflow_policy::drop;
  const sorted_routing r(20, 4, 2, false, options);
  device_comm comm;
  const ts::layout::block layout(4, 1);
  const ts::router_workspace workspace{r.barrier.data(), r.block_counts.data()};
  buffer<ts::device_status> status(1);
  for (const auto policy : {ts::overflow_policy::drop, ts::overflow_policy::error}) {
    status.fill(0);
    options.overflow = policy;
    ts::exchange_routing(ts::device_stream(cudaStream_t{}), comm, layout, r.bounds, options, r.device_chosen(),
                         r.device, workspace, status.data());
    device_test::synchronize();
    check_lists(r);
    const auto found = status.get()[0];
    if (policy == ts::overflow_policy::drop) {
      CHECK(found.fault == ts::device_fault::none);
    } else {
      CHECK_THROWS_WITH_AS(ts::expect_ok(found),
                           "dispatch on the device: 40 pairs, the bound is 39: raise dispatch_options::row_bound to 40 "
                           "or more, or choose overflow_policy::drop",
                           ts::error);
    }
  }
}

TEST_CASE("what has no device half is refused with a reason") {
  const sorted_routing r(20, 4, 2, false);
  device_comm comm;
  const ts::layout::block layout(4, 1);
  const ts::router_workspace workspace{r.barrier.data(), r.block_counts.data()};
  ts::dispatch_options by_weight;
  by_weight.capacity_factor = 1.0;
  by_weight.order = ts::drop_order::weight;
  auto small = r.bounds;
  small.max_pairs = 39;
  CHECK_THROWS_WITH_AS(ts::exchange_routing(ts::device_stream(cudaStream_t{}), comm, layout, small, by_weight,
                                            r.device_chosen(), r.device, workspace),
                       "drop_order::weight on the device needs row_bound >= T * K = 40, it is 39",
                       ts::invalid_argument);
}
