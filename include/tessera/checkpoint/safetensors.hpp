// SPDX-FileCopyrightText: Copyright (c) 2026 The Tessera Authors
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The safetensors file format: 8 bytes with the length of a JSON header, the header, the elements. Written so that
/// every reader understands it, read so that nothing in a file is believed.

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <tessera/checkpoint/element_type.hpp>
#include <tessera/checkpoint/io.hpp>
#include <tessera/core/error.hpp>

TESSERA_NAMESPACE_BEGIN

namespace checkpoint {

/// Longest header that a file may have, in bytes: the limit of the format's reference implementation.
inline constexpr std::int64_t max_safetensors_header_bytes = 100'000'000;

/// Alignment in bytes of the first element in files that are written here.
inline constexpr std::int64_t safetensors_alignment = 64;

/// One tensor of a file: row-major, packed, little-endian.
struct safetensors_entry {
  std::string name;                       ///< Its name in the file.
  element_type type = element_type::f32;  ///< Type of its elements.
  std::vector<std::int64_t> shape;        ///< Its extents; empty for a scalar.
  std::int64_t begin = 0;                 ///< First byte, counted from the end of the header.
  std::int64_t end = 0;                   ///< One past the last byte.

  /// Equality.
  bool operator==(const safetensors_entry&) const = default;
};

/// What the header of a file says.
struct safetensors_header {
  std::vector<safetensors_entry> entries;       ///< In ascending order of their names.
  std::map<std::string, std::string> metadata;  ///< `__metadata__`.
  std::int64_t data_begin = 0;                  ///< Where elements start in the file, in bytes.
  std::int64_t data_bytes = 0;                  ///< How many bytes of elements there are.

  /// The tensor with this name; null if there is none.
  const safetensors_entry* find(std::string_view name) const;
};

/// Reads a header that may come from anywhere.
/// @param start      The first bytes of a file, at least up to the end of its header.
/// @param file_bytes Size of the whole file.
/// @param source     How errors call the file.
/// @throws checkpoint_error naming the file, and the tensor where it is one, if the header is too long or not valid
/// JSON, has duplicate keys or an unknown element type, or if tensors overlap, leave holes, do not have the bytes that
/// their shapes need, or do not fill the file.
safetensors_header parse_safetensors_header(std::string_view start, std::int64_t file_bytes, const std::string& source);

/// Reads the header of a file.
/// @param path     The file.
/// @param observer Sees the accesses.
/// @throws checkpoint_error as `parse_safetensors_header` does, and if the file cannot be read.
safetensors_header read_safetensors_header(const std::string& path, const io_observer& observer = {});

/// The beginning of a file: the length, the header, and spaces so that elements start aligned to
/// `safetensors_alignment`.
/// @param entries  The tensors in the order of their elements, `begin` of each equal to `end` of the one before it.
/// @param metadata `__metadata__`; left out if empty.
/// @throws invalid_argument if a string is not UTF-8 or the header becomes too long.
std::string make_safetensors_header(const std::vector<safetensors_entry>& entries,
                                    const std::map<std::string, std::string>& metadata);

}  // namespace checkpoint

TESSERA_NAMESPACE_END

#include <tessera/checkpoint/detail/safetensors.hpp>
