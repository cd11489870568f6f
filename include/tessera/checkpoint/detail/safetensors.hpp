// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Definitions of safetensors.hpp.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <tessera/checkpoint/detail/files.hpp>
#include <tessera/checkpoint/detail/json.hpp>
#include <tessera/checkpoint/safetensors.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

namespace detail {

/// Bytes of a packed tensor; -1 if there are more than 2^62, or would be without its extents of 0: products of extents
/// in any order do not overflow then.
inline std::int64_t bytes_of_shape(const std::vector<std::int64_t>& shape, element_type type) {
  std::int64_t bytes = size_of(type);
  bool empty = false;
  for (const std::int64_t extent : shape) {
    if (extent < 0) return -1;
    if (extent == 0) {
      empty = true;
      continue;
    }
    if (bytes > (std::int64_t{1} << 62) / extent) return -1;
    bytes *= extent;
  }
  return empty ? 0 : bytes;
}

inline std::int64_t read_little_endian(const char* bytes) {
  std::uint64_t value = 0;
  for (int i = 8; i-- > 0;) value = value << 8 | static_cast<unsigned char>(bytes[i]);
  return value > (std::uint64_t{1} << 62) ? std::int64_t{1} << 62 : static_cast<std::int64_t>(value);
}

/// Checks the length of a header. @return Where elements start.
inline std::int64_t expect_header_length(std::int64_t length, std::int64_t file_bytes, const std::string& source) {
  TESSERA_EXPECTS_AS(checkpoint_error, length <= max_safetensors_header_bytes && length <= file_bytes - 8,
                     source << ": its header would have " << length << " bytes, the file has " << file_bytes
                            << " and a header has at most " << max_safetensors_header_bytes);
  return 8 + length;
}

}  // namespace detail

inline const safetensors_entry* safetensors_header::find(std::string_view name) const {
  const auto place = std::lower_bound(entries.begin(), entries.end(), name,
                                      [](const safetensors_entry& e, std::string_view n) { return e.name < n; });
  return place != entries.end() && place->name == name ? &*place : nullptr;
}

inline safetensors_header parse_safetensors_header(std::string_view start, std::int64_t file_bytes,
                                                   const std::string& source) {
  TESSERA_EXPECTS_AS(checkpoint_error, start.size() >= 8 && file_bytes >= 8,
                     source << ": it has " << file_bytes << " bytes, a safetensors file has at least 8");
  safetensors_header header;
  const std::int64_t length = detail::read_little_endian(start.data());
  header.data_begin = detail::expect_header_length(length, file_bytes, source);
  header.data_bytes = file_bytes - header.data_begin;
  TESSERA_EXPECTS_AS(checkpoint_error, start.size() >= static_cast<std::size_t>(header.data_begin),
                     source << ": the header's " << length << " bytes were not read completely");
  const std::string_view text = start.substr(8, static_cast<std::size_t>(length));
  TESSERA_EXPECTS_AS(checkpoint_error, !text.empty() && text.front() == '{',
                     source << ": its header is no JSON object");

  const detail::json root = detail::parse_json(text, source);
  const detail::json_reader reader(root, source);
  for (const auto& [name, value] : reader.object()) {
    if (name == "__metadata__") {
      const detail::json_reader metadata(value, source + ": '__metadata__'");
      for (const auto& [key, item] : metadata.object()) {
        if (!item.is_string()) metadata.fail("'" + key + "' must be a string");
        header.metadata.emplace(key, item.get_ref<const std::string&>());
      }
      continue;
    }
    const detail::json_reader tensor(value, source + ": tensor '" + name + "'");
    safetensors_entry entry;
    entry.name = name;
    const std::string& type = tensor.text("dtype");
    const auto known = element_type_named(type);
    if (!known) tensor.fail("its dtype '" + type + "' is not known");
    entry.type = *known;
    entry.shape = tensor.integers("shape");
    const std::vector<std::int64_t> offsets = tensor.integers("data_offsets");
    if (offsets.size() != 2) tensor.fail("'data_offsets' must be two numbers");
    entry.begin = offsets[0];
    entry.end = offsets[1];
    const std::int64_t bytes = detail::bytes_of_shape(entry.shape, entry.type);
    if (entry.begin > entry.end || entry.end > header.data_bytes || bytes != entry.end - entry.begin) {
      tensor.fail("its data_offsets [" + std::to_string(entry.begin) + ", " + std::to_string(entry.end) +
                  ") do not fit: its shape needs " + std::to_string(bytes) + " bytes and the file has " +
                  std::to_string(header.data_bytes) + " after the header");
    }
    header.entries.push_back(std::move(entry));
  }

  std::vector<const safetensors_entry*> by_place;
  for (const safetensors_entry& entry : header.entries) by_place.push_back(&entry);
  std::sort(by_place.begin(), by_place.end(),
            [](const auto* a, const auto* b) { return std::pair(a->begin, a->end) < std::pair(b->begin, b->end); });
  std::int64_t end = 0;
  for (const safetensors_entry* entry : by_place) {
    TESSERA_EXPECTS_AS(checkpoint_error, entry->begin == end,
                       source << ": tensor '" << entry->name << "' starts at byte " << entry->begin
                              << " of the data, where the one before it ends at " << end
                              << (entry->begin < end ? ": they overlap" : ": there is a hole"));
    end = entry->end;
  }
  TESSERA_EXPECTS_AS(checkpoint_error, end == header.data_bytes,
                     source << ": its tensors have " << end << " bytes, " << header.data_bytes
                            << " follow the header: the file is truncated or something was added to it");
  return header;
}

inline safetensors_header read_safetensors_header(const std::string& path, const io_observer& observer) {
  const detail::file source = detail::file::open(path);
  const std::int64_t bytes = source.size();
  std::string start(8, '\0');
  TESSERA_EXPECTS_AS(checkpoint_error, bytes >= 8,
                     path << ": it has " << bytes << " bytes, a safetensors file has at least 8");
  source.read(start.data(), 8, 0, observer);
  const std::int64_t end = detail::expect_header_length(detail::read_little_endian(start.data()), bytes, path);
  start.resize(static_cast<std::size_t>(end));
  source.read(start.data() + 8, end - 8, 8, observer);
  return parse_safetensors_header(start, bytes, path);
}

inline std::string make_safetensors_header(const std::vector<safetensors_entry>& entries,
                                           const std::map<std::string, std::string>& metadata) {
  std::string text = "{";
  if (!metadata.empty()) text += "\"__metadata__\":" + detail::dump_json(metadata, "metadata");
  for (const safetensors_entry& entry : entries) {
    if (text.size() > 1) text += ',';
    text += detail::dump_json(entry.name, "a tensor's name");
    text += ":{\"dtype\":\"";
    text += name_of(entry.type);
    text += "\",\"shape\":[";
    for (std::size_t i = 0; i < entry.shape.size(); ++i) {
      if (i > 0) text += ',';
      text += std::to_string(entry.shape[i]);
    }
    text += "],\"data_offsets\":[" + std::to_string(entry.begin) + ',' + std::to_string(entry.end) + "]}";
  }
  text += '}';
  while ((text.size() + 8) % safetensors_alignment != 0) text += ' ';
  TESSERA_EXPECTS(static_cast<std::int64_t>(text.size()) <= max_safetensors_header_bytes,
                  "a safetensors header for " << entries.size() << " tensors has " << text.size() << " bytes, at most "
                                              << max_safetensors_header_bytes << " are possible: use more files");
  std::string start(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) start[i] = static_cast<char>(text.size() >> (8 * i) & 255U);
  return start + text;
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
