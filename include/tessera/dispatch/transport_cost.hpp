// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a transport of dispatch and combine costs between the GPUs of a host: pure functions of sizes and of a
/// machine's constants, for choosing one and for saying why.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

/// How rows travel between the GPUs of a host; policies of these names are in `transport`.
enum class transport_kind {
  all_to_all,    ///< A kernel sends each row to the owners of its experts.
  all_gather,    ///< A kernel sends each row to everybody.
  copy_engines,  ///< Copies without SMs send each row to everybody.
};
inline constexpr int num_transport_kinds = 3;  ///< Of `transport_kind`.

/// The name of a kind. @param kind Any.
constexpr const char* name_of(transport_kind kind) {
  constexpr const char* names[num_transport_kinds] = {"all_to_all", "all_gather", "copy_engines"};
  return names[static_cast<int>(kind)];
}

/// What the time of a transport depends on. Routing is taken to be uniform.
struct transport_case {
  int num_ranks = 1;            ///< R.
  int num_experts = 1;          ///< E.
  int top_k = 1;                ///< K.
  std::int64_t num_tokens = 0;  ///< T of each rank; copies take as many as there is room for, `max_tokens`.
  std::int64_t row_bytes = 0;   ///< Of one token on the wire.
  int dispatch_sms = 16;        ///< SMs of the kernel that sends rows, as `symmetric_sms::rows`.
  int combine_sms = 132;        ///< SMs of the kernel that brings them home, as `symmetric_sms::sums`.
  int chunks = 4;               ///< Chunks of a combine by copy engines.
  int copy_streams = 1;         ///< Streams of copies to peers.
  /// Computation that does not need these rows and runs at the same time, in microseconds on all SMs; 0: none. What it
  /// hides costs nothing but the SMs that are taken from it.
  double compute_us = 0;
};

/// Constants of a machine. Defaults: H200 behind NVSwitch, fitted by least squares of relative errors to figures of 2
/// and 4 of them; tests/dispatch/transport_cost_test.cpp compares them with bench/results/gpu_ranks_2.json and
/// gpu_ranks_4.json.
struct transport_machine {
  int num_sms = 132;               ///< Of a GPU.
  double store_gb_s = 350;         ///< Out of a GPU by bulk stores, all SMs together.
  double sm_store_gb_s = 51;       ///< By bulk stores of one SM, rows that stay among them.
  double copy_gb_s = 360;          ///< Out of a GPU by copy engines, one stream of copies.
  double streams_copy_gb_s = 223;  ///< The same by several streams at once, all together.
  double copy_us = 4.1;            ///< Of one more copy behind another.
  double memory_gb_s = 3530;       ///< Read and written by kernels that add rows up on all SMs, around copies.
  double sm_pair_gb_s = 61.9;      ///< Expert rows that one SM adds up in the kernel that sends sums.
  double sm_returned_gb_s = 29.8;  ///< Sums that one SM of that kernel sends and adds at home.
  double send_us = 5.8;            ///< Of sending rows, beside their bytes: entry and arrival, at two ranks.
  double send_us_per_peer = 1.3;   ///< The same for each further rank.
  double sums_us = 14;             ///< Of the kernel that sends sums, beside its bytes.
  double copied_send_us = 10.8;    ///< Of copies, beside them: three small kernels and two events.
  double copied_sums_us = 28;      ///< Of copies on the way home and the kernels around them, beside those of a chunk.
  /// A kernel of a chunk. With the figures' 4 chunks only `copied_sums_us` and 12 of these together are known.
  double small_kernel_us = 3;
};

/// Ranks that own an expert of a token, on average: `R (1 - C(E - E/R, K) / C(E, K))`.
/// @param num_ranks R. @param num_experts E. @param top_k K, at most E.
inline double expected_fanout(int num_ranks, int num_experts, int top_k) {
  TESSERA_EXPECTS(num_ranks >= 1 && top_k >= 1 && top_k <= num_experts,
                  "fan-out of " << num_ranks << " ranks, top_k = " << top_k << " of " << num_experts
                                << " experts: expected at least one rank and 1 <= top_k <= num_experts");
  const double experts = num_experts;
  const double elsewhere = experts - experts / num_ranks;
  double none = 1;  // of a rank's experts is chosen
  for (int k = 0; k < top_k; ++k) none *= std::max(0.0, elsewhere - k) / (experts - k);
  return num_ranks * (1 - none);
}

/// Bytes and time of one operation.
struct transport_time {
  double us = 0;          ///< From begin to end, nothing beside it.
  double wire_bytes = 0;  ///< Out of a GPU, to others.
  double sm_us = 0;       ///< Time that it takes from all SMs together.
  double cost_us = 0;     ///< What it adds to the computation beside it: `us` if there is none.
};

namespace detail {

inline double us_of(double bytes, double gb_per_s) { return bytes / gb_per_s * 1e-3; }

// What is limited by links and SMs at once is slower than by the worse of them, though only where they are close.
inline double limited_by(double link, double sms) { return std::sqrt(std::hypot(link * link, sms * sms)); }

// Computation and transfer begin together. The first is stretched by the SMs that the second takes; what follows waits
// for both.
inline transport_time beside(transport_time time, double compute_us) {
  time.cost_us = std::max(time.us, compute_us + std::min(time.sm_us, time.us)) - compute_us;
  return time;
}

}  // namespace detail

/// Time of copies alone: a row of every token to every peer. @param c Sizes; all tokens in `pieces`. @param machine
/// Constants. @param pieces Copies to each peer.
inline double copies_us(const transport_case& c, const transport_machine& machine, int pieces = 1) {
  const int peers = c.num_ranks - 1;
  if (peers == 0) return 0;
  const double bytes = static_cast<double>(peers) * static_cast<double>(c.num_tokens * c.row_bytes);
  const int streams = std::clamp(c.copy_streams, 1, peers);
  return detail::us_of(bytes, streams == 1 ? machine.copy_gb_s : machine.streams_copy_gb_s) +
         machine.copy_us * peers * pieces / streams;
}

/// Time of sending rows to the owners of experts, without the exchange of routings, which is the same for all.
/// @param kind Transport. @param c Sizes. @param machine Constants.
inline transport_time dispatch_time(transport_kind kind, const transport_case& c,
                                    const transport_machine& machine = {}) {
  const auto rows = static_cast<double>(c.num_tokens);
  const auto row_bytes = static_cast<double>(c.row_bytes);
  const int peers = c.num_ranks - 1;
  transport_time time;
  if (kind == transport_kind::copy_engines) {
    time.wire_bytes = peers * rows * row_bytes;
    time.sm_us = detail::us_of(2 * rows * row_bytes, machine.memory_gb_s);  // own rows
    time.us = machine.copied_send_us + std::max(copies_us(c, machine), time.sm_us);
  } else {
    const double fanout =
        kind == transport_kind::all_gather ? c.num_ranks : expected_fanout(c.num_ranks, c.num_experts, c.top_k);
    const double stored = fanout * rows * row_bytes;
    time.wire_bytes = stored * peers / c.num_ranks;
    const double link = detail::us_of(time.wire_bytes, machine.store_gb_s);
    const double sms = detail::us_of(stored, machine.sm_store_gb_s) / std::max(c.dispatch_sms, 1);
    time.us = machine.send_us + machine.send_us_per_peer * std::max(peers - 1, 0) + std::max(link, sms);
    time.sm_us = time.us * std::min(c.dispatch_sms, machine.num_sms) / machine.num_sms;
  }
  return detail::beside(time, c.compute_us);
}

/// Time of bringing expert rows home and adding them up. @param kind Transport. @param c Sizes. @param machine
/// Constants.
inline transport_time combine_time(transport_kind kind, const transport_case& c,
                                   const transport_machine& machine = {}) {
  const auto rows = static_cast<double>(c.num_tokens);
  const auto row_bytes = static_cast<double>(c.row_bytes);
  const int peers = c.num_ranks - 1;
  const double fanout = expected_fanout(c.num_ranks, c.num_experts, c.top_k);
  const double returned = fanout * peers / c.num_ranks * rows * row_bytes;  // sums that are sent, and that arrive
  const double pairs = static_cast<double>(c.top_k) * rows * row_bytes;     // expert rows of a rank
  transport_time time;
  if (kind == transport_kind::copy_engines) {
    time.wire_bytes = peers * rows * row_bytes;
    const double away = static_cast<double>(peers) / c.num_ranks;
    const int chunks = std::max(c.chunks, 1);
    const double sum = detail::us_of(pairs * away + returned, machine.memory_gb_s);
    const double home = detail::us_of(pairs * (1 - away) + returned + rows * row_bytes, machine.memory_gb_s);
    // the small kernels of chunks stand one behind another, between copies: nothing hides them
    time.us = machine.copied_sums_us + 3 * chunks * machine.small_kernel_us +
              std::max(copies_us(c, machine, chunks), sum + home) + (sum + home) / chunks;
    time.sm_us = sum + home;
  } else {
    time.wire_bytes = returned;
    const double link = detail::us_of(returned, machine.store_gb_s);
    const double sms =
        (detail::us_of(pairs, machine.sm_pair_gb_s) + detail::us_of(returned, machine.sm_returned_gb_s)) /
        std::max(c.combine_sms, 1);
    time.us = machine.sums_us + detail::limited_by(link, sms);
    time.sm_us = time.us * std::min(c.combine_sms, machine.num_sms) / machine.num_sms;
  }
  return detail::beside(time, c.compute_us);
}

TESSERA_NAMESPACE_END
