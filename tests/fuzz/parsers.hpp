// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the fuzzer and the replay of its corpus do with an input: it is read as a safetensors file and as a manifest.
// Either is refused with a checkpoint_error, or written again and read again as the same.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include <tessera/checkpoint/checkpoint.hpp>

namespace tessera_test {

inline void expect_in_parser(bool condition) {
  if (!condition) std::abort();
}

// Whether the input is a safetensors file.
inline bool read_as_safetensors(std::string_view input) {
  namespace ck = tessera::checkpoint;
  ck::safetensors_header header;
  try {
    header = ck::parse_safetensors_header(input, static_cast<std::int64_t>(input.size()), "input");
  } catch (const tessera::checkpoint_error&) {
    return false;
  }
  for (const ck::safetensors_entry& entry : header.entries) {
    expect_in_parser(entry.begin >= 0 && entry.begin <= entry.end && entry.end <= header.data_bytes);
    expect_in_parser(header.find(entry.name) == &entry);
  }
  const std::string again = ck::make_safetensors_header(header.entries, header.metadata);
  expect_in_parser(again.size() % ck::safetensors_alignment == 0);
  const auto bytes = static_cast<std::int64_t>(again.size()) + header.data_bytes;
  const ck::safetensors_header reread = ck::parse_safetensors_header(again, bytes, "again");
  expect_in_parser(reread.entries == header.entries && reread.metadata == header.metadata);
  return true;
}

// Whether the input is a manifest.
inline bool read_as_manifest(std::string_view input) {
  namespace ck = tessera::checkpoint;
  ck::manifest content;
  try {
    content = ck::parse_manifest(input, "input", ck::self_check::off);
  } catch (const tessera::checkpoint_error&) {
    return false;
  }
  expect_in_parser(ck::parse_manifest(ck::to_json(content), "again") == content);
  // where everything is read, every element of every tensor is read once
  std::int64_t bytes = 0;
  std::vector<std::vector<ck::piece_info>> pieces(2);
  for (const ck::manifest_tensor& tensor : content.tensors) {
    const std::int64_t size = tensor.whole.volume() * size_of(tensor.type);
    if (size > 1'000'000 || tensor.name.empty() || tensor.name == "__metadata__") return true;
    bytes += size;
    if (bytes > 1'000'000) return true;
    for (auto& rank : pieces) rank.push_back({tensor.name, tensor.type, tensor.whole, tensor.whole, ""});
  }
  const ck::read_plan plan = ck::plan_reads(content, pieces, "input");
  std::int64_t planned = 0;
  for (const ck::read_unit& unit : plan.units) {
    const ck::manifest_tensor& tensor = content.tensors[static_cast<std::size_t>(unit.tensor)];
    const ck::manifest_chunk& chunk = tensor.chunks[static_cast<std::size_t>(unit.chunk)];
    const ck::manifest_file& file = content.files[static_cast<std::size_t>(chunk.file)];
    expect_in_parser(unit.bytes > 0 && unit.begin >= file.header_bytes && unit.begin + unit.bytes <= file.bytes);
    expect_in_parser(chunk.checksums.empty() || unit.block < static_cast<std::int64_t>(chunk.checksums.size()));
    planned += unit.bytes;
  }
  expect_in_parser(planned == bytes);
  return true;
}

}  // namespace tessera_test
