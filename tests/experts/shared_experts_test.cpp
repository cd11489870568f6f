// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <vector>

#include <doctest/doctest.h>

#include "expert_case.hpp"

namespace ts = tessera;
using namespace expert_test;

namespace {

using shared = ts::experts<ts::activation::swiglu, ts::precision::fp64>::shared;

// One expert that sees `tokens` rows in their places.
sizes every_token(int tokens, int intermediate) {
  sizes s;
  s.rows_per_expert = {tokens}, s.tokens = tokens, s.hidden = 12, s.intermediate = intermediate;
  s.weighted = false, s.gathered = false, s.spread = 0.5;
  return s;
}

// Appends the units of expert `b` to those of `a`, as the documentation of the fused form says.
problem fuse(const problem& a, const problem& b) {
  problem r = a;
  r.n = a.n + b.n, r.width = 2 * r.n;
  r.s.intermediate = r.n;
  const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  append(r.p.gate, b.p.gate), append(r.p.up, b.p.up);
  append(r.p.gate_bias, b.p.gate_bias), append(r.p.up_bias, b.p.up_bias);
  r.p.down.clear();
  for (int k = 0; k < a.d; ++k) {
    for (int j = 0; j < a.n; ++j) r.p.down.push_back(a.p.down[at(k * a.n + j)]);
    for (int j = 0; j < b.n; ++j) r.p.down.push_back(b.p.down[at(k * b.n + j)]);
    r.p.down_bias[at(k)] += b.p.down_bias[at(k)];
  }
  return r;
}

}  // namespace

TEST_CASE("one shared expert is an expert that sees every token") {
  const auto q = make_problem<ts::activation::swiglu, double>(every_token(9, 7), 21);
  solution<shared> r(q);
  std::int32_t offsets[2];
  const auto rows = ts::chunked_rows(offsets, 9, 0);
  CHECK(rows.num_local_experts == 1);
  CHECK(r.experts.dims() == ts::shared_expert_dims(12, 7, 1, true));
  r.experts.forward({}, rows, r.x_view(), {}, r.weights(), r.saved, r.y_view(), r.forward_scratch);
  for (int i = 0; i < q.P; ++i) {
    const auto expected = q.row(i, q.x, q.weight, q.p);
    for (int k = 0; k < q.d; ++k) CHECK(r.y[at(i * q.d + k)] == doctest::Approx(expected[at(k)]).epsilon(1e-12));
  }
}

TEST_CASE("two shared experts of width n are one of width 2n, forward and backward") {
  const auto a = make_problem<ts::activation::swiglu, double>(every_token(9, 7), 22);
  auto b = make_problem<ts::activation::swiglu, double>(every_token(9, 7), 23);
  b.x = a.x, b.dy = a.dy;
  const auto both = fuse(a, b);
  CHECK(both.n == ts::shared_expert_dims(12, 7, 2, true).intermediate);
  solution<shared> r_a(a), r_b(b), r(both);
  r_a.run(), r_b.run(), r.run();
  for (std::size_t i = 0; i < r.y.size(); ++i) {
    CHECK(r.y[i] == doctest::Approx(r_a.y[i] + r_b.y[i]).epsilon(1e-12));
    CHECK(r.dx[i] == doctest::Approx(r_a.dx[i] + r_b.dx[i]).epsilon(1e-12));
  }
  // the gradients of the first and the second expert's units, bit for bit
  bool same = true;
  for (int j = 0; j < 7; ++j)
    for (int k = 0; k < 12; ++k) {
      same &= r.dup[r.up_element(0, r.gate_column(j), k)] == r_a.dup[r_a.up_element(0, r_a.gate_column(j), k)];
      same &= r.dup[r.up_element(0, r.up_column(7 + j), k)] == r_b.dup[r_b.up_element(0, r_b.up_column(j), k)];
      same &= r.ddown[r.down_element(0, k, j)] == r_a.ddown[r_a.down_element(0, k, j)];
      same &= r.ddown[r.down_element(0, k, 7 + j)] == r_b.ddown[r_b.down_element(0, k, j)];
    }
  CHECK(same);
  CHECK(same_bits(r.ddown_bias, r_a.ddown_bias));
}

TEST_CASE("chunks cover the tokens in order") {
  std::int32_t offsets[8];
  auto rows = ts::chunked_rows(offsets, 10, 4);
  CHECK(rows.num_local_experts == 3);
  CHECK((offsets[0] == 0 && offsets[1] == 4 && offsets[2] == 8 && offsets[3] == 10));
  rows = ts::chunked_rows(offsets, 8, 4);
  CHECK(rows.num_local_experts == 2);
  CHECK(offsets[2] == 8);
  rows = ts::chunked_rows(offsets, 0, 4);
  CHECK(rows.num_local_experts == 0);
  CHECK(rows.row_offsets[0] == 0);
  rows = ts::chunked_rows(offsets, 0, 0);
  CHECK(rows.num_local_experts == 1);
  CHECK(rows.row_offsets[1] == 0);
  CHECK_THROWS_AS(ts::chunked_rows(offsets, -1, 0), ts::invalid_argument);
  CHECK_THROWS_AS(ts::chunked_rows(offsets, 5, -1), ts::invalid_argument);
}

TEST_CASE("gradients per chunk have the bits of the chunk alone, and add up to the whole") {
  const int T = 10, c = 4;
  const auto q = make_problem<ts::activation::swiglu, double>(every_token(T, 7), 24);
  solution<shared> r(q);
  r.run();
  std::int32_t offsets[4];
  const auto chunks = ts::chunked_rows(offsets, T, c);
  std::vector<double> up(3 * r.up.size()), down(3 * r.down.size()), up_bias(3 * r.up_bias.size()),
      down_bias(3 * r.down_bias.size());
  r.experts.backward_weights({}, chunks, r.x_view(), r.dy_view(), {}, r.saved, r.deferred,
                             {up.data(), down.data(), up_bias.data(), down_bias.data()}, ts::write::overwrite,
                             r.weights_scratch);
  const auto adds_up = [](const std::vector<double>& parts, const std::vector<double>& whole) {
    for (std::size_t i = 0; i < whole.size(); ++i)
      if (std::abs(parts[i] + parts[i + whole.size()] + parts[i + 2 * whole.size()] - whole[i]) > 1e-12) return false;
    return true;
  };
  CHECK(adds_up(up, r.dup));
  CHECK(adds_up(down, r.ddown));
  CHECK(adds_up(up_bias, r.dup_bias));
  CHECK(adds_up(down_bias, r.ddown_bias));

  for (int chunk = 0; chunk < 3; ++chunk) {  // as another rank would compute it, which holds only these tokens
    const int first = chunk * c, count = std::min(c, T - first);
    problem part = q;
    part.T = part.P = count;
    part.offsets = {0, count};
    part.x.assign(q.x.begin() + first * q.d, q.x.begin() + (first + count) * q.d);
    part.dy.assign(q.dy.begin() + first * q.d, q.dy.begin() + (first + count) * q.d);
    solution<shared> alone(part);
    alone.run();
    const auto part_of = [&](const std::vector<double>& all, const std::vector<double>& one) {
      return std::memcmp(all.data() + at(chunk) * one.size(), one.data(), one.size() * sizeof(double)) == 0;
    };
    CHECK(part_of(up, alone.dup));
    CHECK(part_of(down, alone.ddown));
    CHECK(part_of(up_bias, alone.dup_bias));
    CHECK(part_of(down_bias, alone.ddown_bias));
  }
}
