// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The exceptions of host calls, and the check that throws them.

#include <sstream>
#include <stdexcept>
#include <string>

#include <tessera/core/config.hpp>

TESSERA_NAMESPACE_BEGIN

/// Root of everything the library throws. Its text says what was wrong, with the values, and what would be right.
/// Unless a function states otherwise, throwing leaves the caller's state as it was.
class error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument, a shape, a buffer or an input value that the call cannot work with.
class invalid_argument : public error {
 public:
  using error::error;
};

/// A call of the CUDA runtime or driver failed.
class cuda_error : public error {
 public:
  using error::error;
};

/// A call of NCCL failed, or a communicator reported an asynchronous error.
class nccl_error : public error {
 public:
  using error::error;
};

/// A rank did not do its part: it failed, or it did not arrive in time.
class comm_error : public error {
 public:
  /// @param what  The whole sentence, ranks and phase included.
  /// @param rank  The rank that reports.
  /// @param peer  The rank at fault, -1 where it is not known.
  /// @param phase The operation during which it happened, for example "all_to_all_v".
  comm_error(const std::string& what, int rank, int peer, std::string phase)
      : error(what), rank_(rank), peer_(peer), phase_(std::move(phase)) {}

  /// The rank that reports.
  int rank() const noexcept { return rank_; }
  /// The rank at fault, -1 where it is not known.
  int peer() const noexcept { return peer_; }
  /// The operation during which it happened.
  const std::string& phase() const noexcept { return phase_; }

 private:
  int rank_;
  int peer_;
  std::string phase_;
};

/// A checkpoint that cannot be read or written.
class checkpoint_error : public error {
 public:
  using error::error;
};

TESSERA_NAMESPACE_END

/// Throws `Exception` with the streamed message when `condition` does not hold:
/// `TESSERA_EXPECTS_AS(invalid_argument, k <= n, "top_k = " << k << " exceeds num_experts = " << n)`.
#define TESSERA_EXPECTS_AS(Exception, condition, ...) \
  do {                                                \
    if (!(condition)) [[unlikely]] {                  \
      std::ostringstream tessera_message_;            \
      tessera_message_ << __VA_ARGS__;                \
      throw Exception(tessera_message_.str());        \
    }                                                 \
  } while (false)

/// `TESSERA_EXPECTS_AS` with `tessera::invalid_argument`.
#define TESSERA_EXPECTS(condition, ...) TESSERA_EXPECTS_AS(::tessera::invalid_argument, condition, __VA_ARGS__)
