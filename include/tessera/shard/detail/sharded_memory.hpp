// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Where everything of `fully_sharded` lies. The same code counts and carves.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/shard/detail/part_tables.hpp>
#include <tessera/shard/exact_sum.hpp>
#include <tessera/shard/group_layout.hpp>
#include <tessera/shard/memory.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard::detail {

/// Pointers of one group.
template <class P, class M>
struct group_memory {
  using storage = typename P::storage;
  using accumulate = typename P::accumulate;
  using gradient = typename P::gradient;

  std::vector<storage*> parameter;  // per parameter: this rank's part
  std::vector<accumulate*> master;
  std::vector<M*> exp_avg, exp_avg_sq;
  std::vector<accumulate*> sum;         // per parameter: this rank's part of the summed gradient
  std::vector<storage*> full;           // per parameter: the whole, in the group's own memory or its slot
  std::vector<gradient*> contribution;  // [chunk][parameter]: whole gradients
  accumulate* rows = nullptr;           // between the two steps of a reduction, where that may take several calls
};

/// Pointers of all groups, and what groups share.
template <class P, class M>
struct sharded_memory {
  using storage = typename P::storage;
  using accumulate = typename P::accumulate;
  using gradient = typename P::gradient;

  std::vector<group_memory<P, M>> groups;
  storage* gather_buffer = nullptr;
  accumulate* packed = nullptr;
  accumulate* rows = nullptr;
  accumulate* result = nullptr;
  workspace_memory workspace;
  exact_sum* squares = nullptr;
  device_tables<P, M> tables;  // in device memory alone
  memory_sizes sizes;
};

/// Slots that groups take turns in: those that stay gathered have none.
inline int num_slots(std::span<const group_shape> shapes, const options& choices) {
  int turning = 0;
  for (const group_shape& s : shapes) turning += s.reshard_after_forward ? 1 : 0;
  return choices.prefetch < turning ? choices.prefetch + 1 : turning;
}

/// Bytes since the last call.
struct section {
  const memory_builder& builder;
  std::size_t last = 0;
  std::size_t operator()() {
    const std::size_t bytes = builder.bytes() - last;
    last = builder.bytes();
    return bytes;
  }
};

/// Parts that live as long as training.
template <memory_space Space, class P, class M>
void lay_out_state(sharded_memory<P, M>& memory, memory_builder& state, std::span<const group_shape> shapes,
                   std::span<const group_layout> layouts) {
  using storage = typename P::storage;
  using accumulate = typename P::accumulate;
  constexpr bool one_type = std::is_same_v<storage, accumulate>;
  memory.groups.resize(shapes.size());
  const auto each = [&](auto&& body) {
    for (std::size_t g = 0; g < shapes.size(); ++g) {
      for (int i = 0; i < layouts[g].num_parameters(); ++i) {
        body(memory.groups[g], layouts[g].part_elements(i, shapes[g].shard_rank));
      }
    }
  };
  section bytes{state};
  each([&](auto& g, std::int64_t count) { g.parameter.push_back(state.take<storage>("parameters", count)); });
  memory.sizes.parameters = bytes();
  if constexpr (one_type) {
    for (auto& g : memory.groups) g.master = g.parameter;
  } else {
    each([&](auto& g, std::int64_t count) { g.master.push_back(state.take<accumulate>("masters", count)); });
  }
  memory.sizes.masters = bytes();
  each([&](auto& g, std::int64_t count) { g.exp_avg.push_back(state.take<M>("exp_avg", count)); });
  each([&](auto& g, std::int64_t count) { g.exp_avg_sq.push_back(state.take<M>("exp_avg_sq", count)); });
  memory.sizes.moments = bytes();
  if constexpr (std::is_same_v<Space, space::device>) {
    lay_out_tables(memory.tables, state, shapes, layouts);
    memory.sizes.tables = bytes();
  }
}

/// Whole tensors of a group, one after another. @return bytes.
template <class T>
std::size_t lay_out_whole(memory_builder& builder, const group_layout& layout, std::int64_t copies, const char* name,
                          std::vector<T*>& pointers) {
  for (std::int64_t c = 0; c < copies; ++c) {
    for (int i = 0; i < layout.num_parameters(); ++i) pointers.push_back(builder.take<T>(name, layout.elements(i)));
  }
  return builder.bytes();
}

/// The same in a place that groups take turns in; a null place is being counted.
template <class T>
void lay_out_whole_at(std::byte* place, std::size_t bytes, const group_layout& layout, std::int64_t copies,
                      const char* name, std::vector<T*>& pointers) {
  memory_builder builder;
  if (place != nullptr) builder = memory_builder(step_memory(place, bytes), name);
  lay_out_whole(builder, layout, copies, name, pointers);
}

/// Gathered parameters. Groups in their order take turns in the slots, so those that are in use together have different
/// ones.
template <class P, class M>
void lay_out_gathered(sharded_memory<P, M>& memory, memory_builder& step, std::span<const group_shape> shapes,
                      std::span<const group_layout> layouts, const options& choices) {
  using storage = typename P::storage;
  std::vector<std::size_t> slot_bytes(static_cast<std::size_t>(num_slots(shapes, choices)), 0);
  const auto each_turning = [&](auto&& body) {
    std::size_t turn = 0;
    for (std::size_t g = 0; g < shapes.size(); ++g) {
      if (shapes[g].reshard_after_forward) body(g, turn++ % slot_bytes.size());
    }
  };
  each_turning([&](std::size_t g, std::size_t slot) {
    memory_builder counting;
    std::vector<storage*> none;
    slot_bytes[slot] = (std::max)(slot_bytes[slot], lay_out_whole(counting, layouts[g], 1, "gathered", none));
  });
  std::vector<std::byte*> slots;
  for (const std::size_t size : slot_bytes) {
    slots.push_back(step.take<std::byte>("gathered parameters", static_cast<std::int64_t>(size)));
  }
  each_turning([&](std::size_t g, std::size_t slot) {
    lay_out_whole_at(slots[slot], slot_bytes[slot], layouts[g], 1, "gathered parameters", memory.groups[g].full);
  });
  for (std::size_t g = 0; g < shapes.size(); ++g) {
    if (!shapes[g].reshard_after_forward) {
      lay_out_whole(step, layouts[g], 1, "gathered parameters", memory.groups[g].full);
    }
  }
}

/// Where the all-gather writes.
template <class P, class M>
void lay_out_gather_buffer(sharded_memory<P, M>& memory, memory_builder& step, std::span<const group_shape> shapes,
                           std::span<const group_layout> layouts) {
  std::int64_t elements = 0;
  for (std::size_t g = 0; g < shapes.size(); ++g) {
    elements = (std::max)(elements, shapes[g].shard_ranks * layouts[g].row_elements());
  }
  memory.gather_buffer = step.take<typename P::storage>("gather buffer", elements);
}

/// Whole gradients: in one place for all groups whose gradients are reduced before those of the next are written.
template <class P, class M>
void lay_out_contributions(sharded_memory<P, M>& memory, memory_builder& step, std::span<const group_shape> shapes,
                           std::span<const group_layout> layouts, const options& choices) {
  using gradient = typename P::gradient;
  const auto shares_gradients = [&](std::size_t g) {
    return shapes[g].reshard_after_forward && !choices.accumulate_unsharded;
  };
  std::size_t shared_bytes = 0;
  for (std::size_t g = 0; g < shapes.size(); ++g) {
    std::vector<gradient*> none;
    memory_builder counting;
    if (shares_gradients(g)) {
      shared_bytes =
          (std::max)(shared_bytes, lay_out_whole(counting, layouts[g], shapes[g].max_chunks, "gradients", none));
    }
  }
  std::byte* const shared = step.take<std::byte>("whole gradients", static_cast<std::int64_t>(shared_bytes));
  for (std::size_t g = 0; g < shapes.size(); ++g) {
    std::vector<gradient*>& pointers = memory.groups[g].contribution;
    if (shares_gradients(g)) {
      lay_out_whole_at(shared, shared_bytes, layouts[g], shapes[g].max_chunks, "whole gradients", pointers);
    } else {
      lay_out_whole(step, layouts[g], shapes[g].max_chunks, "whole gradients", pointers);
    }
  }
}

/// This rank's parts of the summed gradients.
template <class P, class M>
void lay_out_sums(sharded_memory<P, M>& memory, memory_builder& step, std::span<const group_shape> shapes,
                  std::span<const group_layout> layouts) {
  for (std::size_t g = 0; g < shapes.size(); ++g) {
    for (int i = 0; i < layouts[g].num_parameters(); ++i) {
      memory.groups[g].sum.push_back(
          step.take<typename P::accumulate>("gradients", layouts[g].part_elements(i, shapes[g].shard_rank)));
    }
  }
}

/// What reductions need: shared by all groups, but for the rows of a replica, which may wait between two calls.
template <class P, class M, class Reduction>
void lay_out_reductions(sharded_memory<P, M>& memory, memory_builder& step, std::span<const group_shape> shapes,
                        std::span<const group_layout> layouts) {
  using accumulate = typename P::accumulate;
  std::int64_t packed = 0, shared_rows = 0, longest_row = 0;
  std::size_t workspace_bytes = 0;
  for (std::size_t g = 0; g < shapes.size(); ++g) {
    const group_shape& s = shapes[g];
    const std::int64_t row = layouts[g].row_elements();
    const std::int64_t chunks = Reduction::keeps_chunks ? s.max_chunks : 1;
    const std::int64_t rows = Reduction::rows(s.shard_ranks, chunks) * row;
    packed = (std::max)(packed, chunks * s.shard_ranks * row);
    shared_rows = (std::max)(shared_rows, rows);
    longest_row = (std::max)(longest_row, row);
    workspace_bytes = (std::max)(
        workspace_bytes, Reduction::template workspace_bytes<accumulate>(s.shard_ranks, s.replicas, chunks, row));
    if (s.replicas > 1) memory.groups[g].rows = step.take<accumulate>("rows of a replica", rows);
  }
  memory.packed = step.take<accumulate>("reduce buffer", packed);
  memory.rows = step.take<accumulate>("reduced rows", shared_rows);
  memory.result = step.take<accumulate>("reduced row", longest_row);
  memory.workspace = {step.take<std::byte>("reduction workspace", static_cast<std::int64_t>(workspace_bytes)),
                      workspace_bytes};
}

/// Memory of a step.
template <class P, class M, class Reduction>
void lay_out_step(sharded_memory<P, M>& memory, memory_builder& step, std::span<const group_shape> shapes,
                  std::span<const group_layout> layouts, const options& choices) {
  memory.groups.resize(shapes.size());
  section bytes{step};
  lay_out_gathered(memory, step, shapes, layouts, choices);
  memory.sizes.gathered = bytes();
  lay_out_gather_buffer(memory, step, shapes, layouts);
  memory.sizes.gather_buffer = bytes();
  lay_out_contributions(memory, step, shapes, layouts, choices);
  memory.sizes.full_gradients = bytes();
  lay_out_sums(memory, step, shapes, layouts);
  memory.sizes.gradients = bytes();
  lay_out_reductions<P, M, Reduction>(memory, step, shapes, layouts);
  memory.sizes.reduce_buffers = bytes();
  memory.squares = step.take<exact_sum>("sums of squares", static_cast<std::int64_t>(shapes.size()));
  memory.sizes.norm = bytes();
}

}  // namespace shard::detail
TESSERA_NAMESPACE_END
