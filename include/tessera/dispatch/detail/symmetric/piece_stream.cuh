// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <tessera/dispatch/detail/device/rows.cuh>
#include <tessera/dispatch/detail/symmetric/bulk.cuh>
#include <tessera/dispatch/detail/symmetric/sums_units.cuh>
#include <tessera/gemm/detail/hopper/ptx.cuh>

// Rows that a warp adds up, brought to shared memory piece by piece.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

// One token's sum that a warp makes: columns [begin, end) of rows that lanes stand for, first expert rows with their
// weights, then rows that are added as they are. A lane asks for its own rows, so that nothing is handed around.
template <class S, class A>
struct sum_item {
  unit_place at;
  std::int32_t place;    // of this lane's expert row; negative: none
  std::uint32_t others;  // at home: ranks that send a part
  A weight;              // of this lane's expert row
  const S* weighted;     // this lane's expert row, if it has one
  const S* plain;        // this lane's other row, if it has one
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
  template <class S, class A>
  __device__ void start(const sum_item<S, A>& item) {
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

  // @param ring Memory for `sum_slots` pieces. @param barriers As many barriers.
  __device__ piece_stream(unsigned char* ring, std::uint32_t barriers, int lane, bool is_used)
      : ring_(ring), barriers_(barriers), lane_(lane) {
    if (lane == 0 && is_used) {
      for (int i = 0; i < sum_slots; ++i) hopper::barrier_init(barriers + static_cast<std::uint32_t>(8 * i), 1);
      hopper::barrier_init_fence();
    }
    __syncwarp();
  }

  // Asks for as much as there is room for. `ready(item, idle)` says whether an item's plain rows are there; it may wait
  // for them where the warp has nothing else to do. @tparam Plain Whether items have such rows.
  template <bool Plain, class Ready>
  __device__ void fill(const sum_item<S, A>& item, fetch_cursor& at, const sum_item<S, A>& next, fetch_cursor& then,
                       Ready ready) {
    while (under_way_ < sum_slots) {
      if (at.begin < item.end) {
        if (Plain && at.weighted_left == 0 && !ready(item, under_way_ == 0)) return;
        fetch<Plain>(item, at);
      } else if (then.begin < next.end) {
        if (Plain && then.weighted_left == 0 && !ready(next, under_way_ == 0)) return;
        fetch<Plain>(next, then);
      } else {
        return;
      }
    }
  }

  // Adds the oldest piece that is under way, when it is there.
  __device__ void add(A (&sum)[sum_vectors][width], A weight) {
    hopper::barrier_wait(barriers_ + 8 * taken_, parity_);
    const auto* const pieces = reinterpret_cast<const uint4*>(ring_ + taken_ * sum_piece_bytes) + lane_;
#pragma unroll
    for (int v = 0; v < sum_vectors; ++v) {
      const uint4 bits = pieces[v * warp_size];
      add_elements(sum[v], reinterpret_cast<const elements<S, width>&>(bits), weight);
    }
    if (++taken_ == sum_slots) {
      taken_ = 0;
      parity_ ^= 1;
    }
    --under_way_;
    __syncwarp();  // before the place is filled again
  }

 private:
  template <bool Plain>
  __device__ void fetch(const sum_item<S, A>& item, fetch_cursor& at) {
    const bool plain = Plain && at.weighted_left == 0;
    const unsigned left = plain ? at.plain_left : at.weighted_left;
    if ((left & (0 - left)) == 1u << lane_) {
      const int bytes = min(item.end - at.begin, piece) * static_cast<int>(sizeof(S));
      const std::uint32_t barrier = barriers_ + 8 * asked_;
      hopper::barrier_arrive_expect(barrier, static_cast<std::uint32_t>(bytes));
      bulk::load(hopper::shared_address(ring_ + asked_ * sum_piece_bytes),
                 (plain ? item.plain : item.weighted) + at.begin, bytes, barrier);
    }
    if (++asked_ == sum_slots) asked_ = 0;
    ++under_way_;
    (plain ? at.plain_left : at.weighted_left) = left & (left - 1);
    if ((at.weighted_left | (Plain ? at.plain_left : 0)) != 0) return;
    at.weighted_left = item.weighted_here;
    at.plain_left = item.plain_here;
    at.begin += piece;
  }

  unsigned char* ring_;
  std::uint32_t barriers_;
  int lane_;
  std::uint32_t asked_ = 0;   // the slot that is filled next
  std::uint32_t taken_ = 0;   // the slot that is added next
  std::uint32_t parity_ = 0;  // of its barrier
  int under_way_ = 0;
};

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
