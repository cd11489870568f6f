// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// The smallest use of a pipeline: four stages of one mixture-of-experts block each on two pipeline ranks, forwards and
// backwards overlapped as DualPipeV does, and the experts of each stage spread over two ranks more. Gradient descent on
// a toy task; the loss falls. The README shows the part between the markers.

#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include <tessera/tessera.hpp>

namespace {

namespace ts = tessera;
namespace pl = tessera::pipeline;

using layer =
    ts::moe_layer<ts::router<ts::score::softmax, ts::select::top_k, ts::weigh::normalized>,
                  ts::experts<ts::activation::swiglu, ts::precision::fp32>, ts::layout::block, ts::comm::threads>;

constexpr int pipeline_ranks = 2, expert_ranks = 2, micro_batches = 8, steps = 41, d = 16, n = 32;
constexpr std::int64_t tokens = 24;  // of one micro-batch on one rank
constexpr float rate = 1.0f;
constexpr ts::shape model{
    .num_experts = 8, .top_k = 2, .hidden = d, .intermediate = n, .max_tokens = static_cast<std::int64_t>(tokens)};

// Numbers in [-1, 1) that everybody finds alike.
float noise(std::uint32_t seed) {
  seed = (seed ^ 61u ^ (seed >> 16)) * 9u;
  seed = (seed ^ (seed >> 4)) * 0x27d4eb2du;
  return static_cast<float>((seed ^ (seed >> 15)) % 4096u) / 2048.0f - 1.0f;
}

// What comes before the experts of a block, in place of norm and attention: nothing, so that y = x + experts(x). The
// first block of the first stage brings the tokens, and the last one of the last stage is the loss.
struct mixer {
  enum class kind { source, block, loss } what;
  int data_seed;                                     // of this rank
  std::vector<std::vector<float>> differences = {};  // of the loss, for each slot
  double* loss = nullptr;

  float token(const pl::work_item& item, std::int64_t t, int j) const {
    return noise(static_cast<std::uint32_t>(((item.micro_batch * 7 + data_seed) * tokens + t) * d + j));
  }
  void forward(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float> x, ts::matrix_view<float> h,
               ts::matrix_view<float> u) {
    for (std::int64_t t = 0; t < item.rows; ++t) {
      for (int j = 0; j < d; ++j) {
        if (what == kind::source) h(t, j) = token(item, t, j);
        if (what == kind::block) h(t, j) = u(t, j) = x(t, j);
        if (what != kind::loss) continue;
        const float difference = x(t, j) - token(item, t, (j + 1) % d);  // the task: move every number by one
        differences[static_cast<std::size_t>(item.slot)][static_cast<std::size_t>(t * d + j)] = difference;
        *loss += 0.5 * difference * difference / (tokens * micro_batches);
      }
    }
  }
  void backward_input(ts::host_stream, const pl::work_item& item, ts::matrix_view<const float>,
                      ts::matrix_view<const float> dh, ts::matrix_view<const float> du, ts::matrix_view<float> dx) {
    for (std::int64_t t = 0; t < item.rows; ++t) {
      for (int j = 0; j < d; ++j) {
        if (what == kind::block) dx(t, j) = dh(t, j) + du(t, j);
        if (what != kind::loss) continue;
        const float difference = differences[static_cast<std::size_t>(item.slot)][static_cast<std::size_t>(t * d + j)];
        dx(t, j) = difference / (tokens * micro_batches);
      }
    }
  }
  void backward_weights(ts::host_stream, const pl::work_item&, ts::matrix_view<const float>,
                        ts::matrix_view<const float>, ts::matrix_view<const float>) {}
};

// A stage's experts: this rank's share of them, with their gradients.
struct stage_experts {
  stage_experts(ts::comm::threads& group, int stage)
      : placement(model.num_experts, group.size()),
        state(layer::sizes(model, placement, group.rank()).state_bytes),
        moe(model, {}, placement, group, state) {
    moe.reset_state({});
    const auto fill = [&](std::vector<float>& to, std::size_t count, int rank, float scale) {
      for (std::size_t i = 0; i < count; ++i)
        to.push_back(scale *
                     noise(static_cast<std::uint32_t>(count * static_cast<std::size_t>(17 + 5 * stage + rank) + i)));
    };
    const auto slots = static_cast<std::size_t>(placement.num_slots(group.rank()));
    fill(gate, std::size_t(model.num_experts) * d, 0, 0.5f);  // the same on all ranks, and left as it is
    fill(up, slots * 2 * n * d, group.rank(), 0.3f);
    fill(down, slots * d * n, group.rank(), 0.3f);
    gate_gradient.resize(gate.size());
    up_gradient.resize(up.size());
    down_gradient.resize(down.size());
    gradients = {.gate = gate_gradient.data(), .experts = {up_gradient.data(), down_gradient.data()}};
  }
  layer::weights weights() const {
    return {.gate = {gate.data(), model.num_experts, d}, .experts = {up.data(), down.data()}};
  }
  void descend() {
    for (std::size_t i = 0; i < up.size(); ++i) up[i] -= rate * up_gradient[i];
    for (std::size_t i = 0; i < down.size(); ++i) down[i] -= rate * down_gradient[i];
  }

  ts::layout::block placement;
  ts::host_buffer state;
  layer moe;
  std::vector<float> gate, up, down, gate_gradient, up_gradient, down_gradient;
  layer::gradients gradients;
};

void train(ts::comm::threads& world) {
  auto pipe = world.split(world.rank() % expert_ranks, 0);   // this rank's neighbours in the pipeline
  auto group = world.split(world.rank() / expert_ranks, 0);  // those that share its stages' experts
  double loss = 0, first_loss = 0;
  std::deque<stage_experts> experts;  // of this rank's stages
  std::deque<mixer> mixers;
  std::deque<ts::host_buffer> memory;
  const auto allocate = [&](std::size_t bytes) -> ts::host_buffer& { return memory.emplace_back(bytes); };
  const auto blocks_of = [&](int which, int num_stages, int slots) {
    std::vector<pl::moe_block<layer, mixer>> blocks;
    stage_experts& own = experts.emplace_back(group, which);
    if (which == 0) blocks.push_back({.before = &mixers.emplace_back(mixer::kind::source, group.rank())});
    blocks.push_back({.before = &mixers.emplace_back(mixer::kind::block, group.rank()),
                      .layer = &own.moe,
                      .weights = own.weights(),
                      .gradients = {&own.gradients, 1}});
    if (which + 1 < num_stages) return blocks;
    mixer& last = mixers.emplace_back(mixer::kind::loss, group.rank());
    last.differences.assign(static_cast<std::size_t>(slots), std::vector<float>(tokens * d));
    last.loss = &loss;
    blocks.push_back({.before = &last});
    return blocks;
  };

  //! [pipeline]
  using chunk = pl::moe_chunk<layer, mixer>;               // blocks: (h, u) = mixer(x), y = h + experts(u)
  using stage = pl::overlap_stage<chunk, pl::host_lanes>;  // on GPUs pl::device_lanes

  const pl::schedule schedule = pl::dualpipev(pipe.size(), micro_batches);  // a plain value
  const pl::execution_plan plan = pl::plan_execution(schedule, pipe.rank());
  const pl::executor_options options{.max_rows = tokens, .width = d};
  pl::executor<ts::comm::threads, float> executor(
      schedule, pipe, allocate(pl::executor<ts::comm::threads, float>::activation_bytes(plan, options)), options);

  pl::host_lanes lanes;  // computation and communication
  std::deque<chunk> chunks;
  std::deque<stage> stages;
  std::vector<stage*> list;
  for (int c = 0; c < schedule.num_chunks; ++c) {  // this rank's stages
    const int which = schedule.stage_of(pipe.rank(), c), slots = plan.saved_slots[static_cast<std::size_t>(c)];
    const std::vector<chunk::block> blocks = blocks_of(which, schedule.num_stages, slots);
    const pl::moe_chunk_sizes bytes = chunk::sizes(blocks, tokens, d, slots);
    chunks.emplace_back(blocks, tokens, d, slots, allocate(bytes.saved_bytes), allocate(bytes.deferred_bytes),
                        allocate(bytes.workspace_bytes));
    list.push_back(&stages.emplace_back(chunks.back(), lanes));
  }

  const std::vector<std::int64_t> rows(micro_batches, tokens);
  const auto train_step = [&] {
    executor.run({}, std::span<stage* const>(list), rows);  // every micro-batch forward and backward
    for (stage_experts& e : experts) e.descend();
  };
  //! [pipeline]

  for (int step = 0; step < steps; ++step) {
    loss = 0;
    train_step();
    if (step % 10 != 0 || pipe.rank() != 0 || group.rank() != 0) continue;  // the V has both ends on rank 0
    std::printf("step %2d: loss %.4f\n", step, loss);
    if (step == 0) first_loss = loss;
    if (step + 1 == steps && !(loss < first_loss / 4)) throw ts::error("the loss does not fall");
  }
}

}  // namespace

int main() {
  try {
    ts::comm::threads::run(pipeline_ranks * expert_ranks, train);
  } catch (const ts::error& e) {
    std::fprintf(stderr, "pipeline_minimal: %s\n", e.what());
    return 1;
  }
}
