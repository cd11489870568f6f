// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Who sends which row to whom on both levels of a dispatch over hosts, for a routing that the host has: to choose
/// between one level and two, and to see how evenly a placement loads the network.

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include <tessera/core/error.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/host_sized.hpp>
#include <tessera/layout/expert_layout.hpp>

TESSERA_NAMESPACE_BEGIN

/// One copy of a row between two ranks.
struct row_hop {
  std::int32_t from = 0;    ///< Rank that sends it.
  std::int32_t to = 0;      ///< Rank that receives it, another one.
  std::int32_t source = 0;  ///< Rank whose token it is.
  std::int32_t token = 0;   ///< Token of that rank.

  /// Same copy.
  constexpr bool operator==(const row_hop&) const = default;
};

/// The copies of one dispatch. `across` happens before `within`; each is in the order (from, to, source, token), which
/// is the order on the wire of each pair of ranks.
struct host_plan {
  host_grid grid;  ///< Where ranks stand.
  std::vector<row_hop>
      across;  ///< Between hosts, along the rails: one per (token, other host with one of its experts).
  std::vector<row_hop> within;   ///< Inside hosts.
  std::int64_t flat_across = 0;  ///< Copies that would cross between hosts with one level: one per (token, owner).

  /// Rows that each rank sends on a level: `[R]`. @param hops `across` or `within`.
  std::vector<std::int64_t> sent(const std::vector<row_hop>& hops) const {
    std::vector<std::int64_t> rows(static_cast<std::size_t>(grid.num_ranks));
    for (const row_hop& hop : hops) ++rows[static_cast<std::size_t>(hop.from)];
    return rows;
  }
  /// The same of those that it receives. @param hops `across` or `within`.
  std::vector<std::int64_t> received(const std::vector<row_hop>& hops) const {
    std::vector<std::int64_t> rows(static_cast<std::size_t>(grid.num_ranks));
    for (const row_hop& hop : hops) ++rows[static_cast<std::size_t>(hop.to)];
    return rows;
  }
  /// Bytes of the busiest rank on a level, the greater of what it sends and receives: what the level takes, over the
  /// rate of a rank. @param hops `across` or `within`. @param row_bytes Of one row.
  std::int64_t busiest_bytes(const std::vector<row_hop>& hops, std::int64_t row_bytes) const {
    std::int64_t most = 0;
    for (const std::int64_t rows : sent(hops)) most = std::max(most, rows);
    for (const std::int64_t rows : received(hops)) most = std::max(most, rows);
    return most * row_bytes;
  }

  /// The plan of a routing. Host; allocates.
  /// @param placement      Where the experts are.
  /// @param ranks_per_host G; 0: all ranks on one host.
  /// @param expert_ids     `[R]` matrices `[T, K]`, one of each rank; ids outside [0, E) are slots without expert.
  /// @throws invalid_argument if the numbers of ranks do not fit.
  template <expert_layout Layout>
  static host_plan make(const Layout& placement, int ranks_per_host,
                        std::span<const matrix_view<const std::int32_t>> expert_ids) {
    TESSERA_EXPECTS(
        static_cast<int>(expert_ids.size()) == placement.num_ranks(),
        expert_ids.size() << " routings, the layout places experts on " << placement.num_ranks() << " ranks");
    host_plan plan;
    plan.grid = host_grid::make(placement.num_ranks(), ranks_per_host);
    const int per_host = plan.grid.ranks_per_host;
    std::vector<std::int32_t> owners;
    for (std::int32_t source = 0; source < plan.grid.num_ranks; ++source) {
      const auto& ids = expert_ids[static_cast<std::size_t>(source)];
      for (std::int32_t t = 0; t < ids.rows; ++t) {
        owners.clear();
        for (std::int64_t k = 0; k < ids.cols; ++k) {
          const std::int32_t id = ids(t, k);
          if (id < 0 || id >= placement.num_experts()) continue;
          owners.push_back(placement.owner(id, choose_replica(placement, id, t)).rank);
        }
        std::sort(owners.begin(), owners.end());
        owners.erase(std::unique(owners.begin(), owners.end()), owners.end());
        std::int32_t last_host = -1;
        for (const std::int32_t owner : owners) {
          const std::int32_t host = plan.grid.host_of(owner);
          const std::int32_t carrier = host * per_host + plan.grid.place_of(source);
          if (host != last_host && carrier != source) plan.across.push_back({source, carrier, source, t});
          if (owner != carrier) plan.within.push_back({carrier, owner, source, t});
          if (host != plan.grid.host_of(source)) ++plan.flat_across;
          last_host = host;
        }
      }
    }
    const auto order = [](const row_hop& a, const row_hop& b) {
      return a.from != b.from ? a.from < b.from : a.to < b.to;
    };
    std::stable_sort(plan.across.begin(), plan.across.end(), order);
    std::stable_sort(plan.within.begin(), plan.within.end(), order);
    return plan;
  }
};

TESSERA_NAMESPACE_END
