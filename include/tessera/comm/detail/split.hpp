// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The membership rule of `split`, shared by the host communicators.

#include <algorithm>
#include <array>
#include <vector>

#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace detail {

/// The ranks that share this rank's color, ordered by key, then by rank. @param color,key This rank's choice.
/// @param size Number of ranks. @param gather `gather(send, recv)` is an all-gather of one element.
/// @throws invalid_argument on all ranks if the color of any is negative.
template <class Gather>
std::vector<int> split_members(int color, int key, int size, Gather gather) {
  using choice = std::array<int, 2>;  // color, key
  const choice own{color, key};
  std::vector<choice> all(static_cast<std::size_t>(size));
  gather(&own, all.data());
  std::vector<int> members;
  for (int rank = 0; rank < size; ++rank) {
    const int theirs = all[static_cast<std::size_t>(rank)][0];
    TESSERA_EXPECTS(theirs >= 0, "split: rank " << rank << " gives color = " << theirs << ", it must not be negative");
    if (theirs == color) members.push_back(rank);
  }
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) {
    return all[static_cast<std::size_t>(a)][1] < all[static_cast<std::size_t>(b)][1];
  });
  return members;
}

}  // namespace detail

TESSERA_NAMESPACE_END
