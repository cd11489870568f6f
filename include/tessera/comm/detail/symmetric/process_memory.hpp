// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <random>

#include <tessera/core/config.hpp>

// Memory that ranks of one process, a thread each, find by number, so that none of them reads another's objects.

TESSERA_NAMESPACE_BEGIN

namespace detail::symmetric {

class process_memory {
 public:
  static process_memory& instance() {
    static process_memory memory;
    return memory;
  }

  /// Says of a rank whether it finds what this one offers: the same for threads of a process, unless parts of it were
  /// linked without knowing each other. Not 0. A child of a process that has used CUDA cannot, so that it does not
  /// matter that it would have the same.
  std::uint64_t token() const { return token_; }

  /// @param block Whoever finds it keeps it alive; this does not. @return its number.
  std::uint64_t offer(const std::shared_ptr<std::byte>& block) {
    const std::lock_guard lock(mutex_);
    std::erase_if(blocks_, [](const auto& offered) { return offered.second.expired(); });
    blocks_.emplace(++last_, block);
    return last_;
  }
  /// @return null if it is gone.
  std::shared_ptr<std::byte> find(std::uint64_t number) const {
    const std::lock_guard lock(mutex_);
    const auto offered = blocks_.find(number);
    return offered == blocks_.end() ? nullptr : offered->second.lock();
  }
  /// Blocks that somebody still keeps, and those that have gone since the last `offer`.
  std::size_t size() const {
    const std::lock_guard lock(mutex_);
    return blocks_.size();
  }

 private:
  process_memory() {
    std::random_device random;
    token_ = static_cast<std::uint64_t>(random()) << 32 | random() | 1;
  }

  mutable std::mutex mutex_;
  std::map<std::uint64_t, std::weak_ptr<std::byte>> blocks_;
  std::uint64_t last_ = 0;
  std::uint64_t token_ = 0;
};

}  // namespace detail::symmetric

TESSERA_NAMESPACE_END
