// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// One training run on one rank of a mesh: data, steps, validation, sample, checkpoints.
///
/// Why the mesh cannot change a bit (with `combine::ordered`): the batch is fixed and its chunks are split contiguously
/// over all ranks; a token's forward and backward depend on no other row; every gradient, those of experts included,
/// comes as one contribution per chunk, summed in the order of chunks; the norm is an exact sum; AdamW treats each
/// element by itself; loads are integers.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/comm/ordered_reduce.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/mesh/training_mesh.hpp>
#include <tessera/shard/mesh_groups.hpp>

#include "checkpoints.hpp"
#include "corpus.hpp"
#include "layers.hpp"
#include "metrics.hpp"
#include "model.hpp"
#include "optimizer.hpp"
#include "progress.hpp"
#include "run_history.hpp"
#include "settings.hpp"
#include "sharded_parameters.hpp"
#include "stop.hpp"

namespace train_lm {

/// What a resumed run has found.
struct resumed_run {
  std::string path;             ///< Folder of the checkpoint.
  std::int64_t step = 0;        ///< Steps done.
  std::string mesh;             ///< Of the run that saved it.
  std::int64_t bytes_read = 0;  ///< Over all ranks.
};

/// Trains on one rank of `Comm`. All members are collective.
template <class A, ts::host_communicator Comm>
class trainer {
 public:
  /// @param s Validated. @param comm All ranks; outlives the trainer.
  trainer(const settings& s, balance_kind balance, const corpus& text, Comm& comm)
      : s_(s),
        balance_(balance),
        text_(text),
        comm_(comm),
        mesh_(mesh_of(s)),
        ranks_(comm, mesh_, false),
        random_(s.seed, "sample") {
    first_chunk_ = share(comm_.rank());
    local_chunks_ = share(comm_.rank() + 1) - first_chunk_;
    per_chunk_ = s_.batch / num_chunks;
    sequences_ = local_chunks_ * per_chunk_;
    const std::int64_t chunk_rows = per_chunk_ * s_.length;
    for (std::int64_t c = 0; c <= local_chunks_; ++c) chunks_.push_back(static_cast<std::int32_t>(c * chunk_rows));

    // The ranks of an expert-parallel group are neighbours, so their chunks are consecutive.
    const int ep = ranks_.expert_ranks().size(), first_of_group = comm_.rank() - ranks_.expert_ranks().rank();
    chunk_calls calls;
    calls.chunk_rows = chunk_rows;
    contribution_counts counts{.dense = local_chunks_, .experts = group_contributions(first_of_group, ep)};
    for (int r = 0; r < ep; ++r) calls.chunks.push_back(share(first_of_group + r + 1) - share(first_of_group + r));
    for (int r = 0; r < comm_.size(); ++r) counts.most_dense = std::max(counts.most_dense, share(r + 1) - share(r));
    for (int r = 0; r < comm_.size(); r += ep)
      counts.most_experts = std::max(counts.most_experts, group_contributions(r, ep));
    calls.max_rows = counts.most_dense * chunk_rows;

    std::vector<std::unique_ptr<moe_block<A>>> blocks;
    for (std::int64_t l = 0; l < s_.layers; ++l)
      blocks.push_back(make_block<A>(s_, balance, calls, ranks_.expert_ranks(), comm_));
    model_ = std::make_unique<language_model<A>>(
        model_shape{.hidden = s_.hidden, .layers = s_.layers, .experts = s_.experts, .max_rows = calls.max_rows},
        std::move(blocks));
    store_ =
        std::make_unique<sharded_parameters<A, Comm>>(model_->groups(), static_cast<int>(s_.experts), ranks_, counts);
    model_->initialize(s_.seed, [&](int group, int i, std::span<const A> values) { store_->set(group, i, values); });

    tokens_.resize(static_cast<std::size_t>(sequences_ * s_.length));
    targets_.resize(tokens_.size());
    state_.assign(static_cast<std::size_t>(model_->state_size(sequences_)), A(0));
    loads_.resize(static_cast<std::size_t>(s_.layers * s_.experts));
    if (!s_.checkpoint.empty()) checkpoints_ = std::make_unique<checkpoints<Comm>>(comm_, checkpoint_folder(), s_.keep);
    result_.balance = balance_;
    result_.ranks = comm_.size();
    std::tie(result_.parameters, result_.active_parameters) = parameter_counts();
  }

  /// Parameters of all ranks together, and those that one token uses.
  std::pair<std::int64_t, std::int64_t> parameter_counts() const {
    std::int64_t dense = 0, expert = 0;
    for (const parameter_group& group : model_->groups())
      for (const parameter& p : group.table.entries()) (group.experts ? expert : dense) += p.whole.volume();
    return {dense + expert, dense + expert / s_.experts * s_.top_k};
  }

  /// The mesh.
  const ts::training_mesh& mesh() const { return mesh_; }
  /// Bytes of parameters and moments on this rank.
  std::size_t state_bytes() const { return store_->memory().state(); }

  /// With --resume goes on from the newest whole checkpoint, saved by any number of ranks with any mesh. @return
  /// nothing where there is none. @throws tessera::error if it is another run's, as `checkpoint::load` does, and
  /// without
  /// --resume if there is a checkpoint, which a new run would outdate.
  std::optional<resumed_run> start() {
    if (!checkpoints_) return std::nullopt;
    const std::optional<found_checkpoint> found = checkpoints_->find();
    if (!found) return std::nullopt;
    TESSERA_EXPECTS_AS(ts::error, s_.resume,
                       found->path << " is there already: add --resume to go on from it, or give another --checkpoint");
    const auto& values = found->state.values;
    for (const auto& [name, value] : identity()) {
      const auto saved = values.find(name);
      TESSERA_EXPECTS_AS(ts::error, saved != values.end() && saved->second == value,
                         found->path << " was saved with " << name << " "
                                     << (saved == values.end() ? "unknown" : saved->second) << ", this run has "
                                     << value << ": resume with the same, or give another --checkpoint");
    }
    const std::int64_t step = found->state.step;
    TESSERA_EXPECTS_AS(ts::error, found->state.data_cursor == cursor_after(step),
                       found->path << " stands at '" << found->state.data_cursor << "' of the text, step " << step
                                   << " of this run at '" << cursor_after(step) << "'");
    std::vector<ts::checkpoint::target_piece> pieces = this->pieces();
    std::optional<run_history> history;
    if (comm_.rank() == 0) {
      history.emplace(*found);
      for (auto& piece : history->pieces()) pieces.push_back(std::move(piece));
    }
    const std::int64_t own = checkpoints_->load(*found, pieces);
    resumed_run info{found->path, step, values.count("mesh") != 0 ? values.at("mesh") : "?", 0};
    comm_.all_reduce(ts::host_stream{}, &own, &info.bytes_read, 1);
    if (history) history->restore(result_);
    if (values.count("seconds") != 0) seconds_before_ = std::strtod(values.at("seconds").c_str(), nullptr);
    steps_done_ = saved_step_ = step;
    return info;
  }

  /// One optimizer step. @param index From 0.
  step_metrics step(std::int64_t index) {
    const auto start = std::chrono::steady_clock::now();
    const auto length = static_cast<std::size_t>(s_.length);
    for (std::int64_t q = 0; q < sequences_; ++q) {
      // Every sequence of the batch reads its own stretch of the text on and on, so its recurrent state stays valid.
      const std::int64_t lane = first_chunk_ * per_chunk_ + q;
      const std::size_t begin =
          text_.training.size() / static_cast<std::size_t>(s_.batch) * static_cast<std::size_t>(lane) +
          static_cast<std::size_t>(index) * length;
      for (std::size_t t = 0; t < length; ++t) {
        const std::size_t row = static_cast<std::size_t>(q) * length + t;
        tokens_[row] = byte(text_.training, begin + t);
        targets_[row] = byte(text_.training, begin + t + 1);
      }
    }
    const batch input{sequences_, s_.length, tokens_, targets_};
    const double tokens = static_cast<double>(s_.batch * s_.length);
    std::vector<double> losses(static_cast<std::size_t>(local_chunks_));
    model_->forward(*store_, ts::pass::train, input, state_);
    model_->loss(input, chunks_, static_cast<A>(1.0 / tokens), losses.data());
    model_->backward(*store_, input, chunks_);

    step_metrics result;
    result.step = index + 1;
    sum_losses(losses, result);
    result.gradient_norm = store_->gradient_norm();
    update(index, result);
    measure_load(result);
    result.tokens_per_second = tokens / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result;
  }

  /// Bits per byte of the validation text. Each sequence of the batch reads its stretch from start to end with its
  /// state carried on; the byte before the text is taken to be a line end.
  double validate() {
    const std::size_t size = text_.validation.size(), lanes = static_cast<std::size_t>(s_.batch);
    const std::size_t lane_size = (size + lanes - 1) / lanes, length = static_cast<std::size_t>(s_.length);
    std::vector<A> state(state_.size(), A(0));
    std::vector<double> chunk_losses(static_cast<std::size_t>(local_chunks_)), losses(chunk_losses.size(), 0.0);
    for (std::size_t window = 0; window < lane_size; window += length) {
      for (std::size_t q = 0; q < static_cast<std::size_t>(sequences_); ++q) {
        const std::size_t begin = (static_cast<std::size_t>(first_chunk_ * per_chunk_) + q) * lane_size;
        for (std::size_t t = 0; t < length; ++t) {
          const std::size_t place = begin + window + t, row = q * length + t;
          const bool counts = window + t < lane_size && place < size;
          tokens_[row] = place == 0 ? std::uint8_t{'\n'} : byte(text_.validation, place - 1);
          targets_[row] = counts ? std::int16_t{byte(text_.validation, place)} : no_target;
        }
      }
      const batch input{sequences_, s_.length, tokens_, targets_};
      model_->forward(*store_, ts::pass::eval, input, state);
      model_->loss(input, chunks_, A(1), chunk_losses.data());
      for (std::size_t c = 0; c < losses.size(); ++c) losses[c] += chunk_losses[c];
    }
    double total = 0;
    sum_chunks(losses.data(), 1, &total);
    return total * bits_per_nat / static_cast<double>(size);
  }

  /// The prompt and what the model writes after it, on rank 0; the other ranks bring their experts and no tokens.
  std::string sample() {
    const bool speaks = comm_.rank() == 0;
    std::string text = s_.prompt;
    std::vector<A> state(speaks ? static_cast<std::size_t>(model_->state_size(1)) : 0, A(0));
    const std::size_t bytes = s_.prompt.size() + static_cast<std::size_t>(s_.sample_bytes);
    for (std::size_t i = 0; i + 1 < bytes; ++i) {
      const std::uint8_t token = speaks ? byte(text, i) : std::uint8_t{0};
      const std::span<const std::uint8_t> tokens(&token, speaks ? 1 : 0);
      const std::span<A> logits = model_->forward(*store_, ts::pass::eval, batch{speaks ? 1 : 0, 1, tokens, {}}, state);
      if (speaks && i + 1 >= s_.prompt.size())
        text.push_back(static_cast<char>(draw_byte(std::span<const A>(logits), s_.temperature, random_.uniform(i))));
    }
    return speaks ? text : std::string();
  }

  /// The run from start to end. @param bar Shows it; only rank 0 has one. @param on_stop Called on rank 0 with what
  /// there is when the run has been stopped, before validation and sample: mpirun kills its processes a second later.
  run_result run(progress* bar, const std::function<void(const run_result&)>& on_stop = {}) {
    run_result& result = result_;
    const std::int64_t interval = std::max<std::int64_t>(1, s_.steps / 80);
    start_ = std::chrono::steady_clock::now();
    while (steps_done_ < s_.steps && !result.stopped) {
      step_metrics now = step(steps_done_++);
      if (s_.eval_every > 0 && now.step % s_.eval_every == 0 && now.step < s_.steps) now.validation = validate();
      if (bar != nullptr) bar->show(now);
      if (comm_.rank() == 0) keep_load(result, interval, now.step);  // the one that has what came before a resume
      result.steps.push_back(std::move(now));
      if (checkpoints_) {
        checkpoints_->poll();
        if (s_.checkpoint_every > 0 && steps_done_ % s_.checkpoint_every == 0) save();
      }
      // One rank may have seen the signal and another not yet: they agree, so that all leave after the same step.
      const std::int32_t mine = stop_requested() ? 1 : 0;
      std::int32_t any = 0;
      comm_.all_reduce(ts::host_stream{}, &mine, &any, 1, ts::reduce_op::max);
      result.stopped = any != 0;
    }
    result.seconds = seconds();
    result.bytes_seen = static_cast<std::int64_t>(result.steps.size()) * s_.batch * s_.length;
    if (bar != nullptr) bar->finish();
    if (result.stopped && comm_.rank() == 0 && on_stop) on_stop(result);
    if (checkpoints_) {
      if (saved_step_ != steps_done_) save();
      checkpoints_->wait();
    }
    result.validation = validate();
    if (!result.steps.empty()) result.steps.back().validation = result.validation;
    if (s_.sample_bytes > 0) result.sample = sample();
    return result;
  }

 private:
  static std::uint8_t byte(const std::string& text, std::size_t i) {
    return static_cast<std::uint8_t>(text[i % text.size()]);
  }

  /// Sums `[local_chunks, count]` over the chunks of all ranks, in their order.
  template <class T>
  void sum_chunks(const T* contributions, std::int64_t count, T* result) {
    const auto bytes =
        static_cast<std::size_t>(ts::ordered_all_reduce_workspace_bytes<T>(comm_.size(), num_chunks, count));
    if (bytes > reduce_buffer_.size()) reduce_buffer_ = ts::host_buffer(bytes);
    ts::ordered_all_reduce(ts::host_stream{}, comm_, contributions, local_chunks_, count, result,
                           ts::workspace_memory(reduce_buffer_));
  }

  void sum_losses(const std::vector<double>& losses, step_metrics& result) {
    std::vector<double> pairs(2 * losses.size());
    for (std::size_t c = 0; c < losses.size(); ++c) {
      pairs[2 * c] = losses[c];
      for (const auto& block : model_->blocks())
        pairs[2 * c + 1] += block->auxiliary_loss(static_cast<std::int64_t>(c));
    }
    double sums[2] = {};
    sum_chunks(pairs.data(), 2, sums);
    result.loss = sums[0] / static_cast<double>(s_.batch * s_.length);
    result.auxiliary = sums[1];
    TESSERA_EXPECTS_AS(ts::error, std::isfinite(result.loss),
                       "the loss of step " << result.step << " is " << result.loss
                                           << ": the run has diverged, try a smaller --lr than " << s_.rate);
  }

  void measure_load(step_metrics& result) {
    const auto experts = static_cast<std::size_t>(s_.experts);
    for (std::size_t l = 0; l < model_->blocks().size(); ++l) {
      const std::span<const std::int64_t> load = model_->blocks()[l]->load();
      std::copy(load.begin(), load.end(), loads_.begin() + static_cast<std::ptrdiff_t>(l * experts));
      const double mean = static_cast<double>(s_.batch * s_.length * s_.top_k) / static_cast<double>(experts);
      result.imbalance.push_back(static_cast<double>(*std::max_element(load.begin(), load.end())) / mean);
    }
  }

  void update(std::int64_t index, step_metrics& result) {
    const std::int64_t warmup = std::max<std::int64_t>(1, s_.steps / 20);
    const double factor = schedule(index, s_.steps, warmup, 0.05);
    result.rate = s_.rate * factor;
    store_->update(s_.adam, index + 1, result.rate, ts::shard::clip_factor(result.gradient_norm, s_.adam.clip));
    for (const auto& block : model_->blocks()) block->end_step(static_cast<float>(s_.bias_rate * factor));
  }

  /// The first chunk of a rank.
  std::int64_t share(std::int64_t rank) const { return num_chunks * rank / comm_.size(); }

  /// Contributions to experts' gradients from the expert-parallel group that starts at a rank: one per chunk. The group
  /// with the first chunks adds them up itself: the sum begins with them.
  std::int64_t group_contributions(int first_rank, int ep) const {
    const std::int64_t count = share(first_rank + ep) - share(first_rank);
    return share(first_rank) == 0 ? std::min<std::int64_t>(count, 1) : count;
  }

  std::string checkpoint_folder() const {
    return s_.balances.size() == 1 ? s_.checkpoint : s_.checkpoint + "/" + name_of(balance_);
  }

  /// What a resumed run must have in common with the one that saved.
  std::map<std::string, std::string> identity() const {
    return {{"--balance", name_of(balance_)},
            {"--batch", std::to_string(s_.batch)},
            {"--experts", std::to_string(s_.experts)},
            {"--hidden", std::to_string(s_.hidden)},
            {"--intermediate", std::to_string(s_.intermediate)},
            {"--layers", std::to_string(s_.layers)},
            {"--seed", std::to_string(s_.seed)},
            {"--seq-len", std::to_string(s_.length)},
            {"--top-k", std::to_string(s_.top_k)},
            {"text (fingerprint)", std::to_string(text_.fingerprint)}};
  }

  /// Where the text is read on after a step.
  std::string cursor_after(std::int64_t step) const {
    return "byte " + std::to_string(step * s_.length) + " of each of " + std::to_string(s_.batch) + " lanes";
  }

  double seconds() const {
    return seconds_before_ + std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

  /// What a checkpoint keeps of the model: parameters and moments, the routers' biases and loads, and the recurrent
  /// state of the sequences. Counts of a step are zero between steps.
  std::vector<ts::checkpoint::target_piece> pieces() {
    std::vector<ts::checkpoint::target_piece> result = store_->pieces();
    for (std::size_t l = 0; l < model_->blocks().size(); ++l) {
      for (const ts::named_array& array : model_->blocks()[l]->state()) {
        if (array.data == nullptr || (array.name != "bias" && array.name != "global_load")) continue;
        const std::string name = "block" + std::to_string(l) + ".router." + std::string(array.name);
        const ts::box whole = ts::box::whole({array.rows});
        if (array.name == "bias")
          result.push_back(ts::checkpoint::piece_of(name, static_cast<float*>(array.data), whole));
        else
          result.push_back(ts::checkpoint::piece_of(name, static_cast<std::int64_t*>(array.data), whole));
      }
    }
    const ts::box lanes = ts::box::whole({s_.layers, s_.batch, model_->layer_state_size()});
    ts::box own = lanes;
    own.offset[1] = first_chunk_ * per_chunk_;
    own.size[1] = sequences_;
    result.push_back(ts::checkpoint::piece_of("lanes.state", state_.data(), lanes, own, "sequences over all ranks"));
    return result;
  }

  /// Starts to save what there is after the last step.
  void save() {
    ts::checkpoint::train_state state;
    state.step = steps_done_;
    if (!result_.steps.empty()) state.learning_rate = result_.steps.back().rate;
    state.rng = "seed " + std::to_string(s_.seed) + ", each number a function of (seed, name, index)";
    state.data_cursor = cursor_after(steps_done_);
    state.values = identity();
    state.values["mesh"] = name_of(mesh_);
    state.values["seconds"] = std::to_string(seconds());
    state.values["--steps"] = std::to_string(s_.steps);
    std::vector<ts::checkpoint::target_piece> pieces = this->pieces();
    std::optional<run_history> history;
    if (comm_.rank() == 0) {
      history.emplace(result_);
      for (auto& piece : history->pieces()) pieces.push_back(std::move(piece));
    }
    checkpoints_->save(pieces, state);
    saved_step_ = steps_done_;
  }

  void keep_load(run_result& result, std::int64_t interval, std::int64_t step_number) const {
    const auto layers = static_cast<std::size_t>(s_.layers), experts = static_cast<std::size_t>(s_.experts);
    if ((step_number - 1) % interval == 0)
      result.loads.push_back({0, std::vector(layers, std::vector<std::int64_t>(experts, 0))});
    load_interval& last = result.loads.back();
    last.last_step = step_number;
    for (std::size_t l = 0; l < layers; ++l)
      for (std::size_t e = 0; e < experts; ++e) last.loads[l][e] += loads_[l * experts + e];
  }

  const settings s_;
  const balance_kind balance_;
  const corpus& text_;
  Comm& comm_;
  const ts::training_mesh mesh_;
  ts::shard::mesh_groups<Comm> ranks_;
  random_stream random_;
  std::int64_t first_chunk_ = 0, local_chunks_ = 0, per_chunk_ = 0, sequences_ = 0;
  std::vector<std::int32_t> chunks_;
  std::unique_ptr<language_model<A>> model_;
  std::unique_ptr<sharded_parameters<A, Comm>> store_;
  std::unique_ptr<checkpoints<Comm>> checkpoints_;
  std::vector<A> state_;
  std::vector<std::uint8_t> tokens_;
  std::vector<std::int16_t> targets_;
  std::vector<std::int64_t> loads_;
  ts::host_buffer reduce_buffer_;
  run_result result_;
  std::int64_t steps_done_ = 0, saved_step_ = -1;
  double seconds_before_ = 0;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace train_lm
