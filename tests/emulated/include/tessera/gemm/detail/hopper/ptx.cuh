// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name: barriers in shared memory, of which one thread arms a phase. An address of
// shared memory is an offset in the block's.

#include <tessera/core/config.hpp>

#include "emulated/block.hpp"

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {
extern thread_local __align__(16) unsigned char shared_bytes[];  // of a block
}

namespace detail::hopper {

inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - symmetric::shared_bytes);
}
inline void barrier_init(std::uint32_t address, int) {
  emulated::block::own()->barrier(address) = emulated::transaction_barrier{};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(std::uint32_t address, std::uint32_t bytes) {
  emulated::transaction_barrier& b = emulated::block::own()->barrier(address);
  if (b.expected != 0) {
    std::fprintf(stderr, "a barrier is armed while its phase is not over\n");
    std::abort();
  }
  b.expected = bytes;
  b.arrived = 0;
}
inline void barrier_wait(std::uint32_t address, std::uint32_t parity) {
  emulated::transaction_barrier& b = emulated::block::own()->barrier(address);
  emulated::block::own()->wait([&] {
    for (const auto& load : std::exchange(b.loads, {})) load();
    if (b.expected != 0 && b.arrived == b.expected) {
      ++b.phase;
      b.expected = 0;
    }
    return (b.phase & 1) != parity;
  });
}

inline std::atomic_ref<std::uint32_t> shared_word(std::uint32_t address) {
  return std::atomic_ref<std::uint32_t>(*reinterpret_cast<std::uint32_t*>(symmetric::shared_bytes + address));
}
inline std::uint32_t load_acquire_shared(std::uint32_t address) {
  emulated::block::own()->yield();  // who asks again and again lets others run
  return shared_word(address).load();
}
inline void store_release_shared(std::uint32_t address, std::uint32_t value) { shared_word(address).store(value); }

}  // namespace detail::hopper

TESSERA_NAMESPACE_END
