// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include <tessera/comm/detail/symmetric/flags.cuh>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/send_rows.cuh>
#include <tessera/gemm/detail/hopper/ptx.cuh>

// The way home: one kernel with two roles in every block. Sending warps add up this rank's expert rows of a token that
// came from elsewhere, round the sum once and store it at the token's home; home warps add this rank's rows of its own
// tokens, and to them what comes back; warps that have nothing left to send help at home. A flag for every few tokens
// lets home begin while rows are under way.
//
// A warp waits for nothing but its rows: where they are is looked up two tokens ahead, rows are brought to shared
// memory by the copy engine as far ahead as there is room, and the flag of a unit is posted when later pieces have been
// sent.

// A kernel of a type from an unnamed namespace is local and needs no hiding; nvcc would say so.
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1407

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

inline constexpr int send_warps = 5;
inline constexpr int home_warps = 6;
inline constexpr int sums_threads = (send_warps + home_warps + 1) * warp_size;  // and one that posts flags
inline constexpr int sum_vectors = 8;  // 16 bytes of each row that a lane adds up at a time
inline constexpr int sum_piece_bytes = sum_vectors * warp_size * 16;
inline constexpr int sum_slots = 3;         // pieces that a warp has under way from memory
inline constexpr int sum_buffers = 2;       // pieces of a sending warp that are being stored
inline constexpr int home_part_pieces = 2;  // of a row that a warp adds up at home, at most

// The unit of work of a warp: some pieces of the rows of a few neighbouring tokens. Sending, a unit has one flag at its
// home, so units are the same on all ranks, whatever their blocks; at home, where all warps wait for the last parts to
// come, units are smaller.
struct sums_plan {
  int chunk_tokens;
  int parts;        // of a row
  int part_pieces;  // of a part; the last has fewer
  int units;        // chunks * parts; for sending as many flags of each peer

  static sums_plan make(std::int64_t max_tokens, std::int64_t row_bytes) {
    const int tokens = std::max(1, up(max_tokens, comm::max_symmetric_chunks));
    const int chunks = up(max_tokens, tokens);
    const int pieces = up(row_bytes, sum_piece_bytes);
    const int flags_of_chunk = std::clamp(comm::max_symmetric_chunks / std::max(chunks, 1), 1, pieces);
    return of_parts(chunks, tokens, pieces, up(pieces, flags_of_chunk));
  }
  sums_plan at_home(std::int64_t row_bytes) const {
    return of_parts(units / parts, chunk_tokens, up(row_bytes, sum_piece_bytes),
                    std::gcd(part_pieces, home_part_pieces));
  }
  // The flag of a unit at home, whose plan is `home`.
  __host__ __device__ int flag_of(const sums_plan& home, int chunk, int part) const {
    return chunk / home.parts * parts + part * home.part_pieces / part_pieces;
  }

 private:
  static int up(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }
  static sums_plan of_parts(int chunks, int tokens, int pieces, int part_pieces) {
    const int parts = up(pieces, part_pieces);
    return {tokens, parts, part_pieces, chunks * parts};
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
  sums_plan home_plan;
  bool summed;
  matrix_view<const S> plus;  // [T, d]; no data: nothing
  matrix_view<Out> y;

  // What rank r sent of a token's sum, and behind the ranks what is added in the end.
  __device__ const S* plain_row(int r, int token) const {
    if (r == view.size) return plus.row(token);
    return returned + (static_cast<std::int64_t>(r) * max_tokens + token) * y.cols;
  }
};

// Shared memory of a block: rings of pieces that arrive, buffers of pieces that leave, and barriers.
inline constexpr int sums_ring_bytes = sum_slots * sum_piece_bytes;
inline constexpr int sums_shared_bytes = (send_warps + home_warps) * (sums_ring_bytes + sum_slots * 8) +
                                         send_warps * (sum_buffers * sum_piece_bytes + 4) + bulk::line;

// Whom a sending unit is for: ranks start with their neighbours.
__device__ __forceinline__ int peer_of_send(const comm::symmetric_view& view, int index) {
  const int peer = view.rank + 1 + index;
  return peer < view.size ? peer : peer - view.size;
}

// A token of a unit.
struct unit_place {
  int unit;
  int chunk;  // the unit's number among those for one peer
  int peer;   // among those of the role
  int part;
  int token;
  int token_end;
};

// The units of a role as warps of all blocks get them: each its first by its number, the others by a counter. Which
// warp does a unit does not change its sums.
class unit_walk {
 public:
  // @param units Of each peer. @param first Number of this warp among `warps` that begin with a unit each; other warps
  // pass `warps`.
  __device__ unit_walk(const sums_plan& plan, int peers, int num_tokens, std::uint32_t* counter, int first, int warps,
                       int lane)
      : plan_(plan), peers_(peers), num_tokens_(num_tokens), counter_(counter), warps_(warps), lane_(lane) {
    asked_ = static_cast<std::uint32_t>(first);
    if (first >= warps) ask();
  }

  __device__ bool at_end(const unit_place& at) const { return at.unit >= plan_.units * peers_; }

  // The first token of the next unit that has any. At the end, a unit past the last.
  __device__ void enter(unit_place& at) {
    do {
      at.unit = static_cast<int>(__shfl_sync(full_warp, asked_, 0));
      if (at_end(at)) return;
      ask();  // a unit ahead, so that nobody waits for the answer
      at.chunk = at.unit / peers_;
      at.peer = at.unit - at.chunk * peers_;
      const int tokens = at.chunk / plan_.parts;
      at.part = at.chunk - tokens * plan_.parts;
      at.token = tokens * plan_.chunk_tokens;
      at.token_end = min(at.token + plan_.chunk_tokens, num_tokens_);
    } while (at.token >= num_tokens_);
  }
  __device__ unit_place after(unit_place at) {
    if (!at_end(at) && ++at.token >= at.token_end) enter(at);
    return at;
  }

 private:
  __device__ void ask() {
    if (lane_ == 0) asked_ = static_cast<std::uint32_t>(warps_) + atomicAdd(counter_, 1u);
  }

  const sums_plan& plan_;
  int peers_;
  int num_tokens_;
  std::uint32_t* counter_;
  int warps_;
  int lane_;
  std::uint32_t asked_;
};

// One token's sum that a warp makes: columns [begin, end) of rows that lanes stand for, first expert rows with their
// weights, then rows that are added as they are.
template <class A>
struct sum_item {
  unit_place at;
  std::int32_t place;    // of this lane's expert row; negative: none
  std::uint32_t others;  // at home: ranks that send a part
  A weight;              // of this lane's expert row
  int begin;
  int end;
  unsigned weighted_here;  // lanes that have an expert row
  unsigned plain_here;     // lanes that have another
};

// What of an item has not been asked for yet.
struct fetch_cursor {
  int begin;
  unsigned weighted_left;
  unsigned plain_left;
  template <class A>
  __device__ void start(const sum_item<A>& item) {
    begin = (item.weighted_here | item.plain_here) != 0 ? item.begin : item.end;
    weighted_left = item.weighted_here;
    plain_left = item.plain_here;
  }
};

// A warp's stream of pieces: the rows of an item piece by piece, then those of the next item, always as far ahead as
// the ring has room.
template <class S, class A>
class piece_stream {
 public:
  static constexpr int width = 16 / sizeof(S);
  static constexpr int piece = sum_piece_bytes / static_cast<int>(sizeof(S));

  __device__ piece_stream(unsigned char* ring, std::uint32_t barriers, int lane, bool is_used)
      : ring_(ring), barriers_(barriers), lane_(lane) {
    if (lane == 0 && is_used) {
      for (int i = 0; i < sum_slots; ++i) hopper::barrier_init(barriers + static_cast<std::uint32_t>(8 * i), 1);
      hopper::barrier_init_fence();
    }
    __syncwarp();
  }

  // Asks for as much as there is room for. `ready(item, idle)` says whether an item's plain rows are there; it may wait
  // for them where the warp has nothing else to do.
  template <class Task, class Ready>
  __device__ void fill(const Task& task, const sum_item<A>& item, fetch_cursor& at, const sum_item<A>& next,
                       fetch_cursor& then, Ready ready) {
    while (under_way_ < sum_slots) {
      if (at.begin < item.end) {
        if (at.weighted_left == 0 && !ready(item, under_way_ == 0)) return;
        fetch(task, item, at);
      } else if (then.begin < next.end) {
        if (then.weighted_left == 0 && !ready(next, under_way_ == 0)) return;
        fetch(task, next, then);
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
  template <class Task>
  __device__ void fetch(const Task& task, const sum_item<A>& item, fetch_cursor& at) {
    const bool plain = at.weighted_left == 0;
    const unsigned left = plain ? at.plain_left : at.weighted_left;
    const int source = __ffs(static_cast<int>(left)) - 1;
    const std::int32_t place = __shfl_sync(full_warp, item.place, source);
    const S* const row = plain ? task.plain_row(source, item.at.token) : task.pairs.row(place);
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
    at.weighted_left = item.weighted_here;
    at.plain_left = item.plain_here;
    at.begin += piece;
  }

  unsigned char* ring_;
  std::uint32_t barriers_;
  int lane_;
  int taken_ = 0;
  int under_way_ = 0;
};

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
  // Three steps, a token apart, so that no step waits for the loads of the one before.
  const auto look_up = [&](sum_item<A>& item) {
    item.place = -1;
    item.others = 0;
    if (walk.at_end(item.at)) return;
    if (lane < task.top_k) item.place = __ldg(task.expert_row_of + row_of(item.at) * task.top_k + lane);
    if constexpr (Home) item.others = __ldg(task.destinations + item.at.token);
  };
  const auto resolve = [&](sum_item<A>& item) {
    item.weight = A(1);
    item.begin = item.end = 0;
    item.weighted_here = item.plain_here = 0;
    if (walk.at_end(item.at)) return;
    const bool any = __any_sync(full_warp, item.place != -1) != 0;
    if (task.summed) {
      item.place = any && lane == 0 ? static_cast<std::int32_t>(row_of(item.at)) : -1;
    } else if (task.weights != nullptr && item.place >= 0) {
      item.weight = __ldg(task.weights + item.place);
    }
    item.weighted_here = __ballot_sync(full_warp, item.place >= 0);
    if (!complete(item, any)) return;
    const int columns = (Home ? task.home_plan : task.plan).part_pieces * piece;
    item.begin = item.at.part * columns;
    item.end = min(item.begin + columns, hidden);
  };
  sum_item<A> item, next;
  walk.enter(item.at);
  look_up(item);
  next.at = walk.after(item.at);
  look_up(next);
  resolve(item);
  fetch_cursor at, then;
  at.start(item);
  while (!walk.at_end(item.at)) {
    sum_item<A> later;
    later.at = walk.after(next.at);
    look_up(later);
    resolve(next);
    then.start(next);
    for (int begin = item.begin; begin < item.end; begin += piece) {
      A sum[sum_vectors][width] = {};
      for (unsigned left = item.weighted_here; left != 0; left &= left - 1) {
        stream.fill(task, item, at, next, then, ready);
        stream.add(sum, __shfl_sync(full_warp, item.weight, __ffs(static_cast<int>(left)) - 1));
      }
      for (unsigned left = item.plain_here; left != 0; left &= left - 1) {
        stream.fill(task, item, at, next, then, ready);
        stream.add(sum, A(1));
      }
      finish(item, begin, sum);
    }
    if (next.at.unit != item.at.unit) leave(item.at);
    item = next;
    at = then;
    next = later;
  }
}

// Where sending warps leave the units whose flags are to be posted: a release to other GPUs takes a microsecond or
// more, which a warp of its own spends.
struct flag_mail {
  static constexpr std::uint32_t done = 0xffffffffu;
  std::uint32_t address;  // of a word of shared memory for each sending warp

  __device__ std::uint32_t read(int warp) const {
    std::uint32_t value;
    asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];"
                 : "=r"(value)
                 : "r"(address + static_cast<std::uint32_t>(4 * warp))
                 : "memory");
    return value;
  }
  __device__ void write(int warp, std::uint32_t value) const {
    asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(address + static_cast<std::uint32_t>(4 * warp)),
                 "r"(value)
                 : "memory");
  }
  __device__ void send(int warp, std::uint32_t value) const {
    while (read(warp) != 0) continue;
    write(warp, value);
  }
};

// Hands over the flag of a unit when some pieces have been sent after it, which is when its own have been written. One
// thread's.
class late_post {
 public:
  static constexpr int lag = 3;
  __device__ late_post(flag_mail mail, int warp) : mail_(mail), warp_(warp) {}
  // After each piece's commit.
  __device__ void sent() {
    ++groups_;
    if (waiting_ != 0 && groups_ == lag) flush();
  }
  // After the last piece of a unit.
  __device__ void unit(int unit) {
    if (groups_ == 0) return mail_.send(warp_, static_cast<std::uint32_t>(unit) + 1);  // nothing of it is under way
    if (waiting_ != 0) flush();
    waiting_ = static_cast<std::uint32_t>(unit) + 1;
    groups_ = 0;
  }
  __device__ void last() {
    groups_ = 0;
    if (waiting_ != 0) flush();
    mail_.send(warp_, flag_mail::done);
  }

 private:
  __device__ void flush() {
    // what was sent since then may still be under way
    if (groups_ == 0) bulk::wait_written<0>();
    if (groups_ == 1) bulk::wait_written<1>();
    if (groups_ == 2) bulk::wait_written<2>();
    if (groups_ >= 3) bulk::wait_written<3>();
    mail_.send(warp_, waiting_);
    waiting_ = 0;
  }

  flag_mail mail_;
  int warp_;
  std::uint32_t waiting_ = 0;  // the unit before, and 1
  int groups_ = 0;             // committed since then
};

template <class S, class A, class Out>
__device__ __forceinline__ void send_role(const sums_task<S, A, Out>& task, std::uint32_t generation,
                                          piece_stream<S, A>& stream, unsigned char* buffers, flag_mail mail, int warp,
                                          int first, int warps, int lane) {
  constexpr int width = 16 / sizeof(S);
  const comm::symmetric_view& view = task.view;
  const int hidden = static_cast<int>(task.y.cols);
  const int peers = view.size - 1;
  unit_walk walk(task.plan, peers, task.max_tokens, view.tickets + 1, first, warps, lane);
  late_post flags(mail, warp);
  int buffer = 0;
  bool entered = false, usable = true;
  add_up<false>(
      task, walk, lane, stream,
      [&](const unit_place& at) {
        return static_cast<std::int64_t>(peer_of_send(view, at.peer)) * task.max_tokens + at.token;
      },
      [&](sum_item<A>&, bool any) { return any; }, [](const sum_item<A>&, bool) { return true; },
      [&](const sum_item<A>& item, int begin, A(&sum)[sum_vectors][width]) {
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

// A lane for each sending warp.
inline __device__ void post_role(const comm::symmetric_view& view, std::uint32_t generation, flag_mail mail, int lane) {
  const int peers = view.size - 1;
  bool open = lane < send_warps && peers > 0;
  while (__any_sync(full_warp, open)) {
    if (!open) continue;
    const std::uint32_t got = mail.read(lane);
    if (got == flag_mail::done) open = false;
    if (got == 0 || got == flag_mail::done) continue;
    mail.write(lane, 0);
    const int unit = static_cast<int>(got - 1);
    const int chunk = unit / peers;
    post(at_peer(view, view.chunks + view.rank * comm::max_symmetric_chunks + chunk,
                 peer_of_send(view, unit - chunk * peers)),
         generation);
  }
}

template <class S, class A, class Out>
__device__ __forceinline__ void home_role(const sums_task<S, A, Out>& task, std::uint32_t generation,
                                          piece_stream<S, A>& stream, int first, int warps, int lane) {
  constexpr int width = 16 / sizeof(S);
  const comm::symmetric_view& view = task.view;
  unit_walk walk(task.home_plan, 1, task.num_tokens, view.tickets + 2, first, warps, lane);
  int arrived = -1;    // the last flag that was seen to be there
  bool usable = true;  // after a failure nothing is waited for, and sums are of what stands there
  add_up<true>(
      task, walk, lane, stream,
      [&](const unit_place& at) { return static_cast<std::int64_t>(view.rank) * task.max_tokens + at.token; },
      [&](sum_item<A>& item, bool) {
        item.plain_here = item.others & ~(1u << view.rank);
        if (task.plus.data != nullptr) item.plain_here |= 1u << view.size;
        return true;
      },
      [&](const sum_item<A>& item, bool idle) {
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
        asm volatile("fence.proxy.async;" ::: "memory");  // what peers wrote is read by the copy engine
        return true;
      },
      [&](const sum_item<A>& item, int begin, A(&sum)[sum_vectors][width]) {
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
  if (block_failed(view)) return;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const std::uint32_t generation = next_generation(view);
  if (blockIdx.x == 0 && warp == 0) announce(view, generation);
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
  __syncthreads();
  const int grid = static_cast<int>(gridDim.x);
  const int block = static_cast<int>(blockIdx.x);
  if (warp == send_warps + home_warps) {
    post_role(view, generation, mail, lane);
  } else {
    int home = grid * home_warps;  // helps
    if (warp >= send_warps) {
      home = (warp - send_warps) * grid + block;
    } else if (view.size > 1) {
      send_role(task, generation, stream, buffers + warp * sum_buffers * sum_piece_bytes, mail, warp,
                warp * grid + block, grid * send_warps, lane);
    }
    home_role(task, generation, stream, home, grid * home_warps, lane);
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
