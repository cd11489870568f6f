// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <limits>
#include <stdexcept>

#include <doctest/doctest.h>

#include "chain_case.hpp"

namespace {

using namespace mtp_test;

constexpr std::int64_t vocabulary = 5;

// A causal model: logits after a token are a hash of all tokens up to it. Ties are frequent.
struct hashed_model {
  std::vector<float> logits{};
  std::vector<std::int32_t> final_tokens{};  // what was promised to stay
  std::int64_t calls = 0, rows = 0;

  static float logit(std::span<const std::int32_t> prefix, std::int64_t v) {
    std::uint64_t h = 1469598103934665603ULL;
    for (const auto t : prefix) h = (h ^ static_cast<std::uint64_t>(t + 1)) * 1099511628211ULL;
    h = (h ^ static_cast<std::uint64_t>(v)) * 1099511628211ULL;
    h ^= h >> 29;
    return static_cast<float>(h % 4);
  }
  static std::int32_t choice(std::span<const std::int32_t> prefix) {
    std::int32_t best = 0;
    for (std::int32_t v = 1; v < vocabulary; ++v)
      if (logit(prefix, v) > logit(prefix, best)) best = v;
    return best;
  }

  ts::matrix_view<const float> operator()(std::span<const std::int32_t> tokens, std::int64_t count) {
    ++calls;
    rows += count;
    const auto settled = tokens.size() - static_cast<std::size_t>(count);
    CHECK(settled >= final_tokens.size());
    CHECK(std::equal(final_tokens.begin(), final_tokens.end(), tokens.begin()));
    final_tokens.assign(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(settled));
    logits.clear();
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t v = 0; v < vocabulary; ++v)
        logits.push_back(logit(tokens.first(settled + static_cast<std::size_t>(i) + 1), v));
    return {logits.data(), count, vocabulary};
  }
};

std::vector<std::int32_t> plain_greedy(std::vector<std::int32_t> tokens, std::int64_t count, std::int32_t end = -1) {
  for (std::int64_t i = 0; i < count; ++i) {
    tokens.push_back(hashed_model::choice(tokens));
    if (tokens.back() == end) break;
  }
  return tokens;
}

// Right with a probability, wrong otherwise; 1 never errs, 0 always does.
struct erring_draft {
  double right;
  std::mt19937 engine{3};
  std::int64_t proposals = 0;
  void operator()(std::span<const std::int32_t> tokens, std::span<std::int32_t> drafts) {
    std::vector<std::int32_t> prefix(tokens.begin(), tokens.end());
    for (auto& draft : drafts) {
      const std::int32_t best = hashed_model::choice(prefix);
      const bool correct = static_cast<double>(engine() % 1000) < 1000 * right;
      draft =
          correct ? best : static_cast<std::int32_t>((best + 1 + static_cast<std::int32_t>(engine() % 4)) % vocabulary);
      prefix.push_back(draft);
      ++proposals;
    }
  }
};

}  // namespace

TEST_CASE("greedy decoding with drafts gives exactly the plain greedy tokens, however good the drafts are") {
  for (const int depth : {0, 1, 2, 3, 16})
    for (const double right : {0.0, 0.3, 0.9, 1.0})
      for (const std::int64_t count : {0, 1, 2, 3, 50}) {
        CAPTURE(depth);
        CAPTURE(right);
        CAPTURE(count);
        std::vector<std::int32_t> tokens = {2, 0, 1};
        hashed_model model;
        erring_draft draft{right};
        const auto record = mtp::greedy_decode<float>(model, draft, tokens, {.new_tokens = count, .depth = depth});
        CHECK(tokens == plain_greedy({2, 0, 1}, count));
        CHECK(record.tokens == count);
        CHECK(record.calls == model.calls);
        std::int64_t accepted = 0, proposed = 0;
        for (std::size_t k = 0; k < mtp::max_draft_depth; ++k) {
          accepted += record.accepted[k];
          proposed += record.proposed[k];
        }
        CHECK(proposed == draft.proposals);
        CHECK(accepted + record.calls == count);  // each call gives its accepted drafts and one token of its own
        CHECK(model.rows == proposed + record.calls);
        if (right == 0) CHECK(accepted == 0);
        if (right == 1) CHECK(accepted == proposed);
      }
}

TEST_CASE("acceptance is reported by depth, counting a draft only with all before it") {
  std::vector<std::int32_t> tokens = {1};
  hashed_model model;
  // Depth 1 is always right, depth 2 always wrong, depth 3 right again, which must not count.
  const auto draft = [](std::span<const std::int32_t> known, std::span<std::int32_t> drafts) {
    std::vector<std::int32_t> prefix(known.begin(), known.end());
    for (std::size_t k = 0; k < drafts.size(); ++k) {
      drafts[k] = hashed_model::choice(prefix);
      if (k == 1) drafts[k] = static_cast<std::int32_t>((drafts[k] + 1) % vocabulary);
      prefix.push_back(drafts[k]);
    }
  };
  const auto record = mtp::greedy_decode<float>(model, draft, tokens, {.new_tokens = 41, .depth = 3});
  CHECK(tokens == plain_greedy({1}, 41));
  CHECK(record.rate(1) == 1);
  CHECK(record.rate(2) == 0);
  CHECK(record.rate(3) == 0);
  CHECK(record.rate(4) == 0);
  CHECK(record.proposed[2] > 0);
  CHECK(record.calls == 21);  // the first call without drafts, then two tokens each
  CHECK(record.tokens_per_call() == doctest::Approx(41.0 / 21));
  CHECK_THROWS_AS(record.rate(0), ts::invalid_argument);
  CHECK_THROWS_AS(record.rate(17), ts::invalid_argument);
  CHECK(mtp::acceptance{}.tokens_per_call() == 0);
}

TEST_CASE("decoding ends with the end token, also in the middle of accepted drafts") {
  for (std::int32_t end = 0; end < vocabulary; ++end) {
    std::vector<std::int32_t> tokens = {3, 3};
    mtp::greedy_decode<float>(hashed_model{}, erring_draft{1.0}, tokens,
                              {.new_tokens = 60, .depth = 4, .end_token = end});
    CHECK(tokens == plain_greedy({3, 3}, 60, end));
  }
}

TEST_CASE("verification finds the longest right prefix, and ties go to the lowest id") {
  const std::vector<float> logits = {0, 2, 2, 1,   // after the known token: 1
                                     5, 0, 0, 5,   // after draft 1: 0
                                     0, 0, 0, 1};  // after draft 2: 3
  const ts::matrix_view<const float> all(logits.data(), 3, 4);
  const auto verify = [&](std::vector<std::int32_t> drafts) {
    const auto found = mtp::greedy_verify<float>(drafts, all.subrows(0, static_cast<std::int64_t>(drafts.size()) + 1));
    return std::pair{found.accepted, found.next};
  };
  CHECK(verify({}) == std::pair{0, 1});
  CHECK(verify({1}) == std::pair{1, 0});
  CHECK(verify({2}) == std::pair{0, 1});
  CHECK(verify({1, 0}) == std::pair{2, 3});
  CHECK(verify({1, 3}) == std::pair{1, 0});
  CHECK(verify({0, 0}) == std::pair{0, 1});
}

TEST_CASE("wrong calls of decoding are refused, and what was verified stays") {
  std::vector<std::int32_t> none, tokens = {1};
  const auto draft = [](auto, std::span<std::int32_t> drafts) { std::fill(drafts.begin(), drafts.end(), 0); };
  CHECK_THROWS_AS(mtp::greedy_decode<float>(hashed_model{}, draft, none, {.new_tokens = 1}), ts::invalid_argument);
  CHECK_THROWS_AS(mtp::greedy_decode<float>(hashed_model{}, draft, tokens, {.new_tokens = -1}), ts::invalid_argument);
  CHECK_THROWS_AS(mtp::greedy_decode<float>(hashed_model{}, draft, tokens, {.new_tokens = 1, .depth = 17}),
                  ts::invalid_argument);
  hashed_model inner;
  const auto failing = [&](std::span<const std::int32_t> known, std::int64_t count) {
    if (inner.calls == 5) throw std::runtime_error("the model is gone");
    return inner(known, count);
  };
  CHECK_THROWS_AS(mtp::greedy_decode<float>(failing, erring_draft{0.5}, tokens, {.new_tokens = 50, .depth = 2}),
                  std::runtime_error);
  CHECK(tokens.size() >= 6);
  CHECK(tokens == plain_greedy({1}, static_cast<std::int64_t>(tokens.size()) - 1));
  const std::vector<float> bad = {0, std::numeric_limits<float>::quiet_NaN(), 1};
  CHECK_THROWS_AS(mtp::greedy_verify<float>({}, {bad.data(), 1, 3}), ts::invalid_argument);
  CHECK_THROWS_AS(mtp::greedy_verify<float>({}, {bad.data(), 2, 1}), ts::invalid_argument);
}

TEST_CASE("the chain drafts what its depths predict at the last row, by the direct evaluation") {
  const int depths = 3;
  const std::int64_t d = 4, v = 7, n = 6;
  for (const std::uint32_t seed : {1u, 2u, 3u, 4u}) {
    auto p = make_problem(depths, d, v, {{int(n)}}, true, 100 * seed, 5);
    library_model<ts::precision::fp64, mtp::concat::hidden_first> model(p);
    auto tokens = p.token_ids;
    tokens.push_back(static_cast<std::int32_t>(seed % v));  // the main model's choice
    std::vector<std::int32_t> drafts(depths, -7);
    model.chain->draft({}, model.hidden_view(), tokens, p.positions, drafts, model.workspace);

    // The same tokens and drafts as a longer text; the id with the smallest loss at the row is the most probable.
    auto text = tokens;
    text.insert(text.end(), drafts.begin(), drafts.end());
    for (int k = 1; k <= depths; ++k) {
      auto longer = p;
      longer.token_ids.assign(text.begin(), text.begin() + n + k);
      longer.positions.clear();
      for (std::int32_t i = 0; i < n + k; ++i) longer.positions.push_back(5 + i);
      longer.sequence_offsets = {0, static_cast<std::int32_t>(n + k)};
      longer.hidden.resize(static_cast<std::size_t>((n + k) * d), 0.3);  // rows after the last do not matter
      std::int32_t best = -1;
      double smallest = 0;
      for (std::int32_t id = 0; id < v; ++id) {
        longer.targets.assign(static_cast<std::size_t>(n + k), -1);
        longer.targets.back() = id;
        const double loss = direct_losses(longer, longer.parameters, longer.hidden)[static_cast<std::size_t>(k - 1)];
        if (best < 0 || loss < smallest) {
          best = id;
          smallest = loss;
        }
      }
      CHECK(drafts[static_cast<std::size_t>(k - 1)] == best);
    }
    // Fewer drafts are the first of them; a rank without a document takes part in the calls of the blocks.
    std::vector<std::int32_t> two(2);
    model.chain->draft({}, model.hidden_view(), tokens, p.positions, two, model.workspace);
    CHECK(std::equal(two.begin(), two.end(), drafts.begin()));
    const auto calls = model.blocks[1]->seen_rows.size();
    model.chain->draft({}, {nullptr, 0, d}, {}, {}, two, model.workspace);
    CHECK(model.blocks[1]->seen_rows.size() == calls + 1);
    CHECK(model.blocks[1]->seen_rows.back() == 0);
    CHECK(std::equal(two.begin(), two.end(), drafts.begin()));
    CHECK_THROWS_AS(model.chain->draft({}, model.hidden_view(), p.token_ids, p.positions, two, model.workspace),
                    ts::invalid_argument);
    std::vector<std::int32_t> four(4);
    CHECK_THROWS_AS(model.chain->draft({}, model.hidden_view(), tokens, p.positions, four, model.workspace),
                    ts::invalid_argument);
  }
}

TEST_CASE("a model with its own chain as drafter decodes as without it") {
  // Main model: the hidden state is the running mean of embeddings and the last one; logits by the shared head.
  const std::int64_t d = 4, v = 7, bound = 64;
  auto p = make_problem(2, d, v, {{int(bound)}}, false, 9);
  library_model<ts::precision::fp32, mtp::concat::embedding_first> model(p);
  std::vector<float> hidden, logits;
  const auto main_model = [&](std::span<const std::int32_t> tokens, std::int64_t count) {
    hidden.assign(tokens.size() * static_cast<std::size_t>(d), 0.0F);
    for (std::size_t i = 0; i < tokens.size(); ++i)
      for (std::size_t j = 0; j < static_cast<std::size_t>(d); ++j) {
        float sum = 0;
        for (std::size_t r = 0; r <= i; ++r) sum += model.values[static_cast<std::size_t>(tokens[r] * d) + j];
        hidden[i * static_cast<std::size_t>(d) + j] =
            sum / static_cast<float>(i + 1) + model.values[static_cast<std::size_t>(tokens[i] * d) + j];
      }
    logits.clear();
    for (std::size_t i = tokens.size() - static_cast<std::size_t>(count); i < tokens.size(); ++i)
      for (std::int64_t id = 0; id < v; ++id) {
        float sum = 0;
        for (std::int64_t j = 0; j < d; ++j)
          sum += model.values[static_cast<std::size_t>(p.map.head() + id * d + j)] *
                 hidden[i * static_cast<std::size_t>(d) + static_cast<std::size_t>(j)];
        logits.push_back(sum);
      }
    return ts::matrix_view<const float>(logits.data(), count, v);
  };
  const auto draft = [&](std::span<const std::int32_t> tokens, std::span<std::int32_t> drafts) {
    const auto n = static_cast<std::int64_t>(tokens.size()) - 1;
    REQUIRE(hidden.size() >= static_cast<std::size_t>(n * d));  // all but the newest token have been evaluated
    model.chain->draft({}, {hidden.data(), n, d}, tokens, {}, drafts, model.workspace);
  };
  std::vector<std::int32_t> plain = {3, 1}, drafted = plain;
  const auto without = mtp::greedy_decode<float>(main_model, draft, plain, {.new_tokens = 40});
  const auto with = mtp::greedy_decode<float>(main_model, draft, drafted, {.new_tokens = 40, .depth = 2});
  CHECK(drafted == plain);
  CHECK(without.calls == 40);
  CHECK(with.calls <= 40);
  CHECK(with.proposed[0] > 0);
}
