// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// What the experts promise beside their values: which bits depend on what, memory, errors, concepts.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "../support/messages.hpp"
#include "expert_case.hpp"
#if defined(TESSERA_HAS_CBLAS)
#include <tessera/gemm/blas.hpp>
#endif

namespace ts = tessera;
using namespace expert_test;
using tessera_test::message_of;

namespace {

template <class Activation, class Layout = ts::weight_layout::out_in_concatenated>
using double_experts = ts::experts<Activation, ts::precision::fp64, Layout>;
template <class Activation, class Layout = ts::weight_layout::out_in_concatenated>
using bf16_experts = ts::experts<Activation, ts::precision::bf16, Layout>;

sizes medium(ts::weight_on applied = ts::weight_on::output) {
  sizes s;
  s.rows_per_expert = {9, 0, 17, 1}, s.tokens = 11, s.hidden = 40, s.intermediate = 72, s.applied = applied;
  s.spread = 0.4;
  return s;
}

// Rows `keep` of a problem, in that order, with the experts they belong to.
problem pick_rows(const problem& q, const std::vector<int>& keep) {
  problem r = q;
  r.P = static_cast<int>(keep.size());
  r.gather.clear(), r.weight.clear();
  r.offsets.assign(at(q.L) + 1, 0);
  for (int i : keep) {
    r.gather.push_back(q.gather[at(i)]);
    r.weight.push_back(q.weight[at(i)]);
    int e = 0;
    while (i >= q.offsets[at(e) + 1]) ++e;
    for (int g = e; g < q.L; ++g) ++r.offsets[at(g) + 1];
  }
  return r;
}

template <class T>
bool same_row(const std::vector<T>& a, int i, const std::vector<T>& b, int j, std::int64_t n) {
  return std::memcmp(a.data() + i * n, b.data() + j * n, at(n) * sizeof(T)) == 0;
}

template <class Experts>
void check_row_independence(ts::weight_on applied) {
  const auto q = make_problem<typename Experts::activation_type, typename Experts::storage>(medium(applied), 3);
  solution<Experts> all(q);
  all.run();
  const auto check = [&](const std::vector<int>& keep) {
    solution<Experts> some(pick_rows(q, keep), {}, 0);
    some.run();
    for (int i = 0; i < static_cast<int>(keep.size()); ++i) {
      CAPTURE(keep[at(i)]);
      CHECK(same_row(some.y, i, all.y, keep[at(i)], q.d));
      CHECK(same_row(some.dx, i, all.dx, keep[at(i)], q.d));
      CHECK(same_row(some.dweight, i, all.dweight, keep[at(i)], 1));
      CHECK(std::memcmp(some.saved.h.row(i), all.saved.h.row(keep[at(i)]), at(q.width) * sizeof(*some.saved.h.data)) ==
            0);
      CHECK(std::memcmp(some.deferred.activation.row(i), all.deferred.activation.row(keep[at(i)]),
                        at(q.n) * sizeof(*some.saved.h.data)) == 0);
    }
  };
  for (int i : {0, 8, 9, 20, 26}) check({i});
  check({8, 7, 6, 5, 4, 3, 2, 1, 0, 10, 9, 25});  // order changes inside an expert too
  check({2, 3, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26});
}

// Results of one layout in the order of another.
template <class From, class To>
void check_layouts_agree(bool same_sums) {
  const auto q = make_problem<typename From::activation_type, typename From::storage>(medium(), 5);
  solution<From> a(q);
  solution<To> b(q);
  a.run(), b.run();
  CHECK(same_bits(a.y, b.y));
  CHECK(same_bits(a.dweight, b.dweight));
  bool same = true;
  for (int e = 0; e < q.L; ++e)
    for (int j = 0; j < q.n; ++j) {
      for (int k = 0; k < q.d; ++k) {
        same &= a.dup[a.up_element(e, a.gate_column(j), k)] == b.dup[b.up_element(e, b.gate_column(j), k)];
        same &= a.dup[a.up_element(e, a.up_column(j), k)] == b.dup[b.up_element(e, b.up_column(j), k)];
        same &= a.ddown[a.down_element(e, k, j)] == b.ddown[b.down_element(e, k, j)];
      }
      same &= a.dup_bias[at(e * q.width + a.gate_column(j))] == b.dup_bias[at(e * q.width + b.gate_column(j))];
      same &= a.dup_bias[at(e * q.width + a.up_column(j))] == b.dup_bias[at(e * q.width + b.up_column(j))];
    }
  CHECK(same);
  CHECK(same_bits(a.ddown_bias, b.ddown_bias));
  if (same_sums) {
    CHECK(same_bits(a.dx, b.dx));
  } else {  // dH W1 sums over outputs in the order of the layout
    double worst = 0;
    for (std::size_t i = 0; i < a.dx.size(); ++i)
      worst = std::max(worst, std::abs(static_cast<double>(a.dx[i]) - static_cast<double>(b.dx[i])));
    CHECK(worst < 1e-12);
    CHECK(!a.dx.empty());
  }
}

// An engine's own container: the library's with one thing changed.
struct frozen_experts : double_experts<ts::activation::swiglu> {
  using double_experts<ts::activation::swiglu>::experts;
  void backward_weights(ts::host_stream, const ts::expert_rows&, ts::matrix_view<const double>,
                        ts::matrix_view<const double>, ts::pair_weights<double>, const saved_view&,
                        const deferred_view&, const gradients&, ts::write, const backward_weights_scratch&) const {}
};
struct no_container {
  using storage = float;
  using accumulate = float;
  using gradient = float;
};

static_assert(ts::expert_container<double_experts<ts::activation::swiglu>>);
static_assert(ts::expert_container<double_experts<ts::activation::swiglu>::shared>);
static_assert(ts::expert_container<bf16_experts<ts::activation::relu2>, ts::space::device>);
static_assert(ts::expert_container<frozen_experts> && !ts::expert_container<frozen_experts, ts::space::device>);
static_assert(!ts::expert_container<no_container> && !ts::expert_container<int>);
static_assert(
    std::is_same_v<ts::experts<ts::activation::gelu, ts::precision::bf16_gradients>::shared::gradient, float>);

static_assert(ts::weight_layout_policy<ts::weight_layout::out_in_concatenated>);
static_assert(!ts::weight_layout_policy<ts::precision::fp32>);
static_assert(std::is_trivially_copyable_v<ts::expert_weights<ts::bfloat16>>);
static_assert(std::is_convertible_v<ts::expert_weights<float>, ts::expert_weights<const float>>);
static_assert(!std::is_convertible_v<ts::expert_weights<const float>, ts::expert_weights<float>>);

}  // namespace

TEST_CASE("a row's bits do not depend on other rows, their number or their order") {
  for (auto applied : {ts::weight_on::output, ts::weight_on::input}) {
    check_row_independence<bf16_experts<ts::activation::swiglu>>(applied);
    check_row_independence<double_experts<ts::activation::gelu, ts::weight_layout::in_out_concatenated>>(applied);
  }
}

TEST_CASE("weight layouts give the same bits for the same weights") {
  using namespace ts::weight_layout;
  using act = ts::activation::clamped_swiglu;
  check_layouts_agree<double_experts<act, out_in_concatenated>, double_experts<act, in_out_concatenated>>(true);
  check_layouts_agree<double_experts<act, out_in_interleaved>, double_experts<act, in_out_interleaved>>(true);
  check_layouts_agree<double_experts<act, out_in_concatenated>, double_experts<act, in_out_interleaved>>(false);
}

TEST_CASE("weight layouts say where each element is") {
  const float* data = nullptr;
  const auto up = ts::weight_layout::out_in_concatenated::up(data, 6, 4, 0);
  CHECK((up.group_stride == 24 && up.row_stride == 4 && up.col_stride == 1));
  const auto down = ts::weight_layout::in_out_interleaved::down(data, 4, 3, 100);
  CHECK((down.group_stride == 100 && down.row_stride == 1 && down.col_stride == 4));
  CHECK(ts::weight_layout::out_in_concatenated::gate_column(2, 3) == 2);
  CHECK(ts::weight_layout::out_in_concatenated::up_column(2, 3) == 5);
  CHECK(ts::weight_layout::out_in_interleaved::gate_column(2, 3) == 4);
  CHECK(ts::weight_layout::out_in_interleaved::up_column(2, 3) == 5);
}

TEST_CASE("experts read and write weights with gaps between experts") {
  auto q = make_problem<ts::activation::swiglu, double>(medium(), 6);
  solution<double_experts<ts::activation::swiglu>> packed(q), gaps(q);
  packed.run();
  const auto spread = [&](const std::vector<double>& v, std::int64_t count, std::int64_t stride, double fill) {
    std::vector<double> r(at(q.L * stride), fill);
    for (int e = 0; e < q.L; ++e) std::copy_n(v.begin() + e * count, count, r.begin() + e * stride);
    return r;
  };
  const std::int64_t up = packed.experts.up_elements(), down = packed.experts.down_elements();
  auto w_up = spread(gaps.up, up, up + 3, 1e9), w_down = spread(gaps.down, down, down + 5, 1e9);
  std::vector<double> g_up(w_up.size(), -7), g_down(w_down.size(), -7);
  const ts::expert_weights<const double> w{w_up.data(),           w_down.data(), gaps.up_bias.data(),
                                           gaps.down_bias.data(), up + 3,        down + 5};
  const ts::expert_weights<double> g{g_up.data(), g_down.data(), gaps.dup_bias.data(), gaps.ddown_bias.data(),
                                     up + 3,      down + 5};
  const ts::host_stream stream;
  gaps.experts.forward(stream, gaps.rows(), gaps.x_view(), gaps.weighting(), w, gaps.saved, gaps.y_view(),
                       gaps.forward_scratch);
  gaps.experts.backward_input(stream, gaps.rows(), gaps.x_view(), gaps.dy_view(), gaps.weighting(), w, gaps.saved,
                              gaps.deferred, gaps.dx_view(), gaps.dweight.data(), gaps.input_scratch);
  gaps.experts.backward_weights(stream, gaps.rows(), gaps.x_view(), gaps.dy_view(), gaps.weighting(), gaps.saved,
                                gaps.deferred, g, ts::write::overwrite, gaps.weights_scratch);
  CHECK(same_bits(gaps.y, packed.y));
  CHECK(same_bits(gaps.dx, packed.dx));
  CHECK(same_bits(g_up, spread(packed.dup, up, up + 3, -7)));
  CHECK(same_bits(g_down, spread(packed.ddown, down, down + 5, -7)));
}

TEST_CASE("the gradient of a pair's weight is the product of its output and the output's gradient") {
  for (bool bias : {false, true}) {
    auto s = medium();
    s.bias = bias;
    const auto q = make_problem<ts::activation::swiglu, double>(s, 12);
    solution<double_experts<ts::activation::swiglu>> r(q);
    r.run();
    for (int i = 0; i < q.P; ++i) {
      double product = 0;
      for (int k = 0; k < q.d; ++k) product += q.dy[at(q.gather[at(i)] * q.d + k)] * r.y[at(i * q.d + k)];
      CHECK(r.dweight[at(i)] == doctest::Approx(product).epsilon(1e-12));
    }
  }
}

TEST_CASE("weights on the input are the same as inputs that were weighted before") {
  const auto q = make_problem<ts::activation::swiglu, ts::bfloat16>(medium(ts::weight_on::input), 13);
  solution<bf16_experts<ts::activation::swiglu>> weighted(q);
  weighted.run();
  auto before = q;  // each pair a row of its own, weighted and rounded
  before.s.weighted = false, before.T = q.P;
  before.x.clear(), before.dy.clear();
  for (int i = 0; i < q.P; ++i)
    for (int k = 0; k < q.d; ++k) {
      const auto element = at(q.gather[at(i)] * q.d + k);
      const float product = static_cast<float>(q.weight[at(i)]) * static_cast<float>(q.x[element]);
      before.x.push_back(static_cast<double>(static_cast<float>(ts::bfloat16(product))));
      before.dy.push_back(q.dy[element]);
    }
  std::iota(before.gather.begin(), before.gather.end(), 0);
  solution<bf16_experts<ts::activation::swiglu>> plain(before);
  plain.run();
  CHECK(same_bits(weighted.y, plain.y));
  CHECK(same_bits(weighted.dup, plain.dup));
  CHECK(same_bits(weighted.ddown, plain.ddown));
  CHECK(same_bits(weighted.ddown_bias, plain.ddown_bias));
}

TEST_CASE("weight gradients may come later, any number of times, and accumulate") {
  const auto q = make_problem<ts::activation::swiglu, ts::bfloat16>(medium(), 14);
  solution<bf16_experts<ts::activation::swiglu>> r(q);
  r.run();
  const auto up = r.dup, down = r.ddown, up_bias = r.dup_bias, down_bias = r.ddown_bias;
  r.poison();
  // input-backward's scratch and outputs are free for others in between
  std::fill(r.dx.begin(), r.dx.end(), ts::bfloat16(3.0f));
  std::fill_n(r.input_scratch.dactivation.data, r.max_pairs * q.n, -1.0f);
  r.backward_weights();
  CHECK(same_bits(r.dup, up));
  CHECK(same_bits(r.ddown, down));
  CHECK(same_bits(r.dup_bias, up_bias));
  CHECK(same_bits(r.ddown_bias, down_bias));
  r.backward_weights(ts::write::accumulate);
  const auto twice = [](std::vector<float> v) {
    for (float& e : v) e *= 2;
    return v;
  };
  CHECK(same_bits(r.dup, twice(up)));
  CHECK(same_bits(r.ddown, twice(down)));
  CHECK(same_bits(r.dup_bias, twice(up_bias)));
  CHECK(same_bits(r.ddown_bias, twice(down_bias)));
}

TEST_CASE("experts without rows get zero gradients when overwriting and keep theirs when accumulating") {
  for (const auto& counts : {std::vector<int>{0, 6, 0}, {0, 0, 0}, {5, 0, 0}}) {
    sizes s;
    s.rows_per_expert = counts;
    const auto q = make_problem<ts::activation::swiglu, double>(s, 15);
    solution<double_experts<ts::activation::swiglu>> r(q);
    r.run();
    const auto all_of = [&](const std::vector<double>& v, int e, double value) {
      const std::int64_t each = static_cast<std::int64_t>(v.size()) / q.L;
      return std::all_of(v.begin() + e * each, v.begin() + (e + 1) * each, [&](double x) { return x == value; });
    };
    for (int e = 0; e < q.L; ++e)
      for (const auto* v : {&r.dup, &r.ddown, &r.dup_bias, &r.ddown_bias})
        CHECK(all_of(*v, e, 0) == (counts[at(e)] == 0));
    for (auto* v : {&r.dup, &r.ddown, &r.dup_bias, &r.ddown_bias}) std::fill(v->begin(), v->end(), 2.5);
    r.backward_weights(ts::write::accumulate);
    for (int e = 0; e < q.L; ++e)
      for (const auto* v : {&r.dup, &r.ddown, &r.dup_bias, &r.ddown_bias})
        CHECK(all_of(*v, e, 2.5) == (counts[at(e)] == 0));
  }
}

TEST_CASE("a rank without experts or without tokens does nothing") {
  const double_experts<ts::activation::swiglu> none({.num_local_experts = 0, .hidden = 4, .intermediate = 3});
  const std::int32_t offsets[2] = {0, 0};
  ts::memory_builder count;
  const auto saved = none.carve_saved(count, 0);
  const auto deferred = none.carve_deferred(count, 0);
  const auto forward = none.carve_forward(count, 0, ts::weight_on::input);
  const auto input = none.carve_backward_input(count, 0, ts::weight_on::input);
  const auto weights = none.carve_backward_weights(count, 0, ts::weight_on::input);
  CHECK(count.bytes() == 0);
  const ts::expert_rows rows{0, offsets, nullptr};
  none.forward({}, rows, {}, {}, {}, saved, {}, forward);
  none.backward_input({}, rows, {}, {}, {}, {}, saved, deferred, {}, nullptr, input);
  none.backward_weights({}, rows, {}, {}, {}, saved, deferred, {}, ts::write::overwrite, weights);
}

TEST_CASE("gradients of pair weights may be left out, and rows beyond the last pair are not touched") {
  for (auto applied : {ts::weight_on::output, ts::weight_on::input}) {
    const auto q = make_problem<ts::activation::swiglu, double>(medium(applied), 16);
    solution<double_experts<ts::activation::swiglu>> a(q), b(q);
    a.run();
    b.forward();
    std::vector<double> dx(at((q.P + 1) * q.d), 42);
    b.experts.backward_input({}, b.rows(), b.x_view(), b.dy_view(), b.weighting(), b.weights(), b.saved, b.deferred,
                             {dx.data(), q.P + 1, q.d}, nullptr, b.input_scratch);
    CHECK(std::equal(a.dx.begin(), a.dx.end(), dx.begin()));
    CHECK(std::all_of(dx.end() - q.d, dx.end(), [](double v) { return v == 42; }));
  }
}

TEST_CASE("memory is counted by the formulas of the documentation") {
  const bf16_experts<ts::activation::swiglu> gated({.num_local_experts = 2, .hidden = 128, .intermediate = 256});
  const bf16_experts<ts::activation::relu2> plain({.num_local_experts = 2, .hidden = 128, .intermediate = 256});
  const auto bytes = [](auto&& carve) {
    ts::memory_builder m;
    carve(m);
    return m.bytes();
  };
  CHECK(bytes([&](auto& m) { gated.carve_saved(m, 10); }) == 10 * 512 * 2);
  CHECK(bytes([&](auto& m) { plain.carve_saved(m, 10); }) == 10 * 256 * 2);
  CHECK(bytes([&](auto& m) { gated.carve_deferred(m, 10); }) == 10 * 256 * 2);
  CHECK(bytes([&](auto& m) { gated.carve_forward(m, 10, ts::weight_on::output); }) == 10 * 256 * 2);
  CHECK(bytes([&](auto& m) { gated.carve_forward(m, 10, ts::weight_on::input); }) == 10 * (256 + 128) * 2);
  CHECK(bytes([&](auto& m) { gated.carve_backward_input(m, 10, ts::weight_on::output); }) == 10 * 256 * 4);
  CHECK(bytes([&](auto& m) { gated.carve_backward_weights(m, 10, ts::weight_on::output); }) == 0);
  CHECK(bytes([&](auto& m) { gated.carve_backward_weights(m, 10, ts::weight_on::input); }) == 10 * 128 * 2);
}

TEST_CASE("bad arguments get a sentence with the values, and nothing is written") {
  using experts = double_experts<ts::activation::swiglu>;
  const auto q = make_problem<ts::activation::swiglu, double>(medium(), 17);
  solution<experts> r(q, {}, 0);
  const auto untouched_y = r.y, untouched_dx = r.dx, untouched_dup = r.dup;
  std::fill_n(r.saved.h.data, r.max_pairs * q.width, -4.0);

  CHECK(message_of([] { experts({.num_local_experts = 1, .hidden = 0, .intermediate = 3}); }).find("got 1, 0 and 3") !=
        std::string::npos);

  const auto forward = [&](const ts::expert_rows& rows, ts::matrix_view<const double> x,
                           const ts::expert_weights<const double>& w, ts::matrix_view<double> y) {
    return message_of([&] { r.experts.forward({}, rows, x, r.weighting(), w, r.saved, y, r.forward_scratch); });
  };
  const auto says = [](const std::string& message, const char* part) {
    CAPTURE(message);
    CHECK(message.find(part) != std::string::npos);
  };
  auto gather = r.gather;
  gather[5] = q.T;
  says(forward({q.L, r.offsets.data(), gather.data()}, r.x_view(), r.weights(), r.y_view()),
       "gather[5] is 11, but x has 11 rows");
  gather[5] = -1;
  says(forward({q.L, r.offsets.data(), gather.data()}, r.x_view(), r.weights(), r.y_view()), "gather[5] is -1");
  says(forward({q.L, r.offsets.data(), nullptr}, r.x_view(), r.weights(), r.y_view()),
       "27 expert rows and no gather list, but x has 11 rows");
  says(forward({q.L - 1, r.offsets.data(), r.gather.data()}, r.x_view(), r.weights(), r.y_view()),
       "of 3 experts, this object has 4");
  auto offsets = r.offsets;
  offsets[2] = 5;
  says(forward({q.L, offsets.data(), r.gather.data()}, r.x_view(), r.weights(), r.y_view()),
       "row_offsets[2] is 5, less than row_offsets[1] = 9");
  offsets = r.offsets;
  offsets[0] = 1;
  says(forward({q.L, offsets.data(), r.gather.data()}, r.x_view(), r.weights(), r.y_view()), "row_offsets[0] is 1");
  offsets = r.offsets;
  offsets[4] = 28;
  says(forward({q.L, offsets.data(), r.gather.data()}, r.x_view(), r.weights(), r.y_view()),
       "28 expert rows, but the saved activations hold 27");
  says(forward({q.L, nullptr, r.gather.data()}, r.x_view(), r.weights(), r.y_view()), "no row_offsets");
  says(forward(r.rows(), {r.x.data(), q.T, q.d - 1}, r.weights(), r.y_view()), "x is [11, 39], at least [1, 40]");
  says(forward(r.rows(), r.x_view(), r.weights(), {r.y.data(), q.P - 1, q.d}), "y is [26, 40], at least [27, 40]");
  says(forward(r.rows(), r.x_view(), {}, r.y_view()), "the experts' weights are missing");
  auto w = r.weights();
  w.down_bias = nullptr;
  says(forward(r.rows(), r.x_view(), w, r.y_view()), "have biases by their dims");
  w = r.weights();
  w.up_stride = q.width * q.d - 1;
  says(forward(r.rows(), r.x_view(), w, r.y_view()), "weights have up_stride = 5759, it must be 0 or at least 5760");
  says(message_of([&] {
         r.experts.backward_input({}, r.rows(), r.x_view(), r.dy_view(), r.weighting(), w, r.saved, r.deferred,
                                  r.dx_view(), r.dweight.data(), r.input_scratch);
       }),
       "weights have up_stride = 5759");
  w.up_stride = q.width * q.d;
  w.down_stride = -q.d * q.n;
  says(forward(r.rows(), r.x_view(), w, r.y_view()), "weights have down_stride = -2880, it must be 0 or at least 2880");
  says(forward(r.rows(), {r.y.data(), q.T, q.d}, r.weights(), r.y_view()), "x (");
  says(forward(r.rows(), {reinterpret_cast<const double*>(reinterpret_cast<const char*>(r.x.data()) + 1), q.T, q.d},
               r.weights(), r.y_view()),
       "aligned to 8 bytes");
  says(message_of([&] {
         r.experts.backward_input({}, r.rows(), r.x_view(), r.dy_view(), r.weighting(), r.weights(), r.saved, {},
                                  r.dx_view(), r.dweight.data(), r.input_scratch);
       }),
       "the deferred activation is [0, 0], at least [27, 72]");
  says(message_of([&] {
         r.experts.backward_input({}, r.rows(), {}, r.dy_view(), {r.weight.data(), ts::weight_on::input}, r.weights(),
                                  r.saved, r.deferred, r.dx_view(), r.dweight.data(), r.input_scratch);
       }),
       "x has 0 rows");
  says(message_of([&] {
         r.experts.backward_weights({}, r.rows(), r.x_view(), {r.dy.data(), 3, q.d}, r.weighting(), r.saved, r.deferred,
                                    r.gradients(), ts::write::overwrite, r.weights_scratch);
       }),
       "but dy has 3 rows");
  auto gradients = r.gradients();
  gradients.down_stride = 1;
  says(message_of([&] {
         r.experts.backward_weights({}, r.rows(), r.x_view(), r.dy_view(), r.weighting(), r.saved, r.deferred,
                                    gradients, ts::write::overwrite, r.weights_scratch);
       }),
       "gradients have down_stride = 1");
  const experts unbiased({.num_local_experts = q.L, .hidden = q.d, .intermediate = q.n});
  says(message_of([&] {
         unbiased.forward({}, r.rows(), r.x_view(), r.weighting(), r.weights(), r.saved, r.y_view(), r.forward_scratch);
       }),
       "weights have no biases by their dims, but up_bias is 0x");
  ts::memory_builder tight(ts::workspace_memory(r.buffer.data(), 1024), "the workspace");
  says(message_of([&] { r.experts.carve_forward(tight, 100, ts::weight_on::output); }), "'experts.activation'");

  CHECK(same_bits(r.y, untouched_y));
  CHECK(same_bits(r.dx, untouched_dx));
  CHECK(same_bits(r.dup, untouched_dup));
  CHECK(std::all_of(r.saved.h.data, r.saved.h.data + r.max_pairs * q.width, [](double v) { return v == -4; }));
}

TEST_CASE("NaN in one row stays in that row") {
  auto q = make_problem<ts::activation::swiglu, double>(medium(), 18);
  solution<double_experts<ts::activation::swiglu>> clean(q), r(q);
  clean.forward();
  const int poisoned = q.gather[3];
  for (int k = 0; k < q.d; ++k) r.x[at(poisoned * q.d + k)] = std::nan("");
  r.forward();
  for (int i = 0; i < q.P; ++i)
    if (q.gather[at(i)] == poisoned)
      CHECK(std::isnan(r.y[at(i * q.d)]));
    else
      CHECK(same_row(r.y, i, clean.y, i, q.d));
}

#if defined(TESSERA_HAS_CBLAS)
TEST_CASE("the CBLAS backend agrees with the reference up to rounding") {
  using layout = ts::weight_layout::in_out_interleaved;
  using act = ts::activation::swiglu;
  for (auto applied : {ts::weight_on::output, ts::weight_on::input}) {
    const auto q = make_problem<act, double>(medium(applied), 19);
    solution<double_experts<act, layout>> a(q);
    solution<ts::experts<act, ts::precision::fp64, layout, ts::gemm::blas>> b(q);
    a.run(), b.run();
    const auto close = [](const std::vector<double>& u, const std::vector<double>& v) {
      return std::equal(u.begin(), u.end(), v.begin(), v.end(),
                        [](double s, double t) { return std::abs(s - t) <= 1e-11 * std::max(1.0, std::abs(t)); });
    };
    CHECK(close(b.y, a.y));
    CHECK(close(b.dx, a.dx));
    CHECK(close(b.dweight, a.dweight));
    CHECK(close(b.dup, a.dup));
    CHECK(close(b.ddown, a.ddown));
    CHECK(close(b.ddown_bias, a.ddown_bias));
  }
}
#endif
