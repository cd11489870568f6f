// expect: a layout needs num_experts(), num_ranks(), num_slots(rank), max_slots()
// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// A layout without the inverse of owner().

#include <tessera/layout/layout.hpp>

namespace ts = tessera;

struct everything_on_rank_zero {
  int experts;
  constexpr int num_experts() const { return experts; }
  constexpr int num_ranks() const { return 1; }
  constexpr int num_slots(int) const { return experts; }
  constexpr int max_slots() const { return experts; }
  constexpr int num_replicas(int) const { return 1; }
  constexpr ts::slot_ref owner(int expert, int) const { return {0, expert}; }
#if !defined(TESSERA_EXPECT_FAILURE)
  constexpr int expert_at(int, int slot) const { return slot; }
#endif
};

static_assert(ts::is_expert_layout<everything_on_rank_zero>());

int main() { return 0; }
