// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include "../support/messages.hpp"
#include "chain_case.hpp"

namespace {

using namespace mtp_test;
using tessera_test::contains;
using tessera_test::message_of;
using hidden_first = mtp::concat::hidden_first;
using embedding_first = mtp::concat::embedding_first;

const std::vector<std::vector<int>> packed = {{5, 1, 4}, {7}, {2, 3}};

void check_close(const std::vector<double>& a, const std::vector<double>& b, double tolerance) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    CAPTURE(i);
    CHECK(std::abs(a[i] - b[i]) <= tolerance * (1 + std::abs(b[i])));
  }
}

// Gradients of `sum_k factors[k] * losses[k]` by central differences of the direct evaluation.
struct differences {
  std::vector<double> parameters, hidden;
};
differences finite_differences(const problem& p, std::span<const double> factors) {
  const auto total = [&](std::span<const double> params, std::span<const double> hidden) {
    const auto losses = direct_losses(p, params, hidden);
    double sum = 0;
    for (std::size_t k = 0; k < losses.size(); ++k) sum += factors[k] * losses[k];
    return sum;
  };
  differences result;
  const double step = 1e-5;
  auto params = p.parameters;
  for (double& v : params) {
    const double old = v;
    v = old + step;
    const double up = total(params, p.hidden);
    v = old - step;
    const double down = total(params, p.hidden);
    v = old;
    result.parameters.push_back((up - down) / (2 * step));
  }
  auto hidden = p.hidden;
  for (double& v : hidden) {
    const double old = v;
    v = old + step;
    const double up = total(p.parameters, hidden);
    v = old - step;
    const double down = total(p.parameters, hidden);
    v = old;
    result.hidden.push_back((up - down) / (2 * step));
  }
  return result;
}

template <class Concat>
void check_formula_and_gradients(problem p, mtp::row_policy policy) {
  p.embedding_first = std::is_same_v<Concat, embedding_first>;
  std::vector<double> factors;
  for (int k = 1; k <= p.map.depths; ++k) factors.push_back(0.3 / k);
  library_model<ts::precision::fp64, Concat> model(p, policy);
  model.forward(p);
  model.backward(p, factors);
  check_close(model.depth_losses(), direct_losses(p, p.parameters, p.hidden), 1e-12);
  const differences expected = finite_differences(p, factors);
  check_close(model.summed_gradients(p.output_norm), expected.parameters, 2e-8);
  check_close(model.hidden_gradient, expected.hidden, 2e-8);
}

}  // namespace

TEST_CASE("losses and all gradients are those of equations 21 to 25, evaluated directly in double") {
  for (const int depths : {1, 2, 3}) {
    CAPTURE(depths);
    {
      INFO("one sequence, no positions");
      const auto p = make_problem(depths, 4, 7, {{9}}, false, 1);
      check_formula_and_gradients<hidden_first>(p, mtp::row_policy::valid);
      check_formula_and_gradients<embedding_first>(p, mtp::row_policy::valid);
    }
    {
      INFO("packed documents, positions that start at 3, targets masked");
      auto p = make_problem(depths, 4, 7, packed, true, 3, 3);
      p.targets[2] = p.targets[9] = p.targets[16] = -1;
      check_formula_and_gradients<embedding_first>(p, mtp::row_policy::valid);
    }
    {
      INFO("packed documents, all rows in their places, chunks");
      auto p = make_problem(depths, 4, 7, packed, true, 4);
      p.targets[4] = -100;
      p.chunk_offsets = {0, 10, 10, 17, 22};
      check_formula_and_gradients<hidden_first>(p, mtp::row_policy::all);
    }
    {
      INFO("packed documents, chunks, no output norm");
      auto p = make_problem(depths, 4, 7, packed, true, 5);
      p.output_norm = false;
      p.chunk_offsets = {0, 10, 17, 22};
      check_formula_and_gradients<embedding_first>(p, mtp::row_policy::valid);
    }
  }
}

TEST_CASE("documents shorter than the depth take part at no depth that they have no tokens for") {
  auto p = make_problem(3, 4, 7, {{1, 2}, {1}, {3}}, true, 6);
  check_formula_and_gradients<hidden_first>(p, mtp::row_policy::valid);
  library_model<ts::precision::fp64, hidden_first> model(p);
  model.forward(p);
  CHECK(model.blocks[0]->seen_rows.back() == 3);
  CHECK(model.blocks[1]->seen_rows.back() == 1);
  CHECK(model.blocks[2]->seen_rows.back() == 0);
}

TEST_CASE("nothing crosses a document's border: each document gives what it gives alone") {
  const auto p = make_problem(2, 4, 7, {{4, 5}}, true, 7);
  library_model<ts::precision::fp64, hidden_first> together(p);
  together.forward(p);
  const std::vector<double> factors = {1.0, 1.0};
  together.backward(p, factors);
  double sums[2] = {};
  for (const auto& [first, count] : {std::pair<std::size_t, std::size_t>{0, 4}, {4, 5}}) {
    auto part = p;
    const auto cut = [&](auto& values, std::size_t width) {
      values = std::remove_reference_t<decltype(values)>(
          values.begin() + static_cast<std::ptrdiff_t>(first * width),
          values.begin() + static_cast<std::ptrdiff_t>((first + count) * width));
    };
    cut(part.token_ids, 1);
    cut(part.targets, 1);
    cut(part.positions, 1);
    cut(part.hidden, 4);
    part.sequence_offsets = {0, static_cast<std::int32_t>(count)};
    library_model<ts::precision::fp64, hidden_first> alone(part);
    alone.forward(part);
    alone.backward(part, factors);
    for (std::size_t i = 0; i < count * 4; ++i)
      CHECK(alone.hidden_gradient[i] == together.hidden_gradient[first * 4 + i]);
    sums[0] += alone.losses[0];
    sums[1] += alone.losses[1];
  }
  CHECK(together.losses[0] == doctest::Approx(sums[0]).epsilon(1e-14));
  CHECK(together.losses[1] == doctest::Approx(sums[1]).epsilon(1e-14));
}

TEST_CASE("single precision and bf16 stay near the direct evaluation") {
  auto p = make_problem(2, 8, 11, packed, true, 8);
  const std::vector<double> factors = {0.15, 0.1};
  const auto check = [&]<class Precision>(Precision, double tolerance) {
    // The problem with values that the storage type holds, so that only the arithmetic differs.
    auto rounded = p;
    for (auto* values : {&rounded.parameters, &rounded.hidden})
      for (double& v : *values) v = widen(to_storage<typename Precision::storage>(v));
    library_model<Precision, hidden_first> model(rounded);
    model.forward(rounded);
    model.backward(rounded, factors);
    check_close(model.depth_losses(), direct_losses(rounded, rounded.parameters, rounded.hidden), tolerance);
    const differences expected = finite_differences(rounded, factors);
    const auto relative_error = [](const auto& got, const std::vector<double>& want) {
      double error = 0, norm = 0;
      for (std::size_t i = 0; i < want.size(); ++i) {
        const double difference = widen(got[i]) - want[i];
        error += difference * difference;
        norm += want[i] * want[i];
      }
      return std::sqrt(error / norm);
    };
    CHECK(relative_error(model.summed_gradients(true), expected.parameters) < tolerance);
    CHECK(relative_error(model.hidden_gradient, expected.hidden) < tolerance);
  };
  check(ts::precision::fp32{}, 1e-5);
  check(ts::precision::bf16{}, 2e-2);
}

TEST_CASE("rows in their places and rows left out give the same bits, but for the rows a block sees") {
  auto p = make_problem(3, 4, 7, packed, true, 9);
  const std::vector<double> factors = {0.3, 0.2, 0.1};
  library_model<ts::precision::fp32, hidden_first> valid(p), all(p, mtp::row_policy::all);
  valid.forward(p);
  all.forward(p);
  valid.backward(p, factors);
  all.backward(p, factors);
  CHECK(valid.hidden_gradient == all.hidden_gradient);
  CHECK(valid.losses == all.losses);
  for (std::size_t k = 0; k < 3; ++k) {
    std::int64_t expected = 0;
    for (const auto& documents : packed)
      for (const int length : documents) expected += std::max(0, length - static_cast<int>(k) - 1);
    CHECK(valid.blocks[k]->seen_rows.back() == expected);
    CHECK(all.blocks[k]->seen_rows.back() == p.rows());
  }
}

TEST_CASE("a loss inside of a block reaches no row without a token") {
  auto p = make_problem(2, 4, 7, packed, true, 19);
  const std::vector<double> factors = {0.3, 0.2};
  library_model<ts::precision::fp64, hidden_first> valid(p), all(p, mtp::row_policy::all);
  for (auto* model : {&valid, &all}) {
    for (auto& block : model->blocks) block->own_gradient = 0.5;
    model->forward(p);
    model->backward(p, factors);
  }
  CHECK(valid.hidden_gradient == all.hidden_gradient);
  check_close(all.summed_gradients(true), valid.summed_gradients(true), 1e-14);
  for (const std::size_t last : {4u, 5u, 9u, 16u, 18u, 21u})  // the documents' last rows
    for (std::size_t j = 0; j < 4; ++j) CHECK(all.hidden_gradient[last * 4 + j] == 0);
}

TEST_CASE("a depth fixed at compile time, room to spare and the size of the head's tiles change nothing") {
  auto p = make_problem(2, 4, 7, packed, true, 10);
  const std::vector<double> factors = {0.3, 0.2};
  library_model<ts::precision::fp32, hidden_first> plain(p);
  plain.forward(p);
  plain.backward(p, factors);
  library_model<ts::precision::fp32, hidden_first, 2> fixed(p, mtp::row_policy::valid, 37);
  fixed.forward(p);
  fixed.backward(p, factors);
  CHECK(fixed.losses == plain.losses);
  CHECK(fixed.hidden_gradient == plain.hidden_gradient);
  CHECK(fixed.gradients == plain.gradients);
  library_model<ts::precision::fp32, hidden_first> tiles(p, mtp::row_policy::valid, 0, false, 64);
  tiles.forward(p);
  tiles.backward(p, factors);
  CHECK(tiles.losses == plain.losses);
  CHECK(tiles.hidden_gradient == plain.hidden_gradient);
}

TEST_CASE("a chunk's contributions do not depend on what else is in the batch") {
  // Two ranks with one sequence each, against one rank with both.
  auto whole = make_problem(2, 4, 7, {{6}, {6}}, false, 11);
  whole.chunk_offsets = {0, 6, 12};
  const std::vector<double> factors = {0.3, 0.2};
  library_model<ts::precision::fp32, hidden_first> one(whole);
  one.forward(whole);
  one.backward(whole, factors);
  const auto size = static_cast<std::size_t>(whole.map.size());
  for (std::size_t r = 0; r < 2; ++r) {
    auto part = whole;
    const auto at = static_cast<std::ptrdiff_t>(6 * r);
    part.token_ids.assign(whole.token_ids.begin() + at, whole.token_ids.begin() + at + 6);
    part.targets.assign(whole.targets.begin() + at, whole.targets.begin() + at + 6);
    part.hidden.assign(whole.hidden.begin() + 4 * at, whole.hidden.begin() + 4 * at + 24);
    part.sequence_offsets = part.chunk_offsets = {0, 6};
    library_model<ts::precision::fp32, hidden_first> rank(part);
    rank.forward(part);
    rank.backward(part, factors);
    for (std::size_t k = 0; k < 2; ++k) CHECK(rank.losses[k] == one.losses[2 * k + r]);
    CHECK(std::equal(rank.gradients.begin(), rank.gradients.end(),
                     one.gradients.begin() + static_cast<std::ptrdiff_t>(r * size)));
    CHECK(std::equal(rank.hidden_gradient.begin(), rank.hidden_gradient.end(),
                     one.hidden_gradient.begin() + static_cast<std::ptrdiff_t>(24 * r)));
  }
}

TEST_CASE("accumulating adds to every gradient, and the shared ones are always added to") {
  auto p = make_problem(2, 4, 7, packed, true, 12);
  const std::vector<double> factors = {0.3, 0.2};
  library_model<ts::precision::fp64, hidden_first> once(p), twice(p);
  once.forward(p);
  once.backward(p, factors);
  twice.forward(p);
  twice.backward(p, factors);
  twice.forward(p);
  twice.backward(p, factors, ts::write::accumulate);
  auto gradients = once.gradients;
  for (double& g : gradients) g *= 2;
  check_close(twice.gradients, gradients, 1e-14);
  auto hidden = once.hidden_gradient;
  for (double& g : hidden) g *= 2;
  CHECK(twice.hidden_gradient == hidden);
}

TEST_CASE("depths that share their parts get the sum of the gradients") {
  auto p = make_problem(3, 4, 7, {{8}, {5}}, false, 13);
  for (int k = 2; k <= 3; ++k)  // the same values at every depth
    std::copy_n(p.parameters.begin() + p.map.at(1), p.map.depth_size(), p.parameters.begin() + p.map.at(k));
  const std::vector<double> factors = {0.3, 0.2, 0.1};
  library_model<ts::precision::fp64, hidden_first> apart(p), shared(p, mtp::row_policy::valid, 0, true);
  for (auto* model : {&apart, &shared}) {
    model->forward(p);
    model->backward(p, factors);
  }
  CHECK(shared.losses == apart.losses);
  CHECK(shared.hidden_gradient == apart.hidden_gradient);
  const auto a = apart.summed_gradients(true), s = shared.summed_gradients(true);
  for (std::int64_t j = 0; j < p.map.depth_size(); ++j) {
    double sum = 0;
    for (int k = 1; k <= 3; ++k) sum += a[static_cast<std::size_t>(p.map.at(k) + j)];
    CHECK(s[static_cast<std::size_t>(p.map.at(1) + j)] == doctest::Approx(sum).epsilon(1e-12));
  }
}

TEST_CASE("evaluation needs no saved memory and gives the losses of training") {
  auto p = make_problem(2, 4, 7, packed, true, 14);
  library_model<ts::precision::fp32, embedding_first> model(p);
  model.forward(p, ts::pass::recompute);
  const auto losses = model.losses;
  model.forward(p, ts::pass::eval);
  CHECK(model.losses == losses);
  CHECK(model.blocks[1]->modes == std::vector<ts::pass>{ts::pass::recompute, ts::pass::eval});
}

TEST_CASE("an empty batch gives no loss and no gradient") {
  auto p = make_problem(2, 4, 7, {}, false, 15);
  p.chunk_offsets = {0};
  library_model<ts::precision::fp32, hidden_first> model(p, mtp::row_policy::valid, 4);
  model.forward(p);
  model.backward(p, std::vector<double>{1, 1});
  CHECK(model.losses.empty());
  CHECK(model.blocks[0]->seen_rows == std::vector<std::int64_t>{0});
}

TEST_CASE("the shared table and head get gradients from the chain alone where the main model gives none") {
  auto p = make_problem(1, 4, 7, {{5}}, false, 16);
  library_model<ts::precision::fp64, hidden_first> model(p);
  model.forward(p);
  model.backward(p, std::vector<double>{1.0});
  std::vector<bool> used(7, false);
  for (std::size_t i = 1; i < 5; ++i) used[static_cast<std::size_t>(p.token_ids[i])] = true;
  for (std::size_t v = 0; v < 7; ++v) {
    double table = 0, head = 0;
    for (std::size_t j = 0; j < 4; ++j) {
      table += std::abs(model.gradients[v * 4 + j]);
      head += std::abs(model.gradients[static_cast<std::size_t>(p.map.head()) + v * 4 + j]);
    }
    CHECK((table > 0) == used[v]);
    CHECK(head > 0);
  }
  // The last row has no partner: the main model's gradient there stays as it is.
  for (std::size_t j = 0; j < 4; ++j) CHECK(model.hidden_gradient[16 + j] == 0);
}

TEST_CASE("wrong calls are refused with the numbers") {
  auto p = make_problem(2, 4, 7, {{5}}, false, 17);
  using model_type = library_model<ts::precision::fp32, hidden_first>;
  model_type model(p);
  {
    auto wrong = p;
    wrong.targets.pop_back();
    CHECK(contains(message_of([&] { model.forward(wrong); }), "5 token ids, 4 targets"));
  }
  {
    auto wrong = p;
    wrong.sequence_offsets = {0, 4};
    CHECK(contains(message_of([&] { model.forward(wrong); }), "run from 0 to 4"));
    wrong.sequence_offsets = {0, 4, 3, 5};
    CHECK(contains(message_of([&] { model.forward(wrong); }), "exceeds"));
  }
  {
    auto wrong = p;
    wrong.chunk_offsets = {0, 2, 5};
    CHECK(contains(message_of([&] { model.forward(wrong); }), "2 chunks, the chain has room for 1"));
  }
  {
    auto wrong = p;
    wrong.token_ids[3] = 7;
    CHECK(contains(message_of([&] { model.forward(wrong); }), "ids are below 7"));
    wrong = p;
    wrong.targets[3] = 9;
    CHECK(contains(message_of([&] { model.forward(wrong); }), "is 9, ids are below 7"));
  }
  {
    const auto larger = make_problem(2, 4, 7, {{6}}, false, 18);
    CHECK(contains(message_of([&] {
                     std::vector<double> losses(2);
                     model.chain->forward({}, ts::pass::train, larger.batch(), {model.hidden.data(), 6, 4}, losses,
                                          model.saved, model.workspace);
                   }),
                   "6 rows, the chain has room for 5"));
  }
  CHECK(contains(message_of([&] {
                   model.chain->forward({}, ts::pass::train, p.batch(), model.hidden_view(), model.losses, {},
                                        model.workspace);
                 }),
                 "mtp saved memory is too small"));
  model.forward(p);
  CHECK(contains(message_of([&] { model.backward(p, std::vector<double>{1.0}); }), "1 factors for 2 depths"));
  {
    auto wrong = p;
    wrong.token_ids.pop_back();
    wrong.targets.pop_back();
    wrong.sequence_offsets = {0, 4};
    CHECK(contains(message_of([&] {
                     model.chain->backward_input({}, wrong.batch(), {model.hidden.data(), 4, 4},
                                                 std::vector<double>{1, 1}, {model.hidden_gradient.data(), 4, 4},
                                                 ts::write::overwrite, model.saved, model.deferred, model.workspace);
                   }),
                   "forward has saved 5 rows"));
  }
  CHECK(contains(message_of([&] {
                   std::vector<typename model_type::chain_type::parts> none;
                   typename model_type::chain_type chain({.hidden = 4, .max_rows = 4}, none, model.embedding,
                                                         model.head);
                 }),
                 "the parts of 0 depths"));
  CHECK(contains(message_of([&] {
                   std::vector<typename model_type::chain_type::parts> lacking(1);
                   typename model_type::chain_type chain({.hidden = 4, .max_rows = 4}, lacking, model.embedding,
                                                         model.head);
                 }),
                 "depth 1 lacks"));
}

TEST_CASE("parts without a place for their gradient, or with too little room between chunks, are refused") {
  auto p = make_problem(1, 4, 7, {{3}, {3}}, false, 20);
  using precision = ts::precision::fp32;
  std::vector<float> values(64, 1.0f), gradients(64, 5.0f), x(24, 0.5f);
  ts::host_buffer saved(1024), workspace(1024);
  const std::vector<std::int32_t> one = {0, 6}, two = {0, 3, 6};
  const ts::matrix_view<const float> rows(x.data(), 6, 4);
  const auto backward = [&](const std::vector<std::int32_t>& chunks, float* gradient, std::int64_t stride) {
    const mtp::linear<precision> linear(4, 4, {values.data(), gradient, stride});
    linear.backward_weights({}, {.chunk_offsets = chunks}, rows, rows, {}, {}, ts::write::overwrite, {});
    const mtp::rms_norm<precision> norm(4, {values.data(), gradient, stride});
    norm.backward_weights({}, {.chunk_offsets = chunks}, rows, rows, saved, {}, ts::write::overwrite, workspace);
  };
  CHECK_THROWS_AS(backward(one, nullptr, 0), ts::invalid_argument);
  CHECK_THROWS_AS(backward(two, gradients.data(), 15), ts::invalid_argument);
  CHECK_THROWS_AS(backward({0, 5}, gradients.data(), 16), ts::invalid_argument);
  CHECK(gradients == std::vector<float>(64, 5.0f));
  backward(one, gradients.data(), 0);
  CHECK(gradients[16] == 5);
  backward(two, gradients.data(), 16);
  CHECK(gradients[16] != 5);
  CHECK_THROWS_AS(mtp::linear<precision>(0, 4, {values.data()}), ts::invalid_argument);
  CHECK_THROWS_AS(mtp::rms_norm<precision>(4, {}), ts::invalid_argument);
  CHECK_THROWS_AS(mtp::token_embedding<precision>(7, 0, {values.data()}), ts::invalid_argument);
  CHECK_THROWS_AS(mtp::softmax_head<precision>(4, 7, {values.data()}, 0), ts::invalid_argument);
}

TEST_CASE("the head's losses survive large logits, and its greedy choice is the lowest of equal ids") {
  using precision = ts::precision::fp32;
  const std::vector<float> weights = {900, -900, 900, 0, 1, 2};  // [6, 1]
  const mtp::softmax_head<precision> head(1, 6, {weights.data()}, 2);
  const std::vector<float> x = {1, -1, 0.001f};
  const std::vector<std::int32_t> targets = {0, 0, -1}, chunks = {0, 3};
  ts::host_buffer saved(head.saved_bytes(3)), workspace(head.workspace_bytes(3));
  double loss = 0;
  const mtp::depth_rows rows{.targets = targets, .chunk_offsets = chunks};
  head.forward({}, ts::pass::train, rows, {x.data(), 3, 1}, {&loss, 1}, saved, workspace);
  CHECK(loss == doctest::Approx(std::log(2.0) + 1800));
  std::vector<float> dx(3, 9.0f);
  head.backward_input({}, rows, {x.data(), 3, 1}, 0.5, {dx.data(), 3, 1}, saved, {}, workspace);
  CHECK(dx[0] == doctest::Approx(0).epsilon(1e-6));  // both winners have the same weight
  CHECK(dx[1] == doctest::Approx(0.5 * (-900 - 900)));
  CHECK(dx[2] == 0);
  std::vector<std::int32_t> tokens(3);
  head.greedy({}, {x.data(), 3, 1}, tokens, workspace);
  CHECK(tokens == std::vector<std::int32_t>{0, 1, 0});
}
