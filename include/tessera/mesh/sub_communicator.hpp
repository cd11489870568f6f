// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Communicators along the axes of a mesh.

#include <concepts>
#include <string_view>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/mesh/axes.hpp>
#include <tessera/mesh/training_mesh.hpp>

TESSERA_NAMESPACE_BEGIN

/// The communicator of this rank's group. Collective: every rank of `comm` calls it, with the same group division. Its
/// ranks are the places in the group. Host: returns when done; what `Comm::split` allocates is allocated.
/// @param comm  All ranks of the mesh, in the mesh's order.
/// @param group From `mesh::along` or `training_mesh::along`.
/// @throws invalid_argument if the mesh has another number of ranks; what `Comm::split` throws.
template <class Comm>
Comm sub_communicator(Comm& comm, const mesh_group& group) {
  static_assert(communicator<Comm>,
                "sub_communicator needs a communicator. Models: comm::self<Space>, comm::threads, comm::mpi.");
  TESSERA_EXPECTS(comm.size() == group.ranks.size(), "sub_communicator: the communicator has "
                                                         << comm.size() << " ranks, the mesh " << group.ranks.text()
                                                         << " has " << group.ranks.size());
  return comm.split(group.color(comm.rank()), group.index(comm.rank()));
}

/// The communicator of this rank's group along some axes of a mesh, flattened in the mesh's order. Collective.
/// @param comm All ranks of the mesh. @param ranks The mesh. @param axes Names of axes, each once.
/// @throws invalid_argument if there is no such axis or the mesh has another number of ranks.
template <class Comm, std::convertible_to<std::string_view>... Names>
Comm sub_communicator(Comm& comm, const mesh& ranks, const Names&... axes) {
  return sub_communicator(comm, ranks.along(axes...));
}

/// The same for a training mesh: axes of one of its views, derived ones (`fsdp`, `loss`, ...) included. Collective.
/// @param comm All ranks of the mesh. @param ranks The mesh. @param axes Names of axes, each once.
/// @throws invalid_argument if there is no such group or the mesh has another number of ranks.
template <class Comm, std::convertible_to<std::string_view>... Names>
Comm sub_communicator(Comm& comm, const training_mesh& ranks, const Names&... axes) {
  return sub_communicator(comm, ranks.along(axes...));
}

/// A mesh with one communicator for each of its axes: what redistribution works on. Owns the communicators.
template <class Comm>
class mesh_communicators {
 public:
  /// Splits `comm` once for each axis. Collective: all ranks of `comm` call it with the same mesh.
  /// @param comm All ranks of the mesh, in the mesh's order. @param ranks The mesh.
  /// @throws invalid_argument if the mesh has another number of ranks.
  mesh_communicators(Comm& comm, const mesh& ranks) : ranks_(ranks), rank_(comm.rank()) {
    TESSERA_EXPECTS(comm.size() == ranks.size(), "mesh_communicators: the communicator has "
                                                     << comm.size() << " ranks, the mesh " << ranks.text() << " has "
                                                     << ranks.size());
    axes_.reserve(static_cast<std::size_t>(ranks.num_axes));
    for (int i = 0; i < ranks.num_axes; ++i) {
      axes_.push_back(sub_communicator(comm, mesh_group{ranks, 1U << i}));
    }
  }

  /// The mesh.
  const mesh& ranks() const noexcept { return ranks_; }
  /// This rank in the mesh.
  int rank() const noexcept { return rank_; }
  /// The communicator of this rank's group along an axis.
  Comm& on(int axis) { return axes_[static_cast<std::size_t>(axis)]; }
  /// The communicator of this rank's group along an axis. @throws invalid_argument if there is none of that name.
  Comm& on(std::string_view axis) { return on(ranks_.axis(axis)); }

 private:
  mesh ranks_;
  int rank_;
  std::vector<Comm> axes_;
};

TESSERA_NAMESPACE_END
