// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The manifest of a checkpoint: which part of which tensor stands where in which file, and the state of the run.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <tessera/checkpoint/element_type.hpp>
#include <tessera/checkpoint/train_state.hpp>
#include <tessera/core/box.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// Version of the manifest's format.
inline constexpr std::int64_t manifest_version = 1;

/// Longest manifest that is read, in bytes.
inline constexpr std::int64_t max_manifest_bytes = std::int64_t{1} << 30;

/// Name of the manifest in the folder of a checkpoint.
inline constexpr std::string_view manifest_name = "manifest.json";

/// A file of tensors.
struct manifest_file {
  std::string name;                   ///< In the folder of the manifest: no path.
  std::int64_t bytes = 0;             ///< Its size.
  std::int64_t header_bytes = 0;      ///< Where elements start.
  std::uint64_t header_checksum = 0;  ///< XXH3 of the bytes before.

  /// Equality.
  bool operator==(const manifest_file&) const = default;
};

/// A part of a tensor, packed and row-major in a file.
struct manifest_chunk {
  box part;                              ///< What it is, in the whole tensor.
  std::int32_t file = 0;                 ///< Index into `manifest::files`.
  std::string entry;                     ///< Name of the tensor in that file.
  std::int64_t begin = 0;                ///< Its first byte, counted from the start of the file.
  std::vector<std::uint64_t> checksums;  ///< XXH3 of each of its blocks; empty in files of others, which have none.

  /// Equality.
  bool operator==(const manifest_chunk&) const = default;
};

/// A tensor: its chunks cover each element exactly once.
struct manifest_tensor {
  std::string name;                       ///< Unique.
  element_type type = element_type::f32;  ///< Type of its elements.
  box whole;                              ///< Its extents.
  std::string placement;                  ///< As the pieces had it: for people.
  std::vector<manifest_chunk> chunks;     ///< Where it is.

  /// Equality.
  bool operator==(const manifest_tensor&) const = default;
};

/// A checkpoint without its tensors' elements.
struct manifest {
  std::int64_t num_ranks = 1;        ///< Ranks that saved it; any number may load it.
  std::int64_t block_bytes = 0;      ///< Bytes with a checksum of their own: chunks divide into blocks of at most this.
  train_state state;                 ///< Of the run.
  std::vector<manifest_file> files;  ///< Files of tensors.
  std::vector<manifest_tensor> tensors;  ///< In ascending order of their names.

  /// The tensor with this name; null if there is none.
  const manifest_tensor* find(std::string_view name) const;
  /// Equality.
  bool operator==(const manifest&) const = default;
};

/// Smallest and largest size of a block, in bytes.
inline constexpr std::int64_t min_block_bytes = 4096;
/// Largest size of a block, in bytes.
inline constexpr std::int64_t max_block_bytes = std::int64_t{1} << 40;

/// Checks that a manifest makes sense: names are unique, chunks lie in their files and their tensors, do not overlap in
/// either and cover each tensor. O(n log n).
/// @param content What is checked.
/// @param source  How errors call it.
/// @throws checkpoint_error naming `source`, the tensor and the file.
void expect_manifest(const manifest& content, const std::string& source);

/// The text of a manifest, with a checksum of itself.
/// @param content A manifest that passes `expect_manifest`.
/// @throws invalid_argument if a string is not UTF-8 or the learning rate is not finite.
std::string to_json(const manifest& content);

/// Whether the checksum of a manifest is compared.
enum class self_check {
  on,   ///< It must be there and right.
  off,  ///< For texts written by hand, and to look for errors in this function.
};

/// Reads a manifest that may come from anywhere.
/// @param text   The file.
/// @param source How errors call it.
/// @param check  Whether its own checksum is compared.
/// @throws checkpoint_error naming `source` if it is not valid JSON, of another version, damaged, or does not pass
/// `expect_manifest`.
manifest parse_manifest(std::string_view text, const std::string& source, self_check check = self_check::on);

}  // namespace checkpoint

TESSERA_NAMESPACE_END

#include <tessera/checkpoint/detail/manifest.hpp>
