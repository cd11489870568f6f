// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The stages of one rank under a schedule: training steps, the optimizer's, and forward without training.
///
/// Why the schedule and the number of stages cannot change a bit: a micro-batch is one chunk, whose contributions are
/// complete before they are added, in the order of micro-batches wherever they were computed; the norm is an exact sum;
/// AdamW treats each element by itself. With 12 micro-batches on one rank for each place of the pipeline these chunks
/// are those of the run without a pipeline, and so are the bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/ordered_reduce.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/pipeline/executor.hpp>
#include <tessera/pipeline/mirrored_gradients.hpp>
#include <tessera/shard/adamw.hpp>
#include <tessera/shard/exact_sum.hpp>

#include "pipeline_settings.hpp"
#include "pipeline_stage.hpp"

namespace train_lm {

/// What a step has lost, over the whole batch.
struct step_losses {
  double main = 0;              ///< Sum over the bytes, nats.
  double auxiliary = 0;         ///< Of all layers.
  std::vector<double> further;  ///< `[D]`: of each depth, the sum over its bytes.
};

/// The model on one rank. The ranks of `comm` form a grid: `position` in the pipeline, and within a position ranks that
/// divide experts and the sequences of each micro-batch. All members are collective.
template <class A, ts::host_communicator Comm, class Lanes>
class pipeline_model {
 public:
  using stage_type = pipeline_stage<A, Comm, Lanes>;  ///< A stage.
  static constexpr std::int64_t vocabulary = 256;     ///< Bytes.

  /// @param s Checked by `prepare_pipeline`. @param balance What balances the experts. @param comm All ranks. Both
  /// outlive the model.
  pipeline_model(const settings& s, balance_kind balance, Comm& comm)
      : s_(s),
        comm_(comm),
        schedule_(schedule_of(s)),
        group_size_(comm.size() / schedule_.num_ranks),
        position_(comm.rank() / group_size_),
        member_(comm.rank() % group_size_),
        pipe_(comm.split(member_, position_)),
        group_(comm.split(position_, member_)),
        chain_group_(comm.split(position_, member_)),
        copies_(comm.split(
            schedule_.routes.size() > 1 ? std::min(position_, schedule_.num_ranks - 1 - position_) : position_,
            comm.rank())),
        plan_(pl::plan_execution(schedule_, position_)) {
    const int micro_batches = schedule_.num_micro_batches;
    sequences_ = s.batch / micro_batches / group_size_;
    text_.rows = sequences_ * s.length;
    text_.tokens.resize(static_cast<std::size_t>(micro_batches * text_.rows));
    text_.targets.resize(text_.tokens.size());

    // In the order of stages: the last one may share the first one's table.
    stages_.resize(static_cast<std::size_t>(schedule_.num_chunks));
    for (int chunk = 0; chunk < schedule_.num_chunks; ++chunk) by_stage_.push_back(chunk);
    std::sort(by_stage_.begin(), by_stage_.end(),
              [&](int a, int b) { return schedule_.stage_of(position_, a) < schedule_.stage_of(position_, b); });
    for (const int chunk : by_stage_) {
      const auto c = static_cast<std::size_t>(chunk);
      const stage_place at{.stage = schedule_.stage_of(position_, chunk),
                           .num_stages = schedule_.num_stages,
                           .micro_batches = micro_batches,
                           .rows = text_.rows,
                           .slots = plan_.saved_slots[c],
                           .gradient_rows = plan_.gradient_rows[c]};
      stage_type* first = stages_[static_cast<std::size_t>(by_stage_.front())].get();
      if (first != nullptr && !first->is_first()) first = nullptr;
      stages_[c] = std::make_unique<stage_type>(s, balance, at, text_, group_, chain_group_, lanes_, first);
    }

    const pl::executor_options options{.max_rows = text_.rows, .width = s.hidden};
    activations_ = ts::host_buffer(executor_type::activation_bytes(plan_, options));
    executor_ = std::make_unique<executor_type>(schedule_, pipe_, activations_, options);
    mirror_workspace_ =
        ts::host_buffer(pl::sum_mirrored_gradients_workspace_bytes<A>(schedule_, pl::gradient_order::micro_batch));
    rows_.assign(static_cast<std::size_t>(micro_batches), text_.rows);
    x_.resize(static_cast<std::size_t>(text_.rows * s.hidden));
  }

  /// The schedule.
  const pl::schedule& schedule() const { return schedule_; }
  /// Ranks of each place of the pipeline.
  int group_size() const { return group_size_; }
  /// Sequences of a micro-batch on this rank.
  std::int64_t sequences() const { return sequences_; }
  /// Number in the batch of a sequence of this rank. @param micro_batch Of which. @param sequence From 0.
  std::int64_t lane(int micro_batch, std::int64_t sequence) const {
    return (micro_batch * std::int64_t{group_size_} + member_) * sequences_ + sequence;
  }
  /// This rank's stages, by chunk.
  std::span<const std::unique_ptr<stage_type>> stages() const { return stages_; }
  /// Text of the step: the trainer fills it on every rank.
  step_text& text() { return text_; }

  /// Runs the schedule once and leaves the sums of gradients in row 0 of each stage. @param gradient_scale Factor of
  /// each byte's loss. @param factors `[D]` factors of the further ones.
  step_losses run(A gradient_scale, std::span<const double> factors) {
    for (auto& stage : stages_) {
      if (!stage->is_last()) continue;
      stage->head().set_gradient_scale(gradient_scale);
      std::fill(stage->head().losses().begin(), stage->head().losses().end(), 0.0);
      if (stage->chain() != nullptr) stage->chain()->begin_step(factors);
    }
    std::vector<typename stage_type::executed_type*> executed;
    std::vector<pl::stage_gradients<A>> gradients;
    for (auto& stage : stages_) {
      executed.push_back(&stage->executed());
      gradients.push_back({stage->gradients(), stage->gradient_size()});
    }
    executor_->run({}, std::span<typename stage_type::executed_type* const>(executed), rows_);
    pl::sum_mirrored_gradients<Comm, A>({}, pipe_, schedule_, pl::gradient_order::micro_batch, gradients,
                                        mirror_workspace_);
    sum_group();
    sum_embedding();
    return gather_losses();
  }

  /// Square of the norm of all gradients.
  double squared_norm() {
    ts::shard::exact_sum sum{};
    each_block([&](const parameter_block<A>& block, bool counts) {
      if (!counts) return;
      if (member_ == 0) sum.add_squares(block.gradients, block.replicated);
      sum.add_squares(block.gradients + block.replicated, block.table.size() - block.replicated);
    });
    comm_.all_reduce(ts::host_stream{}, sum.digits, sum.digits, ts::shard::exact_sum::num_digits);
    comm_.all_reduce(ts::host_stream{}, &sum.not_finite, &sum.not_finite, 1);
    sum.carry();
    return sum.not_finite > 0 ? std::nan("") : sum.value();
  }

  /// AdamW. @param step From 1. @param rate Learning rate. @param scale Factor on the gradients.
  void update(std::int64_t step, double rate, double scale) {
    const ts::shard::adamw_options options{s_.adam.beta1, s_.adam.beta2, s_.adam.epsilon, s_.adam.weight_decay};
    std::vector<ts::shard::adamw_tensor<A, A, A>> tensors;
    for (auto& stage : stages_) {
      for (const auto& block : stage->blocks()) {
        if (block->values.empty()) continue;  // gradients alone, which another block has taken
        for (const parameter& p : block->table.entries()) {
          A* values = block->at(p.offset);
          tensors.push_back({values, values, block->gradients + p.offset, block->means.data() + p.offset,
                             block->squares.data() + p.offset, p.count, p.decays});
        }
      }
    }
    ts::shard::adamw({}, options, step, rate, scale, std::span<const ts::shard::adamw_tensor<A, A, A>>(tensors));
  }

  /// Ends the step of every router. @param bias_rate Step of the selection bias. @return `[layers + D, E]` pairs.
  std::vector<std::int64_t> end_step(float bias_rate) {
    const auto experts = static_cast<std::size_t>(s_.experts);
    std::vector<std::int64_t> loads(static_cast<std::size_t>(s_.layers + s_.mtp) * experts, 0);
    // Both ranks that hold copies of two stages end them in the same order.
    for (const int chunk : by_stage_) {
      stage_type& stage = *stages_[static_cast<std::size_t>(chunk)];
      const auto end = [&](auto& layer, std::int64_t index) {
        layer.end_step(bias_rate, copies_);
        if (member_ != 0 || !is_primary(chunk)) return;
        std::copy(layer.load().begin(), layer.load().end(),
                  loads.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(index) * experts));
      };
      const std::int64_t first = first_layer(stage);
      for (std::size_t l = 0; l < stage.experts().size(); ++l)
        end(*stage.experts()[l], first + static_cast<std::int64_t>(l));
      if (stage.chain() == nullptr) continue;
      for (int k = 0; k < s_.mtp; ++k) end(stage.chain()->experts(k), s_.layers + k);
    }
    comm_.all_reduce(ts::host_stream{}, loads.data(), loads.data(), static_cast<std::int64_t>(loads.size()));
    return loads;
  }

  /// Elements of all parameters together, and of those that one byte uses in the main model.
  std::pair<std::int64_t, std::int64_t> parameter_counts() {
    std::int64_t counts[2] = {0, 0};
    each_block([&](const parameter_block<A>& block, bool counted) {
      if (!counted) return;
      if (member_ == 0) counts[0] += block.replicated;
      counts[0] += block.experts * block.expert_size;
      if (member_ == 0 && block.place <= s_.layers + 1)
        counts[1] += block.replicated + (block.expert_size > 0 ? s_.top_k * block.expert_size : 0);
    });
    comm_.all_reduce(ts::host_stream{}, counts, counts, 2);
    return {counts[0], counts[1]};
  }

  /// Elements of the recurrent states of `sequences` sequences on this rank.
  std::int64_t state_size(std::int64_t sequences) const {
    std::int64_t size = 0;
    for (const auto& stage : stages_) size += stage->state_size(sequences);
    return size;
  }

  /// Runs the model without training, along the way of micro-batch 0. @param sequences Of this rank, maybe 0. @param
  /// length Of each. @param tokens `[sequences * length]`. @param state `state_size(sequences)` elements: what came
  /// before, replaced by what comes next. @param logits `[rows, 256]`, written where the last stage is.
  void evaluate(std::int64_t sequences, std::int64_t length, std::span<const std::uint8_t> tokens, A* state,
                A* logits) {
    const std::int64_t rows = sequences * length;
    TESSERA_EXPECTS(rows <= text_.rows,
                    "a call has " << rows << " bytes on one rank, the model has room for " << text_.rows);
    const pl::route& way = schedule_.routes[0];
    const std::int64_t bytes = rows * s_.hidden * static_cast<std::int64_t>(sizeof(A));
    std::vector<std::int64_t> places(stages_.size());
    for (std::size_t c = 1; c < stages_.size(); ++c) places[c] = places[c - 1] + stages_[c - 1]->state_size(sequences);
    for (int stage = 0; stage < schedule_.num_stages; ++stage) {
      const pl::place at = way[static_cast<std::size_t>(stage)];
      if (at.rank != position_) continue;
      if (stage > 0 && way[static_cast<std::size_t>(stage - 1)].rank != position_) {
        const ts::transfer from{way[static_cast<std::size_t>(stage - 1)].rank, x_.data(), bytes};
        pipe_.exchange(ts::host_stream{}, {}, {&from, 1});
      }
      const auto c = static_cast<std::size_t>(at.chunk);
      stages_[c]->evaluate(sequences, length, tokens, x_.data(), state + places[c], logits);
      if (stage + 1 < schedule_.num_stages && way[static_cast<std::size_t>(stage + 1)].rank != position_) {
        const ts::transfer to{way[static_cast<std::size_t>(stage + 1)].rank, x_.data(), bytes};
        pipe_.exchange(ts::host_stream{}, {&to, 1}, {});
      }
    }
  }

  /// Whether this rank has what `evaluate` ends with.
  bool speaks_last() const { return schedule_.routes[0].back().rank == position_; }
  /// The rank of `comm` whose logits tell: it has the end of the model and the sequences of a single document.
  int speaker() const { return schedule_.routes[0].back().rank * group_size_; }
  /// Whether this rank brings the bytes of a single document.
  bool brings_document() const { return member_ == 0; }

  /// Proposes bytes after the last `evaluate` of a single document. @param row Of it: the hidden state to start from.
  /// @param tokens Its byte, and the byte chosen after it. @param drafts At most D, written on every rank.
  void draft(std::int64_t row, std::span<const std::int32_t> tokens, std::span<std::int32_t> drafts) {
    if (speaks_last()) {
      stage_type& stage = *stages_[static_cast<std::size_t>(schedule_.routes[0].back().chunk)];
      const std::int64_t n = brings_document() ? 1 : 0;
      stage.chain()->draft(ts::matrix_view<const A>(x_.data() + row * s_.hidden, n, s_.hidden),
                           n == 0 ? std::span<const std::int32_t>() : tokens, drafts);
    }
    comm_.broadcast(ts::host_stream{}, drafts.data(), static_cast<std::int64_t>(drafts.size()), speaker());
  }

 private:
  using executor_type = pl::executor<Comm, A>;

  /// Whether a stage of this rank is the copy that counts where there are two.
  bool is_primary(int chunk) const {
    const int stage = schedule_.stage_of(position_, chunk);
    return schedule_.routes[0][static_cast<std::size_t>(stage)] == pl::place{position_, chunk};
  }

  std::int64_t first_layer(const stage_type& stage) const { return s_.layers * stage.index() / schedule_.num_stages; }

  /// Calls `f(block, counts)`: `counts` for one copy of each.
  template <class F>
  void each_block(F&& f) const {
    for (int chunk = 0; chunk < schedule_.num_chunks; ++chunk) {
      for (const auto& block : stages_[static_cast<std::size_t>(chunk)]->blocks())
        f(*block, is_primary(chunk) && block->place >= 0);
    }
  }

  /// Sums what every rank of a place contributes, in their order.
  void sum_group() {
    if (group_size_ == 1) return;
    for (auto& stage : stages_) {
      for (const auto& block : stage->blocks()) {
        const std::size_t bytes =
            ts::ordered_all_reduce_workspace_bytes<A>(group_size_, group_size_, block->replicated);
        if (bytes > reduce_workspace_.size()) reduce_workspace_ = ts::host_buffer(bytes);
        sum_.resize(static_cast<std::size_t>(block->replicated));
        ts::ordered_all_reduce(ts::host_stream{}, group_, static_cast<const A*>(block->gradients), 1, block->replicated,
                               sum_.data(), ts::workspace_memory(reduce_workspace_));
        std::copy(sum_.begin(), sum_.end(), block->gradients);
      }
    }
  }

  /// Adds the gradients that the embedding has from the first stage and from the chain on the last one. They meet on
  /// one rank with DualPipe and DualPipeV; otherwise first and last rank exchange them and keep their tables equal.
  void sum_embedding() {
    if (s_.mtp == 0) return;
    stage_type* first = nullptr;
    stage_type* last = nullptr;
    for (auto& stage : stages_) {
      if (stage->is_first()) first = stage.get();
      if (stage->is_last()) last = stage.get();
    }
    if (first == nullptr && last == nullptr) return;
    const std::int64_t count = vocabulary * s_.hidden;
    if (first != nullptr && last != nullptr) {
      A* sum = first->embedding_block().gradients;
      const A* further = last->chain_embedding_block().gradients;
      for (std::int64_t i = 0; i < count; ++i) sum[i] += further[i];
      return;
    }
    A* own = first != nullptr ? first->embedding_block().gradients : last->chain_embedding_block().gradients;
    sum_.resize(static_cast<std::size_t>(count));
    const int peer = first != nullptr ? pipe_.size() - 1 : 0;
    const auto bytes = count * static_cast<std::int64_t>(sizeof(A));
    const ts::transfer to{peer, own, bytes}, from{peer, sum_.data(), bytes};
    pipe_.exchange(ts::host_stream{}, {&to, 1}, {&from, 1});
    for (std::int64_t i = 0; i < count; ++i) own[i] += sum_[static_cast<std::size_t>(i)];  // a + b = b + a, bit by bit
  }

  /// Losses of all micro-batches on every rank, in their order. Each number has one rank that knows it.
  step_losses gather_losses() {
    const auto further = static_cast<std::size_t>(s_.mtp), layers = static_cast<std::size_t>(s_.layers);
    const std::size_t width = 1 + layers + 2 * further;
    const auto micro_batches = static_cast<std::size_t>(schedule_.num_micro_batches);
    const auto members = static_cast<std::size_t>(group_size_);
    std::vector<double> all(micro_batches * members * width, 0.0);
    for (int chunk = 0; chunk < schedule_.num_chunks; ++chunk) {
      stage_type& stage = *stages_[static_cast<std::size_t>(chunk)];
      const auto first = static_cast<std::size_t>(first_layer(stage)), own = stage.experts().size();
      for (const int m : pl::micro_batches_at(schedule_, position_, chunk)) {
        const auto i = static_cast<std::size_t>(m);
        double* row = all.data() + (i * members + static_cast<std::size_t>(member_)) * width;
        for (std::size_t l = 0; l < own; ++l) row[1 + first + l] = stage.auxiliary()[i * own + l];
        if (!stage.is_last()) continue;
        row[0] = stage.head().losses()[i];
        for (std::size_t k = 0; k < further; ++k) {
          row[1 + layers + k] = stage.chain()->auxiliary()[i * further + k];
          row[1 + layers + further + k] = stage.chain()->losses()[i * further + k];
        }
      }
    }
    comm_.all_reduce(ts::host_stream{}, all.data(), all.data(), static_cast<std::int64_t>(all.size()));
    step_losses sums;
    sums.further.assign(further, 0.0);
    for (std::size_t i = 0; i < micro_batches * members; ++i) {
      const double* row = all.data() + i * width;
      sums.main += row[0];
      double auxiliary = 0;
      for (std::size_t l = 0; l < layers + further; ++l) auxiliary += row[1 + l];
      sums.auxiliary += auxiliary;
      for (std::size_t k = 0; k < further; ++k) sums.further[k] += row[1 + layers + further + k];
    }
    return sums;
  }

  const settings& s_;
  Comm& comm_;
  pl::schedule schedule_;
  int group_size_, position_, member_;
  Comm pipe_, group_, chain_group_, copies_;
  pl::execution_plan plan_;
  std::int64_t sequences_ = 0;
  step_text text_;
  Lanes lanes_;
  std::vector<int> by_stage_;
  std::vector<std::unique_ptr<stage_type>> stages_;  // [chunks]
  ts::host_buffer activations_, mirror_workspace_, reduce_workspace_;
  std::unique_ptr<executor_type> executor_;
  std::vector<std::int64_t> rows_;
  std::vector<A> x_, sum_;
};

}  // namespace train_lm
