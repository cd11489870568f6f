// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// A mesh: the ranks of a communicator as a grid with named axes, and the groups of ranks along some of them.

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>

#include <tessera/core/error.hpp>
#include <tessera/mesh/detail/mesh_failures.hpp>

TESSERA_NAMESPACE_BEGIN

/// The most axes a mesh may have.
inline constexpr int max_mesh_axes = 8;
/// The longest name an axis may have.
inline constexpr int max_axis_name = 23;

/// One axis of a mesh: `{"dp", 4}`, a name and the number of coordinates along it. The mesh checks both.
struct mesh_axis {
  char name[max_axis_name + 1] =
      {};        ///< Letters, digits and underscores, not a digit first; the rest is filled with 0.
  int size = 1;  ///< At least 1.

  /// From a name that is no literal. @param name 1 to `max_axis_name` characters. @param size At least 1.
  /// @throws invalid_argument if the name is longer.
  static constexpr mesh_axis named(std::string_view name, int size) {
    if (name.size() > max_axis_name) detail::fail_axis_name(name, max_axis_name);
    mesh_axis result;
    for (std::size_t i = 0; i < name.size(); ++i) result.name[i] = name[i];
    result.size = size;
    return result;
  }

  /// The name.
  constexpr std::string_view label() const {
    std::size_t length = 0;  // counted here: g++ 12 misjudges strlen of a constexpr object and warns
    while (length < max_axis_name && name[length] != 0) ++length;
    return {name, length};
  }

  /// Same name and size.
  constexpr bool operator==(const mesh_axis&) const = default;
};

/// The place of a rank in a mesh: one coordinate for each axis, 0 behind the last.
struct mesh_coordinates {
  int at[max_mesh_axes] = {};  ///< Coordinate on each axis.

  /// Coordinate on an axis.
  constexpr int operator[](int axis) const { return at[axis]; }
  /// Coordinate on an axis.
  constexpr int& operator[](int axis) { return at[axis]; }
  /// Same place.
  constexpr bool operator==(const mesh_coordinates&) const = default;
};

struct mesh_group;

/// The ranks `[0, size())` as a row-major grid with named axes, the outermost first: neighbours on the last axis are
/// neighbouring ranks. A plain value of a structural type, so it may be a template argument; everything about it is
/// constexpr. An empty mesh has no axis and one rank.
///
///     constexpr tessera::mesh grid{{"dp", 2}, {"tp", 4}};
///     static_assert(grid.coordinate(6, grid.axis("dp")) == 1);
struct mesh {
  int num_axes = 0;                    ///< Axes, in `[0, max_mesh_axes]`.
  mesh_axis axes[max_mesh_axes] = {};  ///< The axes, outermost first. Written by the constructors alone.

  /// No axis, one rank.
  constexpr mesh() = default;

  /// @param list The axes, outermost first.
  /// @throws invalid_argument if there are too many, a name or a size is wrong, two have one name, or the ranks exceed
  /// an int.
  constexpr mesh(std::initializer_list<mesh_axis> list) {
    if (list.size() > static_cast<std::size_t>(max_mesh_axes))
      detail::fail_axis_count(static_cast<std::int64_t>(list.size()), max_mesh_axes);
    for (const mesh_axis& one : list) add(one);
  }

  /// From its members, which is how nvcc writes a template argument for the host compiler. Checks the same.
  /// @param count Axes, in `[0, max_mesh_axes]`. @param list The axes, outermost first.
  constexpr mesh(int count, const mesh_axis (&list)[max_mesh_axes]) {
    if (count < 0 || count > max_mesh_axes) detail::fail_axis_count(count, max_mesh_axes);
    for (int i = 0; i < count; ++i) add(list[i]);
  }

  /// From text: `dp=2,tp=4`, outermost first; the empty text is the mesh of one rank.
  /// @throws invalid_argument if it cannot be read, or for what the other constructor refuses.
  static mesh parse(std::string_view text);

  /// Number of ranks.
  constexpr int size() const {
    int product = 1;
    for (int i = 0; i < num_axes; ++i) product *= axes[i].size;
    return product;
  }

  /// Coordinates along an axis. @throws invalid_argument if there is no such axis.
  constexpr int size(int axis_index) const { return axes[checked(axis_index)].size; }
  /// Coordinates along an axis. @throws invalid_argument if there is no such axis.
  constexpr int size(std::string_view name) const { return axes[axis(name)].size; }

  /// Position of an axis, -1 where there is none of that name.
  constexpr int find(std::string_view name) const {
    for (int i = 0; i < num_axes; ++i) {
      if (axes[i].label() == name) return i;
    }
    return -1;
  }

  /// Position of an axis. @throws invalid_argument if there is none of that name.
  constexpr int axis(std::string_view name) const {
    const int found = find(name);
    if (found < 0) detail::fail_axis(name, text());
    return found;
  }

  /// Difference of the ranks of two neighbours along an axis. @throws invalid_argument if there is no such axis.
  constexpr int stride(int axis_index) const {
    int product = 1;
    for (int i = num_axes - 1; i > checked(axis_index); --i) product *= axes[i].size;
    return product;
  }

  /// Coordinate of a rank on an axis. @throws invalid_argument if there is no such rank or axis.
  constexpr int coordinate(int rank, int axis_index) const {
    return checked_rank(rank) / stride(axis_index) % axes[axis_index].size;
  }

  /// Coordinates of a rank. @throws invalid_argument if there is no such rank.
  constexpr mesh_coordinates coordinates(int rank) const {
    mesh_coordinates place;
    int rest = checked_rank(rank);
    for (int i = num_axes - 1; i >= 0; --i) {
      place[i] = rest % axes[i].size;
      rest /= axes[i].size;
    }
    return place;
  }

  /// The rank at a place. @throws invalid_argument if a coordinate is outside of its axis.
  constexpr int rank_at(const mesh_coordinates& place) const {
    int rank = 0;
    for (int i = 0; i < num_axes; ++i) {
      if (place[i] < 0 || place[i] >= axes[i].size) detail::fail_coordinate(axes[i].label(), place[i], axes[i].size);
      rank = rank * axes[i].size + place[i];
    }
    return rank;
  }

  /// The groups of ranks that differ in their coordinates on these axes alone. Without a name each rank is a group.
  /// @param names Axes, in any order, each once. @throws invalid_argument if one does not exist or stands twice.
  template <std::convertible_to<std::string_view>... Names>
  constexpr mesh_group along(const Names&... names) const;

  /// The mesh of the other axes: each of its ranks stands for one group along this one.
  /// @param name An axis. @throws invalid_argument if there is none of that name.
  constexpr mesh without(std::string_view name) const {
    const int left_out = axis(name);
    mesh result;
    for (int i = 0; i < num_axes; ++i) {
      if (i != left_out) result.add(axes[i]);
    }
    return result;
  }

  /// The same ranks with neighbouring axes merged into one; no rank changes.
  /// @param name  Name of the new axis. @param first Outermost axis to merge. @param last Innermost axis to merge.
  /// @throws invalid_argument if an axis does not exist, `first` is behind `last`, or the name is there already.
  constexpr mesh flattened(std::string_view name, std::string_view first, std::string_view last) const {
    const int from = axis(first);
    const int to = axis(last);
    if (from > to) detail::fail_flatten(first, last, text());
    mesh result;
    for (int i = 0; i < from; ++i) result.add(axes[i]);
    int product = 1;
    for (int i = from; i <= to; ++i) product *= axes[i].size;
    result.add(mesh_axis::named(name, product));
    for (int i = to + 1; i < num_axes; ++i) result.add(axes[i]);
    return result;
  }

  /// The text that `parse` reads. Host: allocates.
  std::string text() const {
    std::string result;
    for (int i = 0; i < num_axes; ++i) {
      if (i > 0) result += ',';
      result.append(axes[i].label()).append("=").append(std::to_string(axes[i].size));
    }
    return result;
  }

  /// Same axes in the same order.
  constexpr bool operator==(const mesh&) const = default;

 private:
  friend struct mesh_group;

  constexpr void add(const mesh_axis& one) {
    if (num_axes == max_mesh_axes) detail::fail_axis_count(max_mesh_axes + 1, max_mesh_axes);
    bool good = !one.label().empty() && !(one.name[0] >= '0' && one.name[0] <= '9');
    for (const char c : one.label()) {
      good = good && ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_');
    }
    if (!good) detail::fail_axis_name(one.label(), max_axis_name);
    if (find(one.label()) >= 0) detail::fail_axis_twice(one.label());
    if (one.size < 1) detail::fail_axis_size(one.label(), one.size);
    if (size() > (std::numeric_limits<int>::max)() / one.size) detail::fail_mesh_size(one.label());
    axes[num_axes++] = one;
  }

  constexpr int checked(int axis_index) const {
    if (axis_index < 0 || axis_index >= num_axes) detail::fail_axis_index(axis_index, num_axes, text());
    return axis_index;
  }

  constexpr int checked_rank(int rank) const {
    if (rank < 0 || rank >= size()) detail::fail_mesh_rank(rank, size(), text());
    return rank;
  }
};

/// The division of a mesh into groups of ranks that differ on the selected axes alone. Members of a group are ordered
/// as in the mesh, the outermost selected axis first, whatever the order in which axes were named. Made by
/// `mesh::along` and `training_mesh::along`; a plain value of a structural type.
struct mesh_group {
  mesh ranks;                  ///< All ranks.
  std::uint32_t selected = 0;  ///< Bit `i`: axis `i` is selected.

  /// Whether an axis is selected.
  constexpr bool has(int axis_index) const { return (selected >> axis_index & 1U) != 0; }

  /// Ranks in each group.
  constexpr int size() const {
    int product = 1;
    for (int i = 0; i < ranks.num_axes; ++i) product *= has(i) ? ranks.axes[i].size : 1;
    return product;
  }

  /// Number of groups.
  constexpr int count() const { return ranks.size() / size(); }

  /// Place of a rank in its group, in `[0, size())`. @throws invalid_argument if there is no such rank.
  constexpr int index(int rank) const { return flat(rank, true); }

  /// The group of a rank, in `[0, count())`. @throws invalid_argument if there is no such rank.
  constexpr int color(int rank) const { return flat(rank, false); }

  /// A member of a rank's group. @param rank Any member. @param place Which one, in `[0, size())`.
  /// @throws invalid_argument if there is no such rank or place.
  constexpr int member(int rank, int place) const {
    if (place < 0 || place >= size()) detail::fail_coordinate("of the group", place, size());
    mesh_coordinates coordinates = ranks.coordinates(rank);
    for (int i = ranks.num_axes - 1; i >= 0; --i) {
      if (!has(i)) continue;
      coordinates[i] = place % ranks.axes[i].size;
      place /= ranks.axes[i].size;
    }
    return ranks.rank_at(coordinates);
  }

  /// Same mesh, same axes.
  constexpr bool operator==(const mesh_group&) const = default;

  /// Selects one more axis. @throws invalid_argument if there is none of that name or it is selected already.
  constexpr void select(std::string_view name) {
    const int found = ranks.axis(name);
    if (has(found)) detail::fail_axis_twice(name);
    selected |= 1U << found;
  }

 private:
  constexpr int flat(int rank, bool of_selected) const {
    const mesh_coordinates coordinates = ranks.coordinates(rank);
    int result = 0;
    for (int i = 0; i < ranks.num_axes; ++i) {
      if (has(i) == of_selected) result = result * ranks.axes[i].size + coordinates[i];
    }
    return result;
  }
};

template <std::convertible_to<std::string_view>... Names>
constexpr mesh_group mesh::along(const Names&... names) const {
  mesh_group group{*this, 0};
  (group.select(names), ...);
  return group;
}

/// The text that `mesh::parse` reads. Host: allocates.
inline std::string to_string(const mesh& ranks) { return ranks.text(); }

TESSERA_NAMESPACE_END

#include <tessera/mesh/detail/mesh_text.hpp>
