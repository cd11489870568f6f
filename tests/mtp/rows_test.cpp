// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include "chain_case.hpp"

namespace {

using namespace mtp_test;

// What a block was told at each call.
struct recorder {
  struct call {
    int depth;
    std::vector<std::int32_t> rows, token_ids, targets, positions, sequences, chunks;
  };
  std::vector<call> calls;

  std::size_t saved_bytes(std::int64_t) const { return 0; }
  std::size_t deferred_bytes(std::int64_t) const { return 0; }
  std::size_t workspace_bytes(std::int64_t) const { return 0; }
  void forward(ts::host_stream, ts::pass, const mtp::depth_rows& r, ts::matrix_view<const double> x,
               ts::matrix_view<double> y, ts::saved_memory, ts::workspace_memory) {
    const auto copy = [](std::span<const std::int32_t> v) { return std::vector<std::int32_t>(v.begin(), v.end()); };
    calls.push_back({r.depth, copy(r.rows), copy(r.token_ids), copy(r.targets), copy(r.positions),
                     copy(r.sequence_offsets), copy(r.chunk_offsets)});
    for (std::int64_t i = 0; i < x.rows; ++i)
      for (std::int64_t j = 0; j < x.cols; ++j) y(i, j) = x(i, j);
  }
  void backward_input(ts::host_stream, const mtp::depth_rows&, ts::matrix_view<const double>,
                      ts::matrix_view<const double>, ts::matrix_view<double>, ts::saved_memory, ts::deferred_memory,
                      ts::workspace_memory) {}
  void backward_weights(ts::host_stream, const mtp::depth_rows&, ts::matrix_view<const double>,
                        ts::matrix_view<const double>, ts::saved_memory, ts::deferred_memory, ts::write,
                        ts::workspace_memory) {}
};

std::vector<recorder::call> record(const problem& p, mtp::row_policy policy, double& total) {
  using precision = ts::precision::fp64;
  const std::vector<double> ones(2, 1.0), matrix(8, 0.1), table(static_cast<std::size_t>(2 * p.map.vocabulary), 0.5);
  mtp::rms_norm<precision> norm(2, {ones.data()});
  mtp::linear<precision> projection(4, 2, {matrix.data()});
  mtp::token_embedding<precision> embedding(p.map.vocabulary, 2, {table.data()});
  mtp::softmax_head<precision> head(2, p.map.vocabulary, {table.data()});
  recorder block;
  using chain_type = mtp::chain<recorder, precision, mtp::concat::hidden_first>;
  const std::vector<chain_type::parts> parts(static_cast<std::size_t>(p.map.depths),
                                             {&norm, &norm, &projection, &block, nullptr});
  const auto chunks = p.chunk_offsets.empty() ? 1 : static_cast<std::int64_t>(p.chunk_offsets.size()) - 1;
  chain_type chain({.hidden = 2, .max_rows = p.rows(), .max_chunks = chunks, .rows = policy}, parts, embedding, head);
  ts::host_buffer workspace(chain.sizes().eval_workspace_bytes);
  const std::vector<double> hidden(static_cast<std::size_t>(2 * p.rows()), 1.0);
  std::vector<double> losses(static_cast<std::size_t>(chunks * p.map.depths));
  chain.forward({}, ts::pass::eval, p.batch(), {hidden.data(), p.rows(), 2}, losses, {}, workspace);
  total = 0;
  for (const double loss : losses) total += loss;
  return block.calls;
}

// The rows of every depth against the rule, pair by pair.
void check_rows(const problem& p) {
  const auto rows = static_cast<std::int32_t>(p.rows());
  const auto sequence_of = [&](std::int32_t row) {
    std::size_t s = 0;
    while (!p.sequence_offsets.empty() && row >= p.sequence_offsets[s + 1]) ++s;
    return s;
  };
  const auto position = [&](std::int32_t row) {
    if (!p.positions.empty()) return p.positions[static_cast<std::size_t>(row)];
    return p.sequence_offsets.empty() ? row : row - p.sequence_offsets[sequence_of(row)];
  };
  std::vector<std::int64_t> counted(static_cast<std::size_t>(p.map.depths)), expected(counted.size(), 0);
  mtp::count_terms(p.batch(), counted);
  double total = 0;
  const auto valid = record(p, mtp::row_policy::valid, total), all = record(p, mtp::row_policy::all, total);
  REQUIRE(valid.size() == counted.size());
  for (int k = 1; k <= p.map.depths; ++k) {
    CAPTURE(k);
    recorder::call want{k, {}, {}, {}, {}, {}, {}}, whole = want;
    for (std::int32_t row = 0; row < rows; ++row) {
      const std::int32_t partner = row + k;
      const bool pairs =
          partner < rows && sequence_of(row) == sequence_of(partner) && position(partner) == position(row) + k;
      const std::int32_t id = pairs ? p.token_ids[static_cast<std::size_t>(partner)] : -1;
      const std::int32_t target = pairs ? p.targets[static_cast<std::size_t>(partner)] : -1;
      for (auto* call : {&want, &whole}) {
        if (call == &want && !pairs) continue;
        call->rows.push_back(row);
        call->token_ids.push_back(id);
        call->targets.push_back(target);
        call->positions.push_back(position(row));
      }
      expected[static_cast<std::size_t>(k - 1)] += target >= 0 ? 1 : 0;
    }
    const auto& got = valid[static_cast<std::size_t>(k - 1)];
    const auto& got_all = all[static_cast<std::size_t>(k - 1)];
    CHECK(got.depth == k);
    CHECK(got.rows == want.rows);
    CHECK(got.token_ids == want.token_ids);
    CHECK(got.targets == want.targets);
    CHECK(got.positions == want.positions);
    CHECK(got_all.rows == whole.rows);
    CHECK(got_all.token_ids == whole.token_ids);
    CHECK(got_all.targets == whole.targets);
    CHECK(got_all.positions == whole.positions);
    if (!p.chunk_offsets.empty()) CHECK(got_all.chunks == p.chunk_offsets);
    // Chunks and documents keep their rows.
    REQUIRE(got.chunks.size() == got_all.chunks.size());
    REQUIRE(got.sequences.size() == got_all.sequences.size());
    for (const auto& [part, part_all] :
         {std::pair{&got.chunks, &got_all.chunks}, {&got.sequences, &got_all.sequences}}) {
      CHECK(part->front() == 0);
      CHECK(part->back() == static_cast<std::int32_t>(got.rows.size()));
      for (std::size_t c = 0; c + 1 < part->size(); ++c)
        for (std::int32_t i = (*part)[c]; i < (*part)[c + 1]; ++i) {
          CHECK(got.rows[static_cast<std::size_t>(i)] >= (*part_all)[c]);
          CHECK(got.rows[static_cast<std::size_t>(i)] < (*part_all)[c + 1]);
        }
    }
  }
  CHECK(counted == expected);
}

}  // namespace

TEST_CASE("a sequence of T tokens has T - k terms at depth k") {
  const auto p = make_problem(4, 2, 7, {{9}}, false, 1);
  std::vector<std::int64_t> counts(4);
  mtp::count_terms(p.batch(), counts);
  CHECK(counts == std::vector<std::int64_t>{8, 7, 6, 5});
  check_rows(p);
}

TEST_CASE("rows, ids, targets and positions of every depth are those of the rule") {
  for (const bool with_positions : {false, true}) {
    check_rows(make_problem(3, 2, 7, {{5, 1, 4}, {7}, {2, 3}}, with_positions, 2));
    check_rows(make_problem(3, 2, 7, {{1}, {}, {2}, {3}, {}}, with_positions, 3));
  }
  auto p = make_problem(2, 2, 7, {{4, 4}, {4, 4}}, true, 4, 1000);
  p.targets[1] = p.targets[7] = -1;
  p.chunk_offsets = {0, 3, 8, 8, 16};
  check_rows(p);
  p.sequence_offsets.clear();  // positions alone tell the documents apart
  check_rows(p);
  p.positions.clear();
  check_rows(p);
}

TEST_CASE("random positions: a jump ends a document, wherever it leads") {
  std::mt19937 engine(5);
  for (int round = 0; round < 20; ++round) {
    auto p = make_problem(3, 2, 7, {{20}, {15}}, true, static_cast<std::uint32_t>(round));
    std::int32_t position = 0;
    for (auto& value : p.positions) {
      // Forward jumps are by so much that no later token can look like a successor of an earlier one.
      if (engine() % 4 == 0) position = engine() % 2 == 0 ? 0 : position + 50;
      value = position++;
    }
    check_rows(p);
  }
}

TEST_CASE("a document ends where positions jump, and does not begin again where they fit by chance") {
  // Row 2 has position 7: rows 1 and 3 are two apart in both senses, yet another document's token lies between them.
  auto p = make_problem(2, 2, 7, {{4}}, true, 6);
  p.positions = {0, 1, 7, 3};
  std::vector<std::int64_t> counts(2);
  mtp::count_terms(p.batch(), counts);
  CHECK(counts == std::vector<std::int64_t>{1, 0});
}

TEST_CASE("lambda changes once, and the loss is lambda / D times the depths' losses over their divisor") {
  constexpr mtp::lambda_schedule published;
  static_assert(published.at(0) == 0.3 && published.at(9'999'999'999'999) == 0.3);
  static_assert(published.at(10'000'000'000'000) == 0.1);
  CHECK(mtp::lambda_schedule{.before = 1, .after = 0, .switch_tokens = 5}.at(5) == 0);

  std::vector<double> factors(2);
  mtp::loss_factors(0.3, mtp::divisor::tokens, 10, {}, factors);
  CHECK(factors[0] == doctest::Approx(0.3 / 2 / 10));
  CHECK(factors[1] == factors[0]);
  const std::vector<std::int64_t> terms = {8, 0};
  mtp::loss_factors(0.3, mtp::divisor::valid_terms, 10, terms, factors);
  CHECK(factors[0] == doctest::Approx(0.3 / 2 / 8));
  CHECK(factors[1] == 0);
  CHECK(mtp::total_loss(std::vector<double>{2, 3}, std::vector<double>{1, 2, 3, 4}, 2) == 2 * 3 + 3 * 7);
  CHECK_THROWS_AS(mtp::total_loss(factors, std::vector<double>{1, 2, 3}, 2), ts::invalid_argument);
  CHECK_THROWS_AS(mtp::loss_factors(-1, mtp::divisor::tokens, 10, {}, factors), ts::invalid_argument);
  CHECK_THROWS_AS(mtp::loss_factors(1, mtp::divisor::valid_terms, 10, {}, factors), ts::invalid_argument);
}

TEST_CASE("both divisors give the loss of equation 25 from the direct evaluation") {
  const auto p = make_problem(2, 4, 7, {{6}, {9}}, false, 7);
  library_model<ts::precision::fp64, mtp::concat::hidden_first> model(p);
  model.forward(p);
  const auto sums = direct_losses(p, p.parameters, p.hidden);
  std::vector<double> factors(2);
  mtp::loss_factors(0.3, mtp::divisor::tokens, p.rows(), {}, factors);
  CHECK(mtp::total_loss(factors, model.losses, 1) ==
        doctest::Approx(0.3 / 2 * (sums[0] + sums[1]) / 15).epsilon(1e-12));
  std::vector<std::int64_t> terms(2);
  mtp::count_terms(p.batch(), terms);
  mtp::loss_factors(0.3, mtp::divisor::valid_terms, 0, terms, factors);
  CHECK(mtp::total_loss(factors, model.losses, 1) ==
        doctest::Approx(0.3 / 2 * (sums[0] / 13 + sums[1] / 11)).epsilon(1e-12));
}
