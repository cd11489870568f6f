// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What errors say.

#include <string>

#include <tessera/core/error.hpp>

namespace tessera_test {

/// The text of the `Exception` that `f()` throws, "" if it throws none.
template <class Exception = tessera::invalid_argument, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Exception& e) {
    return e.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace tessera_test
