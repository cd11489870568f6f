// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Who holds what of a group of parameters, and its communication buffer.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <utility>
#include <vector>

#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>
#include <tessera/layout/boxes.hpp>
#include <tessera/shard/detail/copy_parts.hpp>
#include <tessera/shard/parameter.hpp>

TESSERA_NAMESPACE_BEGIN
namespace shard {

/// Parameters that are gathered and reduced together, divided among `ranks` ranks: each parameter on its own, by
/// `chunk_of` along its dimension.
///
/// The communication buffer is `[ranks, row_elements]`: row `r` holds the parts of rank `r` one after another, packed,
/// in the order of the parameters. Rows are as long as the longest (that of rank 0), so shorter ones end in padding,
/// which exists nowhere else. Host: set-up code allocates; `pack` and `unpack` do not.
class group_layout {
 public:
  group_layout() = default;

  /// @param parameters What is divided. @param ranks Among how many.
  /// @throws invalid_argument for fewer than 1 rank, a scalar, a dimension that does not exist, a dimension other than
  /// 0 that `ranks` does not divide, and a held part outside of its tensors; the message names the parameter.
  group_layout(std::vector<parameter> parameters, int ranks) : parameters_(std::move(parameters)), ranks_(ranks) {
    TESSERA_EXPECTS(ranks >= 1, "a shard group needs at least 1 rank, ranks = " << ranks);
    for (const parameter& p : parameters_) {
      const box& tensor = p.divided();
      TESSERA_EXPECTS(tensor.rank >= 1, "parameter '" << p.name
                                                      << "' is a scalar, which has no dimension to divide: give it the "
                                                         "shape [1]");
      TESSERA_EXPECTS(p.dim >= 0 && p.dim < tensor.rank, "parameter '" << p.name
                                                                       << "' would be divided along dimension " << p.dim
                                                                       << ", it has " << tensor.rank << " dimensions");
      TESSERA_EXPECTS(p.dim == 0 || tensor.size[p.dim] % ranks == 0,
                      "parameter '" << p.name << "': its dimension " << p.dim << " has " << tensor.size[p.dim]
                                    << " elements, which " << ranks
                                    << " ranks do not divide; only dimension 0 may be divided unevenly");
      for (std::size_t h = 0; h < p.held.size(); ++h) {
        const held_box& held = p.held[h];
        TESSERA_EXPECTS(at_origin(tensor).contains(held.local) && p.whole.contains(held.logical) &&
                            std::ranges::equal(held.local.size, held.logical.size),
                        "parameter '" << p.name << "': held part " << h
                                      << " does not lie in the local and in the whole tensor with the same extents");
      }
    }
    for (int rank = 0; rank < ranks; ++rank) row_ = (std::max)(row_, shard_elements(rank));
  }

  /// Number of parameters.
  int num_parameters() const { return static_cast<int>(parameters_.size()); }
  /// Number of ranks that divide them.
  int ranks() const { return ranks_; }
  /// Parameter `i`.
  const parameter& at(int i) const { return parameters_[static_cast<std::size_t>(i)]; }

  /// Elements of parameter `i`, all ranks together.
  std::int64_t elements(int i) const { return at(i).divided().volume(); }

  /// The part of rank `rank` within the tensor that is divided; empty where nothing is left for it. @param i Parameter.
  /// @param rank Rank.
  box part(int i, int rank) const {
    const parameter& p = at(i);
    box result = at_origin(p.divided());
    const chunk own = chunk_of(result.size[p.dim], ranks_, rank);
    result.offset[p.dim] = own.begin;
    result.size[p.dim] = own.length;
    return result;
  }

  /// Elements of that part. @param i Parameter. @param rank Rank.
  std::int64_t part_elements(int i, int rank) const { return part(i, rank).volume(); }

  /// The part in logical terms: which elements of the logical tensor, and where they lie in the packed local array.
  /// Several boxes where an expert layout scatters the experts, none where the part is empty. Host: allocates.
  /// @param i Parameter. @param rank Rank.
  std::vector<held_box> logical_part(int i, int rank) const {
    const parameter& p = at(i);
    const box own = part(i, rank);
    std::vector<held_box> result;
    if (own.empty()) return result;
    const auto add = [&](const held_box& held) {
      const box common = intersect(held.local, own);
      if (common.empty()) return;
      held_box piece{common, common};
      for (int d = 0; d < common.rank; ++d) {
        piece.logical.offset[d] = held.logical.offset[d] + common.offset[d] - held.local.offset[d];
        piece.local.offset[d] = common.offset[d] - own.offset[d];
      }
      result.push_back(piece);
    };
    if (p.held.empty()) {
      add({p.divided(), at_origin(p.divided())});
    } else {
      for (const held_box& held : p.held) add(held);
    }
    return result;
  }

  /// Elements that rank `rank` holds of all parameters.
  std::int64_t shard_elements(int rank) const {
    std::int64_t sum = 0;
    for (int i = 0; i < num_parameters(); ++i) sum += part_elements(i, rank);
    return sum;
  }

  /// Elements of a row of the communication buffer.
  std::int64_t row_elements() const { return row_; }

  /// Elements of all parameters, all ranks together.
  std::int64_t full_elements() const {
    std::int64_t sum = 0;
    for (int i = 0; i < num_parameters(); ++i) sum += elements(i);
    return sum;
  }

  /// From whole parameters to the communication buffer.
  /// @param full   For each parameter its elements, packed row-major.
  /// @param buffer `[ranks, row_elements]`; padding becomes zero, or stays as it is when adding.
  /// @param add    Whether to add to the buffer instead of overwriting it.
  template <class From, class To>
  void pack(std::span<From* const> full, To* buffer, bool add = false) const {
    for (int rank = 0; rank < ranks_; ++rank) {
      To* place = buffer + rank * row_;
      for (int i = 0; i < num_parameters(); ++i) {
        place =
            detail::pack_part(full[static_cast<std::size_t>(i)], at(i).divided(), part(i, rank), at(i).dim, place, add);
      }
      if (!add) std::fill(place, buffer + (rank + 1) * row_, To{});
    }
  }

  /// From the communication buffer to whole parameters. Padding is not read.
  /// @param buffer `[ranks, row_elements]`. @param full For each parameter where its elements go, packed row-major.
  template <class From, class To>
  void unpack(const From* buffer, std::span<To* const> full) const {
    for (int rank = 0; rank < ranks_; ++rank) {
      const From* place = buffer + rank * row_;
      for (int i = 0; i < num_parameters(); ++i) {
        place =
            detail::unpack_part(place, full[static_cast<std::size_t>(i)], at(i).divided(), part(i, rank), at(i).dim);
      }
    }
  }

  /// From one whole parameter to the packed part of one rank. @param i Parameter. @param rank Rank. @param full Its
  /// elements. @param part_of_rank `[part_elements]`.
  template <class From, class To>
  void copy_part(int i, int rank, const From* full, To* part_of_rank) const {
    detail::pack_part(full, at(i).divided(), part(i, rank), at(i).dim, part_of_rank, false);
  }

 private:
  static box at_origin(box tensor) {
    std::fill(std::begin(tensor.offset), std::end(tensor.offset), 0);
    return tensor;
  }

  std::vector<parameter> parameters_;
  int ranks_ = 1;
  std::int64_t row_ = 0;
};

}  // namespace shard
TESSERA_NAMESPACE_END
