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
#include <type_traits>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/capacity.hpp>
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
  level_counts pairs;   ///< Expert rows on their way home, straight between all ranks; 0 without `combine::ordered`.

  /// Words of device memory that the counts are read from. @param grid Where ranks stand. @param ordered Whether pairs
  /// are among them.
  static constexpr std::int64_t words(const host_grid& grid, bool ordered = false) {
    return 2 * (grid.ranks_per_host + 1) + 2 * (grid.hosts() + 1) + (ordered ? 2 * (grid.num_ranks + 1) : 0);
  }
  /// From those words. @param grid Where ranks stand. @param rank This rank. @param from `[words(grid, ordered)]`.
  /// @param ordered As there.
  static host_sized_counts read(const host_grid& grid, int rank, const std::int32_t* from, bool ordered = false) {
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
    if (ordered) {
      take(counts.pairs.sent, grid.num_ranks);
      take(counts.pairs.received, grid.num_ranks);
    }
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
  /// `[num_words]`: offsets of both levels, and of pairs; pairs that each rank receives. With `combine::ordered` three
  /// more for each rank, which the host does not read: see `pairs_before`.
  std::int32_t* words = nullptr;
  level_lists within;  ///< Inside the host.
  level_lists across;  ///< Between hosts.
  /// With `combine::ordered`: expert rows on their way home. `sent_rows [max_pairs]` are in the order (source, token,
  /// k), `places [max_tokens, K]` the row at home of each of this rank's pairs, -1 where none comes; no `arrived`.
  level_lists pairs_home;

  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  /// @param grid Where ranks stand. @tparam Combine Where rows will be added.
  /// @throws invalid_argument for `combine::ordered` with more than `max_host_sized_ranks` ranks.
  template <combine_policy Combine = combine::reduced>
  static host_sized_lists layout(memory_builder& builder, const dispatch_bounds& bounds, const host_grid& grid,
                                 Combine = {}) {
    constexpr bool ordered = std::is_same_v<Combine, combine::ordered>;
    TESSERA_EXPECTS(!ordered || grid.num_ranks <= max_host_sized_ranks,
                    "combine::ordered, sized on the host, sends pairs straight home: "
                        << grid.num_ranks << " ranks, at most " << max_host_sized_ranks);
    host_sized_lists lists;
    lists.words = builder.take<std::int32_t>(
        "row and pair counts", host_sized_counts::words(grid, ordered) + (ordered ? 4 : 1) * grid.num_ranks);
    std::int32_t* next = lists.words;
    const auto carve_offsets = [&](level_lists& level, int ranks) {
      if (next == nullptr) return;
      level.sent_offsets = next;
      level.received_offsets = next + ranks + 1;
      next += 2 * (ranks + 1);
    };
    const auto carve = [&](level_lists& level, const level_bounds& sizes) {
      carve_offsets(level, sizes.ranks);
      level.sent_rows = builder.take<std::int32_t>("rows to send", sizes.listed_rows());
      level.places = builder.take<std::int32_t>("places of rows", sizes.received_rows());
      level.arrived = builder.take<std::int32_t>("tokens of received rows", sizes.received_rows());
    };
    carve(lists.within, level_bounds::within(bounds, grid));
    carve(lists.across, level_bounds::across(bounds, grid));
    if (ordered) {
      carve_offsets(lists.pairs_home, grid.num_ranks);
      lists.pairs_home.sent_rows = builder.take<std::int32_t>("expert rows to return", bounds.max_pairs);
      lists.pairs_home.places = builder.take<std::int32_t>("places of pairs at home", bounds.max_sent_pairs());
    }
    return lists;
  }
  /// Whether pairs can come home: they were laid out for `combine::ordered`.
  bool ordered() const { return pairs_home.sent_offsets != nullptr; }
  /// Words that the host reads. @param grid Where ranks stand.
  std::int64_t num_words(const host_grid& grid) const {
    return host_sized_counts::words(grid, ordered()) + grid.num_ranks;
  }
  /// `[R]` pairs that each rank receives. @param grid Where ranks stand.
  std::int32_t* pairs(const host_grid& grid) const { return words + host_sized_counts::words(grid, ordered()); }
  /// `[3, R]` with `combine::ordered`: pairs that each rank receives from ranks before this one, and from this one;
  /// pairs that this one receives from each. @param grid Where ranks stand.
  std::int32_t* pairs_before(const host_grid& grid) const { return words + num_words(grid); }
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
  std::int32_t* owners_home = nullptr;    ///< `combine::ordered`: `[max_tokens, K]` owners of this rank's pairs, or -1.
  std::int32_t* counts = nullptr;         ///< `[2 G + 2 H]` rows sent and received.
  std::int32_t* places_within = nullptr;  ///< `[P * V]` inside the host: number of a received row among its source's.
  std::int32_t* places_across = nullptr;  ///< The same between hosts.
  router_workspace sort;                  ///< Of the sort; with a capacity it has room for all E experts.
  capacity_workspace<A> capacity;         ///< Where there is a capacity.

  /// Takes the arrays from `builder`, all but `capacity`. @param builder Counting or carving. @param bounds Of the
  /// dispatch. @param grid Where ranks stand. @param sort Scratch of the sort, whose barrier was 0 before its first
  /// use.
  /// @tparam Combine Where rows will be added.
  template <combine_policy Combine = combine::reduced>
  static host_sized_tables layout(memory_builder& builder, const dispatch_bounds& bounds, const host_grid& grid,
                                  const router_workspace& sort, Combine = {}) {
    constexpr bool ordered = std::is_same_v<Combine, combine::ordered>;
    host_sized_tables tables;
    const std::int64_t pairs = bounds.addressed_rows() * bounds.top_k;
    const level_bounds within = level_bounds::within(bounds, grid);
    const level_bounds across = level_bounds::across(bounds, grid);
    tables.records = builder.take<routing_record<A>>("routing of all ranks", pairs);
    tables.slots = builder.take<std::int32_t>("slots of all ranks", pairs);
    tables.weights = builder.take<A>("weights of all ranks", pairs);
    tables.owners_within = builder.take<std::int32_t>("owners in the host", within.tokens * bounds.top_k);
    tables.owners_across = builder.take<std::int32_t>("hosts of owners", across.tokens * bounds.top_k);
    tables.owners_home = builder.take<std::int32_t>("owners of own pairs", ordered ? bounds.max_sent_pairs() : 0);
    tables.counts = builder.take<std::int32_t>("rows of levels", 2 * (within.ranks + across.ranks));
    tables.places_within = builder.take<std::int32_t>("places in the host", within.received_rows());
    tables.places_across = builder.take<std::int32_t>("places between hosts", across.received_rows());
    tables.sort = sort;
    return tables;
  }
};

/// Scratch for rows on their way, during one operation: device memory.
struct host_sized_buffers {
  std::byte* within = nullptr;  ///< Rows for other ranks of the host, or what they return; or pairs at home.
  std::byte* sums = nullptr;    ///< Sums on their way to other ranks of the host; or pairs on their way home.
  std::byte* across = nullptr;  ///< Rows for other hosts, or what they return.
  std::byte* middle = nullptr;  ///< Rows of the rail that have arrived on this host, or sums on their way back.

  /// Bytes of a row that every array has room for: of d elements, and of the values of a token's pairs.
  /// @tparam S Type of rows. @tparam A Type of routing weights. @param hidden d. @param top_k K.
  template <class S, class A>
  static constexpr std::int64_t row_bytes(std::int64_t hidden, int top_k) {
    return std::max(hidden * static_cast<std::int64_t>(sizeof(S)), top_k * static_cast<std::int64_t>(sizeof(A)));
  }
  /// Takes the arrays from `builder`. @param builder Counting or carving. @param bounds Of the dispatch.
  /// @param grid Where ranks stand. @param row_bytes See there. @tparam Combine Where rows are added:
  /// `combine::ordered` needs room for every pair, at home and on the way.
  template <combine_policy Combine = combine::reduced>
  static host_sized_buffers layout(memory_builder& builder, const dispatch_bounds& bounds, const host_grid& grid,
                                   std::int64_t row_bytes, Combine = {}) {
    constexpr bool ordered = std::is_same_v<Combine, combine::ordered>;
    const level_bounds within = level_bounds::within(bounds, grid);
    const level_bounds across = level_bounds::across(bounds, grid);
    const std::int64_t home = ordered ? bounds.max_sent_pairs() : 0;
    const std::int64_t out = ordered ? std::min(bounds.max_pairs, bounds.max_sent_pairs() * (grid.num_ranks - 1)) : 0;
    return {builder.take<std::byte>("rows in the host", std::max(within.sent_rows(), home) * row_bytes),
            builder.take<std::byte>("sums in the host", std::max(within.received_from_others(), out) * row_bytes),
            builder.take<std::byte>("rows between hosts", across.sent_rows() * row_bytes),
            builder.take<std::byte>("rows of the rail", across.received_rows() * row_bytes)};
  }
};

TESSERA_NAMESPACE_END
