// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// libFuzzer's entry point; README.md has the commands.

#include "parsers.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  tessera_test::read_as_safetensors(input);
  tessera_test::read_as_manifest(input);
  return 0;
}
