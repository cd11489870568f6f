// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

// What a rank holds, found by cutting lists of indices as torch.chunk cuts tensors: no ranges, no arithmetic in common
// with the library.

#include <cstddef>
#include <cstdint>
#include <vector>

#include <tessera/mesh/mesh.hpp>

namespace mesh_oracle {

namespace ts = tessera;

using indices = std::vector<std::int64_t>;

// torch.chunk, filled up with empty chunks.
inline std::vector<indices> chunk(const indices& list, int chunks) {
  std::vector<indices> result(static_cast<std::size_t>(chunks));
  const std::size_t size = (list.size() + static_cast<std::size_t>(chunks) - 1) / static_cast<std::size_t>(chunks);
  std::size_t next = 0;
  for (indices& part : result) {
    while (part.size() < size && next < list.size()) part.push_back(list[next++]);
  }
  return result;
}

// Indices of one dimension that a rank holds, as DTensor splits: axis after axis from the left; a strided shard chunks
// the dimension, then each piece, and concatenates its chunks.
inline indices held(const ts::mesh& ranks, const ts::placements& list, int rank, std::int64_t extent, int dim) {
  indices result;
  for (std::int64_t i = 0; i < extent; ++i) result.push_back(i);
  int below = ranks.size();
  for (int axis = 0; axis < list.count; ++axis) {
    below /= ranks.axes[axis].size;
    const int coordinate = rank / below % ranks.axes[axis].size;
    if (list[axis].dim != dim) continue;
    indices kept;
    for (const indices& piece : chunk(result, list[axis].split_factor)) {
      const indices part = chunk(piece, ranks.axes[axis].size)[static_cast<std::size_t>(coordinate)];
      kept.insert(kept.end(), part.begin(), part.end());
    }
    result = kept;
  }
  return result;
}

// Numbers, in the whole tensor, of a rank's elements in the order of its local array.
inline indices held_elements(const ts::mesh& ranks, const ts::placements& list, int rank, const ts::box& tensor) {
  indices elements{0};
  for (int dim = 0; dim < tensor.rank; ++dim) {
    indices finer;
    for (const std::int64_t element : elements) {
      for (const std::int64_t index : held(ranks, list, rank, tensor.size[dim], dim)) {
        finer.push_back(element * tensor.size[dim] + index);
      }
    }
    elements = finer;
  }
  return elements;
}

}  // namespace mesh_oracle
