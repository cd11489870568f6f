// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Runs a schedule: the user's stages over any communicator.

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/nvtx.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/pipeline/execution_plan.hpp>
#include <tessera/pipeline/schedule.hpp>
#include <tessera/pipeline/stage.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

/// Options of an executor.
struct executor_options {
  std::int64_t max_rows = 0;                           ///< Bound of the rows of one micro-batch.
  std::int64_t width = 0;                              ///< Columns of the activations between stages.
  gradient_order order = gradient_order::micro_batch;  ///< Order in which weight gradients are added.
};

/// Runs a schedule on one rank of a pipeline, step after step, as `plan_execution` lays them out.
///
/// A batch of messages is one `exchange` of the communicator. At the end all ranks meet in a barrier, so that a rank
/// whose part was done early learns of a failure too: when a stage throws, its rank tells the others
/// (`Comm::fail`, where the communicator has it; otherwise they learn of it by the communicator's own timeout) and
/// throws `stage_error`; the others throw `comm_error` with the same text. A rank that is gone becomes a `comm_error`
/// within the communicator's timeout. Afterwards the communicator must be made usable again by its own rules
/// (`comm::threads`: `reset()` on all ranks; `comm::mpi`: a new one, and the memory stays until MPI is finalised); the
/// executor needs nothing, `run` starts anew. Gradients are undefined then. With `comm::nccl` nothing waits on the
/// host: a failure elsewhere is found where the engine waits for the stream, by `nccl::wait`.
///
/// **Bits.** With `gradient_order::micro_batch` a stage's gradients are those of a serial run over the micro-batches,
/// for every schedule; where a stage lies in two places, after `sum_mirrored_gradients`. What the stages compute must
/// not depend on other micro-batches, and a stage must add a contribution that is complete (`work_item::gradient_mode`)
/// in the type in which it was computed.
///
/// **Memory.** `activation_bytes`: `num_buffers` of the plan times `max_rows * width` elements. `run` allocates
/// nothing.
///
/// The object keeps a pointer to the communicator; it is used by one thread at a time. All ranks make it with the same
/// schedule and options.
///
/// @tparam Comm Communicator of the pipeline; its space is where activations lie.
/// @tparam T    Type of activations between stages.
template <class Comm, class T>
class executor {
  static_assert(communicator<Comm>,
                "pipeline::executor: the first argument must be a communicator. Models: comm::self<Space>, "
                "comm::threads, comm::mpi, comm::nccl; a user's own derives from comm::collectives");
  static_assert(std::is_trivially_copyable_v<T>,
                "pipeline::executor: activations travel as bytes, their type must be trivially copyable");

 public:
  using space = typename Comm::space;     ///< Where activations lie.
  using stream_type = stream_ref<space>;  ///< Order of the work.

  /// Bytes of the activations' memory on a rank.
  /// @param plan Of the rank. @param options As for the executor.
  static std::size_t activation_bytes(const execution_plan& plan, const executor_options& options) {
    memory_builder counting;
    for (int i = 0; i < plan.num_buffers; ++i) counting.take<T>("activations", elements(options));
    return counting.bytes();
  }

  /// @param s           A schedule that `validate` accepts, over `comm.size()` ranks; the same on all ranks.
  /// @param comm        The pipeline's ranks; outlives the executor.
  /// @param activations `activation_bytes` bytes in the communicator's space, used during `run`; must stay until the
  /// executor is destroyed.
  /// @param options     Sizes, the same on all ranks.
  /// @throws invalid_argument if schedule, communicator, options and memory do not fit each other.
  executor(const schedule& s, Comm& comm, workspace_memory activations, const executor_options& options)
      : plan_(checked_plan(s, comm, options)),
        comm_(&comm),
        options_(options),
        num_micro_batches_(s.num_micro_batches) {
    memory_builder builder(activations, "activations of the pipeline");
    for (int i = 0; i < plan_.num_buffers; ++i) buffers_.push_back(builder.take<T>("activations", elements(options)));
    sends_.resize(plan_.max_sends);
    receives_.resize(plan_.max_receives);
  }

  /// One batch: every micro-batch forward and backward. A collective of the communicator.
  /// @param stream Host: returns when done. Device: all work is enqueued on it.
  /// @param stages `[num_chunks]`, this rank's stages. They may share parameters: where a rank holds the first and the
  ///               last stage, embedding and head may be one object that both refer to.
  /// @param rows   `[num_micro_batches]`, rows of each micro-batch, at most `max_rows`; the same on all ranks. May be
  /// 0.
  /// @throws invalid_argument before anything runs if an argument is wrong, stage_error if a stage here throws,
  /// comm_error if another rank does not do its part (also where a stage here throws one itself).
  template <class Stage>
  void run(stream_type stream, std::span<Stage* const> stages, std::span<const std::int64_t> rows) {
    static_assert(pipeline_stage<Stage, space>,
                  "pipeline::executor::run: a stage needs a type element and members forward(stream, item, x, y), "
                  "backward_input(stream, item, x, dy, dx) and backward_weights(stream, item, x, dy). Model: "
                  "pipeline::overlap_stage");
    static_assert(std::is_same_v<typename Stage::element, T>,
                  "pipeline::executor::run: the stage's element must be the executor's type of activations");
    [[maybe_unused]] const nvtx_range range("tessera::pipeline::executor::run");
    check_arguments(std::span<const Stage* const>(stages.data(), stages.size()), rows);
    for (const planned_step& step : plan_.steps) run_step(stream, stages, rows, step);
    comm_->barrier(stream);
  }

  /// The steps and what they need.
  const execution_plan& plan() const noexcept { return plan_; }
  /// The options.
  const executor_options& options() const noexcept { return options_; }

 private:
  static std::int64_t elements(const executor_options& options) { return options.max_rows * options.width; }

  static execution_plan checked_plan(const schedule& s, const Comm& comm, const executor_options& options) {
    TESSERA_EXPECTS(s.num_ranks == comm.size(), "schedule " << s.name << " is for " << s.num_ranks
                                                            << " ranks, the communicator has " << comm.size());
    TESSERA_EXPECTS(options.max_rows >= 0 && options.width >= 0,
                    "executor_options: max_rows = " << options.max_rows << ", width = " << options.width
                                                    << ", neither may be negative");
    return plan_execution(s, comm.rank(), options.order);
  }

  template <class Stage>
  void check_arguments(std::span<const Stage* const> stages, std::span<const std::int64_t> rows) const {
    TESSERA_EXPECTS(stages.size() == plan_.saved_slots.size(), "the pipeline has " << plan_.saved_slots.size()
                                                                                   << " stages per rank, "
                                                                                   << stages.size() << " were given");
    for (const Stage* stage : stages) TESSERA_EXPECTS(stage != nullptr, "a stage of the pipeline is null");
    TESSERA_EXPECTS(static_cast<int>(rows.size()) == num_micro_batches_,
                    "rows of " << rows.size() << " micro-batches are given, the schedule has " << num_micro_batches_);
    for (std::size_t m = 0; m < rows.size(); ++m) {
      TESSERA_EXPECTS(rows[m] >= 0 && rows[m] <= options_.max_rows,
                      "micro-batch " << m << " has " << rows[m] << " rows, the executor was made for max_rows = "
                                     << options_.max_rows << " at most");
    }
  }

  matrix_view<T> view(int buffer, std::int64_t rows) const {
    if (buffer < 0) return {nullptr, rows, 0};
    return {buffers_[static_cast<std::size_t>(buffer)], rows, options_.width};
  }

  static work_item item_of(const planned_work& work, std::span<const std::int64_t> rows) {
    return {.stage = work.stage,
            .chunk = work.chunk,
            .micro_batch = work.micro_batch,
            .rows = rows[static_cast<std::size_t>(work.micro_batch)],
            .slot = work.slot,
            .gradient_row = work.gradient_row,
            .gradient_mode = work.gradient_mode};
  }

  template <class Stage>
  void run_step(stream_type stream, std::span<Stage* const> stages, std::span<const std::int64_t> rows,
                const planned_step& step) {
    using kinds = planned_step::kinds;
    if (step.kind == kinds::exchange) return exchange(stream, rows, step);
    const auto stage = [&](const planned_work& work) -> Stage& {
      return *stages[static_cast<std::size_t>(work.chunk)];
    };
    const auto forward = [&] {
      const work_item item = item_of(step.forward, rows);
      stage(step.forward)
          .forward(stream, item, matrix_view<const T>(view(step.forward.x, item.rows)),
                   view(step.forward.y, item.rows));
    };
    const auto backward_input = [&] {
      const work_item item = item_of(step.backward, rows);
      stage(step.backward)
          .backward_input(stream, item, matrix_view<const T>(view(step.backward.x, item.rows)),
                          matrix_view<const T>(view(step.backward.dy, item.rows)), view(step.backward.dx, item.rows));
    };
    const auto backward_weights = [&] {
      const work_item item = item_of(step.backward, rows);
      stage(step.backward)
          .backward_weights(stream, item, matrix_view<const T>(view(step.backward.x, item.rows)),
                            matrix_view<const T>(view(step.backward.dy, item.rows)));
    };
    if (step.kind == kinds::forward) return guarded(step.forward, action_kind::forward, forward);
    if (step.kind == kinds::backward_input) return guarded(step.backward, action_kind::backward_input, backward_input);
    if (step.kind == kinds::backward_weights)
      return guarded(step.backward, action_kind::backward_weights, backward_weights);
    if constexpr (stage_has_overlapped<Stage, space>) {
      guarded(step.forward, action_kind::overlapped, [&] {
        const work_item f = item_of(step.forward, rows);
        const work_item b = item_of(step.backward, rows);
        stage(step.forward)
            .overlapped(stream, f, matrix_view<const T>(view(step.forward.x, f.rows)), view(step.forward.y, f.rows),
                        stage(step.backward), b, matrix_view<const T>(view(step.backward.x, b.rows)),
                        matrix_view<const T>(view(step.backward.dy, b.rows)), view(step.backward.dx, b.rows));
      });
    } else {
      guarded(step.forward, action_kind::forward, forward);
      guarded(step.backward, action_kind::backward_input, backward_input);
      guarded(step.backward, action_kind::backward_weights, backward_weights);
    }
  }

  void exchange(stream_type stream, std::span<const std::int64_t> rows, const planned_step& step) {
    const auto fill = [&](const std::vector<planned_message>& messages, std::size_t first, std::size_t count,
                          std::vector<transfer>& out) {
      for (std::size_t i = 0; i < count; ++i) {
        const planned_message& message = messages[first + i];
        const std::int64_t bytes =
            rows[static_cast<std::size_t>(message.micro_batch)] * options_.width * static_cast<std::int64_t>(sizeof(T));
        out[i] = {message.peer, buffers_[static_cast<std::size_t>(message.buffer)], bytes};
      }
    };
    fill(plan_.sends, step.first_send, step.num_sends, sends_);
    fill(plan_.receives, step.first_receive, step.num_receives, receives_);
    comm_->exchange(stream, std::span<const transfer>(sends_.data(), step.num_sends),
                    std::span<const transfer>(receives_.data(), step.num_receives));
  }

  // Runs a call of a stage; when it throws, tells the other ranks first.
  template <class Call>
  void guarded(const planned_work& work, action_kind during, Call call);

  void tell_others([[maybe_unused]] const std::string& text) {
    if constexpr (requires(Comm & c) { c.fail(text); }) comm_->fail(text);
  }

  execution_plan plan_;
  Comm* comm_;
  executor_options options_;
  int num_micro_batches_;
  std::vector<T*> buffers_;
  std::vector<transfer> sends_;
  std::vector<transfer> receives_;
};

}  // namespace pipeline

TESSERA_NAMESPACE_END

#include <tessera/pipeline/detail/executor.hpp>
