// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <span>
#include <sstream>  // what errors print an action with
#include <string>
#include <utility>
#include <vector>

#include <tessera/pipeline/detail/weight_queue.hpp>
#include <tessera/pipeline/execution_plan.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline::detail {

// Numbers that are taken and given back; the lowest free one is taken first, so that as many exist as are in use at the
// same time at most.
class number_pool {
 public:
  int take() {
    const auto found = std::find(used_.begin(), used_.end(), false);
    const auto number = static_cast<int>(found - used_.begin());
    if (found == used_.end()) {
      used_.push_back(true);
    } else {
      *found = true;
    }
    return number;
  }
  void give_back(int number) {
    if (number >= 0) used_[static_cast<std::size_t>(number)] = false;
  }
  int most() const { return static_cast<int>(used_.size()); }

 private:
  std::vector<bool> used_;
};

class planner {
 public:
  planner(const schedule& s, int rank, gradient_order order) : s_(s), order_(order) {
    TESSERA_EXPECTS(rank >= 0 && rank < s.num_ranks && static_cast<int>(s.actions.size()) == s.num_ranks,
                    "plan_execution: rank " << rank << " of schedule " << s.name << " with " << s.num_ranks
                                            << " ranks and " << s.actions.size() << " lists of actions");
    plan_.rank = rank;
    for (int chunk = 0; chunk < s.num_chunks; ++chunk) {
      slots_.emplace_back();
      queues_.emplace_back(micro_batches_at(s, rank, chunk), order);
      plan_.gradient_rows.push_back(gradient_rows_of(s, {rank, chunk}, order));
      row_written_.emplace_back(static_cast<std::size_t>(plan_.gradient_rows.back()), false);
    }
    flights_.resize(static_cast<std::size_t>(s.num_chunks) * static_cast<std::size_t>(s.num_micro_batches));
  }

  execution_plan run() {
    const std::span<const action> list = s_.actions[static_cast<std::size_t>(plan_.rank)];
    for (std::size_t i = 0; i < list.size();) {
      if (const std::size_t end = batch_end(list, i); end > i) {
        exchange(list.subspan(i, end - i));
        i = end;
      } else {
        compute(list[i]);
        ++i;
      }
    }
    for (int chunk = 0; chunk < s_.num_chunks; ++chunk) {
      for (const int m : micro_batches_at(s_, plan_.rank, chunk)) {
        const flight& f = at(chunk, m);
        TESSERA_EXPECTS(f.done && f.y < 0 && f.dx < 0, prefix() << "micro-batch " << m << " at chunk " << chunk
                                                                << " is not finished at the end of the list");
      }
      plan_.saved_slots.push_back(slots_[static_cast<std::size_t>(chunk)].most());
      plan_.most_deferred.push_back(static_cast<int>(queues_[static_cast<std::size_t>(chunk)].most_waiting()));
    }
    plan_.num_buffers = buffers_.most();
    return std::move(plan_);
  }

 private:
  // Buffers of a micro-batch at a chunk.
  struct flight {
    int x = -1, y = -1, dy = -1, dx = -1, slot = -1;
    bool forwarded = false, input_done = false, done = false;
  };

  flight& at(int chunk, int micro_batch) {
    return flights_[static_cast<std::size_t>(chunk) * static_cast<std::size_t>(s_.num_micro_batches) +
                    static_cast<std::size_t>(micro_batch)];
  }

  std::string prefix() const { return "schedule " + s_.name + ", rank " + std::to_string(plan_.rank) + ": "; }

  // The stage that an action's chunk is for its micro-batch.
  int stage(const action& a, int chunk, int micro_batch) const {
    TESSERA_EXPECTS(chunk >= 0 && chunk < s_.num_chunks && micro_batch >= 0 && micro_batch < s_.num_micro_batches,
                    prefix() << a << " names chunk " << chunk << " of " << s_.num_chunks << " and micro-batch "
                             << micro_batch << " of " << s_.num_micro_batches);
    const int result = s_.stage_of(plan_.rank, chunk, micro_batch);
    TESSERA_EXPECTS(result >= 0, prefix() << a << ": micro-batch " << micro_batch << " does not pass chunk " << chunk);
    return result;
  }

  void exchange(std::span<const action> batch) {
    planned_step step;
    step.first_send = plan_.sends.size();
    step.first_receive = plan_.receives.size();
    std::vector<int> sent;
    for (const action& a : batch) {
      stage(a, a.chunk, a.micro_batch);
      const int peer = s_.peer_of(plan_.rank, a);
      TESSERA_EXPECTS(peer >= 0 && peer != plan_.rank,
                      prefix() << a << " has no other rank to talk to (peer " << peer << ")");
      flight& f = at(a.chunk, a.micro_batch);
      if (is_send(a.kind)) {
        int& buffer = a.kind == action_kind::send_forward ? f.y : f.dx;
        TESSERA_EXPECTS(buffer >= 0, prefix() << a << " comes before what it sends was computed, or twice");
        plan_.sends.push_back({peer, buffer, a.micro_batch});
        sent.push_back(std::exchange(buffer, -1));
      } else {
        int& buffer = a.kind == action_kind::receive_forward ? f.x : f.dy;
        TESSERA_EXPECTS(buffer < 0, prefix() << a << " comes twice");
        buffer = buffers_.take();
        plan_.receives.push_back({peer, buffer, a.micro_batch});
      }
    }
    for (const int buffer : sent) buffers_.give_back(buffer);  // only now: messages of a batch travel at the same time
    step.num_sends = plan_.sends.size() - step.first_send;
    step.num_receives = plan_.receives.size() - step.first_receive;
    plan_.max_sends = std::max(plan_.max_sends, step.num_sends);
    plan_.max_receives = std::max(plan_.max_receives, step.num_receives);
    plan_.steps.push_back(step);
  }

  void compute(const action& a) {
    using kinds = planned_step::kinds;
    const int chunk = backward_chunk_of(a);
    const int micro_batch = backward_micro_batch_of(a);
    if (a.kind == action_kind::overlapped) {
      // Both halves get their buffers before either gives some back: they run at the same time.
      planned_step pair{.kind = kinds::overlapped, .forward = forward(a)};
      pair.backward = backward_input(a, chunk, micro_batch);
      weight_queue& queue = queues_[static_cast<std::size_t>(chunk)];
      queue.request(micro_batch);
      const int first = queue.pop();
      if (first == micro_batch) {
        const planned_work weights = backward_weights(chunk, micro_batch);
        pair.backward.gradient_row = weights.gradient_row;
        pair.backward.gradient_mode = weights.gradient_mode;
        plan_.steps.push_back(pair);
      } else {  // its weight gradient's turn has not come
        plan_.steps.push_back({.kind = kinds::forward, .forward = pair.forward});
        plan_.steps.push_back({.kind = kinds::backward_input, .backward = pair.backward});
      }
      hand_over(pair.forward);
      hand_over(pair.backward);
      return flush(chunk);
    }
    if (a.kind == action_kind::forward) {
      plan_.steps.push_back({.kind = kinds::forward, .forward = forward(a)});
      return hand_over(plan_.steps.back().forward);
    }
    if (has_backward_input(a.kind)) {
      plan_.steps.push_back({.kind = kinds::backward_input, .backward = backward_input(a, chunk, micro_batch)});
      hand_over(plan_.steps.back().backward);
    }
    if (has_backward_weights(a.kind)) {
      stage(a, chunk, micro_batch);
      queues_[static_cast<std::size_t>(chunk)].request(micro_batch);
      flush(chunk);
    }
  }

  void flush(int chunk) {
    for (int m = queues_[static_cast<std::size_t>(chunk)].pop(); m >= 0;
         m = queues_[static_cast<std::size_t>(chunk)].pop()) {
      plan_.steps.push_back({.kind = planned_step::kinds::backward_weights, .backward = backward_weights(chunk, m)});
    }
  }

  planned_work forward(const action& a) {
    const int number = stage(a, a.chunk, a.micro_batch);
    flight& f = at(a.chunk, a.micro_batch);
    TESSERA_EXPECTS(!f.forwarded && (number == 0 || f.x >= 0),
                    prefix() << a << (f.forwarded ? " comes twice" : " comes before its input"));
    f.forwarded = true;
    f.slot = slots_[static_cast<std::size_t>(a.chunk)].take();
    if (number + 1 < s_.num_stages) f.y = buffers_.take();
    return {.chunk = a.chunk, .stage = number, .micro_batch = a.micro_batch, .slot = f.slot, .x = f.x, .y = f.y};
  }

  planned_work backward_input(const action& a, int chunk, int micro_batch) {
    const int number = stage(a, chunk, micro_batch);
    flight& f = at(chunk, micro_batch);
    TESSERA_EXPECTS(f.forwarded && !f.input_done && (number + 1 == s_.num_stages || f.dy >= 0),
                    prefix() << a
                             << (!f.forwarded   ? " comes before the forward"
                                 : f.input_done ? " comes twice"
                                                : " comes before the gradient of its output"));
    f.input_done = true;
    if (number > 0) f.dx = buffers_.take();
    queues_[static_cast<std::size_t>(chunk)].push(micro_batch);
    return {
        .chunk = chunk, .stage = number, .micro_batch = micro_batch, .slot = f.slot, .x = f.x, .dy = f.dy, .dx = f.dx};
  }

  planned_work backward_weights(int chunk, int micro_batch) {
    flight& f = at(chunk, micro_batch);
    const place here{plan_.rank, chunk};
    const int row = order_ == gradient_order::schedule ? 0 : gradient_row_of(s_, here, micro_batch);
    std::vector<bool>& written = row_written_[static_cast<std::size_t>(chunk)];
    planned_work work{.chunk = chunk,
                      .stage = s_.stage_of(plan_.rank, chunk),
                      .micro_batch = micro_batch,
                      .slot = f.slot,
                      .x = f.x,
                      .dy = f.dy,
                      .gradient_row = row,
                      .gradient_mode = written[static_cast<std::size_t>(row)] ? write::accumulate : write::overwrite};
    written[static_cast<std::size_t>(row)] = true;
    buffers_.give_back(std::exchange(f.x, -1));
    buffers_.give_back(std::exchange(f.dy, -1));
    slots_[static_cast<std::size_t>(chunk)].give_back(f.slot);
    f.done = true;
    return work;
  }

  // Where the neighbouring stage lies on this rank too, the buffer becomes its input.
  void hand_over(const planned_work& work) {
    flight& f = at(work.chunk, work.micro_batch);
    const auto give = [&](int& from, int step, int flight::*to) {
      if (from < 0) return;
      const place other = s_.place_of(work.stage + step, work.micro_batch);
      if (other.rank == plan_.rank) at(other.chunk, work.micro_batch).*to = std::exchange(from, -1);
    };
    if (work.y >= 0) give(f.y, 1, &flight::x);
    if (work.dx >= 0) give(f.dx, -1, &flight::dy);
  }

  const schedule& s_;
  gradient_order order_;
  execution_plan plan_;
  number_pool buffers_;
  std::vector<number_pool> slots_;
  std::vector<weight_queue> queues_;
  std::vector<std::vector<bool>> row_written_;
  std::vector<flight> flights_;
};

}  // namespace pipeline::detail

namespace pipeline {

inline execution_plan plan_execution(const schedule& s, int rank, gradient_order order) {
  return detail::planner(s, rank, order).run();
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
