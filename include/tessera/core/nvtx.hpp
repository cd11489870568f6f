// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Named ranges in the timelines of NVIDIA's profilers, in the domain "tessera". They are on when
/// `TESSERA_ENABLE_NVTX` is defined, the same in every translation unit of a program; the toolkit's header is needed
/// then. Off, they cost nothing and need nothing.
///
/// They are named as the calls they stand for, "tessera::moe_layer::forward": the passes and `end_step` of `moe_layer`,
/// `begin_gather`, `reduce` and `step` of `fully_sharded` in host memory, `pipeline::executor::run`, and of checkpoints
/// `load` and the saver's `save`, `save_async` and `wait`.

#include <tessera/core/config.hpp>

#if defined(TESSERA_ENABLE_NVTX)
#include <nvtx3/nvtx3.hpp>
#endif

TESSERA_NAMESPACE_BEGIN

// The two forms have names of their own, so that a program which mixes them has no type with two definitions.
#if defined(TESSERA_ENABLE_NVTX)

/// The domain that the library's ranges stand in.
struct nvtx_domain {
  static constexpr char const* name{"tessera"};  ///< As profilers show it.
};

inline namespace nvtx_on {

/// A range from construction to destruction, on the calling thread.
class nvtx_range {
 public:
  /// @param name Text of the range; a literal.
  explicit nvtx_range(const char* name) : range_(name) {}

 private:
  ::nvtx3::scoped_range_in<nvtx_domain> range_;
};

}  // namespace nvtx_on

#else

inline namespace nvtx_off {

/// A range from construction to destruction, on the calling thread; nothing while NVTX is off.
class nvtx_range {
 public:
  /// @param name Text of the range; a literal.
  explicit constexpr nvtx_range(const char* name) noexcept { static_cast<void>(name); }
};

}  // namespace nvtx_off

#endif

TESSERA_NAMESPACE_END
