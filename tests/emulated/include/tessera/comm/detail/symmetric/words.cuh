// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// In the place of the header of this name.

#include <tessera/core/config.hpp>

#include "emulated/language.hpp"

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

inline void post(std::uint32_t* flag, std::uint32_t value) {
  std::atomic_ref<std::uint32_t>(*flag).store(value, std::memory_order_release);
}
inline std::uint32_t peek(const std::uint32_t* flag) {
  emulated::block::own()->yield();  // who asks again and again lets others run
  return std::atomic_ref<std::uint32_t>(*const_cast<std::uint32_t*>(flag)).load(std::memory_order_acquire);
}
inline std::uint32_t count_up(std::uint32_t* count) {
  return std::atomic_ref<std::uint32_t>(*count).fetch_add(1, std::memory_order_acq_rel);
}
inline std::uint64_t nanoseconds() {
  return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
