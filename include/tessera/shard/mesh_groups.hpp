// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The communicators of sharded groups on a training mesh.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>
#include <tessera/mesh/sub_communicator.hpp>
#include <tessera/mesh/training_mesh.hpp>
#include <tessera/shard/fully_sharded.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard {

/// Makes groups for one rank of a training mesh: dense ones over `fsdp`, experts over `efsdp` with `ep` as the axis
/// along which they differ, both with replicas along `dp_replicate`. With `reduction::ordered` and no pipeline, the
/// global order of chunks is that of the world's ranks for dense groups. Owns the communicators: it outlives the
/// `fully_sharded` that uses them, and stays where it is.
template <communicator Comm>
class mesh_groups {
 public:
  /// Splits `world` once per axis. Collective: all ranks call it with the same arguments.
  /// @param world      All ranks of the mesh, in the mesh's order.
  /// @param ranks      The mesh; without tensor parallelism, whose ranks divide dense layers in ways of their own.
  /// @param background Whether parameters are gathered in the background, over communicators of their own.
  /// @throws invalid_argument if the mesh has another number of ranks, or `tp` is not 1.
  mesh_groups(Comm& world, const training_mesh& ranks, bool background)
      : mesh_groups((expect_no_tensor_parallelism(ranks), world), ranks) {
    if (!background) return;
    gather_fsdp_ = std::make_unique<Comm>(fsdp_.split(0, fsdp_.rank()));
    gather_efsdp_ = std::make_unique<Comm>(efsdp_.split(0, efsdp_.rank()));
  }
  mesh_groups(const mesh_groups&) = delete;
  mesh_groups& operator=(const mesh_groups&) = delete;

  /// A group of dense parameters. @param name For messages. @param parameters What is divided over `fsdp`.
  group<Comm> dense(std::string name, std::vector<parameter> parameters) {
    return make(std::move(name), std::move(parameters), fsdp_, gather_fsdp_.get());
  }
  /// A group of expert parameters. @param name For messages. @param parameters What this expert-parallel rank holds, as
  /// `expert_parameter` of rank `expert_ranks().rank()` gives it; divided over `efsdp`.
  group<Comm> experts(std::string name, std::vector<parameter> parameters) {
    group<Comm> result = make(std::move(name), std::move(parameters), efsdp_, gather_efsdp_.get());
    if (ep_.size() > 1) result.distinct.push_back(&ep_);
    return result;
  }

  /// Ranks between which tokens travel to their experts (`ep`).
  Comm& expert_ranks() { return ep_; }
  /// Ranks that divide a dense parameter (`fsdp`).
  Comm& dense_ranks() { return fsdp_; }
  /// Ranks with the same parts in other replicas (`dp_replicate`).
  Comm& replicas() { return replicas_; }
  /// The other pipeline stages (`pp`), for `gradient_norm`; null where there are none.
  Comm* stages() { return stages_.size() > 1 ? &stages_ : nullptr; }

 private:
  mesh_groups(Comm& world, const training_mesh& ranks)
      : fsdp_(sub_communicator(world, ranks, "fsdp")),
        efsdp_(sub_communicator(world, ranks, "efsdp")),
        ep_(sub_communicator(world, ranks, "ep")),
        replicas_(sub_communicator(world, ranks, "dp_replicate")),
        stages_(sub_communicator(world, ranks, "pp")) {}

  static void expect_no_tensor_parallelism(const training_mesh& ranks) {
    TESSERA_EXPECTS(ranks.sizes.tp == 1, "shard::mesh_groups: tp = "
                                             << ranks.sizes.tp
                                             << ", it must be 1: make groups of tensor-parallel layers from their own "
                                                "communicators");
  }

  group<Comm> make(std::string name, std::vector<parameter> parameters, Comm& over, Comm* gather) {
    group<Comm> result;
    result.name = std::move(name);
    result.parameters = std::move(parameters);
    result.ranks = &over;
    result.replicas = replicas_.size() > 1 ? &replicas_ : nullptr;
    result.gather = gather;
    return result;
  }

  Comm fsdp_, efsdp_, ep_, replicas_, stages_;
  std::unique_ptr<Comm> gather_fsdp_, gather_efsdp_;
};

}  // namespace shard
TESSERA_NAMESPACE_END
