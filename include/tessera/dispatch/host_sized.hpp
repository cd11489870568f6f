// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Memory, counts and levels of a dispatch between GPUs that is sized on the host; the operations are in
/// `dispatch/host_sized.cuh`.

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/router/lists.hpp>

TESSERA_NAMESPACE_BEGIN

/// What a dispatch that is sized on the host asks of a communicator of GPUs: all collectives, a wait of the host that
/// is bounded, and a few words of pinned memory. Models: `comm::nccl`, `comm::symmetric`, `comm::hosts`.
template <class C>
concept host_sized_communicator = device_communicator<C> && requires(C& c, device_stream stream) {
  c.wait(stream);
  { c.host_words() } -> std::convertible_to<std::span<std::int32_t>>;
};

/// Most ranks of a level of a dispatch that is sized on the host.
inline constexpr int max_host_sized_ranks = 256;

/// How ranks stand on hosts: rank r is number `r % ranks_per_host` of host `r / ranks_per_host`. The ranks of one
/// number are a *rail*. With one host, rows go straight to the owners of experts. With several, a row crosses the
/// network once per host, along the rail, and is handed on inside the host: two *levels*, each of which is a dispatch
/// of its own.
struct host_grid {
  int num_ranks = 1;       ///< R.
  int ranks_per_host = 1;  ///< G, divides R.

  /// The grid of R ranks. @param num_ranks R. @param ranks_per_host G, or 0 for R. One rank on each host, as all ranks
  /// on one, is one level. @throws invalid_argument if G does not divide R, or a level would have too many ranks.
  static host_grid make(int num_ranks, int ranks_per_host) {
    TESSERA_EXPECTS(ranks_per_host >= 0 && (ranks_per_host == 0 || num_ranks % ranks_per_host == 0),
                    "ranks_per_host = " << ranks_per_host << " does not divide " << num_ranks << " ranks");
    const bool flat = ranks_per_host <= 1;
    const host_grid grid{num_ranks, flat ? num_ranks : ranks_per_host};
    TESSERA_EXPECTS(grid.ranks_per_host <= max_host_sized_ranks && grid.hosts() <= max_host_sized_ranks,
                    num_ranks << " ranks on hosts of " << grid.ranks_per_host << ": a level has at most "
                              << max_host_sized_ranks << " ranks");
    return grid;
  }

  /// H.
  TESSERA_HD constexpr int hosts() const { return num_ranks / ranks_per_host; }
  /// Whether rows cross between hosts before they are handed on.
  TESSERA_HD constexpr bool two_levels() const { return hosts() > 1; }
  /// Host of a rank. @param rank Any.
  TESSERA_HD constexpr int host_of(int rank) const { return rank / ranks_per_host; }
  /// Number of a rank in its host. @param rank Any.
  TESSERA_HD constexpr int place_of(int rank) const { return rank % ranks_per_host; }
};

/// Sizes of one level: P ranks, of which each has V tokens at most. Inside a host, the tokens of a rank are those of
/// its whole rail, `h * max_tokens + t` for token t of the rank on host h; between hosts they are its own.
struct level_bounds {
  int ranks = 1;            ///< P.
  std::int64_t tokens = 0;  ///< V.
  int top_k = 0;            ///< K.

  /// Inside a host: all ranks where there is one. @param bounds Of the dispatch. @param grid Where ranks stand.
  static constexpr level_bounds within(const dispatch_bounds& bounds, const host_grid& grid) {
    return {grid.ranks_per_host, grid.hosts() * bounds.max_tokens, bounds.top_k};
  }
  /// Between hosts; empty with one. @param bounds Of the dispatch. @param grid Where ranks stand.
  static constexpr level_bounds across(const dispatch_bounds& bounds, const host_grid& grid) {
    return {grid.hosts(), grid.two_levels() ? bounds.max_tokens : 0, bounds.top_k};
  }

  /// Rows that a rank sends to others at most.
  constexpr std::int64_t sent_rows() const { return tokens * std::min(top_k, ranks - 1); }
  /// The same with those that it keeps.
  constexpr std::int64_t listed_rows() const { return tokens * std::min(top_k, ranks); }
  /// Rows that a rank receives at most, with those that it keeps.
  constexpr std::int64_t received_rows() const { return tokens * ranks; }
  /// Rows that come from others at most.
  constexpr std::int64_t received_from_others() const { return tokens * (ranks - 1); }
};

/// Rows of one level, in numbers that the host knows.
struct level_counts {
  using offsets = std::array<std::int32_t, max_host_sized_ranks + 1>;  ///< `[P + 1]` are used.

  offsets sent{};      ///< First row that goes to each rank; none for this one.
  offsets received{};  ///< First row that comes from each rank, this one's own among them.

  /// Rows that come from this rank itself. @param own This rank in the level.
  std::int64_t own_rows(int own) const {
    const auto at = static_cast<std::size_t>(own);
    return received[at + 1] - received[at];
  }
};

/// What the host knows of one dispatch on one rank. Plain values of the caller's, as long as operations of the handle
/// are called; `read_counts` brings them back from the lists.
struct host_sized_counts {
  host_grid grid;       ///< Where ranks stand.
  int rank = 0;         ///< This rank.
  level_counts within;  ///< Inside the host.
  level_counts across;  ///< Between hosts; 0 with one.

  /// Words of device memory that the counts are read from. @param grid Where ranks stand.
  static constexpr std::int64_t words(const host_grid& grid) {
    return 2 * (grid.ranks_per_host + 1) + 2 * (grid.hosts() + 1);
  }
  /// From those words. @param grid Where ranks stand. @param rank This rank. @param from `[words(grid)]`.
  static host_sized_counts read(const host_grid& grid, int rank, const std::int32_t* from) {
    host_sized_counts counts{};
    counts.grid = grid;
    counts.rank = rank;
    const auto take = [&](level_counts::offsets& to, int count) {
      std::copy_n(from, count + 1, to.begin());
      from += count + 1;
    };
    take(counts.within.sent, grid.ranks_per_host);
    take(counts.within.received, grid.ranks_per_host);
    take(counts.across.sent, grid.hosts());
    take(counts.across.received, grid.hosts());
    return counts;
  }

  /// Rows that stand in `received` after the dispatch.
  std::int64_t received_rows() const { return within.received[static_cast<std::size_t>(grid.ranks_per_host)]; }
  /// Rows that this rank sends to other ranks of its host.
  std::int64_t rows_within() const { return within.sent[static_cast<std::size_t>(grid.ranks_per_host)]; }
  /// Rows that this rank sends to other hosts.
  std::int64_t rows_across() const { return across.sent[static_cast<std::size_t>(grid.hosts())]; }
};

/// Where the rows of one level go and come from: device memory, kept from the exchange of routings to the last
/// operation of its handle. Arrays are numbered as `level_bounds` says.
struct level_lists {
  std::int32_t* sent_offsets = nullptr;      ///< `[P + 1]`: rows for each rank but this one.
  std::int32_t* received_offsets = nullptr;  ///< `[P + 1]`: rows from each rank, this one too.
  std::int32_t* sent_rows = nullptr;  ///< `[listed rows]`: row that each sent row is a copy of, then those of own rows.
  std::int32_t* places = nullptr;     ///< `[V, P]`: number of a token's row among those for a rank; -1: not sent.
  std::int32_t* arrived = nullptr;    ///< `[P * V]`: token of each received row. Inside a host: row of the tables.
};

/// The lists of a dispatch that is sized on the host, beside those of its handle.
struct host_sized_lists {
  std::int32_t* words = nullptr;  ///< `[host_sized_counts::words + R]`: offsets of both levels; pairs of each rank.
  level_lists within;             ///< Inside the host.
  level_lists across;             ///< Between hosts.

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  /// @param grid Where ranks stand.
  static host_sized_lists layout(memory_builder& builder, const dispatch_bounds& bounds, const host_grid& grid) {
    host_sized_lists lists;
    const std::int64_t offsets = host_sized_counts::words(grid);
    lists.words = builder.take<std::int32_t>("row and pair counts", offsets + grid.num_ranks);
    std::int32_t* next = lists.words;
    const auto carve = [&](level_lists& level, const level_bounds& sizes) {
      if (next != nullptr) {
        level.sent_offsets = next;
        level.received_offsets = next + sizes.ranks + 1;
        next += 2 * (sizes.ranks + 1);
      }
      level.sent_rows = builder.take<std::int32_t>("rows to send", sizes.listed_rows());
      level.places = builder.take<std::int32_t>("places of rows", sizes.received_rows());
      level.arrived = builder.take<std::int32_t>("tokens of received rows", sizes.received_rows());
    };
    carve(lists.within, level_bounds::within(bounds, grid));
    carve(lists.across, level_bounds::across(bounds, grid));
    return lists;
  }
  /// `[R]` pairs that each rank receives. @param grid Where ranks stand.
  std::int32_t* pairs(const host_grid& grid) const { return words + host_sized_counts::words(grid); }
};

/// A pair as ranks tell each other. @tparam A Type of routing weights.
template <class A>
struct routing_record {
  std::int32_t id;  ///< Expert, -1: none.
  A weight;         ///< Of the pair.
};

/// Scratch of `exchange_routing` that is sized on the host: device memory.
/// @tparam A Type of routing weights.
template <class A>
struct host_sized_tables {
  routing_record<A>* records = nullptr;   ///< `[R * max_tokens, K]` of all ranks.
  std::int32_t* slots = nullptr;          ///< `[R * max_tokens, K]` slots of this rank's experts; negative: not here.
  A* weights = nullptr;                   ///< `[R * max_tokens, K]`.
  std::int32_t* owners_within = nullptr;  ///< `[V, K]` inside the host: who owns the expert there; -1: nobody.
  std::int32_t* owners_across = nullptr;  ///< `[max_tokens, K]`: host of the owner; -1: nobody.
  std::int32_t* counts = nullptr;         ///< `[2 G + 2 H]` rows sent and received.
  std::int32_t* places_within = nullptr;  ///< `[P * V]` inside the host: number of a received row among its source's.
  std::int32_t* places_across = nullptr;  ///< The same between hosts.
  router_workspace sort;                  ///< Of the sort.

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  /// @param grid Where ranks stand. @param sort Scratch of the sort, whose barrier was 0 before its first use.
  static host_sized_tables layout(memory_builder& builder, const dispatch_bounds& bounds, const host_grid& grid,
                                  const router_workspace& sort) {
    host_sized_tables tables;
    const std::int64_t pairs = bounds.addressed_rows() * bounds.top_k;
    const level_bounds within = level_bounds::within(bounds, grid);
    const level_bounds across = level_bounds::across(bounds, grid);
    tables.records = builder.take<routing_record<A>>("routing of all ranks", pairs);
    tables.slots = builder.take<std::int32_t>("slots of all ranks", pairs);
    tables.weights = builder.take<A>("weights of all ranks", pairs);
    tables.owners_within = builder.take<std::int32_t>("owners in the host", within.tokens * bounds.top_k);
    tables.owners_across = builder.take<std::int32_t>("hosts of owners", across.tokens * bounds.top_k);
    tables.counts = builder.take<std::int32_t>("rows of levels", 2 * (within.ranks + across.ranks));
    tables.places_within = builder.take<std::int32_t>("places in the host", within.received_rows());
    tables.places_across = builder.take<std::int32_t>("places between hosts", across.received_rows());
    tables.sort = sort;
    return tables;
  }
};

/// Scratch for rows on their way, during one operation: device memory.
struct host_sized_buffers {
  std::byte* within = nullptr;  ///< Rows for other ranks of the host, or what they return.
  std::byte* sums = nullptr;    ///< Sums on their way to other ranks of the host.
  std::byte* across = nullptr;  ///< Rows for other hosts, or what they return.
  std::byte* middle = nullptr;  ///< Rows of the rail that have arrived on this host, or sums on their way back.

  /// Bytes of a row that every array has room for: of d elements, and of the values of a token's pairs.
  /// @tparam S Type of rows. @tparam A Type of routing weights. @param hidden d. @param top_k K.
  template <class S, class A>
  static constexpr std::int64_t row_bytes(std::int64_t hidden, int top_k) {
    return std::max(hidden * static_cast<std::int64_t>(sizeof(S)), top_k * static_cast<std::int64_t>(sizeof(A)));
  }
  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  /// @param grid Where ranks stand. @param row_bytes See there.
  static host_sized_buffers layout(memory_builder& builder, const dispatch_bounds& bounds, const host_grid& grid,
                                   std::int64_t row_bytes) {
    const level_bounds within = level_bounds::within(bounds, grid);
    const level_bounds across = level_bounds::across(bounds, grid);
    return {builder.take<std::byte>("rows in the host", within.sent_rows() * row_bytes),
            builder.take<std::byte>("sums in the host", within.received_from_others() * row_bytes),
            builder.take<std::byte>("rows between hosts", across.sent_rows() * row_bytes),
            builder.take<std::byte>("rows of the rail", across.received_rows() * row_bytes)};
  }
};

TESSERA_NAMESPACE_END
