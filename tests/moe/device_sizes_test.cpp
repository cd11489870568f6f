// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// What a layer on one GPU asks of its engine beside weights and gradients, at the shapes of the benchmark. Sizes are
// pure functions of bounds: no GPU is needed to know them.

#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <tessera/comm/nccl.hpp>
#include <tessera/comm/self.hpp>
#include <tessera/comm/symmetric.hpp>
#include <tessera/layout/block.hpp>
#include <tessera/layout/table.hpp>
#include <tessera/moe/moe_layer.hpp>

namespace {

namespace ts = tessera;

struct layer_shape {
  const char* name;
  std::int64_t T, d, n;
  int E, K;
};

constexpr layer_shape shapes[] = {
    {"7B, n 256", 24576, 1536, 256, 128, 8},
    {"30B, n 256", 32768, 4096, 256, 256, 16},
    {"30B, n 512", 32768, 4096, 512, 128, 8},
    {"30B, n 1024", 32768, 4096, 1024, 64, 4},
    {"120B, n 1024", 32768, 4096, 1024, 128, 8},
    {"Qwen3 30B, 8192 tokens", 8192, 2048, 768, 128, 8},
    {"Qwen3 30B, 32768 tokens", 32768, 2048, 768, 128, 8},
    {"Mixtral", 8192, 4096, 14336, 8, 2},
};

using router = ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized>;
template <class Precision>
using layer_of = ts::moe_layer<router, ts::experts<ts::activation::swiglu, Precision>, ts::layout::block,
                               ts::comm::self<ts::space::device>>;

template <class Precision>
ts::layer_sizes sizes_of(const layer_shape& s) {
  return layer_of<Precision>::sizes({.num_experts = s.E,
                                     .top_k = s.K,
                                     .hidden = static_cast<int>(s.d),
                                     .intermediate = static_cast<int>(s.n),
                                     .max_tokens = s.T},
                                    ts::layout::block(s.E, 1), 0);
}

}  // namespace

TEST_CASE("between its passes a device layer keeps x, H and the routing") {
  for (const layer_shape& s : shapes) {
    CAPTURE(s.name);
    const auto sizes = sizes_of<ts::precision::bf16>(s);
    const auto saved = static_cast<std::int64_t>(sizes.saved_bytes);
    // The 2Td of the contract are x, which stays where the engine has it.
    const std::int64_t hidden_units = 4 * s.T * s.K * s.n;
    // Logits; of each pair id, weight, expert row, token and weight again; of each expert its load and offset; and what
    // alignment takes.
    const std::int64_t routing = 4 * s.T * (s.E + 5 * s.K) + 16 * s.E + 8192;
    CHECK(saved >= hidden_units + 4 * s.T * (s.E + 2 * s.K));
    CHECK(saved <= hidden_units + routing);
    CHECK(sizes_of<ts::precision::bf16_gradients>(s).saved_bytes == sizes.saved_bytes);
  }
}

TEST_CASE("the workspace of a device layer holds one array of pairs for each of d and n") {
  for (const layer_shape& s : shapes) {
    CAPTURE(s.name);
    // Forward: outputs of experts and activations. Backward: gradients of pairs and activations, dH stands over H. The
    // bound of both is 2TK(d + n), and 5 % for what has no row for each pair: parts of the gate, gradients of tokens,
    // the router's counts. One more array of [T, d] does not fit into that at any of the shapes.
    const std::int64_t bound = 2 * s.T * s.K * (s.d + s.n);
    const auto sizes = sizes_of<ts::precision::bf16>(s);
    const auto workspace = static_cast<std::int64_t>(sizes.workspace_bytes);
    CHECK(workspace >= 2 * s.T * s.K * s.d);
    CHECK(workspace <= bound + bound / 20);
    CHECK(sizes_of<ts::precision::bf16_gradients>(s).workspace_bytes == sizes.workspace_bytes);
  }
}

TEST_CASE("a layer that sends x again keeps no rows of other ranks") {
  using layer = ts::moe_layer<router, ts::experts<ts::activation::swiglu, ts::precision::bf16>, ts::layout::block,
                              ts::comm::symmetric>;
  constexpr std::int64_t ranks = 4;
  const ts::shape sizes{.num_experts = 256, .top_k = 8, .hidden = 7168, .intermediate = 2048, .max_tokens = 4096};
  const ts::layout::block placement(256, ranks);
  layer::options again;
  again.rows = ts::saved_rows::resend;
  const auto kept = layer::sizes(sizes, placement, 0);
  const auto resent = layer::sizes(sizes, placement, 0, again);
  constexpr std::size_t rows = 2 * ranks * 4096 * 7168;
  CHECK(kept.saved_bytes == resent.saved_bytes + rows);
  CHECK(resent.deferred_bytes == kept.deferred_bytes + rows);
  CHECK(resent.workspace_bytes <= kept.workspace_bytes + rows);
  // The contract of what is kept: H of all pairs that the bound admits, and the routing.
  constexpr std::size_t pairs = 2 * 4096 * 8;
  CHECK(resent.saved_bytes >= pairs * 4096 * 2);
  CHECK(resent.saved_bytes <= pairs * 4096 * 2 * 102 / 100);
  CHECK(layer_of<ts::precision::bf16>::sizes(sizes, ts::layout::block(256, 1), 0).saved_bytes ==
        layer_of<ts::precision::bf16>::sizes(sizes, ts::layout::block(256, 1), 0, {.rows = ts::saved_rows::resend})
            .saved_bytes);
}

TEST_CASE("between GPUs a capacity costs its lists, and combine::ordered by NCCL room for pairs on their way home") {
  const ts::shape sizes{.num_experts = 64, .top_k = 8, .hidden = 1024, .intermediate = 256, .max_tokens = 4096};
  const ts::layout::block placement(64, 4);
  constexpr std::size_t pairs = 4096 * 8;
  using experts = ts::experts<ts::activation::swiglu, ts::precision::bf16>;
  using direct = ts::moe_layer<router, experts, ts::layout::block, ts::comm::symmetric>;
  const auto eval = [&](double factor, ts::drop_order order) {
    direct::options options;
    options.dispatch.capacity_factor = factor;
    options.dispatch.order = order;
    return direct::sizes(sizes, placement, 0, options).eval_workspace_bytes;
  };
  const std::size_t dropless = eval(0, ts::drop_order::weight);
  CHECK(eval(0, ts::drop_order::position) == dropless);
  CHECK(eval(1.25, ts::drop_order::position) == dropless + 4 * pairs + 512);
  CHECK(eval(1.25, ts::drop_order::weight) == dropless + 12 * pairs + 512);

  using reduced = ts::moe_layer<router, experts, ts::layout::block, ts::comm::nccl>;
  using ordered = ts::moe_layer<router, experts, ts::layout::block, ts::comm::nccl, ts::combine::ordered>;
  const auto at_owner = reduced::sizes(sizes, placement, 0);
  const auto at_home = ordered::sizes(sizes, placement, 0);
  // kept until backward: an expert row for each pair that the bound admits, a place for each of this rank's own
  CHECK(at_home.saved_bytes >= at_owner.saved_bytes + 3 * pairs * 4);
  CHECK(at_home.saved_bytes <= at_owner.saved_bytes + 3 * pairs * 4 + 512);
  CHECK(at_home.deferred_bytes == at_owner.deferred_bytes);
  // at home K rows of a token for the three that were sent, on the way 2 K for three sums; owners of own pairs
  const std::size_t row = 1024 * 2;
  CHECK(at_home.eval_workspace_bytes >= at_owner.eval_workspace_bytes + 4096 * (8 - 3 + 16 - 3) * row + 4 * pairs * 4);
  CHECK(at_home.eval_workspace_bytes <=
        at_owner.eval_workspace_bytes + 4096 * (8 - 3 + 16 - 3) * row + 4 * pairs * 4 + 512);
}

TEST_CASE_TEMPLATE(
    "what ranks write into each other's memory stands at the same place on all ranks, however uneven their experts",
    Combine, ts::combine::reduced, ts::combine::ordered) {
  using layer = ts::moe_layer<router, ts::experts<ts::activation::swiglu, ts::precision::bf16>, ts::layout::table,
                              ts::comm::symmetric, Combine>;
  using namespace ts::detail;
  const ts::shape sizes{
      .num_experts = 260, .top_k = 3, .hidden = 128, .intermediate = 64, .max_tokens = 100, .num_shared_experts = 1};
  constexpr int ranks = 3;
  std::vector<std::vector<std::int32_t>> experts(ranks);  // 200, 60 and none
  for (int e = 0; e < sizes.num_experts; ++e) experts[e < 200 ? 0 : 1].push_back(e);
  const ts::layout::table_storage storage(sizes.num_experts, experts);
  const ts::layout::table placement = storage.view();
  // Carving looks at no memory, so an address that nobody has will do.
  constexpr std::size_t base = std::size_t{1} << 40;
  constexpr bool ordered = std::is_same_v<Combine, ts::combine::ordered>;
  typename layer::options again;
  again.rows = ts::saved_rows::resend;
  for (const typename layer::options& options : {typename layer::options{}, again}) {
    std::vector<std::array<std::size_t, 14>> places;
    for (int rank = 0; rank < ranks; ++rank) {
      const layer_plan<layer> plan(sizes, placement, rank, options);
      const auto bytes = layer::sizes(sizes, placement, rank, options);
      const auto carve = [&](std::size_t size) {
        return ts::memory_builder(ts::workspace_memory(reinterpret_cast<void*>(base), size), "memory");
      };
      auto saved_memory = carve(bytes.saved_bytes);
      auto deferred_memory = carve(bytes.deferred_bytes);
      auto forward_memory = carve(bytes.workspace_bytes);
      auto backward_memory = carve(bytes.workspace_bytes);
      auto eval_memory = carve(bytes.eval_workspace_bytes);
      const layer_saved<layer> saved(saved_memory, plan);
      const layer_deferred<layer> deferred(deferred_memory, plan);
      const layer_forward_window<layer> forward(forward_memory, plan);
      const layer_backward_scratch<layer> backward(backward_memory, plan);
      const layer_forward_window<layer> eval(eval_memory, plan);
      const layer_saved<layer> eval_saved(eval_memory, plan);
      const auto place = [](const void* p) { return reinterpret_cast<std::size_t>(p); };
      places.push_back({place(rows_of(plan, saved, forward)), place(rows_of(plan, saved, deferred)),
                        place(deferred.dy_received), place(forward.tables.slots), place(forward.tables.counts),
                        place(forward.returned.rows), place(backward.returned.rows), place(backward.dweights),
                        place(rows_of(plan, eval_saved, eval)), place(eval.tables.slots), place(eval.returned.rows),
                        place(forward.returned.places), place(backward.returned.places), place(eval.returned.places)});
      for (std::size_t i = 0; i < places.back().size(); ++i) {  // all of them are there
        if (i < 11 || ordered) CHECK(places.back()[i] >= base);
        if (i >= 11 && !ordered) CHECK(places.back()[i] == 0);
      }
      if (ordered) {  // a row for each pair of this rank's tokens
        CHECK(place(forward.returned.places) - place(forward.returned.rows) >=
              static_cast<std::size_t>(sizes.max_tokens * sizes.top_k * sizes.hidden) * sizeof(ts::bfloat16));
      }
      const auto first = layer::sizes(sizes, placement, 0, options);
      CHECK(bytes.saved_bytes == first.saved_bytes);
      CHECK(bytes.deferred_bytes == first.deferred_bytes);
      CHECK(bytes.workspace_bytes == first.workspace_bytes);
      CHECK(bytes.eval_workspace_bytes == first.eval_workspace_bytes);
    }
    for (const auto& rank : places) CHECK(rank == places.front());
  }
}
