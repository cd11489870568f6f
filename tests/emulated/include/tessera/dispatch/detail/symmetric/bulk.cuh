// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name: the copy engine, which does what it is asked at the last moment or at once.

#include <tessera/core/config.hpp>
#include <tessera/gemm/detail/hopper/ptx.cuh>

#include "emulated/language.hpp"

TESSERA_NAMESPACE_BEGIN

namespace detail::bulk {

inline constexpr int alignment = 16;
inline constexpr int line = 128;
constexpr std::uint32_t next_line(std::uint32_t address) { return (address + line - 1) / line * line; }

inline void load(std::uint32_t target, const void* source, int bytes, std::uint32_t barrier) {
  const emulated::unseen own_work;
  emulated::block& own = *emulated::block::own();
  emulated::lane& lane = own.current();
  const emulated::load copy{symmetric::shared_bytes + target, source, static_cast<std::size_t>(bytes),
                            lane.copies.begin(lane.self), &lane.copies};
  emulated::transaction_barrier& b = own.barrier(barrier);
  if (own.random() % 2 == 0)
    b.complete(copy, lane.self);
  else
    b.add(copy);
}
inline void store(void* target, std::uint32_t source, int bytes) {
  const emulated::unseen own_work;
  emulated::block& own = *emulated::block::own();
  emulated::lane& lane = own.current();
  emulated::store copy{static_cast<unsigned char*>(target), symmetric::shared_bytes + source,
                       static_cast<std::size_t>(bytes), lane.copies.begin(lane.self)};
  if (own.random() % 4 == 0) copy.write(lane.self);
  lane.stores.add(std::move(copy));
}
inline void commit() {
  const emulated::unseen own_work;
  emulated::block::own()->current().stores.commit();
}
template <int Pending>
void wait_read() {
  const emulated::unseen own_work;
  emulated::lane& lane = emulated::block::own()->current();
  lane.stores.wait_read(Pending, lane.self);
}
template <int Pending>
void wait_written() {
  const emulated::unseen own_work;
  emulated::lane& lane = emulated::block::own()->current();
  lane.stores.wait_written(Pending, lane.self, lane.copies);
}
inline void fence_global() {}
inline void fence_shared() {}

}  // namespace detail::bulk

TESSERA_NAMESPACE_END
