// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Memory in which a checkpoint is between the disk and the caller's memory.

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

/// Bytes on huge pages where the system has them, not initialised: the first access to each page of such memory costs
/// about as much as reading it from a fast disk, and huge pages are 512 times fewer. Does not move.
class staging_memory {
 public:
  staging_memory() = default;
  staging_memory(const staging_memory&) = delete;
  staging_memory& operator=(const staging_memory&) = delete;
  ~staging_memory() { release(); }

  /// At least `bytes` bytes. What was there is gone, and is given back before anything new is taken.
  void reserve(std::int64_t bytes) {
    if (bytes <= bytes_) return;
    release();
    const auto size = static_cast<std::size_t>(bytes);
    alignment_ = std::align_val_t{size < huge_page ? alignof(std::max_align_t) : huge_page};
    data_ = static_cast<std::byte*>(::operator new(size, alignment_));
    bytes_ = bytes;
#if defined(MADV_HUGEPAGE)  // only a hint
    if (size >= huge_page) (void)::madvise(data_, size / huge_page * huge_page, MADV_HUGEPAGE);
#endif
  }

  std::byte* data() const { return data_; }

 private:
  static constexpr std::size_t huge_page = std::size_t{2} << 20;

  void release() {
    if (data_ != nullptr) ::operator delete(data_, alignment_);
    data_ = nullptr;
    bytes_ = 0;
  }

  std::byte* data_ = nullptr;
  std::int64_t bytes_ = 0;
  std::align_val_t alignment_{};
};

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
