// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <doctest/doctest.h>

#include <mutex>

#include "../support/layer_gradients.hpp"

namespace {

using namespace tessera_test;

using balanced_router = ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized,
                                   ts::balance::switch_loss, ts::balance::bias>;
using experts_fp32 = ts::experts<ts::activation::swiglu, ts::precision::fp32>;
using layer = ts::moe_layer<balanced_router, experts_fp32, ts::layout::block, ts::comm::threads, ts::combine::ordered>;
using layer_fp64 = ts::moe_layer<balanced_router, ts::experts<ts::activation::swiglu, ts::precision::fp64>,
                                 ts::layout::block, ts::comm::threads>;
using rank_of_layer = layer_rank<layer>;

constexpr int num_experts = 8;
const balanced_router::options routing{.balance = {{.coefficient = 0.1f}, {.rate = 0.125f}}};
const layer::options roomy{.dispatch = {.row_bound = ts::dispatch_options::full_row_bound}};

layer_problem problem(std::int64_t num_tokens = 24, std::uint32_t seed = 3) {
  return make_problem({.num_experts = num_experts,
                       .top_k = 3,
                       .hidden = 10,
                       .intermediate = 6,
                       .num_shared_experts = 2,
                       .gate_bias = true},
                      num_tokens, true, seed);
}

// `body(rank)` on two ranks with half of the tokens each.
template <class Body>
void on_two_ranks(const layer_problem& p, Body&& body) {
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
    const std::int64_t half = p.num_tokens / 2;
    rank_of_layer rank(p, ts::layout::block(num_experts, 2), comm, comm.rank() * half, half, half, routing, roomy);
    body(rank);
  });
}

// Where the 24 tokens of a problem are cut for 1 or 2 ranks.
std::vector<std::int64_t> halves(int ranks) {
  return ranks == 1 ? std::vector<std::int64_t>{0, 24} : std::vector<std::int64_t>{0, 12, 24};
}

std::vector<std::int64_t> load_of(const rank_of_layer& rank) {
  return {rank.layer->state().load, rank.layer->state().load + num_experts};
}

std::int64_t sum(const std::vector<std::int64_t>& v) {
  std::int64_t s = 0;
  for (const auto x : v) s += x;
  return s;
}

}  // namespace

TEST_CASE("eval gives the bits of train, needs no saved memory and counts nothing") {
  const auto p = problem();
  on_two_ranks(p, [](rank_of_layer& rank) {
    rank.forward(ts::pass::train);
    const auto trained = rank.y;
    const auto load = load_of(rank);
    CHECK(sum(load) == rank.count * 3);
    std::fill(rank.y.begin(), rank.y.end(), 0.0F);
    rank.saved = ts::host_buffer();
    rank.forward(ts::pass::eval);
    CHECK(rank.y == trained);
    CHECK(load_of(rank) == load);
  });
}

TEST_CASE("recompute saves what train saved and does not count again") {
  const auto p = problem();
  on_two_ranks(p, [](rank_of_layer& rank) {
    rank.forward(ts::pass::train);
    rank.backward_input();
    rank.backward_weights();
    const auto dx = rank.dx;
    const auto up = rank.up_grad;
    const auto gate = rank.gate_grad;
    const auto shared = rank.shared_down_grad;
    const auto load = load_of(rank);
    rank_of_layer::poison(rank.saved);
    rank_of_layer::poison(rank.deferred);
    rank.forward(ts::pass::recompute);
    rank.backward_input();
    rank.backward_weights();
    CHECK(rank.dx == dx);
    CHECK(rank.up_grad == up);
    CHECK(rank.gate_grad == gate);
    CHECK(rank.shared_down_grad == shared);
    CHECK(load_of(rank) == load);
  });
}

TEST_CASE("weight gradients may wait while other micro-batches use the workspace") {
  const auto p = problem();
  const auto other = problem(24, 77);
  on_two_ranks(p, [&](rank_of_layer& rank) {
    rank.forward(ts::pass::train);
    rank.backward_input();
    rank.backward_weights();
    const auto up = rank.up_grad;
    const auto gate = rank.gate_grad;
    rank.forward(ts::pass::recompute);
    rank.backward_input();
    {
      rank_of_layer second(other, rank.placement, rank.comm, rank.first, rank.count, rank.count, routing, roomy);
      std::swap(second.workspace, rank.workspace);
      second.forward(ts::pass::train);
      second.backward_input();
      std::swap(second.workspace, rank.workspace);
    }
    rank_of_layer::poison(rank.workspace);
    rank.backward_weights();
    CHECK(rank.up_grad == up);
    CHECK(rank.gate_grad == gate);
  });
}

TEST_CASE_TEMPLATE("without shared experts the residual is added to what forward gives without it", Precision,
                   ts::precision::fp32, ts::precision::bf16) {
  using plain = ts::moe_layer<balanced_router, ts::experts<ts::activation::swiglu, Precision>, ts::layout::block,
                              ts::comm::threads>;
  auto p = make_problem({.num_experts = num_experts, .top_k = 3, .hidden = 10, .intermediate = 6}, 24, true, 5, true);
  for (const int ranks : {1, 2}) {
    CAPTURE(ranks);
    const auto run = [&](const std::vector<double>& residual) {
      p.residual = residual;
      return run_problem<plain>(p, ts::layout::block(num_experts, ranks), halves(ranks), routing,
                                {.dispatch = roomy.dispatch});
    };
    const auto without = run({}), with = run(random_values(240, 1, 9, true));
    for (std::size_t i = 0; i < without.y.size(); ++i) {
      const auto sum = static_cast<float>(p.residual[i]) + static_cast<float>(without.y[i]);
      REQUIRE(with.y[i] == widen(static_cast<typename plain::storage>(sum)));
    }
    CHECK(with.y != without.y);
    CHECK(with.dx == without.dx);
    CHECK(with.gate == without.gate);
    CHECK(with.up == without.up);
  }
}

TEST_CASE("with shared experts the residual is added to their outputs first") {
  auto p = problem();
  for (const int ranks : {1, 2}) {
    CAPTURE(ranks);
    const auto run = [&](const layer_problem& of) {
      return run_problem<layer>(of, ts::layout::block(num_experts, ranks), halves(ranks), routing, roomy);
    };
    p.residual.clear();
    layer_problem routed = p, shared = p;  // either alone: the other's outputs are 0
    std::fill(routed.shared_down.begin(), routed.shared_down.end(), 0.0);
    std::fill(shared.down.begin(), shared.down.end(), 0.0);
    const auto without = run(p), of_routed = run(routed), of_shared = run(shared);
    p.residual = random_values(240, 1, 9, true);
    const auto with = run(p);
    for (std::size_t i = 0; i < with.y.size(); ++i) {
      const float plus = static_cast<float>(p.residual[i]) + static_cast<float>(of_shared.y[i]);
      REQUIRE(with.y[i] == static_cast<double>(static_cast<float>(of_routed.y[i]) + plus));
    }
    CHECK(with.dx == without.dx);
    CHECK(with.shared_down == without.shared_down);
  }
}

TEST_CASE("a residual without data changes no bit, one with distant rows is read, and eval gives the bits of train") {
  const auto p = problem();
  on_two_ranks(p, [](rank_of_layer& rank) {
    auto in = rank.inputs();
    const auto forward = [&](ts::pass mode) {
      std::fill(rank.y.begin(), rank.y.end(), -7.0F);
      rank_of_layer::poison(rank.workspace);
      rank.layer->forward({}, mode, in, rank.weights(), rank.y_view(), rank.saved, rank.workspace);
      return rank.y;
    };
    in.residual = {};
    const auto without = forward(ts::pass::recompute);
    in.residual = {nullptr, 3, 5};
    CHECK(forward(ts::pass::recompute) == without);
    in.residual = rank.dy_view();
    const auto with = forward(ts::pass::recompute);
    CHECK(with != without);
    CHECK(forward(ts::pass::eval) == with);
    std::vector<float> apart(static_cast<std::size_t>(rank.count * 13));
    for (std::int64_t t = 0; t < rank.count; ++t) std::copy_n(rank.dy.begin() + t * 10, 10, apart.begin() + t * 13);
    in.residual = {apart.data(), rank.count, 10, 13};
    CHECK(forward(ts::pass::recompute) == with);
  });
}

TEST_CASE("accumulate adds to every gradient") {
  const auto p = problem();
  on_two_ranks(p, [](rank_of_layer& rank) {
    rank.forward(ts::pass::train);
    rank.backward_input();
    rank.backward_weights();
    const auto once = rank.down_grad;
    const auto gate = rank.gate_grad;
    const auto gate_bias = rank.gate_bias_grad;
    const auto shared = rank.shared_up_grad;
    rank.backward_weights(ts::write::accumulate);
    CHECK(gate_bias.size() == num_experts);
    for (std::size_t i = 0; i < gate_bias.size(); ++i)
      CHECK(rank.gate_bias_grad[i] == doctest::Approx(2 * gate_bias[i]));
    for (std::size_t i = 0; i < once.size(); ++i) CHECK(rank.down_grad[i] == doctest::Approx(2 * once[i]));
    for (std::size_t i = 0; i < gate.size(); ++i) CHECK(rank.gate_grad[i] == doctest::Approx(2 * gate[i]));
    for (std::size_t i = 0; i < shared.size(); ++i) CHECK(rank.shared_up_grad[i] == doctest::Approx(2 * shared[i]));
  });
}

TEST_CASE("accumulate adds a contribution that is finished: the old bits plus those of overwrite") {
  auto p = make_problem({.num_experts = num_experts,
                         .top_k = 3,
                         .hidden = 10,
                         .intermediate = 6,
                         .num_shared_experts = 2,
                         .gate_bias = true,
                         .expert_bias = true},
                        24, true, 3);
  for (const std::int64_t chunk_tokens : {0, 5}) {
    p.chunk_tokens = chunk_tokens;
    CAPTURE(chunk_tokens);
    on_two_ranks(p, [](rank_of_layer& rank) {
      const auto all = [&] {
        return std::vector<std::vector<float>*>{
            &rank.gate_grad,           &rank.gate_bias_grad,       &rank.up_grad,        &rank.down_grad,
            &rank.up_bias_grad,        &rank.down_bias_grad,       &rank.shared_up_grad, &rank.shared_down_grad,
            &rank.shared_up_bias_grad, &rank.shared_down_bias_grad};
      };
      const auto pass = [&](ts::write mode) {
        rank.forward(ts::pass::recompute);
        rank.backward_input();
        rank.backward_weights(mode);
      };
      pass(ts::write::overwrite);
      std::vector<std::vector<float>> expected;
      for (std::vector<float>* gradient : all()) {
        CHECK(!gradient->empty());
        std::vector<float> sums = *gradient;
        for (std::size_t i = 0; i < sums.size(); ++i) {
          (*gradient)[i] = 0.37F * static_cast<float>(i % 11) - 1.3F;
          sums[i] = (*gradient)[i] + sums[i];
        }
        expected.push_back(sums);
      }
      pass(ts::write::accumulate);
      for (std::size_t g = 0; g < expected.size(); ++g) {
        CAPTURE(g);
        CHECK(*all()[g] == expected[g]);
      }
    });
  }
}

TEST_CASE("the bias moves once per optimizer step: N micro-batches of one part equal one of N parts") {
  const std::int64_t tokens = 48;
  const auto p = problem(tokens);
  const auto bias_after = [&](int ranks, int micro_batches) {
    std::vector<float> bias;
    std::mutex mutex;
    ts::comm::threads::run(ranks, [&](ts::comm::threads& comm) {
      const std::int64_t part = tokens / (ranks * micro_batches);
      std::optional<rank_of_layer> state_owner;
      for (int m = 0; m < micro_batches; ++m) {
        const std::int64_t first = (m * ranks + comm.rank()) * part;
        rank_of_layer rank(p, ts::layout::block(num_experts, ranks), comm, first, part, part, routing, roomy);
        if (m > 0) std::memcpy(rank.state.data(), state_owner->state.data(), rank.state.size());
        rank.forward(ts::pass::train);
        rank.forward(ts::pass::recompute);  // must not count
        state_owner.emplace(p, ts::layout::block(num_experts, ranks), comm, first, part, part, routing, roomy);
        std::memcpy(state_owner->state.data(), rank.state.data(), rank.state.size());
      }
      state_owner->layer->end_step({}, comm);
      CHECK(sum(load_of(*state_owner)) == 0);
      const std::lock_guard lock(mutex);
      const float* b = state_owner->layer->state().bias;
      if (bias.empty()) bias.assign(b, b + num_experts);
      CHECK(bias == std::vector<float>(b, b + num_experts));  // the same on all ranks
    });
    return bias;
  };
  const auto once = bias_after(1, 1);
  int moved = 0;
  for (int e = 0; e < num_experts; ++e) {
    const double change = once[std::size_t(e)] - p.bias[std::size_t(e)];
    CHECK((change == doctest::Approx(0.125) || change == doctest::Approx(-0.125) || change == 0));
    moved += change != 0;
  }
  CHECK(moved > 0);
  CHECK(bias_after(1, 4) == once);
  CHECK(bias_after(2, 1) == once);
  CHECK(bias_after(2, 2) == once);
  CHECK(bias_after(4, 3) == once);
}

TEST_CASE("end_step over a larger batch gives all expert-parallel groups the same bias") {
  const auto p = problem(48);
  std::vector<float> alone;
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
    rank_of_layer rank(p, ts::layout::block(num_experts, 2), comm, comm.rank() * 24, 24, 24, routing, roomy);
    rank.forward(ts::pass::train);
    rank.layer->end_step({}, comm);
    if (comm.rank() == 0) alone.assign(rank.layer->state().bias, rank.layer->state().bias + num_experts);
  });
  ts::comm::threads::run(4, [&](ts::comm::threads& world) {  // two groups of two, a quarter of the tokens each rank
    ts::comm::threads group = world.split(world.rank() / 2, world.rank());
    rank_of_layer rank(p, ts::layout::block(num_experts, 2), group, world.rank() * 12, 12, 12, routing, roomy);
    rank.forward(ts::pass::train);
    rank.layer->end_step({}, world);
    CHECK(std::vector<float>(rank.layer->state().bias, rank.layer->state().bias + num_experts) == alone);
    CHECK(sum({rank.layer->state().global_load, rank.layer->state().global_load + num_experts}) == 48 * 3);
  });
}

TEST_CASE("loss scale and coefficients are read from the state") {
  auto p = problem();
  std::fill(p.dy.begin(), p.dy.end(), 0.0);  // only the balance loss is left
  on_two_ranks(p, [](rank_of_layer& rank) {
    const auto gradient = [&](float scale, float coefficient) {
      *rank.layer->state().loss_scale = scale;
      rank.layer->state().coefficients[0] = coefficient;
      rank.forward(ts::pass::recompute);
      rank.backward_input();
      return rank.dx;
    };
    const auto base = gradient(1, 0.1F);
    const auto scaled = gradient(4, 0.1F);
    const auto raised = gradient(1, 0.4F);
    const auto none = gradient(0, 0.1F);
    float largest = 0;
    for (std::size_t i = 0; i < base.size(); ++i) {
      CHECK(scaled[i] == doctest::Approx(4 * base[i]).epsilon(1e-5));
      CHECK(raised[i] == doctest::Approx(4 * base[i]).epsilon(1e-5));
      CHECK(none[i] == 0);
      largest = std::max(largest, std::abs(base[i]));
    }
    CHECK(largest > 1e-7);
  });
}

TEST_CASE("ranks without tokens take part in every collective") {
  const auto p = problem(24);
  ts::comm::threads::run(3, [&](ts::comm::threads& comm) {
    const std::int64_t count = comm.rank() == 1 ? 24 : 0;
    rank_of_layer rank(p, ts::layout::block(num_experts, 3), comm, 0, count, 24, routing, roomy);
    rank.forward(ts::pass::train);
    rank.backward_input();
    rank.backward_weights();
    rank.layer->end_step({}, comm);
    if (comm.rank() == 0)
      for (const float g : rank.gate_grad) CHECK(g == 0);
    CHECK(sum({rank.layer->state().global_load, rank.layer->state().global_load + num_experts}) == 72);
  });
}

TEST_CASE("gradients with a capacity factor are those of the pairs that were kept, and drops are counted") {
  const auto p = make_problem({.num_experts = 4, .top_k = 2, .hidden = 5, .intermediate = 3}, 16, true, 13);
  const layer_fp64::options capped{.dispatch = {.capacity_factor = 0.8, .order = ts::drop_order::position}};
  check_gradients<layer_fp64>(p, ts::layout::block(4, 2), {0, 8, 16}, {}, capped, 12);
  ts::comm::threads::run(2, [&](ts::comm::threads& comm) {
    layer_rank<layer_fp64> rank(p, ts::layout::block(4, 2), comm, comm.rank() * 8, 8, 8, {}, capped);
    rank.forward(ts::pass::train);
    const auto& state = rank.layer->state();
    std::int64_t expected = 0;  // capacity ceil(8 * 2 * 0.8 / 4) = 4 pairs
    for (int e = 0; e < 4; ++e) expected += std::max<std::int64_t>(0, state.load[e] - 4);
    CHECK(expected > 0);
    CHECK(*state.dropped_by_capacity == expected);
    CHECK(*state.dropped_by_bound == 0);
    rank.forward(ts::pass::recompute);
    CHECK(*state.dropped_by_capacity == expected);
  });
}

TEST_CASE("the layer equals a dense loop over its experts in double") {
  const auto p = problem(20);
  const auto placement = ts::layout::block(num_experts, 1);
  auto q = p;
  std::fill(q.bias.begin(), q.bias.end(), 0.0);
  const auto got = run_problem<layer_fp64>(q, placement, {0, 20}, {}, {});
  const std::int64_t d = 10, n = 6;
  const auto expert = [&](const double* x, const double* up, const double* down, std::int64_t width, double weight,
                          double* y) {
    for (std::int64_t i = 0; i < width; ++i) {
      double gate = 0, value = 0;
      for (std::int64_t j = 0; j < d; ++j) {
        gate += up[i * d + j] * x[j];
        value += up[(width + i) * d + j] * x[j];
      }
      const double a = gate / (1 + std::exp(-gate)) * value;
      for (std::int64_t j = 0; j < d; ++j) y[j] += weight * down[j * width + i] * a;
    }
  };
  for (std::int64_t t = 0; t < 20; ++t) {
    const double* x = q.x.data() + t * d;
    std::vector<std::pair<double, int>> scores;
    double total = 0;
    for (int e = 0; e < num_experts; ++e) {
      double logit = q.gate_bias[std::size_t(e)];
      for (std::int64_t j = 0; j < d; ++j) logit += q.gate[std::size_t(e * d + j)] * x[j];
      scores.emplace_back(-std::exp(logit), e);
    }
    std::sort(scores.begin(), scores.end());
    for (int k = 0; k < 3; ++k) total -= scores[std::size_t(k)].first;
    std::vector<double> y(static_cast<std::size_t>(d));
    for (int k = 0; k < 3; ++k) {
      const int e = scores[std::size_t(k)].second;
      expert(x, q.up.data() + e * 2 * n * d, q.down.data() + e * d * n, n, -scores[std::size_t(k)].first / total,
             y.data());
    }
    expert(x, q.shared_up.data(), q.shared_down.data(), 2 * n, 1.0, y.data());
    for (std::int64_t j = 0; j < d; ++j)
      CHECK(got.y[std::size_t(t * d + j)] == doctest::Approx(y[std::size_t(j)]).epsilon(1e-10));
  }
}

TEST_CASE("saved memory at one rank is 4TKn bytes in bf16 plus routing") {
  using bf16_layer = ts::moe_layer<balanced_router, ts::experts<ts::activation::swiglu, ts::precision::bf16>,
                                   ts::layout::block, ts::comm::self<ts::space::host>>;
  const std::int64_t tokens = 512, d = 256, n = 128, top_k = 3;
  const auto bytes = bf16_layer::sizes(
      {.num_experts = num_experts, .top_k = 3, .hidden = 256, .intermediate = 128, .max_tokens = tokens},
      ts::layout::block(num_experts, 1), 0);
  const auto activations = static_cast<std::size_t>(4 * tokens * top_k * n);
  const auto routing_bytes =
      static_cast<std::size_t>(tokens * num_experts * 4 + tokens * (6 * top_k + 4) * 4 + 16 * 1024);
  CHECK(bytes.saved_bytes >= activations);
  CHECK(bytes.saved_bytes <= activations + routing_bytes);
  CHECK(static_cast<std::int64_t>(bytes.eval_workspace_bytes) > 2 * tokens * top_k * (d + n));
}

TEST_CASE("sizes fixed in the type are checked and change nothing") {
  using fixed = ts::moe_layer<balanced_router, experts_fp32, ts::layout::block, ts::comm::threads, ts::combine::ordered,
                              ts::shape{.num_experts = 8, .hidden = 10}>;
  const auto p = problem();
  const auto a = run_problem<layer>(p, ts::layout::block(num_experts, 2), {0, 12, 24}, routing, roomy);
  const auto b = run_problem<fixed>(p, ts::layout::block(num_experts, 2), {0, 12, 24}, routing, roomy);
  CHECK(a.y == b.y);
  CHECK_THROWS_WITH_AS(fixed::sizes({.num_experts = 8, .top_k = 3, .hidden = 12, .intermediate = 6, .max_tokens = 4},
                                    ts::layout::block(8, 1), 0),
                       "the layer's type fixes hidden = 10, it was made with 12", ts::invalid_argument);
}

TEST_CASE("a type without shared experts is the same layer, and refuses them") {
  using none = ts::moe_layer<balanced_router, experts_fp32, ts::layout::block, ts::comm::threads, ts::combine::ordered,
                             ts::shape{.num_shared_experts = ts::shape::none}>;
  auto sizes = problem().sizes;
  sizes.max_tokens = 24;
  const ts::layout::block placement(num_experts, 1);
  const auto refused = [&] { none::sizes(sizes, placement, 0); };
  sizes.num_shared_experts = 1;
  CHECK_THROWS_WITH_AS(refused(), "the layer's type has no shared experts, it was made with num_shared_experts = 1",
                       ts::invalid_argument);
  sizes.num_shared_experts = 0;
  CHECK(none::sizes(sizes, placement, 0).workspace_bytes == layer::sizes(sizes, placement, 0).workspace_bytes);
  CHECK(none::sizes(sizes, placement, 0).saved_bytes == layer::sizes(sizes, placement, 0).saved_bytes);
}

TEST_CASE("a pass writes the losses of its own chunks; rows behind them are those of earlier passes") {
  auto p = problem();
  p.chunk_tokens = 5;
  ts::comm::threads::run(1, [&](ts::comm::threads& comm) {
    rank_of_layer rank(p, ts::layout::block(num_experts, 1), comm, 0, 24, 24, routing, roomy);
    REQUIRE(rank.layer->state().max_chunks == 5);
    rank.forward(ts::pass::train);
    const std::span losses(rank.layer->state().losses, 5);
    const std::vector<float> before(losses.begin(), losses.end());
    rank.count = 8;
    rank.sequences = {0, 8};
    rank.forward(ts::pass::train);
    CHECK(ts::num_chunks(rank.count, p.chunk_tokens) == 2);
    for (std::size_t c = 0; c < 5; ++c) CHECK((losses[c] == before[c]) == (c >= 2));
  });
}

TEST_CASE("the state's arrays have names, types and extents") {
  const auto p = problem();
  on_two_ranks(p, [](rank_of_layer& rank) {
    std::vector<std::string> lines;
    for (const auto& a : rank.layer->state().arrays())
      lines.push_back(std::string(a.name) + " " + std::string(a.dtype) + " " + std::to_string(a.rows) + "x" +
                      std::to_string(a.cols));
    CHECK(lines == std::vector<std::string>{"bias F32 8x1", "load I64 8x1", "global_load I64 8x1", "bias_rate F32 1x1",
                                            "coefficients F32 1x1", "loss_scale F32 1x1", "losses F32 1x1",
                                            "dropped_by_capacity I64 1x1", "dropped_by_bound I64 1x1",
                                            "most_received_pairs I64 1x1"});
    CHECK(*rank.layer->state().bias_rate == 0.125F);
    CHECK(rank.layer->state().coefficients[0] == 0.1F);
  });
}
