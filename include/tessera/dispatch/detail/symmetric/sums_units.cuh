// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <tessera/comm/symmetric_view.hpp>
#include <tessera/core/views.hpp>
#include <tessera/router/detail/device/warp.cuh>

// What there is to do on the way home, and how warps share it; see send_sums.cuh.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

inline constexpr int send_warps = 5;
inline constexpr int home_warps = 6;
inline constexpr int sums_threads = (send_warps + home_warps + 1) * warp_size;  // and one that posts flags
inline constexpr int sum_vectors = 8;  // 16 bytes of each row that a lane adds up at a time
inline constexpr int sum_piece_bytes = sum_vectors * warp_size * 16;
inline constexpr int sum_slots = 3;    // pieces that a warp has under way from memory
inline constexpr int sum_buffers = 2;  // pieces of a sending warp that are being stored
// Units that a device begins with, about one a warp. A warp's second unit is under way when its first has been written:
// where there are so few that warps would do two or three, units are as long as leaves them one.
inline constexpr int units_at_once = 768;
inline constexpr int few_units = 3 * units_at_once;

// The unit of work of a warp: some pieces of the rows of a few neighbouring tokens. Sending, a unit has one flag at its
// home, so units are the same on all ranks, whatever their blocks. At home a unit is one piece of a row: warps hold
// several, because they look up ahead, and what they hold when the last parts have come nobody else can do.
struct sums_plan {
  int chunk_tokens;
  int parts;        // of a row
  int part_pieces;  // of a part; the last has fewer
  int units;        // chunks * parts; for sending as many flags of each peer

  // @param peers That a rank sends to.
  static sums_plan make(std::int64_t max_tokens, std::int64_t row_bytes, int peers) {
    const int tokens = std::max(1, up(max_tokens, comm::max_symmetric_chunks));
    const int chunks = up(max_tokens, tokens);
    const int pieces = up(row_bytes, sum_piece_bytes);
    const int pairs = std::max(chunks * peers, 1);  // of a chunk and a rank
    int most_parts = comm::max_symmetric_chunks / std::max(chunks, 1);
    if (pairs * pieces <= few_units) most_parts = std::min(most_parts, units_at_once / pairs);
    return of_parts(chunks, tokens, pieces, up(pieces, std::clamp(most_parts, 1, pieces)));
  }
  sums_plan at_home(std::int64_t row_bytes) const {
    return of_parts(units / parts, chunk_tokens, up(row_bytes, sum_piece_bytes), 1);
  }
  // Warps of each of `blocks` that send; the others of `send_warps` help at home from the beginning. Those of all
  // blocks are enough to fill the links and no more, because what they have under way comes to be complete at the same
  // time, and home can do nothing with it before: the longer units are, and the fewer rows a sum has, the fewer.
  // Measured between two GPUs with 16 to 132 blocks, 1024 to 8192 tokens and K from 1 to 8:
  // bench/results/gpu_senders_steps.json.
  int senders(int blocks, int ranks, int top_k, bool summed) const {
    if (units * (ranks - 1) <= few_units) return send_warps;
    const std::int64_t unit_bytes = std::int64_t{chunk_tokens} * part_pieces * sum_piece_bytes;
    const bool is_long = unit_bytes >= 16 * 1024, is_short = unit_bytes < 8 * 1024;
    const double reached = ranks * (1 - std::pow(1 - 1.0 / ranks, top_k));  // ranks, by a token of random choices
    const int of_sums = std::max(128, static_cast<int>(64 + 48 * top_k / reached));
    const int warps = is_short ? 400 : !is_long ? 264 : summed ? 112 : of_sums;
    if (5 * send_warps * blocks < 4 * warps) return send_warps;  // far from enough, whatever is left for home
    const int most = !is_long ? send_warps : summed ? send_warps - 2 : send_warps - 1;
    return std::clamp((warps + blocks / 3) / blocks, 2, most);
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
  int senders;                // warps of a block that send
  matrix_view<const S> plus;  // [T, d]; no data: nothing
  matrix_view<Out> y;

  // What rank r sent of a token's sum, and behind the ranks what is added in the end.
  __device__ const S* plain_row(int r, int token) const {
    if (r == view.size) return plus.row(token);
    return returned + (static_cast<std::int64_t>(r) * max_tokens + token) * y.cols;
  }
};

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

// The units of a role as warps of all blocks get them: a counter gives them out. Which warp does a unit does not change
// its sums.
class unit_walk {
 public:
  // @param peers How many the units of `plan` are for. @param counter Gives out units, 0 before. @param given Units
  // before those of the counter, which warps begin with. @param first This warp's; less than 0: none, it asks.
  __device__ unit_walk(const sums_plan& plan, int peers, int num_tokens, std::uint32_t* counter, int given, int first,
                       int lane)
      : plan_(plan), peers_(peers), num_tokens_(num_tokens), counter_(counter), given_(given), lane_(lane) {
    asked_ = static_cast<std::uint32_t>(first);
    if (first < 0) ask();
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
    if (lane_ == 0) asked_ = static_cast<std::uint32_t>(given_) + atomicAdd(counter_, 1u);
  }

  const sums_plan& plan_;
  int peers_;
  int num_tokens_;
  std::uint32_t* counter_;
  int given_;
  int lane_;
  std::uint32_t asked_;
};

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
