// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <tessera/core/error.hpp>
#include <tessera/core/views.hpp>
#include <tessera/dispatch/options.hpp>
#include <tessera/router/routing.hpp>

// What every exchange of routings between GPUs asks of its arguments.

TESSERA_NAMESPACE_BEGIN

namespace detail {

template <class Comm, class Layout, class A>
void expect_routing(const Comm& comm, const Layout& layout, const dispatch_bounds& bounds, const routing<A>& chosen) {
  TESSERA_EXPECTS(bounds.num_ranks == comm.size(),
                  "bounds of " << bounds.num_ranks << " ranks, the communicator has " << comm.size());
  TESSERA_EXPECTS(chosen.expert_ids.rows <= bounds.max_tokens,
                  chosen.expert_ids.rows << " tokens, the bound max_tokens is " << bounds.max_tokens);
  TESSERA_EXPECTS(bounds.num_local_experts <= max_experts,
                  bounds.num_local_experts << " local experts, expected at most " << max_experts);
  expect_matrix(chosen.expert_ids, -1, bounds.top_k, "expert_ids");
  expect_matrix(chosen.weights, chosen.expert_ids.rows, bounds.top_k, "weights");
  TESSERA_EXPECTS(layout.num_ranks() == comm.size(), "the layout places experts on " << layout.num_ranks()
                                                                                     << " ranks, the communicator has "
                                                                                     << comm.size());
}

}  // namespace detail

TESSERA_NAMESPACE_END
