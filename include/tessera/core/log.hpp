// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Where the library's few messages go: a value that the user makes and hands over. There is no global sink, and the
/// default one is silent.

#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// How much a message matters, in ascending order.
enum class log_level {
  debug,    ///< For work on the library itself.
  info,     ///< A choice that was made, for example of a kernel or a bound.
  warning,  ///< Works, but not as it should.
  silent,   ///< As a sink's threshold: no message at all.
};

/// A user's function, what it is called with, and the least level it wants. Trivially copyable; owns nothing.
class log_sink {
 public:
  /// Receives one message, without a line end. It may be called from any thread that calls the library, and it must not
  /// throw.
  using function = void (*)(void* context, log_level level, std::string_view message);

  /// Silent.
  constexpr log_sink() noexcept = default;

  /// @param write   Called for each message; null is silent.
  /// @param context Handed to `write`; outlives the sink.
  /// @param least   Messages below it are not made at all.
  constexpr log_sink(function write, void* context, log_level least = log_level::info) noexcept
      : write_(write), context_(context), least_(write == nullptr ? log_level::silent : least) {}

  /// Whether a message of this level would be written; ask before making an expensive one.
  constexpr bool wants(log_level level) const noexcept { return level >= least_ && level < log_level::silent; }

  /// Writes the streamed `parts` as one message: `log(log_level::info, "row_bound = ", bound)`. Nothing is formatted
  /// when the sink does not want the level.
  template <class... Parts>
  void operator()(log_level level, const Parts&... parts) const {
    if (!wants(level)) return;
    std::ostringstream message;
    (message << ... << parts);
    write_(context_, level, message.str());
  }

 private:
  function write_ = nullptr;
  void* context_ = nullptr;
  log_level least_ = log_level::silent;
};
static_assert(std::is_trivially_copyable_v<log_sink>);

TESSERA_NAMESPACE_END
