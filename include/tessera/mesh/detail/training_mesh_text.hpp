// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Training meshes from text, and the sentences with which they are refused.

#include <cstdint>
#include <sstream>
#include <string>
#include <string_view>

#include <tessera/core/error.hpp>
#include <tessera/mesh/detail/mesh_text.hpp>
#include <tessera/mesh/training_mesh.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

[[noreturn]] inline void fail_world(const training_sizes& sizes, int world) {
  std::int64_t others = 1;  // grows no further once it exceeds the world
  for (const int size : {sizes.pp, sizes.dp_replicate, sizes.cp, sizes.tp}) others *= others <= world ? size : 1;
  std::ostringstream text;
  if (sizes.dp_shard == 0) {
    text << "pp * dp_replicate * cp * tp = " << sizes.pp << " * " << sizes.dp_replicate << " * " << sizes.cp << " * "
         << sizes.tp << " must divide the number of ranks, " << world;
  } else {
    text << "pp * dp_replicate * dp_shard * cp * tp = " << sizes.pp << " * " << sizes.dp_replicate << " * "
         << sizes.dp_shard << " * " << sizes.cp << " * " << sizes.tp << " must be the number of ranks, " << world;
  }
  if (others > world) {
    text << "; these axes alone have " << (sizes.dp_shard == 0 ? "more ranks" : "more ranks without dp_shard");
  } else if (world % others == 0) {
    text << "; dp_shard = " << world / others << " would be right";
  } else {
    text << "; the nearest numbers of ranks that a dp_shard exists for are " << world / others * others << " and "
         << (world / others + 1) * others;
  }
  throw invalid_argument(text.str());
}

[[noreturn]] inline void fail_expert_axis(int ep, int shared) {
  std::ostringstream text;
  text << "ep = " << ep << " must divide dp_shard * cp * tp = " << shared << "; ";
  int below = ep < shared ? ep : shared;
  while (shared % below != 0) --below;
  text << "the nearest that " << (ep < shared ? "do are " : "does is ") << below;
  if (ep < shared) {
    int above = ep;
    while (shared % above != 0) ++above;
    text << " and " << above;
  }
  throw invalid_argument(text.str());
}

[[noreturn]] inline void fail_members(const std::string& dense, const std::string& sizes) {
  throw invalid_argument("a training mesh of the sizes " + sizes + " has other views than " + dense +
                         " and what was given with it: leave them to the constructor that takes the number of ranks");
}

[[noreturn]] inline void fail_views(std::string_view name, const std::string& dense, const std::string& sparse) {
  std::ostringstream text;
  text << "axis '" << name << "' and another one of the group belong to different views, " << dense << " and " << sparse
       << ": name axes of one view";
  throw invalid_argument(text.str());
}

}  // namespace detail

inline training_mesh training_mesh::parse(std::string_view text, int world) {
  training_sizes sizes;
  struct entry {
    std::string_view name;
    int* size;
    bool given = false;
  };
  entry entries[] = {{"pp", &sizes.pp},
                     {"dp_replicate", &sizes.dp_replicate},
                     {"dp_shard", &sizes.dp_shard},
                     {"cp", &sizes.cp},
                     {"tp", &sizes.tp},
                     {"ep", &sizes.ep}};
  detail::for_each_axis_in(text, [&](std::string_view name, int size) {
    for (entry& one : entries) {
      if (one.name != name) continue;
      if (one.given) detail::fail_axis_twice(name);
      if (size < 1) detail::fail_axis_size(name, size);
      one.given = true;
      *one.size = size;
      return;
    }
    TESSERA_EXPECTS(false, "the mesh '" << text << "' names an axis '" << name
                                        << "': the sizes to choose are pp, dp_replicate, dp_shard, cp, tp and ep, "
                                           "others follow from them");
  });
  return training_mesh(sizes, world);
}

TESSERA_NAMESPACE_END
