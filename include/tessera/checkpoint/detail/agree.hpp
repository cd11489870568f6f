// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// One rank's failure becomes everybody's error, so that nobody waits for a rank that has given up.

#include <cstdint>
#include <exception>
#include <limits>
#include <string>
#include <utility>

#include <tessera/checkpoint/detail/pieces.hpp>
#include <tessera/comm/communicator.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

/// The outcome of a local step: whether it failed, and the text of what it threw.
struct outcome {
  bool failed = false;
  std::string text;
};

/// Runs a local step.
template <class Step>
outcome attempt(Step&& step) {
  try {
    std::forward<Step>(step)();
    return {};
  } catch (const std::exception& e) {
    return {true, e.what()};
  } catch (...) {
    return {true, "something was thrown that is not a std::exception"};
  }
}

/// Throws the same checkpoint_error on all ranks if the step of any failed: that of the lowest rank. Collective.
template <class Comm>
void agree(Comm& comm, const outcome& own) {
  constexpr std::int32_t nobody = std::numeric_limits<std::int32_t>::max();
  const auto rank = static_cast<std::int32_t>(comm.rank());
  const std::int32_t mine = own.failed ? rank : nobody;
  std::int32_t first = nobody;
  comm.all_reduce(host_stream{}, &mine, &first, 1, reduce_op::min);
  if (first == nobody) return;
  const std::string text = broadcast_bytes(comm, own.text, first);
  throw checkpoint_error(comm.size() == 1 ? text : "rank " + std::to_string(first) + ": " + text);
}

/// A local step and the agreement on it.
template <class Comm, class Step>
void together(Comm& comm, Step&& step) {
  agree(comm, attempt(std::forward<Step>(step)));
}

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
