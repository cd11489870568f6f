// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0

// Prints what each rank holds of tensors under placements, one line a rank, for dtensor.py to compare:
//   mesh sizes | shape | placements | coordinates | local shape | numbers of the local array's elements in the tensor

#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include <tessera/mesh/mesh.hpp>

namespace ts = tessera;

namespace {

using ts::placement;
using ts::placements;

template <class List>
void print(const List& list, int count) {
  for (int i = 0; i < count; ++i) std::cout << (i == 0 ? "" : ",") << list[i];
}

void print_ranks(const ts::mesh& ranks, const placements& list, const ts::box& tensor) {
  for (int rank = 0; rank < ranks.size(); ++rank) {
    std::int64_t sizes[ts::max_mesh_axes] = {};
    for (int i = 0; i < ranks.num_axes; ++i) sizes[i] = ranks.axes[i].size;
    print(sizes, ranks.num_axes);
    std::cout << "|";
    print(tensor.size, tensor.rank);
    std::cout << "|";
    for (int i = 0; i < list.count; ++i) {
      std::cout << (i == 0 ? "" : ",") << (list[i].is_shard() ? list[i].dim : -1) << ":" << list[i].split_factor;
    }
    std::cout << "|";
    print(ranks.coordinates(rank).at, ranks.num_axes);
    std::cout << "|";
    const ts::box local = ts::local_extents(ranks, list, rank, tensor);
    print(local.size, tensor.rank);
    std::cout << "|";
    std::vector<std::int64_t> elements(static_cast<std::size_t>(local.volume()), -1);
    for (const ts::placed_box& part : ts::placed_boxes(ranks, list, rank, tensor)) {
      for (std::int64_t i = 0; i < part.logical.volume(); ++i) {
        std::int64_t at[ts::max_box_rank] = {};
        std::int64_t local_at[ts::max_box_rank] = {};
        std::int64_t rest = i;
        for (int d = tensor.rank - 1; d >= 0; --d) {
          at[d] = part.logical.offset[d] + rest % part.logical.size[d];
          local_at[d] = part.local.offset[d] + rest % part.logical.size[d];
          rest /= part.logical.size[d];
        }
        elements[static_cast<std::size_t>(local.local_offset(local_at))] = tensor.local_offset(at);
      }
    }
    print(elements, static_cast<int>(elements.size()));
    std::cout << "\n";
  }
}

}  // namespace

int main() {
  try {
    const std::vector<placement> choices = {placement::replicate(),
                                            placement::shard(0),
                                            placement::shard(1),
                                            placement::strided_shard(0, 2),
                                            placement::strided_shard(0, 3),
                                            placement::strided_shard(1, 2)};
    const std::vector<ts::box> tensors = {ts::box::whole({6, 2}), ts::box::whole({8, 4}), ts::box::whole({13, 5}),
                                          ts::box::whole({1, 3})};
    for (const ts::box& tensor : tensors) {
      for (const placement& a : choices) {
        for (int size = 1; size <= 5; ++size) print_ranks({{"a", size}}, {a}, tensor);
        for (const placement& b : choices) {
          print_ranks({{"a", 2}, {"b", 2}}, {a, b}, tensor);
          print_ranks({{"a", 2}, {"b", 3}}, {a, b}, tensor);
          print_ranks({{"a", 4}, {"b", 2}}, {a, b}, tensor);
        }
      }
    }
    for (int ep = 1; ep <= 8; ep *= 2) {  // experts, as a training mesh places them
      const ts::training_mesh ranks({.ep = ep}, 8);
      for (int num_experts = 8; num_experts <= 24; num_experts += 8) {
        print_ranks(ranks.sparse_stage(), ts::expert_placements(ranks, num_experts),
                    ts::box::whole({num_experts, 5, 2}));
      }
    }
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
