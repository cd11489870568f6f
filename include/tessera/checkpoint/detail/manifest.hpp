// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of manifest.hpp.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include <tessera/checkpoint/detail/checksum.hpp>
#include <tessera/checkpoint/detail/files.hpp>
#include <tessera/checkpoint/detail/json.hpp>
#include <tessera/checkpoint/detail/safetensors.hpp>
#include <tessera/checkpoint/detail/slabs.hpp>
#include <tessera/checkpoint/detail/tiling.hpp>
#include <tessera/checkpoint/manifest.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

namespace detail {

inline std::vector<std::int64_t> extents_of(const box& whole) { return {whole.size, whole.size + whole.rank}; }

inline box read_box(const json_reader& reader, const char* size_key, const char* offset_key) {
  const std::vector<std::int64_t> sizes = reader.integers(size_key);
  const std::vector<std::int64_t> offsets =
      offset_key == nullptr ? std::vector<std::int64_t>(sizes.size()) : reader.integers(offset_key);
  if (sizes.size() > static_cast<std::size_t>(max_box_rank) || sizes.size() != offsets.size()) {
    reader.fail(std::string("'") + size_key + "' has " + std::to_string(sizes.size()) + " dimensions, at most " +
                std::to_string(max_box_rank) + " are possible, and as many as the offsets have");
  }
  box result;
  result.rank = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), result.size);
  std::copy(offsets.begin(), offsets.end(), result.offset);
  return result;
}

/// The text whose checksum a manifest carries: that of all members but the checksum itself.
inline std::uint64_t manifest_checksum(const json& root) { return checksum_of(dump_json(root, "a manifest")); }

}  // namespace detail

inline const manifest_tensor* manifest::find(std::string_view name) const {
  const auto place = std::lower_bound(tensors.begin(), tensors.end(), name,
                                      [](const manifest_tensor& t, std::string_view n) { return t.name < n; });
  return place != tensors.end() && place->name == name ? &*place : nullptr;
}

inline void expect_manifest(const manifest& content, const std::string& source) {
  const auto fail = [&](const auto&... parts) {
    std::ostringstream text;
    text << source << ": ";
    (text << ... << parts);
    throw checkpoint_error(text.str());
  };
  if (content.num_ranks < 1) fail("num_ranks is ", content.num_ranks);
  if (content.block_bytes < min_block_bytes || content.block_bytes > max_block_bytes) {
    fail("block_bytes is ", content.block_bytes, ", it must be in [", min_block_bytes, ", ", max_block_bytes, "]");
  }
  if (content.state.step < 0) fail("step is ", content.state.step, ", it must not be negative");
  std::unordered_set<std::string_view> names;
  for (const manifest_file& file : content.files) {
    if (!detail::is_plain_name(file.name)) fail("'", file.name, "' is no name of a file in the same folder");
    if (!names.insert(file.name).second) fail("the file '", file.name, "' is listed twice");
    if (file.header_bytes < 0 || file.header_bytes > file.bytes) {
      fail("the file '", file.name, "' has ", file.bytes, " bytes, a header of ", file.header_bytes, " does not fit");
    }
  }

  struct range {
    std::int32_t file;
    std::int64_t begin;
    std::int64_t end;
    const manifest_tensor* tensor;
  };
  std::vector<range> ranges;
  std::vector<box> parts;
  const manifest_tensor* previous = nullptr;
  for (const manifest_tensor& tensor : content.tensors) {
    const auto fail_tensor = [&](const auto&... what) { fail("tensor '", tensor.name, "': ", what...); };
    if (previous != nullptr && !(previous->name < tensor.name)) {
      fail_tensor(previous->name == tensor.name ? "it is listed twice" : "tensors must be in order of their names");
    }
    previous = &tensor;
    const std::int64_t element_bytes = size_of(tensor.type);
    const std::vector<std::int64_t> extents = detail::extents_of(tensor.whole);
    if (detail::bytes_of_shape(extents, tensor.type) < 0) fail_tensor("it is larger than 2^62 bytes");
    parts.clear();
    for (const manifest_chunk& chunk : tensor.chunks) {
      for (int i = 0; i < tensor.whole.rank; ++i) {
        const std::int64_t begin = chunk.part.offset[i];
        const std::int64_t size = chunk.part.size[i];
        if (chunk.part.rank != tensor.whole.rank || begin < 0 || size < 0 || begin > tensor.whole.size[i] ||
            size > tensor.whole.size[i] - begin) {
          fail_tensor("the chunk ", detail::text_of(chunk.part), " does not lie in ", detail::text_of(tensor.whole));
        }
      }
      if (chunk.part.rank != tensor.whole.rank) fail_tensor("a chunk has another number of dimensions");
      if (chunk.file < 0 || chunk.file >= static_cast<std::int64_t>(content.files.size())) {
        fail_tensor("a chunk is in file ", chunk.file, ", there are ", content.files.size());
      }
      const manifest_file& file = content.files[static_cast<std::size_t>(chunk.file)];
      const std::int64_t bytes = chunk.part.volume() * element_bytes;
      if (chunk.begin < file.header_bytes || chunk.begin > file.bytes || bytes > file.bytes - chunk.begin) {
        fail_tensor("the chunk ", detail::text_of(chunk.part), " would have ", bytes, " bytes from byte ", chunk.begin,
                    " of '", file.name, "', whose elements have bytes [", file.header_bytes, ", ", file.bytes, ")");
      }
      const detail::slab_division slabs(chunk.part, element_bytes, content.block_bytes);
      if (!chunk.checksums.empty() && static_cast<std::int64_t>(chunk.checksums.size()) != slabs.count()) {
        fail_tensor("the chunk ", detail::text_of(chunk.part), " has ", chunk.checksums.size(), " checksums for ",
                    slabs.count(), " blocks");
      }
      parts.push_back(chunk.part);
      if (bytes > 0) ranges.push_back({chunk.file, chunk.begin, chunk.begin + bytes, &tensor});
    }
    const std::string wrong = detail::find_tiling_error(tensor.whole, parts);
    if (!wrong.empty()) fail_tensor("its ", parts.size(), " chunks do not cover it once: ", wrong);
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const range& a, const range& b) { return std::pair(a.file, a.begin) < std::pair(b.file, b.begin); });
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    const range& a = ranges[i - 1];
    const range& b = ranges[i];
    if (a.file == b.file && b.begin < a.end) {
      fail("tensors '", a.tensor->name, "' and '", b.tensor->name, "' overlap in '",
           content.files[static_cast<std::size_t>(a.file)].name, "' at byte ", b.begin);
    }
  }
}

inline std::string to_json(const manifest& content) {
  using detail::json;
  TESSERA_EXPECTS(std::isfinite(content.state.learning_rate),
                  "the learning rate is " << content.state.learning_rate << ", it must be finite to be saved");
  json root = {{"format", "tessera-checkpoint"},
               {"version", manifest_version},
               {"num_ranks", content.num_ranks},
               {"block_bytes", content.block_bytes},
               {"train_state",
                {{"step", content.state.step},
                 {"learning_rate", content.state.learning_rate},
                 {"rng", content.state.rng},
                 {"data_cursor", content.state.data_cursor},
                 {"values", content.state.values}}}};
  json files = json::array();
  for (const manifest_file& file : content.files) {
    files.push_back({{"name", file.name},
                     {"bytes", file.bytes},
                     {"header_bytes", file.header_bytes},
                     {"header_checksum", detail::checksum_text(file.header_checksum)}});
  }
  json tensors = json::array();
  for (const manifest_tensor& tensor : content.tensors) {
    json chunks = json::array();
    for (const manifest_chunk& chunk : tensor.chunks) {
      json checksums = json::array();
      for (const std::uint64_t checksum : chunk.checksums) checksums.push_back(detail::checksum_text(checksum));
      const std::int64_t bytes = chunk.part.volume() * size_of(tensor.type);
      json item = {{"offset", std::vector<std::int64_t>(chunk.part.offset, chunk.part.offset + chunk.part.rank)},
                   {"size", detail::extents_of(chunk.part)},
                   {"file", chunk.file},
                   {"entry", chunk.entry},
                   {"range", json::array({chunk.begin, chunk.begin + bytes})}};
      item["checksums"] = std::move(checksums);
      chunks.push_back(std::move(item));
    }
    json item = {{"name", tensor.name}, {"dtype", name_of(tensor.type)}, {"shape", detail::extents_of(tensor.whole)}};
    item["placement"] = tensor.placement;
    item["chunks"] = std::move(chunks);
    tensors.push_back(std::move(item));
  }
  root["files"] = std::move(files);
  root["tensors"] = std::move(tensors);
  root["checksum"] = detail::checksum_text(detail::manifest_checksum(root));
  return detail::dump_json(root, "a manifest") + "\n";
}

inline manifest parse_manifest(std::string_view text, const std::string& source, self_check check) {
  using detail::json_reader;
  detail::json root = detail::parse_json(text, source);
  const json_reader reader(root, source);
  if (reader.text("format") != "tessera-checkpoint") reader.fail("this is no manifest of a checkpoint");
  const std::int64_t version = reader.integer("version");
  if (version != manifest_version) {
    reader.fail("its version is " + std::to_string(version) + ", this library reads version " +
                std::to_string(manifest_version));
  }
  if (check == self_check::on) {
    const std::string expected = reader.text("checksum");
    root.erase("checksum");
    if (expected != detail::checksum_text(detail::manifest_checksum(root))) {
      reader.fail("its checksum is wrong: the manifest is damaged");
    }
  }

  manifest content;
  content.num_ranks = reader.integer("num_ranks");
  content.block_bytes = reader.integer("block_bytes");
  const json_reader state(reader.at("train_state"), source + ": train_state");
  content.state.step = state.integer("step");
  content.state.learning_rate = state.number("learning_rate");
  content.state.rng = state.text("rng");
  content.state.data_cursor = state.text("data_cursor");
  const json_reader values(state.at("values"), source + ": train_state: values");
  for (const auto& [key, value] : values.object()) {
    if (!value.is_string()) values.fail("'" + key + "' must be a string");
    content.state.values.emplace(key, value.get_ref<const std::string&>());
  }

  const auto checksum = [](const json_reader& owner, const detail::json& value) {
    std::uint64_t result = 0;
    if (!value.is_string() || !detail::read_checksum(value.get_ref<const std::string&>(), result)) {
      owner.fail("a checksum must be 16 hexadecimal digits");
    }
    return result;
  };
  for (const detail::json& value : reader.array("files")) {
    const json_reader item(value, source + ": file " + std::to_string(content.files.size()));
    manifest_file file;
    file.name = item.text("name");
    file.bytes = item.integer("bytes");
    file.header_bytes = item.integer("header_bytes");
    file.header_checksum = checksum(item, item.at("header_checksum"));
    content.files.push_back(std::move(file));
  }
  for (const detail::json& value : reader.array("tensors")) {
    const json_reader unnamed(value, source + ": tensor " + std::to_string(content.tensors.size()));
    manifest_tensor tensor;
    tensor.name = unnamed.text("name");
    const json_reader item(value, source + ": tensor '" + tensor.name + "'");
    const std::string& type = item.text("dtype");
    const auto known = element_type_named(type);
    if (!known) item.fail("its dtype '" + type + "' is not known");
    tensor.type = *known;
    tensor.whole = detail::read_box(item, "shape", nullptr);
    tensor.placement = item.text("placement");
    // before any volume is computed from it
    if (detail::bytes_of_shape(detail::extents_of(tensor.whole), tensor.type) < 0)
      item.fail("it is larger than 2^62 bytes");
    for (const detail::json& chunk_value : item.array("chunks")) {
      const json_reader chunk_item(chunk_value, item.where() + ": chunk " + std::to_string(tensor.chunks.size()));
      manifest_chunk chunk;
      chunk.part = detail::read_box(chunk_item, "size", "offset");
      const std::int64_t file = chunk_item.integer("file");
      if (file >= static_cast<std::int64_t>(content.files.size())) {
        chunk_item.fail("it is in file " + std::to_string(file) + ", there are " +
                        std::to_string(content.files.size()));
      }
      chunk.file = static_cast<std::int32_t>(file);
      chunk.entry = chunk_item.text("entry");
      const std::vector<std::int64_t> range = chunk_item.integers("range");
      const std::int64_t bytes = detail::bytes_of_shape(detail::extents_of(chunk.part), tensor.type);
      if (range.size() != 2 || bytes < 0 || range[0] > range[1] || bytes != range[1] - range[0]) {
        chunk_item.fail("its 'range' must be two numbers, as many bytes apart as its size needs: " +
                        std::to_string(bytes));
      }
      chunk.begin = range[0];
      for (const detail::json& sum : chunk_item.array("checksums"))
        chunk.checksums.push_back(checksum(chunk_item, sum));
      tensor.chunks.push_back(std::move(chunk));
    }
    content.tensors.push_back(std::move(tensor));
  }
  expect_manifest(content, source);
  return content;
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
