// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The execution of a redistribution plan over the communicators of a mesh.

#include <cstddef>
#include <cstdint>
#include <string>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/core/memory.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/core/views.hpp>
#include <tessera/mesh/detail/redistribution_steps.hpp>
#include <tessera/mesh/placement.hpp>
#include <tessera/mesh/redistribution_plan.hpp>
#include <tessera/mesh/region.hpp>
#include <tessera/mesh/sub_communicator.hpp>

TESSERA_NAMESPACE_BEGIN

/// Moves a tensor from one placement to another. Collective over the mesh: every rank calls it with the same plan.
/// Host: returns when done. Device: enqueues; defined in `redistribute.cuh`. Arrays are packed row-major arrays of a
/// rank's `local_extents`; where these are empty the pointer may be null.
///
/// Uneven shards are padded inside the communication buffers only. Reductions are those of the communicator: on host
/// communicators floating-point sums are taken in rank order, axis by axis. A replicated tensor becomes a partial sum
/// by counting on coordinate 0 alone (the others contribute -0.0, which changes no value, not even the sign of a zero),
/// a partial minimum or maximum as it is. All moves are exact.
///
/// For set-up and checkpoints rather than the inner loop: data take no memory but the workspace, yet small lists of
/// index ranges are allocated on the way.
/// @param stream    Order of the work.
/// @param comms     The mesh's communicators, one for each axis.
/// @param plan      From `plan_redistribution`, for elements of `sizeof(T)` bytes.
/// @param in        Packed array of what this rank holds under `plan.from`; only read.
/// @param out       Packed array of what it holds under `plan.to`, disjoint from `in`.
/// @param workspace Builder with at least `redistribute_workspace_bytes` bytes left. They are free again when the call
///                  returns: give a copy of a builder to keep its place.
/// @throws invalid_argument for wrong arguments on this rank, before anything is sent, also if the plan reduces and `T`
/// is not `reducible`; comm_error if another rank does not do its part.
template <communicator Comm, transferable T>
void redistribute(stream_ref<typename Comm::space> stream, mesh_communicators<Comm>& comms,
                  const redistribution_plan& plan, const T* in, T* out, memory_builder& workspace) {
  TESSERA_EXPECTS(comms.ranks() == plan.ranks, "redistribute: the plan is for the mesh "
                                                   << plan.ranks.text() << ", the communicators are of the mesh "
                                                   << comms.ranks().text());
  TESSERA_EXPECTS(
      plan.element_bytes == static_cast<std::int64_t>(sizeof(T)),
      "redistribute: the plan is for elements of " << plan.element_bytes << " bytes, these have " << sizeof(T));
  TESSERA_EXPECTS(!workspace.counting(), "redistribute needs a memory_builder with memory, not one that counts");
  for (const redistribution_step& step : plan.steps) {
    const bool reduces = step.from.is_partial() || step.to.is_partial();
    TESSERA_EXPECTS(reducible<T> || !reduces,
                    "redistribute: " << to_string(step, plan.ranks)
                                     << " joins contributions, which needs elements of type float, double, int32, "
                                        "int64 or uint64");
  }
  const mesh_coordinates place = plan.ranks.coordinates(comms.rank());
  placements now = plan.from;
  for (int i = 0; i < plan.ranks.num_axes; ++i) {  // as the plan has it: one rank alone holds everything
    if (plan.ranks.axes[i].size == 1) now[i] = placement::replicate();
  }
  region held(plan.ranks, now, place, plan.tensor);
  const region wanted(plan.ranks, plan.to, place, plan.tensor);
  const auto bytes_of = [](const region& part) { return part.volume() * static_cast<std::int64_t>(sizeof(T)); };
  TESSERA_EXPECTS((in != nullptr || bytes_of(held) == 0) && (out != nullptr || bytes_of(wanted) == 0),
                  "redistribute: rank " << comms.rank() << " gives no data for " << held.volume()
                                        << " elements before or " << wanted.volume() << " elements afterwards");
  expect_disjoint(in, bytes_of(held), "in", out, bytes_of(wanted), "out");
  const auto buffers = detail::lay_out<T>(plan, workspace, 1);

  const T* source = in;
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const redistribution_step& step = plan.steps[i];
    T* const target = i + 1 == plan.steps.size() ? out : buffers.array[i % 2];
    placements next = now;
    next[step.axis] = step.to;
    detail::redistribution_group<Comm> group{stream, comms.on(step.axis), plan, now, next, place, step.axis};
    group.run(step.kind, source, target, buffers);
    now = next;
    source = target;
  }
  if (plan.steps.empty()) detail::copy_rows(stream, in, 0, out, 0, held.volume(), 1);
}

/// The same with a buffer of its own. @param stream Order of the work. @param comms The mesh's communicators. @param
/// plan From `plan_redistribution`. @param in What this rank holds under `plan.from`. @param out What it holds under
/// `plan.to`.
/// @param workspace At least `redistribute_workspace_bytes` bytes.
template <communicator Comm, transferable T>
void redistribute(stream_ref<typename Comm::space> stream, mesh_communicators<Comm>& comms,
                  const redistribution_plan& plan, const T* in, T* out, workspace_memory workspace) {
  memory_builder builder(workspace, "redistribute workspace");
  redistribute(stream, comms, plan, in, out, builder);
}

TESSERA_NAMESPACE_END
