// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// How a tensor lies on a mesh: one placement for each axis, with the meaning that PyTorch's DTensor gives them.

#include <cstddef>
#include <initializer_list>
#include <string>

#include <tessera/comm/communicator.hpp>
#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>
#include <tessera/mesh/axes.hpp>

TESSERA_NAMESPACE_BEGIN

/// What a placement does with the tensor along its axis.
enum class placement_kind {
  replicate,      ///< Every coordinate holds the same.
  shard,          ///< Each coordinate holds a chunk of one dimension.
  strided_shard,  ///< The dimension is cut in pieces; each coordinate holds a chunk of every piece.
  partial,        ///< Each coordinate holds a contribution; joined by a reduction they are the tensor.
};

namespace detail {

/// Throws: the dimension is negative, or there is no piece.
[[noreturn]] inline void fail_placement(int dim, int split_factor) {
  if (dim < 0) {
    throw invalid_argument("a tensor cannot be sharded on dimension " + std::to_string(dim) +
                           ", dimensions count from 0");
  }
  throw invalid_argument("a strided shard with split_factor = " + std::to_string(split_factor) +
                         ", it must be at least 1");
}

/// Throws: more placements than a mesh has axes.
[[noreturn]] inline void fail_placement_count(std::size_t count) {
  throw invalid_argument(std::to_string(count) + " placements, a mesh has at most " + std::to_string(max_mesh_axes) +
                         " axes");
}

}  // namespace detail

/// What a tensor does along one axis of a mesh. A plain constexpr value, made by the four functions.
///
/// The placements of a tensor apply one after another, from the outermost axis to the innermost, each to what the ones
/// before it left. A shard follows `torch.chunk`: chunks of `ceil(n / ranks)` elements, so that trailing coordinates
/// may hold less, or nothing (6 on 4 ranks are 2, 2, 2, 0).
struct placement {
  placement_kind kind = placement_kind::replicate;  ///< What happens.
  int dim = -1;                                     ///< Dimension of a shard, -1 of the others.
  int split_factor = 1;                             ///< Pieces of a strided shard, 1 of the others.
  reduce_op op = reduce_op::sum;                    ///< Reduction of a partial, sum of the others.

  /// The same on every coordinate.
  static constexpr placement replicate() { return {}; }

  /// A chunk of a dimension. @param dim At least 0. @throws invalid_argument if it is negative.
  static constexpr placement shard(int dim) { return strided_shard(dim, 1); }

  /// The dimension is cut into `split_factor` pieces as `torch.chunk` does, each piece into one chunk for each
  /// coordinate; a rank holds its chunk of every piece. With split_factor = the size of an inner axis that shards the
  /// same dimension, the result is as if the inner axis had split first. One piece is a plain shard.
  /// @param dim At least 0. @param split_factor At least 1. @throws invalid_argument if either is less.
  static constexpr placement strided_shard(int dim, int split_factor) {
    if (dim < 0 || split_factor < 1) detail::fail_placement(dim, split_factor);
    return {split_factor == 1 ? placement_kind::shard : placement_kind::strided_shard, dim, split_factor,
            reduce_op::sum};
  }

  /// A contribution. DTensor's `avg` is not among the reductions: divide the result of a sum. @param op How
  /// contributions are joined.
  static constexpr placement partial(reduce_op op = reduce_op::sum) { return {placement_kind::partial, -1, 1, op}; }

  /// Whether this is the same on every coordinate.
  constexpr bool is_replicate() const { return kind == placement_kind::replicate; }
  /// Whether this is a shard, strided or not.
  constexpr bool is_shard() const { return kind == placement_kind::shard || kind == placement_kind::strided_shard; }
  /// Whether this is a shard of a dimension, strided or not. @param dimension The dimension.
  constexpr bool is_shard_of(int dimension) const { return is_shard() && dim == dimension; }
  /// Whether this is a contribution.
  constexpr bool is_partial() const { return kind == placement_kind::partial; }

  /// Same placement.
  constexpr bool operator==(const placement&) const = default;
};

/// The placements of a tensor on a mesh: one for each axis, outermost first. A plain constexpr value.
struct placements {
  int count = 0;                     ///< Number of placements, in `[0, max_mesh_axes]`.
  placement at[max_mesh_axes] = {};  ///< The placements; replicate behind the last.

  /// None, for the mesh without axes.
  constexpr placements() = default;

  /// @param list One for each axis, outermost first. @throws invalid_argument if a mesh has no so many axes.
  constexpr placements(std::initializer_list<placement> list) {
    if (list.size() > static_cast<std::size_t>(max_mesh_axes)) detail::fail_placement_count(list.size());
    for (const placement& one : list) at[count++] = one;
  }

  /// The same for each of `axes` axes. @param axes In `[0, max_mesh_axes]`. @param one The placement.
  /// @throws invalid_argument if a mesh has no so many axes.
  static constexpr placements all(int axes, const placement& one = placement::replicate()) {
    if (axes < 0 || axes > max_mesh_axes) detail::fail_placement_count(static_cast<std::size_t>(axes));
    placements result;
    while (result.count < axes) result.at[result.count++] = one;
    return result;
  }

  /// Placement on an axis.
  constexpr const placement& operator[](int axis) const { return at[axis]; }
  /// Placement on an axis.
  constexpr placement& operator[](int axis) { return at[axis]; }

  /// Same placements.
  constexpr bool operator==(const placements&) const = default;
};

/// The name of a reduction. Host.
inline std::string to_string(reduce_op op) {
  return op == reduce_op::sum ? "sum" : op == reduce_op::min ? "min" : "max";
}

/// For people: `replicate`, `shard(0)`, `strided_shard(0,2)`, `partial(sum)`. Host: allocates.
inline std::string to_string(const placement& one) {
  switch (one.kind) {
    case placement_kind::replicate:
      break;
    case placement_kind::shard:
      return "shard(" + std::to_string(one.dim) + ")";
    case placement_kind::strided_shard:
      return "strided_shard(" + std::to_string(one.dim) + "," + std::to_string(one.split_factor) + ")";
    case placement_kind::partial:
      return "partial(" + to_string(one.op) + ")";
  }
  return "replicate";
}

/// For people: `[shard(0), replicate]`. Host: allocates.
inline std::string to_string(const placements& list) {
  std::string result = "[";
  for (int i = 0; i < list.count; ++i) result += (i == 0 ? "" : ", ") + to_string(list[i]);
  return result + "]";
}

namespace detail {

/// Throws the sentence for whatever `expect_placements` found.
[[noreturn]] inline void fail_placements(const mesh& ranks, const placements& list, int tensor_rank) {
  if (list.count != ranks.num_axes) {
    throw invalid_argument(std::to_string(list.count) + " placements " + to_string(list) + " on the mesh " +
                           ranks.text() + ": one for each of its " + std::to_string(ranks.num_axes) +
                           " axes is needed");
  }
  for (int i = 0; i < list.count; ++i) {
    if (!list[i].is_shard() || list[i].dim < tensor_rank) continue;
    throw invalid_argument(to_string(list[i]) + " on axis '" + std::string(ranks.axes[i].label()) +
                           "' of a tensor that has " + std::to_string(tensor_rank) +
                           " dimensions: a dimension that is sharded must exist");
  }
  throw invalid_argument("the placements " + to_string(list) +
                         " join contributions by different reductions: the result would depend on their order");
}

}  // namespace detail

/// Checks that placements fit a mesh and a tensor. @param ranks The mesh. @param list The placements.
/// @param tensor_rank Dimensions of the tensor.
/// @throws invalid_argument unless there is one placement for each axis, every sharded dimension exists, and all
/// partial placements have the same reduction.
constexpr void expect_placements(const mesh& ranks, const placements& list, int tensor_rank) {
  bool good = list.count == ranks.num_axes;
  const placement* partial = nullptr;
  for (int i = 0; i < list.count; ++i) {
    good = good && (!list[i].is_shard() || list[i].dim < tensor_rank);
    if (!list[i].is_partial()) continue;
    good = good && (partial == nullptr || partial->op == list[i].op);
    partial = &list[i];
  }
  if (!good) detail::fail_placements(ranks, list, tensor_rank);
}

/// Which of several equal copies a rank holds.
struct replica {
  int index = 0;  ///< In `[0, count)`, over the replicated axes in the mesh's order.
  int count = 1;  ///< Copies of the same part, all axes on which the tensor is replicated together.

  /// Same copy.
  constexpr bool operator==(const replica&) const = default;
};

/// The copy of its part that a rank holds. Ranks with the same coordinates on the other axes hold the same boxes and
/// different indices. Partial contributions are no copies of one another.
/// @param ranks The mesh. @param list Placements, one for each axis. @param rank Rank in the mesh.
/// @throws invalid_argument if there is no such rank or the numbers of axes differ.
constexpr replica replica_of(const mesh& ranks, const placements& list, int rank) {
  if (list.count != ranks.num_axes) detail::fail_placements(ranks, list, max_box_rank);
  mesh_group copies{ranks, 0};
  for (int i = 0; i < list.count; ++i) {
    if (list[i].is_replicate()) copies.selected |= 1U << i;
  }
  return {copies.index(rank), copies.size()};
}

TESSERA_NAMESPACE_END
