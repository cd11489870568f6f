// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include "units.hpp"

std::vector<std::size_t> sizes_in_second() { return sizes_here(); }

bool second_catches_first() {
  try {
    throw_in_first();
  } catch (const tessera::invalid_argument&) {
    return true;
  } catch (...) {
    return false;
  }
  return false;
}
