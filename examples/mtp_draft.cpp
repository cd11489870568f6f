// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Multi-token prediction as a drafter: a chain of two small mixtures of experts learns to run ahead of a toy main
// model, whose greedy output it then drafts. The output stays the same; the calls of the main model become fewer.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <span>
#include <vector>

#include <tessera/comm/comm.hpp>
#include <tessera/layout/layout.hpp>
#include <tessera/mtp/mtp.hpp>

namespace {

namespace ts = tessera;
namespace mtp = tessera::mtp;

using precision = ts::precision::fp32;
using router = ts::router<ts::score::sigmoid, ts::select::top_k, ts::weigh::normalized, ts::balance::bias>;
using layer = ts::moe_layer<router, ts::experts<ts::activation::swiglu, precision>, ts::layout::block,
                            ts::comm::self<ts::space::host>>;
using block = mtp::residual_moe<layer>;
using chain = mtp::chain<block, precision, mtp::concat::hidden_first>;

constexpr std::int64_t vocabulary = 11, hidden = 24, inner = 32, experts = 4, length = 48, depth = 2;

// The main model: its next token depends on the last two, its hidden state is the embedding of the last.
std::int32_t next_token(std::int32_t before, std::int32_t last) {
  return static_cast<std::int32_t>((2 * before + 3 * last + 1) % vocabulary);
}

// Every parameter lies in one array, and its gradient at the same place of another.
struct parameters {
  std::vector<float> values, gradients;
  std::mt19937 engine{1};

  std::size_t add(std::int64_t count, double mean, double deviation) {
    std::normal_distribution<double> normal(mean, deviation);
    const std::size_t at = values.size();
    for (std::int64_t i = 0; i < count; ++i)
      values.push_back(static_cast<float>(deviation > 0 ? normal(engine) : mean));
    gradients.resize(values.size());
    return at;
  }
  mtp::parameter<float, float> at(std::size_t place) { return {values.data() + place, gradients.data() + place}; }
};

// What one depth owns.
struct own_parts {
  own_parts(parameters& p, std::size_t place, ts::comm::self<ts::space::host>& comm)
      : state(layer::sizes(dims(), {experts, 1}, 0).state_bytes),
        moe(dims(), {}, ts::layout::block(experts, 1), comm, state),
        hidden_norm(hidden, p.at(place)),
        embedding_norm(hidden, p.at(place + hidden)),
        output_norm(hidden, p.at(place + 2 * hidden)),
        block_norm(hidden, p.at(place + 3 * hidden)),
        projection(2 * hidden, hidden, p.at(place + 4 * hidden)),
        moe_block(moe, block_norm, weights(p.values.data() + place), gradients(p.gradients.data() + place)) {
    moe.reset_state({});
  }

  static std::size_t add(parameters& p) {
    const double unit = 1 / std::sqrt(static_cast<double>(hidden));
    const std::size_t place = p.add(4 * hidden, 1, 0);
    p.add(2 * hidden * hidden, 0, unit);
    p.add(experts * hidden, 0, unit);
    p.add(experts * 2 * inner * hidden, 0, unit);
    p.add(experts * hidden * inner, 0, unit);
    return place;
  }
  static constexpr ts::shape dims() {
    return {.num_experts = experts, .top_k = 2, .hidden = hidden, .intermediate = inner, .max_tokens = 2 * length};
  }
  // Gate, up and down follow the norms and the projection.
  static constexpr std::int64_t gate = 4 * hidden + 2 * hidden * hidden, up = gate + experts * hidden,
                                down = up + experts * 2 * inner * hidden;
  static layer::weights weights(const float* at) {
    return {.gate = {at + gate, experts, hidden}, .experts = {at + up, at + down}};
  }
  static layer::gradients gradients(float* at) { return {.gate = at + gate, .experts = {at + up, at + down}}; }

  ts::host_buffer state;
  layer moe;
  mtp::rms_norm<precision> hidden_norm, embedding_norm, output_norm, block_norm;
  mtp::linear<precision> projection;
  block moe_block;
};

}  // namespace

int main() {
  ts::comm::self<ts::space::host> comm;
  parameters p;
  const std::size_t table = p.add(vocabulary * hidden, 0, 1), head_place = p.add(vocabulary * hidden, 0, 0.2);
  const std::size_t places[depth] = {own_parts::add(p), own_parts::add(p)};
  mtp::token_embedding<precision> embedding(vocabulary, hidden, p.at(table));
  mtp::softmax_head<precision> head(hidden, vocabulary, p.at(head_place));
  own_parts first(p, places[0], comm), second(p, places[1], comm);
  std::vector<chain::parts> parts;
  for (own_parts* own : {&first, &second})
    parts.push_back({&own->hidden_norm, &own->embedding_norm, &own->projection, &own->moe_block, &own->output_norm});
  const chain ahead({.hidden = hidden, .max_rows = 2 * length}, parts, embedding, head);
  ts::host_buffer saved(ahead.sizes().saved_bytes), deferred(ahead.sizes().deferred_bytes);
  ts::host_buffer workspace(std::max(ahead.sizes().workspace_bytes, ahead.sizes().eval_workspace_bytes));

  std::vector<float> states;  // the main model's hidden states of its last evaluation
  const auto evaluate = [&](std::span<const std::int32_t> tokens) {
    states.clear();
    for (const std::int32_t token : tokens) {
      const float* row = p.values.data() + table + token * hidden;
      states.insert(states.end(), row, row + hidden);
    }
  };
  const auto view = [&] {
    return ts::matrix_view<const float>(states.data(), static_cast<std::int64_t>(states.size()) / hidden, hidden);
  };

  // The main model as decoding sees it: logits after each of the last tokens.
  std::vector<float> logits;
  const auto main_model = [&](std::span<const std::int32_t> tokens, std::int64_t count) {
    evaluate(tokens);
    logits.assign(static_cast<std::size_t>(count * vocabulary), 0.0f);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::size_t at = tokens.size() - static_cast<std::size_t>(count - i);
      logits[static_cast<std::size_t>(i * vocabulary + next_token(at == 0 ? 0 : tokens[at - 1], tokens[at]))] = 1;
    }
    return ts::matrix_view<const float>(logits.data(), count, vocabulary);
  };
  const auto draft = [&](std::span<const std::int32_t> tokens, std::span<std::int32_t> drafts) {
    const auto known = view().subrows(0, static_cast<std::int64_t>(tokens.size()) - 1);
    ahead.draft({}, known, tokens, {}, drafts, workspace);
  };
  const auto decode = [&](const char* when) {
    std::vector<std::int32_t> plain = {1, 2}, drafted = plain;
    mtp::greedy_decode<float>(main_model, draft, plain, {.new_tokens = length});
    const auto record = mtp::greedy_decode<float>(main_model, draft, drafted, {.new_tokens = length, .depth = depth});
    std::printf("%s: accepted at depth 1: %.2f, at depth 2: %.2f; %.2f tokens per call; output %s\n", when,
                record.rate(1), record.rate(2), record.tokens_per_call(), plain == drafted ? "the same" : "DIFFERS");
    return plain == drafted;
  };

  bool good = decode("before training");
  double loss = 0;
  for (int step = 0; step < 300; ++step) {
    // Two documents, packed: positions say where the second begins.
    std::vector<std::int32_t> ids, targets, positions;
    for (int document = 0; document < 2; ++document) {
      std::int32_t before = static_cast<std::int32_t>(p.engine() % vocabulary);
      std::int32_t last = static_cast<std::int32_t>(p.engine() % vocabulary);
      for (std::int32_t i = 0; i < length; ++i) {
        const std::int32_t next = next_token(before, last);
        ids.push_back(last);
        targets.push_back(next);
        positions.push_back(i);
        before = last;
        last = next;
      }
    }
    const mtp::batch in{.token_ids = ids, .targets = targets, .positions = positions};
    evaluate(ids);
    std::fill(p.gradients.begin(), p.gradients.end(), 0.0f);
    std::vector<double> losses(depth), factors(depth);
    std::vector<std::int64_t> terms(depth);
    std::vector<float> hidden_gradient(states.size());  // what a main model would add to its own
    mtp::count_terms(in, terms);
    mtp::loss_factors(1.0, mtp::divisor::valid_terms, 0, terms, factors);
    ahead.forward({}, ts::pass::train, in, view(), losses, saved, workspace);
    ahead.backward_input({}, in, view(), factors, {hidden_gradient.data(), 2 * length, hidden}, ts::write::overwrite,
                         saved, deferred, workspace);
    ahead.backward_weights({}, in, view(), factors, ts::write::overwrite, saved, deferred, workspace);
    for (own_parts* own : {&first, &second}) own->moe.end_step({}, comm);  // each moves its own bias
    loss = mtp::total_loss(factors, losses, 1);
    // The table belongs to the main model, which does not train here; all that follows it does.
    for (std::size_t i = head_place; i < p.values.size(); ++i) p.values[i] -= 0.2f * p.gradients[i];
  }
  std::printf("loss after 300 steps: %.4f nats\n", loss);
  good = decode("after training") && good;
  return good ? 0 : 1;
}
