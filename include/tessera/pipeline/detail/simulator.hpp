// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of simulator.hpp.

#include <algorithm>
#include <string>

#include <tessera/pipeline/detail/well_formed.hpp>
#include <tessera/pipeline/memory.hpp>
#include <tessera/pipeline/simulator.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline::detail {

/// The clocks of all ranks. Every rank runs until it must wait for another; as each list has one order and each wait
/// one cause, the times do not depend on which rank is advanced first.
class clockwork {
 public:
  clockwork(const schedule& s, const costs& c, messages how)
      : s_(s), c_(c), how_(how), ranks_(static_cast<std::size_t>(s.num_ranks)) {
    const auto pairs = static_cast<std::size_t>(s.num_stages) * static_cast<std::size_t>(s.num_micro_batches);
    input_.assign(pairs, never);
    gradient_.assign(pairs, never);
    saved_.assign(pairs, never);
    differentiated_.assign(pairs, never);
    if (how == messages::rendezvous) {
      const auto links = static_cast<std::size_t>(s.num_ranks) * static_cast<std::size_t>(s.num_ranks);
      sent_.resize(links);
      awaited_.resize(links);
    }
    for (std::size_t r = 0; r < ranks_.size(); ++r) ranks_[r].intervals.resize(s.actions[r].size());
  }

  timeline run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (int rank = 0; rank < s_.num_ranks; ++rank) moved = advance(rank) || moved;
    }
    expect_finished();
    timeline t;
    for (state& r : ranks_) t.makespan = std::max(t.makespan, r.last_computation);
    for (state& r : ranks_) {
      t.intervals.push_back(std::move(r.intervals));
      t.busy.push_back(r.busy);
      t.idle.push_back(t.makespan - r.busy);
    }
    return t;
  }

 private:
  static constexpr std::int64_t never = -1;

  struct state {
    std::size_t position = 0;
    bool posted = false;  ///< The batch at `position` has been posted.
    std::int64_t now = 0;
    std::int64_t busy = 0;
    std::int64_t last_computation = 0;
    std::vector<interval> intervals;
  };

  /// One message as its receiver knows it.
  struct message {
    int stage;        ///< Stage on the receiving rank.
    int micro_batch;  ///< Whose.
    bool forward;     ///< An input, else a gradient.
    std::int64_t posted;
  };

  std::size_t index(int stage, int micro_batch) const {
    return static_cast<std::size_t>(stage) * static_cast<std::size_t>(s_.num_micro_batches) +
           static_cast<std::size_t>(micro_batch);
  }
  state& of(int rank) { return ranks_[static_cast<std::size_t>(rank)]; }
  const std::vector<action>& list(int rank) const { return s_.actions[static_cast<std::size_t>(rank)]; }

  bool advance(int rank) {
    state& r = of(rank);
    bool moved = false;
    while (r.position < list(rank).size()) {
      const bool talks = is_communication(list(rank)[r.position].kind);
      if (!(talks ? (how_ == messages::buffered ? skip(rank) : exchange(rank)) : compute(rank))) break;
      moved = true;
    }
    return moved;
  }

  bool skip(int rank) {
    state& r = of(rank);
    r.intervals[r.position++] = {r.now, r.now};
    return true;
  }

  // Computation -------------------------------------------------------------------------------------------------------

  /// When the inputs of the forward or backward half are there; `never` while one is missing.
  std::int64_t forward_ready(int rank, const action& a) const {
    const int stage = s_.stage_of(rank, a.chunk);
    return stage == 0 ? 0 : input_[index(stage, a.micro_batch)];
  }
  std::int64_t backward_ready(int rank, const action& a) const {
    const int stage = s_.stage_of(rank, backward_chunk_of(a)), micro_batch = backward_micro_batch_of(a);
    const std::int64_t saved = saved_[index(stage, micro_batch)];
    if (saved == never || stage + 1 == s_.num_stages) return saved;
    const std::int64_t gradient = gradient_[index(stage, micro_batch)];
    return gradient == never ? never : std::max(saved, gradient);
  }
  std::int64_t ready(int rank, const action& a) const {
    switch (a.kind) {
      case action_kind::forward:
        return forward_ready(rank, a);
      case action_kind::backward_weights:
        return differentiated_[index(s_.stage_of(rank, a.chunk), a.micro_batch)];
      case action_kind::overlapped: {
        const std::int64_t f = forward_ready(rank, a), b = backward_ready(rank, a);
        return f == never || b == never ? never : std::max(f, b);
      }
      default:
        return backward_ready(rank, a);
    }
  }

  std::int64_t duration(int rank, const action& a) const {
    const int stage = s_.stage_of(rank, a.chunk);
    const stage_times& t = c_.of(stage);
    switch (a.kind) {
      case action_kind::forward:
        return t.forward;
      case action_kind::backward:
        return t.backward;
      case action_kind::backward_input:
        return t.backward_input;
      case action_kind::backward_weights:
        return t.backward_weights;
      case action_kind::overlapped:
        return c_.overlapped(stage, s_.stage_of(rank, a.backward_chunk));
      default:
        return 0;
    }
  }

  bool compute(int rank) {
    state& r = of(rank);
    const action& a = list(rank)[r.position];
    const std::int64_t inputs = ready(rank, a);
    if (inputs == never) return false;
    const std::int64_t begin = std::max(r.now, inputs), took = duration(rank, a);
    r.now = r.last_computation = begin + took;
    r.busy += took;
    r.intervals[r.position++] = {begin, r.now};
    if (has_forward(a.kind)) finish_forward(rank, s_.stage_of(rank, a.chunk), a.micro_batch, r.now);
    if (has_backward_input(a.kind)) {
      finish_backward(rank, s_.stage_of(rank, backward_chunk_of(a)), backward_micro_batch_of(a), r.now);
    }
    return true;
  }

  void finish_forward(int rank, int stage, int micro_batch, std::int64_t now) {
    saved_[index(stage, micro_batch)] = now;
    if (stage + 1 == s_.num_stages) return;
    const bool stays = s_.rank_of(stage + 1, micro_batch) == rank;
    if (stays) {
      input_[index(stage + 1, micro_batch)] = now;
    } else if (how_ == messages::buffered) {
      input_[index(stage + 1, micro_batch)] = now + c_.link(stage);
    }
  }
  void finish_backward(int rank, int stage, int micro_batch, std::int64_t now) {
    differentiated_[index(stage, micro_batch)] = now;
    if (stage == 0) return;
    const bool stays = s_.rank_of(stage - 1, micro_batch) == rank;
    if (stays) {
      gradient_[index(stage - 1, micro_batch)] = now;
    } else if (how_ == messages::buffered) {
      gradient_[index(stage - 1, micro_batch)] = now + c_.link(stage - 1);
    }
  }

  // Communication -----------------------------------------------------------------------------------------------------

  std::size_t link_index(int from, int to) const {
    return static_cast<std::size_t>(from) * static_cast<std::size_t>(s_.num_ranks) + static_cast<std::size_t>(to);
  }

  /// Posts the batch at the rank's position, and passes it once the other side of every message has been posted.
  bool exchange(int rank) {
    state& r = of(rank);
    const std::size_t end = batch_end(list(rank), r.position);
    bool moved = false;
    if (!r.posted) {
      for (std::size_t i = r.position; i < end; ++i) post(rank, list(rank)[i], r.now);
      r.posted = moved = true;
    }
    std::int64_t done = r.now;
    for (std::size_t i = r.position; i < end; ++i) {
      const std::int64_t arrival = arrival_of(rank, r.position, i);
      if (arrival == never) return moved;
      done = std::max(done, arrival);
    }
    for (; r.position < end; ++r.position) {
      const action& a = list(rank)[r.position];
      r.intervals[r.position] = {r.now, done};
      if (a.kind == action_kind::receive_forward) {
        input_[index(s_.stage_of(rank, a.chunk), a.micro_batch)] = done;
      } else if (a.kind == action_kind::receive_backward) {
        gradient_[index(s_.stage_of(rank, a.chunk), a.micro_batch)] = done;
      }
    }
    r.now = done;
    r.posted = false;
    return true;
  }

  void post(int rank, const action& a, std::int64_t now) {
    const int peer = s_.peer_of(rank, a), stage = s_.stage_of(rank, a.chunk);
    const bool forward = a.kind == action_kind::send_forward || a.kind == action_kind::receive_forward;
    if (is_send(a.kind)) {
      const int there = forward ? stage + 1 : stage - 1;
      sent_[link_index(rank, peer)].push_back({there, a.micro_batch, forward, now});
    } else {
      awaited_[link_index(peer, rank)].push_back({stage, a.micro_batch, forward, now});
    }
  }

  /// When the message of action `i` of the posted batch that begins at `first` arrives; `never` while it is not
  /// matched. The messages posted on a link are a queue; the ones of this batch are at its end.
  std::int64_t arrival_of(int rank, std::size_t first, std::size_t i) const {
    const action& a = list(rank)[i];
    const int peer = s_.peer_of(rank, a);
    const bool sends = is_send(a.kind);
    const std::size_t link = sends ? link_index(rank, peer) : link_index(peer, rank);
    const auto &mine = sends ? sent_[link] : awaited_[link], &theirs = sends ? awaited_[link] : sent_[link];
    std::size_t later = 0;  // messages on the link that the batch posts after this one
    for (std::size_t k = i + 1; k < list(rank).size() && is_communication(list(rank)[k].kind); ++k) {
      const action& other = list(rank)[k];
      if (is_send(other.kind) == sends && s_.peer_of(rank, other) == peer) ++later;
    }
    const std::size_t number = mine.size() - 1 - later;
    if (number >= theirs.size()) return never;
    const message &m = mine[number], &n = theirs[number];
    TESSERA_EXPECTS(m.stage == n.stage && m.micro_batch == n.micro_batch && m.forward == n.forward,
                    "schedule '" << s_.name << "': " << at(rank, i, a) << " is message " << number << " from rank "
                                 << (sends ? rank : peer) << " to rank " << (sends ? peer : rank)
                                 << ", where the other side has " << (n.forward ? "the input" : "the gradient")
                                 << " of stage " << n.stage << " for micro-batch " << n.micro_batch
                                 << "; the k-th send between two ranks meets the k-th receive (batch from action "
                                 << first << ")");
    return std::max(m.posted, n.posted) + c_.link(m.forward ? m.stage - 1 : m.stage);
  }

  // Errors ------------------------------------------------------------------------------------------------------------

  std::string cause(int rank) const {
    const state& r = ranks_[static_cast<std::size_t>(rank)];
    const action& a = list(rank)[r.position];
    if (is_communication(a.kind)) {
      for (std::size_t i = r.position; i < batch_end(list(rank), r.position); ++i) {
        if (arrival_of(rank, r.position, i) == never) {
          return at(rank, i, list(rank)[i]) + " waits for rank " + std::to_string(s_.peer_of(rank, list(rank)[i]));
        }
      }
    }
    const std::string where = at(rank, r.position, a);
    if (has_forward(a.kind) && forward_ready(rank, a) == never) return where + " waits for its input";
    if (a.kind == action_kind::backward_weights) return where + " waits for its input part";
    const int stage = s_.stage_of(rank, backward_chunk_of(a));
    const bool saved = saved_[index(stage, backward_micro_batch_of(a))] != never;
    return where + (saved ? " waits for the gradient of its output" : " waits for its forward");
  }

  void expect_finished() const {
    std::string stuck;
    for (int rank = 0; rank < s_.num_ranks; ++rank) {
      if (ranks_[static_cast<std::size_t>(rank)].position == list(rank).size()) continue;
      stuck += (stuck.empty() ? "" : "; ") + cause(rank);
    }
    TESSERA_EXPECTS(stuck.empty(), "schedule '" << s_.name << "' cannot go on: " << stuck);
  }

  const schedule& s_;
  const costs& c_;
  messages how_;
  std::vector<state> ranks_;
  // [stage, micro-batch]: when the input and the output's gradient are on the rank, when forward and input gradient
  // have been computed.
  std::vector<std::int64_t> input_, gradient_, saved_, differentiated_;
  std::vector<std::vector<message>> sent_, awaited_;  ///< [from, to]: all that was posted, in order.
};

}  // namespace pipeline::detail

namespace pipeline {

inline timeline simulate(const schedule& s, const costs& c, messages how) {
  detail::expect_well_formed(s);
  expect_costs(c, s.num_stages);
  timeline t = detail::clockwork(s, c, how).run();
  for (const memory_peak& peak : peak_memory(s)) t.live_activations.push_back(peak.activations);
  return t;
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
