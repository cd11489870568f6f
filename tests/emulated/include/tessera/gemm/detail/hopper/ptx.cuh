// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name: barriers in shared memory, of which one thread arms a phase. An address of
// shared memory is an offset in the block's.

#include <tessera/core/config.hpp>

#include "emulated/language.hpp"

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {
extern thread_local __align__(16) unsigned char shared_bytes[];  // of a block
}

namespace detail::hopper {

inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - symmetric::shared_bytes);
}
inline void barrier_init(std::uint32_t address, int arrivals) {
  const emulated::unseen own_work;
  if (arrivals != 1) {
    std::fprintf(stderr, "barriers of %d arrivals are not emulated\n", arrivals);
    std::abort();
  }
  emulated::block::own()->barrier(address) = emulated::transaction_barrier{};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(std::uint32_t address, std::uint32_t bytes) {
  const emulated::unseen own_work;
  if (emulated::block::own()->barrier(address).arm(bytes)) return;
  std::fprintf(stderr, "a barrier is armed while its phase is not over\n");
  std::abort();
}
inline void barrier_wait(std::uint32_t address, std::uint32_t parity) {
  const emulated::unseen own_work;
  emulated::block& own = *emulated::block::own();
  emulated::transaction_barrier& barrier = own.barrier(address);
  own.wait([&] { return barrier.look(parity, own.current().self); });
}

inline std::atomic_ref<std::uint32_t> shared_word(std::uint32_t address) {
  return std::atomic_ref<std::uint32_t>(*reinterpret_cast<std::uint32_t*>(symmetric::shared_bytes + address));
}
inline std::uint32_t load_acquire_shared(std::uint32_t address) {
  emulated::block::own()->yield();  // who asks again and again lets others run
  return shared_word(address).load(std::memory_order_acquire);
}
inline void store_release_shared(std::uint32_t address, std::uint32_t value) {
  shared_word(address).store(value, std::memory_order_release);
}

}  // namespace detail::hopper

TESSERA_NAMESPACE_END
