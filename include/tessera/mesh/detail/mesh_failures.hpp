// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The sentences with which meshes are refused. A constexpr function cannot stream a message in C++20, but it may call
/// one that throws.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// Throws: the name is none, or too long.
[[noreturn]] inline void fail_axis_name(std::string_view name, int longest) {
  throw invalid_argument("'" + std::string(name) + "' is no name for a mesh axis: 1 to " + std::to_string(longest) +
                         " letters, digits and underscores, not a digit first");
}

/// Throws: the size is not positive.
[[noreturn]] inline void fail_axis_size(std::string_view name, std::int64_t size) {
  throw invalid_argument("mesh axis '" + std::string(name) + "' has size " + std::to_string(size) +
                         ", it must be at least 1");
}

/// Throws: two axes have one name.
[[noreturn]] inline void fail_axis_twice(std::string_view name) {
  throw invalid_argument("mesh axis '" + std::string(name) + "' is named twice");
}

/// Throws: too many axes.
[[noreturn]] inline void fail_axis_count(std::int64_t count, int most) {
  throw invalid_argument("a mesh of " + std::to_string(count) + " axes, at most " + std::to_string(most) +
                         " are possible");
}

/// Throws: more ranks than an int counts.
[[noreturn]] inline void fail_mesh_size(std::string_view name) {
  throw invalid_argument("a mesh of more than 2147483647 ranks: axis '" + std::string(name) + "' makes it too large");
}

/// Throws: there is no axis of that name.
[[noreturn]] inline void fail_axis(std::string_view name, const std::string& mesh) {
  throw invalid_argument("the mesh " + mesh + " has no axis '" + std::string(name) + "'");
}

/// Throws: there is no axis of that number.
[[noreturn]] inline void fail_axis_index(int axis, int num_axes, const std::string& mesh) {
  throw invalid_argument("the mesh " + mesh + " has no axis " + std::to_string(axis) + ", axes are in [0, " +
                         std::to_string(num_axes) + ")");
}

/// Throws: there is no such rank.
[[noreturn]] inline void fail_mesh_rank(std::int64_t rank, int num_ranks, const std::string& mesh) {
  throw invalid_argument("the mesh " + mesh + " has no rank " + std::to_string(rank) + ", ranks are in [0, " +
                         std::to_string(num_ranks) + ")");
}

/// Throws: a coordinate is outside of its axis.
[[noreturn]] inline void fail_coordinate(std::string_view name, int coordinate, int size) {
  throw invalid_argument("coordinate " + std::to_string(coordinate) + " on mesh axis '" + std::string(name) +
                         "', coordinates are in [0, " + std::to_string(size) + ")");
}

/// Throws: axes to merge are in the wrong order.
[[noreturn]] inline void fail_flatten(std::string_view first, std::string_view last, const std::string& mesh) {
  throw invalid_argument("axes '" + std::string(first) + "' to '" + std::string(last) + "' of the mesh " + mesh +
                         " cannot be merged: the first must not stand behind the last");
}

}  // namespace detail

TESSERA_NAMESPACE_END
