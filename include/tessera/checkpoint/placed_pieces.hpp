// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The pieces of a tensor that lies on a mesh.

#include <string>
#include <type_traits>
#include <vector>

#include <tessera/checkpoint/detail/box_copy.hpp>
#include <tessera/checkpoint/piece.hpp>
#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>
#include <tessera/mesh/axes.hpp>
#include <tessera/mesh/placement.hpp>
#include <tessera/mesh/region.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// The pieces of a tensor that a rank holds under placements: one for a plain shard, several for a strided one, an
/// empty one where the rank holds nothing.
/// @param name  Name of the tensor.
/// @param data  The rank's local array, packed and row-major, of `local_extents(ranks, list, rank, whole)`.
/// @param whole The whole tensor, `box::whole({...})`.
/// @param ranks The mesh.
/// @param list  Placements, one for each axis.
/// @param rank  Rank in the mesh.
/// @throws invalid_argument if the placements do not fit, or one is partial: contributions are no tensor yet, and must
/// be reduced before.
template <class T>
auto placed_pieces(const std::string& name, T* data, const box& whole, const mesh& ranks, const placements& list,
                   int rank) {
  for (int i = 0; i < list.count; ++i) {
    TESSERA_EXPECTS(!list[i].is_partial(),
                    "tensor '" << name << "' is placed as " << to_string(list) << ": reduce it before it is saved");
  }
  using data_type = std::conditional_t<std::is_const_v<T>, const void, void>;
  std::vector<basic_piece<data_type>> pieces;
  const std::string placed = to_string(list) + " on " + ranks.text();
  const box local = local_extents(ranks, list, rank, whole);
  for (const placed_box& held : placed_boxes(ranks, list, rank, whole)) {
    pieces.push_back({{name, element_type_of<T>(), whole, held.logical, placed},
                      data + local.local_offset(held.local),
                      detail::packed_strides(local)});
  }
  if (pieces.empty()) {
    box nothing = whole;
    for (int i = 0; i < whole.rank; ++i) nothing.size[i] = 0;
    pieces.push_back({{name, element_type_of<T>(), whole, nothing, placed}, data});
  }
  return pieces;
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
