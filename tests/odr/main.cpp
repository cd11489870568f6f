// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

#include <cstdio>

#include "units.hpp"

int main() {
  const tessera::bfloat16 value(1.5f);
  bool caught = false;
  try {
    throw_in_first();
  } catch (const tessera::error&) {
    caught = true;
  }
  const bool same_sizes = sizes_here() == sizes_in_first() && sizes_here() == sizes_in_second();
  const bool same_value = first_element({&value, 1, 1}) == 1.5f;
  const bool same_exception = second_catches_first();
  std::printf("sizes %d, value %d, exception in main %d, exception between units %d\n", same_sizes, same_value, caught,
              same_exception);
  return same_sizes && same_value && caught && same_exception ? 0 : 1;
}
