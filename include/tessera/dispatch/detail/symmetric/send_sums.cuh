// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/gemm/detail/hopper/ptx.cuh>

// The way home: one kernel with two roles in every block. Sending warps add up this rank's expert rows of a token that
// came from elsewhere, round the sum once and store it at the token's home; home warps add this rank's rows of its own
// tokens, and to them what comes back. A flag for every few tokens lets home begin while rows are under way.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

inline constexpr int send_warps = 6;
inline constexpr int home_warps = 6;
inline constexpr int sums_threads = (send_warps + home_warps) * warp_size;
inline constexpr int sum_vectors = 8;  // 16 bytes of each row that a lane adds up at a time
inline constexpr int sum_piece_bytes = sum_vectors * warp_size * 16;
inline constexpr int sum_slots = 3;    // pieces that a warp has under way from memory
inline constexpr int sum_buffers = 2;  // pieces of a sending warp that are being stored

// The unit of work of a warp, and what one flag stands for: some pieces of the rows of a few neighbouring tokens. The
// same on all ranks, whatever their blocks.
struct sums_plan {
  int chunk_tokens;
  int parts;        // of a row
  int part_pieces;  // of a part; the last has fewer
  int units;        // chunks * parts, as many flags of each peer

  static sums_plan make(std::int64_t max_tokens, std::int64_t row_bytes) {
    const auto up = [](std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); };
    sums_plan plan;
    plan.chunk_tokens = std::max(1, up(max_tokens, comm::max_symmetric_chunks / 2));
    const int chunks = up(max_tokens, plan.chunk_tokens);
    const int pieces = up(row_bytes, sum_piece_bytes);
    plan.part_pieces = up(pieces, std::clamp(comm::max_symmetric_chunks / std::max(chunks, 1), 1, pieces));
    plan.parts = up(pieces, plan.part_pieces);
    plan.units = chunks * plan.parts;
    return plan;
  }
};

template <class S, class A, class Out>
struct sums_task {
  comm::symmetric_view view;
  matrix_view<const S> pairs;         // expert rows, or [R * max_tokens] sums where `summed`
  const std::int32_t* expert_row_of;  // [R * max_tokens, K]
  const A* weights;                   // of expert rows; null: 1
  S* returned;                        // [R * max_tokens, d] in the window; row r * max_tokens + t is rank r's part of t
  const std::uint32_t* destinations;  // [T]
  int num_tokens;                     // T
  int max_tokens;
  int top_k;
  sums_plan plan;
  bool summed;
  matrix_view<const S> plus;  // [T, d]; no data: nothing
  matrix_view<Out> y;
};

// Shared memory of a block: rings of pieces that arrive, buffers of pieces that leave, and barriers.
inline constexpr int sums_ring_bytes = sum_slots * sum_piece_bytes;
inline constexpr int sums_shared_bytes = (send_warps + home_warps) * (sums_ring_bytes + sum_slots * 8) +
                                         send_warps * sum_buffers * sum_piece_bytes + bulk::line;

// Rows that make up one token's sum, one of each list in each lane: first the expert rows with their weights, then rows
// that are added as they are.
template <class S, class A>
struct token_sources {
  const S* weighted = nullptr;
  const S* plain = nullptr;
  A weight = A(1);
  unsigned weighted_here = 0;  // lanes that have one
  unsigned plain_here = 0;
  bool any = false;  // a pair of the token belongs to this rank, though perhaps its row was dropped
};

template <class S, class A, class Out>
__device__ __forceinline__ token_sources<S, A> find_sources(const sums_task<S, A, Out>& task, std::int64_t row,
                                                            int lane) {
  token_sources<S, A> found;
  std::int32_t place = -1;
  if (lane < task.top_k) place = __ldg(task.expert_row_of + row * task.top_k + lane);
  found.any = __any_sync(full_warp, place != -1) != 0;
  if (task.summed) {
    place = found.any && lane == 0 ? static_cast<std::int32_t>(row) : -1;
  } else if (task.weights != nullptr && place >= 0) {
    found.weight = __ldg(task.weights + place);
  }
  if (place >= 0) found.weighted = task.pairs.row(place);
  found.weighted_here = __ballot_sync(full_warp, place >= 0);
  return found;
}

// One token of a unit that a warp adds up: columns [begin, end) of its sources.
template <class S, class A>
struct sum_item {
  bool exists = false;
  int unit = -1;
  int token = 0;
  int begin = 0;
  int end = 0;
  token_sources<S, A> sources;
};

// What of an item has not been asked for yet.
struct fetch_cursor {
  int begin;
  unsigned weighted_left;
  unsigned plain_left;
  template <class S, class A>
  __device__ void start(const sum_item<S, A>& item) {
    begin = item.exists && (item.sources.weighted_here | item.sources.plain_here) != 0 ? item.begin : item.end;
    weighted_left = item.sources.weighted_here;
    plain_left = item.sources.plain_here;
  }
};

// A warp's stream of pieces: the rows of an item piece by piece, then those of the next item, always as far ahead as
// the ring has room.
template <class S, class A>
class piece_stream {
 public:
  static constexpr int width = 16 / sizeof(S);
  static constexpr int piece = sum_piece_bytes / static_cast<int>(sizeof(S));

  __device__ piece_stream(unsigned char* ring, std::uint32_t barriers, int lane)
      : ring_(ring), barriers_(barriers), lane_(lane) {
    if (lane == 0) {
      for (int i = 0; i < sum_slots; ++i) hopper::barrier_init(barriers + static_cast<std::uint32_t>(8 * i), 1);
      hopper::barrier_init_fence();
    }
    __syncwarp();
  }

  // Asks for as much as there is room for.
  __device__ void fill(const sum_item<S, A>& item, fetch_cursor& at, const sum_item<S, A>& next, fetch_cursor& then) {
    while (under_way_ < sum_slots) {
      if (at.begin < item.end) {
        fetch(item, at);
      } else if (next.exists && then.begin < next.end) {
        fetch(next, then);
      } else {
        return;
      }
    }
  }

  // Adds the oldest piece that is under way, when it is there.
  __device__ void add(A (&sum)[sum_vectors][width], A weight) {
    const int slot = taken_ % sum_slots;
    hopper::barrier_wait(barriers_ + static_cast<std::uint32_t>(8 * slot),
                         static_cast<std::uint32_t>(taken_ / sum_slots) & 1u);
    const auto* const pieces = reinterpret_cast<const elements<S, width>*>(ring_ + slot * sum_piece_bytes) + lane_;
#pragma unroll
    for (int v = 0; v < sum_vectors; ++v) {
      const elements<S, width> part = pieces[v * warp_size];
#pragma unroll
      for (int j = 0; j < width; ++j) sum[v][j] += weight * widen<A>(part.value[j]);
    }
    ++taken_;
    --under_way_;
    __syncwarp();  // before the place is filled again
  }

 private:
  __device__ void fetch(const sum_item<S, A>& item, fetch_cursor& at) {
    const bool plain = at.weighted_left == 0;
    const unsigned left = plain ? at.plain_left : at.weighted_left;
    const auto own = reinterpret_cast<unsigned long long>(plain ? item.sources.plain : item.sources.weighted);
    const auto* const row = reinterpret_cast<const S*>(__shfl_sync(full_warp, own, __ffs(static_cast<int>(left)) - 1));
    const int slot = (taken_ + under_way_) % sum_slots;
    if (lane_ == 0) {
      const int bytes = min(item.end - at.begin, piece) * static_cast<int>(sizeof(S));
      const std::uint32_t barrier = barriers_ + static_cast<std::uint32_t>(8 * slot);
      hopper::barrier_arrive_expect(barrier, static_cast<std::uint32_t>(bytes));
      bulk::load(hopper::shared_address(ring_ + slot * sum_piece_bytes), row + at.begin, bytes, barrier);
    }
    ++under_way_;
    (plain ? at.plain_left : at.weighted_left) = left & (left - 1);
    if ((at.weighted_left | at.plain_left) != 0) return;
    at.weighted_left = item.sources.weighted_here;
    at.plain_left = item.sources.plain_here;
    at.begin += piece;
  }

  unsigned char* ring_;
  std::uint32_t barriers_;
  int lane_;
  int taken_ = 0;
  int under_way_ = 0;
};

// Walks over units as warps of all blocks ask for them, by a counter: `find(item)` fills in the sources of a token, or
// says that there is nothing to do for it; `finish(item, begin, sum)` gets every piece of the sum; `leave(unit)` is
// called when a unit's tokens are done. Which warp does a unit does not change its sums.
template <class S, class A, class Find, class Finish, class Leave>
__device__ __forceinline__ void add_up(const sums_plan& plan, int hidden, std::uint32_t* counter, int units,
                                       int units_per_part, int num_tokens, int lane, piece_stream<S, A>& stream,
                                       Find find, Finish finish, Leave leave) {
  constexpr int piece = piece_stream<S, A>::piece;
  constexpr int width = piece_stream<S, A>::width;
  // A lane asks a unit ahead, so that nobody waits for the answer.
  std::uint32_t asked = 0;
  const auto ask = [&] {
    if (lane == 0) asked = atomicAdd(counter, 1u);
  };
  const auto enter = [&](sum_item<S, A>& item) {
    item.unit = static_cast<int>(__shfl_sync(full_warp, asked, 0));
    ask();
    const int part = item.unit / units_per_part % plan.parts;
    item.token = item.unit / units_per_part / plan.parts * plan.chunk_tokens;
    item.begin = part * plan.part_pieces * piece;
    item.end = min(item.begin + plan.part_pieces * piece, hidden);
  };
  // The first token from `item` on that has something to do. @param used Whether one of its unit was found before.
  const auto settle = [&](sum_item<S, A>& item, bool used) {
    item.exists = false;
    while (item.unit < units) {
      const int end = min((item.unit / units_per_part / plan.parts + 1) * plan.chunk_tokens, num_tokens);
      for (; item.token < end; ++item.token) {
        if (find(item)) {
          item.exists = true;
          return;
        }
      }
      if (!used) leave(item.unit);  // nothing of it is under way
      used = false;
      enter(item);
    }
  };
  sum_item<S, A> item;
  ask();
  enter(item);
  settle(item, false);
  fetch_cursor at;
  at.start(item);
  while (item.exists) {
    sum_item<S, A> next = item;
    ++next.token;
    settle(next, true);
    fetch_cursor then;
    then.start(next);
    for (int begin = item.begin; begin < item.end; begin += piece) {
      A sum[sum_vectors][width] = {};
      for (unsigned left = item.sources.weighted_here; left != 0; left &= left - 1) {
        stream.fill(item, at, next, then);
        stream.add(sum, __shfl_sync(full_warp, item.sources.weight, __ffs(static_cast<int>(left)) - 1));
      }
      for (unsigned left = item.sources.plain_here; left != 0; left &= left - 1) {
        stream.fill(item, at, next, then);
        stream.add(sum, A(1));
      }
      finish(item, begin, sum);
    }
    if (!next.exists || next.unit != item.unit) leave(item.unit);
    item = next;
    at = then;
  }
}

template <class S, class A, class Out>
__device__ __forceinline__ void send_role(const sums_task<S, A, Out>& task, std::uint32_t generation,
                                          piece_stream<S, A>& stream, unsigned char* buffers, int lane) {
  constexpr int width = 16 / sizeof(S);
  const comm::symmetric_view& view = task.view;
  const int peers = view.size - 1;
  const int hidden = static_cast<int>(task.y.cols);
  const auto peer_of = [&](int unit) { return (view.rank + 1 + unit % peers) % view.size; };
  int buffer = 0;
  if (peers == 0) return;
  add_up<S, A>(
      task.plan, hidden, view.tickets + 1, task.plan.units * peers, peers, task.max_tokens, lane, stream,
      [&](sum_item<S, A>& item) {
        item.sources =
            find_sources(task, static_cast<std::int64_t>(peer_of(item.unit)) * task.max_tokens + item.token, lane);
        return item.sources.any;
      },
      [&](const sum_item<S, A>& item, int begin, A(&sum)[sum_vectors][width]) {
        unsigned char* const place = buffers + buffer * sum_piece_bytes;
        if (lane == 0) bulk::wait_read<sum_buffers - 1>();
        __syncwarp();
#pragma unroll
        for (int v = 0; v < sum_vectors; ++v) {
          elements<S, width> out;
#pragma unroll
          for (int j = 0; j < width; ++j) out.value[j] = static_cast<S>(sum[v][j]);
          reinterpret_cast<elements<S, width>*>(place)[v * warp_size + lane] = out;
        }
        bulk::fence_shared();
        __syncwarp();
        if (lane == 0) {
          S* const row = task.returned + (static_cast<std::int64_t>(view.rank) * task.max_tokens + item.token) * hidden;
          bulk::store(at_peer(view, row + begin, peer_of(item.unit)), hopper::shared_address(place),
                      min(item.end - begin, piece_stream<S, A>::piece) * static_cast<int>(sizeof(S)));
          bulk::commit();
        }
        buffer = buffer + 1 == sum_buffers ? 0 : buffer + 1;
      },
      [&](int unit) {
        if (lane != 0) return;
        bulk::wait_written<0>();
        post(at_peer(view, view.chunks + view.rank * comm::max_symmetric_chunks + unit / peers, peer_of(unit)),
             generation);
      });
}

template <class S, class A, class Out>
__device__ __forceinline__ void home_role(const sums_task<S, A, Out>& task, std::uint32_t generation,
                                          piece_stream<S, A>& stream, int lane) {
  constexpr int width = 16 / sizeof(S);
  const comm::symmetric_view& view = task.view;
  const int hidden = static_cast<int>(task.y.cols);
  int awaited = -1;
  bool usable = true;
  add_up<S, A>(
      task.plan, hidden, view.tickets + 2, task.plan.units, 1, task.num_tokens, lane, stream,
      [&](sum_item<S, A>& item) {
        if (item.unit != awaited) {
          awaited = item.unit;
          if (usable && lane < view.size && lane != view.rank) {
            usable = await(view, view.chunks + lane * comm::max_symmetric_chunks + item.unit, generation, lane,
                           symmetric_step::chunk);
          }
          usable = __all_sync(full_warp, usable) != 0;
          __syncwarp();                                     // one lane has seen the flag, another reads
          asm volatile("fence.proxy.async;" ::: "memory");  // what peers wrote is read by the copy engine
        }
        if (!usable) return false;
        item.sources = find_sources(task, static_cast<std::int64_t>(view.rank) * task.max_tokens + item.token, lane);
        const std::uint32_t others = __ldg(task.destinations + item.token) & ~(1u << view.rank);
        if (lane < view.size && ((others >> lane) & 1u) != 0) {
          item.sources.plain =
              task.returned + (static_cast<std::int64_t>(lane) * task.max_tokens + item.token) * hidden;
        }
        if (lane == view.size && task.plus.data != nullptr) item.sources.plain = task.plus.row(item.token);
        item.sources.plain_here = __ballot_sync(full_warp, item.sources.plain != nullptr);
        return true;
      },
      [&](const sum_item<S, A>& item, int begin, A(&sum)[sum_vectors][width]) {
#pragma unroll
        for (int v = 0; v < sum_vectors; ++v) {
          const int at = begin + (v * warp_size + lane) * width;
          if (at >= item.end) continue;
          elements<Out, width> out;
#pragma unroll
          for (int j = 0; j < width; ++j) out.value[j] = static_cast<Out>(sum[v][j]);
          store_elements(task.y.row(item.token) + at, out);
        }
      },
      [](int) {});
}

template <class S, class A, class Out>
__launch_bounds__(sums_threads, 1) TESSERA_KERNEL send_sums_kernel(const __grid_constant__ sums_task<S, A, Out> task) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const comm::symmetric_view& view = task.view;
  if (block_failed(view)) return;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const std::uint32_t generation = next_generation(view);
  if (blockIdx.x == 0 && warp == 0) announce(view, generation);
  if (!all_entered(view, generation)) return;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const std::uint32_t address = hopper::shared_address(shared_bytes);
  unsigned char* const rings = shared_bytes + (bulk::next_line(address) - address);
  unsigned char* const buffers = rings + (send_warps + home_warps) * sums_ring_bytes;
  const std::uint32_t barriers = hopper::shared_address(buffers) + send_warps * sum_buffers * sum_piece_bytes;
  piece_stream<S, A> stream(rings + warp * sums_ring_bytes, barriers + static_cast<std::uint32_t>(warp * sum_slots * 8),
                            lane);
  if (warp < send_warps) {
    send_role(task, generation, stream, buffers + warp * sum_buffers * sum_piece_bytes, lane);
  } else {
    home_role(task, generation, stream, lane);
  }
  __syncthreads();
  if (threadIdx.x == 0 && last_block(view)) {
    view.tickets[1] = view.tickets[2] = 0;
    finish(view, generation);
  }
#else
  static_cast<void>(task);
#endif
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END

#pragma nv_diagnostic pop
