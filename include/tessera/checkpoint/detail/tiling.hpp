// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Whether boxes tile a tensor: every element in exactly one of them.

#include <algorithm>
#include <array>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include <tessera/core/box.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint::detail {

/// Boxes as `[a, b) x [c, d)`, for messages.
inline std::string text_of(const box& part) {
  std::ostringstream text;
  if (part.rank == 0) text << "the scalar";
  for (int i = 0; i < part.rank; ++i) {
    text << (i == 0 ? "[" : " x [") << part.offset[i] << ", " << part.offset[i] + part.size[i] << ")";
  }
  return text.str();
}

/// "" if every element of `whole` is in exactly one of `parts`, which lie in it; else a sentence about the first
/// element, in row-major order, of which this is not true.
///
/// The sum of the boxes' indicator functions is that of the whole if and only if their differences are the same, and
/// the difference of a box is +1 or -1 at each of its corners. So the corners of all boxes, added up, must be those of
/// the whole: no geometry, O(n log n) for any arrangement. The first corner that is left over is the element asked for.
inline std::string find_tiling_error(const box& whole, const std::vector<box>& parts) {
  if (whole.empty()) return "";
  if (parts.size() == 1 && parts.front() == whole) return "";
  struct corner {
    std::array<std::int64_t, max_box_rank> at;
    std::int64_t sign;
  };
  std::vector<corner> corners;
  const unsigned per_box = 1U << static_cast<unsigned>(whole.rank);
  corners.reserve((parts.size() + 1) * per_box);
  const auto add = [&](const box& part, std::int64_t factor) {
    if (part.empty()) return;
    for (unsigned mask = 0; mask < per_box; ++mask) {
      corner c{{}, factor};
      for (int i = 0; i < whole.rank; ++i) {
        const bool is_end = (mask >> static_cast<unsigned>(i) & 1U) != 0;
        c.at[static_cast<std::size_t>(i)] = part.offset[i] + (is_end ? part.size[i] : 0);
        if (is_end) c.sign = -c.sign;
      }
      corners.push_back(c);
    }
  };
  add(whole, -1);
  for (const box& part : parts) add(part, 1);
  std::sort(corners.begin(), corners.end(), [](const corner& a, const corner& b) { return a.at < b.at; });
  for (std::size_t i = 0; i < corners.size();) {
    std::int64_t sum = 0;
    std::size_t end = i;
    while (end < corners.size() && corners[end].at == corners[i].at) sum += corners[end++].sign;
    if (sum != 0) {
      std::ostringstream text;
      text << "element [";
      for (int d = 0; d < whole.rank; ++d) text << (d == 0 ? "" : ", ") << corners[i].at[static_cast<std::size_t>(d)];
      text << "] is in " << sum + 1 << " of them, it must be in exactly 1";
      return text.str();
    }
    i = end;
  }
  return "";
}

}  // namespace checkpoint::detail

TESSERA_NAMESPACE_END
