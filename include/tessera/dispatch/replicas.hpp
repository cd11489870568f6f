// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Replicated experts: their copies see different tokens, so their gradients must be added before the optimizer's step.

#include <algorithm>
#include <cstdint>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/dtype.hpp>
#include <tessera/core/stream.hpp>
#include <tessera/dispatch/handle.hpp>
#include <tessera/layout/expert_layout.hpp>

TESSERA_NAMESPACE_BEGIN

/// Elements of scratch that `sum_replica_gradients` needs on any rank.
/// @param placement Where the experts are. @param elements Elements of one expert's gradient.
template <expert_layout Layout>
std::int64_t replica_workspace_elements(const Layout& placement, std::int64_t elements) {
  int replicas = 1;
  for (int e = 0; e < placement.num_experts(); ++e) replicas = std::max(replicas, placement.num_replicas(e));
  return replicas == 1 ? 0 : replicas * elements;
}

/// Replaces the gradient of every copy of a replicated expert by the sum over its copies, in the order of replicas, so
/// that all copies take the same step. A collective of `comm`; experts with one copy cost nothing.
/// @param stream    Host: returns when done.
/// @param comm      R ranks.
/// @param placement Where the experts are.
/// @param gradients `[local experts, elements]`, packed.
/// @param elements  Elements of one expert's gradient.
/// @param workspace `replica_workspace_elements` elements.
/// @tparam A        Type of sums.
template <accumulate_type A, class Comm, expert_layout Layout, class G>
void sum_replica_gradients(host_stream stream, Comm& comm, const Layout& placement, G* gradients, std::int64_t elements,
                           G* workspace) {
  const std::int64_t bytes = elements * static_cast<std::int64_t>(sizeof(G));
  // All ranks go through the experts in the order of their ids, so the exchanges of two experts cannot wait for each
  // other.
  for (int e = 0; e < placement.num_experts(); ++e) {
    const int replicas = placement.num_replicas(e);
    int own = -1;
    for (int i = 0; i < replicas; ++i)
      if (placement.owner(e, i).rank == comm.rank()) own = i;
    if (replicas == 1 || own < 0) continue;

    G* gradient = gradients + placement.owner(e, own).slot * elements;
    std::copy_n(gradient, elements, workspace + own * elements);
    for (int distance = 1; distance < replicas; ++distance) {
      const int to = (own + distance) % replicas;
      const int from = (own + replicas - distance) % replicas;
      const transfer send{placement.owner(e, to).rank, gradient, bytes};
      const transfer receive{placement.owner(e, from).rank, workspace + from * elements, bytes};
      comm.exchange(stream, {&send, 1}, {&receive, 1});
    }
    for (std::int64_t j = 0; j < elements; ++j) {
      A sum = static_cast<A>(workspace[j]);
      for (int i = 1; i < replicas; ++i) sum += static_cast<A>(workspace[i * elements + j]);
      gradient[j] = static_cast<G>(sum);
    }
  }
}

TESSERA_NAMESPACE_END
