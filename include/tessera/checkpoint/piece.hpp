// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// What a rank holds of a tensor: the input of saving and the output of loading, however it came about.

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <tessera/checkpoint/element_type.hpp>
#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>
#include <tessera/layout/boxes.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// A part of a tensor, without the data: what plans are made from. Ranks that hold the same part of the same tensor are
/// replicas of each other; nobody has to say so.
struct piece_info {
  std::string name;                       ///< Name of the tensor, the same on all ranks and forever. UTF-8.
  element_type type = element_type::f32;  ///< Type of its elements.
  box whole;                              ///< The whole tensor, `box::whole({...})`.
  box part;                               ///< What this rank holds; inside `whole`, possibly empty.
  std::string placement;                  ///< For people who read the manifest, for example "shard(0) on ep". UTF-8.

  /// Same tensor, same part.
  bool operator==(const piece_info&) const = default;
};

/// A part of a tensor and where its elements are, in host memory.
/// @tparam Data `void`, or `const void` for what is only read.
template <class Data>
struct basic_piece : piece_info {
  Data* data = nullptr;  ///< First element of the part, aligned to nothing in particular; may be null if it is empty.
  /// Elements from one index to the next in each dimension; all 0: the part is packed and row-major.
  std::array<std::int64_t, max_box_rank> strides{};

  basic_piece() = default;

  /// @param info     The part. @param data_ Its first element. @param strides_ See `strides`.
  basic_piece(piece_info info, Data* data_, std::array<std::int64_t, max_box_rank> strides_ = {})
      : piece_info(std::move(info)), data(data_), strides(strides_) {}

  /// What is written may be read.
  template <class Other>
  requires(std::is_const_v<Data> && !std::is_const_v<Other>)
      basic_piece(const basic_piece<Other>& other)  // NOLINT: qualification conversion
      : piece_info(other), data(other.data), strides(other.strides) {}
};

using source_piece = basic_piece<const void>;  ///< A part to save.
using target_piece = basic_piece<void>;        ///< A part to load.

/// A piece whose elements are packed: a `target_piece`, or a `source_piece` where `T` is const.
/// @param name  Name of the tensor.
/// @param data  First element of the part.
/// @param whole The whole tensor.
/// @param part  What is at `data`.
/// @param placement For people who read the manifest.
template <class T>
auto piece_of(std::string name, T* data, const box& whole, const box& part, std::string placement = {}) {
  using data_type = std::conditional_t<std::is_const_v<T>, const void, void>;
  return basic_piece<data_type>({std::move(name), element_type_of<T>(), whole, part, std::move(placement)}, data);
}

/// A piece that is a whole tensor: replicated on all ranks that have it.
/// @param name  Name of the tensor.
/// @param data  Its first element.
/// @param whole Its extents, `box::whole({...})`.
template <class T>
auto piece_of(std::string name, T* data, const box& whole) {
  return piece_of(std::move(name), data, whole, whole, "replicate");
}

/// The pieces of an expert tensor that a rank holds under a layout: told in logical experts, so that any other layout
/// can load them. Copies of an expert are replicas.
/// @param name      Name of the tensor.
/// @param data      First element of the rank's tensor `[num_slots, ...]`, packed.
/// @param whole     The tensor of all experts, `box::whole({E, ...})`.
/// @param placement Which rank has which expert.
/// @param rank      Rank of the layout.
/// @throws invalid_argument as `held_boxes` does.
template <class T, expert_layout Layout>
auto expert_pieces(const std::string& name, T* data, const box& whole, const Layout& placement, int rank) {
  using data_type = std::conditional_t<std::is_const_v<T>, const void, void>;
  std::vector<basic_piece<data_type>> pieces;
  const std::int64_t expert_volume = whole.size[0] == 0 ? 0 : whole.volume() / whole.size[0];
  for (const held_box& held : held_boxes(placement, rank, whole)) {
    pieces.push_back(
        piece_of(name, data + held.local.offset[0] * expert_volume, whole, held.logical, "experts by layout"));
  }
  return pieces;
}

/// Checks a piece by itself.
/// @param piece What is checked.
/// @throws invalid_argument naming the tensor if it has no name, its part does not lie in it, or it is larger than
/// 2^62 bytes.
inline void expect_piece(const piece_info& piece) {
  TESSERA_EXPECTS(!piece.name.empty(), "a tensor to save or load has no name");
  TESSERA_EXPECTS(piece.name != "__metadata__", "a tensor cannot be called '__metadata__': files use that name");
  TESSERA_EXPECTS(piece.whole.rank == piece.part.rank && piece.whole.rank >= 0 && piece.whole.rank <= max_box_rank,
                  "tensor '" << piece.name << "' has " << piece.whole.rank << " dimensions and its part "
                             << piece.part.rank << ", they must be the same, in [0, " << max_box_rank << "]");
  std::int64_t left = (std::int64_t{1} << 62) / size_of(piece.type);
  for (int i = 0; i < piece.whole.rank; ++i) {
    const std::int64_t extent = piece.whole.size[i];
    const std::int64_t begin = piece.part.offset[i];
    const std::int64_t size = piece.part.size[i];
    TESSERA_EXPECTS(piece.whole.offset[i] == 0 && extent >= 0 && begin >= 0 && size >= 0 && begin <= extent &&
                        size <= extent - begin,
                    "tensor '" << piece.name << "': the part [" << begin << ", " << begin << " + " << size
                               << ") of dimension " << i << " does not lie in its extent " << extent);
    TESSERA_EXPECTS(extent <= left, "tensor '" << piece.name << "' is larger than 2^62 bytes");
    left = extent == 0 ? left : left / extent;
  }
}

}  // namespace checkpoint

TESSERA_NAMESPACE_END
