// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <memory>

#include <tessera/comm/comm.hpp>
#include <tessera/layout/layout.hpp>

#include "../support/messages.hpp"
#include "chain_case.hpp"

namespace {

using namespace mtp_test;

constexpr int experts = 8, top_k = 2, depths = 2;
constexpr std::int64_t d = 6, n = 5, vocabulary = 11, sequences = 8, length = 7;

using router = ts::router<ts::score::sigmoid, ts::select::top_k, ts::weigh::normalized, ts::balance::bias,
                          ts::balance::switch_loss>;
template <class Precision>
using layer_of = ts::moe_layer<router, ts::experts<ts::activation::swiglu, Precision>, ts::layout::block,
                               ts::comm::threads, ts::combine::ordered>;

// Parameters of one depth: three norms and the block's, M, gate, experts up and down, expert by expert.
struct depth_values {
  std::vector<double> gains, projection, gate, up, down;
};
struct values {
  std::vector<double> table, head, hidden;
  std::vector<depth_values> own;
};
values make_values() {
  values v{random_values(vocabulary * d, 1, 1),
           random_values(vocabulary * d, 0.5, 2),
           random_values(sequences * length * d, 1, 3),
           {}};
  for (std::uint32_t k = 1; k <= depths; ++k) {
    const std::uint32_t seed = 10 * k;
    v.own.push_back({random_values(4 * d, 0.1, seed), random_values(2 * d * d, 0.4, seed + 1),
                     random_values(experts * d, 0.5, seed + 2), random_values(experts * 2 * n * d, 0.4, seed + 3),
                     random_values(experts * d * n, 0.4, seed + 4)});
    for (double& g : v.own.back().gains) g += 1;
  }
  return v;
}

// All gradients, in the order of chunks and experts.
struct outcome {
  std::vector<double> losses, hidden, table, head, gains, projection, gate, up, down, balance, bias;
  std::vector<std::int64_t> load;
};

// One rank: sequences [first, first + count), a chunk each.
template <class Precision>
struct rank_model {
  using S = typename Precision::storage;
  using A = typename Precision::accumulate;
  using layer = layer_of<Precision>;
  using norm = mtp::rms_norm<Precision>;
  using block = mtp::residual_moe<layer>;
  using chain_type = mtp::chain<block, Precision, mtp::concat::embedding_first>;

  struct depth_state {
    std::vector<A> gains, gate, dgains, dgate;
    std::vector<S> projection, up, down, dup, ddown;
    std::vector<A> dprojection;
    ts::host_buffer state;
    std::unique_ptr<layer> moe;
    std::vector<norm> norms;
    std::unique_ptr<mtp::linear<Precision>> linear;
    std::unique_ptr<block> own;
  };

  rank_model(const values& v, ts::comm::threads& comm, std::int64_t first, std::int64_t count, std::int64_t most)
      : comm_(comm),
        placement(experts, comm.size()),
        rows(count * length),
        chunks(count),
        table(cast<S>(v.table)),
        head(cast<S>(v.head)),
        hidden(cast<S>(std::span(v.hidden).subspan(std::size_t(first * length * d), std::size_t(rows * d)))),
        dtable(std::size_t(chunks * vocabulary * d)),
        dhead(dtable.size()),
        dhidden(hidden.size()),
        losses(std::size_t(depths * chunks)),
        embedding(vocabulary, d, {table.data(), dtable.data(), vocabulary * d}),
        output(d, vocabulary, {head.data(), dhead.data(), vocabulary * d}) {
    for (std::int64_t s = 0; s <= count; ++s) offsets.push_back(static_cast<std::int32_t>(s * length));
    std::mt19937 engine(5);
    std::vector<std::int32_t> stream;
    for (std::int64_t i = 0; i < sequences * length + 1; ++i)
      stream.push_back(static_cast<std::int32_t>(engine() % vocabulary));
    const auto at = stream.begin() + static_cast<std::ptrdiff_t>(first * length);
    token_ids.assign(at, at + static_cast<std::ptrdiff_t>(rows));
    targets.assign(at + 1, at + 1 + static_cast<std::ptrdiff_t>(rows));

    const int local = placement.num_slots(comm.rank()), begin = local * comm.rank();
    std::vector<typename chain_type::parts> parts;
    own.resize(depths);
    for (int k = 1; k <= depths; ++k) {
      const depth_values& from = v.own[std::size_t(k - 1)];
      depth_state& to = own[std::size_t(k - 1)];
      to.gains = cast<A>(from.gains);
      to.gate = cast<A>(from.gate);
      to.projection = cast<S>(from.projection);
      to.up = cast<S>(std::span(from.up).subspan(std::size_t(begin * 2 * n * d), std::size_t(local * 2 * n * d)));
      to.down = cast<S>(std::span(from.down).subspan(std::size_t(begin * d * n), std::size_t(local * d * n)));
      to.dgains.assign(std::size_t(chunks * 4 * d), A(99));
      to.dgate.assign(std::size_t(chunks * experts * d), A(99));
      to.dprojection.assign(std::size_t(chunks * 2 * d * d), A(99));
      to.dup.assign(to.up.size(), S(99));
      to.ddown.assign(to.down.size(), S(99));
      for (std::int64_t j = 0; j < 4; ++j)
        to.norms.push_back(norm(d, {to.gains.data() + j * d, to.dgains.data() + j * d, 4 * d}));
      to.linear = std::make_unique<mtp::linear<Precision>>(
          2 * d, d, mtp::parameter<S, A>{to.projection.data(), to.dprojection.data(), 2 * d * d});
      const ts::shape shape{.num_experts = experts,
                            .top_k = top_k,
                            .hidden = int(d),
                            .intermediate = int(n),
                            .max_tokens = most * length};
      const typename layer::options options{.chunk_tokens = length - k};
      to.state = ts::host_buffer(layer::sizes(shape, placement, comm.rank(), options).state_bytes);
      to.moe = std::make_unique<layer>(
          shape, typename layer::router_options{.balance = {{.rate = 0.01f}, {.coefficient = 0.05f}}}, placement, comm,
          to.state, options);
      to.moe->reset_state({});
      typename layer::weights weights;
      weights.gate = {to.gate.data(), experts, d};
      weights.experts.up = to.up.data();
      weights.experts.down = to.down.data();
      typename layer::gradients grads;
      grads.gate = to.dgate.data();
      grads.experts.up = to.dup.data();
      grads.experts.down = to.ddown.data();
      to.own = std::make_unique<block>(*to.moe, to.norms[3], weights, grads);
      parts.push_back({&to.norms[0], &to.norms[1], to.linear.get(), to.own.get(), &to.norms[2]});
    }
    chain = std::make_unique<chain_type>(mtp::chain_shape{.hidden = d, .max_rows = most * length, .max_chunks = most},
                                         parts, embedding, output);
    saved = ts::host_buffer(chain->sizes().saved_bytes);
    deferred = ts::host_buffer(chain->sizes().deferred_bytes);
    workspace = ts::host_buffer(std::max(chain->sizes().workspace_bytes, chain->sizes().eval_workspace_bytes));
    for (auto* buffer : {&saved, &deferred, &workspace}) poison(*buffer);
  }

  mtp::batch batch() const { return {token_ids, targets, {}, offsets, offsets}; }
  ts::matrix_view<const S> hidden_view() const { return {hidden.data(), rows, d}; }

  void forward(ts::pass mode = ts::pass::train) {
    chain->forward({}, mode, batch(), hidden_view(), losses, saved, workspace);
  }
  void backward(std::span<const double> factors) {
    chain->backward_input({}, batch(), hidden_view(), factors, {dhidden.data(), rows, d}, ts::write::overwrite, saved,
                          deferred, workspace);
    chain->backward_weights({}, batch(), hidden_view(), factors, ts::write::overwrite, saved, deferred, workspace);
  }

  ts::comm::threads& comm_;
  ts::layout::block placement;
  std::int64_t rows, chunks;
  std::vector<std::int32_t> token_ids, targets, offsets;
  std::vector<S> table, head, hidden;
  std::vector<A> dtable, dhead;
  std::vector<S> dhidden;
  std::vector<double> losses;
  mtp::token_embedding<Precision> embedding;
  mtp::softmax_head<Precision> output;
  std::vector<depth_state> own;
  std::unique_ptr<chain_type> chain;
  ts::host_buffer saved, deferred, workspace;
};

const std::vector<double> factors = {0.15 / 56, 0.15 / 56};

template <class Precision>
outcome run(const values& v, int ranks) {
  std::vector<outcome> parts(static_cast<std::size_t>(ranks));
  ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
    const auto bound = [&](int r) { return sequences * r / comm.size(); };
    const std::int64_t first = bound(comm.rank()), count = bound(comm.rank() + 1) - first;
    rank_model<Precision> model(v, comm, first, count, (sequences + ranks - 1) / ranks);
    model.forward();
    model.backward(factors);
    outcome& mine = parts[static_cast<std::size_t>(comm.rank())];
    const auto append = [](std::vector<double>& to, const auto& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    append(mine.losses, model.losses);
    append(mine.hidden, model.dhidden);
    append(mine.table, model.dtable);
    append(mine.head, model.dhead);
    for (auto& depth : model.own) {
      append(mine.gains, depth.dgains);
      append(mine.projection, depth.dprojection);
      append(mine.gate, depth.dgate);
      append(mine.up, depth.dup);
      append(mine.down, depth.ddown);
      const auto& state = depth.moe->state();
      append(mine.balance, std::span(state.losses, static_cast<std::size_t>(model.chunks)));
      depth.moe->end_step({}, comm);
      mine.load.insert(mine.load.end(), state.global_load, state.global_load + experts);
      append(mine.bias, std::span(state.bias, experts));
    }
  });
  // Arrays are [depths, rank's part] on a rank: put together as [depths, all].
  outcome all;
  const auto join = [&](auto member, std::size_t blocks) {
    for (std::size_t b = 0; b < blocks; ++b)
      for (const outcome& part : parts) {
        const auto& from = part.*member;
        const std::size_t size = from.size() / blocks;
        const auto at = from.begin() + static_cast<std::ptrdiff_t>(b * size);
        (all.*member).insert((all.*member).end(), at, at + static_cast<std::ptrdiff_t>(size));
      }
  };
  for (auto member : {&outcome::hidden, &outcome::table, &outcome::head}) join(member, 1);
  for (auto member : {&outcome::losses, &outcome::gains, &outcome::projection, &outcome::gate, &outcome::up,
                      &outcome::down, &outcome::balance})
    join(member, depths);
  all.load = parts[0].load;
  all.bias = parts[0].bias;
  return all;
}

}  // namespace

TEST_CASE("a chain of mixtures of experts has the same bits on 1, 2 and 4 ranks") {
  const values v = make_values();
  const outcome one = run<ts::precision::fp32>(v, 1);
  for (const int ranks : {2, 4}) {
    CAPTURE(ranks);
    const outcome many = run<ts::precision::fp32>(v, ranks);
    CHECK(many.losses == one.losses);
    CHECK(many.hidden == one.hidden);
    CHECK(many.table == one.table);
    CHECK(many.head == one.head);
    CHECK(many.gains == one.gains);
    CHECK(many.projection == one.projection);
    CHECK(many.gate == one.gate);
    CHECK(many.up == one.up);
    CHECK(many.down == one.down);
    CHECK(many.balance == one.balance);
    CHECK(many.load == one.load);
    CHECK(many.bias == one.bias);
  }
}

TEST_CASE("each depth counts its own T - k rows of a sequence, and moves its own bias") {
  const outcome result = run<ts::precision::fp32>(make_values(), 2);
  for (int k = 1; k <= depths; ++k) {
    std::int64_t pairs = 0;
    bool moved = false;
    for (int e = 0; e < experts; ++e) {
      pairs += result.load[std::size_t((k - 1) * experts + e)];
      moved = moved || result.bias[std::size_t((k - 1) * experts + e)] != 0;
    }
    CHECK(pairs == top_k * sequences * (length - k));
    CHECK(moved);
  }
}

TEST_CASE("gradients through a mixture of experts are those of finite differences, balance losses included") {
  values v = make_values();
  const auto total = [&] {
    double sum = 0;
    ts::comm::threads::run(1, [&](ts::comm::threads& comm) {
      rank_model<ts::precision::fp64> model(v, comm, 0, sequences, sequences);
      model.forward();
      sum = 0;
      for (std::size_t k = 0; k < depths; ++k) {
        for (std::size_t c = 0; c < sequences; ++c) sum += factors[k] * model.losses[k * sequences + c];
        for (std::size_t c = 0; c < sequences; ++c) sum += model.own[k].moe->state().losses[c];
      }
    });
    return sum;
  };
  const outcome got = run<ts::precision::fp64>(v, 1);
  const auto check = [&](double& value, double gradient) {
    const double step = 1e-6, old = value;
    value = old + step;
    const double up = total();
    value = old - step;
    const double down = total();
    value = old;
    CHECK(gradient == doctest::Approx((up - down) / (2 * step)).epsilon(1e-5).scale(1e-4));
  };
  const auto summed = [&](const std::vector<double>& contributions, std::size_t depth, std::size_t size,
                          std::size_t j) {
    double sum = 0;
    for (std::size_t c = 0; c < sequences; ++c) sum += contributions[(depth * sequences + c) * size + j];
    return sum;
  };
  for (std::size_t j = 0; j < v.hidden.size(); j += 41) check(v.hidden[j], got.hidden[j]);
  for (std::size_t j = 0; j < v.table.size(); j += 13) {
    check(v.table[j], summed(got.table, 0, v.table.size(), j));
    check(v.head[j], summed(got.head, 0, v.head.size(), j));
  }
  for (std::size_t k = 0; k < depths; ++k) {
    depth_values& own = v.own[k];
    for (std::size_t j = 0; j < own.gains.size(); j += 5)
      check(own.gains[j], summed(got.gains, k, own.gains.size(), j));
    for (std::size_t j = 0; j < own.projection.size(); j += 17)
      check(own.projection[j], summed(got.projection, k, own.projection.size(), j));
    for (std::size_t j = 0; j < own.gate.size(); j += 11) check(own.gate[j], summed(got.gate, k, own.gate.size(), j));
    for (std::size_t j = 0; j < own.up.size(); j += 71) check(own.up[j], got.up[k * own.up.size() + j]);
    for (std::size_t j = 0; j < own.down.size(); j += 47) check(own.down[j], got.down[k * own.down.size() + j]);
  }
}

TEST_CASE("chunks that are not the layer's are refused before anything is computed") {
  const values v = make_values();
  ts::comm::threads::run(1, [&](ts::comm::threads& comm) {
    rank_model<ts::precision::fp32> model(v, comm, 0, 2, 2);
    model.offsets = {0, 5, 14};
    try {
      model.forward();
      FAIL("not refused");
    } catch (const ts::invalid_argument& e) {
      CHECK(std::string(e.what()).find("chunk 1 starts at row") != std::string::npos);
    }
    CHECK(model.own[0].moe->state().load[0] == 0);
  });
}

TEST_CASE("a router that hashes tokens goes by the ids of its rows, and refuses a row without one") {
  using hash_layer = ts::moe_layer<ts::router<ts::score::sigmoid, ts::select::hash, ts::weigh::normalized>,
                                   ts::experts<ts::activation::swiglu, ts::precision::fp32>, ts::layout::block,
                                   ts::comm::self<ts::space::host>>;
  const std::vector<std::int32_t> table{0, 1, 2, 3, 4, 5};  // of 3 tokens
  ts::comm::self<ts::space::host> comm;
  const ts::shape shape{
      .num_experts = experts, .top_k = top_k, .hidden = int(d), .intermediate = int(n), .max_tokens = 4};
  const ts::layout::block placement(experts, 1);
  ts::host_buffer state(hash_layer::sizes(shape, placement, 0).state_bytes);
  hash_layer layer(shape, {.select = {.table = table.data(), .vocab = 3}}, placement, comm, state);
  layer.reset_state({});
  const auto floats = [](std::int64_t count, std::uint32_t seed) { return cast<float>(random_values(count, 1, seed)); };
  const auto gains = floats(d, 1), gate = floats(experts * d, 2), up = floats(experts * 2 * n * d, 3),
             down = floats(experts * d * n, 4), x = floats(4 * d, 5);
  mtp::rms_norm<ts::precision::fp32> norm(d, {gains.data(), nullptr, 0});
  const mtp::residual_moe<hash_layer> block(layer, norm,
                                            {.gate = {gate.data(), experts, d}, .experts = {up.data(), down.data()}});
  ts::host_buffer saved(block.saved_bytes(4)), workspace(block.workspace_bytes(4));
  std::vector<float> y(x.size(), 99.0F);
  std::vector<std::int32_t> ids{2, 0, 2, -1};
  const std::vector<std::int32_t> offsets{0, 4};
  const auto forward = [&] {
    block.forward({}, ts::pass::train,
                  {.depth = 1, .token_ids = ids, .sequence_offsets = offsets, .chunk_offsets = offsets},
                  {x.data(), 4, d}, {y.data(), 4, d}, saved, workspace);
  };
  CHECK(tessera_test::message_of(forward) ==
        "residual_moe: row 3 of depth 1 has no token (id -1), which select::hash needs: use row_policy::valid");
  CHECK(y == std::vector<float>(x.size(), 99.0F));
  ids[3] = 1;
  forward();
  const std::vector<std::int64_t> load(layer.state().load, layer.state().load + experts);
  CHECK(load == std::vector<std::int64_t>{1, 1, 1, 1, 2, 2, 0, 0});
}
