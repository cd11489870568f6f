// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name: the copy engine, which does what it is asked at the last moment or at once.

#include <tessera/core/config.hpp>
#include <tessera/gemm/detail/hopper/ptx.cuh>

#include "emulated/block.hpp"

TESSERA_NAMESPACE_BEGIN

namespace detail::bulk {

inline constexpr int alignment = 16;
inline constexpr int line = 128;
constexpr std::uint32_t next_line(std::uint32_t address) { return (address + line - 1) / line * line; }

inline void load(std::uint32_t target, const void* source, int bytes, std::uint32_t barrier) {
  emulated::block& own = *emulated::block::own();
  emulated::transaction_barrier& b = own.barrier(barrier);
  unsigned char* const to = symmetric::shared_bytes + target;
  const auto copy = [=, &b] {
    std::memcpy(to, source, static_cast<std::size_t>(bytes));
    b.arrived += static_cast<std::uint32_t>(bytes);
  };
  if (own.random() % 2 == 0)
    copy();
  else
    b.loads.push_back(copy);
}
inline void store(void* target, std::uint32_t source, int bytes) {
  emulated::block::own()->current().open.push_back(
      {static_cast<unsigned char*>(target), symmetric::shared_bytes + source, static_cast<std::size_t>(bytes)});
}
inline void commit() {
  emulated::lane& l = emulated::block::own()->current();
  l.groups.push_back(std::exchange(l.open, {}));
}
template <int Pending>
void wait_read() {
  auto& groups = emulated::block::own()->current().groups;
  for (std::size_t g = 0; g + Pending < groups.size(); ++g)
    for (emulated::store& s : groups[g]) s.read();
}
template <int Pending>
void wait_written() {
  auto& groups = emulated::block::own()->current().groups;
  for (; groups.size() > Pending; groups.pop_front())
    for (emulated::store& s : groups.front()) s.write();
}
inline void fence_global() {}
inline void fence_shared() {}

}  // namespace detail::bulk

TESSERA_NAMESPACE_END
