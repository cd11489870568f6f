// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Caller-owned memory, told apart by how long its content must live, and the builder that lays structures out in it.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

/// Alignment in bytes of every `memory_ref` and of every slice taken from one.
inline constexpr std::size_t memory_alignment = 256;

/// Bytes owned by the caller. The tag keeps memory of different lifetimes from being swapped.
template <class Lifetime>
struct memory_ref {
  std::byte* data = nullptr;  ///< Aligned to `memory_alignment`; may be null when `bytes` is 0.
  std::size_t bytes = 0;      ///< Size.

  constexpr memory_ref() = default;
  /// @param data_  Start, aligned to `memory_alignment`. @param bytes_ Size.
  constexpr memory_ref(void* data_, std::size_t bytes_) : data(static_cast<std::byte*>(data_)), bytes(bytes_) {}
  /// From anything with `data()` and `size()` in bytes.
  template <class Buffer>
  requires requires(Buffer& b) {
    { b.data() } -> std::convertible_to<void*>;
    { b.size() } -> std::convertible_to<std::size_t>;
    requires sizeof(*b.data()) == 1;
  }
  constexpr memory_ref(Buffer& buffer) : memory_ref(buffer.data(), buffer.size()) {}  // NOLINT: meant to be implicit
};

namespace lifetime {
struct saved {};      ///< Per layer and micro-batch, from forward to backward.
struct deferred {};   ///< From input-backward to weight-backward.
struct workspace {};  ///< During one call.
struct state {};      ///< As long as the layer; part of a checkpoint.
}  // namespace lifetime

using saved_memory = memory_ref<lifetime::saved>;          ///< From forward to backward, per layer and micro-batch.
using deferred_memory = memory_ref<lifetime::deferred>;    ///< From input-backward to weight-backward.
using workspace_memory = memory_ref<lifetime::workspace>;  ///< During one call.
using state_memory = memory_ref<lifetime::state>;          ///< As long as the layer; part of a checkpoint.

/// Lays out slices one after another. The same code counts the bytes (default constructor) and carves a buffer
/// (constructor with memory), so sizes and pointers cannot disagree.
class memory_builder {
 public:
  /// Counts only: `take` returns null.
  memory_builder() = default;

  /// Carves a buffer.
  /// @param memory The buffer.
  /// @param what   How errors call it, a literal.
  /// @throws invalid_argument if the buffer is not aligned to `memory_alignment`.
  template <class Lifetime>
  memory_builder(const memory_ref<Lifetime>& memory, const char* what)
      : memory_builder(memory.data, memory.bytes, what) {}

  /// A slice of `count` elements, aligned to `memory_alignment`, not initialised; null while counting or when `count`
  /// is 0.
  /// @throws invalid_argument naming the slice if the buffer ends before it does, or, while counting too, if `count` is
  /// negative or the bytes are more than a pointer difference counts.
  template <class T>
  T* take(const char* name, std::int64_t count) {
    static_assert(std::is_trivially_copyable_v<T>);
    return reinterpret_cast<T*>(take_bytes(name, count, sizeof(T)));
  }

  /// Bytes taken so far, gaps for alignment included.
  std::size_t bytes() const noexcept { return bytes_; }
  /// True while nothing but counting happens.
  bool counting() const noexcept { return counting_; }

 private:
  memory_builder(std::byte* base, std::size_t capacity, const char* what)
      : base_(base), capacity_(capacity), what_(what), counting_(false) {
    TESSERA_EXPECTS(reinterpret_cast<std::uintptr_t>(base_) % memory_alignment == 0,
                    what << " starts at " << static_cast<const void*>(base_) << ", which is not aligned to "
                         << memory_alignment << " bytes");
  }

  std::byte* take_bytes(const char* name, std::int64_t count, std::size_t element_bytes) {
    TESSERA_EXPECTS(count >= 0, "slice '" << name << "' of " << what_ << " would have " << count << " elements");
    const std::size_t begin = (bytes_ + memory_alignment - 1) / memory_alignment * memory_alignment;
    TESSERA_EXPECTS(static_cast<std::size_t>(count) <= (most_bytes - begin) / element_bytes,
                    "slice '" << name << "' of " << what_ << " would have " << count << " elements of " << element_bytes
                              << " bytes behind byte " << begin << ": more than there are addresses");
    bytes_ = begin + static_cast<std::size_t>(count) * element_bytes;
    if (counting_ || count == 0) return nullptr;
    TESSERA_EXPECTS(base_ != nullptr && bytes_ <= capacity_, what_ << " is too small: slice '" << name
                                                                   << "' needs bytes [" << begin << ", " << bytes_
                                                                   << ") and " << capacity_ << " bytes were given");
    return base_ + begin;
  }

  static constexpr std::size_t most_bytes = PTRDIFF_MAX / memory_alignment * memory_alignment;

  std::byte* base_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t bytes_ = 0;
  const char* what_ = "a buffer being counted";
  bool counting_ = true;
};

/// Host memory with the library's alignment, zero-filled: a convenience for host engines, tests and examples.
class host_buffer {
 public:
  host_buffer() = default;
  /// @param bytes Size; 0 allocates nothing.
  explicit host_buffer(std::size_t bytes)
      : data_(bytes == 0 ? nullptr : static_cast<std::byte*>(::operator new(bytes, alignment))), bytes_(bytes) {
    for (std::size_t i = 0; i < bytes; ++i) data_[i] = std::byte{0};
  }
  /// Takes the memory. @param other Empty afterwards.
  host_buffer(host_buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  /// Takes the memory and frees its own. @param other Moved here.
  host_buffer& operator=(host_buffer other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~host_buffer() { ::operator delete(data_, alignment); }
  /// First byte.
  std::byte* data() noexcept { return data_; }
  /// Size in bytes.
  std::size_t size() const noexcept { return bytes_; }

 private:
  // not std::unique_ptr: <memory> is a fifth of a second of every `.cu` file with a layer
  static constexpr std::align_val_t alignment{memory_alignment};
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

TESSERA_NAMESPACE_END
