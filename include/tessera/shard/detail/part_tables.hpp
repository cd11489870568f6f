// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The tables from which kernels of the device half read where parts of parameters lie. They live in the state memory,
/// because they stay as long as training does.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <tessera/core/memory.hpp>
#include <tessera/shard/adamw.hpp>
#include <tessera/shard/detail/copy_parts.hpp>
#include <tessera/shard/exact_sum.hpp>
#include <tessera/shard/group_layout.hpp>
#include <tessera/shard/memory.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

/// Elements that a block moves at a time.
inline constexpr std::int64_t part_tile = 2048;

/// A part of a parameter, packed at one side and runs of a whole tensor at the other.
struct part_entry {
  std::int64_t first_tile;  // tiles of the entries before it
  std::int64_t count;       // elements
  std::int64_t length;      // elements of a run
  std::int64_t stride;      // elements from run to run in the tensor
  std::int64_t first;       // first element in the tensor
  std::int64_t packed;      // first element in the packed buffer
  int parameter;            // which tensor; -1: padding
};

/// A list of them in device memory.
struct part_list {
  const part_entry* entries = nullptr;
  int num_entries = 0;
  std::int64_t num_tiles = 0;
};

inline std::int64_t tiles_of(std::int64_t count) { return (count + part_tile - 1) / part_tile; }

inline void add_entry(std::vector<part_entry>& list, part_entry next) {
  if (next.count == 0) return;
  next.first_tile = list.empty() ? 0 : list.back().first_tile + tiles_of(list.back().count);
  list.push_back(next);
}

inline std::int64_t tiles_of(std::span<const part_entry> list) {
  return list.empty() ? 0 : list.back().first_tile + tiles_of(list.back().count);
}

/// Between whole tensors and `[ranks, row_elements]`, padding included.
inline std::vector<part_entry> whole_entries(const group_layout& layout) {
  std::vector<part_entry> list;
  for (int rank = 0; rank < layout.ranks(); ++rank) {
    const std::int64_t end = (rank + 1) * layout.row_elements();
    std::int64_t place = rank * layout.row_elements();
    for (int i = 0; i < layout.num_parameters(); ++i) {
      const runs r(layout.at(i).divided(), layout.part(i, rank), layout.at(i).dim);
      const std::int64_t count = r.length == 0 ? 0 : r.outer * r.length;
      add_entry(list, {0, count, r.length, r.stride, r.first, place, i});
      place += count;
    }
    add_entry(list, {0, end - place, end - place, 0, 0, place, -1});
  }
  return list;
}

/// Between this rank's parts, each an array of its own, and one row.
inline std::vector<part_entry> own_entries(const group_layout& layout, int rank) {
  std::vector<part_entry> list;
  std::int64_t place = 0;
  for (int i = 0; i < layout.num_parameters(); ++i) {
    const std::int64_t count = layout.part_elements(i, rank);
    add_entry(list, {0, count, count, 0, 0, place, i});
    place += count;
  }
  add_entry(list, {0, layout.row_elements() - place, layout.row_elements() - place, 0, 0, place, -1});
  return list;
}

/// Tiles of one group's tensors in the list of all, for the norm.
struct norm_range {
  std::int64_t first_tile;
  std::int64_t last_tile;
};

/// What the device half keeps beside numbers of AdamW.
struct norm_result {
  double norm;              // of the last `gradient_norm`; not a number where a gradient is not finite
  std::int64_t not_finite;  // elements of all ranks that are not finite
};

/// Tables of one group.
template <class P>
struct group_tables {
  part_entry* whole = nullptr;  // `whole_entries`
  part_entry* own = nullptr;    // `own_entries`
  typename P::storage** parameter = nullptr;
  typename P::storage** full = nullptr;
  typename P::accumulate** sum = nullptr;
  typename P::gradient** contribution = nullptr;  // [chunk][parameter]
  part_list whole_list, own_list;
};

/// Tables of all groups.
template <class P, class M>
struct device_tables {
  std::vector<group_tables<P>> groups;
  adamw_device_tensor<typename P::storage, typename P::accumulate, M>* tensors = nullptr;
  norm_range* ranges = nullptr;  // in the order of the norm
  adamw_control* control = nullptr;
  norm_result* norm = nullptr;
  exact_sum* total = nullptr;
};

/// Counts or carves.
template <class P, class M>
void lay_out_tables(device_tables<P, M>& tables, memory_builder& state, std::span<const group_shape> shapes,
                    std::span<const group_layout> layouts) {
  tables.groups.clear();
  std::int64_t num_tensors = 0;
  for (std::size_t g = 0; g < shapes.size(); ++g) {
    const std::int64_t count = layouts[g].num_parameters();
    const auto whole = whole_entries(layouts[g]);
    const auto own = own_entries(layouts[g], shapes[g].shard_rank);
    group_tables<P> t;
    t.whole = state.take<part_entry>("tables", static_cast<std::int64_t>(whole.size()));
    t.own = state.take<part_entry>("tables", static_cast<std::int64_t>(own.size()));
    t.parameter = state.take<typename P::storage*>("tables", count);
    t.full = state.take<typename P::storage*>("tables", count);
    t.sum = state.take<typename P::accumulate*>("tables", count);
    t.contribution = state.take<typename P::gradient*>("tables", shapes[g].max_chunks * count);
    t.whole_list = {t.whole, static_cast<int>(whole.size()), tiles_of(whole)};
    t.own_list = {t.own, static_cast<int>(own.size()), tiles_of(own)};
    tables.groups.push_back(t);
    num_tensors += count;
  }
  tables.tensors =
      state.take<adamw_device_tensor<typename P::storage, typename P::accumulate, M>>("tables", num_tensors);
  tables.ranges = state.take<norm_range>("tables", static_cast<std::int64_t>(shapes.size()));
  tables.control = state.take<adamw_control>("control of AdamW", 1);
  tables.norm = state.take<norm_result>("gradient norm", 1);
  tables.total = state.take<exact_sum>("gradient norm", 1);
}

}  // namespace shard::detail
TESSERA_NAMESPACE_END
