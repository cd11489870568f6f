// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The layer with its experts spread over GPUs, one thread a GPU, against the host half in double on the same bf16
// numbers, and against the layer on one GPU; two micro-batches at once; experts and tokens spread unevenly. With one
// GPU the communicator has one rank. Without a GPU or without NCCL it exits with 77, which CTest reports as skipped.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "nccl_fixture.cuh"

#if __has_include(<nccl.h>)

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <tessera/comm/symmetric.cuh>
#include <tessera/comm/threads.hpp>
#include <tessera/layout/table.hpp>
#include <tessera/moe/moe_layer.cuh>

#include "../support/layer_fixture.hpp"

namespace {

using namespace tessera_test;
using device_test::buffer;
using device_test::on_ranks;
using device_test::require;
using S = ts::bfloat16;

// Layers load their kernels by themselves, unless the environment says otherwise; and streams do not wait for each
// other by chance.
const int loading = setenv("CUDA_MODULE_LOADING", "LAZY", 0);
const int connections = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);

template <class Router, class WeightLayout, class Comm, class Combine = ts::combine::reduced,
          class Layout = ts::layout::block>
using layer_over = ts::moe_layer<Router, ts::experts<ts::activation::swiglu, ts::precision::bf16, WeightLayout>, Layout,
                                 Comm, Combine>;
template <class Router, class WeightLayout>
struct policies {
  using router = Router;
  using spread = layer_over<Router, WeightLayout, ts::comm::symmetric>;
  using ordered = layer_over<Router, WeightLayout, ts::comm::symmetric, ts::combine::ordered>;
  using uneven = layer_over<Router, WeightLayout, ts::comm::symmetric, ts::combine::ordered, ts::layout::table>;
  using alone = layer_over<Router, WeightLayout, ts::comm::self<ts::space::device>>;
  template <class Layout>
  using host_over = ts::moe_layer<Router, ts::experts<ts::activation::swiglu, ts::precision::fp64, WeightLayout>,
                                  Layout, ts::comm::threads, ts::combine::ordered>;
  using host_layer = host_over<ts::layout::block>;
  using uneven_host_layer = host_over<ts::layout::table>;
};
using deepseek_like = policies<ts::router<ts::score::sigmoid, ts::select::group_limited<>, ts::weigh::normalized,
                                          ts::balance::bias, ts::balance::sequence_loss, ts::balance::z_loss>,
                               ts::weight_layout::out_in_interleaved>;

std::vector<std::int64_t> split_of(std::int64_t tokens, int ranks) {
  std::vector<std::int64_t> offsets{0};
  for (int r = 0; r < ranks; ++r)
    offsets.push_back(r + 1 == ranks ? tokens : offsets.back() + tokens / (ranks + 1 + r));
  return offsets;
}

template <class T>
std::vector<T> part(const std::vector<T>& values, std::int64_t first, std::int64_t last) {
  return {values.begin() + first, values.begin() + last};
}

// What a run leaves behind, of all ranks together.
struct outcome {
  std::vector<S> y, dx;
  std::vector<float> gate, up, down, shared_up, losses;
  std::vector<std::int64_t> load;
  std::vector<float> bias;
  std::int64_t dropped = 0;
};

template <class Layer>
typename Layer::options full_bound() {
  typename Layer::options options;
  options.dispatch.row_bound = ts::dispatch_options::full_row_bound;
  return options;
}

// One rank's layer and its memory.
template <class Layer>
class rank_layer {
 public:
  using comm_type = typename Layer::communicator_type;
  using layout_type = typename Layer::layout_type;
  using state_buffer = std::shared_ptr<buffer<std::byte>>;
  rank_layer(comm_type& comm, const layer_problem& p, typename Layer::router_options routing, std::int64_t first,
             std::int64_t last, std::int64_t max_tokens)
      : rank_layer(comm, p, routing, first, last, max_tokens, layout_type(p.sizes.num_experts, comm.size()),
                   full_bound<Layer>()) {}
  // @param state Of a layer that this one shares it with; null: its own, reset.
  rank_layer(comm_type& comm, const layer_problem& p, typename Layer::router_options routing, std::int64_t first,
             std::int64_t last, std::int64_t max_tokens, const layout_type& placement,
             const typename Layer::options& options, state_buffer state = nullptr)
      : comm_(comm), sizes_(p.sizes), tokens_(last - first), state_(std::move(state)) {
    sizes_.max_tokens = max_tokens;
    const auto bytes = Layer::sizes(sizes_, placement, comm.rank(), options);
    const auto take = [&](std::size_t n) -> std::byte* {
      if constexpr (requires { comm.allocate(n); }) {
        return comm.allocate(n);
      } else {
        std::byte* data = nullptr;
        require(cudaMalloc(&data, n), "cudaMalloc");  // as long as the program
        return data;
      }
    };
    saved_ = {take(bytes.saved_bytes), bytes.saved_bytes};
    deferred_ = {take(bytes.deferred_bytes), bytes.deferred_bytes};
    const std::size_t scratch = std::max(bytes.workspace_bytes, bytes.eval_workspace_bytes);
    workspace_ = {take(scratch), scratch};
    for (const auto& [data, count] : {std::pair(saved_.data, saved_.bytes), std::pair(deferred_.data, deferred_.bytes),
                                      std::pair(workspace_.data, workspace_.bytes)})
      require(cudaMemset(data, 0xff, count), "cudaMemset");
    const bool own_state = state_ == nullptr;
    if (own_state) state_ = std::make_shared<buffer<std::byte>>(bytes.state_bytes);
    moe_.emplace(sizes_, routing, placement, comm, ts::state_memory(state_->data(), state_->size()), options);
    stream_ = device_test::make_stream();
    if (own_state) {
      moe_->reset_state(stream_);
      require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
      const auto bias = cast<float>(p.bias);
      require(cudaMemcpy(moe_->state().bias, bias.data(), bias.size() * sizeof(float), cudaMemcpyHostToDevice), "copy");
    }

    const std::int64_t d = sizes_.hidden;
    const auto of_experts = [&](const std::vector<double>& all) {
      return local_rows<S>(all, static_cast<std::int64_t>(all.size()) / sizes_.num_experts, placement, comm.rank());
    };
    x_.emplace(cast<S>(part(p.x, first * d, last * d)));
    dy_.emplace(cast<S>(part(p.dy, first * d, last * d)));
    y_.emplace(x_->size());
    dx_.emplace(x_->size());
    gate_.emplace(cast<float>(p.gate));
    up_.emplace(of_experts(p.up));
    down_.emplace(of_experts(p.down));
    shared_up_.emplace(cast<S>(p.shared_up));
    shared_down_.emplace(cast<S>(p.shared_down));
    gate_grad_.emplace(gate_->size());
    up_grad_.emplace(up_->size());
    down_grad_.emplace(down_->size());
    shared_up_grad_.emplace(shared_up_->size());
    shared_down_grad_.emplace(shared_down_->size());
    for (const std::int32_t o : p.sequence_offsets) {
      const auto at = std::clamp<std::int64_t>(o - first, 0, tokens_);
      if (sequences_.empty() || at > sequences_.back()) sequences_.push_back(static_cast<std::int32_t>(at));
    }
    if (sequences_.front() != 0) sequences_.insert(sequences_.begin(), 0);
    sequence_offsets_.emplace(sequences_);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  ~rank_layer() { cudaStreamDestroy(stream_); }

  void step(ts::pass mode) {
    const typename Layer::inputs in{.x = {x_->data(), tokens_, sizes_.hidden},
                                    .sequence_offsets = {sequence_offsets_->data(), sequence_offsets_->size()}};
    const typename Layer::weights weights{.gate = {gate_->data(), sizes_.num_experts, sizes_.hidden},
                                          .experts = {up_->data(), down_->data()},
                                          .shared = {shared_up_->data(), shared_down_->data()}};
    const ts::matrix_view<const S> dy{dy_->data(), tokens_, sizes_.hidden};
    moe_->forward(stream_, mode, in, weights, {y_->data(), tokens_, sizes_.hidden}, saved_, workspace_);
    if (mode == ts::pass::eval) return;
    moe_->backward_input(stream_, in, dy, weights, saved_, {dx_->data(), tokens_, sizes_.hidden}, deferred_,
                         workspace_);
    moe_->backward_weights(stream_, in, dy, saved_, deferred_,
                           {.gate = gate_grad_->data(),
                            .experts = {up_grad_->data(), down_grad_->data()},
                            .shared = {shared_up_grad_->data(), shared_down_grad_->data()}},
                           ts::write::overwrite);
  }
  // Bytes that are no result, wherever a step writes one. Nothing may be under way.
  void poison() {
    for (auto* rows : {&y_, &dx_}) (*rows)->fill(0xff);
    for (auto* sums : {&gate_grad_, &up_grad_, &down_grad_, &shared_up_grad_, &shared_down_grad_}) (*sums)->fill(0xff);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  std::vector<S> tokens() const { return x_->get(); }
  void set_tokens(const std::vector<S>& x) { x_->set(x); }
  void end_step() { moe_->end_step(stream_, comm_); }
  void sync() {
    if constexpr (requires { comm_.wait(stream_); }) {
      comm_.wait(stream_);
    } else {
      require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    }
    ts::device_status status;
    require(cudaMemcpy(&status, moe_->state().status, sizeof(status), cudaMemcpyDeviceToHost), "copy");
    ts::expect_ok(status);
  }
  cudaStream_t stream() const { return stream_; }
  const state_buffer& state() const { return state_; }

  outcome results() const {
    outcome o;
    o.y = y_->get();
    o.dx = dx_->get();
    o.gate = gate_grad_->get();
    o.up = up_grad_->get();
    o.down = down_grad_->get();
    o.shared_up = shared_up_grad_->get();
    o.load.resize(static_cast<std::size_t>(sizes_.num_experts));
    o.bias.resize(o.load.size());
    o.losses.resize(Layer::num_losses);
    const auto& state = moe_->state();
    const auto get = [](auto& to, const auto* from) {
      require(cudaMemcpy(to.data(), from, to.size() * sizeof(to[0]), cudaMemcpyDeviceToHost), "copy");
    };
    get(o.load, state.global_load);
    get(o.bias, state.bias);
    get(o.losses, state.losses);
    require(cudaMemcpy(&o.dropped, state.dropped_by_bound, sizeof(o.dropped), cudaMemcpyDeviceToHost), "copy");
    return o;
  }

 private:
  comm_type& comm_;
  ts::shape sizes_;
  std::int64_t tokens_;
  cudaStream_t stream_ = nullptr;
  ts::saved_memory saved_;
  ts::deferred_memory deferred_;
  ts::workspace_memory workspace_;
  state_buffer state_;
  std::optional<Layer> moe_;
  std::optional<buffer<S>> x_, dy_, y_, dx_, up_, down_, shared_up_, shared_down_;
  std::optional<buffer<float>> gate_, gate_grad_, up_grad_, down_grad_, shared_up_grad_, shared_down_grad_;
  std::vector<std::int32_t> sequences_;
  std::optional<buffer<std::int32_t>> sequence_offsets_;
};

outcome join(const std::vector<outcome>& ranks) {
  outcome all = ranks[0];
  for (std::size_t r = 1; r < ranks.size(); ++r) {
    const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
    const auto add = [](auto& to, const auto& from) {
      for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
    };
    append(all.y, ranks[r].y);
    append(all.dx, ranks[r].dx);
    append(all.up, ranks[r].up);
    append(all.down, ranks[r].down);
    add(all.gate, ranks[r].gate);
    add(all.shared_up, ranks[r].shared_up);
    add(all.losses, ranks[r].losses);
    all.dropped += ranks[r].dropped;
    CHECK(all.load == ranks[r].load);
    CHECK(all.bias == ranks[r].bias);
  }
  return all;
}

int num_ranks() { return (std::min)(device_test::num_gpus(), 4); }

ts::comm::symmetric_options window(std::size_t mib) {
  ts::comm::symmetric_options options;
  options.window_bytes = mib << 20;
  options.timeout = std::chrono::milliseconds(20000);
  return options;
}

layer_problem make_ranks_problem() {
  auto p = make_problem({.num_experts = 32, .top_k = 6, .hidden = 192, .intermediate = 64, .num_shared_experts = 1},
                        500, true, 17, true);
  const auto offsets = split_of(500, num_ranks());
  p.sequence_offsets = {0};
  for (std::size_t r = 1; r < offsets.size(); ++r) p.sequence_offsets.push_back(static_cast<std::int32_t>(offsets[r]));
  return p;
}

deepseek_like::router::options router_options() {
  deepseek_like::router::options routing;
  routing.weigh.scale = 1.5f;
  routing.select = {.groups = 4, .kept_groups = 2};
  return routing;
}

template <class T>
std::vector<double> widened(const std::vector<T>& values) {
  std::vector<double> out;
  for (const T& v : values) out.push_back(widen(v));
  return out;
}

bool same_bits(const std::vector<S>& a, const std::vector<S>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0;
}

}  // namespace

TEST_CASE("the layer spread over GPUs follows the host in double, and has the weight gradients of one GPU bit by bit") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  std::vector<outcome> parts(static_cast<std::size_t>(ranks));
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto comm = ts::comm::symmetric::create(t, window(64));
    const auto r = static_cast<std::size_t>(t.rank());
    rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    layer.step(ts::pass::train);
    layer.sync();
    parts[r] = layer.results();
    // again, and without saving; then the step's end, which moves the bias
    layer.poison();
    layer.step(ts::pass::recompute);
    layer.sync();
    const outcome again = layer.results();
    CHECK(same_bits(again.y, parts[r].y));
    CHECK(same_bits(again.dx, parts[r].dx));
    CHECK(again.up == parts[r].up);
    CHECK(again.gate == parts[r].gate);
    layer.poison();
    layer.step(ts::pass::eval);
    layer.sync();
    CHECK(same_bits(layer.results().y, parts[r].y));
    layer.end_step();
    layer.sync();
    parts[r].load = layer.results().load;
    parts[r].bias = layer.results().bias;
    t.barrier({});
  }));
  const outcome got = join(parts);
  const auto expected = run_problem<deepseek_like::host_layer>(p, ts::layout::block(p.sizes.num_experts, 1),
                                                               {0, p.num_tokens}, router_options(), {});
  const auto compare = [](const char* name, const std::vector<double>& a, const std::vector<double>& b, double bound) {
    const std::string which = name;
    CAPTURE(which);
    CHECK(device_test::relative_error(a, b) <= bound);
  };
  compare("y", widened(got.y), expected.y, 1e-2);
  compare("dx", widened(got.dx), expected.dx, 1e-2);
  compare("gate", widened(got.gate), expected.gate, 2e-2);
  compare("up", widened(got.up), expected.up, 1e-2);
  compare("down", widened(got.down), expected.down, 1e-2);
  compare("shared_up", widened(got.shared_up), expected.shared_up, 1e-2);
  compare("losses", widened(got.losses), expected.losses, 1e-4);
  CHECK(got.load == expected.load);
  CHECK(widened(got.bias) == expected.bias);

  require(cudaSetDevice(0), "cudaSetDevice");
  ts::comm::self<ts::space::device> self;
  rank_layer<deepseek_like::alone> one(self, p, router_options(), 0, p.num_tokens, p.num_tokens);
  one.step(ts::pass::train);
  one.sync();
  const outcome alone = one.results();
  CHECK(got.up == alone.up);
  CHECK(got.down == alone.down);
}

TEST_CASE("rows that are sent again in backward give the bits of rows that were kept, in a graph too") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto comm = ts::comm::symmetric::create(t, window(64));
    const auto r = static_cast<std::size_t>(t.rank());
    const auto check_same = [](const outcome& a, const outcome& b) {
      CHECK(same_bits(a.y, b.y));
      CHECK(same_bits(a.dx, b.dx));
      CHECK(a.gate == b.gate);
      CHECK(a.up == b.up);
      CHECK(a.down == b.down);
      CHECK(a.shared_up == b.shared_up);
    };
    rank_layer<deepseek_like::spread> kept(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    auto resends = full_bound<deepseek_like::spread>();
    resends.rows = ts::saved_rows::resend;
    rank_layer<deepseek_like::spread> again(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks,
                                            ts::layout::block(p.sizes.num_experts, ranks), resends);
    t.barrier({});
    kept.step(ts::pass::train);
    kept.sync();
    const outcome expected = kept.results();
    t.barrier({});
    again.step(ts::pass::train);
    again.sync();
    check_same(again.results(), expected);
    t.barrier({});
    cudaGraphExec_t graph = device_test::capture(again.stream(), [&] { again.step(ts::pass::recompute); });
    again.poison();
    t.barrier({});
    for (int i = 0; i < 20; ++i) require(cudaGraphLaunch(graph, again.stream()), "cudaGraphLaunch");
    again.sync();
    check_same(again.results(), expected);
    t.barrier({});
    require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
  }));
}

TEST_CASE("a token that is not a number is reported by its rank") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto comm = ts::comm::symmetric::create(t, window(64));
    const auto r = static_cast<std::size_t>(t.rank());
    rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    if (t.rank() == ranks - 1) {
      auto tokens = layer.tokens();
      tokens[static_cast<std::size_t>(3 * p.sizes.hidden + 5)] = S(std::nanf(""));
      layer.set_tokens(tokens);
    }
    layer.step(ts::pass::train);
    if (t.rank() == ranks - 1) {
      CHECK_THROWS_AS(layer.sync(), ts::invalid_argument);
    } else {
      layer.sync();
    }
    t.barrier({});
  }));
}

TEST_CASE("a graph of a whole step is replayed, with the same tokens and with others") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto comm = ts::comm::symmetric::create(t, window(64));
    const auto r = static_cast<std::size_t>(t.rank());
    rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    layer.step(ts::pass::recompute);
    layer.sync();
    const outcome plain = layer.results();
    cudaGraphExec_t graph = device_test::capture(layer.stream(), [&] { layer.step(ts::pass::recompute); });
    const auto replay = [&](int times) {
      layer.poison();
      for (int i = 0; i < times; ++i) require(cudaGraphLaunch(graph, layer.stream()), "cudaGraphLaunch");
      layer.sync();
      return layer.results();
    };
    const auto compare = [](const outcome& a, const outcome& b) {
      CHECK(same_bits(a.y, b.y));
      CHECK(same_bits(a.dx, b.dx));
      CHECK(a.gate == b.gate);
      CHECK(a.up == b.up);
      CHECK(a.down == b.down);
    };
    compare(replay(5), plain);
    // other tokens, and so another routing
    auto tokens = layer.tokens();
    std::reverse(tokens.begin(), tokens.end());
    layer.set_tokens(tokens);
    const outcome other = replay(2);
    CHECK(!same_bits(other.y, plain.y));
    layer.poison();
    layer.step(ts::pass::recompute);
    layer.sync();
    compare(other, layer.results());
    require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
    t.barrier({});
  }));
}

TEST_CASE("with combine::ordered every number of GPUs computes the bits of one") {
  auto p = make_ranks_problem();
  const std::vector<std::int64_t> quarters{0, 97, 180, 313, p.num_tokens};
  p.sequence_offsets.assign(quarters.begin(), quarters.end());  // a sequence stays whole on one rank
  require(cudaSetDevice(0), "cudaSetDevice");
  ts::comm::self<ts::space::device> self;
  rank_layer<deepseek_like::alone> one(self, p, router_options(), 0, p.num_tokens, p.num_tokens);
  one.step(ts::pass::train);
  one.sync();
  const outcome alone = one.results();
  for (const int ranks : {1, 2, 4}) {
    if (ranks > num_ranks()) continue;
    CAPTURE(ranks);
    std::vector<outcome> parts(static_cast<std::size_t>(ranks));
    CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
      auto comm = ts::comm::symmetric::create(t, window(64));
      const auto r = static_cast<std::size_t>(t.rank());
      const auto width = static_cast<std::size_t>(4 / ranks);
      rank_layer<deepseek_like::ordered> layer(comm, p, router_options(), quarters[r * width],
                                               quarters[(r + 1) * width], ranks == 1 ? p.num_tokens : 330);
      layer.step(ts::pass::train);
      layer.sync();
      layer.poison();
      layer.step(ts::pass::recompute);  // memory that has been used
      layer.sync();
      parts[r] = layer.results();
      layer.poison();
      layer.step(ts::pass::eval);
      layer.sync();
      CHECK(same_bits(layer.results().y, parts[r].y));
      t.barrier({});
    }));
    const outcome got = join(parts);
    CHECK(same_bits(got.y, alone.y));
    CHECK(same_bits(got.dx, alone.dx));
    CHECK(got.up == alone.up);
    CHECK(got.down == alone.down);
  }
}

TEST_CASE("ranks without tokens, ranks with few experts or none, and pairs beyond the bound, follow the host") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const int experts = p.sizes.num_experts;
  const std::int64_t tokens = p.num_tokens;
  const std::vector<std::int64_t> offsets = ranks == 1   ? std::vector<std::int64_t>{0, tokens}
                                            : ranks == 2 ? std::vector<std::int64_t>{0, 0, tokens}
                                            : ranks == 3 ? std::vector<std::int64_t>{0, 211, 211, tokens}
                                                         : std::vector<std::int64_t>{0, 101, 101, 290, tokens};
  layer_problem q = p;
  q.sequence_offsets.clear();
  for (const std::int64_t o : offsets) {
    if (q.sequence_offsets.empty() || o > q.sequence_offsets.back())
      q.sequence_offsets.push_back(static_cast<std::int32_t>(o));
  }
  // expert e stands on the rank of e's place in this order: most on one rank, none on the last of four
  std::vector<std::vector<std::int32_t>> placed(static_cast<std::size_t>(ranks));
  for (int e = 0; e < experts; ++e) {
    const int rank = e % 8 < 5 ? 0 : (e % 8 < 7 ? 1 : 2);
    placed[static_cast<std::size_t>(std::min(rank, ranks - 1))].push_back(experts - 1 - e);
  }
  const ts::layout::table_storage storage(experts, placed);
  std::int64_t most = 0;
  for (std::size_t r = 1; r < offsets.size(); ++r) most = std::max(most, offsets[r] - offsets[r - 1]);

  for (const bool drops : {false, true}) {
    CAPTURE(drops);
    ts::dispatch_options dispatch;
    dispatch.row_bound = drops ? tokens * q.sizes.top_k / 2 : ts::dispatch_options::full_row_bound;
    dispatch.overflow = drops ? ts::overflow_policy::drop : ts::overflow_policy::error;
    if (drops && ranks == 1) continue;  // one rank keeps all of its pairs
    std::vector<outcome> parts(static_cast<std::size_t>(ranks));
    CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
      auto comm = ts::comm::symmetric::create(t, window(96));
      const auto r = static_cast<std::size_t>(t.rank());
      std::int32_t* both_read = nullptr;
      require(cudaMallocHost(&both_read, storage.packed().size_bytes()), "cudaMallocHost");  // as long as the program
      std::copy(storage.packed().begin(), storage.packed().end(), both_read);
      deepseek_like::uneven::options options;
      options.dispatch = dispatch;
      rank_layer<deepseek_like::uneven> layer(comm, q, router_options(), offsets[r], offsets[r + 1], most,
                                              storage.view_at(both_read), options);
      layer.step(ts::pass::train);
      layer.sync();
      layer.end_step();
      layer.sync();
      parts[r] = layer.results();
      t.barrier({});
    }));
    deepseek_like::uneven_host_layer::options options;
    options.dispatch = dispatch;
    const auto expected =
        run_problem<deepseek_like::uneven_host_layer>(q, storage.view(), offsets, router_options(), options);
    outcome got = parts[0];
    std::vector<double> up(expected.up.size());
    std::vector<double> down(expected.down.size());
    got.y.clear();
    got.dx.clear();
    got.dropped = 0;
    for (int r = 0; r < ranks; ++r) {
      const outcome& part = parts[static_cast<std::size_t>(r)];
      got.y.insert(got.y.end(), part.y.begin(), part.y.end());
      got.dx.insert(got.dx.end(), part.dx.begin(), part.dx.end());
      got.dropped += part.dropped;
      put_rows(up, part.up, static_cast<std::int64_t>(up.size()) / experts, storage.view(), r);
      put_rows(down, part.down, static_cast<std::int64_t>(down.size()) / experts, storage.view(), r);
      CHECK(part.load == expected.load);
    }
    CHECK(device_test::relative_error(widened(got.y), expected.y) <= 1e-2);
    CHECK(device_test::relative_error(widened(got.dx), expected.dx) <= 1e-2);
    CHECK(device_test::relative_error(up, expected.up) <= 1e-2);
    CHECK(device_test::relative_error(down, expected.down) <= 1e-2);
    CHECK((got.dropped > 0) == drops);
  }
}

TEST_CASE("two micro-batches at once on two slots give what each gives alone, and count what both chose") {
  const int ranks = num_ranks();
  const int rounds = 200;
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  auto reversed = p;  // the other micro-batch
  std::reverse(reversed.x.begin(), reversed.x.end());
  std::reverse(reversed.dy.begin(), reversed.dy.end());
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto options = window(128);
    options.slots = 2;
    auto comm = ts::comm::symmetric::create(t, options);
    auto beside = comm.on_slot(1);
    const auto r = static_cast<std::size_t>(t.rank());
    const std::int64_t max_tokens = 300 + 200 / ranks;
    using layer_type = rank_layer<deepseek_like::spread>;
    const ts::layout::block placement(p.sizes.num_experts, ranks);
    const auto bound = full_bound<deepseek_like::spread>();
    layer_type first(comm, p, router_options(), offsets[r], offsets[r + 1], max_tokens, placement, bound);
    layer_type second(beside, reversed, router_options(), offsets[r], offsets[r + 1], max_tokens, placement, bound,
                      first.state());
    std::vector<outcome> alone;
    for (layer_type* layer : {&first, &second}) {
      layer->step(ts::pass::train);
      layer->sync();
      alone.push_back(layer->results());
    }
    first.end_step();
    first.sync();
    const auto load_of_both = first.results().load;
    const auto compare = [](const outcome& a, const outcome& b) {
      CHECK(same_bits(a.y, b.y));
      CHECK(same_bits(a.dx, b.dx));
      CHECK(a.up == b.up);
      CHECK(a.down == b.down);
    };
    // the bias has moved: what each gives alone from here on, without counting
    alone.clear();
    for (layer_type* layer : {&first, &second}) {
      layer->step(ts::pass::recompute);
      layer->sync();
      alone.push_back(layer->results());
    }
    for (int round = 0; round < rounds; ++round) {
      if (round % 50 == 0) {
        first.poison();
        second.poison();
        t.barrier({});
      }
      // each rank begins with another one now and then
      layer_type* order[] = {&first, &second};
      if ((round / 3 + t.rank()) % 2 != 0) std::swap(order[0], order[1]);
      for (layer_type* layer : order) layer->step(ts::pass::train);
      if (round % 50 != 49) continue;
      for (layer_type* layer : order) layer->sync();
      compare(first.results(), alone[0]);
      compare(second.results(), alone[1]);
    }
    first.end_step();
    first.sync();
    // the routing changed with the bias, its number of pairs did not; and every round counts the same
    std::int64_t pairs = 0;
    for (const std::int64_t load : first.results().load) {
      CHECK(load % rounds == 0);
      pairs += load;
    }
    std::int64_t pairs_of_both = 0;
    for (const std::int64_t load : load_of_both) pairs_of_both += load;
    CHECK(pairs == rounds * pairs_of_both);
    t.barrier({});
  }));
}

TEST_CASE("a rank that misses a step is named by the others, which count nothing of it; after reset steps are right") {
  const int ranks = num_ranks();
  if (ranks == 1) {
    MESSAGE("needs 2 GPUs");
    return;
  }
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  const int missing = ranks - 1;
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto options = window(64);
    options.timeout = std::chrono::milliseconds(500);
    auto comm = ts::comm::symmetric::create(t, options);
    const auto r = static_cast<std::size_t>(t.rank());
    rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks);
    t.barrier({});
    layer.step(ts::pass::train);
    layer.sync();
    const outcome plain = layer.results();
    t.barrier({});
    if (t.rank() != missing) {
      layer.step(ts::pass::train);
      int peer = -1;
      try {
        layer.sync();
      } catch (const ts::comm_error& e) {
        peer = e.peer();
      }
      CHECK(peer == missing);
    }
    t.barrier({});
    comm.reset(layer.stream());
    layer.poison();
    t.barrier({});
    layer.step(ts::pass::train);
    layer.sync();
    const outcome again = layer.results();
    CHECK(same_bits(again.y, plain.y));
    CHECK(same_bits(again.dx, plain.dx));
    CHECK(again.gate == plain.gate);
    CHECK(again.up == plain.up);
    CHECK(again.down == plain.down);
    layer.end_step();
    layer.sync();
    std::int64_t pairs = 0;
    for (const std::int64_t load : layer.results().load) pairs += load;
    CHECK(pairs == 2 * p.num_tokens * p.sizes.top_k);
    t.barrier({});
  }));
}

TEST_CASE("every transport gives the same bits, in a graph too, and needs its streams of copies") {
  const int ranks = num_ranks();
  const auto p = make_ranks_problem();
  const auto offsets = split_of(p.num_tokens, ranks);
  CHECK_NOTHROW(on_ranks(ranks, [&](ts::comm::threads& t) {
    auto options = window(256);
    options.copy_streams = std::max(ranks, 2);
    auto comm = ts::comm::symmetric::create(t, options);
    const auto r = static_cast<std::size_t>(t.rank());
    const ts::layout::block placement(p.sizes.num_experts, ranks);
    std::optional<outcome> expected;
    for (const ts::transport::automatic& how :
         {ts::transport::automatic(), ts::transport::automatic(ts::transport::all_gather{}),
          ts::transport::automatic(ts::transport::all_to_all{.copies_own_rows = true}),
          ts::transport::automatic(ts::transport::copy_engines{}),
          ts::transport::automatic(ts::transport::copy_engines{.streams = std::max(ranks - 1, 1), .chunks = 3})}) {
      auto chosen = full_bound<deepseek_like::spread>();
      chosen.transport = how;
      rank_layer<deepseek_like::spread> layer(comm, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks,
                                              placement, chosen);
      cudaGraphExec_t graph = device_test::capture(layer.stream(), [&] { layer.step(ts::pass::recompute); });
      for (const bool replayed : {false, true}) {
        layer.poison();
        t.barrier({});
        if (replayed) {
          require(cudaGraphLaunch(graph, layer.stream()), "cudaGraphLaunch");
        } else {
          layer.step(ts::pass::recompute);
        }
        layer.sync();
        const outcome got = layer.results();
        if (!expected) expected = got;
        CHECK(same_bits(got.y, expected->y));
        CHECK(same_bits(got.dx, expected->dx));
        CHECK(got.gate == expected->gate);
        CHECK(got.up == expected->up);
        CHECK(got.down == expected->down);
      }
      require(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
      t.barrier({});
      comm.release_all();
    }
    auto few = ts::comm::symmetric::create(t, window(64));
    auto chosen = full_bound<deepseek_like::spread>();
    chosen.transport = ts::transport::copy_engines{};
    rank_layer<deepseek_like::spread> layer(few, p, router_options(), offsets[r], offsets[r + 1], 300 + 200 / ranks,
                                            placement, chosen);
    CHECK_THROWS_AS(layer.step(ts::pass::recompute), ts::invalid_argument);
    t.barrier({});
  }));
}

#endif
