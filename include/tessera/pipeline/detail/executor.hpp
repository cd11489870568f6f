// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <sstream>
#include <string>

#include <tessera/pipeline/executor.hpp>

TESSERA_NAMESPACE_BEGIN

namespace pipeline {

namespace detail {

// How errors call what a stage was asked for.
constexpr const char* name_of(action_kind kind) {
  if (kind == action_kind::forward) return "forward";
  if (kind == action_kind::backward_input) return "backward_input";
  if (kind == action_kind::backward_weights) return "backward_weights";
  return "an overlapped pair";
}

}  // namespace detail

template <class Comm, class T>
template <class Call>
void executor<Comm, T>::guarded(const planned_work& work, action_kind during, Call call) {
  const auto describe = [&](const char* reason) {
    std::ostringstream text;
    text << "stage " << work.stage << " (rank " << plan_.rank << "), micro-batch " << work.micro_batch << ", in "
         << detail::name_of(during) << ": " << reason;
    return text.str();
  };
  try {
    call();
  } catch (const comm_error& e) {  // a stage's own collective: it names the culprit already
    tell_others(describe(e.what()));
    throw;
  } catch (const std::exception& e) {
    const std::string text = describe(e.what());
    tell_others(text);
    std::throw_with_nested(stage_error(text, plan_.rank, work.stage, work.micro_batch, during));
  } catch (...) {
    const std::string text = describe("it threw something that is not a std::exception");
    tell_others(text);
    std::throw_with_nested(stage_error(text, plan_.rank, work.stage, work.micro_batch, during));
  }
}

}  // namespace pipeline

TESSERA_NAMESPACE_END
