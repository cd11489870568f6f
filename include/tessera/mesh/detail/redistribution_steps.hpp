// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The steps of a redistribution.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/mesh/axes.hpp>
#include <tessera/mesh/detail/redistribution_search.hpp>
#include <tessera/mesh/detail/region_copy.hpp>
#include <tessera/mesh/placement.hpp>
#include <tessera/mesh/redistribution_plan.hpp>
#include <tessera/mesh/region.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// What a sum does not feel. Adding +0.0 would turn -0.0 into +0.0, so it is the negative zero.
template <class T>
constexpr T neutral_of_sum() {
  if constexpr (std::is_floating_point_v<T>) {
    return -T{0};
  } else {
    return T{};
  }
}

/// This rank's group along the axis of a step.
template <class Comm>
struct redistribution_group {
  stream_ref<typename Comm::space> stream;
  Comm& comm;
  const redistribution_plan& plan;
  const placements& before;
  const placements& after;
  const mesh_coordinates& place;
  int axis;

  region held_by(const placements& list, int peer) const {
    mesh_coordinates there = place;
    there[axis] = peer;
    return region(plan.ranks, list, there, plan.tensor);
  }

  template <class T>
  void run(redistribution_kind kind, const T* source, T* target, const redistribution_buffers<T>& buffers) {
    const region old = held_by(before, place[axis]);
    const region now = held_by(after, place[axis]);
    switch (kind) {
      case redistribution_kind::all_gather:
        return gather(old, source, now, target, buffers);
      case redistribution_kind::all_to_all:
        return swap(old, source, now, target, buffers);
      case redistribution_kind::slice:
        return copy_common(stream, old, source, now, target);
      case redistribution_kind::all_reduce:
        if constexpr (reducible<T>) comm.all_reduce(stream, source, target, now.volume(), before[axis].op);
        return;
      case redistribution_kind::reduce_scatter:
        if constexpr (reducible<T>) reduce(old, source, now, target, buffers);
        return;
      case redistribution_kind::contribute:
        if constexpr (reducible<T>) contribute(old, source, now, target);
        return;
    }
  }

  // Equal counts make one all-gather of it: shorter shards travel with unused space behind them.
  template <class T>
  void gather(const region& old, const T* source, const region& now, T* target,
              const redistribution_buffers<T>& buffers) {
    std::int64_t longest = 0;
    for (int peer = 0; peer < comm.size(); ++peer) longest = (std::max)(longest, held_by(before, peer).volume());
    const T* send = source;
    if (old.volume() < longest) {
      copy_rows(stream, source, 0, buffers.send, 0, old.volume(), 1);
      fill_values(stream, buffers.send + old.volume(), longest - old.volume(), T{});
      send = buffers.send;
    }
    comm.all_gather(stream, send, buffers.receive, longest);
    for (int peer = 0; peer < comm.size(); ++peer) {
      copy_common(stream, held_by(before, peer), static_cast<const T*>(buffers.receive) + peer * longest, now, target);
    }
  }

  template <class T>
  void reduce(const region& old, const T* source, const region& now, T* target,
              const redistribution_buffers<T>& buffers) {
    std::int64_t longest = 0;
    for (int peer = 0; peer < comm.size(); ++peer) longest = (std::max)(longest, held_by(after, peer).volume());
    for (int peer = 0; peer < comm.size(); ++peer) {
      const region theirs = held_by(after, peer);
      T* const part = buffers.send + peer * longest;
      copy_common(stream, old, source, theirs, part);
      fill_values(stream, part + theirs.volume(), longest - theirs.volume(), T{});
    }
    T* const receive = now.volume() == longest ? target : buffers.receive;
    comm.reduce_scatter(stream, static_cast<const T*>(buffers.send), receive, longest, before[axis].op);
    if (receive != target) copy_rows(stream, static_cast<const T*>(receive), 0, target, 0, now.volume(), 1);
  }

  template <class T>
  void swap(const region& old, const T* source, const region& now, T* target,
            const redistribution_buffers<T>& buffers) {
    const int ranks = comm.size();
    // The workspace may be device memory; numbers are read on the host in any case.
    std::vector<std::int64_t> numbers(static_cast<std::size_t>(4 * ranks));
    std::int64_t* const send_counts = numbers.data();
    std::int64_t* const send_offsets = send_counts + ranks;
    std::int64_t* const receive_counts = send_offsets + ranks;
    std::int64_t* const receive_offsets = receive_counts + ranks;
    std::int64_t sent = 0;
    std::int64_t received = 0;
    for (int peer = 0; peer < ranks; ++peer) {
      const region common = region::common(old, held_by(after, peer));
      send_offsets[peer] = sent;
      send_counts[peer] = common.volume();
      copy_common(stream, old, source, common, buffers.send + sent);
      sent += send_counts[peer];
      receive_offsets[peer] = received;
      receive_counts[peer] = region::common(held_by(before, peer), now).volume();
      received += receive_counts[peer];
    }
    comm.all_to_all_v(stream, static_cast<const T*>(buffers.send), send_counts, send_offsets, buffers.receive,
                      receive_counts, receive_offsets);
    for (int peer = 0; peer < ranks; ++peer) {
      copy_common(stream, region::common(held_by(before, peer), now),
                  static_cast<const T*>(buffers.receive) + receive_offsets[peer], now, target);
    }
  }

  template <class T>
  void contribute(const region& old, const T* source, const region& now, T* target) {
    const bool counts = before[axis].is_shard() || place[axis] == 0 || after[axis].op != reduce_op::sum;
    fill_values(stream, target, now.volume(), neutral_of_sum<T>());
    if (counts) copy_common(stream, old, source, now, target);
  }
};

}  // namespace detail

TESSERA_NAMESPACE_END
