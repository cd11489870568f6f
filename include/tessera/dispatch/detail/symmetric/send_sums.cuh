// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/detail/launch.cuh>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/late_flags.cuh>
#include <tessera/dispatch/detail/symmetric/piece_stream.cuh>
#include <tessera/dispatch/detail/symmetric/sums_units.cuh>
#include <tessera/gemm/detail/hopper/ptx.cuh>

// The way home: one kernel with two roles in every block. Sending warps add up this rank's expert rows of a token that
// came from elsewhere, round the sum once and store it at the token's home; home warps add this rank's rows of its own
// tokens, and to them what comes back; warps that have nothing left to send help at home. A flag for every few tokens
// lets home begin while rows are under way.
//
// A warp waits for nothing but its rows: where they are is looked up two tokens ahead, rows are brought to shared
// memory by the TMA as far ahead as there is room, and the flag of a unit is posted when later pieces have been
// sent.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

// Shared memory of a block: rings of pieces that arrive, buffers of pieces that leave, and barriers.
inline constexpr int sums_ring_bytes = sum_slots * sum_piece_bytes;
inline constexpr int sums_shared_bytes = (send_warps + home_warps) * (sums_ring_bytes + sum_slots * 8) +
                                         send_warps * (sum_buffers * sum_piece_bytes + 4) + bulk::line;

// Tells the home of a unit that it is there, which this thread knows.
__device__ __forceinline__ void post_unit(const comm::symmetric_view& view, std::uint32_t generation, int unit) {
  const int peers = view.size - 1;
  const int chunk = unit / peers;
  post(at_peer(view, view.chunks + view.rank * comm::max_symmetric_chunks + chunk,
               peer_of_send(view, unit - chunk * peers)),
       generation);
}

// Makes all sums of a role that this warp gets. `row_of(at)` is the token's row of `expert_row_of`; `complete(item,
// any)` adds the plain rows, `any` says whether a pair of the token belongs to this rank (though perhaps its row was
// dropped), and answers whether the token has a sum; `finish(item, begin, sum)` gets every piece of it; `leave(at)` is
// called behind the last token of a unit.
template <bool Home, class S, class A, class Out, class RowOf, class Complete, class Ready, class Finish, class Leave>
__device__ __forceinline__ void add_up(const sums_task<S, A, Out>& task, unit_walk& walk, int lane,
                                       piece_stream<S, A>& stream, RowOf row_of, Complete complete, Ready ready,
                                       Finish finish, Leave leave) {
  constexpr int piece = piece_stream<S, A>::piece;
  constexpr int width = piece_stream<S, A>::width;
  const int hidden = static_cast<int>(task.y.cols);
  // Three steps, a token apart, so that no step waits for the loads of the one before. Plain loads: this kernel starts
  // before what they read is written, and others could be moved ahead of the wait for it.
  const auto look_up = [&](sum_item<S, A>& item) {
    item.place = -1;
    item.others = 0;
    if (walk.at_end(item.at)) return;
    if (lane < task.top_k) item.place = task.expert_row_of[row_of(item.at) * task.top_k + lane];
    if constexpr (Home) item.others = task.destinations[item.at.token];
  };
  const auto resolve = [&](sum_item<S, A>& item) {
    item.weight = A(1);
    item.weighted = item.plain = nullptr;
    item.begin = item.end = 0;
    item.weighted_here = item.plain_here = 0;
    if (walk.at_end(item.at)) return;
    const bool any = __any_sync(full_warp, item.place != -1) != 0;
    if (task.summed) {
      item.place = any && lane == 0 ? static_cast<std::int32_t>(row_of(item.at)) : -1;
    } else if (task.weights != nullptr && item.place >= 0) {
      item.weight = task.weights[item.place];
    }
    item.weighted_here = __ballot_sync(full_warp, item.place >= 0);
    if (item.place >= 0) item.weighted = task.pairs.row(item.place);
    if (!complete(item, any)) return;
    const int columns = (Home ? task.home_plan : task.plan).part_pieces * piece;
    item.begin = item.at.part * columns;
    item.end = min(item.begin + columns, hidden);
  };
  sum_item<S, A> item, next;
  fetch_cursor at, then;
  walk.enter(item.at);
  look_up(item);
  resolve(item);
  at.start(item);
  // The first rows are under way before this warp knows its next unit, which all warps ask for at this time.
  next.begin = next.end = 0;
  then = {};
  if (!walk.at_end(item.at)) stream.template fill<Home>(item, at, next, then, ready);
  next.at = walk.after(item.at);
  look_up(next);
  while (!walk.at_end(item.at)) {
    sum_item<S, A> later;
    later.at = walk.after(next.at);
    look_up(later);
    resolve(next);
    then.start(next);
    for (int begin = item.begin; begin < item.end; begin += piece) {
      A sum[sum_vectors][width] = {};
      unsigned weighted = item.weighted_here;
      unsigned plain = item.plain_here;
      while ((weighted | plain) != 0) {
        stream.template fill<Home>(item, at, next, then, ready);
        const A weight = __shfl_sync(full_warp, item.weight, __ffs(static_cast<int>(weighted)) - 1);
        stream.add(sum, weighted != 0 ? weight : A(1));
        if (weighted != 0) {
          weighted &= weighted - 1;
        } else {
          plain &= plain - 1;
        }
      }
      finish(item, begin, sum);
    }
    if (next.at.unit != item.at.unit) leave(item.at);
    item = next;
    at = then;
    next = later;
  }
}

template <class S, class A, class Out>
__device__ __forceinline__ void send_role(const sums_task<S, A, Out>& task, std::uint32_t generation,
                                          piece_stream<S, A>& stream, unsigned char* buffers, flag_mail mail, int warp,
                                          int first, int lane) {
  constexpr int width = 16 / sizeof(S);
  const comm::symmetric_view& view = task.view;
  const int hidden = static_cast<int>(task.y.cols);
  const int peers = view.size - 1;
  unit_walk walk(task.plan, peers, task.max_tokens, view.tickets + 1, 0, first, lane);
  late_post flags(mail, warp, [&](int unit) { post_unit(view, generation, unit); });
  int buffer = 0;
  bool entered = false, usable = true;
  add_up<false>(
      task, walk, lane, stream,
      [&](const unit_place& at) {
        return static_cast<std::int64_t>(peer_of_send(view, at.peer)) * task.max_tokens + at.token;
      },
      [&](sum_item<S, A>&, bool any) { return any; }, [](const sum_item<S, A>&, bool) { return true; },
      [&](const sum_item<S, A>& item, int begin, A(&sum)[sum_vectors][width]) {
        if (!entered) {
          // peers may be written to once their streams have come here
          if (lane < view.size && lane != view.rank)
            usable = await(view, view.entered + lane, generation, lane, symmetric_step::entry);
          usable = __all_sync(full_warp, usable) != 0;
          entered = true;
        }
        if (!usable) return;
        unsigned char* const place = buffers + buffer * sum_piece_bytes;
        if (lane == 0) bulk::wait_read<sum_buffers - 1>();
        __syncwarp();
#pragma unroll
        for (int v = 0; v < sum_vectors; ++v)
          reinterpret_cast<elements<S, width>*>(place)[v * warp_size + lane] = round_elements<S>(sum[v]);
        bulk::fence_shared();
        __syncwarp();
        if (lane == 0) {
          S* const row =
              task.returned + (static_cast<std::int64_t>(view.rank) * task.max_tokens + item.at.token) * hidden;
          bulk::store(at_peer(view, row + begin, peer_of_send(view, item.at.peer)), hopper::shared_address(place),
                      min(item.end - begin, piece_stream<S, A>::piece) * static_cast<int>(sizeof(S)));
          bulk::commit();
          flags.sent();
        }
        buffer = buffer + 1 == sum_buffers ? 0 : buffer + 1;
      },
      [&](const unit_place& at) {
        if (lane == 0 && usable) flags.unit(at.unit);
      });
  if (lane == 0) flags.last();
  __syncwarp();
}

template <class S, class A, class Out>
__device__ __forceinline__ void home_role(const sums_task<S, A, Out>& task, std::uint32_t generation,
                                          piece_stream<S, A>& stream, int given, int first, int lane) {
  constexpr int width = 16 / sizeof(S);
  const comm::symmetric_view& view = task.view;
  unit_walk walk(task.home_plan, 1, task.num_tokens, view.tickets + 2, given, first, lane);
  int arrived = -1;    // the last flag that was seen to be there
  bool usable = true;  // after a failure nothing is waited for, and sums are of what stands there
  add_up<true>(
      task, walk, lane, stream,
      [&](const unit_place& at) { return static_cast<std::int64_t>(view.rank) * task.max_tokens + at.token; },
      [&](sum_item<S, A>& item, bool) {
        item.plain_here = item.others & ~(1u << view.rank);
        if (task.plus.data != nullptr) item.plain_here |= 1u << view.size;
        if ((item.plain_here >> lane & 1) != 0) item.plain = task.plain_row(lane, item.at.token);
        return true;
      },
      [&](const sum_item<S, A>& item, bool idle) {
        const int unit = task.plan.flag_of(task.home_plan, item.at.chunk, item.at.part);
        if (unit == arrived || !usable) return true;
        bool here = true;
        if (lane < view.size && lane != view.rank) {
          const std::uint32_t* const flag = view.chunks + lane * comm::max_symmetric_chunks + unit;
          if (idle) {
            here = await(view, view.entered + lane, generation, lane, symmetric_step::entry) &&
                   await(view, flag, generation, lane, symmetric_step::chunk);
          } else {
            here = reached(peek(flag), generation);
          }
        }
        here = __all_sync(full_warp, here) != 0;
        if (!here && !idle) return false;
        usable = here;
        arrived = unit;
        __syncwarp();          // what some lanes have acquired, the one that asks has, too
        bulk::fence_global();  // what peers wrote is read by the TMA
        return true;
      },
      [&](const sum_item<S, A>& item, int begin, A(&sum)[sum_vectors][width]) {
#pragma unroll
        for (int v = 0; v < sum_vectors; ++v) {
          const int at = begin + (v * warp_size + lane) * width;
          if (at < item.end) store_elements(task.y.row(item.at.token) + at, round_elements<Out>(sum[v]));
        }
      },
      [](const unit_place&) {});
}

template <class S, class A, class Out>
__launch_bounds__(sums_threads, 1) TESSERA_KERNEL send_sums_kernel(const __grid_constant__ sums_task<S, A, Out> task) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const comm::symmetric_view& view = task.view;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const std::uint32_t address = hopper::shared_address(shared_bytes);
  unsigned char* const rings = shared_bytes + (bulk::next_line(address) - address);
  unsigned char* const buffers = rings + (send_warps + home_warps) * sums_ring_bytes;
  const std::uint32_t barriers = hopper::shared_address(buffers) + send_warps * sum_buffers * sum_piece_bytes;
  const int ring = min(warp, send_warps + home_warps - 1);  // the last warp has none
  piece_stream<S, A> stream(rings + ring * sums_ring_bytes, barriers + static_cast<std::uint32_t>(ring * sum_slots * 8),
                            lane, warp == ring);
  const flag_mail mail{barriers + (send_warps + home_warps) * sum_slots * 8};
  if (warp == 0 && lane < send_warps) mail.write(lane, 0);
  await_stream();
  // What a warp sends first is the counter's, too: a number of its own would be a unit that nobody sends while its
  // block finds no room, and another kernel may keep that room until those who wait for the unit have come home. A
  // block asks once for all of its warps, while it looks for failures.
  __shared__ int first_sent;
  if (threadIdx.x == 0 && view.size > 1)
    first_sent = static_cast<int>(atomicAdd(view.tickets + 1, static_cast<unsigned>(task.senders)));
  const std::uint32_t generation = next_generation(view);
  if (block_failed(view)) return;  // a barrier of the block, behind which the mail is empty
  if (blockIdx.x == 0 && warp == send_warps + home_warps) announce(view, generation);
  const int grid = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x);
  if (warp == send_warps + home_warps) {
    post_role(mail, task.senders, view.size > 1, lane, [&](int unit) { post_unit(view, generation, unit); });
  } else {
    int home = -1;  // helps
    if (warp >= send_warps) {
      home = (warp - send_warps) * grid + block;
    } else if (view.size > 1 && warp < task.senders) {
      send_role(task, generation, stream, buffers + warp * sum_buffers * sum_piece_bytes, mail, warp, first_sent + warp,
                lane);
    }
    home_role(task, generation, stream, grid * home_warps, home, lane);
  }
  __syncthreads();
  let_next_start();  // no block waits for other ranks any more
  if (threadIdx.x == 0 && last_block(view)) finish(view, generation);
#else
  static_cast<void>(task);
#endif
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
