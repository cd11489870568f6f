// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Meshes from text: `axis=size,axis=size`.

#include <charconv>
#include <string>
#include <string_view>
#include <system_error>

#include <tessera/core/error.hpp>
#include <tessera/mesh/axes.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// Calls `visit(name, size)` for each `name=size` of a list with commas. The size is a number, nothing more is checked.
template <class Visit>
void for_each_axis_in(std::string_view text, Visit&& visit) {
  std::string_view rest = text;
  while (!rest.empty()) {
    const std::size_t comma = rest.find(',');
    const std::string_view item = rest.substr(0, comma);
    const std::size_t equals = item.find('=');
    int size = 0;
    bool good = equals != std::string_view::npos;
    if (good) {
      const char* const end = item.data() + item.size();
      const std::from_chars_result read = std::from_chars(item.data() + equals + 1, end, size);
      good = read.ec == std::errc() && read.ptr == end;
    }
    const bool ends_in_comma = comma != std::string_view::npos && comma + 1 == rest.size();
    constexpr const char* right = ": write axis=size,axis=size, for example dp_shard=2,ep=2";
    TESSERA_EXPECTS(good, "the mesh '" << text << "' cannot be read at '" << item << "'" << right);
    TESSERA_EXPECTS(!ends_in_comma, "the mesh '" << text << "' ends in a comma" << right);
    visit(item.substr(0, equals), size);
    rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
  }
}

}  // namespace detail

inline mesh mesh::parse(std::string_view text) {
  mesh result;
  detail::for_each_axis_in(text, [&](std::string_view name, int size) { result.add(mesh_axis::named(name, size)); });
  return result;
}

TESSERA_NAMESPACE_END
